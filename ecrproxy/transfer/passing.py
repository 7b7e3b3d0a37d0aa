"""
Passes ranges of a blob that is not cached from the bucket to a single client.

They are not verified here: that takes the whole blob, and clients that request ranges verify them themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.byte_ranges import Span
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import on_its_own
from ecrproxy.transfer.inflow import Blob, Buffered, Inflow
from ecrproxy.transfer.lane import Lane, drop

if TYPE_CHECKING:
    from ecrproxy.oci import Digest
    from ecrproxy.reasons import Reason

log = Logger()

HELD: Final = 2**20
"""Bytes that may wait for a client before its connection to the bucket is paused."""


class Passing:
    """
    A blob that is not kept, of which a client reads one or more parts.

    @param questions: the ranges to request from the bucket, in order; see L{byte_ranges.questions}.
    @ivar unkept: why it is not kept.
    """

    def __init__(
        self, digest: Digest, blob: Blob, unkept: Reason, buffered: Buffered, questions: Sequence[Span]
    ) -> None:
        self.digest, self.size, self.unkept = digest, blob.size, unkept
        self._blob, self._buffered, self._questions = blob, buffered, deque(questions)
        self._asked: Blob | None = blob
        self._stream: Stream | None = None

    @property
    def is_let_go(self) -> bool:
        """
        Return True if the first response was discarded before any of it was read.
        """
        return self._asked is None and self._stream is None

    def follow(self, start: int, stop: int, waiting: Stopwatch) -> Passage:
        """
        Read the bytes from C{start} to C{stop}: the parts of C{questions}, one after the other, each to its end.
        """
        stream = self._stream
        if stream is None or not stream.has(start, stop):
            if stream is not None:
                stream.close()
            stream = self._stream = self._open(start, stop)
        stream.skip_to(start)
        return Passage(stream, stop, waiting)

    def _open(self, start: int, stop: int) -> Stream:
        first, last = self._questions.popleft()
        while not first <= start < stop <= last:  # another request brought it, if the bucket serves no ranges
            first, last = self._questions.popleft()
        end = last
        for following in self._questions:
            if following[0] < end:
                break
            end = following[1]
        asked = self._blob.first if self._asked is not None and self._blob.first.start == first else None
        if asked is not None:
            self._asked = None
        self.let_go()
        inflow = partial(Inflow, self._buffered, HELD)
        return Stream(Lane(self.digest, self._blob, first, last, asked, inflow, reads_on=end))

    def let_go(self) -> None:
        """
        Discard the range that was requested first, unless it is being read.
        """
        asked, self._asked = self._asked, None
        if asked is not None:
            drop(asked.first)

    # The client may leave while the request is made: then nothing else calls let_go.
    __del__ = let_go


class Stream:
    """
    The response to one request to the bucket, on its way to the client.

    @ivar position: the offset of the next byte.
    @ivar reader: the part that is being read.
    @ivar failure: why the stream failed, if it did.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane, self.position, self._wanted = lane, lane.reached, lane.reached
        self._pieces: deque[bytes] = deque()
        self._used = 0
        self.reader: Passage | None = None
        self._closed = False
        self._wake: Deferred[None] | None = None
        self.on_news: Callable[[], None] = lambda: None
        self.failure: Failure | None = None
        on_its_own(self._run())

    async def _run(self) -> None:
        try:
            while batch := await self._lane.batch():
                self._pieces.extend(batch)
                del batch
                self._skip()
                if self._pieces:
                    self.on_news()
                while self._pieces:
                    self._wake = Deferred()
                    await self._wake
        except Exception as problem:  # noqa: BLE001 (whatever it is, the client must be told)
            if self._closed:
                return
            self.failure = Failure(problem)
            log.warn("A part of {digest} failed: {problem}", digest=self._lane.digest, problem=str(problem))
            self.failure.cleanFailure()
            self.on_news()

    def has(self, start: int, stop: int) -> bool:
        """
        Return True if the bytes from C{start} to C{stop} are still to come.
        """
        return self.position <= start and stop <= (self._lane.stop or 0)

    def skip_to(self, start: int) -> None:
        """
        Drop all bytes before C{start}, including those that have yet to come.
        """
        self.on_news, self._wanted = lambda: None, start
        self._skip()
        self._stir()

    def _skip(self) -> None:
        while self._pieces and self.position < self._wanted:
            self._drop(min(len(self._pieces[0]) - self._used, self._wanted - self.position))

    def piece(self, limit: int) -> bytes | None:
        """
        Return the next bytes; none if they have not arrived yet.
        """
        return self._pieces[0][self._used : self._used + limit] if self._pieces else None

    def sent(self, count: int) -> None:
        """
        Drop C{count} bytes that were sent.
        """
        self._drop(count)
        self._stir()

    def _drop(self, count: int) -> None:
        self.position += count
        self._used += count
        if self._used == len(self._pieces[0]):
            self._pieces.popleft()
            self._used = 0

    def _stir(self) -> None:
        """
        Read on when nothing is left.
        """
        if not self._pieces:
            wake, self._wake = self._wake, None
            if wake is not None:
                wake.callback(None)

    def close(self) -> None:
        """
        Abort the request.
        """
        self.on_news, self._closed = lambda: None, True
        self._pieces.clear()
        self._lane.abort(Failure(CancelledError("the client has gone")))


class Passage:
    """
    One part on its way: a source of bytes for C{sending}. The next part may come over the same stream.
    """

    def __init__(self, stream: Stream, stop: int, waiting: Stopwatch) -> None:
        self._stream, self._stop, self._waiting = stream, stop, waiting
        stream.reader = self

    @property
    def done(self) -> bool:
        """
        Return True if all bytes of this part have been sent.
        """
        return self._stream.position >= self._stop

    @property
    def failure(self) -> Failure | None:
        """
        Return why the stream failed; None if it has not.
        """
        return self._stream.failure

    def piece(self, limit: int) -> bytes | None:
        """
        Return the next bytes; none if they have not arrived yet.
        """
        piece = self._stream.piece(min(limit, self._stop - self._stream.position))
        if piece is None:
            self._waiting.start()
        else:
            self._waiting.stop()
        return piece

    def sent(self, count: int) -> None:
        """
        Drop C{count} bytes that were sent.
        """
        self._stream.sent(count)

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when there may be more.
        """
        self._stream.on_news = news

    def close(self) -> None:
        """
        Abort the request, unless the next part is being read already.
        """
        self._waiting.stop()
        if self._stream.reader is self:
            self._stream.close()
