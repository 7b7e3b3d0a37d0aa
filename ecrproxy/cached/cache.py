"""
The cache as requests see it: look up answers, and reach the parts that store new ones.

Rules:

- Content that is named by its digest is valid as long as it exists; whether a repository may have it, L{permissions}
  knows. Nothing is read before it is known that the repository may have it.
- Small content is verified each time it is read from the disk, and then held in memory. Larger content is verified
  at its first use, and again when somebody has modified its file: see L{verification}.
- The memory is a copy: it may still serve content that the disk lost; what memory dropped is read again. After a purge,
  see L{purge_count}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from twisted.logger import Logger

from ecrproxy import tracing
from ecrproxy.answers import ANY, Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.content import Content
from ecrproxy.cache.entries import Confirmed, EntryKey
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.record import room_for
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import UNASKED_SECONDS
from ecrproxy.cached.bodies import SMALL_BLOB, SmallBodies
from ecrproxy.cached.claims import Claims
from ecrproxy.cached.entries import EntryCache
from ecrproxy.cached.permissions import Permissions, permission
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.cached.room import Room
from ecrproxy.cached.stored_manifests import StoredManifests
from ecrproxy.cached.tags import Tags
from ecrproxy.cached.verifications import Verifications
from ecrproxy.documents import Document
from ecrproxy.flights import Flights
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, Digest, Kind
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()

_LOOK_UP: Final = "look up in the cache"
_ONLY_HEADS_BYTES = 2**20
"""Bytes of memory for objects that only HEAD requests have asked for."""


class Found(NamedTuple):
    """
    The result of a lookup.

    @ivar known: the confirmation that the repository may have the content.
    @ivar missing: why the content is missing, if it is.
    @ivar since: number of purges noticed when the lookup began.
    """

    known: Confirmed | None
    content: Content | None
    missing: Reason
    since: int


class Cache:
    """
    The cache directory, and the memory in front of it.

    Only the disk can fail here; its errors are logged, never raised.

    @param now: returns seconds since the epoch.
    @param checks: returns True if a registry accepts a manifest only if it has everything that the manifest lists.
    @ivar entries: entries of the index.
    @ivar bodies: manifests and small blobs.
    @ivar permissions: which repositories may have which content.
    @ivar tags: what ECR answered about tags.
    @ivar claims: claims on digests, and the files of transfers.
    @ivar manifests: stores manifests from ECR.
    """

    def __init__(
        self,
        store: Store,
        room: Room,
        disk: Disk,
        now: Callable[[], float],
        checks: Callable[[RegistryId], bool] = lambda _: True,
    ) -> None:
        self.store, self._room, self._disk = store, room, disk
        self._purges = count = PurgeCount()
        self.entries, self.bodies = EntryCache(store, disk, count, now), SmallBodies(store, disk, count)
        self.permissions = Permissions(self.entries, self.bodies, count, now, checks)
        self.tags = Tags(store, disk, self.entries, self.permissions, count, now)
        self.claims = Claims(store, room, disk, self.entries, count)
        self.manifests = StoredManifests(store, room, disk, self.bodies, self.entries, self.permissions, self.claims)
        self._verifications = Verifications(disk.hashing)
        self._only_heads: Memory[tuple[EntryKey, frozenset[str]], bool] = Memory(_ONLY_HEADS_BYTES)
        self._looks: Flights[tuple[Confirmed, Document] | Reason] = Flights()
        if store.files.kept is not None:
            store.files.kept.renew = lambda digest: on_its_own(self._reopen(digest))

    @property
    def purges(self) -> int:
        """
        Return the number of purges noticed. ECR's answers from before the last one are forgotten.
        """
        return self._purges.number

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer a request by digest from memory, or with a file that is already open. The caller must close the body.
        """
        digest, is_manifest = asked.digest, asked.route.kind is Kind.MANIFEST
        document = self.bodies.documents.get(digest) if is_manifest else None
        body = self.bodies.blobs.get(digest) if document is None else document.body
        if body is None and not is_manifest:
            return self._open_at_hand(asked)
        if body is None or (is_manifest and document is None):
            return None
        known = permission(asked, self.entries.at_hand)[0]
        if known is None or (document is not None and not document.may_be(known.descriptor.media_type)):
            return None
        self.store.index.uses.use(digest)
        media_type = known.descriptor.media_type if is_manifest else BLOB_TYPE
        return Answer(CacheStatus.HIT, Reason.CACHED, media_type, digest, len(body), None if asked.head else body)

    def _open_at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer with the file of a blob, if it is already open.
        """
        kept = self.store.files.kept
        known = None if kept is None else permission(asked, self.entries.at_hand)[0]
        content = None if kept is None or known is None else kept.get(asked.digest)
        if content is None:
            return None
        self.store.index.uses.use(asked.digest)
        if asked.head:
            content.close()
        body = None if asked.head else content
        return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size, body)

    async def _reopen(self, digest: Digest) -> None:
        content = await self._opened(digest)
        if content is not None:
            self._keep_open(content)
            content.close()

    def _keep_open(self, content: Content) -> None:
        """
        Keep a large file open for the next request. Small content is in memory.
        """
        if self.store.files.kept is not None and content.size > SMALL_BLOB and not self.store.index.database.unfit:
            self.store.files.kept.keep(content)

    async def look_up(self, asked: Asked) -> Found:
        """
        Check whether the repository may have the content, and open it.
        """
        since = self.purges
        held, missing = permission(asked, self.entries.at_hand)
        try:
            with tracing.part(_LOOK_UP):
                known, content, missing = await self._disk.reading(self._look_up, asked, held, missing)
        except OSError:
            return Found(held, None, Reason.DISK, since)
        if held is None and known is not None:
            self.permissions.hold(asked, known, since)
        if content is not None and asked.route.kind is Kind.BLOB:
            self._keep_open(content)
        if known is None or content is None or known.descriptor.size == content.size or content.proved:
            return Found(known, content, missing, since)
        try:  # somebody may have truncated the file, or the announced size is wrong
            good = await self._verifications.is_good(content)
        except OSError:
            return Found(known, None, Reason.DISK, since)
        return Found(known, content if good else None, missing, since)  # dropping the last reference closes it

    def _look_up(
        self, asked: Asked, known: Confirmed | None, missing: Reason
    ) -> tuple[Confirmed | None, Content | None, Reason]:
        if known is None:
            known, missing = permission(asked, self.store.entry)
        return known, self.store.open(asked.digest), missing

    async def _opened(self, digest: Digest) -> Content | None:
        """
        Open content, whichever repository has it. None if it is missing.
        """
        with contextlib.suppress(OSError):
            return await self._disk.reading(self.store.open, digest)
        return None

    async def has(self, digest: Digest) -> bool:
        """
        Return True if the content exists, whichever repository has it.
        """
        with contextlib.suppress(OSError):
            return await self._disk.reading(self.store.has, digest)
        return False

    async def look_up_manifest(self, asked: Asked) -> tuple[Confirmed, Document] | Reason:
        """
        Read a manifest that the repository may have, or return the reason why the cache can't serve it.

        It is read once, and in memory once, for all simultaneous requests unless a purge is noticed between them.
        """
        since = self.purges

        async def look() -> tuple[Confirmed, Document] | Reason:
            parsed = self.bodies.parsed(asked.digest)
            with tracing.part(_LOOK_UP):
                found = await self._disk.reading(self._look_up_manifest, asked, parsed)
            if not isinstance(found, Reason):
                self.permissions.hold(asked, found[0], since)
                self.bodies.hold_read(asked.digest, found[1], since)
            return found

        try:
            return await self._looks.join((asked.entry_key, asked.accept, since), look)
        except OSError:
            return Reason.DISK

    def _look_up_manifest(self, asked: Asked, parsed: Document | None) -> tuple[Confirmed, Document] | Reason:
        known, missing = permission(asked, self.store.entry)
        document = self.bodies.read_now(asked.digest, parsed) if known is not None else None
        if known is None or document is None:
            return missing
        # Its media type comes from an index that lists it: if the manifest declares another, ECR decides.
        return (known, document) if document.may_be(known.descriptor.media_type) else Reason.FIRST_USE

    def why_missing(self, asked: Asked, reason: Reason) -> Reason:
        """
        Return C{FIRST_USE} instead of C{NOT_KEPT} for objects that only HEADs have asked for: nothing was fetched.
        """
        key = asked.entry_key, asked.accept if asked.route.digest is None else ANY
        if reason is Reason.NOT_KEPT and self._only_heads.get(key):
            reason = Reason.FIRST_USE
        if asked.head and reason is Reason.FIRST_USE:
            self._only_heads.put(key, True, 500 + 100 * len(key[1]))  # noqa: FBT003 (a value)
        else:
            self._only_heads.drop(key)
        return reason

    # Answers

    def answer_with_manifest(self, asked: Asked, known: Confirmed, document: Document) -> Answer:
        """
        Answer with a manifest from the cache directory.
        """
        return manifest_answer(CacheStatus.HIT, Reason.CACHED, asked, known.descriptor, document.body)

    async def answer_from_file(self, answer: Answer) -> Answer:
        """
        Answer with the file of a manifest of more than C{SMALL_BLOB} bytes, if it is cached.

        Otherwise its bytes would stay in memory until the client has received the last of them.
        """
        if not isinstance(answer.body, bytes) or len(answer.body) <= SMALL_BLOB:
            return answer
        content = await self._opened(answer.digest)
        if content is None:
            return answer
        if content.size != len(answer.body) or not content.proved:
            content.close()
            return answer
        return answer._replace(body=content)

    async def answer_with_content(
        self, asked: Asked, content: Content, since: int, *, confirmed: bool = False
    ) -> Answer | None:
        """
        Answer with content that was looked up. Return None if it turns out to be bad.

        @param since: see L{Found}.
        @param confirmed: True if ECR has just confirmed that the repository holds it.
        """
        why = (CacheStatus.HIT, Reason.CACHED)
        if confirmed:
            why = (CacheStatus.REVALIDATED, Reason.REPOSITORY_CONFIRMED)
        if content.size > SMALL_BLOB:
            verification = None if content.proved else self._verifications.of(content)
            return Answer(*why, BLOB_TYPE, asked.digest, content.size, content, verification)
        body = await self.bodies.blob(content, since)
        return None if body is None else Answer(*why, BLOB_TYPE, asked.digest, len(body), body)

    # Prefetching

    @property
    def is_well(self) -> bool:
        """
        Return True if no disk trouble is known.
        """
        return not self.store.troubles.standing()

    @property
    def limit(self) -> int:
        """
        Return the size limit of the cache in bytes.
        """
        return self._room.limit

    async def begin_prefetch(self, digest: Digest, size: int) -> bool:
        """
        Return True if no process has or fetches the content, and it fits without evicting recently used files.

        No other process then prefetches it until L{end_prefetch}.
        """
        with contextlib.suppress(OSError):
            intend = partial(self.store.intend, digest)
            if await undone_if_late(self._disk.reading, intend, lambda _: self.store.intents.release(digest)):
                return await self._room.fits_without(room_for(size), 2 * UNASKED_SECONDS)
        return False

    def end_prefetch(self, digest: Digest) -> None:
        """
        Note that the content has been requested, or will not be.
        """
        releasing = self._disk.closing(self.store.intents.release, digest)
        releasing.addErrback(lambda problem: log.failure("Releasing what was to be prefetched", problem))

    def used(self, digest: Digest) -> None:
        """
        Record a use of content that was fetched before it was requested.
        """
        self.store.index.uses.use(digest)

    async def was_used(self, digest: Digest, since: float) -> bool:
        """
        Return True if any process has used the content since then.
        """
        with contextlib.suppress(OSError):
            known = await self._disk.reading(self.store.index.known, digest)
            return known is not None and known.used >= since
        return False

    def forget_purged(self, news: News) -> None:
        """
        Drop purged items from memory, and everything that is not written yet.
        """
        self._purges.number += 1
        self.entries.forget_purged(news)
        self.bodies.forget_purged(news)
        self.tags.forget_purged()
        self.permissions.forget_purged()
