"""
A worker's side: it answers what the cache can answer by itself, and hands on everything else.

With several workers, one process, the first, has the token, the janitor and all that comes from upstream. The workers
share its listening sockets and its cache directory. What a worker does not find there it asks of the first
over a socket of their own, and gives the client the answer as it comes: so a blob that one client waits for is
brought once, whichever workers the others came to.

Nothing of a client's request is passed on as it came: the target is written anew from its route, and the few headers
that decide about an answer from what the worker has understood of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IPushProducer, IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, ResponseDone
from twisted.web.http import NO_BODY_CODES
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgentEndpointFactory, IResponse
from zope.interface import implementer

from ecrproxy.access.limits import counted
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.access.turns import QueueTimeoutError, Turns
from ecrproxy.answers import Asked
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.cached import Cache
from ecrproxy.http.answering import Answering, begin
from ecrproxy.http.conditions import tags
from ecrproxy.http.request import RegistryRequest, address, field, fields
from ecrproxy.http.web import Door, Registry
from ecrproxy.oci import Kind, RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.request_id import REQUEST_ID
from ecrproxy.threads import InThread

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

FIRST: Final = b"http://first"
"""What the first process is called in URLs; the socket leads to it."""
KEY: Final = "X-Ecrproxy-Key"
"""Tells the first process the cache key, as JSON: only the worker knows the client that it may depend on."""

CONNECTING: Final = 32
"""Connections to the first process that are attempted at the same time."""
CONNECT_SECONDS: Final = 10.0
"""Seconds that a connection may wait for a place in the first process's queue, and before that for its turn."""
AGAIN_SECONDS: Final = 0.02
"""Seconds between two attempts while that queue is full."""

_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"transfer-encoding", b"content-length", b"server", b"date", b"keep-alive"}
)
_RANGE = re.compile(r"(?i:bytes)=[0-9 \t,-]+")


@implementer(IStreamClientEndpoint)
class Queued:
    """
    An endpoint for a UNIX socket, whose connections wait while the queue of the listening side is full.

    TCP retries by itself. A UNIX socket fails at once (EAGAIN), and a crowd of clients would be refused for it.

    @param endpoint: connects once.
    """

    def __init__(self, endpoint: Any, clock: IReactorTime) -> None:  # noqa: ANN401
        self._endpoint, self._clock = endpoint, clock
        self._turns = Turns(CONNECTING, CONNECT_SECONDS, clock)

    def connect(self, protocolFactory: Any) -> Deferred[Any]:  # noqa: ANN401
        """
        Connect, in the order of calls.
        """
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: Any) -> Any:  # noqa: ANN401
        async with self._turns.turn():
            deadline = self._clock.seconds() + CONNECT_SECONDS
            while True:
                try:
                    return await self._endpoint.connect(factory)
                except ConnectError as problem:
                    if not _is_full(problem):
                        raise
                    if self._clock.seconds() >= deadline:
                        raise QueueTimeoutError from problem
                await deferLater(self._clock, AGAIN_SECONDS)


def _is_full(problem: ConnectError) -> bool:
    """
    Return True if the queue of a UNIX socket was full: Twisted reports no error number then, and one for all others.
    """
    return type(problem) is ConnectError and problem.osError is None


@implementer(IAgentEndpointFactory)
class FirstProcess:
    """
    Leads every connection to the first process's socket.
    """

    def __init__(self, reactor: Any, path: str) -> None:  # noqa: ANN401
        self._endpoint = Queued(UNIXClientEndpoint(reactor, path), reactor)

    def endpointForURI(self, uri: URI) -> Queued:  # noqa: ARG002
        """
        Give the one endpoint.
        """
        return self._endpoint


class NoRoom:
    """
    A worker's room: it keeps nothing itself.
    """

    limit = 0

    def fits(self, size: int) -> bool:  # noqa: ARG002
        """
        There is none.
        """
        return False

    async def can_hold(self, size: int) -> bool:  # noqa: ARG002
        """
        It can't.
        """
        return False

    async def reserve(self, size: int) -> bool:  # noqa: ARG002
        """
        There is none.
        """
        return False

    def release(self, size: int) -> None:
        """
        There was none.
        """


class Relay:
    """
    Hands requests to the first process.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def ask(self, request: RegistryRequest, target: str, headers: Mapping[str, str]) -> None:
        """
        Ask the first process, and give its answer as it comes.

        @param target: what to ask for, in origin form.
        @param headers: what else to tell; nothing of the client's own is sent.
        @raise RegistryError: if it can't be asked.
        """
        sent = Headers({REQUEST_ID: [request.id], **{name: [value] for name, value in headers.items()}})
        request.upstream.start()
        try:
            response = await self._agent.request(request.method, FIRST + target.encode("ascii"), sent)
        except QueueTimeoutError as problem:
            said = "the proxy is too busy; ask once more"
            raise UnavailableError(503, "UNAVAILABLE", said, {"Retry-After": "1"}, Reason.BUSY) from problem
        except Exception as problem:
            said = "the proxy is starting again; ask once more"
            raise UnavailableError(503, "UNAVAILABLE", said, {"Retry-After": "1"}, Reason.STARTING) from problem
        finally:
            request.upstream.stop()
        await _pass(request, response)


async def _pass(request: RegistryRequest, response: IResponse) -> None:
    for name, values in response.headers.getAllRawHeaders():
        if name.lower() not in _HOP_BY_HOP:
            request.responseHeaders.setRawHeaders(name, values)
    if response.code in NO_BODY_CODES:
        pass  # Twisted's client says 0; in a 304 that would be the length of what the client has: RFC 9110, 8.6
    elif response.length is not UNKNOWN_LENGTH and request.method != b"HEAD":
        request.setHeader(b"Content-Length", b"%d" % response.length)
    elif response.headers.hasHeader(b"Content-Length"):
        request.responseHeaders.setRawHeaders(b"Content-Length", response.headers.getRawHeaders(b"Content-Length"))
    begin(request, response.code)
    passing = _Passing(request)
    response.deliverBody(passing)
    await passing.ended
    request.finish()


@implementer(IPushProducer)
class _Passing(Protocol):
    """
    A body on its way from the first process to a client, at the client's pace.
    """

    def __init__(self, request: RegistryRequest) -> None:
        self._request = request
        self.ended: Deferred[None] = Deferred(lambda _: self.stopProducing())

    def connectionMade(self) -> None:
        if self._request.method != b"HEAD":
            self._request.write(b"")
        self._request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)
        self._request.upstream.start()

    def dataReceived(self, data: bytes) -> None:
        self._request.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._request.upstream.stop()
        if self._request.channel is not None:
            self._request.unregisterProducer()
        if not self.ended.called:
            if reason.check(ResponseDone):
                self.ended.callback(None)
            else:
                self.ended.errback(Failure(UnavailableError(502, "UNAVAILABLE", "the first process broke off")))

    def pauseProducing(self) -> None:
        self._request.upstream.stop()
        self._producer.pauseProducing()

    def resumeProducing(self) -> None:
        self._request.upstream.start()
        self._producer.resumeProducing()

    def stopProducing(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()

    @property
    def _producer(self) -> Any:  # noqa: ANN401 (a producer and a transport)
        return self.transport


class RelayedReady(Answering):
    """
    A worker's /readyz: the first process knows.
    """

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self._relay = relay

    async def respond(self, request: RegistryRequest) -> None:
        """
        Ask it.

        @raise RegistryError: if it can't be asked.
        """
        await self._relay.ask(request, "/readyz", {})


class WorkerRegistry(Door):
    """
    A worker's /v2/: hits from the cache directory, all else from the first process.

    @param share: requests of one address that the first process may be at; 0 for no limit.
    """

    def __init__(
        self,
        cache: Cache,
        tag_ttl: float,
        relay: Relay,
        namespaces: Namespaces,
        cache_key: CacheKey,
        in_thread: InThread,
        share: int = 0,
    ) -> None:
        super().__init__(namespaces, cache_key, in_thread)
        self._cache, self._tag_ttl, self._relay = cache, tag_ttl, relay
        self._share, self._handed_on = share, Counter[str]()

    async def serve(self, request: RegistryRequest, route: Route) -> None:
        """
        Answer from the cache alone, or hand the request on.
        """
        headers = {}
        if route.kind in (Kind.MANIFEST, Kind.BLOB):
            asked = self.asked(request, route)
            answer = await self._cache.hit(asked, self._tag_ttl)
            if answer is not None:
                await self.answer(request, route, answer)
                return
            headers = _headers(request, asked)
        with self._within_share(request):
            await self._relay.ask(request, f"{route.path}?{route.query}" if route.query else route.path, headers)

    @contextmanager
    def _within_share(self, request: RegistryRequest) -> Iterator[None]:
        whose, channel = counted(address(request)), cast(Any, request.channel)
        if whose and 0 < self._share <= self._handed_on[whose]:
            channel.crowd.refuse_connection("an address is at half of what RLIMIT_NOFILE lets workers ask for", whose)
            said = "as many of your requests are being fetched as may be; ask again"
            raise RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "5"}, Reason.BUSY)
        self._handed_on[whose] += 1
        try:
            yield
        finally:
            self._handed_on[whose] -= 1
            if not self._handed_on[whose]:
                del self._handed_on[whose]


def _headers(request: RegistryRequest, asked: Asked) -> dict[str, str]:
    """
    Write what the worker has understood of a request for content.
    """
    headers = {KEY: json.dumps(asked.key)}
    if asked.accept:
        headers["Accept"] = ", ".join(sorted(asked.accept))
    if known := tags(fields(request, b"If-None-Match")):
        headers["If-None-Match"] = ", ".join(known)
    wanted, held = field(request, b"Range"), field(request, b"If-Range")
    applies = held is None or (asked.route.digest is not None and held == f'"{asked.route.digest}"')
    if wanted is not None and _RANGE.fullmatch(wanted) and applies:
        headers["Range"] = wanted
    return headers


def is_encodable(text: str) -> bool:
    """
    Return False for text that UTF-8 can't have, and JSON can: a half of a surrogate pair.
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


class InnerRegistry(Registry):
    """
    The first process's /v2/ for its workers, who have met the client and tell the cache key.
    """

    def asked(self, request: RegistryRequest, route: Route) -> Asked:
        """
        Understand a request for content, as a worker understood it.
        """
        try:
            key = json.loads(field(request, KEY.encode("ascii")) or "null")
        except (ValueError, RecursionError):
            key = None
        if not isinstance(key, str) or not is_encodable(key):
            raise RegistryError(400, "UNSUPPORTED", f"no worker asks without {KEY}")
        return replace(super().asked(request, route), key=key)
