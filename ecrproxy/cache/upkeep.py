"""
Purge and verify what the cache has of a registry, a repository or an image.

Rules:

- A purge removes entries of the repository, and content that no other repository holds. Of an image, it removes what no
  other image of its repository leads to.
- Memory does not grow with the cache: entries are read page by page, and an image has a limit of parts.
- Each step is short, and called in a thread. It yields a document, empty if there is nothing to tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Final, NamedTuple

from twisted.logger import Logger

from ecrproxy.cache.contents import Contents, ImagePart
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.inventory import Document, Inventory
from ecrproxy.cache.repository_rows import Row
from ecrproxy.cache.store import Store
from ecrproxy.cache.takeover import take_over
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Descriptor, Digest, Kind

log = Logger()

PARTS: Final = 20_000
"""
Maximum number of parts of an image that is purged or verified, counted again each time that one is listed. Large images
have some hundreds.
"""
_TOGETHER: Final = 200
"""Maximum number of entries, and of files, that are removed in one step."""


class TooLargeError(ValueError):
    """
    An image has more than C{PARTS} parts.
    """


class Meant(NamedTuple):
    """
    What is purged or verified: an image, a repository, or all of a registry.

    @ivar repository: its name; None for all.
    @ivar reference: a tag, or the digest of a manifest; None for all.
    """

    registry: RegistryId
    repository: str | None = None
    reference: str | None = None

    def __str__(self) -> str:
        name = f"{self.registry.host}/{self.repository}" if self.repository else self.registry.host
        if self.reference is None:
            return name
        return f"{name}{'@' if ':' in self.reference else ':'}{self.reference}"


class Upkeep:
    """
    Removes and verifies the contents of a cache directory.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, store: Store, inventory: Inventory, contents: Contents, now: Callable[[], float]) -> None:
        self._store, self._inventory, self._contents, self._now = store, inventory, contents, now
        self._index = store.index

    # Purging

    def purge(self, meant: Meant) -> Iterator[Document]:
        """
        Remove what is meant. Yields the results of each step, see L{Removed}; if it fails, a C{problem} last.
        """
        total = Counter[str]()
        try:
            for _ in take_over(self._store.root, self._index):  # otherwise old entries would come back
                yield {}
            for repository in self._repositories(meant):
                steps = self._purge_all(repository)
                if meant.reference is not None:
                    steps = self._purge_image(repository, meant.reference)
                for each in steps:
                    total.update(each)
                    yield each
        except (OSError, TooLargeError) as problem:
            yield {"problem": _told(problem)}
        finally:
            told = "Purged {what}: {entries} entries and {files} files of content, {bytes} bytes"
            log.info(told, what=str(meant), **{name: total[name] for name in ("entries", "files", "bytes")})

    def _repositories(self, meant: Meant) -> Iterator[Repository]:
        if meant.repository is not None:
            yield Repository(meant.registry, meant.repository)
            return
        after = None
        while page := self._index.database.ask(lambda rows: rows.repositories(meant.registry, after, _TOGETHER)):  # noqa: B023
            yield from page
            after = page[-1]

    def _purge_all(self, repository: Repository) -> Iterator[Document]:
        last = ""
        while tags := _references(self._index.database.each(lambda rows: rows.tags(repository, last))):  # noqa: B023
            last = tags[-1]
            yield self._remove([key for tag in tags for key, _, _ in self._contents.entries(repository, tag)], [])
        after: Digest | None = None
        while names := _references(self._index.database.each(lambda rows: rows.held(repository, after))):  # noqa: B023
            digests = [Digest.parse(each) for each in names]
            after = digests[-1]
            keys = [key for each in digests for key in self._held(repository, each)]
            yield self._remove(keys, self._unshared(repository, digests))

    def _purge_image(self, repository: Repository, reference: str) -> Iterator[Document]:
        """
        Remove an image. First find what else leads to its parts: each other manifest of the repository is read.
        """
        parts = self._parts(repository, reference)
        if not parts:
            return
        by_digest = Digest.parse(reference) if ":" in reference else None
        keys = [] if by_digest else [key for key, _, _ in self._contents.entries(repository, reference)]
        kept = set[Digest]()
        for key, entry, _ in self._index.database.each(lambda rows: rows.tags(repository)):
            roots = [each.descriptor for each in entry.answers.values()]
            if by_digest in [each.digest for each in roots]:
                keys.append(key)
            elif key.reference != reference:
                kept |= self._among(parts, roots) | (parts.keys() & {each.digest for each in roots})
            yield {}
        for key, entry, _ in self._index.database.each(lambda rows: rows.held(repository)):
            if key.kind is Kind.MANIFEST and Digest.parse(key.reference) not in parts:
                kept |= self._among(parts, [each.descriptor for each in entry.answers.values()])
            yield {}
        lost = parts.keys() - _reached(kept, parts)
        gone = [each for each in parts if each in lost or each == by_digest]
        yield self._remove(keys, [])
        for at in range(0, len(gone), _TOGETHER):
            some = gone[at : at + _TOGETHER]
            held = [key for each in some for key in self._held(repository, each)]
            yield self._remove(held, self._unshared(repository, (each for each in some if each in lost)))

    def _among(self, parts: Mapping[Digest, ImagePart], manifests: Iterable[Descriptor]) -> set[Digest]:
        """
        Return the parts that other manifests list.
        """
        return {listed.digest for each in manifests for _, listed in self._inventory.lists(each)} & parts.keys()

    def _held(self, repository: Repository, digest: Digest) -> list[EntryKey]:
        return self._index.database.ask(lambda rows: rows.held_as(repository, digest))

    def _unshared(self, repository: Repository, digests: Iterable[Digest]) -> list[Digest]:
        """
        Return the content among C{digests} that no other repository holds.
        """
        held = [each for each in dict.fromkeys(digests) if self._index.known(each) is not None]
        ask = self._index.database.ask
        return [each for each in held if not ask(lambda rows: rows.is_held_beside(repository, each))]  # noqa: B023

    def _remove(self, keys: Sequence[EntryKey], content: Sequence[Digest]) -> Document:
        return asdict(self._inventory.remove(keys, content)) if keys or content else {}

    def _parts(self, repository: Repository, reference: str) -> dict[Digest, ImagePart]:
        image = self._contents.image(repository, reference)
        parts: dict[Digest, ImagePart] = {}
        count = 0
        for each in self._contents.parts(image.roots if image is not None else (), PARTS):
            count += 1 + len(each.lists)
            if count > PARTS:
                raise TooLargeError(f"the image has more than {PARTS:,} parts: purge or verify the repository")
            parts[each.descriptor.digest] = each
        return parts

    # Verifying

    def verify(self, meant: Meant) -> Iterator[Document]:
        """
        Verify the content of what is meant, each file once. Corrupt files are dropped.

        Yields as L{Inventory.verify} does, and first how many bytes there are in all (C{of}); if it fails, a C{problem}
        last.
        """
        began = self._now()
        try:
            for size in self._sizes(meant):
                yield {"of": size}
            for digest in self._digests(meant):
                known = self._index.known(digest)
                if known is None:
                    yield {}
                elif known.verified is not None and known.verified >= began:  # another repository has it, too
                    yield {"hashed": known.size}
                else:
                    yield from self._inventory.verify(known.digest, keep=False)
        except (OSError, TooLargeError) as problem:
            yield {"problem": _told(problem)}

    def _sizes(self, meant: Meant) -> Iterator[int]:
        for repository in self._repositories(meant):
            if meant.reference is not None:
                image = self._contents.image(repository, meant.reference)
                yield image.weight.bytes if image is not None else 0
            else:
                for each in self._contents.weigh(repository):
                    yield each.bytes

    def _digests(self, meant: Meant) -> Iterator[Digest]:
        for repository in self._repositories(meant):
            if meant.reference is not None:
                yield from self._parts(repository, meant.reference)
            else:
                for each in self._contents.files(repository):
                    yield each.digest


def _references(rows: Iterable[Row]) -> list[str]:
    """
    Return the references of the first rows.
    """
    return list(dict.fromkeys(key.reference for key, _, _ in islice(rows, _TOGETHER)))


def _told(problem: Exception) -> str:
    return f"the cache's index can't be used: {problem}" if isinstance(problem, OSError) else str(problem)


def _reached(roots: Iterable[Digest], parts: Mapping[Digest, ImagePart]) -> set[Digest]:
    """
    Return C{roots} and all that they lead to among C{parts}.
    """
    reached, waiting = set[Digest](), list(roots)
    while waiting:
        digest = waiting.pop()
        if digest in parts and digest not in reached:
            reached.add(digest)
            waiting += parts[digest].lists
    return reached
