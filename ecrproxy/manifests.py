"""
Manifests, by tag and by digest.

Rules:

- ECR is asked for a tag each time, or when its time to live is over; concurrent clients share one request.
  If ECR is not available, the last answer is used; without one, that of a replica of the registry.
- A manifest by digest is requested once per repository, as blobs are: see L{proxy}.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from ecrproxy.answers import Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.entries import Confirmed, Entry
from ecrproxy.cached.cache import Cache
from ecrproxy.documents import Document
from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.manifest_requests import INDEX_SECONDS, ManifestRequests
from ecrproxy.oci import SIGNED_TYPE, Descriptor, RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.race import Race
from ecrproxy.registry.unavailable import RefusedAnswerError, UnavailableError, is_passed_on
from ecrproxy.registry.upstream import Upstream
from ecrproxy.stale import STALE_SECONDS, why_stale
from ecrproxy.threads import on_its_own

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure


REPLICA_SECONDS: Final = STALE_SECONDS + 2 * INDEX_SECONDS
"""How long ECR may take to resolve a tag that is not cached before replicas are asked."""
REPLICAS_SECONDS: Final = 18.0
"""Timeout for replicas after that: the request to ECR ends after 25 s, and containerd waits for 30 s."""
_JOINED = (CacheStatus.JOINED, Reason.IN_FLIGHT)


class Manifests:
    """
    The registries' manifests, through the cache.

    @param upstream: returns the registry of a route.
    @param now: seconds since the epoch.
    @param tag_ttl: seconds for which a tag's digest is served without asking ECR.
    @param call_later: the reactor's C{callLater}.
    """

    def __init__(
        self,
        upstream: Callable[[Route], Upstream],
        cache: Cache,
        now: Callable[[], float],
        call_later: Callable[..., IDelayedCall],
        tag_ttl: float,
    ) -> None:
        self._upstream, self._cache, self._now = upstream, cache, now
        self._call_later, self._tag_ttl = call_later, tag_ttl
        self._requests = ManifestRequests(upstream, cache, now, call_later)
        self._by_tags: Flights[Answer] = Flights(foreseen=RegistryError)

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Return an answer from memory, or None if ECR or the disk is needed.
        """
        if asked.route.digest is not None:
            return self._cache.at_hand(asked)
        entry = self._cache.tags.at_hand(asked) if self._tag_ttl else None
        known = self._trusted(asked, entry) if entry is not None else None
        document = self._cache.bodies.held(known.descriptor.digest) if known is not None else None
        return None if known is None or document is None else _trusted_answer(asked, known, document)

    def knows(self, asked: Asked) -> bool:
        """
        Return True if memory has a tag's last answer for such a client, which ECR then only has to confirm.
        """
        entry = self._cache.tags.at_hand(asked)
        return entry is not None and asked.accept in entry.answers

    async def answer(self, asked: Asked) -> Answer:
        """
        Return the answer to a request for a manifest; its body may still be in a file.

        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        if asked.route.digest is not None:
            return await self._by_digest(asked)
        if not self._upstream(asked.route).replicas:
            return await self._by_tag(asked)
        problem: DeadlineExceededError | UnavailableError = DeadlineExceededError()

        async def own() -> Answer:
            nonlocal problem
            try:  # in a flight of its own: a late answer from ECR is still recorded
                return await self._by_tags.join(object(), partial(self._by_tag, asked))
            except UnavailableError as own_problem:
                problem = own_problem
                raise

        async def theirs() -> Answer:
            descriptor, document = await within(REPLICAS_SECONDS, self._requests.of_replicas(asked), self._call_later)
            reason = why_stale(asked.route, self._upstream(asked.route).name, problem)
            return manifest_answer(CacheStatus.STALE, reason, asked, descriptor, document.body)

        return await Race([own, theirs], REPLICA_SECONDS, self._call_later, _leaves_it_to_others).won

    async def _by_digest(self, asked: Asked) -> Answer:
        if (answer := self.at_hand(asked)) is not None:
            return answer
        found = await self._cache.look_up_manifest(asked)
        if not isinstance(found, Reason):
            return self._cache.answer_with_manifest(asked, *found)
        try:
            return await self._ask_for_digest(asked, found)
        except UnavailableError:  # a slow disk may be able to answer by now
            late = await self._cache.look_up_manifest(asked) if found is Reason.DISK else found
            if isinstance(late, Reason):
                raise
        return self._cache.answer_with_manifest(asked, *late)

    async def _ask_for_digest(self, asked: Asked, found: Reason) -> Answer:
        """
        Ask ECR whether the repository has a manifest, and fetch it if it isn't in the cache.

        @param found: why the lookup failed.
        """
        here = await self._cache.has(asked.digest)
        if not here and not asked.head:
            return await self._fetch_by_digest(asked, found)
        since = self._cache.purges
        head = await self._requests.head_by_digest(asked)
        if head is None:
            raise UnavailableError(
                502, "UNAVAILABLE", f"{self._upstream(asked.route).name} does not say which manifest it has"
            )
        document = await self._cache.bodies.document(asked.digest) if here else None
        if document is None or (head.media_type == SIGNED_TYPE and not document.signed):
            answer = manifest_answer(CacheStatus.MISS, found, asked, head)
            return answer if asked.head else await self._fetch_by_digest(asked, found)
        descriptor = Descriptor(
            self._requests.checked_type(asked, head.media_type, document), asked.digest, len(document.body)
        )
        if since == self._cache.purges:
            on_its_own(self._cache.permissions.record_manifest(asked, descriptor, document, since))
        return manifest_answer(CacheStatus.REVALIDATED, Reason.REPOSITORY_CONFIRMED, asked, descriptor, document.body)

    async def _fetch_by_digest(self, asked: Asked, missing: Reason) -> Answer:
        since = self._cache.purges
        why = (CacheStatus.MISS, missing) if not self._requests.is_fetching(asked) else _JOINED
        descriptor, document = await self._requests.fetch_by_digest(asked)
        if since == self._cache.purges:
            self._cache.permissions.record(asked, descriptor)
        return manifest_answer(*why, asked, descriptor, document.body)

    async def _by_tag(self, asked: Asked) -> Answer:
        entry = await self._cache.tags.entry(asked)
        if (trusted := self._trusted(asked, entry)) is not None:
            document = await self._cache.bodies.document(trusted.descriptor.digest)
            if document is not None:
                return _trusted_answer(asked, trusted, document)
        known = entry.answers.get(asked.accept)
        found = await self._latest(asked, entry)
        if found is None and entry.answers:  # another process may have an answer for such a client
            found = await self._latest(asked, await self._last_known(asked, entry))
        if found is None:
            return await self._ask_for_tag(asked, known)
        try:
            return await within(STALE_SECONDS, self._ask_for_tag(asked, known), self._call_later)
        except (DeadlineExceededError, UnavailableError) as problem:
            found = await self._latest(asked, await self._last_known(asked, entry), found)
            if found is None and isinstance(problem, DeadlineExceededError):  # forgotten or purged meanwhile
                return await self._ask_for_tag(asked, known)
            if found is None:
                raise
            last, document = found
            if isinstance(problem, RefusedAnswerError) and problem.named not in ("", str(last.descriptor.digest)):
                raise  # ECR did answer: the tag has moved
            reason = why_stale(asked.route, self._upstream(asked.route).name, problem)
        return manifest_answer(CacheStatus.STALE, reason, asked, last.descriptor, document.body)

    def _trusted(self, asked: Asked, entry: Entry) -> Confirmed | None:
        """
        Return a tag's answer for a client, if its time to live is not over.
        """
        known = entry.answers.get(asked.accept)
        return known if known is not None and 0 <= self._now() - known.when < self._tag_ttl else None

    async def _last_known(self, asked: Asked, entry: Entry) -> Entry:
        """
        Return what any process knows of a tag; if the disk is slow, what this one knows.
        """
        try:
            return await within(INDEX_SECONDS, self._cache.tags.last_known(asked), self._call_later)
        except DeadlineExceededError:
            return entry

    async def _latest(
        self, asked: Asked, entry: Entry, before: tuple[Confirmed, Document] | None = None
    ) -> tuple[Confirmed, Document] | None:
        """
        Return the last known answer for a client, with its manifest.

        @param before: the result of an earlier call, to avoid reading it again.
        """
        last = entry.latest(asked.accept)
        if last is None or (before is not None and last.descriptor == before[0].descriptor):
            return before if last is not None else None
        document = await self._cache.bodies.document(last.descriptor.digest)
        return None if document is None else (last, document)

    async def _ask_for_tag(self, asked: Asked, known: Confirmed | None) -> Answer:
        """
        Ask ECR to resolve a tag; fetch the manifest if it isn't in the cache.

        A tag that was never requested is fetched directly. A manifest is always fetched by its tag: those that ECR
        converts for a client are not available by digest (docs/ecr.rst).
        """
        head = None
        if known is not None or asked.head:
            since = self._cache.purges
            question, head = await self._requests.head_by_tag(asked)
            document = await self._cache.bodies.document(head.digest) if head is not None else None
            if head is not None and document is not None:
                head = Descriptor(
                    self._requests.checked_type(asked, head.media_type, document), head.digest, len(document.body)
                )
            if head is not None and (document is not None or asked.head):
                on_its_own(self._cache.tags.record(asked, question, head, document, since))
                if document is None:
                    self._requests.name(asked, head.digest)
                    return manifest_answer(CacheStatus.MISS, self._missing(asked, known, head), asked, head)
                return manifest_answer(CacheStatus.REVALIDATED, Reason.TAG_CONFIRMED, asked, head, document.body)
        since = self._cache.purges
        joined = self._requests.is_fetching(asked)
        try:
            question, fetched = await self._requests.fetch_by_tag(asked)
        except RefusedAnswerError as problem:
            if head is not None:  # ECR sends a digest only with HEAD responses: aws/containers-roadmap#1931
                problem.named = str(head.digest)
            raise
        descriptor, document = fetched
        on_its_own(self._cache.tags.record(asked, question, descriptor, None, since))
        missing = self._missing(asked, known, descriptor)
        why = _JOINED if joined else (CacheStatus.MISS, missing)
        return manifest_answer(*why, asked, descriptor, document.body)

    def _missing(self, asked: Asked, known: Confirmed | None, found: Descriptor) -> Reason:
        """
        Return why a tag's manifest is not in the cache, given what was known of the tag.
        """
        if known is not None and known.descriptor.digest != found.digest:
            return Reason.TAG_MOVED
        return self._cache.why_missing(asked, Reason.FIRST_USE if known is None else Reason.NOT_KEPT)


def _leaves_it_to_others(failure: Failure, number: int) -> bool:
    """
    Return True if a failure permits another registry to answer for a tag: an answer or denial by ECR does not.
    """
    if number:
        return failure.check(RegistryError, DeadlineExceededError) is not None
    return is_passed_on(failure, number) and not failure.check(RefusedAnswerError)


def _trusted_answer(asked: Asked, known: Confirmed, document: Document) -> Answer:
    return manifest_answer(CacheStatus.HIT, Reason.TAG_TTL, asked, known.descriptor, document.body)
