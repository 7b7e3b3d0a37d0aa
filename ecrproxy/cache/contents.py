"""
What the cache has of a registry, a repository or an image: for an operator who looks at it.

Rules:

- Looking at content is no use of it, as in L{inventory}.
- Everything here is read page by page: memory does not grow with the cache. Each step of a generator is short; all of
  it is called in threads. A step that has nothing to tell yet yields None.
- Only what a repository holds is read: a manifest of another repository tells nothing about this one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from ecrproxy.cache.cells import File, Move
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.repository_rows import RepositoryRows, Row, Weight
from ecrproxy.cache.store import Store
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Descriptor, Digest, Kind

_TOGETHER: Final = 100
"""Repositories that are read by one statement."""
WEIGHED: Final = 2000
"""Maximum number of an image's parts that count in its weight. Large images have some hundreds."""


class HeldRepository(NamedTuple):
    """
    A repository with entries.
    """

    repository: Repository
    weight: Weight


class HeldImage(NamedTuple):
    """
    A tag, or a manifest by its digest.

    @ivar roots: what it leads to; several if clients accept different media types.
    @ivar confirmed: when the registry last confirmed that, in seconds since the epoch.
    @ivar weight: of all that it leads to, as far as it is in the cache.
    @ivar parts: number of its parts, in the cache or not.
    @ivar whole: False if it has more parts than are weighed.
    """

    reference: str
    roots: Sequence[Descriptor]
    confirmed: float
    weight: Weight
    parts: int
    whole: bool


class ImagePart(NamedTuple):
    """
    A manifest, a config or a layer of an image.

    @ivar lists: what it lists, if it is a manifest in the cache.
    """

    kind: Kind
    descriptor: Descriptor
    lists: Sequence[Digest] = ()


class Contents:
    """
    The contents of a cache directory by registry, repository and image.
    """

    def __init__(self, store: Store, inventory: Inventory) -> None:
        self._index, self._inventory = store.index, inventory

    @property
    def total(self) -> Weight:
        """
        Return the weight of the whole cache.
        """
        totals = self._index.totals
        return Weight(totals.files, totals.blocks)

    def repositories(
        self, registry: RegistryId | None, after: Repository | None = None
    ) -> Iterator[HeldRepository | None]:
        """
        Yield repositories with entries, ordered by registry and name.

        @param registry: that of all; None for any.
        @raise OSError: if the index can't be read.
        """
        while True:
            page = self._index.database.ask(partial(_repositories, registry, after))
            for each in page:
                weight = Weight()
                for some in self.weigh(each):
                    weight = weight.plus(some)
                    yield None
                yield HeldRepository(each, weight)
            if len(page) < _TOGETHER:
                return
            after = page[-1]

    def weigh(self, repository: Repository) -> Iterator[Weight]:
        """
        Yield the weight of a repository's content, page by page.

        @raise OSError: if the index can't be read.
        """
        return self._index.database.each(lambda rows: rows.weigh(repository))

    def files(self, repository: Repository) -> Iterator[File]:
        """
        Yield a repository's files of content, ordered by digest.

        @raise OSError: if the index can't be read.
        """
        return self._index.database.each(lambda rows: rows.held_files(repository))

    def tagged(self, repository: Repository, after: str = "") -> Iterator[HeldImage]:
        """
        Yield a repository's tags, in order.

        @param after: the last tag of the page before.
        @raise OSError: if the index can't be read.
        """
        rows = self._index.database.each(lambda rows: rows.tags(repository, after))
        for tag, some in itertools.groupby(rows, lambda row: row[0].reference):
            yield self._image(tag, list(some))

    def manifests(self, repository: Repository, after: Digest | None = None) -> Iterator[HeldImage | None]:
        """
        Yield the manifests that a repository holds, with or without a tag, ordered by digest. Blobs are steps.

        @param after: the last of the page before.
        @raise OSError: if the index can't be read.
        """
        rows = self._index.database.each(lambda rows: rows.held(repository, after))
        for reference, some in itertools.groupby(rows, lambda row: row[0].reference):
            found = [row for row in some if row[0].kind is Kind.MANIFEST]
            image = self._image(reference, found) if found else None
            # One that is only listed, such as another platform's, was not requested.
            yield image if image is not None and image.weight.files else None

    def image(self, repository: Repository, reference: str) -> HeldImage | None:
        """
        Look up a tag, or a manifest by its digest.

        @raise OSError: if the index can't be read.
        """
        found = self.entries(repository, reference)
        return self._image(reference, found) if found else None

    def entries(self, repository: Repository, reference: str) -> list[Row]:
        """
        Return the entries of a tag, or of a manifest by its digest.

        @raise OSError: if the index can't be read.
        """
        if ":" not in reference:
            return self._index.database.ask(lambda rows: rows.tag(repository, reference))
        keys = self._index.database.ask(lambda rows: rows.held_as(repository, Digest.parse(reference)))
        found = [(key, self._index.entry(key)) for key in keys if key.kind is Kind.MANIFEST]
        return [(key, entry, _confirmed(entry)) for key, entry in found if entry is not None]

    def moves(self, repository: Repository, tag: str) -> list[Move]:
        """
        Return the moves of a tag, the newest first.

        @raise OSError: if the index can't be read.
        """
        return self._index.moves(EntryKey(repository.registry, Kind.MANIFEST, repository.name, tag))

    def known(self, digest: Digest) -> File | None:
        """
        Look up a file of content.

        @raise OSError: if the index can't be read.
        """
        return self._index.known(digest)

    def parts(self, roots: Iterable[Descriptor], most: int) -> Iterator[ImagePart]:
        """
        Yield all that manifests lead to, themselves first; each once.

        @param most: number of parts; if there are more, one more is yielded. An index may list any number of indexes.
        """
        waiting, seen = deque[tuple[Kind, Descriptor]](), set[Digest]()
        found: Iterable[tuple[Kind, Descriptor]] = ((Kind.MANIFEST, each) for each in roots)
        while True:
            for kind, descriptor in found:
                if descriptor.digest not in seen and len(seen) <= most:
                    seen.add(descriptor.digest)
                    waiting.append((kind, descriptor))
            if not waiting:
                return
            kind, descriptor = waiting.popleft()
            found = self._inventory.lists(descriptor) if kind is Kind.MANIFEST else ()
            yield ImagePart(kind, descriptor, [each.digest for _, each in found])

    def _image(self, reference: str, rows: Sequence[Row]) -> HeldImage:
        roots = {each.descriptor: None for _, entry, _ in rows for each in entry.answers.values()}
        weight, count = Weight(), 0
        for part in self.parts(roots, WEIGHED):
            count += 1
            file = self._index.known(part.descriptor.digest) if count <= WEIGHED else None
            weight = weight if file is None else weight.plus(Weight(1, file.size, file.used))
        confirmed = max(_confirmed(entry) for _, entry, _ in rows)
        return HeldImage(reference, tuple(roots), confirmed, weight, count, count <= WEIGHED)


def _repositories(registry: RegistryId | None, after: Repository | None, rows: RepositoryRows) -> list[Repository]:
    return rows.repositories(registry, after, _TOGETHER)


def _confirmed(entry: Entry) -> float:
    return max((each.when for each in entry.answers.values()), default=0.0)  # none, if all its types are unknown
