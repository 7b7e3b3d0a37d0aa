"""
Move the bytes of a source, finished or still arriving, to a client at the client's own pace.

Rules:

- A push producer: it sends until the transport says pause, and again from resume on. Caught up with a
  source that still grows it sends nothing, and costs nothing, until the source has news.
- Files are read in threads and in large pieces; one piece at most is held in memory for a client.
- A source that fails, or a file that turns out shorter than it was, aborts the connection: a response that
  is cut must never look whole.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from ecrproxy.download import FilePiece, InThread

PIECE: Final = 2**20
"""Bytes read and written at once: larger gains nothing, smaller costs processor time."""


class Source(Protocol):
    """
    Bytes to send, in order.
    """

    @property
    def done(self) -> bool:
        """Tell whether all was sent."""

    @property
    def failure(self) -> Failure | None:
        """Tell why no more can be sent."""

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """Point at the next bytes, at most so many; none if there are none yet."""

    def sent(self, count: int) -> None:
        """Note that so many were sent."""

    def listen(self, news: Callable[[], None]) -> None:
        """Call C{news} when there may be more."""

    def close(self) -> None:
        """Let go."""


class CutShortError(Exception):
    """
    A file has fewer bytes than it had when the response began.
    """


class Held:
    """
    Bytes in memory, as a source.
    """

    failure: Failure | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def done(self) -> bool:
        """
        Tell whether all was sent.
        """
        return not self._data

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Give the next bytes.
        """
        return self._data[:limit]

    def sent(self, count: int) -> None:
        """
        Drop what was sent.
        """
        self._data = self._data[count:]

    def listen(self, news: Callable[[], None]) -> None:
        """
        There will be no news of these bytes.
        """

    def close(self) -> None:
        """
        There is nothing to let go.
        """


@implementer(IPushProducer)
class Sending:
    """
    One response body on its way to a client.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread) -> None:
        self._request, self._source, self._in_thread = request, source, in_thread
        self._paused = self._reading = self._over = False
        self._ended: Deferred[None] = Deferred(lambda _: self._end(None))

    def start(self) -> Deferred[None]:
        """
        Send it.

        @return: fires when all was handed to the transport, fails if it never will be. Cancelling it ends the sending.
        """
        self._source.listen(self._go)
        self._request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)
        self._go()
        return self._ended

    def pauseProducing(self) -> None:
        """
        Wait: the client takes no more for now.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Go on.
        """
        self._paused = False
        self._go()

    def stopProducing(self) -> None:
        """
        End: the client has gone.
        """
        self._end(Failure(ConnectionDone()))

    def _go(self) -> None:
        while not (self._paused or self._reading or self._over):
            if self._source.failure is not None:
                self._end(self._source.failure)
            elif self._source.done:
                self._end(None)
            else:
                piece = self._source.piece(PIECE)
                if piece is None:
                    return
                if isinstance(piece, bytes):
                    self._write(piece)
                else:
                    self._read(piece)

    def _read(self, piece: FilePiece) -> None:
        fd, offset, count = piece
        self._reading = True
        reading = self._in_thread(os.pread, fd, count, offset)
        reading.addCallbacks(self._have_read, self._failed).addErrback(self._failed)

    def _have_read(self, data: bytes) -> None:
        self._reading = False
        if self._over:
            self._source.close()
            return
        if not data:
            raise CutShortError("the file was cut while it was being sent")
        self._write(data)
        self._go()

    def _failed(self, failure: Failure) -> None:
        self._reading = False
        if self._over:
            self._source.close()
        self._end(failure)

    def _write(self, data: bytes) -> None:
        self._source.sent(len(data))
        self._request.write(data)

    def _end(self, failure: Failure | None) -> None:
        if self._over:
            return
        self._over = True
        if not self._reading:  # a thread that still reads must find its descriptor open
            self._source.close()
        if self._request.channel is not None:  # else the client has gone, and the request with it
            self._request.unregisterProducer()
        if not self._ended.called:
            if failure is None:
                self._ended.callback(None)
            else:
                self._ended.errback(failure)
