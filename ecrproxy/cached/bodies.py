"""
Small content: manifests and small blobs, held in memory, and verified each time they are read from the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from twisted.logger import Logger

from ecrproxy.cache.content import Content, DigestMismatchError, UnreadError
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.store import Store
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.documents import Document
from ecrproxy.flights import Flights
from ecrproxy.oci import Digest
from ecrproxy.threads import Disk

log = Logger()
T = TypeVar("T")

SMALL_BLOB = 64 * 2**10
"""Maximum size in bytes of blobs held in memory, such as image configs. Larger manifests are parsed in a thread."""
_BODIES_BYTES = 32 * 2**20
"""Bytes of memory for manifests, and for small blobs."""
_OWN_TYPES_BYTES = 2**20
"""Bytes of memory for the media types that manifests declare, so that those read again are not parsed again."""


class SmallBodies:
    """
    Manifests and small blobs by digest, whichever repository has them.

    @ivar blobs: those in memory.
    @ivar documents: the manifests in memory.
    """

    def __init__(self, store: Store, disk: Disk, purges: PurgeCount) -> None:
        self._store, self._disk, self._purges = store, disk, purges
        self.blobs: Memory[Digest, bytes] = Memory(_BODIES_BYTES)
        self.documents: Memory[Digest, Document] = Memory(_BODIES_BYTES)
        self._own_types: Memory[Digest, Document] = Memory(_OWN_TYPES_BYTES)
        self._reads: Flights[Document | None] = Flights()

    def held(self, digest: Digest) -> Document | None:
        """
        Return a manifest from memory, and record its use.
        """
        document = self.documents.get(digest)
        if document is not None:
            self._store.index.uses.use(digest)
        return document

    def hold(self, digest: Digest, small: bytes | Document) -> None:
        """
        Hold a verified small blob or manifest in memory.
        """
        if isinstance(small, Document):
            self.documents.put(digest, small, len(small.body) + 500)
            self._own_types.put(digest, replace(small, body=b""), 500)
        else:
            self.blobs.put(digest, small, len(small) + 400)

    def hold_read(self, digest: Digest, small: bytes | Document, since: int) -> None:
        """
        Hold content that was read, unless a purge has been noticed since.
        """
        if self._purges.is_current(since):
            self.hold(digest, small)

    def parsed(self, digest: Digest) -> Document | None:
        """
        Return a manifest without its body, if it has been parsed before: see L{read_now}.
        """
        return self._own_types.get(digest)

    async def document(self, digest: Digest) -> Document | None:
        """
        Return a manifest from memory or disk. None if it is missing.
        """
        document, since = self.held(digest), self._purges.number
        if document is not None:
            return document

        async def read() -> Document | None:
            return await self._disk.reading(self.read_now, digest, self.parsed(digest))

        with contextlib.suppress(OSError):
            document = await self._reads.join((digest, since), read)
        if document is not None:
            self.hold_read(digest, document, since)
        return document

    def read_now(self, digest: Digest, parsed: Document | None) -> Document | None:
        """
        Read a manifest, and parse it unless it has been parsed before. Called in a thread.
        """
        content = self._store.open(digest)
        body = None if content is None else read_verified(content)
        if body is None:
            return None
        if parsed is not None:
            return replace(parsed, body=body)
        try:
            return Document.read(body)
        except ValueError:  # a blob
            return None

    async def blob(self, content: Content, since: int) -> bytes | None:
        """
        Read a small blob, close its file, and hold the blob in memory. None if it is bad, or can't be read.
        """
        try:
            body = await self._disk.reading(read_verified, content)
        except OSError:
            return None
        if body is not None:
            self.hold_read(content.digest, body, since)
        return body

    async def parse(self, body: bytes, parser: Callable[[bytes], T]) -> T:
        """
        Parse a manifest; a large one in a thread, so that it does not block the event loop.
        """
        return parser(body) if len(body) <= SMALL_BLOB else await self._disk.digesting(parser, body)

    def forget_purged(self, news: News) -> None:
        """
        Drop purged content from memory.
        """
        if news.everything:
            self.blobs.clear()
            self.documents.clear()
        for each in news.purged:
            if isinstance(each, Digest):
                self.blobs.drop(each)
                self.documents.drop(each)


def read_verified(content: Content) -> bytes | None:
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
