"""
Request layers that are read ahead, and start their transfers: see L{reading_ahead}.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.logger import Logger

from ecrproxy.blobs.downloads import Downloads
from ecrproxy.blobs.fetches import Carrier, Fetches
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.writer import Writer
from ecrproxy.cached.cache import Cache
from ecrproxy.oci import Descriptor, Route
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.registry.upstream import Upstream
from ecrproxy.threads import Disk
from ecrproxy.transfer.download import Download

log = Logger()


class LayersAhead:
    """
    What reading ahead needs of registries, cache and downloads.

    @param upstream: returns the registry of a route.
    """

    def __init__(
        self,
        upstream: Callable[[Route], Upstream],
        cache: Cache,
        disk: Disk,
        fetches: Fetches,
        downloads: Downloads,
    ) -> None:
        self._upstream, self._cache, self._disk = upstream, cache, disk
        self._fetches, self._downloads = fetches, downloads

    def has_plenty(self, route: Route, size: int, coming: int) -> bool:
        """
        Return True if half of the connections, memory and quotas are left to clients: see L{Lanes.has_plenty}.
        """
        return self._downloads.lanes.has_plenty(size, coming) and self._upstream(route).has_plenty(route)

    async def ask(self, route: Route, layer: Descriptor) -> tuple[BlobSource, int]:
        """
        Ask for a layer. It is claimed only when its bytes arrive: other processes may get it sooner.

        @return: the blob's source, and the number of purges known when ECR was asked.
        @raise RegistryError: if ECR doesn't have it, or can't return it.
        """
        since = self._cache.purges
        try:
            upstream = self._upstream(route)
        except LookupError as problem:  # after a reload
            raise UnavailableError(503, "UNAVAILABLE", str(problem)) from None
        blob = await upstream.blob(route, self._downloads.lanes.first_part(layer.size), ahead=True)
        try:
            if blob.size is None:
                blob.size = layer.size
            begun = blob.size == layer.size and await blob.first.begin()
        except BaseException:
            blob.first.drop()
            raise
        if not begun:
            blob.first.drop()
            raise UnavailableError(504, "UNAVAILABLE", f"{route.reference} is slow to come, or of another size")
        return blob, since

    async def begin(self, route: Route, layer: Descriptor, given: tuple[BlobSource, int]) -> Download | None:
        """
        Start the transfer of a layer; None if a client, in any process, has requested it by now.

        @param given: the result of L{ask}.
        """
        digest, file, (blob, since) = layer.digest, None, given
        try:
            claimed = await self._cache.claims.take(digest)
            if isinstance(claimed, Claim) and digest not in self._fetches:
                file = await self._cache.claims.writer(claimed, digest, blob.size, since)
            else:
                self._cache.claims.release(claimed)
        finally:
            if not isinstance(file, Writer):
                blob.first.drop()
        if not isinstance(file, Writer):
            return None
        if digest in self._fetches:  # a client that requests it waits for the claim
            blob.first.drop()
            self._disk.closing(file.leave).addErrback(lambda problem: log.failure("Letting go", problem))
            return None
        file.asked_for = False
        fetch = self._fetches.start(digest, Carrier(route.repository, since))
        return self._downloads.begin(blob, digest, file, fetch=fetch, ahead=True)
