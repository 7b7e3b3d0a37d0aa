"""
Pull-through: serve content from the cache, or through it from ECR. Start reading here.

Rules:

- Content with a digest is requested from ECR once per repository, and not again while it is in the cache.
- Content is shared, permission is not. Content that another repository fetched is served only after ECR has confirmed
  that this repository has it too, or if a cached manifest of this one lists it (a I{fact}, see L{cached}).
- Check, then register the flight, with no await in between: between two awaits no other code runs.
- A requested part of a blob is fetched first, then the rest for the cache. If the blob is not stored, only the part is
  passed through: the bucket is asked for these bytes, and for small gaps between several of them.
- What ECR said before a purge is not recorded after it, even if it started a transfer that continues.
- One process per directory downloads a blob, the others follow it: see L{record}. A part that it has not reached yet
  is passed through separately.
- The cache may fail in any way: the upstream response is still passed on.
- Layers of an image are fetched before clients request them: L{reading_ahead} decides which and when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy import tracing
from ecrproxy.answers import Answer, Asked, CacheStatus
from ecrproxy.byte_ranges import Ranges, Span, joined, questions
from ecrproxy.cache.arriving import Left, Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, STALLED_SECONDS, Step
from ecrproxy.cache.writer import Writer
from ecrproxy.cached import Cache
from ecrproxy.flights import Flights
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.lists import Lists
from ecrproxy.manifests import Manifests
from ecrproxy.oci import BLOB_TYPE, Descriptor, Digest, Kind, RegistryError, Route
from ecrproxy.reading_ahead import ReadingAhead, Transfers
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import BlobSource, UnavailableError, is_passed_on, is_passed_on_always
from ecrproxy.registry.race import SLOW_SECONDS, Race
from ecrproxy.registry.upstream import Upstream
from ecrproxy.threads import Disk, on_its_own
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.gaps import SMALLEST_PART, Urgency, Wish
from ecrproxy.transfer.inflow import Lanes
from ecrproxy.transfer.lane import drop
from ecrproxy.transfer.looks import Looks
from ecrproxy.transfer.passing import Passing
from ecrproxy.transfer.unattended import MOST, Unattended

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

log = Logger()
T = TypeVar("T")

Source = tuple[Upstream, Route]
"""A registry, and the route of a blob there."""


class _Carrier(NamedTuple):
    """
    The repository that first requested a blob in flight.

    @ivar purges: number of purges known when ECR was asked; its answer is valid for others until the next purge.
    """

    repository: Repository
    purges: int


class OtherSizeError(UnavailableError):
    """
    A blob's size differs from the known one.

    @ivar certain: whether the known size is ECR's, given with this request; otherwise that may be wrong.
    """

    certain = False


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
    @ivar page: answers a request for tags or referrers, see L{Lists}.
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
        self._upstream, self._cache, self._disk = upstream, cache, disk
        self._lanes, self._call_later = lanes or Lanes(), call_later
        self._openings: Flights[Download | Passing | None] = Flights()
        self._arriving: dict[Digest, Download] = {}
        self._unattended = Unattended(self.transfers, call_later, unattended)
        self._looks = Looks(disk.reading, call_later)
        self._carriers: dict[Digest, _Carrier] = {}
        self._others: dict[Digest, dict[RegistryId, Source]] = {}
        self._refusals: dict[Digest, dict[Repository, RegistryError]] = {}
        self._races: dict[Digest, Callable[[Source], None]] = {}
        self._sizes: Flights[int] = Flights()
        self._manifests = Manifests(upstream, cache, now, call_later, tag_ttl)
        self.page = Lists(upstream, call_later).page
        wanted = Transfers(self.transfers, self._carriers.__contains__, self._has_plenty, self._ask_ahead, self._bring)
        self.ahead = None if ahead is None else ahead(wanted)

    def transfers(self) -> list[Download]:
        """
        Return the transfers in flight from upstream.
        """
        return list(self._arriving.values())

    def carrier(self, digest: Digest) -> Repository | None:
        """
        Return the repository that first requested a blob in flight.
        """
        found = self._carriers.get(digest)
        return None if found is None else found.repository

    def _vouches(self, asked: Asked) -> bool:
        """
        Return True if the same repository started the transfer in flight, and there was no purge since.
        """
        return self._carriers.get(asked.digest) == _Carrier(asked.route.repository, self._cache.purges)

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

    # Blobs.

    async def blob(self, asked: Asked, ranges: Ranges | None = None) -> Answer:
        """
        Return the answer to a request for a blob.

        @param ranges: the requested parts; None for all.
        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        if self.ahead is not None:
            self.ahead.asked_for(asked.digest)
            if not asked.head:
                await self.ahead.opened(asked.digest)
        answer = self._cache.at_hand(asked)
        if answer is not None:
            return answer
        return await (self._blob_head(asked) if asked.head else self._blob(asked, ranges))

    async def _blob(self, asked: Asked, ranges: Ranges | None) -> Answer:
        answer, confirmed, size, said = await self._join_at_once(asked, ranges), False, None, 0
        while answer is None:
            known, content, missing, looked = await self._cache.look_up(asked)
            since = min(looked, said) if confirmed else looked
            size = known.descriptor.size if known and not confirmed else size
            carrier = self.carrier(asked.digest)
            absent = content is None and carrier is None
            self._begin_behind(asked, ranges, size, lacking=content is None)
            allowed = known is not None or confirmed or (content is None and self._vouches(asked))
            try:
                if absent and (ranges is None or size is not None):
                    answer = await self._carry(asked, size, missing, ranges, since, confirmed=confirmed)
                elif absent or not allowed:
                    if content is not None:
                        content.close()
                    (size, said), confirmed = await self._blob_size(asked), True
                elif content is not None:
                    answer = await self._cache.shelved(asked, content, since, confirmed=confirmed)
                else:
                    answer = await self._join(asked, ranges, carrier, size if confirmed else None, since)
            except OtherSizeError as problem:
                if problem.certain:
                    raise
                # If ECR confirmed a size before, the transfer was started without it.
                (size, said), confirmed = (size, said) if confirmed else await self._blob_size(asked), True
            except UnavailableError:
                answer = await self._answer_late(asked, missing)
                if answer is None:
                    raise
        return answer

    async def _answer_late(self, asked: Asked, missing: Reason) -> Answer | None:
        """
        Look up again what upstream can't return, if the disk was too slow before: it may have answered by now.

        @param missing: why the first lookup failed.
        @return: None if the blob isn't there, or it is not known that the repository has it.
        """
        if missing is not Reason.DISK:
            return None
        known, content, _, since = await self._cache.look_up(asked)
        if content is None:
            return None
        if known is not None and not asked.head:
            return await self._cache.shelved(asked, content, since)
        content.close()
        if known is None:
            return None
        return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size)

    async def _join_at_once(self, asked: Asked, ranges: Ranges | None) -> Answer | None:
        """
        Follow an unfinished transfer that the same repository started: the disk has no more of it.
        """
        digest, repository = asked.digest, asked.route.repository
        if not self._vouches(asked):
            return None
        download = self._arriving.get(digest)
        if digest not in self._openings if download is None else download.verified or download.elsewhere:
            return None
        with contextlib.suppress(OtherSizeError):
            return await self._join(asked, ranges, repository, None, self._cache.purges)
        return None

    async def _blob_head(self, asked: Asked) -> Answer:
        known, content, missing, _ = await self._cache.look_up(asked)
        if content is not None:
            content.close()
            if known is not None:
                return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size)
        try:
            size, _ = await self._blob_size(asked)
        except UnavailableError:
            late = await self._answer_late(asked, missing)
            if late is None:
                raise
            return late
        if content is None:
            missing = self._cache.why_missing(asked, missing)
            return Answer(CacheStatus.MISS, missing, BLOB_TYPE, asked.digest, size)
        return Answer(CacheStatus.REVALIDATED, Reason.REPOSITORY_CONFIRMED, BLOB_TYPE, asked.digest, content.size)

    async def _blob_size(self, asked: Asked) -> tuple[int, int]:
        """
        Ask ECR to confirm that the repository has the blob.

        @return: its size in bytes, and the number of purges known when ECR was asked.
        """
        since = self._cache.purges
        size = await self._sizes.join((asked.route, since), lambda: self._upstream(asked.route).blob_size(asked.route))
        self._cache.holds(asked, size, since)
        return size, since

    async def _carry(
        self, asked: Asked, expected: int | None, missing: Reason, ranges: Ranges | None, since: int, *, confirmed: bool
    ) -> Answer | None:
        """
        Start the transfer that concurrent requests for this digest share; None if it has ended since the lookup.

        @param expected: the known size in bytes.
        @param missing: why the transfer is needed.
        @param since: number of purges known when the repository was known to have the blob.
        @param confirmed: whether ECR has just confirmed the size; otherwise it may come from a bucket and be wrong.
        @raise OtherSizeError: if the size differs, or may differ.
        """
        route, digest = asked.route, asked.digest
        try:
            parts = _parts(ranges, expected)
        except LookupError:  # nothing to send, so nothing to fetch
            if not confirmed:
                raise _uncertain() from None
            return Answer(CacheStatus.MISS, missing, BLOB_TYPE, digest, expected)
        self._carriers[digest] = _Carrier(route.repository, since)
        if self.ahead is not None:
            self.ahead.give_way(digest)
        unread = missing is Reason.DISK
        begin = partial(self._open, route, digest, expected, parts, unread=unread, asked=asked)
        try:
            body = await self._openings.join(digest, begin)
        except OtherSizeError as problem:  # reported to those that joined after this
            problem.certain = confirmed
            raise
        if isinstance(body, Passing) and body.is_let_go:
            return await self._alone(asked, parts, expected, confirmed=confirmed)
        if body is None or self.carrier(digest) not in (None, route.repository):
            return None  # that another registry sends it proves nothing about this one
        if isinstance(body, Passing) or not body.kept or body.elsewhere:  # otherwise noted with the file
            self._cache.holds(asked, body.size, since)
        missing = self._cache.why_missing(asked, missing)
        if isinstance(body, Passing) or not body.kept:
            return Answer(CacheStatus.BYPASS, body.unkept, BLOB_TYPE, digest, body.size, body)
        if body.elsewhere:
            return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, body.size, body)
        return Answer(CacheStatus.MISS, missing, BLOB_TYPE, digest, body.size, body)

    async def _join(
        self, asked: Asked, ranges: Ranges | None, carrier: Repository | None, confirmed: int | None, since: int
    ) -> Answer | None:
        """
        Follow the transfer that C{carrier} started; None if the lookup must be repeated.

        @param confirmed: the size in bytes, if ECR has just confirmed it; a transfer has the bucket's size.
        @param since: number of purges known when the repository was known to have the blob.
        @raise OtherSizeError: if the size differs, or may differ.
        """
        digest = asked.digest
        body: Download | Passing | None = self._arriving.get(digest)
        if body is None and digest in self._openings:
            body = await self._begun(asked, carrier)
            carrier = self.carrier(digest) or carrier
        if body is None:
            return None
        if isinstance(body, Download) and body.stopped:
            if digest in self._arriving:  # otherwise it has already ended, which is not announced again
                await self._unattended.change()
            return None
        size = confirmed if confirmed is not None and body.size is not None else body.size
        try:
            parts = _parts(ranges, size)
        except LookupError:
            if confirmed is None:
                raise _uncertain() from None
            return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, size)
        if isinstance(body, Passing) or body.size != size or not _serves(body, parts):
            return await self._alone(asked, parts, size, confirmed=confirmed is not None)
        if confirmed is None:  # otherwise already noted
            self._cache.holds(asked, body.size, since)
        self._add_source(body, asked.route, carrier)
        tracing.link(body.span)
        return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, body.size, body)

    async def _begun(self, asked: Asked, carrier: Repository | None) -> Download | Passing | None:
        """
        Wait for the transfer that is being opened for C{carrier}; None if its outcome proves nothing for this request.
        """
        digest, own = asked.digest, carrier == asked.route.repository
        refusals = self._refusals.get(digest, {})
        self._ask_beside(digest, asked.route, carrier)
        try:
            body = await self._openings.join(digest, lambda: self._open(asked.route, digest, None, []))
        except RegistryError:
            if own:
                raise
            if (refusal := refusals.get(asked.route.repository)) is not None:  # its own registry was asked and refused
                raise refusal from None
            return None  # ECR's answer for another repository proves nothing about this one
        if own and self.carrier(digest) not in (None, carrier):
            return None  # nor does a transfer from another registry
        return body

    def _ask_beside(self, digest: Digest, route: Route, carrier: Repository | None) -> None:
        """
        Let a transfer that is being opened also try the registry of a waiting client, if its own is slow.
        """
        registry, others = route.repository.registry, self._others.get(digest)
        if carrier is not None and carrier.registry != registry and others is not None and registry not in others:
            others[registry] = source = self._upstream(route), route
            if digest in self._races:
                self._races[digest](source)

    def _add_source(self, download: Download, route: Route, carrier: Repository | None) -> None:
        """
        Let a transfer continue from the registry of a client that has joined it, if its own fails.
        """
        registry = route.repository.registry
        if carrier is not None and carrier.registry != registry and registry not in download.others:
            source = self._upstream(route), route
            download.add_source(registry, source)
            if download.digest in self._races:
                self._races[download.digest](source)

    async def _open(
        self,
        route: Route,
        digest: Digest,
        expected: int | None,
        parts: Sequence[Span],
        *,
        unread: bool = False,
        asked: Asked | None = None,
    ) -> Download | Passing | None:
        """
        Open the shared transfer of C{digest}; None if it turns out to be in the cache.

        @param expected: the known size in bytes; known only if the repository has the blob.
        @param parts: the parts needed first. If the blob is not stored, only they are opened, and nothing is shared.
        @param unread: whether the disk could not read the blob: it is then passed through, and not stored.
        @param asked: the client's request, if there is one.
        """
        self._others[digest], self._refusals[digest] = {}, {}
        try:
            claimed = await self._claimed(digest)
            if claimed is Met.CONTENT and unread:
                claimed = Reason.DISK
            if isinstance(claimed, Met):
                self._cache.unclaim(claimed)
                body = None
            elif isinstance(claimed, PeerTransfer):
                body = await self._beside(claimed, route, digest, expected, parts)
            else:
                body = await self._transfer(claimed, route, digest, expected, parts, asked)
        except BaseException:
            self._carriers.pop(digest, None)
            raise
        finally:
            del self._others[digest], self._refusals[digest]
        if not isinstance(body, Download):
            del self._carriers[digest]
        return body

    async def _claimed(self, digest: Digest) -> Claim | PeerTransfer | Met | Reason:
        """
        Claim a digest, or find its owner; wait a while for a process that has no bytes yet.

        Retries back off: ECR may be slow to answer for many blobs at once.
        """
        waited = 0.0
        while (claimed := await self._cache.claim(digest)) is Met.BUSY and waited < STALLED_SECONDS:
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
        self,
        peer: PeerTransfer,
        route: Route,
        digest: Digest,
        expected: int | None,
        parts: Sequence[Span],
    ) -> Download | Passing | None:
        """
        Follow another process's transfer, after ECR has confirmed that the repository has the blob.
        """
        try:
            if expected is None:
                about = route, self._cache.purges
                expected = await self._sizes.join(about, lambda: self._upstream(route).blob_size(route))
        except BaseException:
            self._cache.unclaim(peer)
            raise
        download = Download(
            digest,
            peer.size,
            peer,
            self._disk,
            buffered=self._lanes.buffered,
            call_later=self._call_later,
        )
        if peer.size != expected or not _serves(download, parts):
            self._cache.unclaim(peer)
            return await self._transfer(Reason.PASSED, route, digest, expected, parts)
        download.attendance = self._unattended.settle
        self._arriving[digest] = download
        log.info("Another process brings {digest}: following it", digest=digest)
        on_its_own(self._follow(download, peer, route))
        return download

    async def _follow(self, download: Download, peer: PeerTransfer, route: Route) -> None:
        """
        Follow another process's transfer to its end; finish it if the other process does not.
        """
        try:
            await download.to_the_end(self._follow_on(download, peer, route))
        finally:
            self._cache.used(download.digest)  # unknown to the writer, which may have read it ahead
            self._ended(download)

    async def _follow_on(self, download: Download, peer: PeerTransfer, route: Route) -> None:
        digest, step = download.digest, await download.watch(self._looks.at)
        while step is Step.TAKE_OVER:
            try:
                writer = await self._cache.take_over(peer, digest)
            except OSError:
                step = Step.GO_ALONE
                break
            if writer is not None:
                await self._finish_for(download, writer, route)
                return
            step = await download.watch(self._looks.at)  # another process was faster
        if step is Step.GO_ALONE:
            log.info("{digest} goes on alone: the process that brings it gets no further", digest=digest)
            start = await download.go_alone()
            blob = None if start == download.size else await self._rest(download, route, None, start)
            download.split_off = None if blob is None else partial(self._run_apart, blob)
            await download.run_alone(blob)
        else:
            download.end_beside(step)

    async def _rest(self, download: Download, route: Route, stop: int | None, start: int) -> BlobSource:
        """
        Start to fetch what another process left unfinished, from the first registry; if it fails or is slow, another.
        """

        async def ask(source: Source) -> BlobSource:
            return await source[0].blob(source[1], stop, start)

        sources = [(self._upstream(route), route), *download.others.values()]
        blob = await self._race(download.digest, sources, ask, is_passed_on_always)
        blob.others = download.others
        return blob

    async def _finish_for(self, download: Download, writer: Writer, route: Route) -> None:
        """
        Finish the transfer of a process that has exited.
        """
        start, stop = writer.gaps[0]
        log.info("Taking over {digest} at byte {at}: its writer has exited", digest=writer.digest, at=start)
        download.continue_in(writer)
        self._unattended.settle()  # the readers may have left meanwhile
        blob = await self._rest(download, route, stop, start)
        if blob.size is None:
            blob.size = download.size
        _check_size(blob, download.size)
        lanes = self._lanes.take(writer.missing if blob.ranged else 0)
        download.split_off = partial(self._run_apart, blob)
        try:
            await download.fetch(blob, lanes)
        finally:
            self._lanes.give_back(lanes)

    async def _alone(self, asked: Asked, parts: Sequence[Span], size: int | None, *, confirmed: bool) -> Answer:
        """
        Pass the blob, or parts of it, through to one client: the shared transfer has no file and is elsewhere.

        @param confirmed: whether ECR has just confirmed the size.
        @raise OtherSizeError: if the bucket's size differs.
        """
        wanted: Sequence[tuple[int, int | None]] = questions(parts, ranged=True) or [(0, None)]
        start, stop = wanted[0]
        blob = await self._upstream(asked.route).blob(asked.route, stop, start)
        if parts:
            _check_size(blob, size, certain=confirmed)
        asks = questions(parts, ranged=blob.ranged)
        body: Download | Passing
        if asks:
            body = Passing(asked.digest, blob, Reason.PASSED, self._lanes.buffered, asks)
        else:
            body = self._begin(blob, asked.digest, Reason.PASSED)
        return Answer(CacheStatus.BYPASS, body.unkept, BLOB_TYPE, asked.digest, body.size, body)

    async def _transfer(
        self,
        claim: Claim | Reason,
        route: Route,
        digest: Digest,
        expected: int | None,
        parts: Sequence[Span],
        asked: Asked | None = None,
    ) -> Download | Passing:
        """
        Start the shared transfer of C{digest}: with the parts needed first, or from where an earlier one ended.

        @param claim: the claim, or why the blob is not stored.
        @return: the transfer; already released if it is a part from another registry: each client asks its own.
        """
        left = self._cache.left(claim) if isinstance(claim, Claim) else None
        if left is not None:
            log.info("Going on with {digest} at byte {at} of {size}", digest=digest, at=left.gaps[0][0], size=left.size)
        wanted = joined(parts) or parts
        start, stop = _first_span(left, wanted, self._lanes.first_part(left.size if left else expected))
        since = self._cache.purges
        try:
            given, blob = await self._first(route, digest, stop, start)
            _settle_size(blob, expected, parts)
        except BaseException:
            if isinstance(claim, Claim):
                self._cache.unclaim(claim)
            raise
        if given is not route:
            asked, self._carriers[digest] = None, _Carrier(given.repository, since)
        try:
            file: Writer | Reason
            if isinstance(claim, Claim):
                file = await self._cache.writer(claim, digest, blob.size, since, blob.first.begin, asked)
            else:
                file = claim
        except BaseException:
            drop(blob.first)
            raise
        if isinstance(file, Reason) and (asks := questions(parts, ranged=blob.ranged)):
            passing = Passing(digest, blob, file, self._lanes.buffered, asks)
            if given is not route:
                passing.let_go()
            return passing
        return self._begin(blob, digest, file, shared=True, urgency=_urgency(parts))

    async def _first(self, route: Route, digest: Digest, stop: int | None, start: int) -> tuple[Route, BlobSource]:
        """
        Start to fetch a blob: from its registry or, if that fails or is slow, from that of another waiting client.

        @return: the blob's route at the registry that sends it, and the blob.
        """
        refusals = self._refusals[digest]

        async def ask(source: Source) -> tuple[Route, BlobSource]:
            try:
                return source[1], await source[0].blob(source[1], stop, start)
            except RegistryError as problem:
                refusals[source[1].repository] = problem
                raise

        sources = [(self._upstream(route), route), *self._others.get(digest, {}).values()]
        return await self._race(digest, sources, ask, is_passed_on)

    async def _race(
        self,
        digest: Digest,
        sources: Sequence[Source],
        ask: Callable[[Source], Coroutine[Any, Any, T]],
        passes: Callable[[Failure, int], bool],
    ) -> T:
        """
        Ask registries for a blob: the first and, if it fails or is slow, the others, including those added meanwhile.
        """
        asks = [partial(ask, each) for each in sources]
        race = Race(asks, SLOW_SECONDS, self._call_later, passes, together=True)
        self._races[digest] = lambda source: race.add(partial(ask, source))
        try:
            return await race.won
        finally:
            del self._races[digest]

    def _begin(
        self,
        blob: BlobSource,
        digest: Digest,
        file: Writer | Reason,
        *,
        shared: bool = False,
        urgency: Urgency = Urgency.NOBODY,
        ahead: bool = False,
    ) -> Download:
        """
        Start a transfer, into C{file}; or, if that is a reason, through a window.

        @param ahead: whether it is read ahead.
        """
        writer, unkept = (None, file) if isinstance(file, Reason) else (file, Reason.DISK)
        lanes = self._lanes.take(writer.missing if writer is not None and blob.ranged else 0)
        download = Download(
            digest,
            blob.size,
            writer,
            self._disk,
            lanes,
            unkept=unkept,
            buffered=self._lanes.buffered,
            urgency=urgency,
            call_later=self._call_later,
        )
        download.ahead, blob.others = ahead, download.others
        download.span = tracing.child("download", {"ecrproxy.digest": str(digest), "ecrproxy.read_ahead": ahead})
        download.attendance = partial(self._attend, download, blob)
        download.split_off = partial(self._run_apart, blob)
        if shared:
            self._arriving[digest] = download
        on_its_own(self._run(download, blob, lanes, shared=shared, ahead=ahead))
        self._unattended.settle(download)
        return download

    def _attend(self, download: Download, blob: BlobSource) -> None:
        blob.ahead = download.ahead
        self._unattended.settle()

    def _run_apart(self, blob: BlobSource, download: Download) -> None:
        download.split_off = partial(self._run_apart, blob)
        on_its_own(self._run(download, blob, self._lanes.take(0), shared=False))

    async def _run(
        self, download: Download, blob: BlobSource, lanes: int, *, shared: bool, ahead: bool = False
    ) -> None:
        if download.span is not None:
            tracing.current.set(download.span)
        try:
            await download.run(blob)
        finally:
            if download.span is not None:
                failed = download.failure is not None
                download.span.end({"ecrproxy.received": download.received, "ecrproxy.lanes": lanes}, failed=failed)
            self._lanes.give_back(lanes)
            self._ended(download, shared=shared, ahead=ahead)

    def _ended(self, download: Download, *, shared: bool = True, ahead: bool = False) -> None:
        if shared:
            del self._arriving[download.digest]
            del self._carriers[download.digest]
        self._unattended.settle()
        if self.ahead is not None:
            self.ahead.ended(download) if ahead else self.ahead.go_on()

    # Reading ahead: see L{reading_ahead}.

    def _begin_behind(self, asked: Asked, ranges: Ranges | None, size: int | None, *, lacking: bool) -> None:
        if lacking and self.ahead is not None and not _is_part(ranges, size):
            self.ahead.missed(asked)

    def _has_plenty(self, route: Route, size: int, coming: int) -> bool:
        return self._lanes.has_plenty(size, coming) and self._upstream(route).has_plenty(route)

    async def _ask_ahead(self, route: Route, layer: Descriptor) -> tuple[BlobSource, int]:
        """
        Ask for a layer to read ahead. It is claimed only when its bytes arrive: other processes may get it sooner.

        @return: the blob's source, and the number of purges known when ECR was asked.
        @raise RegistryError: if ECR doesn't have it, or can't return it.
        """
        since = self._cache.purges
        try:
            upstream = self._upstream(route)
        except LookupError as problem:  # after a reload
            raise UnavailableError(503, "UNAVAILABLE", str(problem)) from None
        blob = await upstream.blob(route, self._lanes.first_part(layer.size), ahead=True)
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

    async def _bring(self, route: Route, layer: Descriptor, given: tuple[BlobSource, int]) -> Download | None:
        """
        Start the transfer of a layer to read ahead; None if a client, in any process, has requested it by now.
        """
        digest, file, (blob, since) = layer.digest, None, given
        try:
            claimed = await self._cache.claim(digest)
            if isinstance(claimed, Claim) and digest not in self._carriers:
                file = await self._cache.writer(claimed, digest, blob.size, since)
            else:
                self._cache.unclaim(claimed)
        finally:
            if not isinstance(file, Writer):
                blob.first.drop()
        if not isinstance(file, Writer):
            return None
        if digest in self._carriers:  # a client that requests it waits for the claim
            blob.first.drop()
            self._disk.closing(file.leave).addErrback(lambda problem: log.failure("Letting go", problem))
            return None
        file.asked_for = False
        self._carriers[digest] = _Carrier(route.repository, since)
        return self._begin(blob, digest, file, shared=True, ahead=True)

    # Manifests.

    async def manifest(self, asked: Asked, told: Answer | BaseException | None = None) -> Answer:
        """
        Return the answer to a request for a manifest.

        @param told: an earlier result of L{latest}.
        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        if isinstance(told, BaseException):
            raise told.with_traceback(None)
        return await self._cache.from_file(await self.latest(asked) if told is None else told)

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


def _is_part(ranges: Ranges | None, size: int | None) -> bool:
    """
    Return True if only a part of a blob is, or may be, requested.
    """
    if ranges is None or size is None:
        return ranges is not None
    try:
        return bool(_parts(ranges, size))
    except LookupError:  # no bytes
        return True


def _parts(ranges: Ranges | None, size: int | None) -> list[Span]:
    """
    Return the parts of a blob to send; none for the whole blob, also if a range covers all of it.

    @raise LookupError: if no range overlaps the blob.
    """
    spans = ranges.of(size) if ranges is not None and size is not None else []
    return [] if spans == [(0, size)] else spans


def _uncertain() -> OtherSizeError:
    return OtherSizeError(502, "UNAVAILABLE", "the size of the blob is not certain")


def _settle_size(blob: BlobSource, expected: int | None, parts: Sequence[Span]) -> None:
    """
    Use the manifest's size if the bucket sends none: the client then gets a length, and the cache can store the blob.

    @raise OtherSizeError: if parts are requested and the size differs.
    """
    if blob.size is None:
        blob.size = expected
    if parts:
        _check_size(blob, expected)


def _check_size(blob: BlobSource, expected: int | None, *, certain: bool = False) -> None:
    """
    Check a blob's size before sending parts of it, because parts are not verified here.

    @raise OtherSizeError: if the size differs.
    """
    if blob.size != expected:
        drop(blob.first)
        said = f"a bucket has {blob.size} bytes where a blob of {expected} was asked for"
        problem = OtherSizeError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
        problem.certain = certain
        raise problem


def _serves(download: Download, parts: Sequence[Span]) -> bool:
    """
    Return True if a shared transfer delivers the requested parts as soon as possible.
    """
    if not all(download.nears(start) for start, _ in parts):
        return False
    if not parts or download.kept:
        return download.offers(parts[0][0] if parts else 0)
    return len(parts) == 1 and download.passes(parts[0][0])


def _first_span(left: Left | None, parts: Sequence[Span], part: int | None) -> tuple[int, int | None]:
    """
    Choose the first span of a blob to request: the requested part of what is missing.

    @param part: how many bytes to request at first; None for all.
    """
    gaps = left.gaps if left is not None else [(0, None)]
    for wanted, end in parts:
        for first, last in gaps:
            start, stop = max(wanted, first), end if last is None else min(end, last)
            if start < stop:
                return start, min(stop, start + SMALLEST_PART)
    start, last = gaps[0]
    stops = [stop for stop in (last, None if part is None else start + part) if stop is not None]
    return start, min(stops, default=None)


def _urgency(parts: Sequence[Span]) -> Urgency:
    return Wish(*parts[0]).urgency if parts else Urgency.NOBODY
