"""
Pull-through: what is asked for comes from the cache, or through it from ECR. Read this one first.

Rules:

- What is named by its digest is asked of ECR once for each repository, and never again while it is in the cache.
- Content is shared, permission is not. A repository gets what another brought in only after ECR has said
  that this one holds it too, or a cached manifest of this one lists it (a I{fact}, see C{_learn}).
- A tag is asked for each time, or once its time to live is over: one question for all who ask at once.
  When ECR can't be asked, the last answer holds.
- Look, then register the flight, with no await between: between two awaits nobody else runs.
- The cache may fail in any way: what upstream gives is handed on all the same.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.download import Download, Flights, InThread
from ecrproxy.oci import (
    BLOB_TYPE,
    MANIFEST_TYPES,
    Descriptor,
    Digest,
    Kind,
    RegistryError,
    Route,
    listed,
    manifest_type,
)
from ecrproxy.store import Confirmed, Content, Entry, Store, Writer, entry_name
from ecrproxy.upstream import Page, UnavailableError, Upstream

log = Logger()

_ANY: frozenset[str] = frozenset()
_ENTRY_BYTES = 1024
"""What an entry is reckoned at before it is written; most have 300 bytes."""
_UNWRITTEN_SECONDS = 60
"""How long an unchanged tag's confirmation stays unwritten when no time to live needs it."""


class CacheStatus(enum.Enum):
    """
    How the cache took part in an answer: the words of X-Cache-Status.
    """

    HIT = "HIT"
    MISS = "MISS"
    JOINED = "JOINED"
    """Follows a transfer that another request began."""
    REVALIDATED = "REVALIDATED"
    """ECR confirmed it just now; the bytes are from the cache."""
    STALE = "STALE"
    """ECR could not be asked; this was its last answer."""
    BYPASS = "BYPASS"
    """Handed through without being kept."""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One request for content.

    @ivar key: its expanded cache key.
    @ivar accept: the manifest types that the client takes; empty for any.
    @ivar head: whether only the headers are wanted.
    """

    route: Route
    key: str
    accept: frozenset[str] = _ANY
    head: bool = False

    @property
    def digest(self) -> Digest:
        """
        The digest that was asked for, where one was.
        """
        if self.route.digest is None:
            raise ValueError(f"{self.route.path} has no digest")
        return self.route.digest

    @property
    def entry(self) -> str:
        """
        The name of this request's entry.
        """
        return entry_name(self.key, self.route)


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a client gets.

    @ivar size: in bytes; none while upstream hasn't said.
    @ivar body: open content, to be closed by who takes it; a transfer under way; small content whole;
        none where only headers were asked for.
    """

    status: CacheStatus
    media_type: str
    digest: Digest
    size: int | None
    body: Content | Download | bytes | None = None


class Room(Protocol):
    """
    Who keeps the cache within its limit: see C{janitor.Janitor}.
    """

    async def reserve(self, size: int) -> bool:
        """
        Make room for C{size} bytes, if it can be had; release it when they are files, or won't be.
        """

    def release(self, size: int) -> None:
        """
        Give back what was reserved.
        """


class PullThrough:
    """
    One registry's content, through the cache.

    @param now: seconds since the epoch.
    @param tag_ttl: seconds for which a tag's digest is taken on trust.
    """

    def __init__(
        self,
        upstream: Upstream,
        store: Store,
        room: Room,
        in_thread: InThread,
        now: Callable[[], float],
        tag_ttl: float = 0,
    ) -> None:
        self._upstream, self._store, self._room = upstream, store, room
        self._in_thread, self._now, self._tag_ttl = in_thread, now, tag_ttl
        self._openings: Flights[Download | None] = Flights()
        self._arriving: dict[Digest, Download] = {}
        self._carriers: dict[Digest, str] = {}
        self._heads: Flights[Descriptor | None] = Flights()
        self._sizes: Flights[int] = Flights()
        self._manifests: Flights[tuple[Descriptor, bytes]] = Flights()

    async def page(self, route: Route) -> Page:
        """
        Pass a page of tags or referrers through.

        @raise RegistryError: as ECR gave it.
        """
        return await self._upstream.page(route)

    # Blobs.

    async def blob(self, asked: Asked, start: int = 0) -> Answer:
        """
        Answer a request for a blob.

        @param start: the first byte wanted.
        @raise RegistryError: if the repository doesn't hold it, or ECR can't give it.
        """
        if asked.head:
            return await self._blob_head(asked)
        confirmed = False
        while True:
            known, content = await self._in_thread(self._look_up, asked)
            known = known or confirmed
            carrier = self._carriers.get(asked.digest)
            if content is None and carrier is None:
                return await self._carry(asked)
            if not known and (content is not None or carrier != asked.route.repository):
                if content is not None:
                    content.close()
                await self._blob_size(asked)
                confirmed = True
            elif content is not None:
                status = CacheStatus.REVALIDATED if confirmed else CacheStatus.HIT
                return Answer(status, BLOB_TYPE, asked.digest, content.size, content)
            elif (answer := await self._join(asked, start, carrier)) is not None:
                return answer

    async def _blob_head(self, asked: Asked) -> Answer:
        known, content = await self._in_thread(self._look_up, asked)
        if content is not None:
            content.close()
            if known:
                return Answer(CacheStatus.HIT, BLOB_TYPE, asked.digest, content.size)
        size = await self._blob_size(asked)
        status = CacheStatus.MISS if content is None else CacheStatus.REVALIDATED
        return Answer(status, BLOB_TYPE, asked.digest, size)

    async def _blob_size(self, asked: Asked) -> int:
        """
        Have ECR confirm that the repository holds the blob.
        """
        size = await self._sizes.join(asked.route, lambda: self._upstream.blob_size(asked.route))
        self._held(asked, size)
        return size

    def _look_up(self, asked: Asked) -> tuple[bool, Content | None]:
        """
        See whether the repository may have the content, and open it. Called in a thread.
        """
        known = self._known(asked)
        return known is not None, self._store.open(asked.digest, known.size if known else None)

    def _known(self, asked: Asked) -> Descriptor | None:
        for name in (asked.entry, _fact_name(asked.route)):
            entry = self._store.entry(name, asked.route)
            confirmed = entry.answers.get(_ANY) if entry else None
            if confirmed is not None and confirmed.descriptor.digest == asked.digest:
                return confirmed.descriptor
        return None

    async def _carry(self, asked: Asked) -> Answer:
        """
        Begin the transfer that all who ask for this digest meanwhile will follow.
        """
        route, digest = asked.route, asked.digest
        self._carriers[digest] = route.repository
        download = await self._openings.join(digest, lambda: self._open(route, digest))
        if download is None:  # it has landed since we looked
            return await self.blob(asked)
        self._held(asked, download.size)
        status = CacheStatus.MISS if download.kept else CacheStatus.BYPASS
        return Answer(status, BLOB_TYPE, digest, download.size, download)

    async def _join(self, asked: Asked, start: int, carrier: str | None) -> Answer | None:
        """
        Follow the transfer that C{carrier} began; none if the answer has to be looked for again.
        """
        digest = asked.digest
        download = self._arriving.get(digest)
        if download is None and digest in self._openings:
            try:
                download = await self._openings.join(digest, lambda: self._open(asked.route, digest))
            except RegistryError:
                if carrier == asked.route.repository:
                    raise
                return None  # what ECR said to another repository says nothing about this one
        if download is None:
            return None
        if not download.offers(start):
            return await self._alone(asked)
        self._held(asked, download.size)
        return Answer(CacheStatus.JOINED, BLOB_TYPE, digest, download.size, download)

    async def _open(self, route: Route, digest: Digest) -> Download | None:
        """
        Open the shared transfer of C{digest}; none if it turns out to be in the cache.
        """
        try:
            content = await self._in_thread(self._store.open, digest)
            if content is not None:
                content.close()
                del self._carriers[digest]
                return None
            download = await self._transfer(route, digest, keep=True)
        except BaseException:
            self._carriers.pop(digest, None)
            raise
        return download

    def _held(self, asked: Asked, size: int | None) -> None:
        if size is not None:
            self._own(self._remember(asked, Descriptor(BLOB_TYPE, asked.digest, size)))

    async def _alone(self, asked: Asked) -> Answer:
        """
        Hand the blob through to one client: the shared transfer keeps no file and has passed its start.
        """
        download = await self._transfer(asked.route, asked.digest, keep=False)
        return Answer(CacheStatus.BYPASS, BLOB_TYPE, asked.digest, download.size, download)

    async def _transfer(self, route: Route, digest: Digest, *, keep: bool) -> Download:
        blob = await self._upstream.blob(route)
        writer = await self._writer(digest, blob.size) if keep else None
        download = Download(digest, blob.size, writer, self._in_thread)
        if keep:
            self._arriving[digest] = download
        transfer = blob.deliver(download)
        self._own(self._run(download, transfer, blob.size if writer else 0, shared=keep))
        return download

    async def _run(self, download: Download, transfer: Any, reserved: int | None, *, shared: bool) -> None:  # noqa: ANN401
        try:
            await download.run(transfer)
        finally:
            self._room.release(reserved or 0)
            if shared:
                del self._arriving[download.digest]
                del self._carriers[download.digest]

    async def _writer(self, digest: Digest, size: int | None) -> Writer | None:
        """
        Begin the file of a transfer, if the cache can have it.
        """
        if size is None or not await self._room.reserve(size):
            return None
        try:
            return await self._in_thread(self._store.writer, digest, size)
        except OSError as problem:
            log.error("Can't write to the cache, going on without it: {problem}", problem=problem)
            self._room.release(size)
            return None

    # Manifests.

    async def manifest(self, asked: Asked) -> Answer:
        """
        Answer a request for a manifest.

        @raise RegistryError: if the repository doesn't hold it, or ECR can't give it.
        """
        if asked.route.digest is not None:
            return await self._manifest_by_digest(asked)
        return await self._manifest_by_tag(asked)

    async def _manifest_by_digest(self, asked: Asked) -> Answer:
        known, body = await self._in_thread(self._look_up_manifest, asked)
        if known is not None and body is not None:
            return _manifest_answer(CacheStatus.HIT, asked, known, body)
        if body is None and not asked.head:
            status = CacheStatus.JOINED if asked.route in self._manifests else CacheStatus.MISS
            descriptor, body = await self._manifests.join(asked.route, lambda: self._fetch(asked.route, _ANY))
            self._own(self._remember(asked, descriptor))
            return _manifest_answer(status, asked, descriptor, body)
        head = await self._head(asked.route, _ANY)
        if head is None:
            raise UnavailableError(502, "UNAVAILABLE", "ECR does not say which manifest it has")
        if body is None:
            return _manifest_answer(CacheStatus.MISS, asked, head)
        descriptor = Descriptor(_checked_type(head.media_type, body), asked.digest, len(body))
        self._own(self._confirm(asked, descriptor, body))
        return _manifest_answer(CacheStatus.REVALIDATED, asked, descriptor, body)

    def _look_up_manifest(self, asked: Asked) -> tuple[Descriptor | None, bytes | None]:
        """
        See what is known of a manifest, and read it. Called in a thread.
        """
        return self._known(asked), self._read(asked.digest)

    def _read(self, digest: Digest) -> bytes | None:
        """
        Read a manifest, which is small enough to be verified each time. Called in a thread.
        """
        content = self._store.open(digest)
        if content is None:
            return None
        try:
            body = content.read()
        except OSError as problem:
            log.error("Can't read {digest} from the cache: {problem}", digest=digest, problem=problem)
            return None
        finally:
            content.close()
        if Digest.of(body, digest.algorithm) == digest:
            return body
        log.error("{digest} in the cache is not what it was: dropped", digest=digest)
        self._store.remove(self._store.content_path(digest))
        return None

    async def _manifest_by_tag(self, asked: Asked) -> Answer:
        entry = await self._in_thread(self._store.entry, asked.entry, asked.route)
        entry = entry or Entry(asked.route.kind, asked.route.repository, asked.route.reference)
        known = entry.answers.get(asked.accept)
        if known is not None and 0 <= self._now() - known.when < self._tag_ttl:
            body = await self._in_thread(self._read, known.descriptor.digest)
            if body is not None:
                return _manifest_answer(CacheStatus.HIT, asked, known.descriptor, body)
        try:
            return await self._ask_for_tag(asked, entry, known)
        except UnavailableError as problem:
            last = entry.latest(asked.accept)
            body = await self._in_thread(self._read, last.descriptor.digest) if last else None
            if last is None or body is None:
                raise
            log.warn("Serving {path} as last known: {problem}", path=asked.route.path, problem=problem.message)
            return _manifest_answer(CacheStatus.STALE, asked, last.descriptor, body)
        except RegistryError as problem:
            if problem.status == 404:  # noqa: PLR2004
                await self.forget(asked)
            raise

    async def forget(self, asked: Asked) -> None:
        """
        Forget what C{asked} led to; the content stays for whoever else it serves.
        """
        await self._in_thread(self._store.forget, asked.entry)

    async def _ask_for_tag(self, asked: Asked, entry: Entry, known: Confirmed | None) -> Answer:
        """
        Have ECR say what a tag leads to; fetch it if it isn't in the cache.

        A tag that was never asked for is fetched straight away. It is fetched by its tag in any case:
        what ECR converts for a client is not to be had by its digest (field notes C7).
        """
        descriptor = None if known is None and not asked.head else await self._head(asked.route, asked.accept)
        if descriptor is not None:
            body = await self._in_thread(self._read, descriptor.digest)
            if body is not None or asked.head:
                self._own(self._record(asked, entry, descriptor, body))
                status = CacheStatus.MISS if body is None else CacheStatus.REVALIDATED
                return _manifest_answer(status, asked, descriptor, body)
        key = (asked.route, asked.accept)
        status = CacheStatus.JOINED if key in self._manifests else CacheStatus.MISS
        descriptor, body = await self._manifests.join(key, lambda: self._fetch(asked.route, asked.accept))
        self._own(self._record(asked, entry, descriptor, None))
        return _manifest_answer(status, asked, descriptor, body)

    async def _head(self, route: Route, accept: frozenset[str]) -> Descriptor | None:
        """
        Ask ECR what C{route} leads to; none if it has it, but doesn't say its digest.
        """

        async def ask() -> Descriptor | None:
            head = await self._upstream.head_manifest(route, _accept_header(accept))
            asked, told = route.digest, head.digest
            if asked is not None and told is not None and asked != told and asked.algorithm == told.algorithm:
                raise UnavailableError(502, "UNAVAILABLE", f"ECR speaks of {told} when asked for {asked}")
            digest = asked or told
            return Descriptor(head.media_type.partition(";")[0].strip(), digest, head.size) if digest else None

        return await self._heads.join((route, accept), ask)

    async def _fetch(self, route: Route, accept: frozenset[str]) -> tuple[Descriptor, bytes]:
        """
        Fetch a manifest and keep it.
        """
        manifest = await self._upstream.manifest(route, _accept_header(accept))
        digest = Digest.of(manifest.body, route.digest.algorithm if route.digest else "sha256")
        if route.digest not in (None, digest):
            raise UnavailableError(502, "UNAVAILABLE", f"ECR gave something else than {route.digest}")
        media_type = _checked_type(manifest.content_type, manifest.body)
        descriptor = Descriptor(media_type, digest, len(manifest.body))
        await self._keep(route, descriptor, manifest.body)
        return descriptor, manifest.body

    async def _keep(self, route: Route, descriptor: Descriptor, body: bytes) -> None:
        writer = await self._writer(descriptor.digest, descriptor.size)
        if writer is None:
            return
        try:
            await self._in_thread(_write, writer, body)
        except OSError as problem:
            log.error("Can't keep {digest}: {problem}", digest=descriptor.digest, problem=problem)
        else:
            await self._learn(route.repository, descriptor, body)
        finally:
            self._room.release(descriptor.size)

    # What is remembered.

    async def _record(self, asked: Asked, entry: Entry, descriptor: Descriptor, body: bytes | None) -> None:
        """
        Note what ECR said that a tag leads to.

        @param body: the manifest, where the cache had it already: what it lists is the repository's too.
        """
        known, now = entry.answers.get(asked.accept), self._now()
        changed = known is None or known.descriptor != descriptor
        if changed and body is not None:
            await self._learn(asked.route.repository, descriptor, body)
        if changed or known is None or self._tag_ttl or now - known.when > _UNWRITTEN_SECONDS:
            await self._save(asked.entry, entry.with_answer(asked.accept, Confirmed(descriptor, now)))

    async def _confirm(self, asked: Asked, descriptor: Descriptor, body: bytes) -> None:
        await self._remember(asked, descriptor)
        await self._learn(asked.route.repository, descriptor, body)

    async def _remember(self, asked: Asked, descriptor: Descriptor) -> None:
        """
        Note that ECR said that the repository holds what was asked for by its digest.
        """
        await self._save(asked.entry, _entry_of(asked.route, Confirmed(descriptor, self._now())))

    async def _learn(self, repository: str, descriptor: Descriptor, body: bytes) -> None:
        """
        Note as facts that the repository holds a manifest, and all that it lists.
        """
        try:
            holds = [(Kind.MANIFEST, descriptor), *listed(body)]
        except ValueError:  # a signed manifest of old lists nothing that we read
            holds = [(Kind.MANIFEST, descriptor)]
        now = self._now()
        for kind, each in holds:
            route = Route(kind, repository, str(each.digest), each.digest)
            await self._save(_fact_name(route), _entry_of(route, Confirmed(each, now)))

    async def _save(self, name: str, entry: Entry) -> None:
        if not await self._room.reserve(_ENTRY_BYTES):
            return
        try:
            await self._in_thread(self._store.save, name, entry)
        except OSError as problem:
            log.error("Can't write an entry to the cache: {problem}", problem=problem)
        finally:
            self._room.release(_ENTRY_BYTES)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        """
        Let work go on by itself, whose failure is nobody's answer.
        """
        Deferred.fromCoroutine(work).addErrback(lambda failure: log.failure("The cache", failure))


def _fact_name(route: Route) -> str:
    return entry_name("\0fact", route)


def _entry_of(route: Route, confirmed: Confirmed) -> Entry:
    return Entry(route.kind, route.repository, route.reference, {_ANY: confirmed})


def _accept_header(accept: frozenset[str]) -> str:
    """
    Write the types that a client takes. Who takes any is spelled out: registries don't all read C{*/*}.
    """
    return ", ".join(sorted(accept)) or ", ".join([*sorted(MANIFEST_TYPES), "*/*"])


def _checked_type(content_type: str, body: bytes) -> str:
    try:
        return manifest_type(content_type, body)
    except ValueError as problem:
        raise UnavailableError(502, "UNAVAILABLE", f"what ECR gave is no manifest: {problem}") from None


def _manifest_answer(status: CacheStatus, asked: Asked, descriptor: Descriptor, body: bytes | None = None) -> Answer:
    size = descriptor.size if body is None else len(body)
    return Answer(status, descriptor.media_type, descriptor.digest, size, None if asked.head else body)


def _write(writer: Writer, body: bytes) -> None:
    """
    Write small content in one go. Called in a thread.
    """
    try:
        writer.write([body])
        writer.commit()
    except BaseException:
        writer.discard()
        raise
    writer.close()
