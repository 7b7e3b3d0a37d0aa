"""
The cache stays within its limit: the least recently used content is evicted first, and what is being sent never.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import allocation, arriving, record
from ecrproxy.cache import writer as writer_module
from ecrproxy.cache.arriving import LEFT_SECONDS
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.database import BusyError, FullError
from ecrproxy.cache.index import Index
from ecrproxy.cache.janitor import EVICTING, FILES_AT_ONCE, PAUSE_SECONDS, Janitor, victims
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.scrub import LOOK_SECONDS, SHARE, Scrub
from ecrproxy.cache.scrub import PAUSE_SECONDS as SCRUB_SECONDS
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.store import Candidate, Store
from ecrproxy.cache.troubles import QUIET_SECONDS
from ecrproxy.cache.writer import Writer
from ecrproxy.cached.cache import Cache
from ecrproxy.oci import Digest
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk
from tests.daemon import Hands
from tests.store_contract import START, begin, failing, put, read, scratch

T = TypeVar("T")
BLOCK = 4096


class VictimsTests(SynchronousTestCase):
    """
    The order of use and the sizes decide.
    """

    files = tuple(Candidate(Reservation(name), 10, 0) for name in "abc")

    def chosen(self, excess: int) -> list[str] | None:
        found = victims(self.files, excess)
        return None if found is None else [each.what.name for each in found if isinstance(each.what, Reservation)]

    def test_the_least_recently_used_goes_first(self) -> None:
        """
        And no more than needed.
        """
        for excess, gone in ((1, ["a"]), (10, ["a"]), (11, ["a", "b"]), (30, ["a", "b", "c"])):
            self.assertEqual(gone, self.chosen(excess))

    def test_where_there_is_room_nothing_goes(self) -> None:
        """
        Down to the last byte.
        """
        for excess in (0, -1, -1000):
            self.assertEqual([], self.chosen(excess))
            self.assertEqual([], victims([], excess))

    def test_if_all_is_not_enough_nothing_goes(self) -> None:
        """
        Emptying the cache for what will not fit anyway helps nobody.
        """
        self.assertIsNone(self.chosen(31))
        self.assertIsNone(victims([], 1))

    def test_no_more_is_looked_at_than_is_needed(self) -> None:
        """
        In a cache of many files, making room for one costs one.
        """
        files = iter(self.files)
        victims(files, 10)
        self.assertIn(self.files[2], list(files))

    @given(st.lists(st.integers(0, 1000)), st.integers(-10, 5000))
    def test_no_more_goes_than_must(self, sizes: list[int], excess: int) -> None:
        """
        The least recently used ones, one after the other, until it is enough.
        """
        files = [Candidate(Reservation(str(number)), size, 0) for number, size in enumerate(sizes)]
        chosen = victims(files, excess)
        if chosen is None:
            self.assertLess(sum(sizes), excess)
            return
        self.assertEqual(files[: len(chosen)], chosen)
        self.assertGreaterEqual(sum(each.size for each in chosen), excess)
        if chosen:
            self.assertLess(sum(each.size for each in chosen[:-1]), excess)


class SmallCache(SynchronousTestCase):
    """
    A cache of at most 100 blocks.
    """

    limit = 100 * BLOCK

    def setUp(self) -> None:
        self.now, self.clock = START, Clock()
        self.root = scratch(self)
        self.index = Index(self.root, lambda: self.now, memory=True)
        self.addCleanup(self.index.close)
        self.store = self.make_store()
        self.janitor = self.start(self.store)

    def make_store(self) -> Store:
        """
        Open the cache as a starting daemon does.
        """
        store = Store(self.root, lambda: self.now, self.index)
        store.prepare()
        return store

    def in_thread(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Call at once what is otherwise called in a thread.
        """
        return execute(blocking, *args)

    def start(self, store: Store, limit: int | None = None) -> Janitor:
        """
        Start a janitor, on a directory that was compared with its index.
        """
        store.index.note_compared(self.now, store.index.database.opened)
        janitor = Janitor(store, limit or self.limit, self.in_thread, self.clock)
        janitor.startService()
        return janitor

    def reserve(self, blocks: int, name: str = "arriving") -> bool:
        """
        Reserve space, and return the answer.
        """
        return self.janitor.make_room(Reservation(name), blocks * BLOCK)

    def keep(self, blocks: int) -> Digest:
        """
        Store content as a transfer does: first the reservation, then the bytes.
        """
        self.now += 1
        data = f"{self.now}".encode().ljust(blocks * BLOCK)
        digest = Digest.of(data)
        claim = self.store.claim(digest)
        assert isinstance(claim, Claim)
        self.assertTrue(self.janitor.make_room(claim.reservation, len(data)))
        writer = self.store.writer(claim, digest, len(data))
        writer.write(0, [data])
        writer.commit()
        writer.close()
        return digest

    def has(self, *digests: Digest) -> list[bool]:
        """
        Return which of them are cached.
        """
        return [self.store.has(digest) for digest in digests]

    def bytes_on_disk(self) -> int:
        """
        Return the size of content and incomplete files.
        """
        tops = self.root / "content", self.root / "arriving"
        return sum(on_disk(path.stat().st_size) for top in tops for path in top.rglob("*") if path.is_file())


class JanitorTests(SmallCache):
    """
    Space for what arrives.
    """

    def test_room_is_made_by_evicting_the_least_recently_used(self) -> None:
        """
        Reading counts as use.
        """
        one, two, three = self.keep(40), self.keep(40), self.keep(20)
        read(self.store, one)
        four = self.keep(30)
        self.assertEqual([True, False, True, True], self.has(one, two, three, four))
        self.assertEqual(90 * BLOCK, self.bytes_on_disk())
        self.assertEqual(90 * BLOCK, self.index.totals.blocks)

    def test_the_limit_can_be_filled(self) -> None:
        """
        Nothing is evicted as long as everything fits, to the last block.
        """
        digests = [self.keep(50), self.keep(50)]
        self.assertEqual([True, True], self.has(*digests))
        self.assertEqual(100 * BLOCK, self.bytes_on_disk())

    def test_what_is_being_sent_is_never_evicted(self) -> None:
        """
        Others are evicted first though they are newer; if only content in use is left, there is no space.
        """
        one, two = self.keep(40), self.keep(40)
        content = self.store.open(one)
        assert content is not None
        read(self.store, two)
        self.assertTrue(self.reserve(60))
        self.assertEqual([True, False], self.has(one, two))
        self.assertFalse(self.reserve(1, "other"))
        content.close()
        self.assertTrue(self.reserve(1, "other"))
        self.assertEqual([False, False], self.has(one, two))

    def test_what_can_never_fit_evicts_nothing(self) -> None:
        """
        A blob larger than the limit, or than what others leave of it, costs the cache nothing.
        """
        one = self.keep(90)
        self.assertFalse(self.reserve(101))
        self.assertTrue(self.reserve(10))
        self.assertFalse(self.reserve(91, "other"))
        self.assertEqual([True], self.has(one))
        self.assertEqual(10 * BLOCK, self.index.totals.arriving)

    def test_what_is_arriving_counts(self) -> None:
        """
        Content and incomplete files together stay within the limit, and released space can be used again.
        """
        one = self.keep(40)
        self.assertTrue(self.reserve(60))
        self.assertEqual([True], self.has(one))
        self.assertTrue(self.reserve(1, "other"))
        self.assertEqual([False], self.has(one))
        self.assertFalse(self.reserve(40, "third"))
        self.index.drop(arriving=[Reservation("arriving")])
        self.assertTrue(self.reserve(99, "third"))
        self.assertFalse(self.reserve(1, "fourth"))

    def test_another_process_that_stands_still_while_it_evicts_is_waited_for_once(self) -> None:
        """
        It may be stopped, with the lock: eviction goes on without it. Once the lock could be acquired, the wait is
        possible again.
        """
        pauses = list[float]()
        self.patch(time, "sleep", pauses.append)
        one, two = self.keep(50), self.keep(50)
        with (self.root / EVICTING).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            three, waited = self.keep(50), sum(pauses)
            self.assertGreater(waited, 1)
            four = self.keep(50)
            self.assertLess(sum(pauses), waited + 0.1)
        self.assertEqual([False, False, True, True], self.has(one, two, three, four))
        pauses.clear()
        self.keep(50)
        self.assertEqual([], pauses)
        with (self.root / EVICTING).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.keep(50)
        self.assertEqual(waited, sum(pauses))

    def test_a_client_waits_for_room_for_two_seconds(self) -> None:
        """
        A later reservation is released; the bytes evicted for it are free for the next one.
        """
        one = self.keep(90)
        hands = Hands()
        hands.idle = False
        self.janitor._in_thread = hands  # noqa: SLF001
        asked = Deferred.fromCoroutine(self.janitor.reserve(Reservation("arriving"), 20 * BLOCK))
        self.clock.advance(1.9)
        self.assertNoResult(asked)
        self.clock.advance(0.1)
        self.failureResultOf(asked, TimeoutError)
        hands.work_off()
        self.assertEqual(([False], 0), (self.has(one), self.index.totals.arriving))

    def test_room_is_made_for_all_who_wait_for_it(self) -> None:
        old = [self.keep(10) for _ in range(10)]
        self.janitor._awaited["another"] = 30 * BLOCK  # noqa: SLF001 (as a thread has it that waits for its turn)
        self.assertTrue(self.reserve(20))
        self.assertEqual([False] * 5 + [True] * 5, self.has(*old))
        del self.janitor._awaited["another"]  # noqa: SLF001

    def test_nothing_is_no_question(self) -> None:
        """
        Empty content fits into a full cache.
        """
        self.keep(100)
        self.assertTrue(self.reserve(0))

    def test_what_a_transfer_has_left_goes_in_its_turn(self) -> None:
        """
        By its last write; it is newer than content that was used before, older than what was used since.
        """
        old = self.keep(20)
        self.patch(record, "WORTH_RESUMING", 1)
        self.patch(writer_module, "WORTH_RESUMING", 1)
        self.patch(arriving, "WORTH_RESUMING", 1)
        writer = begin(self.store, Digest.of(b"left"), 39 * BLOCK)
        writer.write(0, [b"x"])
        self.now += 1
        writer.leave()
        new = self.keep(20)
        for blocks, there, left in ((30, [False, True], 1), (60, [False, True], 0), (90, [False, False], 0)):
            self.assertTrue(self.reserve(blocks))
            self.assertEqual(there, self.has(old, new))
            self.assertEqual(left, len(list(self.store.arriving.folder.glob("*.claim"))))

    def test_a_transfer_that_ends_or_goes_on_while_the_index_can_not_be_written_evicts_nothing(self) -> None:
        """
        Its space is counted once, whatever waits to be recorded of it.
        """
        for module in (record, writer_module, arriving):
            self.patch(module, "WORTH_RESUMING", 1)
        digest, size = Digest.of(b"left"), 39 * BLOCK
        claim = self.store.claim(digest)
        assert isinstance(claim, Claim)
        self.assertTrue(self.janitor.make_room(claim.reservation, record.room_for(size)))
        kept, writer = self.keep(60), self.store.writer(claim, digest, size)
        writer.write(0, [b"x"])
        self.index.changes.wake_writer = lambda: None  # which is not next
        for _ in range(3):
            writer.leave()
            self.clock.advance(PAUSE_SECONDS)
            self.assertEqual([True], self.has(kept))
            writer = begin(self.store, digest, size)
            self.clock.advance(PAUSE_SECONDS)
            self.assertEqual([True], self.has(kept))
        writer.close()
        self.index.changes.wake_writer = None
        self.index.settle()
        self.assertEqual((60 * BLOCK, 40 * BLOCK), self.index.totals[1:3])

    def test_an_interrupted_transfer_goes_after_a_day_while_the_daemon_runs(self) -> None:
        """
        It is swept each minute, also after a disk that failed meanwhile.
        """
        self.janitor.stopService()
        self.janitor = self.start(self.store, 2**30)
        writer = begin(self.store, Digest.of(b"left"), 2**20)
        writer.write(0, [b"x"])
        writer.close()
        names = self.store.arriving.folder.iterdir
        for away, there in ((LEFT_SECONDS - 1, 2), (LEFT_SECONDS, 0)):
            self.now = START + away
            failure = self.patch(self.store, "sweep", failing(errno.EIO))
            self.clock.advance(PAUSE_SECONDS)
            failure.restore()
            self.clock.advance(PAUSE_SECONDS)
            self.assertEqual(there, len(list(names())))

    def test_a_lowered_limit_holds_from_the_start(self) -> None:
        """
        The excess is evicted at once, the least recently used first.
        """
        one, two = self.keep(40), self.keep(40)
        for digest in (two, one):
            self.now += 1
            read(self.store, digest)
        self.store = self.make_store()
        self.janitor = self.start(self.store, 50 * BLOCK)
        self.assertEqual([True, False], self.has(one, two))
        self.assertEqual(40 * BLOCK, self.bytes_on_disk())

    def test_a_limit_below_what_the_index_takes_empties_the_cache(self) -> None:
        """
        The index does not shrink. Everything else is evicted, except what is being sent.
        """
        one, two, three = self.keep(10), self.keep(10), self.keep(10)
        content = self.store.open(two)
        assert content is not None
        self.index.database.files.size = 60 * BLOCK
        self.janitor = self.start(self.make_store(), 50 * BLOCK)
        self.assertEqual([False, True, False], self.has(one, two, three))
        content.close()
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual([False], self.has(two))

    def test_the_index_counts(self) -> None:
        """
        Its files' space is not available to content.
        """
        one = self.keep(40)
        self.index.database.files.size = 60 * BLOCK
        self.assertTrue(self.reserve(0))
        self.assertTrue(self.reserve(1))
        self.assertEqual([False], self.has(one))
        self.assertFalse(self.reserve(41))

    def test_what_is_evicted_while_it_is_open_stays_readable(self) -> None:
        """
        Even if the cache was emptied by hand during an answer, the answer goes on.
        """
        one = self.keep(40)
        content = self.store.open(one)
        assert content is not None
        self.addCleanup(content.close)
        before = content.read()
        self.assertFalse(self.reserve(100))
        self.store.unlink(one)
        self.index.drop([one])
        self.assertTrue(self.reserve(100))
        self.assertEqual(before, content.read())

    def test_files_that_cannot_be_removed_do_not_stop_the_others(self) -> None:
        """
        Eviction goes on past a file of another user.
        """
        one, two = self.keep(50), self.keep(50)
        real = Path.unlink

        def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == one.hex:
                failing(errno.EPERM)()
            real(path, *args, **kwargs)

        self.patch(Path, "unlink", unlink)
        self.assertTrue(self.reserve(50))
        self.assertEqual([True, False], self.has(one, two))
        self.assertFalse(self.reserve(1, "other"), "what can't be removed takes its room")

    def test_files_that_cannot_be_removed_go_on_being_counted(self) -> None:
        """
        What is on the disk is part of what the cache holds, wanted or not.
        """
        self.keep(50)
        self.patch(Path, "unlink", failing(errno.EPERM))
        self.assertFalse(self.reserve(80))
        self.assertEqual(self.bytes_on_disk(), self.index.totals.blocks)

    def test_an_index_that_can_not_be_written_gives_no_room(self) -> None:
        """
        The free space is unknown then.
        """
        self.index.database.rows.close()
        with self.assertRaises(BusyError):
            self.janitor.make_room(Reservation("name"), 1)

    def test_nothing_is_done_after_the_end(self) -> None:
        """
        A stopped daemon looks at nothing.
        """
        self.janitor.stopService()
        self.assertEqual([], self.clock.getDelayedCalls())


class WaitingTests(SmallCache):
    """
    Space is made in threads.
    """

    def setUp(self) -> None:
        super().setUp()
        self.keep(80)
        self.threads: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.cache = Cache(self.store, self.janitor, Disk.of(self.later), lambda: self.now)

    def later(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Queue what is called in a thread.
        """
        deferred: Deferred[T] = Deferred()
        self.threads.append((lambda: blocking(*args), deferred))
        return deferred

    def work(self) -> None:
        """
        Run everything that is queued for threads.
        """
        while self.threads:
            blocking, deferred = self.threads.pop(0)
            execute(blocking).chainDeferred(deferred)

    def ask(self, blocks: int) -> Deferred[Writer | Reason]:
        """
        Reserve space for an incoming file.
        """
        digest = Digest.of(b"arriving")
        claim = self.store.claim(digest)
        assert isinstance(claim, Claim)
        return Deferred.fromCoroutine(self.cache.claims.writer(claim, digest, blocks * BLOCK, 0))

    def assert_nothing_arrives(self) -> None:
        """
        Assert that neither reservations nor files are left.
        """
        self.assertEqual(0, self.index.totals.arriving)
        self.assertEqual([], list(self.store.arriving.folder.iterdir()))

    def test_what_can_never_fit_waits_for_nothing(self) -> None:
        """
        A blob larger than the limit streams through at once.
        """
        self.assertIs(Reason.TOO_LARGE, self.successResultOf(self.ask(101)))

    def test_who_leaves_while_room_is_made_takes_none(self) -> None:
        gone = self.ask(90)
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.work()
        self.assert_nothing_arrives()

    def test_a_disk_that_hangs_while_room_is_made_takes_none(self) -> None:
        asked = self.ask(90)
        (make, hung), self.threads = self.threads[0], []
        hung.errback(TimeoutError())
        self.assertIs(Reason.DISK, self.successResultOf(asked))
        self.work()
        self.assertRaises(CancelledError, make)
        self.assert_nothing_arrives()

    def test_a_file_that_can_not_be_begun_takes_none(self) -> None:
        asked = self.ask(90)
        self.patch(allocation, "fallocate", failing(errno.EIO))
        self.work()
        self.assertIs(Reason.DISK, self.successResultOf(asked))
        self.work()
        self.assert_nothing_arrives()


class SmallDisk(SmallCache):
    """
    A disk of 400 KiB, and a limit far beyond.
    """

    limit = 2**30
    CAPACITY = 400 * 1024

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
        self.others = 200 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100 - self.others, self.janitor.limit)
        self.others = 0
        self.clock.advance(PAUSE_SECONDS)
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_a_limit_that_the_disk_holds_stays(self) -> None:
        self.assertEqual(BLOCK, self.start(self.store, BLOCK).limit)

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
        digests = [self.keep(10) for _ in range(100)]
        self.assertGreaterEqual(sum(self.has(*digests[90:])), 8)
        self.assertEqual([], self.store.troubles.reasons())

    def test_what_others_take_is_made_up_for_at_once(self) -> None:
        one, two = self.keep(40), self.keep(40)
        self.others = 80 * 1024  # nothing is left
        three = self.keep(10)
        self.assertEqual([False, True, True], self.has(one, two, three))
        self.assertEqual([], self.store.troubles.reasons())
        self.assertLessEqual(self.janitor.limit, self.CAPACITY - self.others)

    def test_on_a_full_disk_what_is_open_stays_and_others_go(self) -> None:
        """
        Though the open file was used less recently.
        """
        one, two = self.keep(40), self.keep(40)
        content = self.store.open(one)
        assert content is not None
        self.addCleanup(content.close)
        self.now += 1
        read(self.store, two)
        self.others = 80 * 1024  # nothing is left
        three = self.keep(10)
        self.assertEqual([True, False, True], self.has(one, two, three))

    def test_any_small_file_has_room_made_too(self) -> None:
        one = self.keep(70)
        self.others = 120 * 1024
        real = Path.write_bytes

        def write(path: Path, data: bytes) -> int:
            if len(data) > self.free():
                failing(errno.ENOSPC)()
            return real(path, data)

        self.patch(Path, "write_bytes", write)
        self.store.checks.run()
        self.assertEqual([False], self.has(one))

    def fill_the_disk_of_the_index(self) -> None:
        """
        Have others use the rest, so that the index can't be written either.
        """
        self.others = self.free() + self.others
        for name in ("reserve", "add"):
            real = getattr(Rows, name)

            def change(*args: Any, real: Callable[..., Any] = real) -> Any:
                if self.free() < BLOCK:
                    raise FullError("database or disk is full")
                return real(*args)

            self.patch(Rows, name, change)

    def test_room_is_made_for_the_index_too(self) -> None:
        """
        It is written before any file is.
        """
        one = self.keep(40)
        self.fill_the_disk_of_the_index()
        self.assertEqual([False, True], self.has(one, self.keep(10)))

    def test_changes_that_found_the_disk_full_are_made_a_second_later(self) -> None:
        one = self.keep(40)
        self.fill_the_disk_of_the_index()
        self.index.add(Digest.of(b"other"), BLOCK)
        self.assertIsNone(self.index.known(Digest.of(b"other")))
        self.index.settle()
        self.assertIsNotNone(self.index.known(Digest.of(b"other")))
        self.assertEqual([False], self.has(one))

    def test_where_nothing_can_go_changes_wait(self) -> None:
        self.fill_the_disk_of_the_index()
        self.index.add(Digest.of(b"other"), BLOCK)
        self.index.settle()
        self.assertIsNone(self.index.known(Digest.of(b"other")))
        self.others = 0
        self.index.settle()
        self.assertIsNotNone(self.index.known(Digest.of(b"other")))

    def test_until_the_directory_was_compared_the_size_of_the_disk_is_the_limit(self) -> None:
        """
        The size of the cache is not known then.
        """
        self.index.note_compared(0, self.index.database.opened)
        self.keep(10)
        self.others = 80 * 1024
        store = self.make_store()
        janitor = Janitor(store, self.limit, self.in_thread, self.clock)
        janitor.startService()
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, janitor.limit)
        scrub = Scrub(store, janitor.tidy, self.in_thread, self.clock)
        scrub.startService()
        self.clock.advance(LOOK_SECONDS)
        self.assertTrue(store.counted)
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100 - self.others, janitor.limit)

    def test_where_nothing_can_go_the_disk_is_full(self) -> None:
        self.others = self.CAPACITY
        self.assertRaises(OSError, put, self.store, b"1" * 1000)
        self.assertIn("No space left", str(self.store.troubles.reasons()))

    def test_room_that_others_give_back_is_used_at_once(self) -> None:
        """
        Not after the next count, which may be many minutes away.
        """
        one = self.keep(10)
        self.others = 320 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.assertFalse(self.reserve(40))
        self.others = 0
        self.assertTrue(self.reserve(40))
        self.assertEqual([True], self.has(one))

    def test_nothing_is_evicted_for_room_that_others_have_given_back(self) -> None:
        one = self.keep(10)
        self.others = 320 * 1024
        self.clock.advance(PAUSE_SECONDS)
        self.others = 0
        self.assertTrue(self.reserve(15))
        self.assertEqual([True], self.has(one))

    def test_room_that_is_promised_and_not_taken_yet_is_promised_to_nobody_else(self) -> None:
        """
        For the disk it is free; many pulls at once would have filled the disk, and made the daemon not ready.
        """
        self.assertEqual([True, True, False], [self.reserve(40, each) for each in "abc"])
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_room_that_others_give_back_is_used_while_something_arrives(self) -> None:
        self.others = 200 * 1024
        self.clock.advance(PAUSE_SECONDS)
        digest, size = Digest.of(b"1"), 40 * BLOCK
        claim = self.store.claim(digest)
        assert isinstance(claim, Claim)
        asked = self.janitor.reserve(claim.reservation, size)
        self.assertTrue(self.successResultOf(Deferred.fromCoroutine(asked)))
        writer = self.store.writer(claim, digest, size)
        self.addCleanup(writer.discard)
        self.assertFalse(self.reserve(10))
        self.others = 0
        self.assertTrue(self.reserve(10))

    def test_a_disk_that_others_have_filled_up_is_told_until_it_is_over(self) -> None:
        """
        Though there is space for a small file, because of evictions.
        """
        self.keep(10)
        self.others = self.CAPACITY
        for _ in range(3):
            self.clock.advance(PAUSE_SECONDS)
            self.assertIn("other files leave the cache", str(self.store.checks.reasons()))
        self.others = 0
        self.now += QUIET_SECONDS
        self.assertEqual([], self.store.checks.reasons())
        self.assertEqual(self.CAPACITY - self.CAPACITY // 100, self.janitor.limit)

    def test_a_disk_that_others_fill_up_is_told_before_the_next_count(self) -> None:
        self.start(self.store, self.CAPACITY // 2)
        self.others = self.CAPACITY
        self.assertIn("other files leave the cache", str(self.store.checks.reasons()))

    def test_small_files_that_are_written_meanwhile_do_not_end_it(self) -> None:
        self.others = self.CAPACITY - self.CAPACITY // 100 - 100
        with capturedLogs() as events:
            for number in range(2):
                self.assertIn("other files leave the cache", str(self.store.checks.reasons()))
                self.now += QUIET_SECONDS
                put(self.store, b"%d" % number)
        self.assertEqual(1, sum(event["log_namespace"] == "ecrproxy.cache.troubles" for event in events))


class FewInodes(SmallCache):
    limit = 2**30
    INODES = 300

    def setUp(self) -> None:
        self.patch(os, "statvfs", lambda _: self.status())
        self.real = os.open
        self.patch(os, "open", self.open)
        self.write = Path.write_bytes
        self.patch(Path, "write_bytes", lambda path, data: self.write_bytes(path, data))  # noqa: PLW0108 (a method gets no path)
        super().setUp()

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

    def test_files_go_by_number(self) -> None:
        with capturedLogs() as events:
            digests = [self.keep(1) for _ in range(310)]
        self.assertEqual([False] * FILES_AT_ONCE, self.has(*digests[:FILES_AT_ONCE]))
        self.assertEqual({True}, set(self.has(*digests[FILES_AT_ONCE:])))
        self.assertEqual(FILES_AT_ONCE, self.janitor.evicted)
        self.assertEqual(self.limit, self.janitor.limit)
        self.assertEqual([], self.store.checks.reasons())
        self.assertEqual(["inodes"], [event["once"] for event in events if "no inodes" in event["log_format"]])

    def test_where_nothing_can_go_the_reason_is_said(self) -> None:
        self.keep(1)
        self.INODES = 1
        self.store.folders.evict = lambda _: False
        self.assertEqual(
            ["the cache directory can't be written: No inodes left on device"], self.store.checks.reasons()
        )

    def test_a_disk_that_lacks_bytes_too_is_full(self) -> None:
        """
        XFS creates inodes from free space: without bytes it has none.
        """
        full = SimpleNamespace(f_blocks=2**30, f_frsize=1, f_bavail=0, f_files=100, f_favail=0)
        self.patch(os, "statvfs", lambda _: full)
        self.assertFalse(self.store.space.lacks_inodes())
        self.patch(os, "statvfs", failing(errno.EIO))
        self.assertFalse(self.store.space.lacks_inodes())


class ScrubTests(SmallCache):
    """
    The directory is compared with its index again and again: others may add files, or delete them.
    """

    def setUp(self) -> None:
        super().setUp()
        self.scrub = Scrub(self.store, self.janitor.tidy, self.in_thread, self.clock)
        self.scrub.startService()
        self.compare()

    def compare(self) -> None:
        """
        Compare the whole directory once.
        """
        self.pass_time(SCRUB_SECONDS)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.clock.advance(seconds)

    def bring(self, blocks: int) -> Digest:
        """
        Add a file as a daemon with another index does.
        """
        other = Store(self.root, lambda: self.now, Index(self.root, lambda: self.now, memory=True))
        self.addCleanup(other.index.close)
        self.now += 1
        return put(other, f"{self.now}".encode().ljust(blocks * BLOCK))

    def test_what_somebody_deleted_is_room_again(self) -> None:
        """
        No request for the missing content is needed.
        """
        gone, kept = self.keep(60), self.keep(40)
        (self.store.root / self.store.content_path(gone)).unlink()
        self.compare()
        self.assertEqual((1, 40 * BLOCK), self.index.totals[:2])
        self.assertTrue(self.reserve(60))
        self.assertEqual([True], self.has(kept))

    def test_what_somebody_brought_counts(self) -> None:
        """
        The least recently used is evicted, whoever added it; the log reports the new files.
        """
        old = self.keep(60)
        new = self.bring(60)
        with capturedLogs() as events:
            self.compare()
        self.assertEqual([False, True], self.has(old, new))
        self.assertEqual((60 * BLOCK, 60 * BLOCK), (self.index.totals.blocks, self.bytes_on_disk()))
        self.assertEqual(1, sum("Adopted" in event["log_format"] for event in events))

    def test_a_disk_that_fails_makes_nothing_absent(self) -> None:
        """
        A file that can't be read for now is not taken for missing; the next run corrects that.
        """
        self.keep(60)
        for module, name, number in (
            (os, "listdir", errno.EMFILE),
            (os, "listdir", errno.EIO),
        ):
            patches = self.patch(module, name, failing(number)), self.patch(Path, "lstat", failing(errno.EIO))
            self.compare()
            for patch in patches:
                patch.restore()
        self.assertEqual(60 * BLOCK, self.index.totals.blocks)
        self.assertEqual([], self.flushLoggedErrors())

    def test_another_index_is_filled_at_once(self) -> None:
        digest = self.keep(60)
        self.index.database.rows.drop([digest])
        self.index.database.opened += 1
        for _ in range(10):
            self.clock.advance(LOOK_SECONDS)
        self.assertEqual(60 * BLOCK, self.index.totals.blocks)

    def test_it_takes_a_small_part_of_the_time(self) -> None:
        """
        If a step takes long, the next one comes late.
        """
        steps: list[float] = []

        def working() -> bool:
            steps.append(self.clock.seconds())
            self.clock.advance(10)
            return True

        self.patch(self.scrub, "_work", working)
        self.pass_time(SCRUB_SECONDS)
        for _ in range(2 * 10 * SHARE + 30):
            self.clock.advance(1)
        self.assertEqual([10 * (SHARE + 1)] * 2, [after - before for before, after in pairwise(steps)])

    def test_nothing_is_done_after_the_end(self) -> None:
        self.janitor.stopService()
        self.scrub.stopService()
        self.assertEqual([], self.clock.getDelayedCalls())


class TwoDaemonsTests(SmallCache):
    """
    Two daemons on one directory.
    """

    limit = 1000 * BLOCK

    def make_store(self) -> Store:
        store = Store(self.root, lambda: self.now)
        self.addCleanup(store.index.close)
        store.prepare()
        return store

    def test_keep_the_limit_together(self) -> None:
        """
        Whatever both fetch, the directory is within the limit at each moment, and all content is right.
        """
        stores = [self.store, self.make_store()]
        janitors = [self.janitor, self.start(stores[1])]
        for number in range(60):
            self.store, self.janitor = stores[number % 2], janitors[number % 2]
            digest = self.keep(30 + number)
            self.assertIsNotNone(read(stores[1 - number % 2], digest))
            stores[number % 2].index.settle()
            taken = sum(path.stat().st_blocks * 512 for path in self.root.rglob("*") if path.is_file())
            self.assertLessEqual(taken, self.limit + 2**20)  # the log of the index may grow between two looks
        self.assertGreater(sum(janitor.evicted for janitor in janitors), 30)

    def test_do_not_both_make_the_room_that_is_needed_once(self) -> None:
        """
        A limit that was lowered, at the same moment: the second one looks again.
        """
        for _ in range(10):
            self.keep(20)
        stores = [self.store, self.make_store()]
        janitors = [self.janitor, self.start(stores[1])]
        for each, store in zip(janitors, stores, strict=True):
            each.limit = each._wanted = 100 * BLOCK + store.index.size  # noqa: SLF001
        for each in janitors:
            self.assertTrue(each.make_room(None, 0))
        self.assertEqual([5, 0], [each.evicted for each in janitors])


class RaceTests(SmallCache):
    """
    Real threads at the same time.
    """

    limit = 50 * BLOCK

    def test_a_janitor_racing_readers_and_writers(self) -> None:
        """
        Threads that write, read and evict, with sweeps in between: content that is read is right, and everything is
        counted.
        """
        blobs = [random.Random(number).randbytes(20_000 + number) for number in range(20)]
        start = threading.Barrier(6)

        def use(seed: int) -> bool:
            chance = random.Random(seed)
            start.wait()
            return all(self.pull(chance.choice(blobs)) for _ in range(150))

        def tidy() -> bool:
            start.wait()
            for _ in range(40):
                self.index.settle()
                self.janitor.tidy()
            return True

        with ThreadPoolExecutor(6) as pool:
            working = [*(pool.submit(use, seed) for seed in range(5)), pool.submit(tidy)]
            self.assertEqual([True] * 6, [each.result() for each in working])
        self.index.settle()
        self.janitor.tidy()
        self.assertEqual((0, self.bytes_on_disk()), (self.index.totals.arriving, self.index.totals.blocks))
        self.assertLessEqual(self.bytes_on_disk(), self.limit)
        for path in (self.root / "content").rglob("*"):
            if path.is_file():
                self.assertEqual(path.name, Digest.of(path.read_bytes()).hex)

    def pull(self, data: bytes) -> bool:
        """
        Read a blob, or store it if there is space for it; return True if the content read was right.
        """
        digest = Digest.of(data)
        found = read(self.store, digest)
        claim = self.store.claim(digest) if found is None else None
        if isinstance(claim, PeerTransfer):
            claim.close()
        elif isinstance(claim, Claim) and self.janitor.make_room(claim.reservation, len(data)):
            writer = self.store.writer(claim, digest, len(data))
            writer.write(0, [data])
            writer.commit()
            writer.close()
        elif isinstance(claim, Claim):
            self.store.arriving.let_go(claim)
        return found in (None, data)
