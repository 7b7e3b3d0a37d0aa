"""
The scrub costs little, and one of the processes on a directory runs it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, execute
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.database import BusyError
from ecrproxy.cache.entry_rows import PAGE
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.scrub import (
    BUSY_SECONDS,
    LOOK_SECONDS,
    PAUSE_SECONDS,
    SCRUBBING,
    SHARE,
    STEP,
    STEP_SECONDS,
    TOGETHER_SECONDS,
    Scrub,
    scrub,
)
from ecrproxy.cache.store import Store
from ecrproxy.oci import Digest
from tests.store_contract import START, failing, put, scratch

T = TypeVar("T")

HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def busy(*_: object) -> None:
    """
    Behave as if another process is writing.
    """
    raise BusyError("database is locked")


class DirectoryTestCase(SynchronousTestCase):
    """
    A directory, and processes on it.
    """

    def setUp(self) -> None:
        self.now, self.clock, self.root = START, Clock(), scratch(self)
        self.store = self.open()

    def open(self) -> Store:
        store = Store(self.root, lambda: self.now)
        self.addCleanup(store.index.close)
        store.prepare()
        return store

    def bring(self, name: str) -> Digest:
        """
        Add a file that no index knows.
        """
        digest = Digest.of(name.encode())
        path = self.root / content_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        return digest

    def bring_into_one_folder(self, count: int) -> list[Digest]:
        digests = [Digest("sha256", f"ab{number:062x}") for number in range(count)]
        folder = (self.root / content_path(digests[0])).parent
        folder.mkdir(parents=True, exist_ok=True)
        for each in digests:
            (folder / each.hex).touch()
        return digests


class PassTests(DirectoryTestCase):
    def compare(self) -> int:
        """
        Compare the whole directory, and return the number of steps.
        """
        return sum(1 for _ in scrub(self.store, lambda: None))

    def test_what_is_known_on_both_sides_costs_no_digest(self) -> None:
        self.bring_into_one_folder(PAGE + 10)
        self.compare()
        made: list[object] = []
        self.patch(Digest, "parse", made.append)
        self.patch(Digest, "__init__", lambda *args: made.append(args))
        self.compare()
        self.assertEqual([], made)
        self.assertEqual(PAGE + 10, self.store.index.totals.files)

    def test_each_step_is_short(self) -> None:
        """
        Whatever has happened to a folder: all of it is new, is known, or has been deleted.
        """
        content = self.root / "content"
        for happens in (lambda: self.bring_into_one_folder(2 * PAGE), lambda: None, lambda: shutil.rmtree(content)):
            happens()
            files = [self.store.index.totals.files]
            files += [self.store.index.totals.files for _ in scrub(self.store, lambda: None)]
            self.assertLessEqual(max(abs(after - before) for before, after in pairwise(files)), STEP)
        self.assertEqual(0, self.store.index.totals.files)

    def test_rows_of_folders_that_somebody_removed_go(self) -> None:
        put(self.store, b"gone")
        put(self.store, b"gone", "sha512")
        shutil.rmtree(self.root / "content")
        self.compare()
        self.assertEqual((0, 0), self.store.index.totals[:2])

    def test_files_of_other_names_stay_and_do_not_count(self) -> None:
        folder = self.root / "content/sha256/ab"
        folder.mkdir(parents=True)
        for name in ("README", "ab" + "g" * 62, "ac" + "0" * 62, "ab" + "0" * 63):
            (folder / name).touch()
        (folder / ("ab" + "0" * 62)).mkdir()
        self.compare()
        self.assertEqual((0, 5), (self.store.index.totals.files, len(list(folder.iterdir()))))


class ServiceTests(DirectoryTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.done: list[Scrub] = []

    def start(self, store: Store | None = None) -> Scrub:
        """
        Start the scrub of another process.
        """
        store = store or self.open()
        service = Scrub(store, lambda: None, self.in_thread, self.clock)
        real = store.index.note_compared

        def noting(*args: Any) -> None:
            self.done.append(service)
            real(*args)

        self.patch(store.index, "note_compared", noting)
        service.startService()
        self.addCleanup(service.stopService)
        return service

    def in_thread(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        return execute(blocking, *args)

    def pass_time(self, seconds: float, *indexes: Store) -> None:
        """
        Advance the clock, and let the index of each process see what others have done.
        """
        for _ in range(int(seconds)):
            self.now += 1
            self.clock.advance(1)
            for each in indexes:
                each.index.settle()

    def test_processes_that_start_together_need_it_once(self) -> None:
        """
        Then, too, it runs once in ten minutes, in any of them.
        """
        stores = [self.open() for _ in range(3)]
        services = []
        for each in stores:
            services.append(self.start(each))
            self.pass_time(2, *stores)
        self.assertEqual(services[:1], self.done)
        self.pass_time(PAUSE_SECONDS - 2, *stores)
        self.assertEqual(2, len(self.done))
        self.pass_time(PAUSE_SECONDS, *stores)
        self.assertEqual(3, len(self.done))

    def test_a_process_that_starts_later_looks_for_what_came_meanwhile(self) -> None:
        self.start()
        self.pass_time(TOGETHER_SECONDS + 1)
        self.bring("meanwhile")
        later = self.start()
        self.assertIs(later, self.done[-1])
        self.assertEqual(1, self.store.index.settle() or self.store.index.totals.files)

    def test_one_process_does_it_at_a_time(self) -> None:
        """
        Others check each second, without waiting; when that process is killed, another one continues.
        """
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(self.root / SCRUBBING)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        self.addCleanup(holder.stdin.close)
        self.addCleanup(holder.stdout.close)
        self.assertEqual(b"held\n", holder.stdout.readline())
        self.bring("a")
        service = self.start(self.store)
        self.pass_time(5)
        self.assertEqual([], self.done)
        holder.kill()
        holder.wait()
        self.pass_time(LOOK_SECONDS)
        self.assertEqual(([service], 1), (self.done, self.store.index.totals.files))

    def test_what_another_process_began_is_not_begun_beside_it(self) -> None:
        """
        It stops when its process ends, and a remaining process begins again.
        """
        first = self.slowly(self.store)
        other = self.open()
        second = self.start(other)
        self.pass_time(1, self.store, other)
        self.assertEqual([], self.done)
        first.stopService()
        self.slow = False
        self.pass_time(LOOK_SECONDS, other)
        self.assertEqual([second], self.done)

    def slowly(self, store: Store) -> Scrub:
        """
        Start a scrub for which each folder takes as long as a step may.
        """
        self.bring("one file")
        real, self.slow = store.names, True

        def names(algorithm: str, prefix: str) -> set[str]:
            if self.slow:
                self.clock.rightNow += STEP_SECONDS
            return real(algorithm, prefix)

        self.patch(store, "names", names)
        return self.start(store)

    def test_it_works_for_a_millisecond_and_rests_for_twenty(self) -> None:
        began = self.clock.seconds()
        self.slowly(self.store)
        while not self.done:
            self.clock.advance(STEP_SECONDS)
        self.assertLess(abs(256 * STEP_SECONDS * (1 + SHARE) - (self.clock.seconds() - began)), 1)

    def test_one_that_fails_is_made_again_after_the_pause(self) -> None:
        patch = self.patch(self.store.index, "names", failing(errno.EIO))
        with capturedLogs() as events:
            service = self.start(self.store)
            self.pass_time(PAUSE_SECONDS - 1)
            self.assertEqual(1, sum("Can't compare" in event["log_format"] for event in events))
            self.pass_time(2)
        self.assertEqual(2, sum("Can't compare" in event["log_format"] for event in events))
        patch.restore()
        self.pass_time(PAUSE_SECONDS)
        self.assertEqual([service], self.done)

    def meets_another_process(self, what: str) -> None:
        self.bring("a")
        patch = self.patch(self.store.index, what, busy)
        self.start(self.store)
        self.pass_time(PAUSE_SECONDS, self.store)
        self.assertFalse(self.store.counted)
        patch.restore()
        self.pass_time(BUSY_SECONDS + LOOK_SECONDS, self.store)
        self.assertTrue(self.store.counted)
        self.assertEqual(1, self.store.index.totals.files)

    def test_one_that_another_process_was_in_the_way_of_is_made_again_soon(self) -> None:
        """
        Until then the limit counts only what is known.
        """
        self.meets_another_process("adopt")

    def test_one_whose_end_could_not_be_noted_is_made_again_soon(self) -> None:
        self.meets_another_process("note_compared")

    def test_another_index_is_filled_at_once(self) -> None:
        digest = self.bring("a")
        self.start(self.store)
        self.pass_time(TOGETHER_SECONDS + 1, self.store)
        for path in self.root.glob("*.sqlite3"):
            path.unlink()
        self.pass_time(2, self.store)
        self.assertEqual([digest], [each.digest for each in self.store.index.files()])
        self.assertEqual(2, len(self.done))

    def test_a_clock_that_is_set_back_does_not_stop_it(self) -> None:
        self.start(self.store)
        self.now -= 10 * PAUSE_SECONDS
        self.pass_time(PAUSE_SECONDS + 1, self.store)
        self.assertEqual(2, len(self.done))

    def test_where_locks_do_not_work_it_is_made_all_the_same(self) -> None:
        real = os.open

        def opening(path: Any, *args: Any, **kwargs: Any) -> int:
            if Path(path).name == SCRUBBING:
                raise PermissionError(path)
            return real(path, *args, **kwargs)

        self.patch(os, "open", opening)
        self.start(self.store)
        self.assertEqual(1, len(self.done))

    def test_the_log_says_once_what_the_cache_holds(self) -> None:
        put(self.store, b"a")
        with capturedLogs() as events:
            self.start(self.store)
            self.pass_time(2 * PAUSE_SECONDS)
        self.assertEqual(1, sum("The cache holds" in event["log_format"] for event in events))
