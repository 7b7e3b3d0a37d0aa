"""
The blobs that are being fetched from upstream: one fetch per digest, shared by all requests for it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ecrproxy.answers import Asked
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Digest, RegistryError, Route
from ecrproxy.registry.race import SLOW_SECONDS, Race
from ecrproxy.registry.upstream import Upstream
from ecrproxy.transfer.download import Download

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

T = TypeVar("T")

Source = tuple[Upstream, Route]
"""A registry, and the route of a blob there."""


class Carrier(NamedTuple):
    """
    The repository that first requested a blob in flight.

    @ivar purges: number of purges known when ECR was asked; its answer is valid for others until the next purge.
    """

    repository: Repository
    purges: int


class Fetch:
    """
    One blob that is being fetched, from its first request until the transfer ends.

    @param upstream: returns the registry of a route.
    @ivar carrier: the repository that first requested the blob, or the one whose registry sends it.
    @ivar refusals: errors of the registries that were asked to begin the transfer, by repository.
    @ivar download: the transfer, once it has begun.
    """

    def __init__(
        self,
        digest: Digest,
        carrier: Carrier,
        upstream: Callable[[Route], Upstream],
        call_later: Callable[..., IDelayedCall],
    ) -> None:
        self.digest, self.carrier, self._upstream, self._call_later = digest, carrier, upstream, call_later
        self.refusals: dict[Repository, RegistryError] = {}
        self.download: Download | None = None
        self._others: dict[RegistryId, Source] = {}
        self._add: Callable[[Source], None] | None = None

    def also_ask(self, route: Route) -> None:
        """
        Also ask the registry of a client that waits for this blob, if the others fail or are slow.
        """
        registry, download = route.repository.registry, self.download
        known = self._others if download is None else download.others
        if registry == self.carrier.repository.registry or registry in known:
            return
        source = self._upstream(route), route
        if download is None:
            self._others[registry] = source
        else:
            download.add_source(registry, source)
        if self._add is not None:
            self._add(source)

    async def race(
        self,
        route: Route,
        ask: Callable[[Source], Coroutine[Any, Any, T]],
        passes: Callable[[Failure, int], bool],
    ) -> T:
        """
        Ask the registry of a route for the blob, and if it fails or is slow, those of the other clients that wait.

        @param ask: asks one of them.
        @param passes: returns True if a failure of the registry with that number leaves the answer to the others.
        """
        others: Iterable[Source] = (self._others if self.download is None else self.download.others).values()
        asks = [partial(ask, each) for each in [(self._upstream(route), route), *others]]
        race = Race(asks, SLOW_SECONDS, self._call_later, passes, together=True)
        self._add = lambda source: race.add(partial(ask, source))
        try:
            return await race.won
        finally:
            self._add = None

    def forget_sources(self) -> None:
        """
        Drop the sources and errors that only matter before the transfer begins.
        """
        self._others, self.refusals = {}, {}


class Fetches:
    """
    All fetches in flight. A digest is registered with no await after the check that it is not: see L{proxy}.
    """

    def __init__(self, upstream: Callable[[Route], Upstream], call_later: Callable[..., IDelayedCall]) -> None:
        self._upstream, self._call_later = upstream, call_later
        self._fetches: dict[Digest, Fetch] = {}

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._fetches

    def get(self, digest: Digest) -> Fetch | None:
        """
        Return the fetch of a blob in flight.
        """
        return self._fetches.get(digest)

    def carrier(self, digest: Digest) -> Repository | None:
        """
        Return the repository that first requested a blob in flight.
        """
        found = self._fetches.get(digest)
        return None if found is None else found.carrier.repository

    def vouches(self, asked: Asked, purges: int) -> bool:
        """
        Return True if the same repository started the fetch in flight, and there was no purge since.
        """
        found = self._fetches.get(asked.digest)
        return found is not None and found.carrier == Carrier(asked.route.repository, purges)

    def downloads(self) -> list[Download]:
        """
        Return the transfers in flight, in the order in which they began.
        """
        return [each.download for each in self._fetches.values() if each.download is not None]

    def start(self, digest: Digest, carrier: Carrier) -> Fetch:
        """
        Register a fetch.
        """
        fetch = self._fetches[digest] = Fetch(digest, carrier, self._upstream, self._call_later)
        return fetch

    def begin(self, fetch: Fetch, download: Download) -> None:
        """
        Record that the transfer of a fetch has begun.
        """
        fetch.download = download
        self._fetches[fetch.digest] = self._fetches.pop(fetch.digest)  # they are listed in this order

    def end(self, fetch: Fetch) -> None:
        """
        Forget a fetch, because it could not begin, or its transfer has ended.
        """
        self._fetches.pop(fetch.digest, None)
