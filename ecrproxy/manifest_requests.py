"""
Requests to registries for manifests: shared by concurrent clients, numbered, and with their answers checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from ecrproxy.answers import ANY, Asked
from ecrproxy.cache.memory import Memory
from ecrproxy.cached.cache import Cache
from ecrproxy.documents import Document, is_digest_of
from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.identity import Repository
from ecrproxy.oci import MANIFEST_TYPES, SIGNED_TYPE, Descriptor, Digest, RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.race import SLOW_SECONDS, Race
from ecrproxy.registry.unavailable import RefusedAnswerError, UnavailableError, is_passed_on_always
from ecrproxy.registry.upstream import Upstream
from ecrproxy.threads import on_its_own

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

T = TypeVar("T")

NAMED_SECONDS: Final = 60
"""How long a digest that ECR returned for a tag, but does not find itself, is requested by that tag."""
_NAMED_BYTES = 2**20
"""Bytes of memory for such digests."""
INDEX_SECONDS: Final = 1.0
"""Timeout for the index: to look up a tag known to other processes if ECR is not available, or to forget one."""


class ManifestRequests:
    """
    Asks registries for manifests, by tag and by digest.

    Each request has a number, by which the cache knows which of two answers about a tag is newer.

    @param upstream: returns the registry of a route.
    @param now: seconds since the epoch.
    """

    def __init__(
        self,
        upstream: Callable[[Route], Upstream],
        cache: Cache,
        now: Callable[[], float],
        call_later: Callable[..., IDelayedCall],
    ) -> None:
        self._upstream, self._cache, self._now, self._call_later = upstream, cache, now, call_later
        self._heads: Flights[_Said[Descriptor | None]] = Flights(foreseen=RegistryError)
        self._fetches: Flights[_Said[tuple[Descriptor, Document]]] = Flights(foreseen=RegistryError)
        self._replicas: Flights[tuple[Descriptor, Document]] = Flights(foreseen=RegistryError)
        self._forgetting: Flights[None] = Flights()
        self._question = 0
        self._named: Memory[tuple[Repository, Digest], _Named] = Memory(_NAMED_BYTES)

    def is_fetching(self, asked: Asked) -> bool:
        """
        Return True if the same manifest is being fetched for another client.
        """
        accept = asked.accept if asked.route.digest is None else ANY
        return (asked.route, accept, self._cache.purges) in self._fetches

    async def head_by_digest(self, asked: Asked) -> Descriptor | None:
        """
        Ask whether the repository has a manifest; None if the registry doesn't send its digest.

        @raise RegistryError: if it doesn't have it.
        """
        return await self._of_digest(asked, self._heads, self._head, lambda found: found.digest if found else None)

    async def fetch_by_digest(self, asked: Asked) -> tuple[Descriptor, Document]:
        """
        Fetch a manifest, and store it in the background.

        @raise RegistryError: if the repository doesn't have it.
        """
        return await self._of_digest(asked, self._fetches, self._fetch, lambda found: found[0].digest)

    async def head_by_tag(self, asked: Asked) -> tuple[int, Descriptor | None]:
        """
        Ask for the manifest that a tag leads to; None if the registry doesn't send its digest.

        @return: the request's number, and the answer.
        @raise RegistryError: if there is no such tag.
        """
        return await self._of_tag(asked, self._heads, lambda: self._head(asked.route, asked.accept))

    async def fetch_by_tag(self, asked: Asked) -> tuple[int, tuple[Descriptor, Document]]:
        """
        Fetch the manifest that a tag leads to, and store it in the background.

        @return: the request's number, and the manifest.
        @raise RegistryError: if there is no such tag.
        """
        return await self._of_tag(asked, self._fetches, lambda: self._fetch(asked.route, asked.accept))

    def name(self, asked: Asked, digest: Digest) -> None:
        """
        Remember for C{NAMED_SECONDS} that a tag leads to a digest: see L{head_by_digest}.
        """
        named = _Named(asked.route, asked.accept, self._now())
        self._named.put((asked.route.repository, digest), named, 2 * len(asked.route.path) + 500)

    async def of_replicas(self, asked: Asked) -> tuple[Descriptor, Document]:
        """
        Return a replica's manifest for a tag that is not cached. It may be old, and is not recorded.

        @raise RegistryError: if no replica has it.
        """
        route, accept = asked.route, asked.accept

        async def ask(replica: Upstream) -> tuple[Descriptor, Document]:
            key = route, accept, id(replica)
            return await self._replicas.join(key, partial(self._fetch_from, replica, route, accept))

        asks = [partial(ask, each) for each in self._upstream(route).replicas]
        return await Race(asks, SLOW_SECONDS, self._call_later, is_passed_on_always).won

    async def _of_digest(
        self,
        asked: Asked,
        flights: Flights[_Said[T]],
        ask: Callable[[Route, frozenset[str]], Coroutine[Any, Any, T]],
        digest_of: Callable[[T], Digest | None],
    ) -> T:
        """
        Request a manifest by its digest; if ECR does not find that, by the tag that recently led to it.

        For some seconds after a push, ECR finds tags before digests; and it finds converted manifests only by tag.
        """
        said = await flights.join((asked.route, ANY, self._cache.purges), lambda: self._numbered(ask(asked.route, ANY)))
        named = self._named.get((asked.route.repository, asked.digest))
        lately = named is not None and 0 <= self._now() - named.when < NAMED_SECONDS
        if not isinstance(said.answer, RegistryError) or named is None or not lately:
            return _answered(said)
        tag, accept = named.route, named.accept
        by_tag = await flights.join((tag, accept, self._cache.purges), lambda: self._numbered(ask(tag, accept)))
        if isinstance(by_tag.answer, RegistryError) or digest_of(by_tag.answer) != asked.digest:
            return _answered(said)
        return by_tag.answer

    async def _of_tag(
        self, asked: Asked, flights: Flights[_Said[T]], ask: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[int, T]:
        """
        Ask ECR for a tag, or share a request in flight. Forget a tag that ECR does not have.

        @return: the request's number, and its answer.
        """
        said = await flights.join((asked.route, asked.accept, self._cache.purges), lambda: self._noted(asked, ask()))
        if isinstance(said.answer, RegistryError):
            with contextlib.suppress(DeadlineExceededError):  # a slow disk must not delay ECR's answer
                await within(INDEX_SECONDS, self._forget(asked, said.question), self._call_later)
        return said.question, _answered(said)

    async def _forget(self, asked: Asked, question: int) -> None:
        key = asked.route, asked.key, asked.accept, question
        await self._forgetting.join(key, lambda: self._cache.tags.forget(asked, question))

    async def _noted(self, asked: Asked, question: Coroutine[Any, Any, T]) -> _Said[T]:
        said = await self._numbered(question)
        if isinstance(said.answer, RegistryError):  # even if no client waits any longer
            on_its_own(self._forget(asked, said.question))
        return said

    async def _numbered(self, question: Coroutine[Any, Any, T]) -> _Said[T]:
        number = self._question = max(self._question + 1, round(self._now() * 1e6))
        try:
            return _Said(number, await question)
        except RegistryError as problem:
            if problem.status == 404:  # noqa: PLR2004
                return _Said(number, problem)
            raise

    async def _head(self, route: Route, accept: frozenset[str]) -> Descriptor | None:
        """
        Ask ECR for the descriptor of C{route}; None if ECR has it but doesn't send its digest.
        """
        upstream = self._upstream(route)
        head = await upstream.head_manifest(route, _accept_header(accept))
        asked, told = route.digest, head.digest
        if asked is not None and told is not None and asked != told and asked.algorithm == told.algorithm:
            raise UnavailableError(502, "UNAVAILABLE", f"{upstream.name} speaks of {told} when asked for {asked}")
        digest, media_type = asked or told, head.media_type.partition(";")[0].strip().lower()
        if digest is not None and media_type not in MANIFEST_TYPES:
            raise _no_manifest(upstream.name, ValueError(f"its media type is {media_type[:80]!r}"), head.named)
        if asked is None and media_type == SIGNED_TYPE:
            return None  # told is the digest of what is signed: the cache names it by that of all its bytes
        return Descriptor(media_type, digest, head.size) if digest else None

    async def _fetch(self, route: Route, accept: frozenset[str]) -> tuple[Descriptor, Document]:
        """
        Fetch a manifest, and store it in the background.
        """
        return await self._fetch_from(self._upstream(route), route, accept)

    async def _fetch_from(
        self, upstream: Upstream, route: Route, accept: frozenset[str]
    ) -> tuple[Descriptor, Document]:
        since = self._cache.purges
        manifest = await upstream.manifest(route, _accept_header(accept))
        digest = Digest.of(manifest.body, route.digest.algorithm if route.digest else "sha256")
        kept = route.digest in (None, digest)
        if route.digest is not None and not is_digest_of(route.digest, manifest.body, manifest.content_type):
            said = f"{upstream.name} gave something else than {route.digest}"
            raise RefusedAnswerError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
        held = self._cache.bodies.held(digest)  # one copy in memory for all slow clients
        try:
            document = held if held is not None else await self._cache.bodies.parse(manifest.body, Document.read)
            media_type = document.type_as(manifest.content_type)
        except ValueError as problem:
            raise _no_manifest(upstream.name, problem, manifest.named) from None
        if not kept:  # signed: content is only kept under the digest of all its bytes
            return Descriptor(media_type, route.digest or digest, len(document.body)), document
        descriptor = Descriptor(media_type, digest, len(document.body))
        self._cache.manifests.store(route, descriptor, document, since)
        return descriptor, document

    def checked_type(self, asked: Asked, content_type: str, document: Document) -> str:
        """
        Return the media type of a manifest that the cache has, as the registry names it.

        @raise RefusedAnswerError: if it can't be that.
        """
        try:
            return document.type_as(content_type)
        except ValueError as problem:
            raise _no_manifest(self._upstream(asked.route).name, problem) from None


@dataclass(frozen=True, slots=True)
class _Said(Generic[T]):
    """
    ECR's answer to a request: a result, or a 404.

    @ivar question: the request's number, larger than those of all earlier ones: its time in microseconds since the
        epoch, because other processes send requests, too.
    """

    question: int
    answer: T | RegistryError


@dataclass(frozen=True, slots=True)
class _Named:
    """
    The tag for which ECR returned a digest.

    @ivar accept: the manifest types of the client that asked.
    @ivar when: seconds since the epoch.
    """

    route: Route
    accept: frozenset[str]
    when: float


def _answered(said: _Said[T]) -> T:
    if isinstance(said.answer, RegistryError):
        raise said.answer
    return said.answer


def _accept_header(accept: frozenset[str]) -> str:
    """
    Return an Accept header. "Any type" is spelled out, because some registries ignore C{*/*}.
    """
    return ", ".join(sorted(accept)) or ", ".join([*sorted(MANIFEST_TYPES), "*/*"])


def _no_manifest(registry: str, problem: ValueError, named: str = "") -> RefusedAnswerError:
    said = f"what {registry} gave is no manifest: {problem}"
    refused = RefusedAnswerError(502, "UNAVAILABLE", said, reason=Reason.NO_MANIFEST)
    refused.named = named
    return refused
