"""
One blob on its way into the cache, any number of readers following it.

Rules:

- A L{Download} runs on its own. No reader starts it, and none that leaves ends it.
- With a file, the bytes come over several connections at once, each a lane that takes part after part of the
  blob and writes it in place. A lane whose connection breaks goes on from its last good byte.
- A file may have bytes from an earlier transfer. They are hashed while the lanes bring what is missing, and shown
  when they are hashed. A transfer that upstream ends before its time leaves its file to the next.
- The hash follows in order. Bytes become visible to a reader once they and all between its own start and
  them are written; so long as the digest isn't proved, every reader is kept from the last byte of its
  range: no answer can look complete before its bytes are known to be right.
- On disk, the file is the buffer: any reader may be at any place of it, and a slow one slows nobody.
- Off disk (the blob is larger than the cache, the disk is full or fails midway), a window of
  C{WINDOW} bytes is the buffer: the bytes come in order, wait for the slowest reader, and end with the last.
  What had reached the file before the disk failed is still read from there.
- Memory: the bytes on their way into the file (C{HIGH_WATER} a lane) or the window, whatever the blob's
  size and however many follow it. What has ended holds none, whoever still refers to it: one that fails is often part
  of a cycle, through its exception's frames, and the garbage collector counts objects, not bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import Disk
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.inflow import Blob, Gaps, Inflow, Stretch
from ecrproxy.transfer.sources import FilePiece

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

log = Logger()
T = TypeVar("T")

WINDOW: Final = 2**20
"""Bytes held for readers of a transfer that has no file."""
TRIES: Final = 3
"""How often in a row a lane may break off without having brought a byte."""


class ShortBodyError(Exception):
    """
    A transfer ended with more or fewer bytes than it had announced.
    """


class _DiskError(Exception):
    """
    The cache could not be written.
    """


class Download:
    """
    One transfer of the blob C{digest}.

    @param size: its length in bytes as announced, if it was.
    @param writer: where it is kept; none to keep a window alone.
    @param lanes: over how many connections it comes.
    @param unkept: why it isn't kept, if it isn't; a file that is given up was the disk's fault.
    @ivar received: how many bytes are readable, from the first on.
    @ivar verified: whether all of them are there and are what the digest names.
    @ivar failure: why there will be no more of them.
    """

    def __init__(
        self,
        digest: Digest,
        size: int | None,
        writer: Writer | None,
        disk: Disk,
        lanes: int = 1,
        *,
        unkept: Reason = Reason.DISK,
    ) -> None:
        self.digest, self.size, self.unkept = digest, size, unkept
        self.received, self.verified = 0, False
        self.failure: Failure | None = None
        self._disk, self._lanes = disk, lanes
        self._file, self._writer = writer, writer
        self._filed = 0
        self._hash = digest.hasher()
        self._gaps, self._lanes_end = Gaps(writer.gaps if writer is not None else ()), False
        self._inflows: set[Inflow] = set()
        self._openings: set[Deferred[Stretch]] = set()
        self._window: deque[bytes] = deque()
        self._window_start = 0
        self._wake: Deferred[None] | None = None
        self._followers: set[Follower] = set()
        self._abandoned, self._leaves = False, False
        self._running = True

    @property
    def kept(self) -> bool:
        """
        Tell whether the bytes go to the cache.
        """
        return self._writer is not None

    @property
    def followers(self) -> int:
        """
        Tell how many read it.
        """
        return len(self._followers)

    def offers(self, start: int) -> bool:
        """
        Tell whether a reader can still begin at C{start}.
        """
        if self._writer is not None or self.verified:
            return self._file is not None
        if self._abandoned or self.failure is not None:
            return False
        return start >= self._window_start or (start < self._filed and self._window_start == self._filed)

    def follow(self, start: int, stop: int | None, waiting: Stopwatch | None = None) -> Follower:
        """
        Read from C{start} up to, not including, C{stop}, as the bytes come.

        @param stop: none for all, where the size is not known.
        @param waiting: counts how long they are waited for.
        """
        follower = Follower(self, start, stop, waiting or Stopwatch(lambda: 0.0))
        self._followers.add(follower)
        return follower

    async def run(self, blob: Blob) -> None:
        """
        Take the transfer to its end, good or bad. Never raises: those who follow are told.
        """
        try:
            if self._writer is None:
                await self._stream(blob, await self._from_the_start(blob))
            elif not await self._fills(blob) and self.received != self.size:
                await self._stream(blob, await blob.open(self.received, self.size))
            await self._finish()
        except Exception as problem:  # noqa: BLE001 (whatever it is, those who follow must be told)
            self._fail(Failure(problem))
        finally:
            self._running = False
            self._close_if_idle()

    # Into the file.

    async def _fills(self, blob: Blob) -> bool:
        """
        Tell whether the file took all of it; if not, the window is where to go on.
        """
        try:
            await self._fill(blob)
        except _DiskError as problem:
            log.info("{digest} goes on without the cache: {problem}", digest=self.digest, problem=str(problem))
            problem.with_traceback(None)  # its frames, and all that called them, lead back to it
            self._spill()
            return False
        return True

    async def _fill(self, blob: Blob) -> None:
        """
        Bring what is missing of the blob into the file, over all lanes at once, while what was there is hashed.

        @raise _DiskError: if the file can't be written.
        """
        problems: list[Failure] = []

        def broke(problem: Failure) -> None:
            problems.append(problem)
            self._lanes_end = True
            self._gaps.give_up()
            for inflow in list(self._inflows):
                inflow.abort(problem)
            for opening in list(self._openings):
                opening.cancel()

        firsts = [blob.first, *[None] * (self._lanes - 1)]
        works = [self._catch_up(), *(self._lane(blob, first) for first in firsts)]
        # A write that a thread is at is waited for.
        await DeferredList([Deferred.fromCoroutine(work).addErrback(broke) for work in works])
        if problems:
            raise cast(Exception, problems.pop(0).value)  # nobody here keeps it, nor the frames that it keeps
        await self._catch_up()

    async def _lane(self, blob: Blob, first: Stretch | None) -> None:
        """
        Bring part after part, until there is none left to take.

        @param first: what has been asked for already. What of it is there is not taken: it may be hashed by now.
        """
        if first is not None:
            part = self._gaps.take_from(first.start, self.size or 0 if first.stop is None else first.stop)
            if part is None:
                _drop(first)
            else:
                await self._part(blob, first, *part)
        while (part := self._gaps.take(self._lanes)) is not None:
            await self._part(blob, None, *part)

    async def _catch_up(self) -> None:
        """
        Hash what is there and could not be hashed as it came, and show it.
        """
        more = True
        while more and not self._lanes_end and (writer := self._writer) is not None:
            if writer.front <= writer.hashed:
                return
            try:
                more = await self._disk.hashing(writer.catch_up)
            except OSError as problem:
                raise _DiskError(problem) from problem
            self.received = self._filed = writer.hashed
            self._news()

    async def _part(self, blob: Blob, stretch: Stretch | None, start: int, stop: int | None) -> None:
        """
        Bring the bytes from C{start} to C{stop}, going on after each break from where it was.
        """
        barren = 0
        while True:
            inflow = Inflow()
            self._inflows.add(inflow)
            reached = start
            try:
                inflow.begin(stretch or await self._open(blob, start, stop, barren))
                while (stop is None or reached < stop) and (batch := await inflow.batch()):
                    reached = await self._write(reached, stop, batch)
                    del batch  # it is on the disk, and the next may be long in coming
                inflow.abort()  # a bucket may send more than it was asked for
                if stop is None or reached >= stop:
                    return
                raise ShortBodyError(f"the connection ended at byte {reached} of {self.digest}")  # noqa: TRY301
            except Exception as problem:  # whatever broke it, the next may hold
                inflow.abort()
                if stop is not None and reached >= stop:
                    return
                barren = 0 if reached > start else barren + 1
                hopeless = self._lanes_end or barren >= TRIES or stop is None
                if hopeless or isinstance(problem, _DiskError | CancelledError):
                    raise
                log.info("Going on with {digest} at byte {at}: {why}", digest=self.digest, at=reached, why=str(problem))
            finally:
                self._inflows.discard(inflow)
            start, stretch = reached, None

    async def _open(self, blob: Blob, start: int, stop: int | None, breaks: int) -> Stretch:
        opening = Deferred.fromCoroutine(blob.open(start, stop, breaks))
        self._openings.add(opening)
        try:
            return await opening
        finally:
            self._openings.discard(opening)

    async def _write(self, offset: int, stop: int | None, batch: Sequence[bytes]) -> int:
        """
        Write what came, and show it.

        @return: the offset behind it.
        """
        size = sum(map(len, batch))
        if stop is not None and offset + size > stop:
            batch, size = [b"".join(batch)[: stop - offset]], stop - offset
        writer = self._writer
        if writer is None:  # another lane has met a disk that fails
            raise CancelledError
        try:
            await self._disk.writing(writer.write, offset, batch)
        except OSError as problem:
            raise _DiskError(problem.with_traceback(None)) from problem
        self.received = self._filed = writer.hashed
        self._news()
        return offset + size

    def _spill(self) -> None:
        """
        Go on in the window from what the file took and the hash saw.
        """
        if self._writer is not None:
            self._hash, self.received = self._writer.reached
            self._filed = self._window_start = self.received
            self._writer = None

    # Through the window.

    async def _from_the_start(self, blob: Blob) -> Stretch:
        """
        Give the blob's first bytes: it was asked for from elsewhere for a file that can't be gone on with.
        """
        if blob.first.start == 0:
            return blob.first
        _drop(blob.first)
        return await blob.open(0, self.size)

    async def _stream(self, blob: Blob, stretch: Stretch) -> None:
        """
        Bring the bytes in order, at the pace of those who follow.
        """
        while True:
            inflow = Inflow()
            self._inflows.add(inflow)
            try:
                inflow.begin(stretch)
                while batch := await inflow.batch():
                    await self._disk.digesting(_hash_all, self._hash, batch)
                    self._window.extend(batch)
                    self.received += sum(map(len, batch))
                    del batch  # the window alone holds it
                    self._news()
                    await self._room()
            finally:
                self._inflows.discard(inflow)
                inflow.abort()
            if self.size is None or self.received >= self.size or stretch.stop in (None, self.size):
                return
            stretch = await blob.open(self.received, self.size)

    async def _room(self) -> None:
        """
        Wait for the slowest reader.

        @raise CancelledError: when there is none any more.
        """
        while self.received - self._window_start > WINDOW and not self._abandoned:
            if not self._followers:
                break
            self._wake = Deferred()
            await self._wake
        if self._abandoned or (not self._followers and self.received - self._window_start > WINDOW):
            raise CancelledError("nobody follows, and there is no file to go on for")

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.callback(None)

    def _trim(self) -> None:
        """
        Drop of the window what every reader has passed.
        """
        if self._writer is not None:
            return
        needed = [follower.lay_aside(self._window_start, self.received) for follower in self._followers]
        still = [position for position in needed if position is not None]
        passed = min(still, default=self.received if self._followers else self._window_start)
        trimmed = False
        while self._window and self._window_start + len(self._window[0]) <= passed:
            self._window_start += len(self._window.popleft())
            trimmed = True
        if trimmed:
            self._stir()

    # To the end.

    async def _finish(self) -> None:
        if self.size is not None and self.received != self.size:
            raise ShortBodyError(f"{self.received} bytes of {self.digest} came, {self.size} were announced")
        if self._writer is not None:
            self._writer.verify()
        elif self._hash.hexdigest() != self.digest.hex:
            raise DigestMismatchError(f"what arrived is not {self.digest}")
        self.verified = True
        self._news()  # before the disk has it for good: readers need not wait for that
        if self._writer is not None:
            try:
                await self._disk.committing(self._writer.commit)
            except OSError as problem:
                log.info("Not kept: {digest}: {problem}", digest=self.digest, problem=str(problem))
                self._writer = None

    def _fail(self, failure: Failure) -> None:
        # What came is worth something still, unless the disk or the bytes are to blame, or nobody knows what.
        self._leaves = self._writer is not None and failure.check(RegistryError, ShortBodyError) is not None
        self.failure, self._writer = failure, None
        foreseen = failure.check(RegistryError, ShortBodyError, DigestMismatchError, CancelledError)
        why = str(failure.value) if foreseen else failure.getTraceback()
        log.warn("The transfer of {digest} failed: {problem}", digest=self.digest, problem=why)
        failure.cleanFailure()  # it is kept, and its frames, and all that called them, would be with it
        self._news()

    # To those who follow.

    def _news(self) -> None:
        for follower in list(self._followers):
            follower.news()
        self._trim()

    def reach(self, offset: int) -> int:
        """
        Tell up to where the bytes from C{offset} on are there.
        """
        if self._writer is None or offset <= self.received:
            return self.received
        return self._writer.reach(offset)

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Point at up to C{count} bytes from C{offset} on, which are there.
        """
        if self._file is not None and (self._writer is not None or offset < self._filed):
            return self._file.fileno(), offset, count if self._writer is not None else min(count, self._filed - offset)
        at = self._window_start
        for part in self._window:
            if at <= offset < at + len(part):
                return part[offset - at : offset - at + count]
            at += len(part)
        raise LookupError(f"byte {offset} of {self.digest} has passed")

    def progressed(self) -> None:
        """
        Note that a reader has moved on.
        """
        if self._writer is None:
            self._trim()

    def left(self, follower: Follower) -> None:
        """
        Note that a reader is done or gone.
        """
        self._followers.discard(follower)
        if self._writer is None and not self.verified:
            self._trim()
            if not self._followers:
                self._abandon()
            self._stir()
        self._close_if_idle()

    def _abandon(self) -> None:
        """
        End a transfer that has no file to go on for, and nobody to go on for.
        """
        self._abandoned = True
        problem = Failure(CancelledError("nobody follows, and there is no file to go on for"))
        for inflow in list(self._inflows):
            inflow.abort(problem)

    def _close_if_idle(self) -> None:
        """
        Let go of file and window when nothing comes in any more and nobody reads.
        """
        if self._running or self._followers:
            return
        self._window.clear()
        if self._file is None:
            return
        file, self._file = self._file, None
        let_go = file.leave if self._leaves else file.discard if self._writer is None else file.close
        self._disk.closing(let_go).addErrback(lambda problem: log.failure("Closing a file", problem))


def _drop(stretch: Stretch) -> None:
    """
    Do without bytes that were asked for.
    """
    inflow = Inflow()
    inflow.begin(stretch)
    inflow.abort()


def _hash_all(state: Any, batch: Sequence[bytes]) -> None:  # noqa: ANN401 (hashlib's objects have no public type)
    for data in batch:
        state.update(data)
