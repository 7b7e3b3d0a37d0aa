"""
Requests as they are framed on a connection, hardened against request smuggling.

Twisted's channel refuses most malformed requests. What it accepts and a proxy must not is refused here, before there
is a request object: RFC 9112, 3.2 (one Host), 5.2 (folded lines), 6.1 and 6.3 (one length, or one chunked coding), and
bodies, which no client request needs; those of operators are small. A GET or HEAD may have a chunked body that
turns out to be empty. A refusal closes the connection: what follows can't be trusted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from twisted.logger import Logger
from twisted.web.http import HTTPChannel

from ecrproxy.access.limits import Crowd, Patience
from ecrproxy.http.empty_body import EmptyBody
from ecrproxy.http.request import address_of
from ecrproxy.http.target import HOST, parse_target
from ecrproxy.request_id import REQUEST_ID

if TYPE_CHECKING:
    from ecrproxy.http.request import Told

log = Logger()

LENGTH_DIGITS: Final = 18
"""Maximum digits of a Content-Length; longer ones are an attack on C{int}."""
_HOST = re.compile(rf"{HOST}*".encode())
_UNSUPPORTED = b'{"errors": [{"code": "UNSUPPORTED", "message": "this proxy only reads"}]}\n'
_FRAMING = b"the request is malformed, or could be read in more than one way (RFC 9112)"
_LONG = b"the request line or the headers are longer than PROXY_HEADER_BYTES"
_HOSTS = b"the request needs one Host header, with the name of a host"
_BODY = b"a GET or HEAD must not announce a body (Content-Length)"
_TARGET = b"the request's target is neither a path nor the URL of one"


class FramedChannel(HTTPChannel):
    """
    Parses requests.

    @ivar crowd: all connected clients; the site sets it.
    @ivar body_limit: maximum bytes of a request body; 0 for no bodies. The site sets it.
    """

    crowd: Crowd
    body_limit = 0
    transport: Any
    _head: Patience
    _line = b""
    _after_empty_line = False
    _whole_head: bytes | None = None
    _told: Told | None = None
    _is_head = False

    def _await_head(self) -> None:
        """
        Start the time limit of a request's head, unless it is running.
        """
        raise NotImplementedError

    def _linger(self) -> None:
        """
        Close after an error response, whatever the client still sends.
        """
        raise NotImplementedError

    def _finishRequestBody(self, data: bytes) -> None:
        """
        Buffer what follows a body with all other input.
        """
        self._buffer = data
        self.allContentReceived()

    def lineReceived(self, line: bytes) -> None:
        """
        Parse a line of a request's head.
        """
        self._after_empty_line = not (line or self._line)
        if line and not self._line:
            self._line, self._is_head = line, line.startswith(b"HEAD ")
            self._await_head()
        if line[:1] in (b" ", b"\t") or b"\n" in line or b"\r" in line:
            self.refuse()
            return
        super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002
        """
        Refuse a line longer than the limit for all headers.
        """
        self.refuse(_LONG)

    def headerReceived(self, line: bytes) -> bool:
        """
        Parse a header, with folded lines joined.
        """
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        match name.lower():
            case b"transfer-encoding" if value.lower() != b"chunked" or not self._line.endswith(b"HTTP/1.1"):
                return self.refuse()
            case b"content-length" if len(value) > LENGTH_DIGITS:
                return self.refuse()
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        """
        Check the complete head.
        """
        self._head.end()
        line, self._line = self._line, b""
        hosts = self.requests[-1].requestHeaders.getRawHeaders(b"Host", [])
        reads = line.startswith((b"GET ", b"HEAD "))
        named = len(hosts) == 1 or (not hosts and not line.endswith(b"HTTP/1.1"))
        if not named or not all(map(_HOST.fullmatch, hosts)):
            self.refuse(_HOSTS)
        elif reads and self.length:
            self.refuse(_BODY)
        elif not self._aim():
            self.refuse(_TARGET)
        elif reads and self.length is None:
            self._head.begin()  # an empty body has the same timeout as a head
            self._transferDecoder: Any = EmptyBody(self._finishRequestBody, self.refuse)
            self.length = 0  # for the request: otherwise Twisted opens a file for the body
            super().allHeadersReceived()
            self.length = None
        elif self.length != 0 and self.body_limit and line.startswith(b"POST "):
            if self.length is None or self.length > self.body_limit:
                self._answer(b"413 Content Too Large")
            else:
                self._head.begin()  # a small body has the same timeout as a head
                super().allHeadersReceived()
        elif self.length != 0:
            kind = b"Content-Type: application/json\r\n"
            self._answer(b"405 Method Not Allowed", b"Allow: GET, HEAD\r\n" + kind, _UNSUPPORTED)
        else:
            super().allHeadersReceived()

    def _aim(self) -> bool:
        """
        Parse the target. Return False if its form is not supported.
        """
        request: Any = self.requests[-1]
        try:
            request.target = parse_target(self._path)
            request.head, request.told, self._whole_head, self._told = self._whole_head, self._told, None, None
        except ValueError:
            return False
        return True

    def allContentReceived(self) -> None:
        """
        Answer a request that is complete.
        """
        self._head.end()
        super().allContentReceived()

    def _send100Continue(self) -> None:
        """
        Send 100 Continue only if a body is announced: without one, HAProxy 2.6 treats it as the final response.
        """
        if self.length != 0 or isinstance(self._transferDecoder, EmptyBody):
            super()._send100Continue()

    def refuse(self, said: bytes = _FRAMING) -> bool:
        """
        Answer 400 and close. A HEAD request gets no body, so no reason.

        @param said: the reason.
        """
        self.crowd.bad_requests += 1
        client, why = address_of(self.transport.getPeer()), said.decode("ascii")
        log.info("A request of {client} is refused: {why}", client=client, why=why, once=(client, why))
        told = b"" if self._is_head else b'{"errors": [{"code": "UNSUPPORTED", "message": "%b"}]}\n' % said
        self._answer(b"400 Bad Request", body=told)
        return False

    def _respondToBadRequestAndDisconnect(self) -> None:
        """
        Use this class's response for what Twisted refuses.
        """
        self.refuse()

    def _answer(
        self,
        status: bytes,
        headers: bytes = b"Content-Type: application/json\r\n",
        body: bytes = b"",
        version: bytes = b"HTTP/1.1",
    ) -> None:
        self._head.end()
        self.length = None  # makes Twisted expect a body of unknown length, and so create no request
        request_id, site = self.factory.new_id(), self.factory
        site.refused(address_of(self.transport.getPeer()), int(status[:3]), len(body), request_id)
        head = b"%b %b\r\nDocker-Distribution-Api-Version: registry/2.0\r\n" % (version, status)
        headers += b"%b: %b\r\n" % (REQUEST_ID, request_id.encode("ascii"))
        headers += b"".join(b"%b: %b\r\n" % (name, value) for name, (value,) in site.headers)
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.writeSequence([head, headers, length, body])
        self._linger()
