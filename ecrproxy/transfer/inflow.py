"""
The connections that bring a blob: their interface, how many there are, and back-pressure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from ecrproxy.transfer.gaps import SMALLEST_PART, SPLIT

HIGH_WATER: Final = 4 * 2**20
"""Bytes of a lane that may wait for the disk before the lane is paused: about 20 ms of a fast network."""
AHEAD_WATER: Final = 2**20
"""C{HIGH_WATER} of a lane whose bytes no client waits for: a slow disk holds few of them."""
GATHERED: Final = 2**20
"""Bytes to gather before they are handed out: each batch costs thread switches and wakes every follower."""
GATHER_SECONDS: Final = 0.01
"""Maximum time, in seconds, to gather bytes."""
BUFFERED: Final = 64 * 2**20
"""Bytes that all transfers together may hold in memory before each connection is paused at its first byte."""


class InboundConnection(Protocol):
    """
    A connection that sends bytes.
    """

    def pause(self) -> None:
        """Stop sending for now."""

    def resume(self) -> None:
        """Resume sending."""

    def abort(self) -> None:
        """Stop sending for good."""


class Stretch(Protocol):
    """
    A range of a blob that has been requested.
    """

    @property
    def start(self) -> int:
        """Return the offset of the first byte."""

    @property
    def stop(self) -> int | None:
        """Return the offset after the last byte, if it is known."""

    def deliver(self, sink: Inflow) -> InboundConnection:
        """Start the delivery."""


class Blob(Protocol):
    """
    The upstream source of a blob.
    """

    @property
    def size(self) -> int | None:
        """Return the size in bytes, if upstream announced it."""

    @property
    def first(self) -> Stretch:
        """Return the range that has been requested already."""

    @property
    def ranged(self) -> bool:
        """Return True if upstream serves ranges."""

    @property
    def sources(self) -> int:
        """Return how many sources may have the blob."""

    async def open(self, start: int, stop: int | None, breaks: int = 0) -> Stretch:
        """Request another range, after C{breaks} requests in a row that brought nothing, or almost nothing."""

    def look_again(self) -> None:
        """Also ask the sources that were added since, if the current one is slow to answer."""


class Buffered:
    """
    Counts the bytes that all transfers hold in memory, waiting for the disk or for clients.
    """

    def __init__(self, most: int = BUFFERED) -> None:
        self.most, self.size = most, 0

    @property
    def full(self) -> bool:
        """
        Return True if transfers should stop accepting bytes.
        """
        return self.size > self.most

    @property
    def has_plenty(self) -> bool:
        """
        Return True if less than half of the limit is used.
        """
        return 2 * self.size < self.most


class Lanes:
    """
    The limits on connections to buckets, in total and per blob.

    @param buffered: maximum number of bytes held in memory.
    @ivar buffered: counts the bytes that arrived over these connections and are held in memory.
    """

    def __init__(self, each: int = 4, together: int = 64, buffered: int = BUFFERED) -> None:
        self._each, self._free, self._together = each, together, together
        self.buffered = Buffered(buffered)

    def first_part(self, expected: int | None) -> int | None:
        """
        Return how many bytes of a blob to request first; none to request all, if one lane is enough.

        @param expected: the blob's size in bytes, if it is known.
        """
        return None if self._each == 1 or (expected is not None and expected < SPLIT) else SMALLEST_PART

    def has_plenty(self, size: int, coming: int) -> bool:
        """
        Return True if a blob of C{size} bytes that no client waits for would leave half of the connections free.

        @param coming: number of other such blobs that are about to take a connection.
        """
        lanes = 1 if size < SPLIT else self._each
        return 2 * (self._free - lanes - coming) >= self._together and self.buffered.has_plenty

    def take(self, size: int) -> int:
        """
        Take lanes for a blob of C{size} bytes: always one, more while some are free.
        """
        taken = 1 if size < SPLIT else max(1, min(self._each, self._free))
        self._free -= taken
        return taken

    def give_back(self, lanes: int) -> None:
        """
        Return lanes to the pool.
        """
        self._free += lanes


class Inflow:
    """
    Bytes received from one connection, which is paused while too many wait.

    @param buffered: counts the bytes of all connections together.
    @param high_water: bytes that may wait before this connection is paused.
    @param call_later: a reactor's, to gather bytes for a moment; none to hand out bytes as they come.
    """

    def __init__(
        self, buffered: Buffered, high_water: int = HIGH_WATER, call_later: Callable[..., Any] | None = None
    ) -> None:
        self._buffered, self._high_water, self._call_later = buffered, high_water, call_later
        self._wanted = 1
        self._pending: list[bytes] = []
        self.waiting, self._in_use = 0, 0
        self._paused, self._over = False, False
        self._problem: Failure | None = None
        self._transfer: InboundConnection | None = None
        self._wake: Deferred[None] | None = None

    def begin(self, stretch: Stretch) -> None:
        """
        Start the delivery of C{stretch}.
        """
        self._transfer = stretch.deliver(self)

    def arrived(self, data: bytes) -> None:
        """
        Accept bytes from the connection. Bytes that arrive after its end are dropped.
        """
        if self._over:
            return
        self._pending.append(data)
        self.waiting += len(data)
        self._buffered.size += len(data)
        too_many = self.waiting > self._high_water or self._buffered.full
        if too_many and not self._paused and self._transfer is not None:
            self._paused = True
            self._transfer.pause()
        self._stir()

    def ended(self, problem: Failure | None) -> None:
        """
        Record the connection's end, with C{problem} if it failed.
        """
        self._over, self._problem = True, self._problem or problem
        self._stir()

    def refuse(self) -> None:
        """
        Close the connection; waiting bytes are still handed out.
        """
        if not self._over:
            self.ended(None)
            if self._transfer is not None:
                self._transfer.abort()

    def abort(self, problem: Failure | None = None) -> None:
        """
        Close the connection; waiting bytes are dropped.
        """
        self._buffered.size -= self.waiting + self._in_use
        self._pending, self.waiting, self._in_use = [], 0, 0
        if not self._over:
            self.ended(problem)
            if self._transfer is not None:
                self._transfer.abort()

    async def batch(self, worth: int = 1) -> list[bytes]:
        """
        Wait for bytes; an empty list is the end. Calling again releases the last batch.

        @param worth: bytes to gather once some have arrived, for at most C{GATHER_SECONDS}; fewer if the buffers allow
            no more.
        @raise Exception: if the connection broke; all bytes from before were handed out.
        """
        self._buffered.size -= self._in_use
        self._in_use = 0
        if self._paused and not self._pending and not self._over and self._transfer is not None:
            self._paused = False  # the bytes taken before are written now
            self._transfer.resume()
        worth = min(worth, self._high_water // 4)
        await self._until_there_are(1)
        if self.waiting < worth and not (self._over or self._paused) and self._call_later is not None:
            enough = self._call_later(GATHER_SECONDS, self._want, 1)
            await self._until_there_are(worth)
            if enough.active():
                enough.cancel()
        if self._pending:
            batch, self._pending = self._pending, []
            self._in_use, self.waiting = self.waiting, 0
            return batch
        if self._problem is not None:
            self._problem.raiseException()
        return []

    async def _until_there_are(self, count: int) -> None:
        self._want(count)
        if not self._suffices:
            self._wake = Deferred()
            await self._wake

    def _want(self, count: int) -> None:
        self._wanted = count
        self._stir()

    @property
    def _suffices(self) -> bool:
        """
        Return True if there is nothing to wait for: a paused connection brings nothing.
        """
        return self.waiting >= self._wanted or self._over or (self._paused and bool(self._pending))

    def _stir(self) -> None:
        if self._suffices:
            wake, self._wake = self._wake, None
            if wake is not None:
                wake.callback(None)
