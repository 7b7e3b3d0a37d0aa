"""
A response that was written before, sent anew: a head, and behind it bytes or an open file.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from ecrproxy.cache.content import Content
from ecrproxy.transfer.outgoing import has_sent_all, write
from ecrproxy.transfer.sending import warm_start


class Written(NamedTuple):
    """
    A response, but for its request's id and its date.

    @ivar before: what comes before the id.
    @ivar between: from there to the date.
    @ivar after: the rest, with the body if that is no file.
    """

    before: bytes
    between: bytes
    after: bytes

    def with_those(self, request_id: str, date: bytes) -> bytes:
        """
        Return it for one request.
        """
        return b"".join((self.before, request_id.encode(), self.between, date, self.after))


class FileReply:
    """
    A response whose body is a file, on its way: the channel and L{sending} take it for the request.

    @param tell: told how many bytes of the body were sent when it is over, and whether it was C{aborted}.
    @ivar channel: the connection; none once that is lost.
    @ivar sentLength: bytes of the body that were handed over.
    @ivar sending: sends the body; cancelled when the connection is lost, or broken off.
    """

    startedWriting: Final = True
    chunked: Final = False
    clientproto: Final = b"HTTP/1.1"
    responseHeaders: Final = Headers()
    sending: Deferred[None] | None = None

    def __init__(self, channel: Any, sent: int, tell: Callable[..., None]) -> None:  # noqa: ANN401
        self.channel, self.sentLength, self._tell = channel, sent, tell

    def write(self, data: bytes) -> None:
        """
        Send bytes of the body.
        """
        self.sentLength += len(data)
        self.channel.write(data)

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: FBT001 (Twisted's signature)
        """
        Have the connection say when it takes more.
        """
        self.channel.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """
        Have it say so no more.
        """
        self.channel.unregisterProducer()

    def finish(self) -> None:
        """
        End: all was sent. The channel goes on with the next request.
        """
        self._tell(self.sentLength, aborted=False)
        channel, self.channel = self.channel, None
        channel.requestDone(self)

    def connectionLost(self, reason: Failure) -> None:  # noqa: ARG002 (Twisted's signature)
        """
        End before all was sent.
        """
        self.channel = None
        self._tell(self.sentLength, aborted=True)
        if self.sending is not None:
            self.sending.cancel()


def write_with_file(transport: Any, head: bytes, content: Content) -> int:  # noqa: ANN401
    """
    Send a head, and of the file behind it what the kernel has in memory and the client takes at once: a piece at most.

    @return: how many bytes of the file were sent.
    """
    there = warm_start(content.fileno(), content.size) if has_sent_all(transport) else 0
    if not write(transport, head, socket.MSG_MORE if there else 0) or not there:
        return 0
    with contextlib.suppress(OSError):  # as before
        return os.sendfile(transport.fileno(), content.fileno(), 0, there)
    return 0
