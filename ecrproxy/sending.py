"""
Move the bytes of a source, finished or still arriving, to a client at the client's own pace.

Rules:

- To a plain socket the kernel moves the bytes; they never come into Python. Elsewhere they pass in large
  pieces that are read in threads; one piece at most is held in memory for a client.
- It sends when the client can take more, and only then. Caught up with a source that still grows it
  sends nothing, and costs nothing, until the source has news.
- A source that fails, or a file that turns out shorter than it was, aborts the connection: a response that
  is cut must never look whole.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from ecrproxy.download import FilePiece, InThread

PIECE: Final = 2**20
"""Bytes moved at once: larger gains nothing, smaller costs processor time."""
READ_AHEAD: Final = 8 * 2**20
"""Bytes that the kernel is told of before they are sent."""

_CUT = "the file was cut while it was being sent"


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


def send(request: Request, source: Source, in_thread: InThread) -> Deferred[None]:
    """
    Send C{source} as the rest of the response, whose headers have a length or are still to be written.

    @return: fires when all was handed to the transport, fails if it never will be. Cancelling it ends the sending.
    """
    transport = request.channel.transport
    if isinstance(transport, Connection) and not transport.TLS and request.startedWriting and not request.chunked:
        return KernelSending(request, source, transport).start()
    return PieceSending(request, source, in_thread).start()


class Sending:
    """
    One response body on its way to a client.
    """

    def __init__(self, request: Request, source: Source) -> None:
        self._request, self._source = request, source
        self._over = False
        self._ended: Deferred[None] = Deferred(lambda _: self._end(Failure(ConnectionDone())))

    def stopProducing(self) -> None:
        """
        End: the client has gone.
        """
        self._end(Failure(ConnectionDone()))

    def _end(self, failure: Failure | None) -> None:
        if self._over:
            return
        self._over = True
        self._leave()
        if not self._ended.called:
            if failure is None:
                self._ended.callback(None)
            else:
                self._ended.errback(failure)

    def _leave(self) -> None:
        """
        Give back what was taken.
        """
        raise NotImplementedError


@implementer(IPushProducer)
class PieceSending(Sending):
    """
    Send by way of memory, a piece at a time: over TLS, and whatever else is no plain socket.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread) -> None:
        super().__init__(request, source)
        self._in_thread = in_thread
        self._paused = self._reading = False

    def start(self) -> Deferred[None]:
        """
        Send it.
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
            raise CutShortError(_CUT)
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

    def _leave(self) -> None:
        if not self._reading:  # a thread that still reads must find its descriptor open
            self._source.close()
        if self._request.channel is not None:  # else the client has gone, and the request with it
            self._request.unregisterProducer()


@implementer(IPullProducer)
class KernelSending(Sending):
    """
    Have the kernel move the bytes from file to socket: sendfile(2).

    In the transport's own producer slot, which HTTPChannel holds otherwise, a pull producer is called exactly when
    what was written before has left: the headers, at first. There it sends what the socket takes and asks for
    the next turn with C{startWriting}; caught up with a source that grows, it asks for none.
    """

    def __init__(self, request: Request, source: Source, transport: Connection) -> None:
        super().__init__(request, source)
        self._transport, self._channel = transport, request.channel
        self._advised = 0
        self._begun = False

    def start(self) -> Deferred[None]:
        """
        Send it.
        """
        self._source.listen(self._more)
        self._transport.unregisterProducer()
        self._transport.registerProducer(self, False)  # noqa: FBT003 (Twisted's signature)
        self._begun = True  # the call made at registration comes before the headers have left
        self._more()
        return self._ended

    def resumeProducing(self) -> None:
        """
        Send what the socket takes.
        """
        if self._over or not self._begun:
            return
        try:
            self._turn()
        except BlockingIOError:
            self._transport.startWriting()
        except (OSError, CutShortError):
            self._end(Failure())

    def _more(self) -> None:
        if not self._over:
            self._transport.startWriting()

    def _turn(self) -> None:
        if self._source.failure is not None:
            self._end(self._source.failure)
        elif self._source.done:
            self._end(None)
        elif (piece := self._source.piece(PIECE)) is not None:
            self._sent(
                self._transport.write(piece) or len(piece) if isinstance(piece, bytes) else self._sendfile(piece)
            )
            self._transport.startWriting()

    def _sendfile(self, piece: FilePiece) -> int:
        fd, offset, count = piece
        if offset + count > self._advised:
            # sendfile waits for a disk that is cold: what comes next is read in advance, without waiting.
            self._advised = max(self._advised, offset) + READ_AHEAD
            os.posix_fadvise(fd, offset, READ_AHEAD, os.POSIX_FADV_WILLNEED)
        sent = os.sendfile(self._transport.fileno(), fd, offset, count)
        if not sent:
            raise CutShortError(_CUT)
        return sent

    def _sent(self, count: int) -> None:
        self._source.sent(count)
        self._request.sentLength += count

    def _leave(self) -> None:
        self._source.close()
        self._transport.unregisterProducer()
        if self._request.channel is not None:  # else the client has gone
            self._transport.registerProducer(self._channel, True)  # noqa: FBT003
