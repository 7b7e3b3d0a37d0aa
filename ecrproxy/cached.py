"""
The cache as requests see it: look up answers, and store new ones.

Rules:

- Content that is named by its digest is valid as long as it exists. A repository may have it if ECR said so: in reply
  to a request with the same cache key, or through a manifest of the repository that lists it (a I{fact}), if the
  registry accepts manifests only with everything that they list, as ECR does.
  Both apply to one registry, one repository, and one kind: a layer that a repository holds is not a manifest of it.
- Nothing is read before it is known that the repository may have it.
- Small content is verified each time it is read from the disk, and then held in memory. Larger content is verified
  at its first use, and again when somebody has modified its file: see L{verification}.
- ECR's answers about one tag take effect in the order of their requests, by any process. The number of a request is
  its time in microseconds since the epoch; its answer counts as of then.
- The memory is a copy: it may still serve content that the disk lost; what memory dropped is read again. If a purge is
  noticed during a read or write, the result is not held in memory, because it may be from before the purge. Nor is it
  written after that. Pending writes are then forgotten: they were on nobody's list of what to purge.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Final, NamedTuple, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy import tracing
from ecrproxy.answers import ANY, Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.arriving import Left, Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import Content, DigestMismatchError, UnreadError
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.record import Reservation, room_for
from ecrproxy.cache.store import Store
from ecrproxy.cache.verification import Verification
from ecrproxy.cache.writer import UNASKED_SECONDS, Writer
from ecrproxy.documents import Document, listed
from ecrproxy.flights import Flights
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import BLOB_TYPE, MANIFEST_TYPES, Descriptor, Digest, Kind, Route
from ecrproxy.ordering import KeyedLocks, Order, Places
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()
T = TypeVar("T")

Facts = Sequence[tuple[EntryKey, Entry]]
_LOOK_UP: Final = "look up in the cache"
FACTS: Final = 1000
"""Maximum number of facts from one manifest, itself included. ECR confirms the rest on request."""
_UNWRITTEN_SECONDS = 60
"""Seconds that an unchanged confirmation, or renewed facts of a manifest, stay in memory only."""
_BODIES_BYTES = 32 * 2**20
_ENTRIES_BYTES = 8 * 2**20
"""Bytes of memory for manifests, for small blobs, and for entries."""
_ORDERS_BYTES = 2**20
_ORDER_BYTES = 2**10
"""Bytes of memory for the order of ECR's answers about tags, which matters for the seconds that a request takes."""
_ONLY_HEADS_BYTES = 2**20
"""Bytes of memory for objects that only HEAD requests have asked for."""
_WRITTEN_BYTES = 2**20
"""Bytes of memory for tags that were recently written to the index."""
_LEARNT_BYTES = 2**20
"""Bytes of memory for manifests that recently gave facts."""
_OWN_TYPES_BYTES = 2**20
"""Bytes of memory for the media types that manifests declare, so that those read again are not parsed again."""
_STORING_BYTES = 64 * 2**20
"""Bytes of memory for manifests, and what they list, that wait for a slow disk."""
SMALL_BLOB = 64 * 2**10
"""Maximum size in bytes of blobs held in memory, such as image configs. Larger manifests are parsed in a thread."""
VERIFICATIONS = 4
"""Maximum number of hashing steps at the same time."""


class Room(Protocol):
    """
    Keeps the cache within its limit: see C{janitor.Janitor}.

    @ivar limit: in bytes.
    """

    limit: int

    def fits(self, size: int) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting anything.
        """

    async def can_hold(self, size: int) -> bool:
        """
        Return True if C{size} bytes are within the limit if all else is evicted.
        """

    async def fits_without(self, size: int, seconds: float) -> bool:
        """
        Return True if C{size} bytes fit without evicting files used within the last C{seconds}.

        @raise OSError: if the index can't be read.
        """

    def is_prompt(self, size: int) -> bool:
        """
        Return True if L{make_room} will not have to wait for the index.
        """

    async def reserve(self, what: Reservation, size: int) -> bool:
        """
        Make room as L{make_room} does, and wait briefly for it.

        @raise OSError: if the index fails, or takes too long.
        """

    def make_room(self, what: Reservation, size: int) -> bool:
        """
        Make room for C{size} bytes to arrive, if possible; it is released with that file. May block.

        @raise OSError: if the index fails.
        """


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
    """

    def __init__(
        self,
        store: Store,
        room: Room,
        disk: Disk,
        now: Callable[[], float],
        checks: Callable[[RegistryId], bool] = lambda _: True,
    ) -> None:
        self.store, self._room, self._disk, self._now, self._checks = store, room, disk, now, checks
        self._blobs: Memory[Digest, bytes] = Memory(_BODIES_BYTES)
        self._documents: Memory[Digest, Document] = Memory(_BODIES_BYTES)
        self._own_types: Memory[Digest, Document] = Memory(_OWN_TYPES_BYTES)
        self._locks = KeyedLocks()
        self._orders: Memory[EntryKey, Order] = Memory(_ORDERS_BYTES)
        self._entries: Memory[EntryKey, Entry] = Memory(_ENTRIES_BYTES)
        self._learnt: Memory[tuple[Repository, Descriptor], float] = Memory(_LEARNT_BYTES)
        self._only_heads: Memory[tuple[EntryKey, frozenset[str]], bool] = Memory(_ONLY_HEADS_BYTES)
        self._written: Memory[tuple[EntryKey, frozenset[str]], float] = Memory(_WRITTEN_BYTES)
        self._verifications: dict[tuple[Digest, int], Verification] = {}
        self._unwritten: dict[EntryKey, Entry] = {}
        self._remembering: set[tuple[EntryKey, Descriptor, int]] = set()
        self._recording = Counter[EntryKey]()
        self._to_write: set[tuple[EntryKey, frozenset[str]]] = set()
        self._storing = self._purges = 0
        self._hashing = Places(VERIFICATIONS)
        self._looks: Flights[tuple[Confirmed, Document] | Reason] = Flights()
        self._reads: Flights[Document | None] = Flights()
        if store.kept is not None:
            store.kept.renew = lambda digest: on_its_own(self._reopen(digest))

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer a request by digest from memory, or with a file that is already open. The caller must close the body.
        """
        digest, is_manifest = asked.digest, asked.route.kind is Kind.MANIFEST
        document = self._documents.get(digest) if is_manifest else None
        body = self._blobs.get(digest) if document is None else document.body
        if body is None and not is_manifest:
            return self._open_at_hand(asked)
        if body is None or (is_manifest and document is None):
            return None
        known = self._known(asked, self._entry_at_hand)[0]
        if known is None or (document is not None and not document.may_be(known.descriptor.media_type)):
            return None
        self.store.index.uses.use(digest)
        media_type = known.descriptor.media_type if is_manifest else BLOB_TYPE
        return Answer(CacheStatus.HIT, Reason.CACHED, media_type, digest, len(body), None if asked.head else body)

    def _open_at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer with the file of a blob, if it is already open.
        """
        kept = self.store.kept
        known = None if kept is None else self._known(asked, self._entry_at_hand)[0]
        content = None if kept is None or known is None else kept.get(asked.digest)
        if content is None:
            return None
        self.store.index.uses.use(asked.digest)
        if asked.head:
            content.close()
        body = None if asked.head else content
        return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size, body)

    async def _reopen(self, digest: Digest) -> None:
        content = await self.opened(digest)
        if content is not None:
            self._keep_open(content)
            content.close()

    def _keep_open(self, content: Content) -> None:
        """
        Keep a large file open for the next request. Small content is in memory.
        """
        if self.store.kept is not None and content.size > SMALL_BLOB and not self.store.index.database.unfit:
            self.store.kept.keep(content)

    def _entry_at_hand(self, key: EntryKey) -> Entry | None:
        """
        Return an entry from memory. A fact applies to every cache key.
        """
        found = self._entries.get(key) or self._unwritten.get(key)
        if found is None and key.variant and not key.is_tag:
            key = key._replace(variant="")
            found = self._entries.get(key) or self._unwritten.get(key)
            known = found.answers.get(ANY) if found else None
            return found if known is not None and known.manifest is not None else None
        return found

    async def look_up(self, asked: Asked) -> Found:
        """
        Check whether the repository may have the content, and open it.
        """
        since = self._purges
        held, missing = self._known(asked, self._entry_at_hand)
        try:
            with tracing.part(_LOOK_UP):
                known, content, missing = await self._disk.reading(self._look_up, asked, held, missing)
        except OSError:
            return Found(held, None, Reason.DISK, since)
        if held is None and known is not None:
            self._note(asked, known, since)
        if content is not None and asked.route.kind is Kind.BLOB:
            self._keep_open(content)
        if known is None or content is None or known.descriptor.size == content.size or content.proved:
            return Found(known, content, missing, since)
        try:
            return Found(known, await self._if_right(content), missing, since)
        except OSError:
            return Found(known, None, Reason.DISK, since)

    def _look_up(
        self, asked: Asked, known: Confirmed | None, missing: Reason
    ) -> tuple[Confirmed | None, Content | None, Reason]:
        if known is None:
            known, missing = self._known(asked, self.store.entry)
        return known, self.store.open(asked.digest), missing

    async def _if_right(self, content: Content) -> Content | None:
        """
        Verify content whose size differs from the announced one. Return it if it is valid, otherwise None.

        Somebody may have truncated the file, or the announced size is wrong.

        @raise TimeoutError: if the disk does not answer.
        """
        verification, verdict = self._verification(content), Deferred[None]()

        def news() -> None:
            verdict.callback(None)

        if not verification.over:
            verification.follow(news)
            try:
                await verdict
            finally:
                verification.leave(news)
        if verification.failure is not None and verification.failure.check(TimeoutError):
            verification.failure.raiseException()
        return content if verification.proved else None  # dropping the last reference closes it

    async def opened(self, digest: Digest) -> Content | None:
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

    async def lacks(self, digest: Digest, size: int) -> bool:
        """
        Return True if no process has or fetches the content, and it fits without evicting recently used files.

        No other process then prefetches it until L{lacks_no_more}.
        """
        with contextlib.suppress(OSError):
            intend = partial(self.store.intend, digest)
            if await undone_if_late(self._disk.reading, intend, lambda _: self.store.intents.release(digest)):
                return await self._room.fits_without(room_for(size), 2 * UNASKED_SECONDS)
        return False

    def lacks_no_more(self, digest: Digest) -> None:
        """
        Note that the content has been requested, or will not be.
        """
        releasing = self._disk.closing(self.store.intents.release, digest)
        releasing.addErrback(lambda problem: log.failure("Letting go", problem))

    async def was_used(self, digest: Digest, since: float) -> bool:
        """
        Return True if any process has used the content since then.
        """
        with contextlib.suppress(OSError):
            known = await self._disk.reading(self.store.index.known, digest)
            return known is not None and known.used >= since
        return False

    async def manifest_of(self, asked: Asked) -> tuple[Descriptor, Document] | None:
        """
        Return the manifest through which a blob is known to be in the repository, if there is one.
        """
        key = asked.entry_key._replace(variant="")
        entry = self._entry_at_hand(key)
        with contextlib.suppress(OSError):
            entry = entry or await self._disk.reading(self.store.entry, key)
        fact = entry.answers.get(ANY) if entry is not None else None
        if fact is None or fact.manifest is None:
            return None
        key = key._replace(kind=Kind.MANIFEST, reference=str(fact.manifest))
        entry = self._entry_at_hand(key)
        with contextlib.suppress(OSError):
            entry = entry or await self._disk.reading(self.store.entry, key)
        known = entry.answers.get(ANY) if entry is not None else None
        document = await self.document(fact.manifest) if known is not None else None
        return None if known is None or document is None else (known.descriptor, document)

    def used(self, digest: Digest) -> None:
        """
        Record a use of content that was fetched before it was requested.
        """
        self.store.index.uses.use(digest)

    def _known(self, asked: Asked, look: Callable[[EntryKey], Entry | None]) -> tuple[Confirmed | None, Reason]:
        entry = look(asked.entry_key)
        known = entry.answers.get(ANY) if entry else None
        if known is None:
            return None, Reason.FIRST_USE
        return known, Reason.NOT_KEPT if known.manifest is None else Reason.FIRST_USE

    async def look_up_manifest(self, asked: Asked) -> tuple[Confirmed, Document] | Reason:
        """
        Read a manifest that the repository may have, or return the reason why the cache can't serve it.

        It is read once, and in memory once, for all simultaneous requests unless a purge is noticed between them.
        """
        since = self._purges

        async def look() -> tuple[Confirmed, Document] | Reason:
            parsed = self._own_types.get(asked.digest)
            with tracing.part(_LOOK_UP):
                found = await self._disk.reading(self._look_up_manifest, asked, parsed)
            if not isinstance(found, Reason):
                self._note(asked, found[0], since)
                self._hold_read(asked.digest, found[1], since)
            return found

        try:
            return await self._looks.join((asked.entry_key, asked.accept, since), look)
        except OSError:
            return Reason.DISK

    def _look_up_manifest(self, asked: Asked, parsed: Document | None) -> tuple[Confirmed, Document] | Reason:
        known, missing = self._known(asked, self.store.entry)
        document = self._read_document(asked.digest, parsed) if known is not None else None
        if known is None or document is None:
            return missing
        # Its media type comes from an index that lists it: if the manifest declares another, ECR decides.
        return (known, document) if document.may_be(known.descriptor.media_type) else Reason.FIRST_USE

    async def document(self, digest: Digest) -> Document | None:
        """
        Return a manifest from memory or disk, whichever repository has it. None if it is missing.
        """
        document, since = self.held(digest), self._purges
        if document is not None:
            return document

        async def read() -> Document | None:
            return await self._disk.reading(self._read_document, digest, self._own_types.get(digest))

        with contextlib.suppress(OSError):
            document = await self._reads.join((digest, since), read)
        if document is not None:
            self._hold_read(digest, document, since)
        return document

    def _read_document(self, digest: Digest, parsed: Document | None) -> Document | None:
        """
        Read a manifest, and parse it unless it has been parsed before. Called in a thread.
        """
        body = self._read(digest)
        if body is None:
            return None
        if parsed is not None:
            return replace(parsed, body=body)
        try:
            return Document.read(body)
        except ValueError:  # a blob
            return None

    def _read(self, digest: Digest) -> bytes | None:
        """
        Read small content, which is verified each time. Called in a thread.
        """
        content = self.store.open(digest)
        return None if content is None else self._verified(content)

    @staticmethod
    def _verified(content: Content) -> bytes | None:
        """
        Read small content to its end, and close it. Return None if it is bad, or not small. Called in a thread.
        """
        try:
            body = content.read()
            state = content.digest.hasher()
            state.update(body)
            content.settle(state)
        except UnreadError as problem:
            log.debug("Not read: {problem}", problem=problem)
            return None
        except (OSError, DigestMismatchError) as problem:
            content.drop(problem)
            return None
        finally:
            content.close()
        return body

    async def parse(self, body: bytes, parser: Callable[[bytes], T]) -> T:
        """
        Parse a manifest; a large one in a thread, so that it does not block the event loop.
        """
        return parser(body) if len(body) <= SMALL_BLOB else await self._disk.digesting(parser, body)

    def entry_at_hand(self, asked: Asked) -> Entry | None:
        """
        Return a tag's entry if it is in memory.
        """
        return self._entries.get(asked.entry_key)

    async def entry(self, asked: Asked) -> Entry:
        """
        Return a tag's entry from memory or disk; an empty one if there is none.
        """
        return await self._entry(asked.entry_key) or Entry()

    async def _entry(self, key: EntryKey) -> Entry | None:
        """
        Return a tag's entry from memory or disk; None if it can't be read.
        """
        entry = self._entries.get(key)
        if entry is None:
            with contextlib.suppress(OSError):
                entry = await self._disk.reading(self.store.entry, key) or Entry()
        return entry

    async def last_known(self, asked: Asked) -> Entry:
        """
        Return ECR's last answer about a tag, to any process; an empty entry if the last answer was that there is none.

        Answers to other processes do not reach the memory, which serves tags for which ECR is asked anyway.
        """
        return await self._last_known(asked.entry_key) or Entry()

    async def _last_known(self, key: EntryKey) -> Entry | None:
        if not self._recording[key]:  # otherwise the memory is ahead of the index
            with contextlib.suppress(OSError):
                return await self._disk.reading(self.store.written, key) or Entry()
        return await self._entry(key)

    def _note(self, asked: Asked, known: Confirmed, since: int) -> None:
        """
        Hold an entry or a fact from the disk in memory. A fact is held once for all cache keys.
        """
        key = asked.entry_key if known.manifest is None else asked.entry_key._replace(variant="")
        self._hold_entries([(key, Entry({ANY: known}))], since)

    def _entry_of(self, descriptor: Descriptor, manifest: Digest | None = None) -> Entry:
        return Entry({ANY: Confirmed(descriptor, self._now(), manifest)})

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

    def remember(self, asked: Asked, descriptor: Descriptor) -> None:
        """
        Record ECR's confirmation that the repository holds an object by digest; once if several requests get it.
        """
        key = asked.entry_key
        since = self._purges
        about = key, descriptor, since
        if about in self._remembering or self._has_noted(key, descriptor):
            return

        async def remember() -> None:
            try:
                await self._remember(asked, descriptor, since)
            finally:
                self._remembering.discard(about)

        self._remembering.add(about)
        on_its_own(remember())

    def _has_noted(self, key: EntryKey, descriptor: Descriptor) -> bool:
        """
        Return True if this was recorded recently.
        """
        entry = self._entries.get(key)
        known = entry.answers.get(ANY) if entry else None
        if known is None or known.manifest is not None or known.descriptor != descriptor:
            return False
        return 0 <= self._now() - known.when < _UNWRITTEN_SECONDS

    def held(self, digest: Digest) -> Document | None:
        """
        Return a manifest from memory, whichever repository has it.
        """
        document = self._documents.get(digest)
        if document is not None:
            self.store.index.uses.use(digest)
        return document

    def hold(self, digest: Digest, small: bytes | Document) -> None:
        """
        Hold a verified small blob or manifest in memory.
        """
        if isinstance(small, Document):
            self._documents.put(digest, small, len(small.body) + 500)
            self._own_types.put(digest, replace(small, body=b""), 500)
        else:
            self._blobs.put(digest, small, len(small) + 400)

    def _hold_read(self, digest: Digest, small: bytes | Document, since: int) -> None:
        """
        Hold content that was read, unless a purge has been noticed since.
        """
        if since == self._purges:
            self.hold(digest, small)

    def _hold_entry(self, key: EntryKey, entry: Entry) -> None:
        self._entries.put(key, entry, entry.weight)

    def _hold_entries(self, entries: Facts, since: int) -> None:
        """
        Hold entries of the index, unless a purge has been noticed since: they may have been deleted.

        @param since: number of purges noticed before they were read or written.
        """
        for key, entry in entries if since == self._purges else ():
            self._hold_entry(key, entry)

    async def from_file(self, answer: Answer) -> Answer:
        """
        Answer with the file of a manifest of more than C{SMALL_BLOB} bytes, if it is cached.

        Otherwise its bytes would stay in memory until the client has received the last of them.
        """
        if not isinstance(answer.body, bytes) or len(answer.body) <= SMALL_BLOB:
            return answer
        content = await self.opened(answer.digest)
        if content is None:
            return answer
        if content.size != len(answer.body) or not content.proved:
            content.close()
            return answer
        return answer._replace(body=content)

    def manifest(self, asked: Asked, known: Confirmed, document: Document) -> Answer:
        """
        Answer with a manifest from the cache directory.
        """
        return manifest_answer(CacheStatus.HIT, Reason.CACHED, asked, known.descriptor, document.body)

    async def shelved(self, asked: Asked, content: Content, since: int, *, confirmed: bool = False) -> Answer | None:
        """
        Answer from the cache. Return None if the content turns out to be bad.

        @param since: see L{Found}.
        @param confirmed: True if ECR has just confirmed that the repository holds it.
        """
        why = (CacheStatus.HIT, Reason.CACHED)
        if confirmed:
            why = (CacheStatus.REVALIDATED, Reason.REPOSITORY_CONFIRMED)
        if content.size > SMALL_BLOB:
            verification = None if content.proved else self._verification(content)
            return Answer(*why, BLOB_TYPE, asked.digest, content.size, content, verification)
        try:
            body = await self._disk.reading(self._verified, content)
        except OSError:
            body = None
        if body is None:
            return None
        self._hold_read(asked.digest, body, since)
        return Answer(*why, BLOB_TYPE, asked.digest, len(body), body)

    def _verification(self, content: Content) -> Verification:
        """
        Return the one verification of a file. Start it if it is not running.
        """
        file = (content.digest, content.status.st_ino)
        verification = self._verifications.get(file)
        if verification is None:
            verification = self._verifications[file] = Verification(content.share(), self._hash_in_turn)
            on_its_own(self._verify(file, verification))
        return verification

    async def _verify(self, file: tuple[Digest, int], verification: Verification) -> None:
        try:
            await verification.run()
        finally:
            del self._verifications[file]

    def _hash_in_turn(self, blocking: Callable[..., T], *args: object) -> Deferred[T]:
        """
        Run one step of a verification. All files advance together: so do their readers, each waiting for its own hash.
        """

        async def step() -> T:
            async with self._hashing.turn():
                return await self._disk.hashing(blocking, *args)

        return Deferred.fromCoroutine(step())

    async def claim(self, digest: Digest) -> Claim | PeerTransfer | Met | Reason:
        """
        Claim a digest for a transfer, or return what exists instead, or why the cache can't have it.
        """
        try:
            return await undone_if_late(self._disk.writing, partial(self.store.claim, digest), self._unclaim)
        except OSError:
            return Reason.DISK

    def left(self, claim: Claim) -> Left | None:
        """
        Return what can be resumed of an earlier transfer.
        """
        return self.store.arriving.left(claim)

    def unclaim(self, claim: Claim | PeerTransfer | Met | Reason) -> None:
        """
        Release, in the background, a claim that no transfer has used, or another process's transfer.
        """
        self._disk.closing(self._unclaim, claim).addErrback(lambda problem: log.failure("Letting go", problem))

    def _unclaim(self, claimed: Claim | PeerTransfer | Met | Reason) -> None:
        if isinstance(claimed, Claim):
            self.store.arriving.let_go(claimed)
        elif isinstance(claimed, PeerTransfer):
            claimed.close()

    async def writer(
        self,
        claim: Claim,
        digest: Digest,
        size: int | None,
        since: int,
        begun: Callable[[], Awaitable[bool]] | None = None,
        asked: Asked | None = None,
    ) -> Writer | Reason:
        """
        Create the file of a transfer, or resume an interrupted one. Return a reason if the cache can't have it.

        @param claim: belongs to the transfer from now on.
        @param since: number of purges noticed when ECR was asked.
        @param begun: waits for the first bytes, if other content must be evicted; returns True if they came.
        @param asked: the blob that ECR has just confirmed. It is recorded if there is a file, and no purge has been
            noticed since.
        """
        if size is None:
            self.unclaim(claim)
            return Reason.SIZE_UNKNOWN
        refused, reserved, room = None, False, room_for(size)
        try:
            if not claim.resumes(size):
                refused = await self._refused(room, begun)
                if refused is None and not self._room.is_prompt(room):
                    reserved = await self._reserved(claim.reservation, room)
                    refused = None if reserved else Reason.NO_ROOM
        except BaseException:
            self.unclaim(claim)
            raise
        if refused is not None:
            self.unclaim(claim)
            return refused
        held = []
        if asked is not None and since == self._purges:
            held.append((asked.entry_key, self._entry_of(Descriptor(BLOB_TYPE, digest, size))))
        try:
            begin = partial(self._begin_or_resume, claim, digest, size, held, since, reserved=reserved)
            writer = await undone_if_late(self._disk.writing, begin, _leave, partial(self.unclaim, claim))
        except BaseException as problem:
            on_its_own(self._release(claim.reservation))
            if not isinstance(problem, OSError):  # the store has logged those
                raise
            return Reason.DISK
        if isinstance(writer, Writer):
            self._hold_entries(held, since)
        return writer

    async def _refused(self, room: int, begun: Callable[[], Awaitable[bool]] | None) -> Reason | None:
        """
        Return why the cache can't have a blob that takes C{room} bytes, as far as the event loop can know.
        """
        if not await self._room.can_hold(room):
            return Reason.TOO_LARGE
        if begun is not None and not self._room.fits(room) and not await begun():
            return Reason.NO_ROOM
        return None

    def _begin_or_resume(
        self, claim: Claim, digest: Digest, size: int, held: Facts, since: int, *, reserved: bool
    ) -> Writer | Reason:
        """
        Do all disk work that precedes the first byte. Called in a thread: it may return late.

        @param since: see L{_write}.
        """
        try:
            left = self.store.arriving.resume(claim, digest, size)
            writer = left or self._begin(claim, digest, size, reserved=reserved)
        except BaseException:
            self.store.arriving.let_go(claim)
            raise
        if held and isinstance(writer, Writer):
            self._write(held, since)
        return writer

    def _begin(self, claim: Claim, digest: Digest, size: int, *, reserved: bool = False) -> Writer | Reason:
        """
        Make room for a file, unless it is reserved, and create it. Called in a thread.

        @raise OSError: if the disk fails. The claim is still held then.
        """
        if not reserved and not self._has_room(claim.reservation, room_for(size)):
            self.store.arriving.let_go(claim)
            return Reason.NO_ROOM
        try:
            return self.store.writer(claim, digest, size)
        except BaseException:
            self.store.index.drop(arriving=[claim.reservation])
            raise

    async def take_over(self, peer: PeerTransfer, digest: Digest) -> Writer | None:
        """
        Resume another process's transfer, whose writer has exited. Return None if the caller must look again.

        @raise OSError: if the disk fails.
        """
        take_over = partial(self.store.arriving.take_over, peer, digest)
        return await undone_if_late(self._disk.writing, take_over, _leave)

    async def _release(self, what: Reservation) -> None:
        """
        Release the reservation of a file that will not arrive.
        """
        with contextlib.suppress(OSError):
            await self._disk.closing(self.store.index.drop, [], [what])

    async def _reserved(self, what: Reservation, size: int) -> bool:
        try:
            return await self._room.reserve(what, size)
        except Exception as problem:  # noqa: BLE001 (see _no_room)
            return _no_room(problem)

    def _has_room(self, what: Reservation, size: int) -> bool:
        try:
            return self._room.make_room(what, size)
        except Exception as problem:  # noqa: BLE001 (see _no_room)
            return _no_room(problem)

    def keep(self, route: Route, descriptor: Descriptor, document: Document, since: int) -> None:
        """
        Keep a manifest from ECR, and learn what it lists: in memory at once, on disk in the background.

        @param since: number of purges noticed when ECR was asked. After another purge nothing is learned.
        """
        self.hold(descriptor.digest, document)
        if self._storing + _weight(document) <= _STORING_BYTES:
            on_its_own(self._keep(route, descriptor, document, since))

    async def _keep(self, route: Route, descriptor: Descriptor, document: Document, since: int) -> None:
        facts: Facts = ()
        self._storing += _weight(document)
        try:
            facts = await self._learned(route.repository, descriptor, document, since)
            new = facts if facts and self._may_learn(route.repository, descriptor) else ()
            if await self._stored(descriptor, document.body, new, since):
                self._hold_entries(new, since)
            elif new:
                self._learnt.drop((route.repository, descriptor))
        finally:
            self._storing -= _weight(document)
            self._forget_unwritten(facts)

    async def _stored(self, descriptor: Descriptor, body: bytes, facts: Facts, since: int) -> bool:
        """
        Store a manifest and its facts.

        @param since: see L{_write}.
        @return: True if it is stored, or will be.
        """
        if not await self._room.can_hold(room_for(len(body))):
            return False
        try:
            return await self._disk.committing(self._store, descriptor.digest, body, facts, since)
        except OSError as problem:
            log.info(
                "Not kept: {digest}: {problem}", digest=descriptor.digest, problem=problem, once=str(problem.errno)
            )
            return False

    def _store(self, digest: Digest, body: bytes, facts: Facts, since: int) -> bool:
        """
        Store small content, unless it exists by now or another process is about to store it. Called in a thread.

        @param since: see L{_write}.
        @return: True if it is stored, or will be.
        @raise OSError: if the disk fails.
        """
        claim = self.store.claim(digest)
        if isinstance(claim, Claim):
            try:
                writer = self._begin(claim, digest, len(body))
            except BaseException:
                self.store.arriving.let_go(claim)
                raise
            if isinstance(writer, Reason):
                return False
            writer.finish(0, body, closes=True)
        elif isinstance(claim, PeerTransfer):
            claim.close()
        if facts:
            self._write(facts, since)
        return True

    def _write(self, entries: Facts, since: int) -> bool:
        """
        Store entries in the index, unless a purge has been noticed since. Called in a thread, possibly late.

        @param since: number of purges noticed when ECR was asked.
        @return: True if they are stored, or will be.
        """
        return since == self._purges and self.store.save(*entries)

    async def _remember(self, asked: Asked, descriptor: Descriptor, since: int) -> None:
        """
        Record ECR's confirmation that the repository holds an object by digest.
        """
        await self._save([(asked.entry_key, self._entry_of(descriptor))], since)

    @property
    def purges(self) -> int:
        """
        Return the number of purges noticed. ECR's answers from before the last one are forgotten.
        """
        return self._purges

    def holds(self, asked: Asked, size: int | None, since: int) -> None:
        """
        Record ECR's confirmation that the repository holds a blob, unless a purge has been noticed since.

        @param size: in bytes; nothing is recorded if it is unknown.
        @param since: number of purges noticed when ECR was asked.
        """
        if size is not None and since == self._purges:
            self.remember(asked, Descriptor(BLOB_TYPE, asked.digest, size))

    async def confirm(self, asked: Asked, descriptor: Descriptor, document: Document, since: int) -> None:
        """
        Record ECR's confirmation that the repository holds a manifest that another repository brought in.

        @param since: number of purges noticed when ECR was asked. After another purge nothing is recorded.
        """
        await self._remember(asked, descriptor, since)
        if since == self._purges and self._may_learn(asked.route.repository, descriptor):
            await self._save(await self._learned(asked.route.repository, descriptor, document, since), since)

    async def record(
        self, asked: Asked, question: int, descriptor: Descriptor, document: Document | None, since: int
    ) -> None:
        """
        Record ECR's answer about a tag.

        @param question: the number of the request. The answer is outdated if a later request has been answered.
        @param document: the manifest, if the cache had it already: the repository holds what it lists, too.
        @param since: number of purges noticed when ECR was asked. After another purge nothing is recorded.
        """
        if since != self._purges:
            return
        key = asked.entry_key
        self._recording[key] += 1
        try:
            known, entry = await self._locks.run(key, partial(self._record, key, asked, question, descriptor, since))
            if entry is None:
                return
            changed = known is None or known.descriptor != descriptor
            facts: Facts = ()
            if changed and document is not None and self._may_learn(asked.route.repository, descriptor):
                facts = await self._learned(asked.route.repository, descriptor, document, since)
            about = key, asked.accept
            written = self._written.get(about)
            due = changed or written is None or not 0 <= self._now() - written < _UNWRITTEN_SECONDS
            if due and about not in self._to_write:  # otherwise the pending write includes this
                self._to_write.add(about)
                await self._locks.run(key, partial(self._write_latest, key, asked.accept))
            await self._save(facts, since)
        finally:
            self._recording[key] -= 1
            if not self._recording[key]:
                del self._recording[key]

    async def _record(
        self, key: EntryKey, asked: Asked, question: int, descriptor: Descriptor, since: int
    ) -> tuple[Confirmed | None, Entry | None]:
        """
        Return the old answer and the new entry; None for an answer that is outdated, or from before a purge.
        """
        before, when = await self.entry(asked), question / 1e6
        if since != self._purges:
            return None, None
        known = before.answers.get(asked.accept)
        if not self._order(key).answer(asked.accept, descriptor.media_type, question):
            return None, None
        if known is not None and known.is_newer(when, self._now()):
            return None, None
        entry = before.with_answer(asked.accept, Confirmed(descriptor, min(when, self._now())))
        self._hold_entry(key, entry)
        return known, entry

    def _order(self, key: EntryKey) -> Order:
        order = self._orders.get(key) or Order()
        self._orders.put(key, order, _ORDER_BYTES)
        return order

    async def forget(self, asked: Asked, question: int) -> None:
        """
        Forget a tag for which ECR answered 404. The content stays for other repositories and tags.

        Answers of types that the client does not accept stay: ECR was not asked for them.

        @param question: the number of the request. Answers to later ones stay.
        """
        key = asked.entry_key
        if (entry := self._entries.get(key)) is not None:  # at once: a slow write of it may come first
            self._deny(key, asked, question, entry)
        await self._locks.run(key, partial(self._forget, key, asked, question))

    async def _forget(self, key: EntryKey, asked: Asked, question: int) -> None:
        since, entry = self._purges, await self._last_known(key)
        denied = self._deny(key, asked, question, entry, holds=since == self._purges)
        if denied or not (entry and entry.answers):  # an earlier version may know of it what can't be imported yet
            with contextlib.suppress(OSError):
                await self._disk.writing(self.store.deny, key, denied, question / 1e6)

    def _deny(
        self, key: EntryKey, asked: Asked, question: int, entry: Entry | None, *, holds: bool = True
    ) -> AbstractSet[frozenset[str]]:
        """
        Drop the answers that a 404 denies from memory, and hide them. Return their sets of types.

        @param entry: the known entry; None if it can't be read, as on a disk that hangs: it may exist.
        @param holds: True to hold the rest of the entry in memory.
        """
        types, newer, when = {asked.accept: ""}, set[frozenset[str]](), question / 1e6
        if entry is not None:
            types = {accept: known.descriptor.media_type for accept, known in entry.answers.items()}
            newer = {accept for accept, known in entry.answers.items() if known.is_newer(when, self._now())}
        left = self._order(key).forget(asked.accept, question, types) | newer
        if types and left == types.keys():
            return set()
        denied = types.keys() - left
        self._entries.drop(key)
        if entry is not None and left and holds:
            self._hold_entry(key, replace(entry, answers={accept: entry.answers[accept] for accept in left}))
        if types:
            self.store.index.hide_answers(key, denied, when)  # even if the thread fails
        for accept in denied:
            self._written.drop((key, accept))
        return denied

    def _may_learn(self, repository: Repository, descriptor: Descriptor) -> bool:
        """
        Return True if the facts of a manifest should be stored, and assume that they will be.

        Any number of tags may have the same manifest: otherwise each would have all its facts written.
        """
        manifest, now = (repository, descriptor), self._now()
        last = self._learnt.get(manifest)
        if last is not None and 0 <= now - last < _UNWRITTEN_SECONDS:
            return False
        self._learnt.put(manifest, now, 700)
        return True

    async def _learned(self, repository: Repository, descriptor: Descriptor, document: Document, since: int) -> Facts:
        """
        Hold in memory, as facts, that the repository holds a manifest and what it lists. The caller saves them.

        @return: empty if a purge has been noticed since C{since}.
        """
        lists: Sequence[tuple[Kind, Descriptor]] = ()
        if self._checks(repository.registry):
            lists = await self.parse(document.body, partial(_listed, media_type=descriptor.media_type))
        if since != self._purges:
            return ()
        facts = []
        for kind, each in [(Kind.MANIFEST, descriptor), *lists][:FACTS]:
            key = EntryKey(repository.registry, kind, repository.name, str(each.digest))
            facts.append((key, self._entry_of(each, descriptor.digest)))
        self._unwritten.update(facts)
        return facts

    def _forget_unwritten(self, facts: Facts) -> None:
        for key, entry in facts:
            if self._unwritten.get(key) is entry:
                del self._unwritten[key]

    def forget_purged(self, news: News) -> None:
        """
        Drop purged items from memory, and everything that is not written yet.
        """
        self._purges += 1
        self._unwritten.clear()  # the purge could not see these
        for key in self._recording:
            self._entries.drop(key)
        if news.everything:
            for memory in (self._blobs, self._documents, self._entries):
                memory.clear()
        keys = set[EntryKey]()
        for each in news.purged:
            if isinstance(each, Digest):
                self._blobs.drop(each)
                self._documents.drop(each)
            else:
                keys.add(each._replace(variant=""))
        if keys:
            self._forget_variants(keys)
        self._learnt.clear()

    def _forget_variants(self, purged: set[EntryKey]) -> None:
        """
        Forget purged entries with every cache key: memory may hold variants that the index has not kept.
        """
        for key in [each for each in self._entries if each._replace(variant="") in purged]:
            self._entries.drop(key)

    async def _save(self, entries: Facts, since: int) -> None:
        """
        Store entries on disk and in memory, unless a purge has been noticed since.
        """
        try:
            if entries:
                await self._disk.writing(self._write, entries, since)
            self._hold_entries(entries, since)
        except OSError as problem:
            log.debug("Not noted on the disk: {problem}", problem=problem)
        finally:
            self._forget_unwritten(entries)

    async def _write_latest(self, key: EntryKey, accept: frozenset[str]) -> None:
        """
        Write the latest answer about a tag for one set of types only: other processes may have newer ones for others.

        A late write does not bring back anything that was forgotten or purged meanwhile.
        """
        self._to_write.discard((key, accept))
        entry = self._entries.get(key)
        if entry is None or accept not in entry.answers:
            return
        self._written.put((key, accept), self._now(), 500 + 100 * len(accept))
        noted = False
        try:
            latest = [(key, Entry({accept: entry.answers[accept]}))]
            noted = await self._disk.writing(self._write, latest, self._purges)
        except OSError as problem:
            log.debug("Not noted on the disk: {problem}", problem=problem)
        finally:
            if not noted:  # the next confirmation retries: the index may have the tag's previous digest
                self._written.drop((key, accept))


def _weight(document: Document) -> int:
    """
    Estimate the memory in bytes of a manifest and its facts, which take nine times the bytes of their lines.
    """
    size = len(document.body)
    return size + min(9 * size, FACTS * 1000)


def _listed(body: bytes, media_type: str) -> Sequence[tuple[Kind, Descriptor]]:
    """
    Return what a manifest entitles its repository to. Layers that an index lists, as in a BuildKit cache, do not count.
    """
    known = (each for each in listed(body, media_type) if each[0] is Kind.BLOB or each[1].media_type in MANIFEST_TYPES)
    return list(islice(known, FACTS))


def _no_room(problem: Exception) -> bool:
    """
    Log why there is no room, and return False: a pull goes on even if the janitor fails.
    """
    if isinstance(problem, OSError):
        log.warn("Not kept: room in the cache can't be promised: {problem}", problem=str(problem), once="no room")
    else:
        log.failure("Making room in the cache")
    return False


def _leave(writer: Writer | Reason | None) -> None:
    if isinstance(writer, Writer):
        writer.leave()
