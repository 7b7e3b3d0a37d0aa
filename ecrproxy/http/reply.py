"""
A prepared response that is sent again: a head, followed by bytes or an open file.
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
from ecrproxy.http.request import RegistryRequest
from ecrproxy.request_id import REQUEST_ID
from ecrproxy.transfer.outgoing import has_sent_all, write
from ecrproxy.transfer.slot_sending import warm_start


class Written(NamedTuple):
    """
    A response without its request id and date.

    @ivar before: the bytes before the id.
    @ivar between: those between the id and the date.
    @ivar after: the rest, including the body unless that is a file.
    """

    before: bytes
    between: bytes
    after: bytes

    @classmethod
    def of(cls, request: RegistryRequest, body: object) -> Written | None:
        """
        Return the response that a request was just sent.

        @return: None if id and date are not both present, in this order.
        """
        lines = [b"HTTP/1.1 %d %b\r\n" % (request.code, request.code_message)]
        parts = []
        for name, values in request.responseHeaders.getAllRawHeaders():
            if name in (REQUEST_ID, b"Date"):
                parts.append((name, b"".join([*lines, name, b": "])))
                lines = [b"\r\n"]
            else:
                lines += [b"%b: %b\r\n" % (name, value) for value in values]
        if [name for name, _ in parts] != [REQUEST_ID, b"Date"]:
            return None
        after = b"".join([*lines, b"\r\n", body if isinstance(body, bytes) else b""])
        return cls(parts[0][1], parts[1][1], after)

    def with_those(self, request_id: str, date: bytes) -> bytes:
        """
        Return the response with C{request_id} and C{date} filled in.
        """
        return b"".join((self.before, request_id.encode(), self.between, date, self.after))


class FileReply:
    """
    A response in flight whose body is a file. The channel and L{sending} treat it as the request.

    @param tell: called at the end with the number of body bytes sent, and whether the response was C{aborted}.
    @ivar channel: the connection; None once that is lost.
    @ivar sentLength: body bytes passed to the connection.
    @ivar sending: sends the body; cancelled when the connection is lost or broken off.
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
        Register the producer with the connection.
        """
        self.channel.registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """
        Unregister the producer.
        """
        self.channel.unregisterProducer()

    def finish(self) -> None:
        """
        Report the complete response; the channel continues with the next request.
        """
        self._tell(self.sentLength, aborted=False)
        channel, self.channel = self.channel, None
        channel.requestDone(self)

    def connectionLost(self, reason: Failure) -> None:  # noqa: ARG002 (Twisted's signature)
        """
        Report the incomplete response and stop sending.
        """
        self.channel = None
        self._tell(self.sentLength, aborted=True)
        if self.sending is not None:
            self.sending.cancel()


def write_with_file(transport: Any, head: bytes, content: Content) -> int:  # noqa: ANN401
    """
    Send a head and the start of the file: what is in the page cache and the socket accepts at once, at most one piece.

    @return: the number of bytes of the file sent.
    """
    there = warm_start(content.fileno(), content.size) if has_sent_all(transport) else 0
    if not write(transport, head, socket.MSG_MORE if there else 0) or not there:
        return 0
    with contextlib.suppress(OSError):  # the regular sender takes over
        return os.sendfile(transport.fileno(), content.fileno(), 0, there)
    return 0
