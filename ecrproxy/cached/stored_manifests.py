"""
Manifests from ECR, stored with the facts that they give.
"""

from __future__ import annotations

from twisted.logger import Logger

from ecrproxy.cache.claim import Claim
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import room_for
from ecrproxy.cache.store import Store
from ecrproxy.cached.bodies import SmallBodies
from ecrproxy.cached.claims import Claims
from ecrproxy.cached.entries import EntryCache, KeyedEntries
from ecrproxy.cached.permissions import FACTS, Permissions
from ecrproxy.cached.room import Room
from ecrproxy.documents import Document
from ecrproxy.oci import Descriptor, Digest, Route
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk, on_its_own

log = Logger()

_STORING_BYTES = 64 * 2**20
"""Bytes of memory for manifests, and what they list, that wait for a slow disk."""


class StoredManifests:
    """
    Holds manifests in memory at once, and stores them in the background.
    """

    def __init__(
        self,
        store: Store,
        room: Room,
        disk: Disk,
        bodies: SmallBodies,
        entries: EntryCache,
        permissions: Permissions,
        claims: Claims,
    ) -> None:
        self._store, self._room, self._disk, self._bodies = store, room, disk, bodies
        self._entries, self._permissions, self._claims = entries, permissions, claims
        self._storing = 0

    def store(self, route: Route, descriptor: Descriptor, document: Document, since: int) -> None:
        """
        Store a manifest from ECR, and learn what it lists: in memory at once, on disk in the background.

        @param since: number of purges noticed when ECR was asked. After another purge nothing is learned.
        """
        self._bodies.hold(descriptor.digest, document)
        if self._storing + _weight(document) <= _STORING_BYTES:
            on_its_own(self._store_with_facts(route, descriptor, document, since))

    async def _store_with_facts(self, route: Route, descriptor: Descriptor, document: Document, since: int) -> None:
        facts: KeyedEntries = ()
        self._storing += _weight(document)
        try:
            facts = await self._permissions.learn(route.repository, descriptor, document, since)
            new = facts if facts and self._permissions.begin_writing(route.repository, descriptor) else ()
            if await self._stored(descriptor, document.body, new, since):
                self._entries.hold_all(new, since)
            elif new:
                self._permissions.fail_writing(route.repository, descriptor)
        finally:
            self._storing -= _weight(document)
            self._entries.release_unwritten(facts)

    async def _stored(self, descriptor: Descriptor, body: bytes, facts: KeyedEntries, since: int) -> bool:
        """
        Store a manifest and its facts.

        @param since: see L{EntryCache.write}.
        @return: True if it is stored, or will be.
        """
        if not await self._room.can_hold(room_for(len(body))):
            return False
        try:
            return await self._disk.committing(self._store_now, descriptor.digest, body, facts, since)
        except OSError as problem:
            log.info(
                "Not kept: {digest}: {problem}", digest=descriptor.digest, problem=problem, once=str(problem.errno)
            )
            return False

    def _store_now(self, digest: Digest, body: bytes, facts: KeyedEntries, since: int) -> bool:
        """
        Store small content, unless it exists by now or another process is about to store it. Called in a thread.

        @param since: see L{EntryCache.write}.
        @return: True if it is stored, or will be.
        @raise OSError: if the disk fails.
        """
        claim = self._store.claim(digest)
        if isinstance(claim, Claim):
            try:
                writer = self._claims.begin(claim, digest, len(body))
            except BaseException:
                self._store.arriving.let_go(claim)
                raise
            if isinstance(writer, Reason):
                return False
            writer.finish(0, body, closes=True)
        elif isinstance(claim, PeerTransfer):
            claim.close()
        if facts:
            self._entries.write(facts, since)
        return True


def _weight(document: Document) -> int:
    """
    Estimate the memory in bytes of a manifest and its facts, which take nine times the bytes of their lines.
    """
    size = len(document.body)
    return size + min(9 * size, FACTS * 1000)
