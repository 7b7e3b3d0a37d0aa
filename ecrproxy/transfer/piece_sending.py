"""
Send a body through memory, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.threads import InThread
from ecrproxy.transfer.response_body import CutShortError, Sending
from ecrproxy.transfer.sources import FilePiece, Source

if TYPE_CHECKING:
    from twisted.web.server import Request


@implementer(IPushProducer)
class PieceSending(Sending):
    """
    Sends through memory, a piece at a time: over TLS, and to anything else that is not a plain socket.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread, held: Callable[[], int]) -> None:
        super().__init__(request, source)
        self._in_thread, self._held = in_thread, held
        self._paused = self._reading = False

    def start(self) -> Deferred[None]:
        """
        Begin to send.
        """
        self._source.listen(self._go)
        self._request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)
        self._go()
        return self._ended

    def pauseProducing(self) -> None:
        """
        Pause: the client takes nothing for now.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Resume.
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
                piece = self._source.piece(self._held())
                if piece is None:
                    return
                if isinstance(piece, bytes):
                    self._write(piece)
                else:
                    self._read(piece)

    def _read(self, piece: FilePiece) -> None:
        fd, offset, count = piece
        self._reading = True
        reading = self._in_thread(self._pread, fd, count, offset)
        reading.addCallbacks(self._have_read, self._failed).addErrback(self._failed)

    def _have_read(self, data: bytes) -> None:
        self._reading = False
        if self._over:
            self._source.close()
            return
        if not data:
            raise CutShortError
        self._write(data)
        self._go()

    def _failed(self, failure: Failure) -> None:
        self._reading = False
        if self._over:
            self._source.close()
        self._end(failure)

    def _write(self, data: bytes) -> None:
        self._request.write(data)  # before source.sent, which may call _go again
        self._source.sent(len(data))

    def _leave(self) -> None:
        if not self._reading:  # a thread that still reads needs the open descriptor
            self._source.close()
        if self._request.channel is not None:  # else the client has gone, and the request with it
            self._request.unregisterProducer()
