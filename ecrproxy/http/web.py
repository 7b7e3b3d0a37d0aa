"""
The Resource tree: what clients see, and how an answer becomes a response.

Nothing here trusts Twisted's idea of the path, which is decoded: below /v2/ the raw target is parsed,
once, by L{oci.parse_route}.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import ISSLTransport
from twisted.logger import Logger
from twisted.web import http
from twisted.web.http import NOT_MODIFIED, OK, PARTIAL_CONTENT, REQUESTED_RANGE_NOT_SATISFIABLE
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from ecrproxy.access.clients import Admission, Caller
from ecrproxy.access.limits import Crowd
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.cache.cache_key import NOBODY, Asker, CacheKey
from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.cached import SMALL_BLOB, Answer, Asked, CacheStatus
from ecrproxy.http.request import RegistryRequest, address_of
from ecrproxy.oci import Kind, RegistryError, Route, accepted_types, parse_route, query_values
from ecrproxy.proxy import PullThrough
from ecrproxy.reasons import Reason
from ecrproxy.registry.upstream import Page
from ecrproxy.request_id import current
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import InThread
from ecrproxy.transfer.download import Download, ShortBodyError
from ecrproxy.transfer.sending import CutShortError, send
from ecrproxy.transfer.sources import Held, Shelved, Source

if TYPE_CHECKING:
    from twisted.python.failure import Failure

log = Logger()

HSTS: Final = "max-age=31536000"
# The nginx proxy adds its headers where nginx's add_header does without C{always}.
_DECORATED: Final = frozenset({200, 201, 204, 206, 301, 302, 303, 304, 307, 308})
_ENDLESS: Final = 2**62
# What a disk says of a file that it can't give, and no socket says.
_UNREADABLE: Final = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.ESTALE, errno.EUCLEAN})
_SECRET: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """
    Read a Range header: RFC 9110, 14.2.

    @return: first byte and the one behind the last; none where all is to be sent: without a header, for several
        ranges, and for what isn't understood.
    @raise LookupError: if no byte of C{size} is in it.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= stop:
        raise LookupError(header)
    return start, stop


def matches(header: str | None, etag: str) -> bool:
    """
    Tell whether an If-None-Match header names C{etag}: RFC 9110, 13.1.2.
    """
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag in tags


# What ends an answer and was logged where it happened, or is no news: a client leaves.
_KNOWN: Final = (
    RegistryError,
    CancelledError,
    ConnectionDone,
    ConnectionError,
    DigestMismatchError,
    ShortBodyError,
)


class Answering(Resource):
    """
    A leaf that answers each request with the coroutine C{respond}, cancelled when the client leaves.

    @cvar methods: what it may be asked with.
    """

    isLeaf = True
    methods: Sequence[bytes] = (b"GET", b"HEAD")

    def render(self, request: Request) -> int:
        """
        Begin the answer.
        """
        asked = cast(RegistryRequest, request)
        answer = Deferred.fromCoroutine(self._respond(asked))
        request.notifyFinish().addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, asked)
        return NOT_DONE_YET

    async def _respond(self, request: RegistryRequest) -> None:
        current.set(request.id)
        try:
            _only_by(self.methods, request)
            await self.respond(request)
        except RegistryError as problem:
            if request.startedWriting:
                raise
            _refuse(request, problem)

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer a request, and finish it.

        @raise RegistryError: for another answer than it asked for.
        """
        raise NotImplementedError

    def _failed(self, failure: Failure, request: RegistryRequest) -> None:
        if request.channel is None:  # the client has gone: nobody is left to answer
            return
        if not failure.check(*_KNOWN):
            log.failure("Answering {path}", failure, path=path(request), request=request.id)
        if request.startedWriting:
            request.channel.forceAbortClient()  # a short body must never look whole
        else:
            _refuse(request, _answer_to(failure))


def _refuse(request: Request, problem: RegistryError) -> None:
    for name, value in problem.headers.items():
        request.setHeader(name, value)
    request.setHeader("X-Cache-Reason", problem.reason)
    send_small(request, problem.status, "application/json", problem.body())


def _answer_to(failure: Failure) -> RegistryError:
    """
    Tell a client what an answer that came to nothing failed of.
    """
    if isinstance(failure.value, RegistryError):
        return failure.value
    if failure.check(DigestMismatchError, ShortBodyError):
        said = f"upstream sent wrong bytes: {failure.value}"
        return RegistryError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
    return RegistryError(500, "UNKNOWN", "the proxy failed; its log says why", reason=Reason.FAILED)


def _only_by(methods: Sequence[bytes], request: Request) -> None:
    if request.method not in methods:
        raise RegistryError(405, "UNSUPPORTED", "this proxy only reads", {"Allow": b", ".join(methods).decode()})


def only_itself(request: Request) -> None:
    """
    Make sure that nothing below a leaf is asked for.

    @raise RegistryError: if it is.
    """
    if request.postpath:
        raise _missing()


def _missing() -> RegistryError:
    return RegistryError(404, "UNSUPPORTED", "no such path: a registry is at /v2/")


class Missing(Answering):
    """
    A path that is not there.
    """

    async def respond(self, request: RegistryRequest) -> None:  # noqa: ARG002
        """
        Say so.
        """
        raise _missing()


class Health(Answering):
    """
    Says that the daemon serves.
    """

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer 200.

        @raise RegistryError: for a path below.
        """
        only_itself(request)
        send_small(request, OK, "text/plain", b"")


class Ready(Answering):
    """
    Says whether the daemon can do its work, and why not.

    @param reasons: asks for what stands in the way.
    """

    def __init__(self, reasons: Callable[[], Awaitable[Sequence[str]]]) -> None:
        super().__init__()
        self._reasons = reasons

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer 200, or 503 with the reasons.
        """
        only_itself(request)
        reasons = await self._reasons()
        body = json.dumps({"ready": not reasons, "reasons": list(reasons)}).encode() + b"\n"
        send_small(request, 503 if reasons else OK, "application/json", body)


class Door(Answering):
    """
    /v2/, for the repositories that C{namespaces} lets in.

    @param admission: lets in clients; none for all.
    """

    def __init__(
        self, namespaces: Namespaces, cache_key: CacheKey, in_thread: InThread, admission: Admission | None = None
    ) -> None:
        super().__init__()
        self._namespaces, self._cache_key, self._in_thread = namespaces, cache_key, in_thread
        self._asks = cache_key.asks
        self._admission = admission

    def render(self, request: Request) -> int:  # noqa: D102
        request.setHeader("Docker-Distribution-Api-Version", "registry/2.0")
        return super().render(request)

    async def respond(self, request: RegistryRequest) -> None:
        """
        Let a request in, if it is understood and may.
        """
        if self._admission is not None:
            await self._admission.admit(caller_of(request))
        target = request.uri.decode("ascii", "replace")
        if target.partition("?")[0] in ("/v2", "/v2/"):
            send_small(request, OK, "application/json", b"{}\n")
            return
        route = parse_route(target)
        if "ns=" in route.query:
            self._namespaces.admit_registry(unquote(query_values(route.query).get("ns", "")))
        await self._namespaces.admit(route.repository)
        if route.kind is Kind.BLOB and request.method == b"GET":
            await self._transfer(request, route)
        else:
            await self.serve(request, route)

    async def _transfer(self, request: RegistryRequest, route: Route) -> None:
        crowd: Crowd = cast(Any, request.channel).crowd
        if not crowd.begin_transfer():
            said = "as many blobs are being sent as may be; ask again"
            raise RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "5"}, Reason.BUSY)
        try:
            await self.serve(request, route)
        finally:
            crowd.end_transfer()

    async def serve(self, request: RegistryRequest, route: Route) -> None:
        """
        Answer by the route, and finish the request.
        """
        raise NotImplementedError

    def asked(self, request: RegistryRequest, route: Route) -> Asked:
        """
        Understand a request for content.
        """
        accept = accepted_types(fields(request, b"Accept"))
        # To find out all about who asks costs as much as the look into the cache.
        key = self._cache_key.expand(route, asker_of(request) if self._asks else NOBODY)
        return Asked(route, key, accept, head=request.method == b"HEAD")

    async def answer(self, request: RegistryRequest, route: Route, answer: Answer) -> None:
        """
        Make a response of an answer.
        """
        etag = f'"{answer.digest}"'
        request.setHeader("Docker-Content-Digest", str(answer.digest))
        request.setHeader("ETag", etag)
        request.setHeader("X-Cache-Status", answer.status)
        request.setHeader("X-Cache-Reason", answer.reason)
        if matches(field(request, b"If-None-Match"), etag):
            _let_go(answer)
            begin(request, NOT_MODIFIED)
            request.finish()
            return
        request.setHeader("Content-Type", answer.media_type)
        start, stop = self._choose_range(request, route, answer, etag)
        if stop is not None:
            request.setHeader("Content-Length", str(stop - start))
        begin(request, request.code)
        if isinstance(answer.body, bytes) and len(answer.body) <= SMALL_BLOB:
            request.write(answer.body if stop is None else answer.body[start:stop])
        elif answer.body is not None:
            if stop != start:  # of nothing, the headers would be the whole answer: they wait for the digest
                request.write(b"")
            await self._send(request, answer, start, stop)
        request.finish()

    async def _send(self, request: RegistryRequest, answer: Answer, start: int, stop: int | None) -> None:
        """
        Send the body, and drop a cached file that can't be read: who asks again gets it anew.
        """
        try:
            await send(request, _source(answer, start, stop, request.upstream), self._in_thread)
        except (CutShortError, OSError) as problem:
            unreadable = isinstance(problem, CutShortError) or problem.errno in _UNREADABLE
            if not unreadable or not isinstance(answer.body, Content):
                raise
            await self._in_thread(answer.body.drop, problem)
            raise ShortBodyError(f"{answer.digest} can't be read to its end") from problem

    @staticmethod
    def _choose_range(request: RegistryRequest, route: Route, answer: Answer, etag: str) -> tuple[int, int | None]:
        """
        Choose what of the answer to send, and set the headers that tell.
        """
        if route.kind is Kind.MANIFEST or answer.size is None:
            return 0, answer.size
        request.setHeader("Accept-Ranges", "bytes")
        try:
            chosen = parse_range(_wanted(request, etag), answer.size)
        except LookupError:
            _let_go(answer)
            request.setHeader("Content-Range", f"bytes */{answer.size}")
            raise RegistryError(
                REQUESTED_RANGE_NOT_SATISFIABLE, "RANGE_INVALID", f"the blob has {answer.size} bytes"
            ) from None
        if chosen is None:
            return 0, answer.size
        request.setResponseCode(PARTIAL_CONTENT)
        request.setHeader("Content-Range", f"bytes {chosen[0]}-{chosen[1] - 1}/{answer.size}")
        return chosen


class Registry(Door):
    """
    The pull side of the distribution protocol.
    """

    def __init__(
        self,
        pull_through: PullThrough,
        namespaces: Namespaces,
        cache_key: CacheKey,
        in_thread: InThread,
        admission: Admission | None = None,
    ) -> None:
        super().__init__(namespaces, cache_key, in_thread, admission)
        self._pull_through = pull_through

    async def serve(self, request: RegistryRequest, route: Route) -> None:
        """
        Answer from the cache, or through it.
        """
        request.upstream.start()
        hit = False
        try:
            if route.kind in (Kind.TAGS, Kind.REFERRERS):
                self._send_page(request, route, await self._pull_through.page(route))
                return
            asked = self.asked(request, route)
            if route.kind is Kind.MANIFEST:
                answer = await self._pull_through.manifest(asked)
            else:
                answer = await self._pull_through.blob(asked, _first_byte(request, f'"{route.digest}"'))
            hit = answer.status is CacheStatus.HIT
        finally:
            request.upstream.stop(counted=not hit)
        await self.answer(request, route, answer)

    def _send_page(self, request: RegistryRequest, route: Route, page: Page) -> None:
        if page.next is not None:
            # Relative: it leads to the address that the client used, whatever stands between.
            request.setHeader("Link", f'<{route.path}?{_own_query(route, page.next)}>; rel="next"')
        if page.filters is not None:
            request.setHeader("OCI-Filters-Applied", page.filters)
        # ECR calls tags text/plain.
        content_type = "application/json" if route.kind is Kind.TAGS else page.content_type
        request.setHeader("X-Cache-Status", CacheStatus.BYPASS)
        request.setHeader("X-Cache-Reason", Reason.LIST)
        send_small(request, OK, content_type, page.body)


def _source(answer: Answer, start: int, stop: int | None, waiting: Stopwatch) -> Source:
    match answer.body:
        case Download():
            return answer.body.follow(start, stop, waiting)
        case Content():
            return Shelved(answer.body, start, answer.body.size if stop is None else stop, answer.verification)
        case bytes():
            return Held(answer.body)
    raise TypeError(answer.body)


def _let_go(answer: Answer) -> None:
    if isinstance(answer.body, Content):
        answer.body.close()


def _wanted(request: Request, etag: str) -> str | None:
    """
    Give the Range header, if it counts: RFC 9110, 13.1.5 and 14.2.
    """
    if request.method != b"GET" or field(request, b"If-Range") not in (None, etag):
        return None
    return field(request, b"Range")


def _first_byte(request: Request, etag: str) -> int:
    """
    Tell the first byte that will be sent, before the size is known; 0 if it depends on that.
    """
    wanted = _wanted(request, etag)
    if wanted is None or wanted.startswith("bytes=-"):
        return 0
    found = parse_range(wanted, _ENDLESS)
    return found[0] if found else 0


def _own_query(route: Route, query: str) -> str:
    """
    Keep of a next page's query what this proxy understands, escaped as it came.
    """
    values = query_values(query)
    names = [name for name in values if name in ("n", "last")] if route.kind is Kind.TAGS else list(values)
    return "&".join(f"{name}={values[name]}" for name in names)


def fields(request: Request, name: bytes) -> list[str]:
    """
    Give the values of a header, which may be any bytes: RFC 9110, 5.5. Asked for by text, Twisted takes them for UTF-8.
    """
    return [value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(name, [])]


def field(request: Request, name: bytes) -> str | None:
    """
    Give the last value of a header.
    """
    values = fields(request, name)
    return values[-1] if values else None


def caller_of(request: Request) -> Caller:
    """
    Tell what is known of who asks.
    """
    transport = request.channel.transport
    # OpenSSL has refused a certificate that is not good, and so the connection, before there was a request.
    certified = ISSLTransport.providedBy(transport) and transport.getPeerCertificate() is not None
    shown = fields(request, b"Authorization")
    return Caller(address(request), certified, shown[0] if len(shown) == 1 else None)


def asker_of(request: Request) -> Asker:
    """
    Tell what a request says beside its route, but for what is secret in it.
    """
    return Asker(
        method=request.method.decode("ascii"),
        target=request.uri.decode("ascii", "replace"),
        scheme="https" if request.isSecure() else "http",
        host=request.getRequestHostname().decode("ascii", "replace"),
        address=address(request),
        headers={
            name.decode("ascii").lower(): b", ".join(values).decode("utf-8", "replace")
            for name, values in request.requestHeaders.getAllRawHeaders()
            if name.lower() not in _SECRET
        },
    )


def begin(request: Request, status: int) -> None:
    """
    Set the status, and the headers that go with it on every answer.
    """
    request.setResponseCode(status)
    if status in _DECORATED:
        request.setHeader("Access-Control-Allow-Origin", "*")
        if request.isSecure():
            request.setHeader("Strict-Transport-Security", HSTS)
    else:
        request.responseHeaders.removeHeader("X-Cache-Status")


def send_small(request: Request, status: int, content_type: str, body: bytes) -> None:
    """
    Send a whole small answer.
    """
    begin(request, status)
    request.setHeader("Content-Type", content_type)
    request.setHeader("Content-Length", str(len(body)))
    if body:
        request.write(body)
    request.finish()


def address(request: http.Request) -> str:
    """
    Name the client; one that came by IPv4 to a socket for both is named by its own address.
    """
    return address_of(request.getClientAddress())


def path(request: http.Request) -> str:
    """
    Name what was asked for, without the query: it may hold secrets.
    """
    return printable(request.uri.partition(b"?")[0][:1000])


def printable(sent: bytes) -> str:
    """
    Write what a client has sent so that it can't pass for anything else in a log.
    """
    text = sent.decode("latin-1")
    return text if text.isascii() and text.isprintable() else text.encode("unicode_escape").decode("ascii")
