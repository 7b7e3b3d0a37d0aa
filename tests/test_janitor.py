"""
The cache keeps within its limit: what was used least recently goes first, and what is being sent never.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.janitor import Janitor, victims
from ecrproxy.oci import Digest
from ecrproxy.store import Store
from tests.store_contract import START, failing, put, read, scratch

T = TypeVar("T")


class VictimsTests(SynchronousTestCase):
    """
    Who goes is decided by the order of use, the sizes and who is being read.
    """

    def test_the_least_recently_used_goes_first(self) -> None:
        """
        And no more than is needed.
        """
        files = [("a", 10, False), ("b", 10, False), ("c", 10, False)]
        self.assertEqual(["a"], victims(files, 1))
        self.assertEqual(["a"], victims(files, 10))
        self.assertEqual(["a", "b"], victims(files, 11))
        self.assertEqual(["a", "b", "c"], victims(files, 30))

    def test_where_there_is_room_nothing_goes(self) -> None:
        """
        Down to the last byte.
        """
        for excess in (0, -1, -1000):
            self.assertEqual([], victims([("a", 10, False)], excess))
            self.assertEqual([], victims([], excess))

    def test_what_is_being_read_stays(self) -> None:
        """
        Though it is the oldest, the next one goes instead.
        """
        self.assertEqual(["b"], victims([("a", 10, True), ("b", 10, False), ("c", 10, False)], 5))

    def test_if_all_is_not_enough_nothing_goes(self) -> None:
        """
        Emptying the cache for what will not fit anyway helps nobody.
        """
        self.assertIsNone(victims([("a", 10, False), ("b", 10, False)], 21))
        self.assertIsNone(victims([("a", 10, False), ("b", 10, True)], 11))
        self.assertIsNone(victims([], 1))

    def test_no_more_is_looked_at_than_is_needed(self) -> None:
        """
        In a cache of many files, making room for one costs one.
        """
        files = iter([("a", 10, False), ("b", 10, False), ("c", 10, False)])
        victims(files, 10)
        self.assertIn(("c", 10, False), list(files))


class SmallCache(SynchronousTestCase):
    """
    A cache of at most 100 bytes.
    """

    limit = 100

    def setUp(self) -> None:
        """
        An empty cache, counted.
        """
        self.now = START
        self.root = scratch(self)
        self.store = self.make_store()
        self.janitor = self.start(self.store)

    def make_store(self) -> Store:
        """
        Open the cache as a daemon does that starts.
        """
        store = Store(self.root, lambda: self.now)
        store.prepare()
        return store

    def in_thread(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Call at once what is else called in a thread.
        """
        return execute(blocking, *args)

    def start(self, store: Store, limit: int | None = None) -> Janitor:
        """
        Start a janitor.
        """
        janitor = Janitor(store, limit or self.limit, self.in_thread)
        janitor.startService()
        return janitor

    def reserve(self, size: int) -> bool:
        """
        Ask for room, and have the answer.
        """
        return self.successResultOf(Deferred.fromCoroutine(self.janitor.reserve(size)))

    def keep(self, data: bytes) -> Digest:
        """
        Keep content as a transfer does: first the room, then the bytes.
        """
        self.now += 1
        self.assertTrue(self.reserve(len(data)))
        digest = put(self.store, data)
        self.janitor.release(len(data))
        return digest

    def has(self, *digests: Digest) -> list[bool]:
        """
        Tell which of them there are.
        """
        return [self.store.has(digest) for digest in digests]

    def bytes_on_disk(self) -> int:
        """
        Weigh the content.
        """
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


class JanitorTests(SmallCache):
    """
    Room is made for what arrives.
    """

    def test_room_is_made_by_evicting_the_least_recently_used(self) -> None:
        """
        Reading keeps content young.
        """
        one, two, three = self.keep(b"1" * 40), self.keep(b"2" * 40), self.keep(b"3" * 20)
        read(self.store, one)
        four = self.keep(b"4" * 30)
        self.assertEqual([True, False, True, True], self.has(one, two, three, four))
        self.assertEqual(90, self.bytes_on_disk())
        self.assertEqual(90, self.store.ledger.total)

    def test_the_limit_can_be_filled(self) -> None:
        """
        Nothing goes as long as everything fits, to the last byte.
        """
        digests = [self.keep(data * 50) for data in (b"1", b"2")]
        self.assertEqual([True, True], self.has(*digests))
        self.assertEqual(100, self.bytes_on_disk())

    def test_what_is_being_sent_is_never_evicted(self) -> None:
        """
        Others go before it though it is older; where only such is left, there is no room.
        """
        one, two = self.keep(b"1" * 40), self.keep(b"2" * 40)
        content = self.store.open(one)
        assert content is not None
        read(self.store, two)
        self.assertTrue(self.reserve(60))
        self.assertEqual([True, False], self.has(one, two))
        self.assertFalse(self.reserve(1))
        content.close()
        self.assertTrue(self.reserve(1))
        self.assertEqual([False, False], self.has(one, two))

    def test_what_can_never_fit_evicts_nothing(self) -> None:
        """
        A blob larger than the limit, or than what others leave of it, costs the cache nothing.
        """
        one = self.keep(b"1" * 90)
        self.assertFalse(self.reserve(101))
        self.assertTrue(self.reserve(10))
        self.assertFalse(self.reserve(91))
        self.assertEqual([True], self.has(one))
        self.assertEqual(10, self.store.ledger.reserved)

    def test_what_is_arriving_counts(self) -> None:
        """
        Content and arriving bytes together keep within the limit, and room that was given back is had again.
        """
        one = self.keep(b"1" * 40)
        self.assertTrue(self.reserve(60))
        self.assertEqual([True], self.has(one))
        self.assertTrue(self.reserve(1))
        self.assertEqual([False], self.has(one))
        self.assertFalse(self.reserve(40))
        self.janitor.release(60)
        self.assertTrue(self.reserve(99))
        self.assertFalse(self.reserve(1))

    def test_nothing_is_no_question(self) -> None:
        """
        Content without bytes has room in a full cache.
        """
        self.keep(b"1" * 100)
        self.assertTrue(self.reserve(0))

    def test_recency_survives_a_restart(self) -> None:
        """
        After it, the least recently used still goes first.
        """
        one, two, three = self.keep(b"1" * 30), self.keep(b"2" * 30), self.keep(b"3" * 30)
        for digest in (two, three, one):
            self.now += 1
            read(self.store, digest)
        self.store = self.make_store()
        self.janitor = self.start(self.store)
        self.assertEqual(90, self.store.ledger.total)
        self.keep(b"4" * 40)
        self.assertEqual([True, False, True], self.has(one, two, three))

    def test_a_lowered_limit_holds_from_the_start(self) -> None:
        """
        What is too much goes at once, the least recently used first.
        """
        one, two = self.keep(b"1" * 40), self.keep(b"2" * 40)
        for digest in (two, one):
            self.now += 1
            read(self.store, digest)
        self.store = self.make_store()
        self.janitor = self.start(self.store, 50)
        self.assertEqual([True, False], self.has(one, two))
        self.assertEqual(40, self.bytes_on_disk())

    def test_what_is_evicted_while_it_is_open_stays_readable(self) -> None:
        """
        Even where the cache was emptied by hand under an answer, the answer goes on.
        """
        one = self.keep(b"1" * 40)
        content = self.store.open(one)
        assert content is not None
        self.addCleanup(content.close)
        self.store.remove(self.store.content_path(one))
        self.assertTrue(self.reserve(100))
        self.assertEqual(b"1" * 40, content.read())

    def test_files_that_cannot_be_removed_do_not_stop_the_others(self) -> None:
        """
        One that another user owns leaves the rest of the cache at work.
        """
        one, two = self.keep(b"1" * 50), self.keep(b"2" * 50)
        real = Path.unlink

        def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == one.hex:
                failing(errno.EPERM)()
            real(path, *args, **kwargs)

        self.patch(Path, "unlink", unlink)
        self.assertTrue(self.reserve(80))
        self.assertEqual([True, False], self.has(one, two))

    def test_files_that_cannot_be_removed_go_on_being_counted(self) -> None:
        """
        What is on the disk is part of what the cache holds, wanted or not.
        """
        self.keep(b"1" * 50)
        self.patch(Path, "unlink", failing(errno.EPERM))
        self.reserve(80)
        self.assertEqual(self.bytes_on_disk(), self.store.ledger.total)


class CountingTests(SmallCache):
    """
    A daemon serves before it has counted a large cache, but makes no promise about its room.
    """

    def setUp(self) -> None:
        """
        A cache with 80 bytes in it, and a daemon that starts on it and has not counted yet.
        """
        super().setUp()
        self.old = self.keep(b"1" * 80)
        self.store = self.make_store()
        self.threads: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.janitor = Janitor(self.store, self.limit, self.later)
        self.janitor.startService()

    def later(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Put off what is called in a thread.
        """
        deferred: Deferred[T] = Deferred()
        self.threads.append((lambda: blocking(*args), deferred))
        return deferred

    def work(self) -> None:
        """
        Let the threads do all there is to do.
        """
        while self.threads:
            blocking, deferred = self.threads.pop(0)
            execute(blocking).chainDeferred(deferred)

    def ask(self, size: int) -> Deferred[bool]:
        """
        Ask for room.
        """
        return Deferred.fromCoroutine(self.janitor.reserve(size))

    def test_room_is_promised_after_the_first_count(self) -> None:
        """
        Before, nobody knows what fits; then all who waited are told, each with what the others took.
        """
        one, other = self.ask(20), self.ask(90)
        self.assertNoResult(one)
        self.assertNoResult(other)
        self.work()
        self.assertEqual((True, False), (self.successResultOf(one), self.successResultOf(other)))
        self.assertEqual([True], self.has(self.old))

    def test_what_can_never_fit_waits_for_nothing(self) -> None:
        """
        A blob larger than the limit streams through at once.
        """
        self.assertFalse(self.successResultOf(self.ask(101)))

    def test_who_leaves_while_the_count_runs_takes_no_room(self) -> None:
        """
        And keeps nobody else from theirs.
        """
        gone, kept = self.ask(20), self.ask(20)
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.work()
        self.assertTrue(self.successResultOf(kept))
        self.assertEqual(20, self.store.ledger.reserved)

    def test_content_that_is_used_while_the_count_runs_is_young(self) -> None:
        """
        What a client got meanwhile is not the first to go.
        """
        other = put(self.make_store(), b"2" * 15)
        self.now += 1
        read(self.make_store(), other)  # the daemon before this one used it last
        read(self.store, self.old)
        self.work()
        self.assertTrue(self.successResultOf(self.after(self.ask(20))))
        self.assertEqual([True, False], self.has(self.old, other))

    def after(self, asked: Deferred[bool]) -> Deferred[bool]:
        """
        Let the threads work for an answer.
        """
        self.work()
        return asked

    def test_a_count_that_fails_stops_nobody(self) -> None:
        """
        The cache goes on with what it knows, and the log has the failure.
        """
        waiting = self.ask(20)
        self.threads.pop(0)[1].errback(OSError(errno.EIO, os.strerror(errno.EIO)))
        self.assertEqual(1, len(self.flushLoggedErrors(OSError)))
        self.work()
        self.assertTrue(self.successResultOf(waiting))
