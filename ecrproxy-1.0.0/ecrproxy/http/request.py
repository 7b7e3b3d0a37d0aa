"""
A client's request, with what is told of it later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.web.server import Request

from ecrproxy.request_id import REQUEST_ID, choose_id
from ecrproxy.stopwatch import Stopwatch

if TYPE_CHECKING:
    from twisted.python.failure import Failure


def address_of(peer: object) -> str:
    """
    Name the other side of a connection.
    """
    return str(getattr(peer, "host", "")).removeprefix("::ffff:")


class RegistryRequest(Request):
    """
    A request that has an id, and does not name the software that answers it.

    @ivar id: see C{request_id}.
    @ivar started: when it had come.
    @ivar upstream: how long upstream was waited for.
    """

    id = ""
    started: float
    upstream: Stopwatch

    def process(self) -> None:  # noqa: D102
        site: Any = self.channel.factory
        self.started = site.reactor.seconds()
        self.upstream = Stopwatch(site.reactor.seconds)
        self.id = choose_id(self.requestHeaders.getRawHeaders(REQUEST_ID, ()), site.new_id)
        self.responseHeaders.setRawHeaders(REQUEST_ID, [self.id.encode("ascii")])
        if self.path == b"*":  # Twisted would answer it by itself, as if everything were allowed
            self.path = b"/*"
        super().process()

    def write(self, data: bytes) -> None:  # noqa: D102
        if not self.startedWriting:
            self.responseHeaders.setRawHeaders(b"Server", [b"ecrproxy"])
        super().write(data)

    def connectionLost(self, reason: Failure) -> None:
        """
        Note the end of an answer that did not come to its own.
        """
        site: Any = self.channel.factory
        super().connectionLost(reason)  # whoever waits for upstream hears of it here, and stops the watch
        if self.id:  # else it had not come as a whole
            site.log(self, aborted=True)
