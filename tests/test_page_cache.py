"""
Which bytes of a file are in memory: those of a hole never are.
"""

from __future__ import annotations

import os
from mmap import PAGESIZE

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.transfer import page_cache
from ecrproxy.transfer.page_cache import in_memory
from tests.store_contract import scratch

SIZE = 4 * PAGESIZE


class InMemoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        folder = scratch(self)
        folder.mkdir()
        self.fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, self.fd)
        os.truncate(self.fd, SIZE)

    def write(self, *pages: int) -> None:
        for page in pages:
            os.pwrite(self.fd, bytes(PAGESIZE), page * PAGESIZE)

    def test_what_was_written_is(self) -> None:
        self.write(0, 1, 2, 3)
        self.assertEqual([SIZE, 5, 1], [in_memory(self.fd, *each) for each in ((0, SIZE), (10, 5), (SIZE - 1, 1))])

    def test_it_ends_before_the_first_byte_that_is_not(self) -> None:
        self.write(0, 1, 3)
        cases = ((0, SIZE), (PAGESIZE + 1, SIZE - PAGESIZE - 1), (2 * PAGESIZE + 1, 100), (SIZE - 7, 7))
        self.assertEqual([2 * PAGESIZE, PAGESIZE - 1, 0, 7], [in_memory(self.fd, *each) for each in cases])

    def test_nothing_behind_the_end_is(self) -> None:
        self.assertEqual(0, in_memory(self.fd, SIZE, 100))

    def test_where_that_can_not_be_told_all_are(self) -> None:
        pipe = os.pipe()
        for each in pipe:
            self.addCleanup(os.close, each)
        self.assertEqual(100, in_memory(pipe[0], 0, 100))
        self.patch(page_cache, "_mincore", lambda *_: -1)
        self.assertEqual(100, in_memory(self.fd, 0, 100))

    def test_of_very_many_it_tells_of_the_first(self) -> None:
        os.truncate(self.fd, 0)
        os.write(self.fd, bytes(5 * 2**20))
        self.assertEqual(1024 * PAGESIZE - 3, in_memory(self.fd, 3, 5 * 2**20 - 3))
