"""
Answer requests for blobs: from the cache, from a transfer in flight, or from a new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from ecrproxy import tracing
from ecrproxy.answers import Answer, Asked, CacheStatus
from ecrproxy.blobs.fetches import Carrier, Fetch, Fetches
from ecrproxy.blobs.opening import Opening
from ecrproxy.blobs.parts import OtherSizeError, is_part, parts_of, serves, uncertain
from ecrproxy.byte_ranges import Ranges, Span
from ecrproxy.cached.cache import Cache
from ecrproxy.oci import BLOB_TYPE, RegistryError
from ecrproxy.reading_ahead import ReadingAhead
from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.passing import Passing


class Blobs:
    """
    The registries' blobs, through the cache.

    @param change: waits until a transfer ends, or until readers come or leave.
    @param ahead: reads layers ahead; None if disabled.
    """

    def __init__(
        self,
        cache: Cache,
        fetches: Fetches,
        opening: Opening,
        change: Callable[[], Awaitable[None]],
        ahead: ReadingAhead | None,
    ) -> None:
        self._cache, self._fetches, self._opening = cache, fetches, opening
        self._change, self._ahead = change, ahead

    async def answer(self, asked: Asked, ranges: Ranges | None = None) -> Answer:
        """
        Return the answer to a request for a blob.

        @param ranges: the requested parts; None for all.
        @raise RegistryError: if the repository doesn't have it, or ECR can't return it.
        """
        if self._ahead is not None:
            self._ahead.asked_for(asked.digest)
            if not asked.head:
                await self._ahead.opened(asked.digest)
        answer = self._cache.at_hand(asked)
        if answer is not None:
            return answer
        return await (self._head(asked) if asked.head else self._get(asked, ranges))

    async def _get(self, asked: Asked, ranges: Ranges | None) -> Answer:
        answer, confirmed, size, said = await self._join_at_once(asked, ranges), False, None, 0
        while answer is None:
            known, content, missing, looked = await self._cache.look_up(asked)
            since = min(looked, said) if confirmed else looked
            size = known.descriptor.size if known and not confirmed else size
            absent = content is None and asked.digest not in self._fetches
            self._missed(asked, ranges, size, lacking=content is None)
            allowed = known is not None or confirmed or (content is None and self._vouches(asked))
            try:
                if absent and (ranges is None or size is not None):
                    answer = await self._fetch(asked, size, missing, ranges, since, confirmed=confirmed)
                elif absent or not allowed:
                    if content is not None:
                        content.close()
                    (size, said), confirmed = await self._confirm(asked), True
                elif content is not None:
                    answer = await self._cache.answer_with_content(asked, content, since, confirmed=confirmed)
                else:
                    answer = await self._join(asked, ranges, size if confirmed else None, since)
            except OtherSizeError as problem:
                if problem.certain:
                    raise
                # If ECR confirmed a size before, the transfer was started without it.
                (size, said), confirmed = (size, said) if confirmed else await self._confirm(asked), True
            except UnavailableError:
                answer = await self._answer_late(asked, missing)
                if answer is None:
                    raise
        return answer

    async def _head(self, asked: Asked) -> Answer:
        known, content, missing, _ = await self._cache.look_up(asked)
        if content is not None:
            content.close()
            if known is not None:
                return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size)
        try:
            size, _ = await self._confirm(asked)
        except UnavailableError:
            late = await self._answer_late(asked, missing)
            if late is None:
                raise
            return late
        if content is None:
            missing = self._cache.why_missing(asked, missing)
            return Answer(CacheStatus.MISS, missing, BLOB_TYPE, asked.digest, size)
        return Answer(CacheStatus.REVALIDATED, Reason.REPOSITORY_CONFIRMED, BLOB_TYPE, asked.digest, content.size)

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
            return await self._cache.answer_with_content(asked, content, since)
        content.close()
        if known is None:
            return None
        return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size)

    async def _confirm(self, asked: Asked) -> tuple[int, int]:
        """
        Ask ECR to confirm that the repository has the blob.

        @return: its size in bytes, and the number of purges known when ECR was asked.
        """
        since = self._cache.purges
        size = await self._opening.size_of(asked.route)
        self._cache.permissions.record_blob(asked, size, since)
        return size, since

    def _missed(self, asked: Asked, ranges: Ranges | None, size: int | None, *, lacking: bool) -> None:
        """
        Let the layers after a missing one be read ahead.
        """
        if lacking and self._ahead is not None and not is_part(ranges, size):
            self._ahead.missed(asked)

    def _vouches(self, asked: Asked) -> bool:
        """
        Return True if the same repository started the fetch in flight, and there was no purge since.
        """
        return self._fetches.vouches(asked, self._cache.purges)

    # Fetches.

    async def _fetch(
        self, asked: Asked, expected: int | None, missing: Reason, ranges: Ranges | None, since: int, *, confirmed: bool
    ) -> Answer | None:
        """
        Start the fetch that concurrent requests for this digest share; None if it has ended since the lookup.

        @param expected: the known size in bytes.
        @param missing: why the fetch is needed.
        @param since: number of purges known when the repository was known to have the blob.
        @param confirmed: whether ECR has just confirmed the size; otherwise it may come from a bucket and be wrong.
        @raise OtherSizeError: if the size differs, or may differ.
        """
        repository, digest = asked.route.repository, asked.digest
        try:
            parts = parts_of(ranges, expected)
        except LookupError:  # nothing to send, so nothing to fetch
            if not confirmed:
                raise uncertain() from None
            return Answer(CacheStatus.MISS, missing, BLOB_TYPE, digest, expected)
        fetch = self._fetches.start(digest, Carrier(repository, since))
        if self._ahead is not None:
            self._ahead.give_way(digest)
        unread = missing is Reason.DISK
        try:
            body = await self._opening.join(fetch, asked.route, expected, parts, unread=unread, asked=asked)
        except OtherSizeError as problem:  # reported to those that joined after this
            problem.certain = confirmed
            raise
        if isinstance(body, Passing) and body.is_let_go:
            return await self._alone(asked, parts, expected, confirmed=confirmed)
        if body is None or self._fetches.carrier(digest) not in (None, repository):
            return None  # that another registry sends it proves nothing about this one
        if isinstance(body, Passing) or not body.kept or body.elsewhere:  # otherwise noted with the file
            self._cache.permissions.record_blob(asked, body.size, since)
        missing = self._cache.why_missing(asked, missing)
        if isinstance(body, Passing) or not body.kept:
            return Answer(CacheStatus.BYPASS, body.unkept, BLOB_TYPE, digest, body.size, body)
        if body.elsewhere:
            return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, body.size, body)
        return Answer(CacheStatus.MISS, missing, BLOB_TYPE, digest, body.size, body)

    async def _join_at_once(self, asked: Asked, ranges: Ranges | None) -> Answer | None:
        """
        Follow an unfinished transfer that the same repository started: the disk has no more of it.
        """
        fetch = self._fetches.get(asked.digest)
        if fetch is None or not self._vouches(asked):
            return None
        download = fetch.download
        if asked.digest not in self._opening if download is None else download.verified or download.elsewhere:
            return None
        with contextlib.suppress(OtherSizeError):
            return await self._join(asked, ranges, None, self._cache.purges)
        return None

    async def _join(self, asked: Asked, ranges: Ranges | None, confirmed: int | None, since: int) -> Answer | None:
        """
        Follow the transfer in flight; None if the lookup must be repeated.

        @param confirmed: the size in bytes, if ECR has just confirmed it; a transfer has the bucket's size.
        @param since: number of purges known when the repository was known to have the blob.
        @raise OtherSizeError: if the size differs, or may differ.
        """
        digest, fetch = asked.digest, self._fetches.get(asked.digest)
        if fetch is None:
            return None
        body: Download | Passing | None = fetch.download
        if body is None and digest in self._opening:
            body = await self._begun(asked, fetch)
        if body is None:
            return None
        if isinstance(body, Download) and body.stopped:
            if self._fetches.get(digest) is fetch:  # otherwise it has already ended, which is not announced again
                await self._change()
            return None
        size = confirmed if confirmed is not None and body.size is not None else body.size
        try:
            parts = parts_of(ranges, size)
        except LookupError:
            if confirmed is None:
                raise uncertain() from None
            return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, size)
        if isinstance(body, Passing) or body.size != size or not serves(body, parts):
            return await self._alone(asked, parts, size, confirmed=confirmed is not None)
        if confirmed is None:  # otherwise already noted
            self._cache.permissions.record_blob(asked, body.size, since)
        fetch.also_ask(asked.route)
        tracing.link(body.span)
        return Answer(CacheStatus.JOINED, Reason.IN_FLIGHT, BLOB_TYPE, digest, body.size, body)

    async def _begun(self, asked: Asked, fetch: Fetch) -> Download | Passing | None:
        """
        Wait for the transfer that is being opened; None if its outcome proves nothing for this request.
        """
        carrier, repository, refusals = fetch.carrier.repository, asked.route.repository, fetch.refusals
        fetch.also_ask(asked.route)
        try:
            body = await self._opening.join(fetch, asked.route)
        except RegistryError:
            if carrier == repository:
                raise
            if (refusal := refusals.get(repository)) is not None:  # its own registry was asked and refused
                raise refusal from None
            return None  # ECR's answer for another repository proves nothing about this one
        if carrier == repository and self._fetches.carrier(fetch.digest) not in (None, carrier):
            return None  # nor does a transfer from another registry
        return body

    async def _alone(self, asked: Asked, parts: Sequence[Span], size: int | None, *, confirmed: bool) -> Answer:
        """
        Pass the blob, or parts of it, through to one client: the shared transfer has no file and is elsewhere.

        @param confirmed: whether ECR has just confirmed the size.
        @raise OtherSizeError: if the bucket's size differs.
        """
        body = await self._opening.alone(asked.digest, asked.route, parts, size, confirmed=confirmed)
        return Answer(CacheStatus.BYPASS, body.unkept, BLOB_TYPE, asked.digest, body.size, body)
