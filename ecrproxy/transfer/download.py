"""
The transfer of one blob into the cache, with any number of readers following it.

Rules:

- A L{Download} runs on its own. Readers neither start it nor end it by leaving.
- With a file, the bytes come over several connections at once, each a lane that takes part after part of the blob and
  writes it in place. A lane whose connection breaks continues from its last good byte.
- A file may have bytes from an earlier transfer. They are hashed while the lanes bring what is missing. Readers get
  them at once if they were written since the machine started, else when they are hashed. A transfer that upstream cuts
  short leaves its file to the next.
- Hashing follows in order. A reader sees a byte once all bytes from the reader's start up to it are written. A reader
  of the whole blob gets its last byte once the digest is verified: no complete response has wrong bytes. A reader of a
  part gets all of it at once: clients that request parts verify by themselves.
- What readers wait for is fetched first, small ranges before all: see C{_hasten} and L{Gaps.take_wished}. Readers of
  many MiB take turns for their next part, so none has all the lanes.
- The bytes that complete a file, up to C{TAIL}, are verified in the event loop and sent from memory. One thread call
  then writes them and commits the file, so a small blob costs one call once its bytes have arrived.
- On disk, the file is the buffer: readers may be at any offset, and a slow one delays no other.
- Off disk (the blob is larger than the cache, or the disk is full or fails midway), a window of C{WINDOW} bytes is the
  buffer: bytes come in order, wait for the slowest reader, and stop when the last one leaves. Once all transfers hold
  C{BUFFERED} bytes, a window takes one read, and the next when its readers have taken that. What had reached the file
  before the disk failed is still read from there. Readers that stop for C{STUCK_SECONDS} while others wait for them get
  a transfer of their own, which continues from this one's window and hash. If the bucket serves no ranges, or the size
  is unknown, or the readers are still in the file, their responses are aborted.
- A blob that another process on the directory fetches is read from that process's file, as far as its record says. If
  the other process dies, this one takes the transfer over and continues in the same file. If it fails or stalls, the
  rest is fetched off disk. Readers notice none of this: see L{record.next_step}.
- Memory: the bytes on their way into the file (C{HIGH_WATER} a lane, and C{BUFFERED} for all transfers) or the window,
  whatever the blob's size and the number of readers. A transfer that has ended holds none, even if it is still
  referenced: a failed one is often part of a cycle, through its exception's frames, and the garbage collector counts
  objects, not bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.access.limits import Patience
from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.flushing import PIECE
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, WORTH_RESUMING, Look, Step, Why, next_step
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import Disk
from ecrproxy.tracing import Span
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.gaps import SMALLEST_PART, Gaps, Urgency, Wish
from ecrproxy.transfer.inflow import AHEAD_WATER, HIGH_WATER, Blob, Buffered, Inflow, Stretch
from ecrproxy.transfer.lane import Lane, ShortBodyError, drop
from ecrproxy.transfer.sources import FilePiece

if TYPE_CHECKING:
    from hashlib import _Hash

    from ecrproxy.oci import Digest

log = Logger()
T = TypeVar("T")

WINDOW: Final = 2**20
"""Bytes held for the readers of a transfer without a file; one read while all transfers hold C{BUFFERED} bytes."""
STANDING_SECONDS: Final = 1.0
"""Seconds without a byte after which a transfer that was begun ahead is requested again, once a client waits for it."""
STUCK_SECONDS: Final = 5
"""Seconds that one reader of a window may keep all others waiting."""
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


class _DiskError(Exception):
    """
    The cache could not be written.
    """


class Download:
    """
    One transfer of the blob C{digest}.

    @param size: the announced length in bytes, if any.
    @param writer: the file to write; none to keep only a window; or another process's transfer, to follow it.
    @param lanes: number of connections.
    @param unkept: why the blob isn't kept, if it isn't; the disk is to blame for a file that is given up.
    @param buffered: counts the bytes that all transfers hold in memory.
    @param urgency: what waits for the range that was requested first.
    @param call_later: a reactor's, to time out stuck readers; none to wait for them forever.
    @ivar ahead: whether the transfer was begun before any client request, and none has come yet.
    @ivar attendance: called when the first reader comes or the last has left.
    @ivar split_off: called with a separate transfer for readers that got stuck; the callee has to run it.
    @ivar others: registries whose clients have joined, and their sources of the blob: see L{bucket.Blob}.
    @ivar span: of the transfer, if it is traced.
    @ivar received: number of readable bytes, counted from the first.
    @ivar verified: whether all bytes have arrived and match the digest.
    @ivar failure: why the transfer failed, if it did.
    """

    def __init__(
        self,
        digest: Digest,
        size: int | None,
        writer: Writer | PeerTransfer | None,
        disk: Disk,
        lanes: int = 1,
        *,
        unkept: Reason = Reason.DISK,
        buffered: Buffered | None = None,
        urgency: Urgency = Urgency.NOBODY,
        call_later: Callable[..., Any] | None = None,
    ) -> None:
        self.digest, self.size, self.unkept, self.ahead = digest, size, unkept, False
        self.received, self.verified = 0, False
        self.failure: Failure | None = None
        self._disk, self._lanes = disk, lanes
        self._file: Writer | PeerTransfer | None = writer
        self._peer = writer if isinstance(writer, PeerTransfer) else None
        self._writer = writer if isinstance(writer, Writer) else None
        self._followed: PeerTransfer | None = self._peer
        self._filed = 0
        self._hash = digest.hasher()
        self._gaps, self._lanes_end = Gaps(self._writer.gaps if self._writer is not None else ()), False
        self._buffered = buffered or Buffered()
        self._first_urgency = urgency
        self._blob: Blob | None = None
        self._at_work: set[Lane] = set()
        self._window: deque[bytes] = deque()
        self._window_start = 0
        self._tail = b""
        self._wake: Deferred[None] | None = None
        self._call_later, self._asked_later = call_later or _never, call_later
        self._patience = Patience(self._call_later, STUCK_SECONDS, self._leave_behind)
        self._followers: dict[Follower, None] = {}  # ordered by when a part was last taken for each
        self._abandoned, self._leaves, self._attended = False, False, False
        self._running, self.stopped, self._failed_filing = True, False, False
        self._parts_sent = 0
        self.others: dict[Any, Any] = {}
        self.span: Span | None = None
        self.attendance: Callable[[], None] = lambda: None
        self.split_off: Callable[[Download], None] | None = None

    @property
    def kept(self) -> bool:
        """
        Return True if the bytes go to the cache, or did when the transfer failed.
        """
        return self._backing is not None or self._failed_filing

    @property
    def _backing(self) -> Writer | PeerTransfer | None:
        """
        Return the growing file, this process's or another's.
        """
        return self._writer or self._peer

    @property
    def elsewhere(self) -> bool:
        """
        Return True if another process fetches the blob.
        """
        return self._peer is not None

    @property
    def followers(self) -> int:
        """
        Return the number of readers.
        """
        return len(self._followers)

    @property
    def unattended(self) -> bool:
        """
        Return True if the transfer serves only the cache, and has a file that the next transfer could continue.

        Not so once it is verified: it fetches nothing more, and if it stopped, new readers would wait for the disk.
        """
        resumable = self._writer is not None and (self.size or 0) >= WORTH_RESUMING
        return self._running and resumable and not (self.verified or self._followers or self.stopped)

    @property
    def missing(self) -> int:
        """
        Return how many bytes the file still lacks; 0 without a file.
        """
        return self._writer.missing if self._writer is not None else 0

    def offers(self, start: int) -> bool:
        """
        Return True if a reader can still begin at C{start}.
        """
        if self.stopped:
            return False
        if self._tail and start >= self._filed:
            return True
        if self._backing is not None:
            return self._file is not None
        if self.verified:
            return self._file is not None and (self._filed == self.size or bool(self._tail))
        if self._abandoned or self.failure is not None:
            return False
        return start >= self._window_start or (start < self._filed and self._window_start == self._filed)

    def passes(self, start: int) -> bool:
        """
        Return True if a reader that begins at C{start} gets its first bytes as soon as they come from upstream.
        """
        return self.offers(start) and (self.kept or start <= self.received)

    def nears(self, start: int) -> bool:
        """
        Return True if the byte at C{start} has arrived or is about to: another process's transfer can't be hastened.
        """
        peer = self._peer
        return peer is None or start < peer.reach(start) or start <= peer.reach(0) + SMALLEST_PART

    def follow(
        self, start: int, stop: int | None, waiting: Stopwatch | None = None, until: int | None = None
    ) -> Follower:
        """
        Read from C{start} up to, not including, C{stop}, as the bytes come.

        @param stop: none for the whole blob, if the size is unknown.
        @param waiting: measures how long the reader waits for bytes.
        @param until: the end of the last part that is fetched along with this one, for a reader of several.
        """
        follower = Follower(self, start, stop, waiting or Stopwatch(lambda: 0.0), until)
        self._followers[follower] = None
        self._attended = True
        if self.ahead:
            self._come_to_be_awaited()
        if follower.partial:
            self._hasten(follower)
        if len(self._followers) == 1:
            self.attendance()
        return follower

    def _come_to_be_awaited(self) -> None:
        """
        Record that a client requests a blob that was begun ahead. Connections that bring nothing are soon replaced.
        """
        self.ahead = False
        if self._writer is not None:
            self._writer.asked_for = True
        self._call_later(STANDING_SECONDS, self._leave_standing, {lane: lane.arrived for lane in self._at_work})

    def _leave_standing(self, before: Mapping[Lane, int]) -> None:
        blob = self._blob
        if blob is None or not blob.ranged or self._lanes_end:
            return
        for lane, arrived in before.items():
            if lane in self._at_work and lane.arrived == arrived and lane.stop is not None:
                lane.cut(self._gaps.give_back)

    def add_source(self, registry: object, source: object) -> None:
        """
        Add a registry to ask for what the others do not bring, or are slow to: see C{others}.
        """
        if registry not in self.others:
            self.others[registry] = source
            if self._blob is not None:
                self._blob.look_again()

    def let_go(self) -> None:
        """
        Record that the client that requested the blob does not read it after all.
        """
        if not self._followers:
            self._attended, self.ahead = True, False
            if self._backing is None and self._running:
                self._abandon()
            self.attendance()

    def stop(self) -> None:
        """
        Stop a transfer without a reader; the next transfer of this digest continues its file.
        """
        if self._at_work and self.unattended:
            self.stopped = True
            self._end_lanes(Failure(UnattendedError("nobody reads it; the next request continues it")))

    async def run(self, blob: Blob) -> None:
        """
        Run the transfer to its end. Never raises: followers are told of failures.
        """
        await self.to_the_end(self._run(blob))

    async def to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """
        Let C{work} run the transfer to its end. Never raises: followers are told of failures.
        """
        try:
            await work
        except Exception as problem:  # noqa: BLE001 (whatever it is, followers must be told)
            self._fail(Failure(problem))
        finally:
            self._running = False
            self._close_if_idle()

    async def _run(self, blob: Blob) -> None:
        self._blob = blob
        if self._writer is None:
            await self._stream(blob, None if self.received else self._from_the_start(blob))
        elif not await self._fills(blob) and self.received != self.size:
            await self._stream(blob, None)
        await self._finish()

    # Following another process's file.

    async def watch(self, look_at: Callable[[PeerTransfer], Deferred[Look]]) -> Step | None:
        """
        Show what another process brings, until there is something to do other than wait; none if there are no readers.

        @param look_at: takes the next look: see L{looks}.
        """
        peer, idle = self._peer, 0.0
        last = peer.record if peer is not None else None
        while peer is not None and (self._followers or not self._attended):
            try:
                look = await look_at(peer)
            except OSError:
                return Step.GO_ALONE
            idle += POLL_SECONDS
            if last is None or (look.record is not None and look.record.is_progress_since(last)):
                last, idle = look.record, 0.0
            step = next_step(look, idle)
            self.received = peer.reach(0)
            if step is not Step.WAIT:
                return step
            if look.moved:
                self._news()
        return None

    def end_beside(self, step: Step | None) -> None:
        """
        End along with another process's transfer, which is verified or has failed for good.
        """
        if step is Step.FAIL:
            raise DigestMismatchError(f"what arrived is not {self.digest}")
        if step is Step.FINISH:
            self.received, self.verified = self.size or 0, True
            self._news()

    def continue_in(self, writer: Writer) -> None:
        """
        Continue in the file of another process that has exited. Bytes that readers could see stay visible.
        """
        self._file = self._writer = writer
        self._peer, self._gaps = None, Gaps(writer.gaps)

    async def fetch(self, blob: Blob, lanes: int) -> None:
        """
        Fetch what is missing of a file that was taken over.

        @param lanes: number of connections.
        """
        self._lanes = lanes
        await self._run(blob)

    async def go_alone(self) -> int:
        """
        Continue without the file of another process. Its contiguous bytes from the start are still read from there.

        @return: the offset from which the rest has to be fetched.
        """
        peer, offset = self._peer, 0
        if peer is not None:
            state, end = self.digest.hasher(), peer.reach(0)
            try:
                while offset < end:
                    offset += await self._disk.hashing(peer.hash, state, offset, min(_STEP, end - offset))
            except OSError:  # the disk can't be read: fetch and verify everything
                state, offset = self.digest.hasher(), 0
            self._hash = state
        self._peer, self.unkept = None, Reason.PASSED
        self.received = self._filed = self._window_start = offset
        return offset

    async def run_alone(self, blob: Blob | None) -> None:
        """
        Fetch what is missing, in order, through the window.

        @param blob: none if nothing is missing.
        """
        if blob is not None:
            self._blob, first = blob, blob.first
            if first.start != self.received:
                drop(first)
            await self._stream(blob, first if first.start == self.received else None)
        await self._finish()

    # Filling the file.

    async def _fills(self, blob: Blob) -> bool:
        """
        Return True if the file took everything; if not, continue in the window.
        """
        try:
            await self._fill(blob)
        except _DiskError as problem:
            log.info("{digest} goes on without the cache: {problem}", digest=self.digest, problem=str(problem))
            problem.with_traceback(None)  # its frames, and all that called them, refer back to it
            self._spill()
            return False
        return True

    async def _fill(self, blob: Blob) -> None:
        """
        Fetch what is missing into the file over all lanes at once, while the bytes already there are hashed.

        @raise _DiskError: if the file can't be written.
        """
        problems: list[Failure] = []

        def broke(problem: Failure) -> None:
            problems.append(problem)
            self._end_lanes(problem)

        firsts = [blob.first, *[None] * (self._lanes - 1)]
        works = [self._catch_up(), *(self._lane(blob, first) for first in firsts)]
        # Writes that are running in threads are waited for.
        await DeferredList([Deferred.fromCoroutine(work).addErrback(broke) for work in works])
        if problems:
            raise cast(Exception, problems.pop(0).value)  # so that no local keeps it, nor its frames
        await self._catch_up()

    def _end_lanes(self, problem: Failure) -> None:
        self._lanes_end = True
        self._gaps.give_up()
        for lane in list(self._at_work):
            lane.abort(problem)

    async def _lane(self, blob: Blob, first: Stretch | None) -> None:
        """
        Fetch part after part until none is left: first what readers wait for, then the rest in order.

        @param first: the range requested already. Bytes of it that are on disk are skipped: they may have been hashed.
        """
        if first is not None:
            span = self._gaps.take_from(first.start, self.size or 0 if first.stop is None else first.stop)
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
        water = AHEAD_WATER if self.ahead and first is not None else HIGH_WATER
        inflow = partial(Inflow, self._buffered, water, self._asked_later)
        return Lane(self.digest, blob, start, stop, first, inflow, urgency=urgency)

    def _next_part(self, blob: Blob) -> tuple[int, int, Urgency] | None:
        """
        Take the next part. Once there are readers of parts, readers of the whole take turns with them.
        """
        wishes = {each: wish for each in self._followers if (wish := self._wish(each)) is not None}
        missing = {each: self._gaps.first_missing(*wish) for each, wish in wishes.items()}
        shared = blob.ranged and any(each.partial and at is not None for each, at in missing.items())
        part = self._gaps.take_wished(wishes.values()) if shared else None
        if part is None and (rest := self._gaps.take(self._lanes)) is not None:
            part = (*rest, Urgency.NOBODY)
        for served in [each for each, at in missing.items() if part is not None and at == part[0]]:
            del self._followers[served]
            self._followers[served] = None
        return part

    def _wish(self, follower: Follower) -> Wish | None:
        stop = follower.until if follower.until is not None else self.size
        return Wish(follower.position, stop) if stop is not None else None

    def _hasten(self, follower: Follower) -> None:
        """
        Have a lane give up its part and fetch what C{follower} waits for, unless one is about to fetch it.
        """
        writer, blob = self._writer, self._blob
        if writer is None or blob is None or not blob.ranged or self._lanes_end:
            return
        missing, wish = writer.reach(follower.position), self._wish(follower)
        if wish is None or missing >= wish.stop:
            return
        there = [lane for lane in self._at_work if lane.reached <= missing < (lane.stop or 0)]
        if any(lane.urgency >= wish.urgency or missing - lane.arrived <= SOON for lane in there):
            return
        if not there and missing in self._gaps:
            there = [lane for lane in self._at_work if lane.urgency < wish.urgency]
        if there:
            max(there, key=lambda lane: (-lane.urgency, (lane.stop or 0) - lane.arrived)).cut(self._gaps.give_back)

    async def _catch_up(self) -> None:
        """
        Hash the bytes on disk that could not be hashed as they came, and show them.
        """
        more = True
        while more and not self._lanes_end and (writer := self._writer) is not None:
            if writer.front <= writer.hashed:
                return
            try:
                more = await self._disk.hashing(writer.catch_up)
            except OSError as problem:
                raise _DiskError(problem) from problem
            self._show_hashed(writer)

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
        if writer is None:  # the disk has failed for another lane
            raise CancelledError
        end = offset + sum(map(len, batch))
        if end - offset <= TAIL and writer.size <= PIECE and writer.lacks_only(offset, end):
            await self._complete(writer, offset, b"".join(batch))
            return end
        try:
            await self._disk.writing(writer.write, offset, batch)
        except OSError as problem:
            raise _DiskError(problem.with_traceback(None)) from problem
        self._show_hashed(writer)
        return end

    def _show_hashed(self, writer: Writer) -> None:
        """
        Show the hashed bytes of the file. A verified tail is ahead of them, and stays visible.
        """
        if not self.verified:
            self.received = self._filed = writer.hashed
            self._news()

    async def _complete(self, writer: Writer, offset: int, tail: bytes) -> None:
        """
        Verify the bytes that complete the file, show them from memory, then write and commit the file in one call.
        """
        state, _ = writer.reached
        state.update(tail)
        if state.hexdigest() != self.digest.hex:
            raise DigestMismatchError(f"what arrived is not {self.digest}")
        self._tail, self._filed = tail, offset
        self.received, self.verified = offset + len(tail), True
        self._news()
        unread = not offset and not self._followers
        if unread:  # readers that come in the meantime get everything from memory
            self._file = None
        await self._commit(writer, partial(writer.finish, offset, tail, closes=unread))
        if self._file is not None and self._writer is not None:
            self._tail, self._filed = b"", self.received

    def _spill(self) -> None:
        """
        Continue in the window from the last byte that was written and hashed.
        """
        if self._writer is not None:
            self._hash, self.received = self._writer.reached
            self._filed = self._window_start = self.received
            self._let_claim_go(self._writer.give_up, Why.DISK)
            self._writer = None

    def _let_claim_go(self, let_go: Callable[..., None], *why: Why) -> None:
        """
        Tell other processes at once; this one keeps the file open as long as it is read.
        """
        self._disk.closing(let_go, *why).addErrback(lambda problem: log.failure("Letting a claim go", problem))

    # Through the window.

    @staticmethod
    def _from_the_start(blob: Blob) -> Stretch | None:
        """
        Return the first response if it begins at byte 0; otherwise drop it: it was for a file that can't be continued.
        """
        if blob.first.start == 0:
            return blob.first
        drop(blob.first)
        return None

    async def _stream(self, blob: Blob, first: Stretch | None) -> None:
        """
        Fetch the bytes in order, at the followers' pace.
        """
        inflow = partial(Inflow, self._buffered, WINDOW, self._asked_later)
        lane = Lane(self.digest, blob, self.received, self.size, first, inflow)
        self._at_work.add(lane)
        try:
            await self._room()  # a transfer that was split off begins with a full window
            while batch := await lane.batch():
                await self._disk.digesting(_hash_all, self._hash, batch)
                self._window.extend(batch)
                self._buffered.size += sum(map(len, batch))
                self.received += sum(map(len, batch))
                del batch  # the window alone holds it
                self._news()
                await self._room()
        except Exception:
            lane.abort()
            raise
        finally:
            self._at_work.discard(lane)

    async def _room(self) -> None:
        """
        Wait for the slowest reader.

        @raise CancelledError: if no reader is left.
        """
        start = -1
        while self._is_ahead and self._followers and not self._abandoned:
            if (
                start != self._window_start
            ):  # else a reader has come or left, and the others still wait for the same ones
                start = self._window_start
                self._patience.begin()
            self._wake = Deferred()
            await self._wake
        self._patience.end()
        if self._abandoned or (not self._followers and self.received - self._window_start > WINDOW):
            raise CancelledError("nobody follows, and there is no file to go on for")

    @property
    def _is_ahead(self) -> bool:
        """
        Return True if the window is full: its readers must take some bytes first.

        At the end there is nothing to wait for: a reader of the whole blob gets its last byte after the verification.
        """
        room = 0 if self._buffered.full else WINDOW
        return self.received - self._window_start > room and self.received != self.size

    def _leave_behind(self) -> None:
        """
        Continue without the readers that block the window, if others wait for them.
        """
        start, first = self._window_start, self._window_start + len(self._window[0])
        stuck = [each for each in self._followers if each.needs(start) and each.position < first]
        if len(stuck) == len(self._followers):
            self._patience.begin()
            return
        blob, split_off = self._blob, self.split_off
        resumable = blob is not None and blob.ranged and self.size is not None and split_off is not None
        apart = [each for each in stuck if resumable and each.position >= start]
        said = "A reader of {digest} took nothing for {seconds} s while others waited for it: its response {fate}"
        fate = "goes on apart" if apart else "is aborted"
        log.info(said, digest=self.digest, seconds=STUCK_SECONDS, fate=fate, once=self.digest)
        if apart and split_off is not None:
            split_off(self._split(apart))
        for each in stuck:
            if each not in apart:
                each.leave_behind(Failure(CancelledError("it kept others waiting")))

    def _split(self, readers: Sequence[Follower]) -> Download:
        """
        Create a transfer for C{readers} that continues from this one's window and hash.
        """
        split = Download(
            self.digest,
            self.size,
            None,
            self._disk,
            unkept=self.unkept,
            buffered=self._buffered,
            call_later=self._asked_later,
        )
        split.take_over(self._window, self._window_start, self._hash.copy(), readers)
        for each in readers:
            del self._followers[each]
        self._trim()
        self._stir()
        return split

    def take_over(self, window: Iterable[bytes], start: int, state: _Hash, readers: Iterable[Follower]) -> None:
        """
        Continue for C{readers} of another transfer.

        @param start: the offset of the first byte of C{window}.
        @param state: the hash of all bytes up to the end of C{window}.
        """
        self._window, self._window_start, self._hash = deque(window), start, state
        held = sum(map(len, self._window))
        self.received, self._buffered.size = start + held, self._buffered.size + held
        for reader in readers:
            reader.move(self)
            self._followers[reader] = None

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.callback(None)

    def _trim(self) -> None:
        """
        Drop what every reader has passed from the window.
        """
        if self._backing is not None:
            return
        needed = [follower.position for follower in self._followers if follower.needs(self._window_start)]
        passed = min(needed, default=self.received if self._followers else self._window_start)
        trimmed = False
        while self._window and self._window_start + len(self._window[0]) <= passed:
            passed_by = len(self._window.popleft())
            self._window_start += passed_by
            self._buffered.size -= passed_by
            trimmed = True
        if trimmed:
            self._stir()

    # Ending.

    async def _finish(self) -> None:
        if self.size is not None and self.received != self.size:
            raise ShortBodyError(f"{self.received} bytes of {self.digest} came, {self.size} were announced")
        if self.verified:
            return
        if self._writer is not None:
            self._writer.verify()
        elif self._hash.hexdigest() != self.digest.hex:
            raise DigestMismatchError(f"what arrived is not {self.digest}")
        self.verified = True
        self._news()  # before the commit: readers need not wait for the disk
        if self._writer is not None:
            await self._commit(self._writer, self._writer.commit)

    async def _commit(self, writer: Writer, commit: Callable[[], None]) -> None:
        try:
            while writer.size > PIECE and await self._disk.committing(writer.flush, PIECE):
                pass
            await self._disk.committing(commit)
        except OSError as problem:
            log.info("Not kept: {digest}: {problem}", digest=self.digest, problem=str(problem), once=str(problem.errno))
            self._writer = None
            if self._file is None:
                self._let_claim_go(writer.discard)

    def _fail(self, failure: Failure) -> None:
        # The bytes are worth keeping, unless the disk or the bytes are to blame, or the cause is unknown.
        worth = failure.check(RegistryError, ShortBodyError, UnattendedError)
        self._leaves = self._writer is not None and worth is not None
        if self._writer is not None:
            wrong = failure.check(DigestMismatchError) is not None
            give_up = partial(self._writer.give_up, Why.DIGEST if wrong else Why.DISK)
            self._let_claim_go(self._writer.release if self._leaves else give_up)
        self._failed_filing = self._backing is not None
        self.failure, self._writer, self._peer = failure, None, None
        foreseen = worth or failure.check(DigestMismatchError, CancelledError)
        why = str(failure.value) if foreseen else failure.getTraceback()
        if failure.check(UnattendedError):
            log.info("The transfer of {digest} stops: {problem}", digest=self.digest, problem=why)
        else:
            log.warn("The transfer of {digest} failed: {problem}", digest=self.digest, problem=why)
        if failure.check(DigestMismatchError) and self._parts_sent:
            said = "{count} partial responses had bytes of {digest} that may be wrong: clients that verify ask again"
            log.warn(said, count=self._parts_sent, digest=self.digest)
        failure.cleanFailure()  # the failure is kept; without this, so would its frames and all callers' be
        self._news()

    # Serving followers.

    def _news(self) -> None:
        for follower in list(self._followers):
            follower.news()
        self._trim()

    def reach(self, offset: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{offset}.
        """
        backing = self._backing
        return max(self.received, backing.reach(offset)) if backing is not None else self.received

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.
        """
        if self._tail and offset >= self._filed:
            return self._tail[offset - self._filed : offset - self._filed + count]
        growing = self._backing is not None and not self._tail
        if self._file is not None and (growing or offset < self._filed):
            return self._file.fileno(), offset, count if growing else min(count, self._filed - offset)
        at = self._window_start
        for part in self._window:
            if at <= offset < at + len(part):
                return part[offset - at : offset - at + count]
            at += len(part)
        raise LookupError(f"byte {offset} of {self.digest} has passed")

    def progressed(self) -> None:
        """
        Record that a reader has advanced.
        """
        if self._backing is None:
            self._trim()

    def left(self, follower: Follower) -> None:
        """
        Record that a reader is done or gone.
        """
        self._followers.pop(follower, None)
        self._parts_sent += follower.partial and follower.done
        if self._backing is None and not self.verified:
            self._trim()
            if not self._followers:
                self._abandon()
            self._stir()
        self._close_if_idle()
        if not self._followers:
            self.attendance()

    def _abandon(self) -> None:
        """
        End a transfer that has neither a file nor readers.
        """
        self._abandoned = True
        problem = Failure(CancelledError("nobody follows, and there is no file to go on for"))
        for lane in list(self._at_work):
            lane.abort(problem)

    def _close_if_idle(self) -> None:
        """
        Release file and window once the transfer has ended and has no readers.
        """
        if self._running or self._followers:
            return
        self._buffered.size -= sum(map(len, self._window))
        self._window.clear()
        self._tail = b""
        file, self._file, followed, self._followed = self._file, None, self._followed, None
        if followed is not None:
            self._let_claim_go(followed.close)
        if isinstance(file, Writer):
            self._let_claim_go(file.leave if self._leaves else file.discard if self._writer is None else file.close)


_STEP: Final = 4 * 2**20
"""Bytes of another process's file to hash per thread call."""


def _never(*_: object) -> None:
    """
    Do nothing: stands in for a reactor's C{callLater}.
    """


def _hash_all(state: Any, batch: Sequence[bytes]) -> None:  # noqa: ANN401 (hashlib's objects have no public type)
    for data in batch:
        state.update(data)
