"""
A transfer into a file of the cache.

Rules:

- The bytes come over several connections at once, each a lane that takes part after part of the blob and writes it in
  place. A lane whose connection breaks continues from its last good byte.
- A file may have bytes from an earlier transfer. They are hashed while the lanes bring what is missing. Readers get
  them at once if they were written since the machine started, else when they are hashed. A transfer that upstream cuts
  short leaves its file to the next.
- What readers wait for is fetched first, small ranges before all: see L{FileBacked.hasten} and L{Gaps.take_wished}.
  Readers of many MiB take turns for their next part, so none has all the lanes.
- The bytes that complete a file, up to C{TAIL}, are verified in the event loop and sent from memory. One thread call
  then writes them and commits the file, so a small blob costs one call once its bytes have arrived.
- The file is the buffer: readers may be at any offset, and a slow one delays no other.
- Memory: the bytes on their way into the file, C{HIGH_WATER} a lane, and C{BUFFERED} for all transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.flushing import PIECE
from ecrproxy.cache.record import Why
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import RegistryError
from ecrproxy.threads import Disk
from ecrproxy.transfer.backing import Backing, close_later
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.gaps import Gaps, Urgency, Wish
from ecrproxy.transfer.inflow import AHEAD_WATER, HIGH_WATER, Blob, Buffered, Inflow, Stretch
from ecrproxy.transfer.lane import Lane, ShortBodyError, drop
from ecrproxy.transfer.readable import Readable
from ecrproxy.transfer.sources import FilePiece

log = Logger()

STANDING_SECONDS: Final = 1.0
"""Seconds without a byte after which a transfer that was begun ahead is requested again, once a client waits for it."""
TAIL: Final = 64 * 2**10
"""Maximum number of final bytes that are hashed in the event loop and sent from memory."""
SOON: Final = 256 * 2**10
"""
Distance in bytes from a lane to the byte that a client waits for below which a new connection would not be faster.
"""


class UnattendedError(Exception):
    """
    A transfer without a reader is slow, or too many others have none either.
    """


class DiskError(Exception):
    """
    The cache could not be written.
    """


class FileBacked(Backing):
    """
    Fetches what a file lacks, hashes it, and makes it content.

    @param buffered: counts the bytes that all transfers hold in memory.
    @param urgency: what waits for the range that was requested first.
    @param call_later: a reactor's; none to gather no bytes and replace no connections.
    @ivar lanes: number of connections.
    @ivar given_up: whether the file does not become content: the disk, or the transfer, has failed.
    """

    def __init__(
        self,
        writer: Writer,
        readable: Readable,
        disk: Disk,
        lanes: int,
        buffered: Buffered,
        urgency: Urgency,
        call_later: Callable[..., Any] | None,
    ) -> None:
        self._writer, self._readable, self._disk, self.lanes = writer, readable, disk, lanes
        self._buffered, self._first_urgency, self._call_later = buffered, urgency, call_later
        self._file: Writer | None = writer
        self._filed, self._tail = 0, b""
        self._gaps, self._over = Gaps(writer.gaps), False
        self._blob: Blob | None = None
        self._at_work: set[Lane] = set()
        self.given_up, self._leaves = False, False

    @property
    def resumable(self) -> bool:
        """
        Return True if the next transfer could continue this one's file.
        """
        return not self.given_up

    @property
    def missing(self) -> int:
        """
        Return how many bytes the file still lacks; 0 if it was given up.
        """
        return 0 if self.given_up else self._writer.missing

    # Readers.

    def offers(self, start: int) -> bool:
        """
        Return True if a reader can still begin at C{start}.
        """
        if self._tail and start >= self._filed:
            return True
        if not self.given_up:
            return self._file is not None
        whole = self._filed == self._readable.size or bool(self._tail)
        return self._readable.verified and self._file is not None and whole

    def reach(self, offset: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{offset}.
        """
        received = self._readable.received
        return received if self.given_up else max(received, self._writer.reach(offset))

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.
        """
        if self._tail and offset >= self._filed:
            return self._tail[offset - self._filed : offset - self._filed + count]
        growing = not self.given_up and not self._tail
        if self._file is not None and (growing or offset < self._filed):
            return self._file.fileno(), offset, count if growing else min(count, self._filed - offset)
        raise LookupError(f"byte {offset} of {self._readable.digest} has passed")

    def expect(self) -> None:
        """
        Note that a client waits for a blob that was begun ahead. Connections that bring nothing are soon replaced.
        """
        if self.given_up:
            return
        self._writer.asked_for = True
        if self._call_later is not None:
            before = {lane: lane.arrived for lane in self._at_work}
            self._call_later(STANDING_SECONDS, self._leave_standing, before)

    def _leave_standing(self, before: Mapping[Lane, int]) -> None:
        if self._blob is None or not self._blob.ranged or self._over:
            return
        for lane, arrived in before.items():
            if lane in self._at_work and lane.arrived == arrived and lane.stop is not None:
                lane.cut(self._gaps.give_back)

    def hasten(self, reader: Follower) -> None:
        """
        Have a lane give up its part and fetch what a reader waits for, unless one is about to fetch it.
        """
        blob = self._blob
        if self.given_up or blob is None or not blob.ranged or self._over:
            return
        missing, wish = self._writer.reach(reader.position), self._wish(reader)
        if wish is None or missing >= wish.stop:
            return
        there = [lane for lane in self._at_work if lane.reached <= missing < (lane.stop or 0)]
        if any(lane.urgency >= wish.urgency or missing - lane.arrived <= SOON for lane in there):
            return
        if not there and missing in self._gaps:
            there = [lane for lane in self._at_work if lane.urgency < wish.urgency]
        if there:
            max(there, key=lambda lane: (-lane.urgency, (lane.stop or 0) - lane.arrived)).cut(self._gaps.give_back)

    def _wish(self, reader: Follower) -> Wish | None:
        stop = reader.until if reader.until is not None else self._readable.size
        return Wish(reader.position, stop) if stop is not None else None

    # Filling the file.

    async def fetch(self, blob: Blob) -> None:
        """
        Fetch what is missing over all lanes at once, while the bytes already there are hashed.

        @raise DiskError: if the file can't be written.
        """
        self._blob = blob
        problems: list[Failure] = []

        def broke(problem: Failure) -> None:
            problems.append(problem)
            self._end_lanes(problem)

        firsts = [blob.first, *[None] * (self.lanes - 1)]
        works = [self._catch_up(), *(self._lane(blob, first) for first in firsts)]
        # Writes that are running in threads are waited for.
        await DeferredList([Deferred.fromCoroutine(work).addErrback(broke) for work in works])
        if problems:
            raise cast(Exception, problems.pop(0).value)  # so that no local keeps it, nor its frames
        await self._catch_up()

    @property
    def is_fetching(self) -> bool:
        """
        Return True if a lane is at work.
        """
        return bool(self._at_work)

    def stop(self) -> None:
        """
        End the lanes of a transfer without a reader.
        """
        self._end_lanes(Failure(UnattendedError("nobody reads it; the next request continues it")))

    def _end_lanes(self, problem: Failure) -> None:
        self._over = True
        self._gaps.give_up()
        for lane in list(self._at_work):
            lane.abort(problem)

    async def _lane(self, blob: Blob, first: Stretch | None) -> None:
        """
        Fetch part after part until none is left: first what readers wait for, then the rest in order.

        @param first: the range requested already. Bytes of it that are on disk are skipped: they may have been hashed.
        """
        if first is not None:
            span = self._gaps.take_from(first.start, self._readable.size or 0 if first.stop is None else first.stop)
            if span is None:
                drop(first)
            else:
                await self._part(self._new_lane(blob, *span, first, self._first_urgency))
        while True:
            part = self._next_part(blob)
            if part is None:
                return
            start, stop, urgency = part
            await self._part(self._new_lane(blob, start, stop, None, urgency))

    def _new_lane(self, blob: Blob, start: int, stop: int, first: Stretch | None, urgency: Urgency) -> Lane:
        water = AHEAD_WATER if self._readable.ahead and first is not None else HIGH_WATER
        inflow = partial(Inflow, self._buffered, water, self._call_later)
        return Lane(self._readable.digest, blob, start, stop, first, inflow, urgency=urgency)

    def _next_part(self, blob: Blob) -> tuple[int, int, Urgency] | None:
        """
        Take the next part. Once there are readers of parts, readers of the whole take turns with them.
        """
        readers = self._readable.readers
        wishes = {each: wish for each in readers if (wish := self._wish(each)) is not None}
        missing = {each: self._gaps.first_missing(*wish) for each, wish in wishes.items()}
        shared = blob.ranged and any(each.partial and at is not None for each, at in missing.items())
        part = self._gaps.take_wished(wishes.values()) if shared else None
        if part is None and (rest := self._gaps.take(self.lanes)) is not None:
            part = (*rest, Urgency.NOBODY)
        for served in [each for each, at in missing.items() if part is not None and at == part[0]]:
            del readers[served]
            readers[served] = None
        return part

    async def _part(self, lane: Lane) -> None:
        """
        Write the bytes of a lane.
        """
        self._at_work.add(lane)
        offset = lane.reached
        try:
            while batch := await lane.batch():
                offset = await self._write(offset, batch)
                del batch  # written; the next may be long in coming
        except Exception:
            lane.abort()
            raise
        finally:
            self._at_work.discard(lane)

    async def _write(self, offset: int, batch: Sequence[bytes]) -> int:
        """
        Write C{batch} and show it.

        @return: the offset after it.
        """
        writer = self._writer
        if self.given_up:  # the disk has failed for another lane
            raise CancelledError
        end = offset + sum(map(len, batch))
        if end - offset <= TAIL and writer.size <= PIECE and writer.lacks_only(offset, end):
            await self._complete(offset, b"".join(batch))
            return end
        try:
            await self._disk.writing(writer.write, offset, batch)
        except OSError as problem:
            raise DiskError(problem.with_traceback(None)) from problem
        self._show_hashed()
        return end

    async def _catch_up(self) -> None:
        """
        Hash the bytes on disk that could not be hashed as they came, and show them.
        """
        more = True
        while more and not self._over and not self.given_up:
            if self._writer.front <= self._writer.hashed:
                return
            try:
                more = await self._disk.hashing(self._writer.catch_up)
            except OSError as problem:
                raise DiskError(problem) from problem
            self._show_hashed()

    def _show_hashed(self) -> None:
        """
        Show the hashed bytes of the file. A verified tail is ahead of them, and stays visible.
        """
        if not self._readable.verified:
            self._filed = self._writer.hashed
            self._readable.show(self._filed)

    # Ending.

    async def _complete(self, offset: int, tail: bytes) -> None:
        """
        Verify the bytes that complete the file, show them from memory, then write and commit the file in one call.
        """
        readable, writer = self._readable, self._writer
        state, _ = writer.reached
        state.update(tail)
        if state.hexdigest() != readable.digest.hex:
            raise DigestMismatchError(f"what arrived is not {readable.digest}")
        self._tail, self._filed = tail, offset
        readable.verified = True
        readable.show(offset + len(tail))
        unread = not offset and not readable.readers
        if unread:  # readers that come in the meantime get everything from memory
            self._file = None
        await self._commit(partial(writer.finish, offset, tail, closes=unread))
        if self._file is not None and not self.given_up:
            self._tail, self._filed = b"", readable.received

    def verify(self) -> None:
        """
        Compare the hash with the digest.

        @raise DigestMismatchError: if they differ.
        """
        self._writer.verify()

    async def commit(self) -> None:
        """
        Make the file content.
        """
        await self._commit(self._writer.commit)

    async def _commit(self, commit: Callable[[], None]) -> None:
        writer = self._writer
        try:
            while writer.size > PIECE and await self._disk.committing(writer.flush, PIECE):
                pass
            await self._disk.committing(commit)
        except OSError as problem:
            digest, why = self._readable.digest, str(problem)
            log.info("Not kept: {digest}: {problem}", digest=digest, problem=why, once=str(problem.errno))
            self.given_up, self.kept = True, False
            if self._file is None:
                close_later(self._disk, writer.discard)

    def spill(self) -> tuple[Any, int, Writer | None]:
        """
        Give the file up, because the disk has failed. What was written and hashed can still be read from it.

        @return: the hash, the number of these bytes, and the file.
        """
        state, hashed = self._writer.reached
        close_later(self._disk, self._writer.give_up, Why.DISK)
        self.given_up = True
        return state, hashed, self._file

    def fail(self, failure: Failure) -> None:
        """
        Leave the file to the next transfer, unless the disk or the bytes are to blame, or the cause is unknown.
        """
        if not self.given_up:
            self.given_up = True
            self._leaves = failure.check(RegistryError, ShortBodyError, UnattendedError) is not None
            why = Why.DISK if failure.check(DigestMismatchError) is None else Why.DIGEST
            close_later(self._disk, self._writer.release if self._leaves else partial(self._writer.give_up, why))

    def close(self) -> None:
        """
        Close the file.
        """
        file, self._file, self._tail = self._file, None, b""
        if file is not None:
            close = file.leave if self._leaves else file.discard if self.given_up else file.close
            close_later(self._disk, close)
