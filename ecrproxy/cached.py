"""
What the cache can answer by itself, and what it is told.

Rules:

- What is named by its digest is good for as long as it is there. A repository may have it when ECR said so: to a
  request with the same cache key (its I{entry}), or by a manifest of the repository that lists it (a I{fact}).
  Both are about one registry, one repository, and one kind: a layer that a repository holds is no manifest of it.
- Nothing is read before it is known that the repository may have it.
- Small content is verified each time it is read from the disk, and held in memory then. Larger content is verified
  the first time it is used, and again when somebody has changed its file: see L{verification}.
- What ECR says of one tag takes effect in the order in which it was asked.
- The memory is a copy: what the disk lost, it may still give; what it has dropped is read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.logger import Logger

from ecrproxy.answers import ANY, Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.content import Content, DigestMismatchError, UnreadError
from ecrproxy.cache.entries import Confirmed, Entry, entry_name, occupied
from ecrproxy.cache.ingest import Left
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.store import Store
from ecrproxy.cache.trailer import WORTH_RESUMING, room_for
from ecrproxy.cache.verification import Verification
from ecrproxy.cache.writer import Writer
from ecrproxy.flights import Flights
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, MANIFEST_TYPES, Descriptor, Digest, Document, Kind, Route, listed
from ecrproxy.ordering import KeyedLocks, Order
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()
T = TypeVar("T")

FACTS: Final = 1000
"""The most facts that one manifest gives, itself included. ECR confirms the rest when it is asked for."""
_UNWRITTEN_SECONDS = 60
"""How long an unchanged tag's confirmation, a use, or that a manifest gave facts again, is in memory alone."""
_BODIES_BYTES = 32 * 2**20
_ENTRIES_BYTES = 8 * 2**20
"""Bytes of memory for manifests, for small blobs, and for entries."""
_ORDERS_BYTES = 2**20
_ORDER_BYTES = 2**10
"""Bytes of memory for the order of what ECR said of tags: it matters for the seconds that a question takes."""
_ONLY_HEADS_BYTES = 2**20
"""Bytes of memory for what only HEADs have asked for."""
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

    async def reserve(self, size: int) -> bool:
        """
        Make room for C{size} bytes, if it can be had; release it when they are files, or won't be.
        """

    def release(self, size: int) -> None:
        """
        Give back what was reserved.
        """


class Cache:
    """
    What the cache directory and the memory in front of it know of one registry, and what they are told.

    Only a disk's trouble can go wrong here, and that is logged, never raised.

    @param now: seconds since the epoch.
    @param registry: the one that all of it is about.
    """

    def __init__(self, store: Store, room: Room, disk: Disk, now: Callable[[], float], registry: RegistryId) -> None:
        self.store, self._room, self._disk, self._now = store, room, disk, now
        self._registry = registry
        self._blobs: Memory[Digest, bytes] = Memory(_BODIES_BYTES)
        self._documents: Memory[Digest, Document] = Memory(_BODIES_BYTES)
        self._own_types: Memory[Digest, Document] = Memory(_OWN_TYPES_BYTES)
        self._locks = KeyedLocks()
        self._orders: Memory[str, Order] = Memory(_ORDERS_BYTES)
        self._entries: Memory[str, Entry] = Memory(_ENTRIES_BYTES)
        self._touched: Memory[str, float] = Memory(_ENTRIES_BYTES)
        self._learnt: Memory[tuple[str, Descriptor], float] = Memory(_LEARNT_BYTES)
        self._only_heads: Memory[tuple[str, frozenset[str]], bool] = Memory(_ONLY_HEADS_BYTES)
        self._verifications: dict[tuple[Digest, int], Verification] = {}
        self._unwritten: dict[str, Entry] = {}
        self._storing = 0
        self._hashing = DeferredSemaphore(VERIFICATIONS)
        self._looks: Flights[tuple[Descriptor, Document] | Reason] = Flights()
        self._reads: Flights[Document | None] = Flights()

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer from memory, if what was asked for by its digest is held there.
        """
        is_manifest = asked.route.kind is Kind.MANIFEST
        document = self._documents.get(asked.digest) if is_manifest else None
        body = self._blobs.get(asked.digest) if document is None else document.body
        if body is None or (is_manifest and document is None):
            return None
        name = self._name(asked)
        known = self._known(asked, name, self._entry_at_hand)[0]
        if known is None or (document is not None and not _fits(document, known)):
            return None
        self._used(name, self._touch, asked)
        media_type = known.media_type if is_manifest else BLOB_TYPE
        return Answer(CacheStatus.HIT, Reason.CACHED, media_type, asked.digest, len(body), None if asked.head else body)

    def _touch(self, asked: Asked) -> None:
        self._known(asked, self._name(asked), self._entry_on_disk)
        self._read(asked.digest)

    def _name(self, asked: Asked) -> str:
        return entry_name(self._registry, asked.key, asked.route)

    def _fact_name(self, route: Route) -> str:
        return entry_name(self._registry, "\0fact", route)

    def _entry_at_hand(self, name: str, route: Route) -> Entry | None:  # noqa: ARG002 (as _entry_on_disk)
        return self._entries.get(name) or self._unwritten.get(name)

    def _entry_on_disk(self, name: str, route: Route) -> Entry | None:
        return self.store.entry(name, self._registry, route)

    def _used(self, name: str, look: Callable[..., object], *args: object) -> None:
        """
        Have C{look} note on the disk, now and then, what is used from memory, so that it isn't evicted first.
        """
        now, last = self._now(), self._touched.get(name)
        if last is None or not 0 <= now - last < _UNWRITTEN_SECONDS:
            self._touched.put(name, now, 400)
            if last is not None:  # it was read just now
                looked = self._disk.reading(look, *args)
                looked.addErrback(lambda problem: log.warn("Can't note a use: {problem}", problem=problem.value))

    async def look_up(self, asked: Asked) -> tuple[Descriptor | None, Content | None, Reason]:
        """
        See whether the repository may have the content, and open it.

        @return: what is known, what is there, and why it isn't, if it isn't.
        """
        known, missing = self._known(asked, self._name(asked), lambda name, _: self._unwritten.get(name))
        try:
            known, content, missing = await self._disk.reading(self._look_up, asked, known, missing)
        except OSError:
            return known, None, Reason.DISK
        if known is not None and content is not None and known.size != content.size and not content.proved:
            return known, await self._if_right(content), missing
        return known, content, missing

    def _look_up(
        self, asked: Asked, known: Descriptor | None, missing: Reason
    ) -> tuple[Descriptor | None, Content | None, Reason]:
        if known is None:
            known, missing = self._known(asked, self._name(asked), self._entry_on_disk)
        return known, self.store.open(asked.digest), missing

    async def _if_right(self, content: Content) -> Content | None:
        """
        Give content of another size than was told once it is known to be right; none if it is bad.

        It may have been cut behind our back, or what was told is wrong.
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

    def _known(
        self, asked: Asked, name: str, look: Callable[[str, Route], Entry | None]
    ) -> tuple[Descriptor | None, Reason]:
        # The fact is named only when the entry says nothing: naming is a hash, and hits from memory are many.
        known = _said(asked, look(name, asked.route))
        if known is not None:
            return known, Reason.NOT_KEPT
        return _said(asked, look(self._fact_name(asked.route), asked.route)), Reason.FIRST_USE

    async def look_up_manifest(self, asked: Asked) -> tuple[Descriptor, Document] | Reason:
        """
        Read a manifest that the repository may have, or give the reason why it can't be had here.

        It is read once, and in memory once, for all who ask at the same time.
        """

        async def look() -> tuple[Descriptor, Document] | Reason:
            return await self._disk.reading(self._look_up_manifest, asked, self._own_types.get(asked.digest))

        try:
            return await self._looks.join((self._name(asked), asked.accept), look)
        except OSError:
            return Reason.DISK

    def _look_up_manifest(self, asked: Asked, parsed: Document | None) -> tuple[Descriptor, Document] | Reason:
        known, missing = self._known(asked, self._name(asked), self._entry_on_disk)
        document = self._read_document(asked.digest, parsed) if known is not None else None
        if known is None or document is None:
            return missing
        # Which type it has was told by an index that lists it: ECR decides if the manifest says otherwise.
        return (known, document) if _fits(document, known) else Reason.FIRST_USE

    async def document(self, digest: Digest) -> Document | None:
        """
        Recall or read a manifest, whoever may have it; none if it isn't there.
        """
        document = self._documents.get(digest)
        if document is not None:
            self._used(str(digest), self._read, digest)
            return document

        async def read() -> Document | None:
            return await self._disk.reading(self._read_document, digest, self._own_types.get(digest))

        with contextlib.suppress(OSError):
            document = await self._reads.join(digest, read)
        if document is not None:
            self.hold(digest, document)
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

    async def entry(self, asked: Asked) -> Entry:
        """
        Recall or read what is known of a tag; an empty entry if nothing is.
        """
        name = self._name(asked)
        entry = self._entries.get(name)
        if entry is not None:
            self._used(name, self._entry_on_disk, name, asked.route)
            return entry
        with contextlib.suppress(OSError):
            entry = await self._disk.reading(self._entry_on_disk, name, asked.route)
        return entry or Entry.of(self._registry, asked.route)

    def note(self, asked: Asked, known: Descriptor) -> None:
        """
        Hold in memory what an entry or a fact on the disk said.
        """
        self._hold_entry(self._name(asked), self._entry_of(asked.route, known))

    def _entry_of(self, route: Route, descriptor: Descriptor) -> Entry:
        return Entry.of(self._registry, route, {ANY: Confirmed(descriptor, self._now())})

    def why_missing(self, asked: Asked, reason: Reason) -> Reason:
        """
        Return C{FIRST_USE} in place of C{NOT_KEPT} for what only HEADs have asked for: nothing was fetched for them.
        """
        key = self._name(asked), asked.accept if asked.route.digest is None else ANY
        if reason is Reason.NOT_KEPT and self._only_heads.get(key):
            reason = Reason.FIRST_USE
        if asked.head and reason is Reason.FIRST_USE:
            self._only_heads.put(key, True, 500 + 100 * len(key[1]))  # noqa: FBT003 (a value)
        else:
            self._only_heads.drop(key)
        return reason

    def release(self, size: int) -> None:
        """
        Give back room that a writer had.
        """
        self._room.release(size)

    def remember(self, asked: Asked, descriptor: Descriptor) -> None:
        """
        Note that ECR said that the repository holds what was asked for by its digest.
        """
        on_its_own(self._remember(asked, descriptor))

    def held(self, digest: Digest) -> Document | None:
        """
        Return a manifest that is held in memory, whoever may have it.
        """
        return self._documents.get(digest)

    def hold(self, digest: Digest, small: bytes | Document) -> None:
        """
        Hold a small blob or a manifest in memory, verified.
        """
        if isinstance(small, Document):
            self._documents.put(digest, small, len(small.body) + 500)
            self._own_types.put(digest, replace(small, body=b""), 500)
        else:
            self._blobs.put(digest, small, len(small) + 400)

    def _hold_entry(self, name: str, entry: Entry) -> None:
        self._entries.put(name, entry, entry.weight)

    async def hit(self, asked: Asked, tag_ttl: float) -> Answer | None:
        """
        Answer without ECR, if that is possible.

        @param tag_ttl: seconds for which a tag's digest is taken on trust.
        """
        answer = await self._hit(asked, tag_ttl)
        return None if answer is None else await self.from_file(answer)

    async def _hit(self, asked: Asked, tag_ttl: float) -> Answer | None:
        if asked.route.digest is None:
            return await self._fresh_tag(asked, tag_ttl) if tag_ttl else None
        answer = self.at_hand(asked)
        if answer is not None:
            return answer
        return await (self._blob_hit(asked) if asked.route.kind is Kind.BLOB else self._manifest_hit(asked))

    async def _blob_hit(self, asked: Asked) -> Answer | None:
        known, content, _ = await self.look_up(asked)
        if content is None or known is None:
            return None  # what was opened closes itself
        if not asked.head:
            return await self.shelved(asked, known, content)
        return Answer(CacheStatus.HIT, Reason.CACHED, BLOB_TYPE, asked.digest, content.size)

    async def _manifest_hit(self, asked: Asked) -> Answer | None:
        found = await self.look_up_manifest(asked)
        return None if isinstance(found, Reason) else self.manifest(asked, *found)

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
        return replace(answer, body=content)

    def manifest(self, asked: Asked, known: Descriptor, document: Document) -> Answer:
        """
        Answer with a manifest that was found in the directory, and hold it in memory.
        """
        self.hold(asked.digest, document)
        self.note(asked, known)
        return manifest_answer(CacheStatus.HIT, Reason.CACHED, asked, known, document.body)

    async def _fresh_tag(self, asked: Asked, tag_ttl: float) -> Answer | None:
        entry = None
        with contextlib.suppress(OSError):
            entry = await self._disk.reading(self._entry_on_disk, self._name(asked), asked.route)
        known = entry.answers.get(asked.accept) if entry else None
        if known is None or not 0 <= self._now() - known.when < tag_ttl:
            return None
        document = await self.document(known.descriptor.digest)
        if document is None:
            return None
        return manifest_answer(CacheStatus.HIT, Reason.TAG_TTL, asked, known.descriptor, document.body)

    async def shelved(
        self, asked: Asked, known: Descriptor | None, content: Content, *, confirmed: bool = False
    ) -> Answer | None:
        """
        Answer from the cache; none if what is there turns out to be bad.

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
        self.hold(asked.digest, body)
        if known is not None:
            self.note(asked, known)
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
        step: Deferred[T] = self._hashing.run(self._disk.hashing, blocking, *args)
        return step

    async def left(self, digest: Digest, expected: int | None) -> Left | None:
        """
        See what an earlier transfer has left to go on with.

        @param expected: how many bytes it has by what is known.
        """
        if expected is not None and expected < WORTH_RESUMING:
            return None
        with contextlib.suppress(OSError):
            return await self._disk.writing(self.store.arriving.left, digest)
        return None

    async def writer(
        self, digest: Digest, size: int | None, begun: Callable[[], Awaitable[bool]] | None = None
    ) -> Writer | Reason:
        """
        Begin the file of a transfer, or go on with one; or tell why the cache can't have it.

        @param begun: waits for the first bytes, if other content has to be evicted; returns whether they came.
        """
        if size is None:
            return Reason.SIZE_UNKNOWN
        if size >= WORTH_RESUMING:
            try:
                resume = partial(self.store.arriving.resume, digest, size)
                writer = await undone_if_late(self._disk.writing, resume, self._left_again)
            except OSError:
                return Reason.DISK
            if writer is not None:
                return writer
        if (refused := await self._make_room(room_for(size), begun)) is not None:
            return refused
        try:
            begin = partial(self.store.writer, digest, size)
            return await undone_if_late(self._disk.writing, begin, Writer.discard)
        except BaseException as problem:
            self._room.release(room_for(size))
            if not isinstance(problem, OSError):  # those the store has told
                raise
            return Reason.DISK

    def _left_again(self, writer: Writer | None) -> None:
        if writer is not None:
            writer.leave()
            self._room.release(writer.room)

    async def _make_room(self, size: int, begun: Callable[[], Awaitable[bool]] | None) -> Reason | None:
        if not await self._room.can_hold(size):
            return Reason.TOO_LARGE
        if begun is not None and not self._room.fits(size) and not await begun():
            return Reason.NO_ROOM
        return None if await self._has_room(size) else Reason.NO_ROOM

    async def _has_room(self, size: int) -> bool:
        try:
            return await self._room.reserve(size)
        except Exception:  # noqa: BLE001 (whatever the janitor's trouble, a pull goes on without it)
            log.failure("Making room in the cache")
            return False

    def keep(self, route: Route, descriptor: Descriptor, document: Document) -> None:
        """
        Keep a manifest that ECR gave, and learn what it lists: in memory at once, on the disk in its own time.
        """
        self.hold(descriptor.digest, document)
        if self._storing + _weight(document) <= _STORING_BYTES:
            on_its_own(self._keep(route, descriptor, document))

    async def _keep(self, route: Route, descriptor: Descriptor, document: Document) -> None:
        facts: Sequence[tuple[str, Entry]] = ()
        self._storing += _weight(document)
        try:
            facts = await self._learned(route.repository, descriptor, document)
            writer = await self.writer(descriptor.digest, descriptor.size)
            stored = not isinstance(writer, Reason) and await self._stored(writer, document.body)
            if stored and self._may_learn(route.repository, descriptor):
                await self._save_all(facts)
        finally:
            self._storing -= _weight(document)
            self._forget_unwritten(facts)

    async def _stored(self, writer: Writer, body: bytes) -> bool:
        try:
            await self._disk.committing(_write, writer, body)
        except OSError as problem:
            log.info("Not kept: {digest}: {problem}", digest=writer.digest, problem=problem)
            return False
        finally:
            self._room.release(writer.room)
        return True

    async def _remember(self, asked: Asked, descriptor: Descriptor) -> None:
        """
        Note that ECR said that the repository holds what was asked for by its digest.
        """
        await self._save(self._name(asked), self._entry_of(asked.route, descriptor))

    def holds(self, asked: Asked, size: int | None) -> None:
        """
        Note that ECR said that the repository holds a blob.

        @param size: in bytes; nothing is noted while that isn't known.
        """
        if size is not None:
            self.remember(asked, Descriptor(BLOB_TYPE, asked.digest, size))

    async def confirm(self, asked: Asked, descriptor: Descriptor, document: Document) -> None:
        """
        Note that ECR said that the repository holds a manifest, which another brought in.
        """
        await self._remember(asked, descriptor)
        if self._may_learn(asked.route.repository, descriptor):
            await self._save_all(await self._learned(asked.route.repository, descriptor, document))

    async def record(self, asked: Asked, question: int, descriptor: Descriptor, document: Document | None) -> None:
        """
        Note what ECR said that a tag leads to.

        @param question: the number of the question; an answer to an earlier one than was answered last is outdated.
        @param document: the manifest, where the cache had it already: what it lists is the repository's too.
        """
        name = self._name(asked)
        known, entry = await self._locks.run(name, partial(self._record, name, asked, question, descriptor))
        if entry is None:
            return
        changed = known is None or known.descriptor != descriptor
        facts: Sequence[tuple[str, Entry]] = ()
        if changed and document is not None and self._may_learn(asked.route.repository, descriptor):
            facts = await self._learned(asked.route.repository, descriptor, document)
        if changed or known is None or not 0 <= self._now() - known.when < _UNWRITTEN_SECONDS:
            await self._in_room(entry, partial(self._locks.run, name, partial(self._write_latest, name)))
        await self._save_all(facts)

    async def _record(
        self, name: str, asked: Asked, question: int, descriptor: Descriptor
    ) -> tuple[Confirmed | None, Entry | None]:
        """
        Give what was known, and the entry as it is now; none if the answer is outdated.
        """
        before = await self.entry(asked)
        if not self._order(name).answer(asked.accept, descriptor.media_type, question):
            return None, None
        entry = before.with_answer(asked.accept, Confirmed(descriptor, self._now()))
        self._hold_entry(name, entry)
        return before.answers.get(asked.accept), entry

    def _order(self, name: str) -> Order:
        order = self._orders.get(name) or Order()
        self._orders.put(name, order, _ORDER_BYTES)
        return order

    async def forget(self, asked: Asked, question: int) -> None:
        """
        Forget what a tag led to: ECR answered 404. The content stays for whoever else it serves.

        Answers of types that the client does not accept stay: ECR was not asked for them.

        @param question: the number of the question; what was answered to later ones stays.
        """
        name = self._name(asked)
        await self._locks.run(name, partial(self._forget, name, asked, question))

    async def _forget(self, name: str, asked: Asked, question: int) -> None:
        entry, order = await self.entry(asked), self._order(name)
        types = {accept: known.descriptor.media_type for accept, known in entry.answers.items()}
        left = order.forget(asked.accept, question, types)
        if types and left == types.keys():
            return
        if left:
            self._hold_entry(name, replace(entry, answers={accept: entry.answers[accept] for accept in left}))
            await self._write_latest(name)
        else:
            self._entries.drop(name)
            with contextlib.suppress(OSError):
                await self._disk.writing(self.store.forget, name)

    def _may_learn(self, repository: str, descriptor: Descriptor) -> bool:
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

    async def _learned(
        self, repository: str, descriptor: Descriptor, document: Document
    ) -> Sequence[tuple[str, Entry]]:
        """
        Note in memory as facts that the repository holds a manifest, and what it lists; they are yet to be saved.
        """
        lists = await self.parse(document.body, partial(_listed, media_type=descriptor.media_type))
        facts = []
        for kind, each in [(Kind.MANIFEST, descriptor), *lists][:FACTS]:
            route = Route(kind, repository, str(each.digest), each.digest)
            facts.append((self._fact_name(route), self._entry_of(route, each)))
        self._unwritten.update(facts)
        return facts

    async def _save_all(self, facts: Sequence[tuple[str, Entry]]) -> None:
        try:
            for name, entry in facts:
                await self._save(name, entry)
        finally:
            self._forget_unwritten(facts)

    def _forget_unwritten(self, facts: Sequence[tuple[str, Entry]]) -> None:
        for name, entry in facts:
            if self._unwritten.get(name) is entry:
                del self._unwritten[name]

    def forget_all(self) -> None:
        """
        Forget what is held in memory: the directory has less than it had.
        """
        for memory in (self._blobs, self._documents, self._entries, self._touched, self._learnt, self._unwritten):
            memory.clear()

    async def _save(self, name: str, entry: Entry) -> None:
        await self._in_room(entry, partial(self._write, name, entry))

    async def _in_room(self, entry: Entry, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """
        Call C{write} once there is room on the disk for an entry such as this one; not at all if there is none.
        """
        room = occupied(len(entry.to_json()))
        if await self._has_room(room):
            try:
                await write()
            finally:
                self._room.release(room)

    async def _write(self, name: str, entry: Entry) -> None:
        try:
            await self._disk.writing(self.store.save, name, entry)
            self._hold_entry(name, entry)
        except OSError as problem:
            log.debug("Not noted on the disk: {problem}", problem=problem)

    async def _write_latest(self, name: str) -> None:
        """
        Write what is known by now: a late write brings back nothing that was forgotten or purged meanwhile.
        """
        entry = self._entries.get(name)
        if entry is not None:
            await self._write(name, entry)


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


def _said(asked: Asked, entry: Entry | None) -> Descriptor | None:
    """
    Tell what an entry says of the digest that was asked for.
    """
    confirmed = entry.answers.get(ANY) if entry else None
    return confirmed.descriptor if confirmed is not None and confirmed.descriptor.digest == asked.digest else None


def _write(writer: Writer, body: bytes) -> None:
    """
    Write small content in one go. Called in a thread.
    """
    try:
        writer.write(0, [body])
        writer.commit()
    except BaseException:
        writer.discard()
        raise
    writer.close()
