"""
The cache keeps within its limit: what was used least recently goes first, and what is being sent never.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import allocation
from ecrproxy.cache.entries import Entry
from ecrproxy.cache.janitor import FILES_AT_ONCE, PAUSE_SECONDS, SHARE, Janitor, victims, victims_for_inodes
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import QUIET_SECONDS
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Digest, Kind, Route
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

    def test_for_inodes_the_oldest_entries_go_and_then_the_oldest_content(self) -> None:
        files = [("content/a", 1, False), ("entries/b", 1, True), ("entries/c", 1, False), ("content/d", 1, False)]
        self.assertEqual(["entries/c", "content/a"], victims_for_inodes(files, 2))
        self.assertEqual(["entries/c"], victims_for_inodes(files, 1))
        self.assertEqual(["entries/c", "content/a", "content/d"], victims_for_inodes(files, 9))

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
        self.now, self.clock = START, Clock()
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
        janitor = Janitor(store, limit or self.limit, self.in_thread, self.clock)
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
        self.janitor = Janitor(self.store, self.limit, self.later, self.clock)
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

    def test_room_is_had_before_the_count_and_the_limit_kept_after_it(self) -> None:
        self.assertTrue(self.successResultOf(self.ask(90)))
        digest = put(self.store, b"2" * 90)
        self.janitor.release(90)
        self.assertFalse(self.successResultOf(self.after(self.ask(101))))
        self.assertEqual([False, True], self.has(self.old, digest))

    def test_what_a_dead_daemon_left_is_swept_with_each_count(self) -> None:
        """
        At the start the disk may fail, or hang.
        """
        for _ in range(2):
            left = self.root / "ingest" / "sha256-abc.1234"
            left.write_text("half")
            self.work()
            self.assertFalse(left.exists())
            self.clock.advance(PAUSE_SECONDS)

    def test_what_is_known_before_the_count_is_kept_to(self) -> None:
        self.assertTrue(self.successResultOf(self.ask(60)))
        other = self.ask(60)
        self.threads.pop(1)[1].callback(False)
        self.assertFalse(self.successResultOf(other))

    def test_who_wants_room_waits_for_no_later_count(self) -> None:
        """
        Counting has a thread of its own; files go in the others meanwhile.
        """
        self.work()
        self.janitor.stopService()
        janitor = Janitor(self.store, self.limit, self.in_thread, self.clock, self.later)
        janitor.startService()
        self.work()
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(1, len(self.threads))
        self.assertTrue(self.successResultOf(Deferred.fromCoroutine(janitor.reserve(90))))
        self.assertEqual([False], self.has(self.old))

    def test_what_can_never_fit_waits_for_nothing(self) -> None:
        """
        A blob larger than the limit streams through at once.
        """
        self.assertFalse(self.successResultOf(self.ask(101)))

    def test_who_leaves_while_room_is_made_takes_none(self) -> None:
        self.work()
        gone = self.ask(90)
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.work()
        self.assertEqual(0, self.store.ledger.reserved)

    def test_a_disk_that_hangs_while_room_is_made_takes_none(self) -> None:
        self.work()
        asked = self.ask(90)
        (make, hung), self.threads = self.threads[0], []
        hung.errback(TimeoutError())
        self.failureResultOf(asked, TimeoutError)
        make()
        self.assertEqual(0, self.store.ledger.reserved)

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
        self.threads.pop(0)[1].errback(OSError(errno.EIO, os.strerror(errno.EIO)))
        self.assertEqual(1, len(self.flushLoggedErrors(OSError)))
        self.assertTrue(self.successResultOf(self.ask(20)))

    def test_a_count_without_file_descriptors_is_no_count(self) -> None:
        """
        What can't be looked at for now is not taken for empty; the next count makes good for it.
        """
        self.patch(os, "scandir", failing(errno.EMFILE))
        self.patch(Path, "iterdir", failing(errno.EMFILE))
        self.work()
        self.assertEqual(1, len(self.flushLoggedErrors(OSError)))
        self.flushLoggedErrors()


class SmallDisk(SmallCache):
    """
    A disk of 100 KiB, and a limit far beyond.
    """

    limit = 2**30
    CAPACITY = 100 * 1024

    def setUp(self) -> None:
        self.others = 0
        self.patch(os, "statvfs", lambda _: self.status())
        self.patch(allocation, "fallocate", self.allocate)
        super().setUp()

    def free(self) -> int:
        return self.CAPACITY - self.others - self.bytes_on_disk()

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(f_blocks=self.CAPACITY, f_frsize=1, f_bavail=max(0, self.free()), f_files=0, f_favail=0)

    def allocate(self, fd: int, size: int) -> None:
        if size > self.free():
            failing(errno.ENOSPC)()
        os.ftruncate(fd, size)

    def test_the_limit_is_what_the_disk_holds(self) -> None:
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)
        self.others = 50 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100 - self.others, self.janitor.limit)
        self.others = 0
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_a_limit_that_the_disk_holds_stays(self) -> None:
        self.assertEqual(1000, self.start(self.store, 1000).limit)

    def test_a_lowered_limit_is_told_once(self) -> None:
        with capturedLogs() as events:
            janitor = self.start(self.make_store())
            for _ in range(3):
                self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(1, sum("limited" in event["log_format"] for event in events))
        self.assertLess(janitor.limit, self.limit)

    def test_a_disk_that_tells_nothing_lowers_nothing(self) -> None:
        for told in (lambda _: SimpleNamespace(f_blocks=0, f_frsize=1, f_bavail=0, f_files=0), failing(errno.EIO)):
            self.patch(os, "statvfs", told)
            self.assertEqual(self.limit, self.start(self.make_store()).limit)

    def test_content_goes_on_being_kept_on_a_disk_that_fills_up(self) -> None:
        for number in range(100):
            self.keep(bytes([number]) * 10 * 1024)
        self.assertGreaterEqual(sum(self.has(*(Digest.of(bytes([n]) * 10 * 1024) for n in range(90, 100)))), 8)
        self.assertEqual([], self.store.troubles.reasons())

    def test_what_others_take_is_made_up_for_at_once(self) -> None:
        one, two = self.keep(b"1" * 40 * 1024), self.keep(b"2" * 40 * 1024)
        self.others = 20 * 1024  # nothing is left
        three = self.keep(b"3" * 10 * 1024)
        self.assertEqual([False, True, True], self.has(one, two, three))
        self.assertEqual([], self.store.troubles.reasons())
        self.assertLessEqual(self.janitor.limit, self.CAPACITY - self.others)

    def test_an_entry_has_room_made_too(self) -> None:
        one = self.keep(b"1" * 70 * 1024)
        self.others = 30 * 1024
        real = Path.write_bytes

        def write(path: Path, data: bytes) -> int:
            if len(data) > self.free():
                failing(errno.ENOSPC)()
            return real(path, data)

        self.patch(Path, "write_bytes", write)
        self.store.check()
        self.assertEqual([False], self.has(one))

    def test_where_nothing_can_go_the_disk_is_full(self) -> None:
        self.others = self.CAPACITY
        self.assertRaises(OSError, put, self.store, b"1" * 1000)
        self.assertIn("No space left", str(self.store.troubles.reasons()))

    def test_room_that_others_give_back_is_used_at_once(self) -> None:
        """
        Not after the next count, which may be many minutes away.
        """
        one = self.keep(b"1" * 10 * 1024)
        self.others = 80 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.assertFalse(self.reserve(40 * 1024))
        self.others = 0
        self.assertTrue(self.reserve(40 * 1024))
        self.assertEqual([True], self.has(one))

    def test_nothing_is_evicted_for_room_that_others_have_given_back(self) -> None:
        one = self.keep(b"1" * 10 * 1024)
        self.others = 80 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.others = 0
        self.assertTrue(self.reserve(15 * 1024))
        self.assertEqual([True], self.has(one))

    def test_room_that_is_promised_and_not_taken_yet_is_promised_to_nobody_else(self) -> None:
        """
        The disk calls it free; many pulls at once would have found the disk full, and the daemon not ready.
        """
        self.assertEqual([True, True, False], [self.reserve(40 * 1024) for _ in range(3)])
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_room_that_others_give_back_is_used_while_something_arrives(self) -> None:
        self.others = 50 * 1024
        self.clock.advance(PAUSE_SECONDS)
        data = b"1" * 40 * 1024
        self.assertTrue(self.reserve(len(data)))
        writer = self.store.writer(Digest.of(data), len(data))
        self.addCleanup(writer.discard)
        self.assertFalse(self.reserve(10 * 1024))
        self.others = 0
        self.assertTrue(self.reserve(10 * 1024))

    def test_a_disk_that_others_have_filled_up_is_told_until_it_is_over(self) -> None:
        """
        Though there is room for a small file, which was made by evicting.
        """
        self.keep(b"1" * 10 * 1024)
        self.others = self.CAPACITY
        for _ in range(3):
            self.clock.advance(PAUSE_SECONDS)
            self.assertIn("other files leave the cache", str(self.store.reasons()))
        self.others = 0
        self.now += QUIET_SECONDS
        self.assertEqual([], self.store.reasons())
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_a_disk_that_others_fill_up_is_told_before_the_next_count(self) -> None:
        self.start(self.store, self.CAPACITY // 2)
        self.others = self.CAPACITY
        self.assertIn("other files leave the cache", str(self.store.reasons()))

    def test_small_files_that_are_written_meanwhile_do_not_end_it(self) -> None:
        self.others = self.CAPACITY - self.CAPACITY // 100 - 100
        with capturedLogs() as events:
            for number in range(3):
                self.assertIn("other files leave the cache", str(self.store.reasons()))
                self.now += QUIET_SECONDS
                self.keep(b"%d" % number)
        self.assertEqual(1, sum(event["log_namespace"] == "ecrproxy.cache.troubles" for event in events))


class FewInodes(SmallCache):
    """
    A disk of many bytes, and inodes for 400 files.
    """

    limit = 2**30
    INODES = 400

    def setUp(self) -> None:
        self.patch(os, "statvfs", lambda _: self.status())
        self.real = os.open
        self.patch(os, "open", self.open)
        self.write = Path.write_bytes
        self.patch(Path, "write_bytes", lambda path, data: self.write_bytes(path, data))  # noqa: PLW0108 (a method gets no path)
        super().setUp()
        self.blobs = [self.keep(b"%d" % number) for number in range(20)]
        self.entries = self.save(range(350))

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(
            f_blocks=2**32, f_frsize=1, f_bavail=2**31, f_files=self.INODES, f_favail=max(0, self.INODES - self.files())
        )

    def files(self) -> int:
        return sum(path.is_file() for path in self.root.rglob("*"))

    def take_inode(self) -> None:
        if self.files() >= self.INODES:
            failing(errno.ENOSPC)()

    def write_bytes(self, path: Path, data: bytes) -> int:
        self.take_inode()
        return self.write(path, data)

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and str(self.root) in str(path):
            self.take_inode()
        return self.real(path, flags, *args, **kwargs)

    def save(self, numbers: Iterable[int]) -> list[str]:
        route = Route(Kind.MANIFEST, "team/app", "latest")
        names = [f"{number:064x}" for number in numbers]
        for name in names:
            self.store.save(name, Entry.of(RegistryId("x"), route))
        return names

    def test_files_go_by_number_and_entries_first(self) -> None:
        with capturedLogs() as events:
            self.save(range(350, 400))
            more = [self.keep(b"more%d" % number) for number in range(20)]
        self.assertEqual({True}, set(self.has(*self.blobs, *more)))
        self.assertEqual(FILES_AT_ONCE, self.janitor.evicted)
        self.assertFalse((self.root / "entries/00" / self.entries[0]).exists())
        self.assertEqual(self.limit, self.janitor.limit)
        self.assertEqual([], self.store.reasons())
        self.assertEqual(["inodes"], [event["once"] for event in events if "no inodes" in event["log_format"]])

    def test_content_goes_where_there_are_no_entries(self) -> None:
        for name in self.entries:
            self.store.forget(name)
        self.INODES = 20
        new = self.keep(b"new")
        self.assertEqual([False] * 20 + [True], self.has(*self.blobs, new))

    def test_where_nothing_can_go_the_reason_is_said(self) -> None:
        self.INODES = 1
        self.store.evict = lambda _: False
        self.assertEqual(["the cache directory can't be written: No inodes left on device"], self.store.reasons())

    def test_a_disk_that_lacks_bytes_too_is_full(self) -> None:
        """
        XFS makes inodes of free space: without bytes it has none.
        """
        full = SimpleNamespace(f_blocks=2**30, f_frsize=1, f_bavail=0, f_files=100, f_favail=0)
        self.patch(os, "statvfs", lambda _: full)
        self.assertFalse(self.store.lacks_inodes())
        self.patch(os, "statvfs", failing(errno.EIO))
        self.assertFalse(self.store.lacks_inodes())


class RecountTests(SmallCache):
    """
    The directory is counted again and again: it may be somebody else's too.
    """

    def wait(self) -> None:
        """
        Let the janitor count once more.
        """
        self.clock.advance(PAUSE_SECONDS)

    def test_what_somebody_deleted_is_room_again(self) -> None:
        """
        Nobody needs to ask for what is gone.
        """
        gone = self.keep(b"1" * 60)
        kept = self.keep(b"2" * 40)
        (self.store.root / self.store.content_path(gone)).unlink()
        self.wait()
        self.assertEqual(40, self.store.ledger.total)
        self.assertTrue(self.reserve(60))
        self.assertEqual([True], self.has(kept))

    def test_what_somebody_brought_counts(self) -> None:
        """
        The least recently used goes, whoever brought it.
        """
        old = self.keep(b"1" * 60)
        other = self.make_store()
        self.now += 1
        put(other, b"2" * 60)
        self.wait()
        self.assertEqual([False, True], self.has(old, Digest.of(b"2" * 60)))
        self.assertEqual((60, 60), (self.store.ledger.total, self.bytes_on_disk()))

    def test_two_daemons_keep_the_limit_together(self) -> None:
        """
        Whatever both bring in, after the next count of either the directory is within the limit, and all is right.
        """
        stores = [self.store, self.make_store()]
        janitors = [self.janitor, self.start(stores[1])]
        for number in range(40):
            self.now += 1
            store, janitor = stores[number % 2], janitors[number % 2]
            data = bytes([number]) * (10 + number % 30)
            self.assertTrue(self.successResultOf(Deferred.fromCoroutine(janitor.reserve(len(data)))))
            put(store, data)
            janitor.release(len(data))
            self.assertEqual(data, read(stores[1 - number % 2], Digest.of(data)))
            if number % 5 == 4:
                self.wait()
                self.assertLessEqual(self.bytes_on_disk(), self.limit)

    def test_another_daemon_is_told_once(self) -> None:
        """
        Who did not mean to have two on one directory reads it in the log.
        """
        other = self.make_store()
        with capturedLogs() as events:
            self.wait()
            for data in (b"1", b"2"):
                put(other, data)
                self.wait()
        self.assertEqual(1, sum("another daemon" in event["log_format"] for event in events))

    def test_a_count_that_fails_is_not_the_last(self) -> None:
        """
        The next one has it.
        """
        self.keep(b"1" * 60)
        patch = self.patch(Store, "count", failing(errno.EMFILE))
        self.wait()
        patch.restore()
        self.assertEqual(1, len(self.flushLoggedErrors(OSError)))
        self.assertEqual(60, self.store.ledger.total)
        (self.store.root / self.store.content_path(Digest.of(b"1" * 60))).unlink()
        self.wait()
        self.assertEqual(0, self.store.ledger.total)

    def test_counting_takes_a_small_part_of_the_time(self) -> None:
        """
        Where it takes long it happens seldom.
        """
        counts: list[float] = []

        def counting(store: Store) -> int:
            counts.append(self.clock.seconds())
            self.clock.advance(10)
            return 0

        self.patch(Store, "count", counting)
        self.wait()
        for _ in range(2 * 10 * SHARE + 30):
            self.clock.advance(1)
        self.assertEqual([60, 60 + 10 * (SHARE + 1), 60 + 20 * (SHARE + 1)], counts)

    def test_nothing_is_counted_after_the_end(self) -> None:
        """
        A daemon that has ended looks at nothing any more.
        """
        self.janitor.stopService()
        self.assertEqual([], self.clock.getDelayedCalls())


class RaceTests(SmallCache):
    """
    Real threads at the same time.
    """

    limit = 200_000

    def test_a_janitor_racing_readers_and_writers(self) -> None:
        """
        Threads that bring in, read and evict, with counts in between: what is read is right, and all is counted.
        """
        blobs = [random.Random(number).randbytes(20_000 + number) for number in range(20)]
        start = threading.Barrier(6)

        def use(seed: int) -> bool:
            chance = random.Random(seed)
            start.wait()
            return all(self.pull(chance.choice(blobs)) for _ in range(150))

        def count() -> bool:
            start.wait()
            for _ in range(40):
                self.store.count()
                self.janitor.make_room(0)
            return True

        with ThreadPoolExecutor(6) as pool:
            working = [*(pool.submit(use, seed) for seed in range(5)), pool.submit(count)]
            self.assertEqual([True] * 6, [each.result() for each in working])
        self.store.count()
        self.janitor.make_room(0)
        self.assertEqual((0, self.bytes_on_disk()), (self.store.ledger.reserved, self.store.ledger.total))
        self.assertLessEqual(self.bytes_on_disk(), self.limit)
        for path in (self.root / "content").rglob("*"):
            if path.is_file():
                self.assertEqual(path.name, Digest.of(path.read_bytes()).hex)

    def pull(self, data: bytes) -> bool:
        """
        Read a blob, or bring it in if there is room for it; tells whether what was read is right.
        """
        found = read(self.store, Digest.of(data))
        if found is None and self.janitor.make_room(len(data)):
            put(self.store, data)
            self.janitor.release(len(data))
        return found in (None, data)
