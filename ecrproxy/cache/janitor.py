"""
Keep the cache directory within its limit: evict the least recently used files first, never one that is being read.

Rules:

- The index has the totals for all processes. A caller that needs room makes it, one process at a time.
- A file is unlinked first and then leaves the index: after a crash, totals may be too high, never too low.
- A file that any process has open is not evicted: it is locked, and others are evicted instead.
- The limit is in bytes of disk, and includes the index and arriving files. It is never more than the disk can hold.
- If the limit is less than the size of the index, all else is evicted, because the index does not shrink.
- If the disk is full anyway, files are evicted to make room. If it lacks inodes, a fixed number of files is evicted.
- Before a lowered limit causes an eviction or a refusal, it is checked again: other programs may have freed space. A
  disk that leaves the cache less than the spare space counts as full, even if a small file fits.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.database import FullError
from ecrproxy.cache.locks import locked
from ecrproxy.cache.record import Reservation
from ecrproxy.periodic import Periodic
from ecrproxy.threads import undone_if_late

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Candidate, Store
    from ecrproxy.threads import InThread

log = Logger()

PAUSE_SECONDS: Final = 60.0
"""How often the limit is compared with the disk, and interrupted transfers are swept."""
ROOM_SECONDS: Final = 2.0
"""Seconds that a client waits for room. Anything evicted later serves the next client."""
AT_ONCE: Final = 2**20
"""Minimum number of bytes evicted when the disk is full."""
FILES_AT_ONCE: Final = 256
"""Files evicted when the disk has no inodes left."""
EVICTING: Final = "evict.lock"
_ROUNDS: Final = 8
"""Maximum attempts to make room for one file while others take it: each loss is improbable."""


def victims(candidates: Iterable[Candidate], excess: int) -> list[Candidate] | None:
    """
    Choose the files to evict.

    @param candidates: the least recently used first.
    @param excess: number of bytes to free.
    @return: None if evicting all candidates would not suffice; then none should be evicted.
    """
    chosen = []
    for each in candidates:
        if excess <= 0:
            break
        chosen.append(each)
        excess -= each.size
    return chosen if excess <= 0 else None


class Janitor(Service):
    """
    Makes room in the cache directory.

    @param limit: maximum bytes of disk for the cache, including arriving files.
    @ivar limit: the same, or less if the disk can't hold that much.
    @ivar evicted: number of files evicted to make room.
    """

    def __init__(self, store: Store, limit: int, in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._wanted, self._in_thread = store, limit, in_thread
        self.limit = limit
        self.evicted = 0
        self._evicting, self._awaited = threading.Lock(), dict[object, int]()
        self._waited_in_vain = False
        self._clock = clock
        self._turns = Periodic("Keeping the limit", lambda: in_thread(self.tidy), clock)
        store.folders.evict = store.index.evict = self.evict
        store.checks.see_room = self.see_room

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._turns.start(PAUSE_SECONDS)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._turns.stop()

    def tidy(self) -> None:
        """
        Sweep, and bring the directory within its limit, which may have been lowered. Called in a thread.
        """
        self._store.sweep()
        self.fit()

    def fit(self) -> None:
        """
        Bring the directory within its limit, which is never more than the disk holds. Called in a thread.
        """
        self._fit()
        self.make_room(None, 0)

    @property
    def held(self) -> int:
        """
        Return the bytes of disk that the cache takes, including the index and arriving files.
        """
        index = self._store.index
        return index.totals.blocks + index.totals.arriving + index.changes.promised + index.size

    def fits(self, size: int) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting anything.
        """
        return self.held + on_disk(size) <= self.limit

    async def fits_without(self, size: int, seconds: float) -> bool:
        """
        Return True if C{size} bytes fit without evicting files used within the last C{seconds}.

        @raise OSError: if the index can't be read.
        """
        excess = self.held + on_disk(size) - self.limit
        return excess <= 0 or await self._in_thread(self._has_unused, excess, self._store.now() - seconds)

    def _has_unused(self, excess: int, before: float) -> bool:
        for each in self._store.candidates():
            if each.used >= before:
                return False
            excess -= each.size
            if excess <= 0:
                return True
        return False

    def is_prompt(self, size: int) -> bool:
        """
        Return True if L{make_room} will not have to wait for the index.
        """
        index = self._store.index
        return index.changes.wake_writer is None or index.reservations.has_plenty(on_disk(size), self.limit)

    async def reserve(self, what: Reservation, size: int) -> bool:
        """
        Make room for C{size} bytes to arrive under a claim that is held. Return False if that is impossible.
        """
        if on_disk(size) > self._wanted:
            return False
        index = self._store.index
        making = undone_if_late(
            self._in_thread,
            lambda: self.make_room(what, size),
            lambda made: index.drop(arriving=[what]) if made else None,
        )
        try:
            return await Deferred.fromCoroutine(making).addTimeout(ROOM_SECONDS, self._clock)
        except defer.TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"no room was made within {ROOM_SECONDS:g} s") from None

    async def can_hold(self, size: int) -> bool:
        """
        Return True if C{size} bytes are within the limit if all else is evicted. The limit may be raised first.
        """
        if self.limit < size <= self._wanted:
            with contextlib.suppress(OSError):
                await self._in_thread(self._look_again)
        return size <= self.limit

    def see_room(self) -> None:
        """
        Check that the disk has room for a cache. Called in a thread.

        @raise OSError: if other files have taken it.
        """
        self._fit()
        if self.limit < min(self._wanted, self._store.space.spare()):
            raise OSError(errno.ENOSPC, f"No space left on device: other files leave the cache {self.limit} bytes")

    def make_room(self, what: Reservation | None, size: int) -> bool:
        """
        Evict until C{size} bytes fit, and reserve them. Called in a thread.

        @param what: the reservation; None to reserve nothing.
        @raise OSError: if the index can't be written.
        """
        try:
            if not self._excess(what, size):
                return True
        except FullError:
            if not self.evict(size):
                raise
        waiter = object()
        self._awaited[waiter] = on_disk(size)
        try:
            for _ in range(_ROUNDS):
                with self._alone():
                    if not self._made_room(what, size):
                        return False
                if not self._excess(what, size):  # one transaction decides between all that wait for room
                    return True
        finally:
            del self._awaited[waiter]
        return False

    def _made_room(self, what: Reservation | None, size: int) -> bool:
        """
        Evict for this caller and all that wait, unless another has done so meanwhile. Return False if it can't be done.
        """
        index = self._store.index
        index.refresh()
        self._look_again()
        own = index.reservations.promised(what) if what else 0
        excess = self.held - own + on_disk(size) - self.limit
        awaited = max(0, self.held - own + sum(self._awaited.values()) - self.limit)
        if excess <= 0 and awaited <= 0:
            return True
        takes_all = what is None and self.held > self._wanted
        if excess > index.totals.blocks + index.totals.arriving and not takes_all:
            return False
        chosen = victims(self._store.candidates(), awaited) or victims(self._store.candidates(), excess)
        if chosen is None and takes_all:  # the index alone exceeds the limit: evict all else
            chosen = list(self._store.candidates())
        if chosen is None or (excess > 0 and not chosen):
            return False
        self._evict(chosen)
        index.changes.wait()  # otherwise they are still counted
        return True

    def _excess(self, what: Reservation | None, size: int) -> int:
        return (
            self._store.index.reservations.reserve(what, size, self.limit) if what else max(0, self.held - self.limit)
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """
        Keep other threads, and other processes, from evicting.

        Another process may hang while it holds the lock: wait for it once, then not until the lock has been acquired.
        """
        with self._evicting, contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self._store.root / EVICTING, waiting=not self._waited_in_vain))
                self._waited_in_vain = False
            except OSError:  # both evict, which may be more than necessary
                self._waited_in_vain = True
            yield

    def evict(self, size: int) -> bool:
        """
        Evict C{size} bytes because the disk is full, and lower the limit to what it holds. Called in a thread.

        @return: True to retry: that much was evicted, or another thread has just evicted something.
        """
        if not self._evicting.acquire(blocking=False):
            with self._evicting:  # wait until its files are gone from the disk
                return True
        try:
            return self._evict_for(size)
        except OSError as problem:
            log.warn("Can't choose what to evict: {problem}", problem=str(problem), once="choosing")
            return False
        finally:
            self._evicting.release()

    def _evict_for(self, size: int) -> bool:
        by_number = self._store.space.lacks_inodes()
        for _ in range(_ROUNDS):
            chosen = self._chosen_for(size, by_number=by_number)
            if not chosen:
                return False
            count = self._evict(chosen)
            if count:
                break
        else:  # all of these are open, or can't be removed
            return False
        with contextlib.suppress(OSError):
            self._store.index.changes.wait()  # else files still counted would be taken for room
        if by_number:
            log.warn(
                "The cache's disk has no inodes left: evicted {count} files;"
                " use a file system with more inodes, or lower PROXY_CACHE_LIMIT",
                count=count,
                once="inodes",
            )
        self._fit(size)
        return True

    def _chosen_for(self, size: int, *, by_number: bool) -> Sequence[Candidate] | None:
        candidates = self._store.candidates
        if by_number:
            return list(islice(candidates(), FILES_AT_ONCE))
        # A small file frees a block that the next small write takes: evict more if possible.
        return victims(candidates(), max(size, AT_ONCE)) or victims(candidates(), size)

    def _evict(self, chosen: Sequence[Candidate]) -> int:
        """
        Evict files, except those that some process has open; from then on others are tried before these.

        @return: the number of files evicted.
        """
        gone = set(self._store.evict_unused(each.what for each in chosen))
        for each in chosen:
            if each.what not in gone:
                self._pass_over(each)
        if gone:
            self.evicted += len(gone)
            log.info(
                "Evicted {count} files, the least recently used; {total} since the start",
                count=len(gone),
                total=self.evicted,
                once="evicted",
            )
        return len(gone)

    def _pass_over(self, each: Candidate) -> None:
        """
        Move a file that is open, or can't be removed, to the end of the eviction order.
        """
        if isinstance(each.what, Reservation):
            self._store.index.pass_over(each.what)
        else:
            self._store.index.uses.use(each.what)

    def _look_again(self) -> None:
        """
        Raise a lowered limit if other programs have freed space. Called in a thread.
        """
        if self.limit < self._wanted:
            self._fit()

    def _fit(self, pending: int = 0) -> None:
        """
        Lower the limit to what the disk can hold, or raise it again. Called in a thread.

        Nobody knows how much of the reserved space is allocated, and the disk reports the rest as free. So its capacity
        is known only as a range, and a limit within that range is left alone.

        @param pending: reserved bytes that are known not to be allocated.
        """
        index = self._store.index
        kept = index.taken
        least = self._store.space.capacity(kept, counted=self._store.counted)
        if least is None:
            return
        most = least + self.held - kept - pending
        limit = max(0, min(self._wanted, max(least, min(self.limit, most))))
        if limit < self._wanted == self.limit:
            log.warn(
                "The cache is limited to {limit} bytes: the disk holds no more, PROXY_CACHE_LIMIT is {wanted};"
                " lower it, or give the cache more room",
                limit=limit,
                wanted=self._wanted,
            )
        self.limit = limit
