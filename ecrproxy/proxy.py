"""
Pull-through: serve content from the cache, or through it from ECR. Start reading here.

Rules:

- Content with a digest is requested from ECR once per repository, and not again while it is in the cache.
- Content is shared, permission is not. Content that another repository fetched is served only after ECR has confirmed
  that this repository has it too, or if a cached manifest of this one lists it (a I{fact}, see L{cached}).
- Check, then register the fetch, with no await in between: between two awaits no other code runs.
- A requested part of a blob is fetched first, then the rest for the cache. If the blob is not stored, only the part is
  passed through: the bucket is asked for these bytes, and for small gaps between several of them.
- What ECR said before a purge is not recorded after it, even if it started a transfer that continues.
- One process per directory downloads a blob, the others follow it: see L{record}. A part that it has not reached yet
  is passed through separately.
- The cache may fail in any way: the upstream response is still passed on.
- Layers of an image are fetched before clients request them: L{reading_ahead} decides which and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ecrproxy.answers import Answer, Asked
from ecrproxy.blobs.ahead import LayersAhead
from ecrproxy.blobs.downloads import Downloads
from ecrproxy.blobs.fetches import Fetches
from ecrproxy.blobs.opening import Opening
from ecrproxy.blobs.peers import Peers
from ecrproxy.blobs.requests import Blobs
from ecrproxy.cached.cache import Cache
from ecrproxy.lists import Lists
from ecrproxy.manifests import Manifests
from ecrproxy.oci import Kind, Route
from ecrproxy.reading_ahead import ReadingAhead, Transfers
from ecrproxy.registry.upstream import Upstream
from ecrproxy.threads import Disk
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.inflow import Lanes
from ecrproxy.transfer.unattended import MOST, Unattended

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall


class PullThrough:
    """
    The registries' content, through the cache.

    @param upstream: returns the registry of a route.
    @param now: seconds since the epoch.
    @param tag_ttl: seconds for which a tag's digest is served without asking ECR.
    @param lanes: the connections for blobs.
    @param ahead: creates the object that reads ahead; None to disable reading ahead.
    @param unattended: limits the transfers that continue without readers.
    @param call_later: the reactor's C{callLater}.
    @ivar ahead: reads layers ahead; None if disabled.
    @ivar blob: answers a request for a blob, see L{Blobs.answer}.
    @ivar page: answers a request for tags or referrers, see L{Lists.page}.
    @ivar transfers: lists the transfers in flight from upstream.
    @ivar carrier: returns the repository that first requested a blob in flight.
    """

    def __init__(
        self,
        upstream: Callable[[Route], Upstream],
        cache: Cache,
        disk: Disk,
        now: Callable[[], float],
        *,
        call_later: Callable[..., IDelayedCall],
        tag_ttl: float = 0,
        lanes: Lanes | None = None,
        ahead: Callable[[Transfers], ReadingAhead] | None = None,
        unattended: int = MOST,
    ) -> None:
        self._cache = cache
        fetches = Fetches(upstream, call_later)
        limit = Unattended(fetches.downloads, call_later, unattended)
        downloads = Downloads(fetches, disk, lanes or Lanes(), limit, call_later, self._ended)
        peers = Peers(fetches, downloads, cache, disk, call_later)
        opening = Opening(upstream, cache, fetches, downloads, peers, call_later)
        layers = LayersAhead(upstream, cache, disk, fetches, downloads)
        wanted = Transfers(fetches.downloads, fetches.__contains__, layers.has_plenty, layers.ask, layers.begin)
        self.ahead = None if ahead is None else ahead(wanted)
        self.blob = Blobs(cache, fetches, opening, limit.change, self.ahead).answer
        self._manifests = Manifests(upstream, cache, now, call_later, tag_ttl)
        self.page = Lists(upstream, call_later).page
        self.transfers, self.carrier = fetches.downloads, fetches.carrier

    def _ended(self, download: Download, ahead: bool) -> None:  # noqa: FBT001 (a callback)
        if self.ahead is not None:
            self.ahead.ended(download) if ahead else self.ahead.go_on()

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Return an answer from memory, or None if upstream or the disk is needed.
        """
        if asked.route.kind is Kind.BLOB:
            return self._cache.at_hand(asked)
        return self._manifests.at_hand(asked)

    def answered_at_hand(self, asked: Asked, answer: Answer) -> None:
        """
        Note that a client was sent an answer from L{at_hand}.
        """
        if self.ahead is not None and asked.route.kind is Kind.BLOB:
            self.ahead.asked_for(asked.digest)
        elif self.ahead is not None and not asked.head:
            self.ahead.again(asked.route, answer.digest)

    async def manifest(self, asked: Asked, told: Answer | BaseException | None = None) -> Answer:
        """
        Return the answer to a request for a manifest.

        @param told: an earlier result of L{latest}.
        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        if isinstance(told, BaseException):
            raise told.with_traceback(None)
        return await self._cache.answer_from_file(await self.latest(asked) if told is None else told)

    def knows_tag(self, asked: Asked) -> bool:
        """
        Return True if memory has a tag's last answer: see L{Manifests.knows}.
        """
        return self._manifests.knows(asked)

    async def latest(self, asked: Asked) -> Answer:
        """
        Return the answer to a request for a manifest, with its bytes.

        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        answer = await self._manifests.answer(asked)
        if self.ahead is not None and isinstance(answer.body, bytes):
            self.ahead.answered(asked.route, answer.digest, answer.body, answer.media_type)
        return answer
