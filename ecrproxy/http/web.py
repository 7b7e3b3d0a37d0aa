"""
The registry's resource, /v2/: routing, and responses from answers.

The channel has parsed the request's target; its path is parsed here, once, by L{oci.parse_route}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Final, cast
from urllib.parse import quote, unquote

from twisted.logger import Logger
from twisted.web.http import NOT_MODIFIED, OK, PARTIAL_CONTENT, REQUESTED_RANGE_NOT_SATISFIABLE
from twisted.web.server import Request

from ecrproxy.access.limits import Crowd
from ecrproxy.answers import Answer, Asked, CacheStatus
from ecrproxy.byte_ranges import Multipart, Ranges, Span, content_range, joined
from ecrproxy.cache.cache_key import NOBODY, CacheKey
from ecrproxy.cache.content import Content
from ecrproxy.cached.bodies import SMALL_BLOB
from ecrproxy.http.answering import Answering, begin, holding, send_body, send_small, send_source, transferring
from ecrproxy.http.conditions import matches
from ecrproxy.http.request import Hit, RegistryRequest, asker_of, field, fields, host_of
from ecrproxy.oci import (
    Kind,
    RegistryError,
    Route,
    accepted_types,
    parse_catalog,
    parse_route,
    passed_on,
    query_values,
    to_query,
)
from ecrproxy.proxy import PullThrough
from ecrproxy.reasons import Reason
from ecrproxy.registries import Chosen, Registries, UnknownRegistryError
from ecrproxy.registry.tag_lists import ListPage
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import InThread, patient
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.passing import Passing
from ecrproxy.transfer.response_body import LEAST_PIECE
from ecrproxy.transfer.sending import piece_size
from ecrproxy.transfer.sources import Held, Parted, Shelved, Source
from ecrproxy.world import World, Worlds

log = Logger()

IMMUTABLE: Final = "max-age=31536000, immutable"
"""Cache-Control of content named by its digest. Without C{public}, shared caches don't store authorized responses."""

_CATALOG: Final = "/v2/_catalog"
_UNCOUNTED: Final = nullcontext()
_REMEMBERED_LENGTH: Final = 512
"""Maximum characters of targets, with the host, whose meaning is cached."""


class Registry(Answering):
    """
    /v2/, the pull side of the distribution protocol.

    @param worlds: the registries, and their allowed repositories.
    """

    def __init__(
        self,
        pull_through: PullThrough,
        worlds: Worlds,
        cache_key: CacheKey,
        in_thread: InThread,
    ) -> None:
        super().__init__()
        self._pull_through, self._worlds = pull_through, worlds
        # 6 MiB at most, thanks to _REMEMBERED_LENGTH: a query may be as long as a request.
        self._recent = lru_cache(maxsize=2048)(self._choose)
        self._recent_of = worlds.latest.registries
        self._cache_key, self._in_thread = cache_key, patient(in_thread)
        self._asks = cache_key.asks

    async def respond(self, request: RegistryRequest) -> None:
        """
        Parse, admit and answer a request.
        """
        if request.target.path in ("/v2", "/v2/"):
            send_small(request, OK, "application/json", b"{}\n")
            return
        if request.target.path == _CATALOG:
            await self._send_catalog(request)
            return
        world = self._worlds.enter(None if request.told is None else request.told.world)
        route = request.route = await self._admitted(request, world)
        if route.kind is Kind.BLOB and request.method == b"GET":
            with transferring(request):
                await self._serve(request, route, world)
        else:
            await self._serve(request, route, world)

    async def _admitted(self, request: RegistryRequest, world: World) -> Route:
        """
        Return the route of a request, if it is valid and allowed.
        """
        try:
            chosen, ns = self._understood(world.registries, request.target.origin, host_of(request))
        except UnknownRegistryError as problem:
            # containerd silently tries the next host, and sends HEAD, whose response has no body.
            log.warn(
                "Refused a client that takes this proxy for a mirror of {registry!r}: add that name to"
                " PROXY_REGISTRY_ALIASES if it is one, or give it a table in the configuration file, else take the"
                " proxy out of the client's hosts.toml for it",
                registry=problem.name,
                once=("ns", problem.name),
            )
            raise
        several = world.registries.several
        request.registry, request.repository, request.several = chosen.asked.label, chosen.called, several
        if ns is not None:
            request.setHeader("OCI-Namespace", ns)
        await world.namespaces(chosen.registry).admit(chosen.name, chosen.registry.table.name if several else "")
        return chosen.route

    def _choose(self, registries: Registries, target: str, host: str) -> tuple[Chosen, str | None]:
        """
        Find out what a target means with the host name C{host}. Return that and the target's C{ns} parameter, if any.
        """
        asked = parse_route(target, registries.default.identity)
        told = _ns(asked.query)
        ns = unquote(told["ns"]) if told else None
        return registries.choose(asked, ns, host), ns

    def _understood(self, registries: Registries, target: str, host: str) -> tuple[Chosen, str | None]:
        if registries is not self._recent_of:
            self._recent.cache_clear()
            self._recent_of = registries
        remembered = len(target) + len(host) <= _REMEMBERED_LENGTH
        choose = self._recent if remembered else self._choose
        return choose(registries, target, host)

    async def _serve(self, request: RegistryRequest, route: Route, world: World) -> None:
        """
        Answer from the cache or upstream.
        """
        told = request.told
        request.upstream.start(None if told is None else told.started)
        hit = False
        try:
            if route.kind in (Kind.TAGS, Kind.REFERRERS):
                await self._send_page(request, route, *await self._pull_through.page(route))
                return
            asked = self._asked(request, route)
            if route.kind is Kind.MANIFEST:
                answer = await self._pull_through.manifest(asked, None if told is None else told.outcome)
            else:
                answer = await self._pull_through.blob(asked, _wanted(request, f'"{route.digest}"'))
            hit = answer.status is CacheStatus.HIT
            request.hit = Hit(asked, answer, world) if hit or answer.reason is Reason.TAG_CONFIRMED else None
        finally:
            request.upstream.stop(counted=not hit)
        await self._send_answer(request, route, answer)

    async def _send_page(
        self, request: RegistryRequest, route: Route, status: CacheStatus, reason: Reason, page: ListPage
    ) -> None:
        if page.next is not None:
            _lead_on(request, {**passed_on(page.next), **_ns(route.query)})
        if page.filters is not None:
            request.setHeader("OCI-Filters-Applied", page.filters)
        request.setHeader("X-Cache-Status", status)
        request.setHeader("X-Cache-Reason", reason)
        await send_body(request, OK, page.content_type, page.body)

    async def _send_catalog(self, request: RegistryRequest) -> None:
        """
        List the default registry's repositories; the others have no list.
        """
        query = request.target.origin.partition("?")[2]
        last, most = parse_catalog(query)
        ns = _ns(query)
        world = self._worlds.enter()
        named = world.registries.named_by(unquote(ns["ns"]) if ns else None, host_of(request))
        if named not in (None, world.registries.default):
            raise RegistryError(404, "UNSUPPORTED", "this proxy lists the repositories of its default registry alone")
        if ns:
            request.setHeader("OCI-Namespace", unquote(ns["ns"]))
        request.upstream.start()
        try:
            names, more = await world.catalog.page(last, most)
        finally:
            request.upstream.stop(counted=True)
        if more:
            _lead_on(request, {"last": quote(names[-1], safe=""), "n": str(most), **ns})
        request.setHeader("X-Cache-Status", CacheStatus.BYPASS)
        request.setHeader("X-Cache-Reason", Reason.LIST)
        await send_body(request, OK, "application/json", json.dumps({"repositories": names}).encode() + b"\n")

    def _asked(self, request: RegistryRequest, route: Route) -> Asked:
        """
        Return the cache's view of a request for content.
        """
        accept = accepted_types(fields(request, b"Accept"))
        # Describing the client costs as much as the cache lookup.
        key = self._cache_key.expand(route, asker_of(request) if self._asks else NOBODY)
        return Asked(route, key, accept, head=request.method == b"HEAD")

    async def _send_answer(self, request: RegistryRequest, route: Route, answer: Answer) -> None:
        """
        Send an answer.

        @raise RegistryError: for an unsatisfiable range, and if too many large responses are being sent.
        """
        with _counted(request, route, answer):
            await self._answer(request, route, answer)

    async def _answer(self, request: RegistryRequest, route: Route, answer: Answer) -> None:
        etag = f'"{answer.digest}"'
        request.setHeader("Docker-Content-Digest", str(answer.digest))
        request.setHeader("ETag", etag)
        request.setHeader("X-Cache-Status", answer.status)
        request.setHeader("X-Cache-Reason", answer.reason)
        if route.digest is None:  # ECR resolves a tag by the client's Accept header
            request.setHeader("Vary", "Accept")
        else:
            request.setHeader("Cache-Control", IMMUTABLE)
        if matches(fields(request, b"If-None-Match"), etag):
            _let_go(answer)
            begin(request, NOT_MODIFIED)
            request.finish()
            return
        request.setHeader("Content-Type", answer.media_type)
        spans = self._choose_spans(request, route, answer, etag)
        if request.code == PARTIAL_CONTENT and not _is_proved(answer):
            request.setHeader("Cache-Control", "no-store")  # the client verifies it; a cache between does not
        if len(spans) > 1:
            await self._send_parts(request, answer, spans)
        else:
            await self._send_span(request, answer, *(spans[0] if spans else (0, answer.size)))
        request.finish()

    async def _send_span(self, request: RegistryRequest, answer: Answer, start: int, stop: int | None) -> None:
        if stop is not None:
            request.setHeader("Content-Length", str(stop - start))
        begin(request, request.code)
        if isinstance(answer.body, bytes) and len(answer.body) <= SMALL_BLOB:
            request.write(answer.body if stop is None else answer.body[start:stop])
        elif answer.body is not None:
            if stop != start:  # an empty response would be complete with its headers: they wait for the digest
                request.write(b"")
            await self._send(request, answer, _source(answer, start, stop, request.upstream))

    async def _send_parts(self, request: RegistryRequest, answer: Answer, spans: Sequence[Span]) -> None:
        frame = Multipart(spans, answer.size or 0, answer.media_type, answer.digest.hex)
        request.setHeader("Content-Type", frame.content_type)
        request.setHeader("Content-Length", str(frame.length))
        begin(request, request.code)
        request.write(b"")
        await self._send(request, answer, _parts(answer, frame, request.upstream))

    async def _send(self, request: RegistryRequest, answer: Answer, source: Source) -> None:
        crowd: Crowd = cast(Any, request.channel).crowd
        counted = request.route is not None and request.route.kind is Kind.BLOB
        held = (lambda: piece_size(crowd.transferring_everywhere)) if counted else (lambda: LEAST_PIECE)
        await send_source(request, source, answer.body, self._in_thread, held)

    @staticmethod
    def _choose_spans(request: RegistryRequest, route: Route, answer: Answer, etag: str) -> list[Span]:
        """
        Return the parts of the answer to send, none for all of it, and set the headers for ranges.
        """
        if answer.size is None:
            return []
        request.setHeader("Accept-Ranges", "bytes")
        ranges = _wanted(request, etag)
        try:
            spans = _sendable(answer.body, ranges.of(answer.size)) if ranges is not None else []
        except LookupError:
            _let_go(answer)
            request.setHeader("Content-Range", f"bytes */{answer.size}")
            raise RegistryError(
                REQUESTED_RANGE_NOT_SATISFIABLE, "RANGE_INVALID", f"{route.reference} has {answer.size} bytes"
            ) from None
        if spans:
            request.setResponseCode(PARTIAL_CONTENT)
        if len(spans) == 1:
            request.setHeader("Content-Range", content_range(spans[0], answer.size))
        return spans


def _lead_on(request: RegistryRequest, values: Mapping[str, str]) -> None:
    """
    Link to the next page. The link is relative, so it keeps the client's address, whatever proxies are between.

    @param values: escaped.
    """
    request.setHeader("Link", f'<{request.target.path}?{to_query(values)}>; rel="next"')


def _ns(query: str) -> dict[str, str]:
    """
    Return the query's C{ns} parameter, the client's name of the registry, still escaped; empty if there is none.
    """
    told = query_values(query).get("ns") if query else None
    return {} if told is None else {"ns": told}


def _counted(request: RegistryRequest, route: Route, answer: Answer) -> AbstractContextManager[None]:
    """
    Count a large response. Those with blobs are already counted as transfers.
    """
    body = answer.body
    if route.kind is Kind.BLOB or body is None or (isinstance(body, bytes) and len(body) <= SMALL_BLOB):
        return _UNCOUNTED
    return _UNCOUNTED if request.method == b"HEAD" else _large(request, answer)


@contextmanager
def _large(request: RegistryRequest, answer: Answer) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            held = isinstance(answer.body, bytes)
            stack.enter_context(holding(request, cast(bytes, answer.body)) if held else transferring(request))
        except RegistryError:
            _let_go(answer)
            raise
        yield


def _source(answer: Answer, start: int, stop: int | None, waiting: Stopwatch) -> Source:
    match answer.body:
        case Download():
            return answer.body.follow(start, stop, waiting)
        case Passing() if stop is not None:
            return answer.body.follow(start, stop, waiting)
        case Content():
            return Shelved(answer.body, start, answer.body.size if stop is None else stop, answer.verification)
        case bytes():
            return Held(answer.body, start, stop)
    raise TypeError(answer.body)


def _sendable(body: object, spans: list[Span]) -> list[Span]:
    """
    Return the spans, or none to send the whole blob: a download serves several spans only if it can fetch them all.
    """
    whole = len(spans) > 1 and isinstance(body, Download) and not (body.kept and joined(spans))
    return [] if whole else spans


def _parts(answer: Answer, frame: Multipart, waiting: Stopwatch) -> Source:
    body = answer.body
    match body:
        case Download():
            together = joined(frame.spans)

            def follow(start: int, stop: int) -> Source:
                if not body.offers(start):
                    raise LookupError(f"byte {start} of {answer.digest} has passed")
                until = next(last for first, last in together if first <= start and stop <= last)
                return body.follow(start, stop, waiting, until)

            return Parted(frame, follow)
        case Passing():
            return Parted(frame, lambda start, stop: body.follow(start, stop, waiting))
        case Content():
            return Parted(
                frame, lambda start, stop: Shelved(body.share(), start, stop, answer.verification), body.close
            )
        case bytes():
            return Parted(frame, lambda start, stop: Held(body, start, stop))
    raise TypeError(body)


def _is_proved(answer: Answer) -> bool:
    """
    Return True if all bytes have been verified.
    """
    return isinstance(answer.body, bytes) or (isinstance(answer.body, Content) and answer.verification is None)


def _let_go(answer: Answer) -> None:
    if isinstance(answer.body, Content):
        answer.body.close()
    elif isinstance(answer.body, Download | Passing):
        answer.body.let_go()


def _wanted(request: Request, etag: str) -> Ranges | None:
    """
    Return the ranges that apply: RFC 9110, 13.1.5 and 14.2.
    """
    if request.method != b"GET" or field(request, b"If-Range") not in (None, etag):
        return None
    return Ranges.parse(field(request, b"Range"))
