"""
Claims on digests, and the files of transfers: what a download does with the disk before its first byte.

All of it is done in threads, with time limits. What is done late is undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from twisted.logger import Logger

from ecrproxy.answers import Asked
from ecrproxy.cache.arriving import Left, Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import Reservation, room_for
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.cached.entries import EntryCache, KeyedEntries
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.cached.room import Room
from ecrproxy.oci import BLOB_TYPE, Descriptor, Digest
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()


class Claims:
    """
    Takes and releases claims, and creates the files of those that hold one.
    """

    def __init__(self, store: Store, room: Room, disk: Disk, entries: EntryCache, purges: PurgeCount) -> None:
        self._store, self._room, self._disk, self._entries, self._purges = store, room, disk, entries, purges

    async def take(self, digest: Digest) -> Claim | PeerTransfer | Met | Reason:
        """
        Claim a digest for a transfer, or return what exists instead, or why the cache can't have it.
        """
        try:
            return await undone_if_late(self._disk.writing, partial(self._store.claim, digest), self._release_now)
        except OSError:
            return Reason.DISK

    def left(self, claim: Claim) -> Left | None:
        """
        Return what can be resumed of an earlier transfer.
        """
        return self._store.arriving.left(claim)

    def release(self, claim: Claim | PeerTransfer | Met | Reason) -> None:
        """
        Release, in the background, a claim that no transfer has used, or another process's transfer.
        """
        releasing = self._disk.closing(self._release_now, claim)
        releasing.addErrback(lambda problem: log.failure("Releasing a claim", problem))

    def _release_now(self, claimed: Claim | PeerTransfer | Met | Reason) -> None:
        if isinstance(claimed, Claim):
            self._store.arriving.let_go(claimed)
        elif isinstance(claimed, PeerTransfer):
            claimed.close()

    async def writer(
        self,
        claim: Claim,
        digest: Digest,
        size: int | None,
        since: int,
        begun: Callable[[], Awaitable[bool]] | None = None,
        asked: Asked | None = None,
    ) -> Writer | Reason:
        """
        Create the file of a transfer, or resume an interrupted one. Return a reason if the cache can't have it.

        @param claim: belongs to the transfer from now on.
        @param since: number of purges noticed when ECR was asked.
        @param begun: waits for the first bytes, if other content must be evicted; returns True if they came.
        @param asked: the blob that ECR has just confirmed. It is recorded if there is a file, and no purge has been
            noticed since.
        """
        if size is None:
            self.release(claim)
            return Reason.SIZE_UNKNOWN
        refused, reserved, room = None, False, room_for(size)
        try:
            if not claim.resumes(size):
                refused = await self._refused(room, begun)
                if refused is None and not self._room.is_prompt(room):
                    reserved = await self._reserved(claim.reservation, room)
                    refused = None if reserved else Reason.NO_ROOM
        except BaseException:
            self.release(claim)
            raise
        if refused is not None:
            self.release(claim)
            return refused
        confirmed = []
        if asked is not None and self._purges.is_current(since):
            confirmed.append((asked.entry_key, self._entries.confirmed(Descriptor(BLOB_TYPE, digest, size))))
        try:
            begin = partial(self._begin_or_resume, claim, digest, size, confirmed, since, reserved=reserved)
            writer = await undone_if_late(self._disk.writing, begin, _leave, partial(self.release, claim))
        except BaseException as problem:
            on_its_own(self._release_room(claim.reservation))
            if not isinstance(problem, OSError):  # the store has logged those
                raise
            return Reason.DISK
        if isinstance(writer, Writer):
            self._entries.hold_all(confirmed, since)
        return writer

    async def _refused(self, room: int, begun: Callable[[], Awaitable[bool]] | None) -> Reason | None:
        """
        Return why the cache can't have a blob that takes C{room} bytes, as far as the event loop can know.
        """
        if not await self._room.can_hold(room):
            return Reason.TOO_LARGE
        if begun is not None and not self._room.fits(room) and not await begun():
            return Reason.NO_ROOM
        return None

    def _begin_or_resume(
        self, claim: Claim, digest: Digest, size: int, confirmed: KeyedEntries, since: int, *, reserved: bool
    ) -> Writer | Reason:
        """
        Do all disk work that precedes the first byte. Called in a thread: it may return late.

        @param since: see L{EntryCache.write}.
        """
        try:
            left = self._store.arriving.resume(claim, digest, size)
            writer = left or self.begin(claim, digest, size, reserved=reserved)
        except BaseException:
            self._store.arriving.let_go(claim)
            raise
        if confirmed and isinstance(writer, Writer):
            self._entries.write(confirmed, since)
        return writer

    def begin(self, claim: Claim, digest: Digest, size: int, *, reserved: bool = False) -> Writer | Reason:
        """
        Make room for a file, unless it is reserved, and create it. Called in a thread.

        @raise OSError: if the disk fails. The claim is still held then.
        """
        if not reserved and not self._has_room(claim.reservation, room_for(size)):
            self._store.arriving.let_go(claim)
            return Reason.NO_ROOM
        try:
            return self._store.writer(claim, digest, size)
        except BaseException:
            self._store.index.drop(arriving=[claim.reservation])
            raise

    async def take_over(self, peer: PeerTransfer, digest: Digest) -> Writer | None:
        """
        Resume another process's transfer, whose writer has exited. Return None if the caller must look again.

        @raise OSError: if the disk fails.
        """
        take_over = partial(self._store.arriving.take_over, peer, digest)
        return await undone_if_late(self._disk.writing, take_over, _leave)

    async def _release_room(self, what: Reservation) -> None:
        """
        Release the reservation of a file that will not arrive.
        """
        with contextlib.suppress(OSError):
            await self._disk.closing(self._store.index.drop, [], [what])

    async def _reserved(self, what: Reservation, size: int) -> bool:
        try:
            return await self._room.reserve(what, size)
        except Exception as problem:  # noqa: BLE001 (see _no_room)
            return _no_room(problem)

    def _has_room(self, what: Reservation, size: int) -> bool:
        try:
            return self._room.make_room(what, size)
        except Exception as problem:  # noqa: BLE001 (see _no_room)
            return _no_room(problem)


def _no_room(problem: Exception) -> bool:
    """
    Log why there is no room, and return False: a pull goes on even if the janitor fails.
    """
    if isinstance(problem, OSError):
        log.warn("Not kept: room in the cache can't be promised: {problem}", problem=str(problem), once="no room")
    else:
        log.failure("Making room in the cache")
    return False


def _leave(writer: Writer | Reason | None) -> None:
    if isinstance(writer, Writer):
        writer.leave()
