"""
Bodies that are not needed: of redirects, errors, and unexpected answers.

Each is read up to C{ERROR_LIMIT} bytes and for C{SECONDS}. If it ends in time, its connection is used for the next
request; otherwise it is closed, so that an upstream that never ends a body does not hold a socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime
    from twisted.python.failure import Failure
    from twisted.web.iweb import IResponse

ERROR_LIMIT: Final = 64 * 2**10
SECONDS: Final = 5.0


def discard(response: IResponse, clock: IReactorTime) -> None:
    """
    Read and discard a body.
    """
    response.deliverBody(_Excerpt(clock, keep=False))


def excerpt(response: IResponse, clock: IReactorTime) -> Deferred[bytes]:
    """
    Return the start of a body, as far as it arrives within the limits. Never fails.
    """
    reading = _Excerpt(clock, keep=True)
    response.deliverBody(reading)
    return reading.text


class _Excerpt(Protocol):
    def __init__(self, clock: IReactorTime, *, keep: bool) -> None:
        self._keep, self._parts, self._left = keep, list[bytes](), ERROR_LIMIT
        self.text: Deferred[bytes] = Deferred(lambda _: self._close())
        self._timer = clock.callLater(SECONDS, self._close)

    def dataReceived(self, data: bytes) -> None:
        if self._keep:
            self._parts.append(data[: max(0, self._left)])
        self._left -= len(data)
        if self._left < 0:
            self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002 (a body that breaks off ends here)
        self._end()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()
        self._end()

    def _end(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not self.text.called:
            self.text.callback(b"".join(self._parts))
