"""
What the cache can answer by itself, and what it is told.

Rules:

- What is named by its digest is good for as long as it is there. A repository may have it when ECR said so: to a
  request with the same cache key (its I{entry}), or by a manifest of the repository that lists it (a I{fact}).
- Small content is verified each time it is read from the disk, and held in memory then. Larger content is verified
  the first time it is used, and again when somebody has changed its file: see L{verification}.
- The memory is a copy: what the disk lost, it may still give; what it has dropped is read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from twisted.internet.defer import DeferredSemaphore
from twisted.logger import Logger

from ecrproxy.answers import ANY, Answer, Asked, CacheStatus, manifest_answer
from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.cache.entries import Confirmed, Entry, entry_name
from ecrproxy.cache.ingest import Left
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.store import Store
from ecrproxy.cache.trailer import WORTH_RESUMING, room_for
from ecrproxy.cache.verification import Verification
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import BLOB_TYPE, Descriptor, Digest, Kind, Route, listed
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own, undone_if_late

log = Logger()

_ENTRY_BYTES = 1024
"""What an entry is reckoned at before it is written; most have 300 bytes."""
_UNWRITTEN_SECONDS = 60
"""How long an unchanged tag's confirmation, or a use, is in memory alone."""
_BODIES_BYTES = 64 * 2**20
_ENTRIES_BYTES = 8 * 2**20
"""What of manifests and small blobs, and of entries, is held in memory."""
_STORING_BYTES = 64 * 2**20
"""What of manifests may wait for a slow disk."""
SMALL_BLOB = 64 * 2**10
"""Blobs up to so many bytes, as image configs are, are held in memory too."""
VERIFICATIONS = 4
"""How many files are hashed at the same time."""


class Room(Protocol):
    """
    Who keeps the cache within its limit: see C{janitor.Janitor}.

    @ivar limit: in bytes.
    """

    limit: int

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
    """

    def __init__(self, store: Store, room: Room, disk: Disk, now: Callable[[], float]) -> None:
        self.store, self._room, self._disk, self._now = store, room, disk, now
        self._bodies: Memory[Digest, bytes] = Memory(_BODIES_BYTES)
        self._entries: Memory[str, Entry] = Memory(_ENTRIES_BYTES)
        self._touched: Memory[str, float] = Memory(_ENTRIES_BYTES)
        self._verifications: dict[tuple[Digest, int], Verification] = {}
        self._unwritten: dict[str, Entry] = {}
        self._storing = 0
        self._hashing = DeferredSemaphore(VERIFICATIONS)

    def at_hand(self, asked: Asked) -> Answer | None:
        """
        Answer from memory, if what was asked for by its digest is held there.
        """
        body = self._bodies.get(asked.digest)
        known = self._known(asked, self._entry_at_hand)[0] if body is not None else None
        if body is None or known is None:
            return None
        self._used(asked.entry, self._look_up_manifest, asked)
        media_type = BLOB_TYPE if asked.route.kind is Kind.BLOB else known.media_type
        size, sent = len(body), None if asked.head else body
        return Answer(CacheStatus.HIT, Reason.CACHED, media_type, asked.digest, size, sent)

    def _entry_at_hand(self, name: str, route: Route) -> Entry | None:  # noqa: ARG002 (as Store.entry)
        return self._entries.get(name) or self._unwritten.get(name)

    def _used(self, name: str, look: Callable[..., object], *args: object) -> None:
        """
        Have C{look} note on the disk, now and then, what is used from memory, so that it isn't evicted first.
        """
        now, last = self._now(), self._touched.get(name)
        if last is None or not 0 <= now - last < _UNWRITTEN_SECONDS:
            self._touched.put(name, now, 200)
            if last is not None:  # it was read just now
                looked = self._disk.reading(look, *args)
                looked.addErrback(lambda problem: log.warn("Can't note a use: {problem}", problem=problem.value))

    async def look_up(self, asked: Asked) -> tuple[Descriptor | None, Content | None, Reason]:
        """
        See whether the repository may have the content, and open it.

        @return: what is known, what is there, and why it isn't, if it isn't.
        """
        known, missing = self._known(asked, lambda name, _: self._unwritten.get(name))
        try:
            return await self._disk.reading(self._look_up, asked, known, missing)
        except OSError:
            return known, None, Reason.DISK

    def _look_up(
        self, asked: Asked, known: Descriptor | None, missing: Reason
    ) -> tuple[Descriptor | None, Content | None, Reason]:
        if known is None:
            known, missing = self._known(asked, self.store.entry)
        return known, self.store.open(asked.digest, known.size if known else None), missing

    async def opened(self, digest: Digest) -> Content | None:
        """
        Open content, whoever may have it; none if it isn't there.
        """
        with contextlib.suppress(OSError):
            return await self._disk.reading(self.store.open, digest)
        return None

    def _known(self, asked: Asked, look: Callable[[str, Route], Entry | None]) -> tuple[Descriptor | None, Reason]:
        # The fact is named only when the entry says nothing: naming is a hash, and hits from memory are many.
        known = _said(asked, look(asked.entry, asked.route))
        if known is not None:
            return known, Reason.NOT_KEPT
        return _said(asked, look(_fact_name(asked.route), asked.route)), Reason.FIRST_USE

    async def look_up_manifest(self, asked: Asked) -> tuple[Descriptor | None, bytes | None, Reason]:
        """
        See what is known of a manifest, and read it.

        @return: as C{look_up} does.
        """
        try:
            return await self._disk.reading(self._look_up_manifest, asked)
        except OSError:
            return None, None, Reason.DISK

    def _look_up_manifest(self, asked: Asked) -> tuple[Descriptor | None, bytes | None, Reason]:
        known, missing = self._known(asked, self.store.entry)
        return known, self._read(asked.digest), missing

    async def body(self, digest: Digest) -> bytes | None:
        """
        Recall or read small content.
        """
        body = self._bodies.get(digest)
        if body is not None:
            self._used(str(digest), self._read, digest)
            return body
        try:
            body = await self._disk.reading(self._read, digest)
        except OSError:
            return None
        if body is not None:
            self.hold(digest, body)
        return body

    def _read(self, digest: Digest) -> bytes | None:
        """
        Read small content, small enough to be verified each time. Called in a thread.
        """
        content = self.store.open(digest)
        return None if content is None else self._verified(content)

    @staticmethod
    def _verified(content: Content) -> bytes | None:
        """
        Read open small content to its end, and let go of it; none if it is bad. Called in a thread.
        """
        try:
            body = content.read()
            state = content.digest.hasher()
            state.update(body)
            content.settle(state)
        except (OSError, DigestMismatchError) as problem:
            content.drop(problem)
            return None
        finally:
            content.close()
        return body

    async def entry(self, asked: Asked) -> Entry:
        """
        Recall or read what is known of a tag; an empty entry if nothing is.
        """
        entry = self._entries.get(asked.entry)
        if entry is not None:
            self._used(asked.entry, self.store.entry, asked.entry, asked.route)
            return entry
        with contextlib.suppress(OSError):
            entry = await self._disk.reading(self.store.entry, asked.entry, asked.route)
        return entry or Entry(asked.route.kind, asked.route.repository, asked.route.reference)

    def note(self, asked: Asked, known: Descriptor) -> None:
        """
        Hold in memory what an entry or a fact on the disk said.
        """
        self.hold_entry(asked.entry, _entry_of(asked.route, Confirmed(known, self._now())))

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

    def hold(self, digest: Digest, body: bytes) -> None:
        """
        Hold small verified content in memory.
        """
        self._bodies.put(digest, body, len(body) + 200)

    def hold_entry(self, name: str, entry: Entry) -> None:
        """
        Hold an entry in memory.
        """
        self._entries.put(name, entry, _ENTRY_BYTES)

    async def hit(self, asked: Asked, tag_ttl: float) -> Answer | None:
        """
        Answer without ECR, if that is possible.

        @param tag_ttl: seconds for which a tag's digest is taken on trust.
        """
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
        known, body, _ = await self.look_up_manifest(asked)
        if known is None or body is None:
            return None
        self.hold(asked.digest, body)
        self.note(asked, known)
        return manifest_answer(CacheStatus.HIT, Reason.CACHED, asked, known, body)

    async def _fresh_tag(self, asked: Asked, tag_ttl: float) -> Answer | None:
        entry = await self._disk.reading(self.store.entry, asked.entry, asked.route)
        known = entry.answers.get(asked.accept) if entry else None
        if known is None or not 0 <= self._now() - known.when < tag_ttl:
            return None
        body = await self.body(known.descriptor.digest)
        if body is None:
            return None
        return manifest_answer(CacheStatus.HIT, Reason.TAG_TTL, asked, known.descriptor, body)

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
            verification = self._verifications[file] = Verification(content.share(), self._disk.hashing)
            on_its_own(self._verify(file, verification))
        return verification

    async def _verify(self, file: tuple[Digest, int], verification: Verification) -> None:
        await self._hashing.acquire()
        try:
            await verification.run()
        finally:
            self._hashing.release()
            del self._verifications[file]

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

    async def writer(self, digest: Digest, size: int | None) -> Writer | Reason:
        """
        Begin the file of a transfer, or go on with one; or tell why the cache can't have it.
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
        if not await self._has_room(room_for(size)):
            return Reason.TOO_LARGE if room_for(size) > self._room.limit else Reason.NO_ROOM
        try:
            begin = partial(self.store.writer, digest, size)
            return await undone_if_late(self._disk.writing, begin, Writer.discard)
        except OSError:  # which the store has told
            self._room.release(room_for(size))
            return Reason.DISK

    def _left_again(self, writer: Writer | None) -> None:
        if writer is not None:
            writer.leave()
            self._room.release(writer.room)

    async def _has_room(self, size: int) -> bool:
        try:
            return await self._room.reserve(size)
        except Exception:  # noqa: BLE001 (whatever the janitor's trouble, a pull goes on without it)
            log.failure("Making room in the cache")
            return False

    def keep(self, route: Route, descriptor: Descriptor, body: bytes) -> None:
        """
        Keep a manifest that ECR gave, and learn what it lists: in memory at once, on the disk in its own time.
        """
        self.hold(descriptor.digest, body)
        if self._storing + len(body) <= _STORING_BYTES:
            on_its_own(self._keep(route, descriptor, body))

    async def _keep(self, route: Route, descriptor: Descriptor, body: bytes) -> None:
        facts = self._learned(route.repository, descriptor, body)
        self._storing += len(body)
        try:
            writer = await self.writer(descriptor.digest, descriptor.size)
            if not isinstance(writer, Reason) and await self._stored(writer, body):
                await self._save_all(facts)
        finally:
            self._storing -= len(body)
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
        await self._save(asked.entry, _entry_of(asked.route, Confirmed(descriptor, self._now())))

    def holds(self, asked: Asked, size: int | None) -> None:
        """
        Note that ECR said that the repository holds a blob.

        @param size: in bytes; nothing is noted while that isn't known.
        """
        if size is not None:
            self.remember(asked, Descriptor(BLOB_TYPE, asked.digest, size))

    async def confirm(self, asked: Asked, descriptor: Descriptor, body: bytes) -> None:
        """
        Note that ECR said that the repository holds a manifest, which another brought in.
        """
        await self._remember(asked, descriptor)
        await self._save_all(self._learned(asked.route.repository, descriptor, body))

    async def record(self, asked: Asked, entry: Entry, descriptor: Descriptor, body: bytes | None) -> None:
        """
        Note what ECR said that a tag leads to.

        @param body: the manifest, where the cache had it already: what it lists is the repository's too.
        """
        known, now = entry.answers.get(asked.accept), self._now()
        changed = known is None or known.descriptor != descriptor
        if changed and body is not None:
            await self._save_all(self._learned(asked.route.repository, descriptor, body))
        entry = entry.with_answer(asked.accept, Confirmed(descriptor, now))
        self.hold_entry(asked.entry, entry)
        if changed or known is None or not 0 <= now - known.when < _UNWRITTEN_SECONDS:
            await self._save(asked.entry, entry)

    def _learned(self, repository: str, descriptor: Descriptor, body: bytes) -> list[tuple[str, Entry]]:
        """
        Note as facts that the repository holds a manifest and all that it lists, to be saved or forgotten.
        """
        try:
            holds = [(Kind.MANIFEST, descriptor), *listed(body)]
        except ValueError:  # a signed manifest of old lists nothing that we read
            holds = [(Kind.MANIFEST, descriptor)]
        now, facts = self._now(), []
        for kind, each in holds:
            route = Route(kind, repository, str(each.digest), each.digest)
            facts.append((_fact_name(route), _entry_of(route, Confirmed(each, now))))
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

    async def forget(self, asked: Asked) -> None:
        """
        Forget what C{asked} led to; the content stays for whoever else it serves.
        """
        self._entries.drop(asked.entry)
        with contextlib.suppress(OSError):
            await self._disk.writing(self.store.forget, asked.entry)

    def forget_all(self) -> None:
        """
        Forget what is held in memory: the directory has less than it had.
        """
        for memory in (self._bodies, self._entries, self._touched):
            memory.clear()

    async def _save(self, name: str, entry: Entry) -> None:
        if not await self._has_room(_ENTRY_BYTES):
            return
        try:
            await self._disk.writing(self.store.save, name, entry)
            self.hold_entry(name, entry)
        except OSError as problem:
            log.debug("Not noted on the disk: {problem}", problem=problem)
        finally:
            self._room.release(_ENTRY_BYTES)


def _said(asked: Asked, entry: Entry | None) -> Descriptor | None:
    """
    Tell what an entry says of the digest that was asked for.
    """
    confirmed = entry.answers.get(ANY) if entry else None
    return confirmed.descriptor if confirmed is not None and confirmed.descriptor.digest == asked.digest else None


def _fact_name(route: Route) -> str:
    return entry_name("\0fact", route)


def _entry_of(route: Route, confirmed: Confirmed) -> Entry:
    return Entry(route.kind, route.repository, route.reference, {ANY: confirmed})


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
