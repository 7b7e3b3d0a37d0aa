"""
The cache keeps nearly what exact LRU keeps: uses are recorded up to a second late, by several processes.
"""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.index import Index
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.store import Store
from ecrproxy.oci import Digest
from tests.daemon import at_once
from tests.store_contract import START, scratch

BLOBS: Final = 1500
REQUESTS: Final = 9000
WARM: Final = 1500
"""The first requests, with an empty cache, are not counted."""
EACH_SECOND: Final = 150
"""Requests between two writes of noted uses by a process: a tenth of some 1,300 items in the cache."""
SKEW: Final = 0.9
PART: Final = 4
"""The ratio of working set to limit."""
LESS: Final = 0.01
"""How far the hit ratio may be below that of exact LRU."""


def trace(chance: random.Random, blobs: int = BLOBS, requests: int = REQUESTS) -> list[int]:
    """
    Choose blobs as clients do: rank n has a probability proportional to n to the power of -0.9.
    """
    weights = [rank**-SKEW for rank in range(1, blobs + 1)]
    return chance.choices(range(blobs), weights, k=requests)


class Exact:
    """
    Exact LRU.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def ask(self, blob: int, size: int) -> bool:
        """
        Return True for a hit; afterwards the blob is cached.
        """
        if blob in self._sizes:
            self._sizes.move_to_end(blob)
            return True
        while self._held + on_disk(size) > self._limit:
            self._held -= self._sizes.popitem(last=False)[1]
        self._sizes[blob] = on_disk(size)
        self._held += on_disk(size)
        return False


class Process:
    """
    What one process has of the cache. There are no files: the index believes that they were removed.
    """

    def __init__(self, root: Path, clock: Clock, index: Index, limit: int) -> None:
        self.index, self._limit = index, limit
        self._janitor = Janitor(Store(root, clock.seconds, index), limit, at_once, clock)

    def ask(self, digest: Digest, size: int) -> bool:
        if self.index.known(digest) is not None:
            self.index.uses.use(digest)
            return True
        self._janitor.limit = self._limit + self.index.size  # the limit is for what is compared
        room = Reservation(digest.hex)
        assert self._janitor.make_room(room, size)
        self.index.add(digest, size, room)
        return False


class HitRatioTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.root, self.clock = scratch(self), Clock()
        self.root.mkdir()
        self.clock.advance(START)

    def index(self, *, memory: bool) -> Index:
        index = Index(self.root, self.clock.seconds, memory=memory)
        self.addCleanup(index.close)
        index.open()
        return index

    def compare(self, indexes: Sequence[Index]) -> None:
        """
        Send requests to the processes in turn, and to an exact LRU.
        """
        chance = random.Random(5)
        sizes = [int(2 ** chance.uniform(10, 24)) for _ in range(BLOBS)]
        digests = [Digest.of(str(number).encode()) for number in range(BLOBS)]
        limit = sum(map(on_disk, sizes)) // PART
        processes = [Process(self.root, self.clock, index, limit) for index in indexes]
        exact, hits, expected = Exact(limit), 0, 0
        asked = enumerate(zip(trace(chance), itertools.cycle(processes)))
        for number, (blob, process) in asked:
            hit = process.ask(digests[blob], sizes[blob])
            right = exact.ask(blob, sizes[blob])
            if number >= WARM:
                hits, expected = hits + hit, expected + right
            self.clock.advance(1 / EACH_SECOND)
            if not number % EACH_SECOND:
                for index in indexes:
                    index.settle()
        self.assertGreater(expected / (REQUESTS - WARM), 0.4)
        self.assertLess(expected / (REQUESTS - WARM), 0.9)
        self.assertLess(abs(hits - expected) / (REQUESTS - WARM), LESS)

    def test_of_one_process_is_that_of_exact_lru(self) -> None:
        self.compare([self.index(memory=True)])

    def test_of_three_processes_is_that_of_exact_lru(self) -> None:
        self.compare([self.index(memory=False) for _ in range(3)])
