"""
The registry and its buckets, as a client sees them: manifests, blobs, tags and referrers over treq.

Rules:

- The token goes to the registry's own origin and nowhere else; redirects are followed here, by hand.
- Requests carry what is listed here and nothing that came from a client.
- An answer that is none is raised as a L{RegistryError}: L{UnavailableError} where ECR is silent or failing, so that
  what the cache has may be served instead; any other where ECR has given its answer and that is it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Protocol
from urllib.parse import SplitResult, urljoin, urlsplit

from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ecrproxy.bucket import ERROR_LIMIT, REDIRECT_STATUSES, Blob, Drop, UnavailableError, describe, header, whole_size
from ecrproxy.ecr import TokenUnavailableError
from ecrproxy.oci import MANIFEST_LIMIT, Digest, Kind, RegistryError, Route, query_values

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

HEADER_SECONDS: Final = 30.0
"""How long an upstream may take for its answer's headers, connecting included."""
REDIRECTS: Final = 5
LIST_LIMIT: Final = 4 * 2**20
"""The most bytes a page of tags or referrers may have: a thousand of the longest tags are 130 KiB."""
TAGS_LIMIT: Final = 1000
"""The most tags ECR lists a page; it refuses to be asked for more (field notes C8)."""

# A 400 with one of these is about the request; any other is how ECR answers a token that it can't read.
_REQUEST_CODES: Final = frozenset(
    {"UNSUPPORTED", "NAME_INVALID", "DIGEST_INVALID", "TAG_INVALID", "MANIFEST_INVALID", "PAGINATION_NUMBER_INVALID"}
)
_NOT_FOUND_CODES: Final = {
    Kind.MANIFEST: "MANIFEST_UNKNOWN",
    Kind.BLOB: "BLOB_UNKNOWN",
    Kind.TAGS: "NAME_UNKNOWN",
    Kind.REFERRERS: "NAME_UNKNOWN",
}
_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


class Tokens(Protocol):
    """
    Where the token comes from: see C{ecr.TokenService}.
    """

    async def get(self) -> str:
        """Return the token."""

    async def renew(self, refused: str) -> str:
        """Return another than C{refused}."""


@dataclass(frozen=True, slots=True)
class Head:
    """
    What ECR says of a manifest without giving it.

    @ivar digest: none if it didn't say.
    """

    media_type: str
    digest: Digest | None
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    A manifest as ECR gave it.
    """

    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """
    A page of tags or referrers.

    @ivar next: the raw query of the next page.
    @ivar filters: the OCI-Filters-Applied header.
    """

    content_type: str
    body: bytes
    next: str | None
    filters: str | None


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


class Upstream:
    """
    One ECR registry and the buckets that it points to.

    @param endpoint: the registry's URL, without a path.
    @param agent: sends the requests.
    """

    def __init__(self, endpoint: str, agent: IAgent, tokens: Tokens, clock: IReactorTime) -> None:
        self._endpoint, self._origin = endpoint, _origin(endpoint)
        self._client = HTTPClient(PlainAgent(agent))
        self._tokens, self.clock = tokens, clock

    async def head_manifest(self, route: Route, accept: str) -> Head:
        """
        Ask which manifest C{route} leads to for a client that takes C{accept}.

        @raise RegistryError: if none, or ECR can't say.
        """
        response = await self._ask("HEAD", route, accept)
        media_type = header(response, "Content-Type") or ""
        if response.request.method != b"HEAD":  # ECR refused the HEAD and answered a GET
            body = await self._read(response, MANIFEST_LIMIT)
            return Head(media_type, Digest.of(body), len(body))
        named = header(response, "Docker-Content-Digest")
        try:
            digest = Digest.parse(named) if named else None
            return Head(media_type, digest, int(header(response, "Content-Length") or "0"))
        except ValueError as problem:
            raise UnavailableError(502, "UNAVAILABLE", f"ECR's answer makes no sense: {problem}") from None

    async def manifest(self, route: Route, accept: str) -> Manifest:
        """
        Fetch a manifest. Its bytes are not verified here.

        @raise RegistryError: if there is none, or ECR can't give it.
        """
        response = await self._ask("GET", route, accept)
        return Manifest(header(response, "Content-Type") or "", await self._read(response, MANIFEST_LIMIT))

    async def blob_size(self, route: Route) -> int:
        """
        Ask whether the repository holds a blob, and how many bytes it has, without fetching it.

        @raise RegistryError: if it doesn't, or ECR can't say.
        """
        response = await self._ask("HEAD", route)
        if response.code in REDIRECT_STATUSES:
            # A presigned URL is signed for GET: only the first byte is asked for.
            response.deliverBody(Drop())
            url = self._target(self._endpoint + route.path, header(response, "Location"))
            _, response = await self.fetch(url, route, "bytes=0-0")
        response.deliverBody(Drop())
        size = whole_size(response)
        if size is None:
            raise UnavailableError(502, "UNAVAILABLE", f"ECR does not say how large {route.reference} is")
        return size

    async def blob(self, route: Route, part: int | None = None) -> Blob:
        """
        Begin to fetch a blob.

        @param part: how many bytes to ask for at first; none for all.
        @raise RegistryError: if there is none, or ECR can't give it.
        """
        blob = Blob(self, route)
        await blob.begin(part)
        return blob

    async def locate(self, route: Route) -> tuple[str, IResponse | None]:
        """
        Ask where a blob lies.

        @return: the URL to ask, or, where ECR itself sends it, that answer.
        @raise RegistryError: if there is none, or ECR can't say.
        """
        response = await self._ask("GET", route)
        url = self._endpoint + route.path
        if response.code not in REDIRECT_STATUSES:
            return url, response
        response.deliverBody(Drop())
        return self._target(url, header(response, "Location")), None

    async def fetch(self, url: str, route: Route, span: str) -> tuple[str, IResponse]:
        """
        Ask for the bytes at C{url}, following redirects. The token stays behind.

        @param span: a Range header, or nothing for all.
        @return: the URL that answered, and its answer.
        """
        headers = Headers({"User-Agent": ["ecrproxy"]})
        if span:
            headers.setRawHeaders("Range", [span])
        for _ in range(REDIRECTS):
            response = await self._request("GET", url, headers)
            if response.code not in REDIRECT_STATUSES:
                return url, response
            response.deliverBody(Drop())
            url = self._target(url, header(response, "Location"))
        raise UnavailableError(502, "UNAVAILABLE", f"ECR redirects more than {REDIRECTS} times for {route.reference}")

    async def page(self, route: Route) -> Page:
        """
        Fetch a page of tags or referrers.

        @raise RegistryError: if there is none, or ECR can't give it.
        """
        response = await self._ask("GET", route, query=upstream_query(route))
        body = await self._read(response, LIST_LIMIT)
        link = _NEXT.search(", ".join(response.headers.getRawHeaders("Link", [])))
        following = urlsplit(link[1]).query if link else None
        content_type = header(response, "Content-Type") or "application/json"
        return Page(content_type, body, following, header(response, "OCI-Filters-Applied"))

    async def _ask(self, method: str, route: Route, accept: str = "", query: str = "") -> IResponse:
        """
        Ask the registry, with one more try after a refresh if it takes the token no more.

        A HEAD that is refused is asked again as GET, for only a body says which refusal it is, and
        some registries know no HEAD (field notes C5).
        """
        url = self._endpoint + route.path + (f"?{query}" if query else "")
        secret = await self._secret(self._tokens.get())
        for last in (False, True):
            response = await self._send(method, url, accept, secret)
            if method == "HEAD" and (response.code in (403, 404, 405) or (last and response.code == 401)):  # noqa: PLR2004
                response.deliverBody(Drop())
                method = "GET"
                response = await self._send(method, url, accept, secret)
            if response.code < 400:  # noqa: PLR2004
                return response
            problem = await self._problem(response)
            if last or not problem.is_about_token:
                problem.raise_for(route)
            secret = await self._secret(self._tokens.renew(secret))
        raise AssertionError("the second turn answers or raises")

    async def _secret(self, asked: Coroutine[object, object, str]) -> str:
        try:
            return await asked
        except TokenUnavailableError as problem:
            raise UnavailableError(
                503, "UNAVAILABLE", f"the proxy has no token for ECR: {problem}", {"Retry-After": "5"}
            ) from None

    async def _send(self, method: str, url: str, accept: str = "", secret: str = "") -> IResponse:
        headers = Headers({"User-Agent": ["ecrproxy"]})
        if accept:
            headers.setRawHeaders("Accept", [accept])
        if secret and _origin(url) == self._origin:
            headers.setRawHeaders("Authorization", [f"Basic {secret}"])
        return await self._request(method, url, headers)

    async def _request(self, method: str, url: str, headers: Headers) -> IResponse:
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

    def _target(self, url: str, location: str | None) -> str:
        """
        Resolve a redirect, if it is one to follow.
        """
        try:
            target = urljoin(url, location or "")
            parts = urlsplit(target)
            _ = parts.port  # which may be none that there is
        except ValueError:
            target, parts = "", urlsplit("")
        steps_down = urlsplit(url).scheme == "https" and parts.scheme != "https"
        if (
            not location
            or not location.isascii()
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or "@" in parts.netloc
            or steps_down
        ):
            raise UnavailableError(502, "UNAVAILABLE", "ECR redirects to where the proxy does not go")
        return target

    async def _problem(self, response: IResponse) -> _Problem:
        body = await self._read(response, ERROR_LIMIT)
        code, message = "", body[:1000].decode("utf-8", "replace")
        try:
            first = json.loads(body)["errors"][0]
            code, message = str(first.get("code", "")), str(first.get("message", ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # a plain text, as ECR sends some: the text is the message then
        challenge = response.headers.hasHeader("WWW-Authenticate")
        return _Problem(response.code, code, message, header(response, "Retry-After"), challenged=challenge)

    async def _read(self, response: IResponse, limit: int) -> bytes:
        collected = _Collect(limit, self.clock)
        response.deliverBody(collected)
        return await collected.whole


@dataclass(frozen=True, slots=True)
class _Problem:
    """
    A refusal in ECR's words.
    """

    status: int
    code: str
    message: str
    retry_after: str | None
    challenged: bool

    @property
    def is_about_token(self) -> bool:
        """
        Tell whether another token may help.

        Expired tokens are a 403 whose message says so, unreadable ones a 400 without challenge; a 403
        of IAM is about permission, which no token changes (field notes C3).
        """
        match self.status:
            case 401:
                return True
            case 400:
                return not self.challenged and self.code not in _REQUEST_CODES
            case 403:
                said = self.message.lower()
                return bool(re.search(r"\btoken\b", said)) and "not authorized to perform" not in said
        return False

    def raise_for(self, route: Route) -> NoReturn:
        """
        Raise what the client is told.
        """
        if self.is_about_token:
            log.error("ECR refuses a fresh token: {status} {said}", status=self.status, said=self.message)
            raise UnavailableError(502, "UNAVAILABLE", "ECR does not accept the proxy's token")
        match self.status:
            case 404:
                raise RegistryError(
                    404, self.code or _NOT_FOUND_CODES[route.kind], self.message or "ECR does not have it"
                )
            case 403:
                log.error("ECR denies {path}: {said}", path=route.path, said=self.message)
                raise RegistryError(
                    403, "DENIED", f"ECR denies the proxy access to {route.repository}; its log says why"
                )
            case 429:
                wait = self.retry_after if self.retry_after and self.retry_after.isdecimal() else "1"
                raise UnavailableError(429, "TOOMANYREQUESTS", "ECR throttles the proxy", {"Retry-After": wait})
            case 400:
                raise RegistryError(400, self.code or "UNSUPPORTED", self.message or "ECR refuses the request")
            case 503 | 504:
                raise UnavailableError(self.status, "UNAVAILABLE", f"ECR answers {self.status}", {"Retry-After": "5"})
        raise UnavailableError(502, "UNAVAILABLE", f"ECR answers {self.status}")


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


def upstream_query(route: Route) -> str:
    """
    Choose what of a client's query goes to ECR, escaped as it came: C{last} is opaque.

    @raise RegistryError: if C{n} is no number.
    """
    values = query_values(route.query)
    if route.kind is not Kind.TAGS:
        values.pop("ns", None)  # containerd's word to mirrors about themselves
        return "&".join(f"{name}={value}" for name, value in values.items() if name.isalnum())
    kept = {name: values[name] for name in ("n", "last") if name in values}
    if "n" in kept:
        if not kept["n"].isdecimal() or not kept["n"].isascii() or len(kept["n"]) > 18:  # noqa: PLR2004
            raise RegistryError(400, "PAGINATION_NUMBER_INVALID", "n is not a number of tags")
        kept["n"] = str(min(int(kept["n"]), TAGS_LIMIT))
    return "&".join(f"{name}={value}" for name, value in kept.items())


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts: SplitResult = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
