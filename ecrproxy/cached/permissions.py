"""
Which repository may have which content: confirmed by ECR in reply to a request, or listed by a manifest.

Rules:

- A repository may have content if ECR said so: in reply to a request with the same cache key, or through a manifest of
  the repository that lists it (a I{fact}), if the registry accepts manifests only with everything that they list, as
  ECR does.
- Both apply to one registry, one repository, and one kind: a layer that a repository holds is not a manifest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Final

from ecrproxy.answers import ANY, Asked
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.memory import Memory
from ecrproxy.cached.bodies import SmallBodies
from ecrproxy.cached.entries import EntryCache, KeyedEntries
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.documents import Document, listed
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import BLOB_TYPE, MANIFEST_TYPES, Descriptor, Kind
from ecrproxy.reasons import Reason
from ecrproxy.threads import on_its_own

FACTS: Final = 1000
"""Maximum number of facts from one manifest, itself included. ECR confirms the rest on request."""
UNWRITTEN_SECONDS: Final = 60
"""Seconds that an unchanged confirmation, or renewed facts of a manifest, stay in memory only."""
_LEARNT_BYTES = 2**20
"""Bytes of memory for manifests that recently gave facts."""


def permission(asked: Asked, look: Callable[[EntryKey], Entry | None]) -> tuple[Confirmed | None, Reason]:
    """
    Look up whether a repository may have what is asked for by digest.

    @param look: returns an entry.
    @return: the confirmation, and the reason for asking ECR if the content is missing, or the confirmation is.
    """
    entry = look(asked.entry_key)
    known = entry.answers.get(ANY) if entry else None
    if known is None:
        return None, Reason.FIRST_USE
    return known, Reason.NOT_KEPT if known.manifest is None else Reason.FIRST_USE


class Permissions:
    """
    Records what ECR confirms of objects by digest.

    @param now: returns seconds since the epoch.
    @param checks: returns True if a registry accepts a manifest only if it has everything that the manifest lists.
    """

    def __init__(
        self,
        entries: EntryCache,
        bodies: SmallBodies,
        purges: PurgeCount,
        now: Callable[[], float],
        checks: Callable[[RegistryId], bool],
    ) -> None:
        self._entries, self._bodies, self._purges, self._now, self._checks = entries, bodies, purges, now, checks
        self._learnt: Memory[tuple[Repository, Descriptor], float] = Memory(_LEARNT_BYTES)
        self._recording: set[tuple[EntryKey, Descriptor, int]] = set()

    def hold(self, asked: Asked, known: Confirmed, since: int) -> None:
        """
        Hold a confirmation or a fact from the disk in memory. A fact is held once for all cache keys.
        """
        key = asked.entry_key if known.manifest is None else asked.entry_key._replace(variant="")
        self._entries.hold_all([(key, Entry({ANY: known}))], since)

    def record_blob(self, asked: Asked, size: int | None, since: int) -> None:
        """
        Record ECR's confirmation that the repository holds a blob, unless a purge has been noticed since.

        @param size: in bytes; nothing is recorded if it is unknown.
        @param since: number of purges noticed when ECR was asked.
        """
        if size is not None and self._purges.is_current(since):
            self.record(asked, Descriptor(BLOB_TYPE, asked.digest, size))

    def record(self, asked: Asked, descriptor: Descriptor) -> None:
        """
        Record ECR's confirmation that the repository holds an object by digest; once if several requests get it.
        """
        key = asked.entry_key
        since = self._purges.number
        about = key, descriptor, since
        if about in self._recording or self._is_recent(key, descriptor):
            return

        async def record() -> None:
            try:
                await self._record(asked, descriptor, since)
            finally:
                self._recording.discard(about)

        self._recording.add(about)
        on_its_own(record())

    async def _record(self, asked: Asked, descriptor: Descriptor, since: int) -> None:
        await self._entries.save([(asked.entry_key, self._entries.confirmed(descriptor))], since)

    def _is_recent(self, key: EntryKey, descriptor: Descriptor) -> bool:
        """
        Return True if this was recorded recently.
        """
        entry = self._entries.held(key)
        known = entry.answers.get(ANY) if entry else None
        if known is None or known.manifest is not None or known.descriptor != descriptor:
            return False
        return 0 <= self._now() - known.when < UNWRITTEN_SECONDS

    async def record_manifest(self, asked: Asked, descriptor: Descriptor, document: Document, since: int) -> None:
        """
        Record ECR's confirmation that the repository holds a manifest that another repository brought in.

        @param since: number of purges noticed when ECR was asked. After another purge nothing is recorded.
        """
        await self._record(asked, descriptor, since)
        if self._purges.is_current(since) and self.begin_writing(asked.route.repository, descriptor):
            await self._entries.save(await self.learn(asked.route.repository, descriptor, document, since), since)

    # Facts

    def begin_writing(self, repository: Repository, descriptor: Descriptor) -> bool:
        """
        Return True if the facts of a manifest should be written, and assume that they will be.

        Any number of tags may have the same manifest: otherwise each would have all its facts written.
        """
        manifest, now = (repository, descriptor), self._now()
        last = self._learnt.get(manifest)
        if last is not None and 0 <= now - last < UNWRITTEN_SECONDS:
            return False
        self._learnt.put(manifest, now, 700)
        return True

    def fail_writing(self, repository: Repository, descriptor: Descriptor) -> None:
        """
        Note that the facts of a manifest were not written.
        """
        self._learnt.drop((repository, descriptor))

    async def learn(
        self, repository: Repository, descriptor: Descriptor, document: Document, since: int
    ) -> KeyedEntries:
        """
        Hold in memory, as facts, that the repository holds a manifest and what it lists. The caller saves them.

        @return: empty if a purge has been noticed since C{since}.
        """
        lists: Sequence[tuple[Kind, Descriptor]] = ()
        if self._checks(repository.registry):
            lists = await self._bodies.parse(document.body, partial(_listed, media_type=descriptor.media_type))
        if not self._purges.is_current(since):
            return ()
        facts = []
        for kind, each in [(Kind.MANIFEST, descriptor), *lists][:FACTS]:
            key = EntryKey(repository.registry, kind, repository.name, str(each.digest))
            facts.append((key, self._entries.confirmed(each, descriptor.digest)))
        self._entries.hold_unwritten(facts)
        return facts

    async def manifest_of(self, asked: Asked) -> tuple[Descriptor, Document] | None:
        """
        Return the manifest through which a blob is known to be in the repository, if there is one.
        """
        key = asked.entry_key._replace(variant="")
        fact = await self._entries.read_fact(key)
        if fact is None or fact.manifest is None:
            return None
        known = await self._entries.read_fact(key._replace(kind=Kind.MANIFEST, reference=str(fact.manifest)))
        document = await self._bodies.document(fact.manifest) if known is not None else None
        return None if known is None or document is None else (known.descriptor, document)

    def forget_purged(self) -> None:
        """
        Have the facts of all manifests written again.
        """
        self._learnt.clear()


def _listed(body: bytes, media_type: str) -> Sequence[tuple[Kind, Descriptor]]:
    """
    Return what a manifest entitles its repository to. Layers that an index lists, as in a BuildKit cache, do not count.
    """
    known = (each for each in listed(body, media_type) if each[0] is Kind.BLOB or each[1].media_type in MANIFEST_TYPES)
    return list(islice(known, FACTS))
