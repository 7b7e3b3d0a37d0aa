"""
A registry and its buckets, as a client sees them: manifests, blobs, tags and referrers.

Rules:

- The token is sent only to the registry's own origin; redirects are followed here, explicitly.
- Requests have only headers and parameters that are listed here, and nothing else from a client.
- Any other answer than the requested one is raised as a L{RegistryError}: L{UnavailableError} if ECR is silent or
  failing, so that cached answers may be served instead; another if ECR's answer is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import urljoin, urlsplit

from twisted.web.http import NOT_FOUND
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from ecrproxy.documents import index_type, is_digest_of
from ecrproxy.oci import MANIFEST_LIMIT, MANIFEST_TYPES, Digest, Kind, Route, query_values
from ecrproxy.reasons import Reason
from ecrproxy.registry.bodies import discard
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.endpoint import AHEAD_SECONDS, Endpoint, UpstreamReply, UpstreamRequest
from ecrproxy.registry.headers import REDIRECT_STATUSES, header, is_page, told_length
from ecrproxy.registry.links import next_target
from ecrproxy.registry.refusals import NoListError, Refusal, stranger
from ecrproxy.registry.tag_lists import ListPage, TagLists, upstream_query
from ecrproxy.registry.unavailable import RefusedAnswerError, UnavailableError
from ecrproxy.registry.wire import HEADER_SECONDS, Wire

REDIRECTS: Final = 5
LIST_LIMIT: Final = 4 * 2**20
"""Maximum bytes of a page of tags or referrers: a thousand of the longest tags are 130 KiB."""


@dataclass(frozen=True, slots=True)
class Head:
    """
    The headers of a manifest.

    @ivar digest: None if ECR named none.
    @ivar named: the digest that ECR named, unparsed; empty if none.
    """

    media_type: str
    digest: Digest | None
    size: int
    named: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    A manifest from ECR.

    @ivar named: the digest that ECR named, unparsed; empty if none.
    """

    content_type: str
    body: bytes
    named: str


class Upstream:
    """
    A registry and the buckets that it redirects to.

    @param wire: for requests to the buckets.
    @param stall_seconds: seconds within which a blob's body must bring C{TRICKLE} bytes.
    @param follows: whether the registry may redirect manifests and lists as well as blobs, as registry.k8s.io does. ECR
        does not: there, a redirect comes from something else.
    @param lists_referrers: whether the registry supports referrers, as ECR does. From others, a 404 that is not the
        spec's JSON may mean that it does not.
    @ivar name: its name in the log and for clients.
    @ivar replicas: see L{replicas.Replicated}.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        wire: Wire,
        *,
        stall_seconds: float = 30,
        follows: bool = False,
        lists_referrers: bool = True,
    ) -> None:
        self._endpoint, self._wire, self.clock, self.stall_seconds = endpoint, wire, wire.clock, stall_seconds
        self.name, self._follows, self._lists_referrers = wire.name, follows, lists_referrers
        self.replicas: Sequence[Upstream] = ()
        self._tags = TagLists(self._page, self.name, self.clock)

    def leave(self) -> None:
        """
        Note that there are no new requests: the configuration no longer has the registry, or has changed it.
        """
        self._endpoint.leave()

    async def head_manifest(self, route: Route, accept: str) -> Head:
        """
        Request the headers of the manifest that C{route} leads to, for a client that accepts C{accept}.

        By HEAD; if ECR refuses that, by GET, and the digest is computed from the bytes.

        @raise RegistryError: if there is none, or ECR can't answer.
        """
        reply = await self._whole(UpstreamRequest("HEAD", route, accept, limit=MANIFEST_LIMIT))
        response, named = reply.response, header(reply.response, "Docker-Content-Digest") or ""
        if response.request.method == b"HEAD":  # or ECR refused the HEAD, and answered a GET
            media_type, size = header(response, "Content-Type") or "", told_length(response)
            digest = self._told(named) if named else None
            if size and size <= MANIFEST_LIMIT and media_type.partition(";")[0].strip().lower() in MANIFEST_TYPES:
                return Head(media_type, digest, size, named)
            try:
                reply = await self._whole(UpstreamRequest("GET", route, accept, limit=MANIFEST_LIMIT))
            except RefusedAnswerError as problem:
                problem.named = named
                raise
        return Head(header(reply.response, "Content-Type") or "", Digest.of(reply.body), len(reply.body), named)

    async def manifest(self, route: Route, accept: str) -> Manifest:
        """
        Fetch a manifest. Its bytes are not verified here: the caller compares them with ECR's digest.

        @raise RegistryError: if there is none, or ECR can't return it.
        """
        reply = await self._whole(UpstreamRequest("GET", route, accept, limit=MANIFEST_LIMIT))
        named = header(reply.response, "Docker-Content-Digest") or ""
        digest = self._told(named) if named else None
        content_type = header(reply.response, "Content-Type") or ""
        if digest is not None and not is_digest_of(digest, reply.body, content_type):
            said = f"{self.name} calls something else {named}"
            problem = RefusedAnswerError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
            problem.named = named
            raise problem
        return Manifest(content_type, reply.body, named)

    async def blob_size(self, route: Route) -> int:
        """
        Return the size of a blob in bytes, if the repository has it, without fetching it.

        @raise RegistryError: if it doesn't, or ECR can't answer.
        """
        response = (await self._endpoint.ask(UpstreamRequest("HEAD", route))).response
        discard(response, self.clock)
        url = ""
        if response.code in REDIRECT_STATUSES:
            url = self._target(self._endpoint.url + route.path, header(response, "Location"))
        elif response.code == 200 and response.request.method == b"HEAD" and not is_page(response):  # noqa: PLR2004
            size, digest = told_length(response), route.digest
            may_be_empty = digest is None or digest == Digest.of(b"", digest.algorithm)
            if size is not None and (size or may_be_empty):
                return size
        # The HEAD is unusable. A presigned URL is signed for GET only, so request one byte.
        blob = BlobSource(self, route, url)
        await blob.begin(0, 1)
        blob.first.drop()
        if blob.size is None or blob.is_page:
            raise UnavailableError(502, "UNAVAILABLE", f"{self.name} does not say how large {route.reference} is")
        return blob.size

    def has_plenty(self, route: Route) -> bool:
        """
        Return True if a blob may be requested that no client waits for: see L{Endpoint.has_plenty}.
        """
        return self._endpoint.has_plenty(UpstreamRequest("GET", route, ahead=True))

    async def blob(self, route: Route, stop: int | None = None, start: int = 0, *, ahead: bool = False) -> BlobSource:
        """
        Start fetching a blob.

        @param stop: the end of the first range; None for everything.
        @param start: the start of the first range.
        @param ahead: whether no client waits for it. If one comes, the caller sets C{BlobSource.ahead}.
        @raise RegistryError: if there is none, or ECR can't return it.
        """
        blob = BlobSource(self, route, ahead=ahead)
        await blob.begin(start, stop)
        return blob

    async def locate(self, route: Route, span: str = "", *, ahead: bool = False) -> tuple[str, IResponse | None]:
        """
        Return a blob's URL.

        @param span: the Range header, for a registry that sends blobs itself; empty for everything.
        @return: the URL, or the answer if the registry itself sends the blob.
        @raise RegistryError: if there is none, or ECR can't answer.
        """
        response = (await self._endpoint.ask(UpstreamRequest("GET", route, span=span, ahead=ahead))).response
        url = self._endpoint.url + route.path
        if response.code not in REDIRECT_STATUSES:
            return url, response
        discard(response, self.clock)
        return self._target(url, header(response, "Location")), None

    async def fetch(self, url: str, route: Route, span: str, *, ahead: bool = False) -> tuple[str, IResponse]:
        """
        Request bytes from C{url}, following redirects. The token is not sent.

        @param span: a Range header; empty for everything.
        @return: the URL that answered, and its answer.
        """
        headers = Headers({"User-Agent": ["ecrproxy"]})
        if span:
            headers.setRawHeaders("Range", [span])
        tries, seconds = self._wire.tries(), AHEAD_SECONDS if ahead else HEADER_SECONDS
        if ahead:
            tries.give_up()
        for _ in range(REDIRECTS):
            response = await self._wire.persist(tries, partial(self._wire.request, "GET", url, headers, seconds))
            if response.code not in REDIRECT_STATUSES:
                return url, response
            discard(response, self.clock)
            url = self._target(url, header(response, "Location"))
        raise self._endless(route)

    async def pause(self, breaks: int) -> None:
        """
        Wait before requesting again bytes that did not come C{breaks} times in a row.
        """
        await self._wire.pause(breaks)

    async def page(self, route: Route) -> ListPage:
        """
        Fetch a page of tags or referrers; all tags, if the client gives no page size.

        @raise NoListError: if the registry may not support referrers.
        @raise RegistryError: if there is none, or ECR can't return it.
        """
        query = upstream_query(route)
        if route.kind is Kind.TAGS and "n" not in query_values(query):
            return await self._tags.all(route, query)
        return await self._page(route, query)

    async def _page(self, route: Route, query: str) -> ListPage:
        try:
            reply = await self._whole(UpstreamRequest("GET", route, query=query, limit=LIST_LIMIT))
        except NoListError as problem:
            if self._lists_referrers:
                raise stranger(self.name, NOT_FOUND, route) from problem
            raise
        response = reply.response
        links = b", ".join(response.headers.getRawHeaders(b"Link", []))
        link = next_target(links.decode("latin-1"))
        try:
            following = urlsplit(link).query if link is not None else None
        except ValueError:
            said = f"{self.name}'s answer makes no sense: its link to the next page is no URL"
            raise UnavailableError(502, "UNAVAILABLE", said) from None
        content_type = "application/json"  # ECR calls tags text/plain
        if route.kind is Kind.REFERRERS:
            content_type = self._index_type(header(response, "Content-Type") or "", reply.body)
        return ListPage(content_type, reply.body, following, header(response, "OCI-Filters-Applied"))

    async def _whole(self, question: UpstreamRequest) -> UpstreamReply:
        """
        Send a request for the whole; refuse ranges, redirects and empty answers.
        """
        reply = await self._endpoint.ask(question)
        if self._follows and reply.response.code in REDIRECT_STATUSES:
            reply = await self._followed(question, reply.response)
        if reply.response.code != 200:  # noqa: PLR2004
            said = f"{self.name} answers {reply.response.code} where the whole was asked for"
            raise RefusedAnswerError(502, "UNAVAILABLE", said)
        return reply

    async def _followed(self, question: UpstreamRequest, response: IResponse) -> UpstreamReply:
        """
        Follow the registry's redirect. Its token is not sent: if the target requires one, the request is refused.

        @raise RegistryError: if the answer is a refusal, or there is none.
        """
        headers = Headers({"User-Agent": ["ecrproxy"], **({"Accept": [question.accept]} if question.accept else {})})
        method, url, tries = question.method, self._endpoint.url + question.route.path, self._wire.tries()
        for _ in range(REDIRECTS):
            url = self._target(url, header(response, "Location"))
            response = await self._wire.persist(tries, partial(self._wire.request, method, url, headers))
            if response.code >= 400 and method == "HEAD":  # noqa: PLR2004 (only a body says which refusal it is)
                discard(response, self.clock)
                method = "GET"
                response = await self._wire.persist(tries, partial(self._wire.request, method, url, headers))
            if response.code >= 400:  # noqa: PLR2004
                refusal = Refusal.of(response, await self._wire.read_beginning(response), self.name)
                if refusal.is_about_token:
                    there = f"{urlsplit(url).netloc}, which asks for a token of its own"
                    hint = f"make it the endpoint of {self.name}, if it is the registry itself"
                    raise UnavailableError(502, "UNAVAILABLE", f"{self.name} redirects to {there}; {hint}")
                refusal.raise_for(question.route)
            if response.code not in REDIRECT_STATUSES:
                whole = method != "HEAD" and question.limit is not None
                return UpstreamReply(response, await self._wire.read(response, question.limit or 0) if whole else b"")
            discard(response, self.clock)
        raise self._endless(question.route)

    def _endless(self, route: Route) -> UnavailableError:
        said = f"{self.name} redirects more than {REDIRECTS} times for {route.reference}"
        return UnavailableError(502, "UNAVAILABLE", said)

    def _told(self, named: str) -> Digest:
        try:
            return Digest.parse(named)
        except ValueError as problem:
            raise UnavailableError(502, "UNAVAILABLE", f"{self.name}'s answer makes no sense: {problem}") from None

    def _target(self, url: str, location: str | None) -> str:
        """
        Resolve a redirect, if it may be followed.
        """
        target = resolved(url, location)
        if target is None:
            raise UnavailableError(502, "UNAVAILABLE", f"{self.name} redirects to where the proxy does not go")
        return target

    def _index_type(self, content_type: str, body: bytes) -> str:
        try:
            return index_type(content_type, body)
        except ValueError as problem:
            said = f"what {self.name} gave is no list of referrers: {problem}"
            raise UnavailableError(502, "UNAVAILABLE", said) from None


def resolved(url: str, location: str | None) -> str | None:
    """
    Resolve a redirect; None if it may not be followed.
    """
    try:
        target = urljoin(url, location or "")
        parts = urlsplit(target)
        _ = parts.port  # it may be invalid
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
        return None
    return target
