"""
Begin the fetch of a blob: claim its digest, ask a registry for its bytes, and start the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.answers import Asked
from ecrproxy.blobs.downloads import Downloads
from ecrproxy.blobs.fetches import Carrier, Fetch, Fetches, Source
from ecrproxy.blobs.parts import check_size, first_span, settle_size, urgency_of
from ecrproxy.blobs.peers import Peers
from ecrproxy.byte_ranges import Span, joined, questions
from ecrproxy.cache.arriving import Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, STALLED_SECONDS
from ecrproxy.cache.writer import Writer
from ecrproxy.cached.cache import Cache
from ecrproxy.flights import Flights
from ecrproxy.oci import Digest, RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.unavailable import is_passed_on
from ecrproxy.registry.upstream import Upstream
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.lane import drop
from ecrproxy.transfer.passing import Passing

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()


class Opening:
    """
    Opens blobs at their registries: one at a time per digest, shared by all requests; or for one client alone.

    @param upstream: returns the registry of a route.
    """

    def __init__(
        self,
        upstream: Callable[[Route], Upstream],
        cache: Cache,
        fetches: Fetches,
        downloads: Downloads,
        peers: Peers,
        call_later: Callable[..., IDelayedCall],
    ) -> None:
        self._upstream, self._cache, self._fetches, self._call_later = upstream, cache, fetches, call_later
        self._downloads, self._peers = downloads, peers
        self._opening: Flights[Download | Passing | None] = Flights()
        self._sizes: Flights[int] = Flights()

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._opening

    def size_of(self, route: Route) -> Deferred[int]:
        """
        Ask ECR for the size of a blob, in bytes; once for all that ask at the same time.
        """
        return self._sizes.join((route, self._cache.purges), lambda: self._upstream(route).blob_size(route))

    def join(
        self,
        fetch: Fetch,
        route: Route,
        expected: int | None = None,
        parts: Sequence[Span] = (),
        *,
        unread: bool = False,
        asked: Asked | None = None,
    ) -> Deferred[Download | Passing | None]:
        """
        Open the shared transfer of a fetch, or wait for it; None if the blob turns out to be in the cache.

        @param expected: the known size in bytes; known only if the repository has the blob.
        @param parts: the parts needed first. If the blob is not stored, only they are opened, and nothing is shared.
        @param unread: whether the disk could not read the blob: it is then passed through, and not stored.
        @param asked: the client's request, if there is one.
        """
        begin = partial(self._open, fetch, route, expected, parts, unread=unread, asked=asked)
        return self._opening.join(fetch.digest, begin)

    async def _open(
        self,
        fetch: Fetch,
        route: Route,
        expected: int | None,
        parts: Sequence[Span],
        *,
        unread: bool,
        asked: Asked | None,
    ) -> Download | Passing | None:
        try:
            claimed = await self._claimed(fetch.digest)
            if claimed is Met.CONTENT and unread:
                claimed = Reason.DISK
            if isinstance(claimed, Met):
                self._cache.claims.release(claimed)
                body = None
            elif isinstance(claimed, PeerTransfer):
                body = await self._beside(claimed, fetch, route, expected, parts)
            else:
                body = await self._transfer(claimed, fetch, route, expected, parts, asked)
        except BaseException:
            self._fetches.end(fetch)
            raise
        finally:
            fetch.forget_sources()
        if not isinstance(body, Download):
            self._fetches.end(fetch)
        return body

    async def _claimed(self, digest: Digest) -> Claim | PeerTransfer | Met | Reason:
        """
        Claim a digest, or find its owner; wait a while for a process that has no bytes yet.

        Retries back off: ECR may be slow to answer for many blobs at once.
        """
        waited = 0.0
        while (claimed := await self._cache.claims.take(digest)) is Met.BUSY and waited < STALLED_SECONDS:
            pause = max(POLL_SECONDS, waited / 8)
            await self._pause(pause)
            waited += pause
        if claimed is not Met.BUSY:
            return claimed
        log.info("Not kept: {digest}: another process has claimed it, and gets no further", digest=digest)
        return Reason.PASSED

    async def _pause(self, seconds: float) -> None:
        pause: Deferred[None] = Deferred()
        self._call_later(seconds, pause.callback, None)
        await pause

    async def _beside(
        self, peer: PeerTransfer, fetch: Fetch, route: Route, expected: int | None, parts: Sequence[Span]
    ) -> Download | Passing | None:
        """
        Follow another process's transfer, after ECR has confirmed that the repository has the blob.
        """
        try:
            size = await self.size_of(route) if expected is None else expected
        except BaseException:
            self._cache.claims.release(peer)
            raise
        download = self._peers.follow(peer, fetch, route, size, parts)
        if download is None:
            self._cache.claims.release(peer)
            return await self._transfer(Reason.PASSED, fetch, route, size, parts)
        return download

    async def _transfer(
        self,
        claim: Claim | Reason,
        fetch: Fetch,
        route: Route,
        expected: int | None,
        parts: Sequence[Span],
        asked: Asked | None = None,
    ) -> Download | Passing:
        """
        Start the transfer of a fetch: with the parts needed first, or from where an earlier one ended.

        @param claim: the claim, or why the blob is not stored.
        @return: the transfer; already released if it is a part from another registry: each client asks its own.
        """
        left, lanes = self._cache.claims.left(claim) if isinstance(claim, Claim) else None, self._downloads.lanes
        if left is not None:
            said = "Going on with {digest} at byte {at} of {size}"
            log.info(said, digest=fetch.digest, at=left.gaps[0][0], size=left.size)
        start, stop = first_span(left, joined(parts) or parts, lanes.first_part(left.size if left else expected))
        since = self._cache.purges
        try:
            given, blob = await _first(fetch, route, stop, start)
            settle_size(blob, expected, parts)
        except BaseException:
            if isinstance(claim, Claim):
                self._cache.claims.release(claim)
            raise
        if given is not route:
            asked, fetch.carrier = None, Carrier(given.repository, since)
        try:
            file: Writer | Reason
            if isinstance(claim, Claim):
                file = await self._cache.claims.writer(claim, fetch.digest, blob.size, since, blob.first.begin, asked)
            else:
                file = claim
        except BaseException:
            drop(blob.first)
            raise
        if isinstance(file, Reason) and (asks := questions(parts, ranged=blob.ranged)):
            passing = Passing(fetch.digest, blob, file, lanes.buffered, asks)
            if given is not route:
                passing.let_go()
            return passing
        return self._downloads.begin(blob, fetch.digest, file, fetch=fetch, urgency=urgency_of(parts))

    async def alone(
        self, digest: Digest, route: Route, parts: Sequence[Span], size: int | None, *, confirmed: bool
    ) -> Download | Passing:
        """
        Open a blob, or parts of it, for one client: the shared transfer has no file and is elsewhere.

        @param confirmed: whether ECR has just confirmed the size.
        @raise OtherSizeError: if the bucket's size differs.
        """
        wanted: Sequence[tuple[int, int | None]] = questions(parts, ranged=True) or [(0, None)]
        start, stop = wanted[0]
        blob = await self._upstream(route).blob(route, stop, start)
        if parts:
            check_size(blob, size, certain=confirmed)
        if asks := questions(parts, ranged=blob.ranged):
            return Passing(digest, blob, Reason.PASSED, self._downloads.lanes.buffered, asks)
        return self._downloads.begin(blob, digest, Reason.PASSED)


async def _first(fetch: Fetch, route: Route, stop: int | None, start: int) -> tuple[Route, BlobSource]:
    """
    Start to fetch a blob: from its registry or, if that fails or is slow, from that of another waiting client.

    @return: the blob's route at the registry that sends it, and the blob.
    """
    refusals = fetch.refusals

    async def ask(source: Source) -> tuple[Route, BlobSource]:
        try:
            return source[1], await source[0].blob(source[1], stop, start)
        except RegistryError as problem:
            refusals[source[1].repository] = problem
            raise

    return await fetch.race(route, ask, is_passed_on)
