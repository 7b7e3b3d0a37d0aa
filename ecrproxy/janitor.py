"""
Keep the cache directory within its limit: the least recently used goes first, what is being read never.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

if TYPE_CHECKING:
    from ecrproxy.store import Store
    from ecrproxy.threads import InThread

log = Logger()


def victims(files: Iterable[tuple[str, int, bool]], excess: int) -> list[str] | None:
    """
    Choose what to evict.

    @param files: path, bytes and whether it is being read, the least recently used first.
    @param excess: the bytes to gain.
    @return: paths; none if all that may go isn't enough, in which case nothing should.
    """
    chosen = []
    for path, size, read in files:
        if excess <= 0:
            break
        if not read:
            chosen.append(path)
            excess -= size
    return chosen if excess <= 0 else None


class Janitor(Service):
    """
    Counts the cache directory at start, and makes room in it from then on.

    @param limit: the most bytes that the files of the cache may have, those that arrive included.
    @ivar evicted: how many files went for others.
    """

    def __init__(self, store: Store, limit: int, in_thread: InThread) -> None:
        self._store, self.limit, self._in_thread = store, limit, in_thread
        self._counted = False
        self.evicted = 0
        self._waiting: list[Deferred[None]] = []

    def startService(self) -> None:  # noqa: D102
        super().startService()
        Deferred.fromCoroutine(self._count()).addErrback(lambda failure: log.failure("Counting the cache", failure))

    async def _count(self) -> None:
        try:
            await self._in_thread(self._store.count)
        finally:
            self._counted = True
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)
        ledger = self._store.ledger
        log.info("The cache holds {total} bytes in {count} files", total=ledger.total, count=len(ledger))
        await self._in_thread(self.make_room, 0)  # the limit may be lower than it was

    async def reserve(self, size: int) -> bool:
        """
        Make room for C{size} bytes that will arrive; false if it can't be had.
        """
        if size > self.limit:
            return False
        if not self._counted:
            waiter: Deferred[None] = Deferred(self._waiting.remove)
            self._waiting.append(waiter)
            await waiter
        ledger = self._store.ledger
        with ledger.lock:
            if ledger.total + ledger.reserved + size <= self.limit:
                ledger.reserve(size)
                return True
        return await self._in_thread(self.make_room, size)

    def release(self, size: int) -> None:
        """
        Give back what was reserved.
        """
        self._store.ledger.reserve(-size)

    def make_room(self, size: int) -> bool:
        """
        Evict until C{size} bytes fit, and reserve them. Called in a thread.
        """
        ledger = self._store.ledger
        with ledger.lock:
            chosen = victims(ledger.oldest(), ledger.total + ledger.reserved + size - self.limit)
            if chosen is None:
                return False
            sizes = {path: ledger.gone(path) for path in chosen}
            ledger.reserve(size)
        for path, freed in sizes.items():  # the lock is not held while the disk works: the reactor may want it
            if not self._store.remove(path):
                ledger.used(path, freed)
        if chosen:
            self.evicted += len(chosen)
            log.info("Evicted {count} files, the least recently used", count=len(chosen))
        return True
