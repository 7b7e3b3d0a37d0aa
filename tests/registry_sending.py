"""
Send a body from the stand-in for ECR: in pieces, as fast as the client reads or a test allows.

One producer serves all: L{Sending} writes until the transport says pause, until
the bytes that a test allowed are used up, until the rate is reached, or until the
byte at which the connection is to break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

PIECE: Final = 256 * 1024


class Outgoing(Protocol):
    """
    What sending needs of a twisted.web Request, whose own methods are not annotated.
    """

    defaultContentType: bytes | None

    def setResponseCode(self, code: int) -> None: ...
    def setHeader(self, name: str, value: str | bytes) -> None: ...
    def notifyFinish(self) -> Deferred[None]: ...
    def registerProducer(self, producer: IPushProducer, streaming: bool) -> None: ...
    def unregisterProducer(self) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...
    def loseConnection(self) -> None: ...


@implementer(IPushProducer)
class Sending:
    """
    One body on its way to one client.
    """

    def __init__(
        self,
        request: Outgoing,
        body: bytes | memoryview,
        clock: IReactorTime,
        wrote: Callable[[int], None],
        *,
        rate: float | None = None,
        allowed: int | None = None,
        break_after: int | None = None,
    ) -> None:
        self.over = False
        self._request, self._body = request, memoryview(body)
        self._clock, self._wrote, self._rate = clock, wrote, rate
        self._allowed, self._break_after = allowed, break_after
        self._sent, self._paused, self._started = 0, False, clock.seconds()
        self._later: IDelayedCall | None = None
        request.notifyFinish().addErrback(self._left)

    def start(self) -> None:
        """
        Send the headers, then what may be sent of the body.
        """
        self._request.registerProducer(self, True)
        self._request.write(b"")  # send the headers even if no byte of the body may be sent
        self._go()

    def allow(self, count: int | None) -> None:
        """
        Allow that many more bytes, or with None all of them.
        """
        if self._allowed is not None:
            self._allowed = None if count is None else self._allowed + count
        self._go()

    def drop(self) -> None:
        """
        Close the connection after what was sent so far.
        """
        if not self.over:
            self._end()
            # Not an abort: what was sent so far must arrive.
            self._request.loseConnection()

    def pauseProducing(self) -> None:
        """
        Pause: the client reads slower than we write.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Resume: the client has caught up.
        """
        self._paused = False
        self._go()

    def stopProducing(self) -> None:
        """
        Stop: the client has disconnected.
        """
        self._stop()

    def _go(self) -> None:
        """
        Write until there is a reason to stop.
        """
        # write() may call pauseProducing() before it returns, so look everything up in each turn.
        while not (self._paused or self.over or self._later):
            if self._break_after is not None and self._sent >= self._break_after:
                self.drop()
            elif self._sent == len(self._body):
                self._end()
                self._request.finish()
            elif not self._write_piece():
                return

    def _write_piece(self) -> bool:
        """
        Write the next piece, if one may be sent now.
        """
        size = PIECE if self._rate is None else min(PIECE, max(1, int(self._rate / 20)))
        limits = (self._sent + size, len(self._body), self._allowed, self._break_after)
        piece = bytes(self._body[self._sent : min(limit for limit in limits if limit is not None)])
        if not piece:
            return False
        self._sent += len(piece)
        self._wrote(len(piece))
        if self._rate is not None:
            # Measured from the start, so that late timers do not add up.
            due = self._started + self._sent / self._rate
            wait = max(0.0, due - self._clock.seconds())
            self._later = self._clock.callLater(wait, self._due)
        self._request.write(piece)
        return True

    def _due(self) -> None:
        self._later = None
        self._go()

    def _left(self, _reason: Failure) -> None:
        self._stop()

    def _end(self) -> None:
        self._stop()
        self._request.unregisterProducer()

    def _stop(self) -> None:
        self.over = True
        if self._later is not None:
            self._later.cancel()
            self._later = None
