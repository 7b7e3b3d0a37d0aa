"""
Prefetch an image within the daemon: request it as a client would, and let the bytes go to the cache.

Rules:

- The code path is that of clients: registries, allowed repositories, quotas, joined transfers. There is no retry
  beyond theirs; what fails is told, and the rest goes on.
- A few prefetches run at once, each with a few blobs at once: clients come first.
- A blob's bytes are followed to the end, not read. What can't be kept is not transferred.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote

from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults
from twisted.logger import Logger

from ecrproxy.answers import ANY, Answer, Asked
from ecrproxy.cache.cache_key import NOBODY, CacheKey
from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.documents import listed
from ecrproxy.identity import Repository
from ecrproxy.oci import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Digest, Kind, RegistryError, Route, parse_route
from ecrproxy.platforms import Offer, Platform, choose, may_hold, offers
from ecrproxy.prefetch_progress import PrefetchProgress
from ecrproxy.proxy import PullThrough
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.lane import ShortBodyError
from ecrproxy.transfer.passing import Passing
from ecrproxy.world import Worlds

if TYPE_CHECKING:
    from twisted.python.failure import Failure

log = Logger()

AT_ONCE: Final = 2
"""Maximum number of prefetches in a process."""
BLOBS_AT_ONCE: Final = 3
"""Blobs of a prefetch that are requested at once: as many as a Docker client does."""
MANIFESTS: Final = 1000
"""Maximum number of manifests of an image, listed or requested."""
BLOBS: Final = 10_000
"""Maximum number of blobs of an image."""
_MOST: Final = 2**40
_FAILURES: Final = (RegistryError, ShortBodyError, DigestMismatchError, ValueError, OSError)


class Prefetch:
    """
    One prefetch; it begins at once.

    @ivar progress: the state at the moment.
    """

    def __init__(self, pull_through: PullThrough, worlds: Worlds, cache_key: CacheKey) -> None:
        self._pull_through, self._worlds, self._cache_key = pull_through, worlds, cache_key
        self.progress = PrefetchProgress()
        self._blobs: dict[Digest, int] = {}
        self._running: Deferred[None] | None = None

    def begin(self, repository: Repository, reference: str, platforms: Collection[str]) -> Deferred[None]:
        """
        Begin.

        @return: fires at the end, whatever that is.
        """
        self._running = Deferred.fromCoroutine(self._run(repository, reference, platforms))
        return self._running.addErrback(self._ended)

    def stop(self) -> None:
        """
        Stop. Transfers that have begun may continue for the cache, as those whose clients have left.
        """
        if self._running is not None:
            self._running.cancel()

    def _ended(self, failure: Failure) -> None:
        if failure.check(FirstError):  # of one of several blobs
            failure = cast(FirstError, failure.value).subFailure
        if failure.check(CancelledError):
            self._fail("stopped")
        elif failure.check(*_FAILURES):
            self._fail(_words(cast(Exception, failure.value)))
        else:
            log.failure("Prefetching", failure)
            self._fail("the proxy failed; its log says why")
        self._note(over=True)

    def _note(self, **changes: Any) -> None:  # noqa: ANN401
        self.progress = replace(self.progress, **changes)

    def _fail(self, problem: str) -> None:
        self._note(missing=self.progress.missing + 1, problem=self.progress.problem or problem)

    async def _run(self, repository: Repository, reference: str, platforms: Collection[str]) -> None:
        wanted = [Platform.parse(each) for each in platforms]
        route = await self._admitted(repository, reference)
        await self._plan(route, wanted)
        left = deque(self._blobs.items())
        await gatherResults(
            [Deferred.fromCoroutine(self._bring_some(route, left)) for _ in range(BLOBS_AT_ONCE)], consumeErrors=True
        )
        self._note(over=True)

    async def _admitted(self, repository: Repository, reference: str) -> Route:
        """
        Return the route of an image, if clients may pull it.

        @raise RegistryError: if they may not.
        """
        world = self._worlds.enter()
        registries = world.registries
        name = registries.called(repository)
        asked = parse_route(f"/v2/{quote(name)}/manifests/{quote(reference)}", registries.default.identity)
        chosen = registries.choose(asked, None, "")
        if chosen.route.repository != repository:
            raise RegistryError(404, "NAME_UNKNOWN", "the repository's registry is not configured")
        within = chosen.registry.table.name if registries.several else ""
        await world.namespaces(chosen.registry).admit(chosen.name, within)
        return chosen.route

    async def _plan(self, route: Route, wanted: Sequence[Platform]) -> None:
        """
        Request the manifests, and note the blobs that they list.
        """
        offered: dict[Digest, Offer] = {}
        indexes: list[tuple[Route, Platform | None]] = [(route, None)]
        noted = {route.digest}
        while indexes:
            at, within = indexes.pop()
            media_type, body = await self._manifest(at)
            found = list(offers(body, within)) if media_type in INDEX_TYPES else []
            self._add(each.descriptor for each in found if not each.is_manifest)
            if media_type not in INDEX_TYPES:
                self._add(_blobs(body, media_type))
            for each in found:
                if each.is_index and each.descriptor.digest not in noted and may_hold(each, wanted):
                    noted.add(each.descriptor.digest)
                    indexes.append((route.at(each.descriptor.digest), each.platform))
            offered |= {each.descriptor.digest: each for each in found if each.is_manifest and not each.is_index}
            if len(offered) + len(noted) > MANIFESTS:
                raise ValueError(f"the image lists more than {MANIFESTS:,} manifests")
        await self._plan_listed(route, choose(offered.values(), wanted) if offered else ())

    async def _plan_listed(self, route: Route, manifests: Iterable[Descriptor]) -> None:
        for each in manifests:
            try:
                media_type, body = await self._manifest(route.at(each.digest))
            except RegistryError as problem:
                self._fail(_words(problem))
            else:
                self._add(_blobs(body, media_type))

    async def _manifest(self, route: Route) -> tuple[str, bytes]:
        asked = Asked(route, self._cache_key.expand(route, NOBODY), MANIFEST_TYPES)
        answer = await self._pull_through.manifest(asked)
        self._note(manifests=self.progress.manifests + 1)
        return answer.media_type, answer.body if isinstance(answer.body, bytes) else b""

    def _add(self, blobs: Iterable[Descriptor]) -> None:
        self._blobs |= {each.digest: each.size for each in blobs}
        if len(self._blobs) > BLOBS:
            raise ValueError(f"the image has more than {BLOBS:,} blobs")
        self._note(of=sum(self._blobs.values()))

    async def _bring_some(self, route: Route, left: deque[tuple[Digest, int]]) -> None:
        while left:
            digest, size = left.popleft()
            try:
                await self._bring(Route(Kind.BLOB, route.repository, str(digest), digest), size)
            except _FAILURES as problem:
                self._fail(_words(problem))

    async def _bring(self, route: Route, size: int) -> None:
        """
        Request a blob, and wait until it has arrived.
        """
        answer = await self._pull_through.blob(Asked(route, self._cache_key.expand(route, NOBODY), ANY))
        if isinstance(answer.body, Download) and answer.body.kept:
            await self._follow(answer.body)
        else:
            let_go(answer)
            if isinstance(answer.body, Download | Passing):
                raise RegistryError(507, "UNAVAILABLE", f"{route.reference} can't be kept: {answer.reason}")
            self._note(there=self.progress.there + size)
        self._note(blobs=self.progress.blobs + 1)

    async def _follow(self, download: Download) -> None:
        """
        Follow a transfer to its end.
        """
        follower = download.follow(0, download.size)
        try:
            while not follower.done:
                if follower.failure is not None:
                    follower.failure.raiseException()
                piece = follower.piece(_MOST)
                if piece is None:
                    news: Deferred[None] = Deferred()
                    follower.listen(lambda news=news: None if news.called else news.callback(None))  # type: ignore[misc]
                    await news
                else:
                    count = piece[2] if isinstance(piece, tuple) else len(piece)
                    follower.sent(count)
                    self._note(there=self.progress.there + count, fetched=self.progress.fetched + count)
        finally:
            follower.close()


class Prefetching:
    """
    Begins prefetches, a few at once.
    """

    def __init__(self, pull_through: PullThrough, worlds: Worlds, cache_key: CacheKey) -> None:
        self._pull_through, self._worlds, self._cache_key = pull_through, worlds, cache_key
        self._running = 0

    def begin(self, repository: Repository, reference: str, platforms: Collection[str]) -> Prefetch:
        """
        Begin a prefetch. Never raises: problems are in its progress.

        @param platforms: those to fetch; all if empty.
        """
        prefetch = Prefetch(self._pull_through, self._worlds, self._cache_key)
        if self._running >= AT_ONCE:
            prefetch.progress = PrefetchProgress(
                missing=1, problem=f"{AT_ONCE} others are running: wait for one", over=True
            )
            return prefetch
        self._running += 1
        prefetch.begin(repository, reference, platforms).addBoth(self._ended)
        return prefetch

    def _ended(self, _: object) -> None:
        self._running -= 1


def let_go(answer: Answer) -> None:
    """
    Release what an answer would have been read from.
    """
    if isinstance(answer.body, Content):
        answer.body.close()
    elif isinstance(answer.body, Download | Passing):
        answer.body.let_go()


def _blobs(manifest: bytes, media_type: str) -> list[Descriptor]:
    return [each for kind, each in listed(manifest, media_type) if kind is Kind.BLOB]


def _words(problem: Exception) -> str:
    return problem.message if isinstance(problem, RegistryError) else str(problem) or type(problem).__name__
