"""
What the cache can answer by itself, and what it is told.

Rules:

- What is named by its digest is good for as long as it is there. A repository may have it when ECR said so: to a
  request with the same cache key, or by a manifest of the repository that lists it (a I{fact}), if the registry takes
  no manifest without having what it lists, as ECR does not.
  Both are about one registry, one repository, and one kind: a layer that a repository holds is no manifest of it.
- Nothing is read before it is known that the repository may have it.
- Small content is verified each time it is read from the disk, and held in memory then. Larger content is verified
  the first time it is used, and again when somebody has changed its file: see L{verification}.
- What ECR says of one tag takes effect in the order in which it was asked, by whichever process. A question's number is
  when it was asked, in microseconds since the epoch; an answer counts as of then.
- The memory is a copy: what the disk lost, it may still give; what it has dropped is read again. What was read, or
  written, when a purge was heard of is not held in it: it may be of before that. Nor is it written after that. What
  waits to be written then is forgotten: it was in nobody's list of what to purge.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Final, NamedTuple, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.answers import ANY, Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.arriving import Left, Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import Content, DigestMismatchError, UnreadError
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.index import News
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import Reservation, room_for
from ecrproxy.cache.store import Store
from ecrproxy.cache.verification import Verification
from ecrproxy.cache.writer import UNASKED_SECONDS, Writer
from ecrproxy.flights import Flights
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import BLOB_TYPE, MANIFEST_TYPES, Descriptor, Digest, Document, Kind, Route, listed
from ecrproxy.ordering import KeyedLocks, Order, Places
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()
T = TypeVar("T")

Facts = Sequence[tuple[EntryKey, Entry]]
FACTS: Final = 1000
"""The most facts that one manifest gives, itself included. ECR confirms the rest when it is asked for."""
_UNWRITTEN_SECONDS = 60
"""How long an unchanged confirmation, or that a manifest gave facts again, is in memory alone."""
_BODIES_BYTES = 32 * 2**20
_ENTRIES_BYTES = 8 * 2**20
"""Bytes of memory for manifests, for small blobs, and for entries."""
_ORDERS_BYTES = 2**20
_ORDER_BYTES = 2**10
"""Bytes of memory for the order of what ECR said of tags: it matters for the seconds that a question takes."""
_ONLY_HEADS_BYTES = 2**20
"""Bytes of memory for what only HEADs have asked for."""
_WRITTEN_BYTES = 2**20
"""Bytes of memory for which tags were written to the index lately."""
_LEARNT_BYTES = 2**20
"""Bytes of memory for which manifests gave facts lately."""
_OWN_TYPES_BYTES = 2**20
"""Bytes of memory for what manifests call themselves: those that are read again are not parsed again."""
_STORING_BYTES = 64 * 2**20
"""Bytes of memory for manifests, and for what they list, that wait for a slow disk."""
SMALL_BLOB = 64 * 2**10
"""Blobs up to so many bytes, as image configs are, are held in memory too. Larger manifests are parsed in a thread."""
VERIFICATIONS = 4
"""How many steps of hashing are done at the same time."""


class Room(Protocol):
    """
    Who keeps the cache within its limit: see C{janitor.Janitor}.

    @ivar limit: in bytes.
    """

    limit: int

    def fits(self, size: int) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting anything.
        """

    async def can_hold(self, size: int) -> bool:
        """
        Return True if C{size} bytes are within the limit, were all else evicted.
        """

    async def fits_without(self, size: int, seconds: float) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting what was used within the last C{seconds}.

        @raise OSError: if that can't be told.
        """

    def is_prompt(self, size: int) -> bool:
        """
        Return True if L{make_room} does not have to wait for the index.
        """

    async def reserve(self, what: Reservation, size: int) -> bool:
        """
        Make room as L{make_room} does, and wait for it, but not for long.

        @raise OSError: if that can't be told, or takes too long.
        """

    def make_room(self, what: Reservation, size: int) -> bool:
        """
        Make room for C{size} bytes that will arrive, if it can be had; it is released with that file. May block.

        @raise OSError: if that can't be told.
        """


class Found(NamedTuple):
    """
    What a look into the cache has found.

    @ivar known: what says that the repository may have it.
    @ivar missing: why it isn't there, if it isn't.
    @ivar since: how many purges had been heard of when the look began.
    """

    known: Confirmed | None
    content: Content | None
    missing: Reason
    since: int


class Cache:
    """
    What the cache directory and the memory in front of it know, and what they are told.

    Only a disk's trouble can go wrong here, and that is logged, never raised.

    @param now: seconds since the epoch.
    @param checks: tells whether a registry takes a manifest only if it has what that lists.
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
        Answer from memory, or with a file that is open, what was asked for by its digest; its body is to be closed.
        """
        digest, is_manifest = asked.digest, asked.route.kind is Kind.MANIFEST
        document = self._documents.get(digest) if is_manifest else None
        body = self._blobs.get(digest) if document is None else document.body
        if body is None and not is_manifest:
            return self._open_at_hand(asked)
        if body is None or (is_manifest and document is None):
            return None
        known = self._known(asked, self._entry_at_hand)[0]
        if known is None or (document is not None and not _fits(document, known.descriptor)):
            return None
        self.store.index.use(digest)
        media_type = known.descriptor.media_type if is_manifest else BLOB_TYPE
        return Answer(CacheStatus.HIT, Reason.CACHED, media_type, digest, len(body), None if asked.head else body)

    def _open_at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer with the file of a blob, if that is open.
        """
        kept = self.store.kept
        known = None if kept is None else self._known(asked, self._entry_at_hand)[0]
        content = None if kept is None or known is None else kept.get(asked.digest)
        if content is None:
            return None
        self.store.index.use(asked.digest)
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
        Have who asks for a large file next find it open: small ones are in memory.
        """
        if self.store.kept is not None and content.size > SMALL_BLOB and not self.store.index.unfit:
            self.store.kept.keep(content)

    def _entry_at_hand(self, key: EntryKey) -> Entry | None:
        """
        Recall what is known; a fact is one whatever the cache key.
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
        See whether the repository may have the content, and open it.
        """
        since = self._purges
        held, missing = self._known(asked, self._entry_at_hand)
        try:
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
        Give content of another size than was told once it is known to be right; none if it is bad.

        It may have been cut behind our back, or what was told is wrong.

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
        return content if verification.proved else None  # what was opened closes itself

    async def opened(self, digest: Digest) -> Content | None:
        """
        Open content, whoever may have it; none if it isn't there.
        """
        with contextlib.suppress(OSError):
            return await self._disk.reading(self.store.open, digest)
        return None

    async def has(self, digest: Digest) -> bool:
        """
        Return True if the content is there, whoever may have it.
        """
        with contextlib.suppress(OSError):
            return await self._disk.reading(self.store.has, digest)
        return False

    # What is read ahead.

    @property
    def is_well(self) -> bool:
        """
        Return True if nothing is wrong with the disk.
        """
        return not self.store.troubles.standing()

    @property
    def limit(self) -> int:
        """
        The most bytes that may be kept.
        """
        return self._room.limit

    async def lacks(self, digest: Digest, size: int) -> bool:
        """
        Return True if content is not there nor on its way, in any process, and has room beside what was used lately.

        Then no other process asks for it ahead, until L{lacks_no_more}.
        """
        with contextlib.suppress(OSError):
            intend = partial(self.store.intend, digest)
            if await undone_if_late(self._disk.reading, intend, lambda _: self.store.intents.release(digest)):
                return await self._room.fits_without(room_for(size), 2 * UNASKED_SECONDS)
        return False

    def lacks_no_more(self, digest: Digest) -> None:
        """
        Note that content has been asked for, or is not.
        """
        releasing = self._disk.closing(self.store.intents.release, digest)
        releasing.addErrback(lambda problem: log.failure("Letting go", problem))

    async def was_used(self, digest: Digest, since: float) -> bool:
        """
        Return True if any process has used content since then.
        """
        with contextlib.suppress(OSError):
            known = await self._disk.reading(self.store.index.known, digest)
            return known is not None and known.used >= since
        return False

    async def manifest_of(self, asked: Asked) -> tuple[Descriptor, Document] | None:
        """
        Return the manifest by which it is known that the repository holds a blob, if that is known by one.
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
        Note that content which came before anybody asked for it is used.
        """
        self.store.index.use(digest)

    def _known(self, asked: Asked, look: Callable[[EntryKey], Entry | None]) -> tuple[Confirmed | None, Reason]:
        entry = look(asked.entry_key)
        known = entry.answers.get(ANY) if entry else None
        if known is None:
            return None, Reason.FIRST_USE
        return known, Reason.NOT_KEPT if known.manifest is None else Reason.FIRST_USE

    async def look_up_manifest(self, asked: Asked) -> tuple[Confirmed, Document] | Reason:
        """
        Read a manifest that the repository may have, or give the reason why it can't be had here.

        It is read once, and in memory once, for all who ask at the same time, and no purge is heard of.
        """
        since = self._purges

        async def look() -> tuple[Confirmed, Document] | Reason:
            parsed = self._own_types.get(asked.digest)
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
        # Which type it has was told by an index that lists it: ECR decides if the manifest says otherwise.
        return (known, document) if _fits(document, known.descriptor) else Reason.FIRST_USE

    async def document(self, digest: Digest) -> Document | None:
        """
        Recall or read a manifest, whoever may have it; none if it isn't there.
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
        Read a manifest, and parse it unless it was parsed already. Called in a thread.
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
        Read small content, small enough to be verified each time. Called in a thread.
        """
        content = self.store.open(digest)
        return None if content is None else self._verified(content)

    @staticmethod
    def _verified(content: Content) -> bytes | None:
        """
        Read open small content to its end, and close it; none if it is bad, or not small. Called in a thread.
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
        Parse a manifest, a large one in a thread: the event loop has others to serve.
        """
        return parser(body) if len(body) <= SMALL_BLOB else await self._disk.digesting(parser, body)

    def entry_at_hand(self, asked: Asked) -> Entry | None:
        """
        Recall what is known of a tag, if it is in memory.
        """
        return self._entries.get(asked.entry_key)

    async def entry(self, asked: Asked) -> Entry:
        """
        Recall or read what is known of a tag; an empty entry if nothing is.
        """
        return await self._entry(asked.entry_key) or Entry()

    async def _entry(self, key: EntryKey) -> Entry | None:
        """
        Recall or read what is known of a tag; none if that can't be read.
        """
        entry = self._entries.get(key)
        if entry is None:
            with contextlib.suppress(OSError):
                entry = await self._disk.reading(self.store.entry, key) or Entry()
        return entry

    async def last_known(self, asked: Asked) -> Entry:
        """
        Return what ECR said last of a tag, to whichever process; an empty entry if it said that there is none.

        The memory does not hear of what others are told: it is for what ECR is asked about all the same.
        """
        return await self._last_known(asked.entry_key) or Entry()

    async def _last_known(self, key: EntryKey) -> Entry | None:
        if not self._recording[key]:  # else the memory is ahead of the index
            with contextlib.suppress(OSError):
                return await self._disk.reading(self.store.written, key) or Entry()
        return await self._entry(key)

    def _note(self, asked: Asked, known: Confirmed, since: int) -> None:
        """
        Hold in memory what an entry or a fact on the disk said: a fact once, whatever the cache key.
        """
        key = asked.entry_key if known.manifest is None else asked.entry_key._replace(variant="")
        self._hold_entries([(key, Entry({ANY: known}))], since)

    def _entry_of(self, descriptor: Descriptor, manifest: Digest | None = None) -> Entry:
        return Entry({ANY: Confirmed(descriptor, self._now(), manifest)})

    def why_missing(self, asked: Asked, reason: Reason) -> Reason:
        """
        Return C{FIRST_USE} in place of C{NOT_KEPT} for what only HEADs have asked for: nothing was fetched for them.
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
        Note that ECR said that the repository holds what was asked for by its digest: for all who hear it, once.
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
        Return True if that has been noted a short time ago.
        """
        entry = self._entries.get(key)
        known = entry.answers.get(ANY) if entry else None
        if known is None or known.manifest is not None or known.descriptor != descriptor:
            return False
        return 0 <= self._now() - known.when < _UNWRITTEN_SECONDS

    def held(self, digest: Digest) -> Document | None:
        """
        Return a manifest that is held in memory, whoever may have it.
        """
        document = self._documents.get(digest)
        if document is not None:
            self.store.index.use(digest)
        return document

    def hold(self, digest: Digest, small: bytes | Document) -> None:
        """
        Hold a small blob or a manifest in memory, verified.
        """
        if isinstance(small, Document):
            self._documents.put(digest, small, len(small.body) + 500)
            self._own_types.put(digest, replace(small, body=b""), 500)
        else:
            self._blobs.put(digest, small, len(small) + 400)

    def _hold_read(self, digest: Digest, small: bytes | Document, since: int) -> None:
        """
        Hold what was read, unless a purge was heard of since.
        """
        if since == self._purges:
            self.hold(digest, small)

    def _hold_entry(self, key: EntryKey, entry: Entry) -> None:
        self._entries.put(key, entry, entry.weight)

    def _hold_entries(self, entries: Facts, since: int) -> None:
        """
        Hold what the index has, unless a purge was heard of since: it may have that no more.

        @param since: how many had been heard of when it was about to be read or written.
        """
        for key, entry in entries if since == self._purges else ():
            self._hold_entry(key, entry)

    async def from_file(self, answer: Answer) -> Answer:
        """
        Answer with the file of a manifest of more than C{SMALL_BLOB} bytes, if it is cached.

        Its bytes in memory would be held until the client has taken the last of them.
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
        Answer with a manifest that was found in the directory.
        """
        return manifest_answer(CacheStatus.HIT, Reason.CACHED, asked, known.descriptor, document.body)

    async def shelved(self, asked: Asked, content: Content, since: int, *, confirmed: bool = False) -> Answer | None:
        """
        Answer from the cache; none if what is there turns out to be bad.

        @param since: see L{Found}.
        @param confirmed: whether ECR said just now that the repository holds it.
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
        Give the one verification of a file, begun if it isn't under way.
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
        Take one step of a verification. All files advance together: their readers do, and each waits for its own hash.
        """

        async def step() -> T:
            async with self._hashing.turn():
                return await self._disk.hashing(blocking, *args)

        return Deferred.fromCoroutine(step())

    async def claim(self, digest: Digest) -> Claim | PeerTransfer | Met | Reason:
        """
        Claim a digest for a transfer; or give what is there instead, or why the cache can't have it.
        """
        try:
            return await undone_if_late(self._disk.writing, partial(self.store.claim, digest), self._unclaim)
        except OSError:
            return Reason.DISK

    def left(self, claim: Claim) -> Left | None:
        """
        See what an earlier transfer has left to go on with.
        """
        return self.store.arriving.left(claim)

    def unclaim(self, claim: Claim | PeerTransfer | Met | Reason) -> None:
        """
        Let go of a claim that no transfer was begun with, or of another process's transfer, in its own time.
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
        Begin the file of a transfer, or go on with what is left of one; or tell why the cache can't have it.

        @param claim: the transfer's from now on.
        @param since: how many purges had been heard of when ECR was asked.
        @param begun: waits for the first bytes, if other content has to be evicted; returns whether they came.
        @param asked: what ECR said just now that the repository holds: it is noted if there is a file, and was no purge
            since.
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
            if not isinstance(problem, OSError):  # those the store has told
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
        Do all that the disk has to do before the first byte. Called in a thread: it may return late.

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
        Make room for a file, unless there is, and begin it. Called in a thread.

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
        Go on with another process's transfer, whose writer has exited; none if it has to be looked at again.

        @raise OSError: if the disk fails.
        """
        take_over = partial(self.store.arriving.take_over, peer, digest)
        return await undone_if_late(self._disk.writing, take_over, _leave)

    async def _release(self, what: Reservation) -> None:
        """
        Give back room for a file that does not come.
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
        Keep a manifest that ECR gave, and learn what it lists: in memory at once, on the disk in its own time.

        @param since: how many purges had been heard of when ECR was asked; after another one nothing is learnt.
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
        Store a manifest and the facts that it gives.

        @param since: see L{_write}.
        @return: whether it is stored, or will be.
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
        Store small content, unless it is there by now or another process is about to store it. Called in a thread.

        @param since: see L{_write}.
        @return: whether it is stored, or will be.
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
        Note entries on the disk, unless a purge was heard of since. Called in a thread, which may come late to it.

        @param since: how many had been heard of when ECR was asked.
        @return: whether they are noted, or will be.
        """
        return since == self._purges and self.store.save(*entries)

    async def _remember(self, asked: Asked, descriptor: Descriptor, since: int) -> None:
        """
        Note that ECR said that the repository holds what was asked for by its digest.
        """
        await self._save([(asked.entry_key, self._entry_of(descriptor))], since)

    @property
    def purges(self) -> int:
        """
        How many purges were heard of. What ECR said before the last one is known no more.
        """
        return self._purges

    def holds(self, asked: Asked, size: int | None, since: int) -> None:
        """
        Note that ECR said that the repository holds a blob, unless a purge was heard of since.

        @param size: in bytes; nothing is noted while that isn't known.
        @param since: how many had been heard of when ECR was asked.
        """
        if size is not None and since == self._purges:
            self.remember(asked, Descriptor(BLOB_TYPE, asked.digest, size))

    async def confirm(self, asked: Asked, descriptor: Descriptor, document: Document, since: int) -> None:
        """
        Note that ECR said that the repository holds a manifest, which another brought in.

        @param since: how many purges had been heard of when ECR was asked; after another one nothing is noted.
        """
        await self._remember(asked, descriptor, since)
        if since == self._purges and self._may_learn(asked.route.repository, descriptor):
            await self._save(await self._learned(asked.route.repository, descriptor, document, since), since)

    async def record(
        self, asked: Asked, question: int, descriptor: Descriptor, document: Document | None, since: int
    ) -> None:
        """
        Note what ECR said that a tag leads to.

        @param question: the number of the question; an answer to an earlier one than was answered last is outdated.
        @param document: the manifest, where the cache had it already: what it lists is the repository's too.
        @param since: how many purges had been heard of when ECR was asked; after another one nothing is noted.
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
            if due and about not in self._to_write:  # else what is in line writes this too
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
        Give what was known, and the entry as it is now; none if the answer is outdated, or of before a purge.
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
        Forget what a tag led to: ECR answered 404. The content stays for whoever else it serves.

        Answers of types that the client does not accept stay: ECR was not asked for them.

        @param question: the number of the question; what was answered to later ones stays.
        """
        key = asked.entry_key
        if (entry := self._entries.get(key)) is not None:  # at once: a slow write of it may come first
            self._deny(key, asked, question, entry)
        await self._locks.run(key, partial(self._forget, key, asked, question))

    async def _forget(self, key: EntryKey, asked: Asked, question: int) -> None:
        since, entry = self._purges, await self._last_known(key)
        if self._deny(key, asked, question, entry, holds=since == self._purges):
            with contextlib.suppress(OSError):
                await self._disk.writing(self.store.deny, key)

    def _deny(self, key: EntryKey, asked: Asked, question: int, entry: Entry | None, *, holds: bool = True) -> bool:
        """
        Drop from memory what a 404 denies, and tell it no more; return whether there was any.

        @param entry: what is known; none if that can't be read, as on a disk that hangs: it may be there.
        @param holds: whether what is left of it is held in memory.
        """
        types, newer, when = {asked.accept: ""}, set[frozenset[str]](), question / 1e6
        if entry is not None:
            types = {accept: known.descriptor.media_type for accept, known in entry.answers.items()}
            newer = {accept for accept, known in entry.answers.items() if known.is_newer(when, self._now())}
        left = self._order(key).forget(asked.accept, question, types) | newer
        if types and left == types.keys():
            return False
        self._entries.drop(key)
        if entry is not None and left and holds:
            self._hold_entry(key, replace(entry, answers={accept: entry.answers[accept] for accept in left}))
        if types:
            self.store.index.hide_answers(key, types.keys() - left, when)  # whatever becomes of the thread
        for accept in types.keys() - left:
            self._written.drop((key, accept))
        return bool(types)

    def _may_learn(self, repository: Repository, descriptor: Descriptor) -> bool:
        """
        Tell whether the facts that a manifest gives are to be noted, and count on it that they are.

        Any number of tags lead to one manifest: each of them would have all its facts written.
        """
        manifest, now = (repository, descriptor), self._now()
        last = self._learnt.get(manifest)
        if last is not None and 0 <= now - last < _UNWRITTEN_SECONDS:
            return False
        self._learnt.put(manifest, now, 700)
        return True

    async def _learned(self, repository: Repository, descriptor: Descriptor, document: Document, since: int) -> Facts:
        """
        Note in memory as facts that the repository holds a manifest, and what it lists; they are yet to be saved.

        @return: none if a purge was heard of C{since} then.
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
        Forget what is held in memory of what was purged, and what is not written yet.
        """
        self._purges += 1
        self._unwritten.clear()  # whoever purged could not see what it was, nor these
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
        Forget what was purged, whatever the cache key: the index does not keep all variants that memory may hold.
        """
        for key in [each for each in self._entries if each._replace(variant="") in purged]:
            self._entries.drop(key)

    async def _save(self, entries: Facts, since: int) -> None:
        """
        Note entries on the disk and in memory, unless a purge was heard of since.
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
        Write what a tag leads to by now for one set of types: other processes may know others better.

        A late write brings back nothing that was forgotten or purged meanwhile.
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
            if not noted:  # the next confirmation tries again: the index may name what the tag led to before
                self._written.drop((key, accept))


def _weight(document: Document) -> int:
    """
    Estimate the bytes of memory that a manifest takes with its facts, which have nine times the bytes of their lines.
    """
    size = len(document.body)
    return size + min(9 * size, FACTS * 1000)


def _fits(document: Document, known: Descriptor) -> bool:
    """
    Return True if a manifest may be served as the media type that is known of it.
    """
    return known.media_type in MANIFEST_TYPES and document.own_type in (None, known.media_type)


def _listed(body: bytes, media_type: str) -> Sequence[tuple[Kind, Descriptor]]:
    """
    Give what a manifest entitles its repository to: an index may list layers, as a BuildKit cache does, to no effect.
    """
    known = (each for each in listed(body, media_type) if each[0] is Kind.BLOB or each[1].media_type in MANIFEST_TYPES)
    return list(islice(known, FACTS))


def _no_room(problem: Exception) -> bool:
    """
    Log why there is no room, and return False: whatever the janitor's trouble, a pull goes on without it.
    """
    if isinstance(problem, OSError):
        log.warn("Not kept: room in the cache can't be promised: {problem}", problem=str(problem), once="no room")
    else:
        log.failure("Making room in the cache")
    return False


def _leave(writer: Writer | Reason | None) -> None:
    if isinstance(writer, Writer):
        writer.leave()
