"""
One upstream transfer, any number of readers following it.

Rules:

- A L{Download} runs on its own. No reader starts it, and none that leaves ends it.
- Bytes become visible to readers once they are written and hashed, in order. So long as the digest
  isn't proved, every reader is kept from the last byte of its range: no answer can look complete
  before its bytes are known to be right.
- On disk, the file is the buffer: any reader may be at any place of it, and a slow one slows nobody.
- Off disk (the blob is larger than the cache, the disk is full or fails midway), a window of
  C{WINDOW} bytes is the buffer: the transfer waits for the slowest reader, and ends with the last.
  What had reached the file before the disk failed is still read from there.
- Memory: the bytes on their way into the file (C{HIGH_WATER}) or the window, whatever the blob's size
  and however many follow it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.store import DigestMismatchError, Writer

if TYPE_CHECKING:
    from ecrproxy.oci import Digest
    from ecrproxy.store import Content

log = Logger()
T = TypeVar("T")

HIGH_WATER: Final = 4 * 2**20
"""Bytes that may wait for the disk before the transfer is paused: some 20 ms of a fast network."""
LOW_WATER: Final = 2**20
WINDOW: Final = 2**20
"""Bytes held for readers of a transfer that has no file."""

FilePiece = tuple[int, int, int]
"""File descriptor, offset, count."""


class InThread(Protocol):
    """
    Call a blocking function in a thread.
    """

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)}; fires with its result.
        """


class Transfer(Protocol):
    """
    The upstream's side of a transfer: what a L{Download} may ask of it.
    """

    def pause(self) -> None:
        """Send nothing for now."""

    def resume(self) -> None:
        """Go on."""

    def abort(self) -> None:
        """Send nothing more, ever."""


class ShortBodyError(Exception):
    """
    The transfer ended with more or fewer bytes than it had announced.
    """


class Flights(Generic[T]):
    """
    At most one fetch in the air for a key; whoever asks meanwhile waits for it.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Deferred[T]]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._waiting

    def join(self, key: Hashable, fetch: Callable[[], Coroutine[Any, Any, T]]) -> Deferred[T]:
        """
        Wait for the flight of C{key}, begun with C{fetch} if none is in the air.

        Cancelling what this returns ends that waiting alone.
        """
        flying, waiting = key in self._waiting, self._waiting.setdefault(key, [])
        waiter: Deferred[T] = Deferred(waiting.remove)
        waiting.append(waiter)
        if not flying:  # nothing is awaited between looking and registering
            Deferred.fromCoroutine(fetch()).addBoth(self._land, key)
        return waiter

    def _land(self, result: T | Failure, key: Hashable) -> None:
        waiting = self._waiting.pop(key)
        if not waiting and isinstance(result, Failure):
            log.debug("Nobody waited any more for {key}: {problem}", key=key, problem=result.value)
        for waiter in list(waiting):
            if not waiter.called:  # one who came before may have cancelled it just now
                waiter.callback(result)


class Download:
    """
    One transfer of the blob C{digest}.

    @param size: its length in bytes as announced, if it was.
    @param writer: where it is kept; none to keep a window alone.
    @ivar received: how many bytes are readable, from the first on.
    @ivar verified: whether all of them are there and are what the digest names.
    @ivar failure: why there will be no more of them.
    """

    def __init__(self, digest: Digest, size: int | None, writer: Writer | None, in_thread: InThread) -> None:
        self.digest, self.size = digest, size
        self.received, self.verified = 0, False
        self.failure: Failure | None = None
        self._in_thread = in_thread
        self._file, self._writer = writer, writer
        self._filed = 0
        self._hash = writer.hash() if writer else digest.hasher()
        self._window: deque[bytes] = deque()
        self._window_start = 0
        self._pending: list[bytes] = []
        self._pending_size, self._paused, self._ended = 0, False, False
        self._transfer: Transfer | None = None
        self._wake: Deferred[None] | None = None
        self._followers: set[Follower] = set()
        self._abandoned = False
        self._running = True

    @property
    def kept(self) -> bool:
        """
        Tell whether the bytes go to the cache.
        """
        return self._writer is not None

    def offers(self, start: int) -> bool:
        """
        Tell whether a reader can still begin at C{start}.
        """
        if self._writer is not None or self.verified:
            return self._file is not None
        if self._abandoned or self.failure is not None:
            return False
        return start >= self._window_start or (start < self._filed and self._window_start == self._filed)

    def follow(self, start: int, stop: int | None) -> Follower:
        """
        Read from C{start} up to, not including, C{stop}, as the bytes come.

        @param stop: none for all, where the size is not known.
        """
        follower = Follower(self, start, stop)
        self._followers.add(follower)
        return follower

    async def run(self, transfer: Transfer) -> None:
        """
        Take the transfer to its end, good or bad. Never raises: those who follow are told.
        """
        self._transfer = transfer
        try:
            while batch := await self._next_batch():
                await self._keep(batch)
                self._news()
            await self._finish()
        except Exception as problem:  # noqa: BLE001 (whatever it is, those who follow must be told)
            self._fail(Failure(problem))
        finally:
            self._running = False
            self._close_if_idle()

    # What the upstream says; see upstream.Sink.

    def arrived(self, data: bytes) -> None:
        """
        Take bytes from the transfer.
        """
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size > HIGH_WATER and not self._paused and self._transfer:
            self._paused = True
            self._transfer.pause()
        self._stir()

    def ended(self, problem: Failure | None) -> None:
        """
        Note the transfer's end, C{problem} if it is not a good one.
        """
        self._ended = True
        self.failure = self.failure or problem
        self._stir()

    # Inside.

    async def _next_batch(self) -> list[bytes]:
        while self._window_full() or not (self._pending or self._ended):
            if self._abandoned or (self._window_full() and not self._followers):
                raise CancelledError("nobody follows, and there is no file to go on for")
            self._wake = Deferred()
            await self._wake
        batch, self._pending, self._pending_size = self._pending, [], 0
        if self._paused and self._transfer:
            self._paused = False
            self._transfer.resume()
        return batch

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.callback(None)

    async def _keep(self, batch: Sequence[bytes]) -> None:
        if self._writer is not None:
            writer = self._writer
            try:
                await self._in_thread(writer.write, batch)
            except OSError as problem:
                log.error("Can't write to the cache, going on without it: {problem}", problem=problem)
                batch = self._spill(writer, batch)
            else:
                self.received = self._filed = writer.written
                return
        await self._in_thread(_hash_all, self._hash, batch)
        self._window.extend(batch)
        self.received += sum(map(len, batch))

    def _spill(self, writer: Writer, batch: Sequence[bytes]) -> Sequence[bytes]:
        """
        Go on in the window from what the file took; returns what it didn't of C{batch}.
        """
        done = writer.written - self._filed
        self.received = self._filed = self._window_start = writer.written
        self._hash, self._writer = writer.hash(), None
        return [b"".join(batch)[done:]]

    def _window_full(self) -> bool:
        return self._writer is None and self.received - self._window_start > WINDOW

    async def _finish(self) -> None:
        if self.failure is not None:
            self.failure.raiseException()
        if self.size is not None and self.received != self.size:
            raise ShortBodyError(f"{self.received} bytes of {self.digest} came, {self.size} were announced")
        if self._writer is None:
            if self._hash.hexdigest() != self.digest.hex:
                raise DigestMismatchError(f"what arrived is not {self.digest}")
        else:
            self._writer.verify()
        self.verified = True
        self._news()  # before the disk has it for good: readers need not wait for that
        if self._writer is not None:
            try:
                await self._in_thread(self._writer.commit)
            except OSError as problem:
                log.error("Can't keep {digest} in the cache: {problem}", digest=self.digest, problem=problem)
                self._writer = None

    def _fail(self, failure: Failure) -> None:
        self.failure, self._writer = failure, None
        log.warn("The transfer of {digest} failed: {problem}", digest=self.digest, problem=failure.value)
        if self._transfer is not None and not self._ended:
            self._transfer.abort()
        self._news()

    def _news(self) -> None:
        for follower in list(self._followers):
            follower.news()
        self._trim()

    def _trim(self) -> None:
        """
        Drop of the window what every reader has passed.
        """
        if self._writer is not None:
            return
        passed = min((follower.position for follower in self._followers), default=self._window_start)
        trimmed = False
        while self._window and self._window_start + len(self._window[0]) <= passed:
            self._window_start += len(self._window.popleft())
            trimmed = True
        if trimmed:
            self._stir()

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Point at up to C{count} received bytes from C{offset} on.
        """
        if self._file is not None and offset < self._filed:
            return self._file.fileno(), offset, min(count, self._filed - offset)
        at = self._window_start
        for part in self._window:
            if offset < at + len(part):
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
        if self._writer is None:
            self._trim()
            self._abandoned = not self._followers
            self._stir()
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        """
        Let go of the file when nothing is written to it and nobody reads it any more.
        """
        if self._running or self._followers or self._file is None:
            return
        if self._writer is None:
            self._file.discard()
        self._file.close()
        self._file = None


def _hash_all(state: Any, batch: Sequence[bytes]) -> None:  # noqa: ANN401 (hashlib's objects have no public type)
    for data in batch:
        state.update(data)


class Follower:
    """
    One reader of a L{Download}: a source of bytes for C{sending}.

    @ivar position: the offset of the next byte that it will read.
    """

    def __init__(self, download: Download, start: int, stop: int | None) -> None:
        self._download, self.position, self._stop = download, start, stop
        self._on_news: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """
        Tell whether all was read, and is right.
        """
        download = self._download
        return download.verified and self.position >= (download.received if self._stop is None else self._stop)

    @property
    def failure(self) -> Failure | None:
        """
        Tell why it can't go on, if it can't.
        """
        return self._download.failure

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Point at up to C{limit} bytes that may be sent now; none if more must arrive, or be proved, first.
        """
        reach = self._download.received
        if self._stop is not None:
            reach = min(reach, self._stop if self._download.verified else self._stop - 1)
        count = min(limit, reach - self.position)
        return self._download.piece(self.position, count) if count > 0 else None

    def sent(self, count: int) -> None:
        """
        Note that C{count} bytes more were read.
        """
        self.position += count
        self._download.progressed()

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} whenever there may be more, an end or a failure.
        """
        self._on_news = news

    def news(self) -> None:
        """
        Pass the word on.
        """
        self._on_news()

    def close(self) -> None:
        """
        Read no more.
        """
        self._on_news = lambda: None
        self._download.left(self)


class Shelved:
    """
    A range of a finished file: a source of bytes for C{sending}.
    """

    failure: Failure | None = None

    def __init__(self, content: Content, start: int, stop: int) -> None:
        self._content, self.position, self._stop = content, start, stop

    @property
    def done(self) -> bool:
        """
        Tell whether all was read.
        """
        return self.position >= self._stop

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Point at up to C{limit} bytes.
        """
        return self._content.fileno(), self.position, min(limit, self._stop - self.position)

    def sent(self, count: int) -> None:
        """
        Note that C{count} bytes more were read.
        """
        self.position += count

    def listen(self, news: Callable[[], None]) -> None:
        """
        There will be no news of a finished file.
        """

    def close(self) -> None:
        """
        Let go of the file.
        """
        self._content.close()
