"""
Keep the cache directory within its limit: the least recently used goes first, what is being read never.

Rules:

- The directory is counted at start, and again and again: others may delete files of it, or bring some. Several daemons
  on one directory keep it within the limit together, but for what each has brought since the others last counted.
- Counting takes a twentieth of the time at the most, however large and slow the directory is. Nobody waits for it.
  Before the first count room is given by what is known, and the directory is brought within its limit afterwards.
- The limit is never more than the disk can hold. When the disk is full all the same, files are evicted to make room.
  A limit that was lowered for that is looked at again before anything is evicted or refused for it: others may have
  given room back, and the next count may be many minutes away.
- A disk that leaves the cache less than is left free for others is full, also where a small file still has room.
- A disk may lack inodes and have bytes left. Then files are evicted by number, entries first.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.threads import undone_if_late

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

PAUSE_SECONDS: Final = 60.0
"""How long after a count the next one begins, unless counting takes long."""
AT_ONCE: Final = 2**20
"""Bytes that are evicted at the least when the disk is full."""
FILES_AT_ONCE: Final = 256
"""Files that are evicted when the disk has no inode left."""
SHARE: Final = 20
"""A pause is at least so many times as long as the count before it."""


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


def victims_for_inodes(files: Iterable[tuple[str, int, bool]], count: int) -> list[str]:
    """
    Choose up to C{count} files to evict, however many bytes they have: entries first, which ECR can be asked for.

    @param files: as for L{victims}.
    """
    entries, content = list[str](), list[str]()
    for path, _, read in files:
        chosen = entries if path.startswith("entries/") else content
        if not read and len(chosen) < count:
            chosen.append(path)
        if len(entries) == count:
            break
    return [*entries, *content][:count]


class Janitor(Service):
    """
    Counts the cache directory, at start and now and then, and makes room in it.

    @param limit: the most bytes that the files of the cache may have, those that arrive included.
    @param counting: in which thread it counts: that is busy with Python itself for seconds, if there are many files.
    @ivar limit: the same, or less if the disk can't hold that much.
    @ivar evicted: how many files went for others.
    """

    def __init__(
        self, store: Store, limit: int, in_thread: InThread, clock: IReactorTime, counting: InThread | None = None
    ) -> None:
        self._store, self._wanted, self._in_thread, self._clock = store, limit, in_thread, clock
        self.limit = limit
        self._counting = counting or in_thread
        self._counted = self._shared = False
        self.evicted = 0
        self._next: IDelayedCall | None = None
        self._evicting = threading.Lock()
        store.evict, store.see_room = self.evict, self.see_room

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._begin()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _begin(self) -> None:
        self._next = None
        began = self._clock.seconds()
        counting = Deferred.fromCoroutine(self._count())
        counting.addErrback(lambda failure: failure.trap(TimeoutError))  # L{Bounded} has told of it
        counting.addErrback(lambda failure: log.failure("Counting the cache", failure))
        counting.addCallback(lambda _: self._go_on(self._clock.seconds() - began))

    def _go_on(self, took: float) -> None:
        if self.running:
            self._next = self._clock.callLater(max(PAUSE_SECONDS, SHARE * took), self._begin)

    async def _count(self) -> None:
        unknown = await self._counting(self._sweep_and_count)
        first, self._counted = not self._counted, True
        ledger = self._store.ledger
        if first:
            log.info("The cache holds {total} bytes in {count} files", total=ledger.total, count=len(ledger))
        elif unknown > 0 and not self._shared:
            self._shared = True
            log.info("Somebody else brought {count} bytes into the cache: another daemon uses it too?", count=unknown)
        await self._in_thread(self._fit)
        await self._in_thread(self.make_room, 0)  # the limit may be lower than it was

    def _sweep_and_count(self) -> int:
        self._store.sweep()  # each time: at the start the disk may fail
        return self._store.count()

    def fits(self, size: int) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting anything.
        """
        ledger = self._store.ledger
        return ledger.total + ledger.reserved + size <= self.limit

    async def reserve(self, size: int) -> bool:
        """
        Make room for C{size} bytes that will arrive; false if it can't be had.
        """
        if size > self._wanted:
            return False
        ledger = self._store.ledger
        with ledger.lock:
            if self.fits(size):
                ledger.reserve(size)
                return True
        return await undone_if_late(
            self._in_thread, lambda: self.make_room(size), lambda made: self.release(size) if made else None
        )

    async def can_hold(self, size: int) -> bool:
        """
        Return True if C{size} bytes are within the limit, were all else evicted: it may have been raised by now.
        """
        if self.limit < size <= self._wanted:
            with contextlib.suppress(OSError):
                await self._in_thread(self._fit)
        return size <= self.limit

    def release(self, size: int) -> None:
        """
        Give back what was reserved.
        """
        self._store.ledger.reserve(-size)

    def see_room(self) -> None:
        """
        See that the disk has room for a cache. Called in a thread.

        @raise OSError: if others have taken it.
        """
        self._fit()
        if self.limit < min(self._wanted, self._store.spare()):
            raise OSError(errno.ENOSPC, f"No space left on device: other files leave the cache {self.limit} bytes")

    def make_room(self, size: int) -> bool:
        """
        Evict until C{size} bytes fit, and reserve them. Called in a thread.
        """
        if self.limit < self._wanted:
            self._fit()
        ledger = self._store.ledger
        with ledger.lock:
            chosen = victims(ledger.oldest(), ledger.total + ledger.reserved + size - self.limit)
            if chosen is None:
                return False
            sizes = {path: ledger.gone(path) for path in chosen}
            ledger.reserve(size)
        self._evict(sizes)
        return True

    def evict(self, size: int) -> bool:
        """
        Evict C{size} bytes, for the disk is full, and lower the limit to what it holds. Called in a thread.

        @return: whether there is another try: as much was evicted, or another thread has just evicted something.
        """
        if not self._evicting.acquire(blocking=False):
            with self._evicting:  # until its files are gone from the disk
                return True
        try:
            return self._evict_for(size)
        finally:
            self._evicting.release()

    def _evict_for(self, size: int) -> bool:
        ledger = self._store.ledger
        by_number = self._store.lacks_inodes()
        with ledger.lock:
            if by_number:
                chosen = victims_for_inodes(ledger.oldest(), FILES_AT_ONCE) or None
            else:
                # A small file frees a block that the next small write takes: more goes, if there is more.
                chosen = victims(ledger.oldest(), max(size, AT_ONCE)) or victims(ledger.oldest(), size)
            if chosen is None:
                return False
            sizes = {path: ledger.gone(path) for path in chosen}
        self._evict(sizes)
        if by_number:
            log.warn(
                "The cache's disk has no inodes left: evicted {count} files;"
                " use a file system with more inodes, or lower PROXY_CACHE_LIMIT",
                count=len(sizes),
                once="inodes",
            )
        self._fit(size)
        return True

    def _evict(self, sizes: dict[str, int]) -> None:
        for path, freed in sizes.items():  # the lock is not held while the disk works: the reactor may want it
            if not self._store.remove(path):
                self._store.ledger.used(path, freed)
        if sizes:
            self.evicted += len(sizes)
            log.info(
                "Evicted {count} files, the least recently used; {total} since the start",
                count=len(sizes),
                total=self.evicted,
                once="evicted",
            )

    def _fit(self, pending: int = 0) -> None:
        """
        Lower the limit to what the disk can hold, or raise it again. Called in a thread.

        Of what is reserved nobody knows how much is allocated, and the disk calls the rest free. So the disk holds
        anything between two figures, and a limit between them is left as it is.

        @param pending: bytes that are reserved, and known not to be allocated.
        """
        free, ledger = self._store.free(), self._store.ledger
        if free is None or not self._counted:
            return
        least = ledger.total + free
        most = least + ledger.reserved - pending
        limit = max(0, min(self._wanted, max(least, min(self.limit, most))))
        if limit < self._wanted == self.limit:
            log.warn(
                "The cache is limited to {limit} bytes: the disk holds no more, PROXY_CACHE_LIMIT is {wanted};"
                " lower it, or give the cache more room",
                limit=limit,
                wanted=self._wanted,
            )
        self.limit = limit
