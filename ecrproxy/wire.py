"""
Requests as they go out: of plain bytes, with a limit on the time until headers come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ecrproxy.bucket import Drop, UnavailableError, describe, header
from ecrproxy.oci import RegistryError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

HEADER_SECONDS: Final = 30.0
"""How long an upstream may take for its answer's headers, connecting included."""


@implementer(IAgent)
class PlainAgent:
    """
    An agent beneath treq that asks for bytes as they are, and takes no others.

    treq asks for gzip whatever it is told and would unpack it unseen; digests, lengths and ranges
    are those of the bytes as they are. Its cookie jar is one for all: no cookie passes.
    """

    def __init__(self, agent: IAgent) -> None:
        self._agent = agent

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """
        Send the request. Fails with L{UnavailableError} for an encoded answer.
        """
        headers = Headers() if headers is None else headers.copy()
        headers.setRawHeaders("Accept-Encoding", ["identity"])
        headers.removeHeader("Cookie")
        return self._agent.request(method, uri, headers, bodyProducer).addCallback(_refuse_encoded)


def _refuse_encoded(response: IResponse) -> IResponse:
    encoding = header(response, "Content-Encoding")
    if encoding not in (None, "identity"):
        response.deliverBody(Drop())
        raise UnavailableError(502, "UNAVAILABLE", f"upstream sends {encoding!r} where plain bytes were asked for")
    return response


class Wire:
    """
    What requests go out over.

    @param agent: sends them.
    """

    def __init__(self, agent: IAgent, clock: IReactorTime) -> None:
        self._client, self.clock = HTTPClient(PlainAgent(agent)), clock

    async def request(self, method: str, url: str, headers: Headers) -> IResponse:
        """
        Send a request; its redirects are not followed.

        @raise UnavailableError: if no answer comes.
        """
        try:
            asked = self._client.request(method, url, headers=headers, allow_redirects=False, unbuffered=True)
        except ValueError:
            raise UnavailableError(502, "UNAVAILABLE", "ECR redirects to what is no URL") from None
        limit = self.clock.callLater(HEADER_SECONDS, asked.cancel)
        try:
            return (await asked).original
        except RegistryError:
            raise
        except Exception as problem:
            host = urlsplit(url).hostname
            if not limit.active():
                raise UnavailableError(
                    504, "UNAVAILABLE", f"{host} has not answered for {HEADER_SECONDS:.0f} s"
                ) from None
            raise UnavailableError(502, "UNAVAILABLE", f"{host} can't be reached: {describe(problem)}") from problem
        finally:
            if limit.active():
                limit.cancel()

    async def read(self, response: IResponse, limit: int) -> bytes:
        """
        Read a small body.

        @raise UnavailableError: if it is longer than C{limit}, or does not come to its end.
        """
        collected = _Collect(limit, self.clock)
        response.deliverBody(collected)
        return await collected.whole


class _Collect(TwistedProtocol):
    """
    Collect a small body: at most so many bytes, in no more than the time of headers.
    """

    def __init__(self, limit: int, clock: IReactorTime) -> None:
        self._limit, self._parts, self._size = limit, list[bytes](), 0
        self.whole: Deferred[bytes] = Deferred(lambda _: self._give_up())
        self._timer = clock.callLater(HEADER_SECONDS, self._late)

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            self._fail(502, f"an answer of ECR has more than the {self._limit} bytes that it may have")
        else:
            self._parts.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if reason.check(ResponseDone, PotentialDataLoss):
            self._end(b"".join(self._parts))
        else:
            self._fail(502, f"ECR broke off: {describe(reason.value)}")

    def _late(self) -> None:
        self._fail(504, f"an answer of ECR has not ended after {HEADER_SECONDS:.0f} s")

    def _fail(self, status: int, message: str) -> None:
        self._end(Failure(UnavailableError(status, "UNAVAILABLE", message)))
        self._give_up()

    def _end(self, result: bytes | Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not self.whole.called:
            self.whole.callback(result)

    def _give_up(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        if self.transport is not None:
            self.transport.loseConnection()
