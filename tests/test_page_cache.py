"""
Which bytes of a file are in the page cache: those of a hole never are.
"""

from __future__ import annotations

import itertools
import os
from mmap import PAGESIZE

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.transfer import page_cache
from ecrproxy.transfer.page_cache import LATELY_SECONDS, in_memory
from tests.store_contract import scratch

SIZE = 4 * PAGESIZE
HOURS = itertools.count(3600, 3600)
"""Each test has its own hour: inodes are reused."""


class InMemoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = float(next(HOURS))
        folder = scratch(self)
        folder.mkdir()
        self.fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, self.fd)
        os.truncate(self.fd, SIZE)

    def ask(self, offset: int, count: int, seconds: float = 1.0) -> int:
        """
        Ask, so many seconds after the last time.
        """
        self.now += seconds
        return in_memory(self.fd, offset, count, lambda: self.now)

    def write(self, *pages: int) -> None:
        for page in pages:
            os.pwrite(self.fd, bytes(PAGESIZE), page * PAGESIZE)

    def test_what_was_written_is(self) -> None:
        self.write(0, 1, 2, 3)
        self.assertEqual([SIZE, 5, 1], [self.ask(*each) for each in ((0, SIZE), (10, 5), (SIZE - 1, 1))])

    def test_it_ends_before_the_first_byte_that_is_not(self) -> None:
        self.write(0, 1, 3)
        cases = ((0, SIZE), (PAGESIZE + 1, SIZE - PAGESIZE - 1), (2 * PAGESIZE + 1, 100), (SIZE - 7, 7))
        self.assertEqual([2 * PAGESIZE, PAGESIZE - 1, 0, 7], [self.ask(*each) for each in cases])

    def test_nothing_behind_the_end_is(self) -> None:
        self.assertEqual(0, self.ask(SIZE, 100))

    def test_where_that_can_not_be_told_all_are(self) -> None:
        pipe = os.pipe()
        for each in pipe:
            self.addCleanup(os.close, each)
        self.assertEqual(100, in_memory(pipe[0], 0, 100))
        self.patch(page_cache, "_mincore", lambda *_: -1)
        self.assertEqual(100, self.ask(0, 100))

    def test_of_very_many_it_tells_of_the_first(self) -> None:
        os.truncate(self.fd, 0)
        os.write(self.fd, bytes(5 * 2**20))
        self.assertEqual(1024 * PAGESIZE - 3, self.ask(3, 5 * 2**20 - 3))

    def test_of_a_crowd_one_asks_for_all(self) -> None:
        """
        For a moment; missing bytes are checked each time.
        """
        self.assertEqual(0, self.ask(0, SIZE))
        self.write(0, 1, 2, 3)
        self.assertEqual(SIZE, self.ask(0, SIZE, 0))
        os.truncate(self.fd, 0)
        os.truncate(self.fd, SIZE)
        self.assertEqual(SIZE, self.ask(0, SIZE, LATELY_SECONDS / 2))
        self.assertEqual(0, self.ask(0, SIZE, LATELY_SECONDS))

    def test_no_file_system_is_asked_which_file_it_is(self) -> None:
        """
        The file system may be a program, or another machine, that answers late or never, and all clients would wait.
        """

        def hang(_: int) -> os.stat_result:
            raise AssertionError("asked, and waited for")

        self.write(0, 1)
        self.patch(os, "fstat", hang)
        self.assertEqual(2 * PAGESIZE, self.ask(0, SIZE))

    def test_where_it_is_not_told_which_file_it_is_each_asks(self) -> None:
        """
        As in a sandbox without statx.
        """
        for statx in (None, lambda *_: -1):
            self.patch(page_cache, "_statx", statx)
            self.write(0)
            self.assertEqual(PAGESIZE, self.ask(0, SIZE))
            os.truncate(self.fd, 0)
            os.truncate(self.fd, SIZE)
            self.assertEqual(0, self.ask(0, SIZE, 0))

    def test_files_are_told_from_each_other(self) -> None:
        """
        Cached bytes of one file say nothing about another's.
        """
        self.write(0, 1, 2, 3)
        self.assertEqual(SIZE, self.ask(0, SIZE))
        other = os.open(scratch(self), os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, other)
        os.truncate(other, SIZE)
        self.assertEqual(0, in_memory(other, 0, SIZE, lambda: self.now))
