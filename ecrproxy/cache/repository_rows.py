"""
The rows about one repository at a time, for an operator who looks at it.

Rules:

- Each statement reads at most C{PAGE} rows: pulls wait for the same connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ecrproxy.cache.cells import File, as_number, as_text, file_of, packed
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.entry_rows import PAGE, EntryRows
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Digest, Kind

Row = tuple[EntryKey, Entry, float]
"""An entry and its last use."""


class Weight(NamedTuple):
    """
    What some content takes in the cache.

    @ivar used: its last use, in seconds since the epoch; 0 if there is no content.
    """

    files: int = 0
    bytes: int = 0
    used: float = 0.0

    def plus(self, other: Weight) -> Weight:
        """
        Return the weight of both.
        """
        return Weight(self.files + other.files, self.bytes + other.bytes, max(self.used, other.used))


class RepositoryRows(EntryRows):
    """
    The entries of each repository.
    """

    def repositories(self, registry: RegistryId | None, after: Repository | None, limit: int) -> list[Repository]:
        """
        List repositories that have entries, ordered by registry and name.

        @param registry: that of all; None for any.
        @param after: the last of the page before.
        """
        here, last = ("registry = ? AND", (str(registry),)) if registry is not None else ("", ())
        rows = self._query(
            f"SELECT registry, name FROM repository WHERE {here} (registry, name) > (?, ?)"  # noqa: S608
            " AND (EXISTS (SELECT 1 FROM tag WHERE repository = id)"
            " OR EXISTS (SELECT 1 FROM holds WHERE repository = id))"
            " ORDER BY registry, name LIMIT ?",
            *(*last, *(("", "") if after is None else (str(after.registry), after.name)), limit),
        )
        return [Repository(RegistryId(as_text(found)), as_text(name)) for found, name in rows]

    def weigh(self, repository: Repository) -> Iterator[Weight]:
        """
        Yield the weight of a repository's content, page by page; each file counts once.
        """
        number, last = self._number(repository), b""
        while number is not None:
            ((rows, files, size, used, last),) = self._query(
                "SELECT count(*), count(size), cast(total(size) AS INTEGER), coalesce(max(used), 0), max(digest) FROM"
                " (SELECT DISTINCT holds.digest AS digest, content.size AS size, used FROM holds"
                " LEFT JOIN content ON content.digest = holds.digest"
                " WHERE repository = ? AND holds.digest > ? ORDER BY holds.digest LIMIT ?)",
                *(number, last, PAGE),
            )
            yield Weight(files, as_number(size), as_number(used) / 1e6)
            number = number if rows == PAGE else None

    def held_files(self, repository: Repository) -> Iterator[File]:
        """
        Yield a repository's content, ordered by digest.
        """
        number, last = self._number(repository), b""
        while rows := self._query(
            "SELECT DISTINCT holds.digest, content.size, used, verified FROM holds"
            " LEFT JOIN content ON content.digest = holds.digest"
            " WHERE repository = ? AND holds.digest > ? ORDER BY holds.digest LIMIT ?",
            *(number, last, PAGE),
        ):
            yield from (file_of(*row) for row in rows if row[1] is not None)
            last = rows[-1][0]

    def tags(self, repository: Repository, after: str = "") -> Iterator[Row]:
        """
        Yield the entries of a repository's tags, ordered by tag.

        @param after: the last tag of the page before.
        """
        number = self._number(repository)
        return iter(()) if number is None else self._tags(number, *repository, (after, "\U0010ffff", ""))

    def tag(self, repository: Repository, tag: str) -> list[Row]:
        """
        Return the entries of one tag.
        """
        variants = self._query(
            "SELECT DISTINCT variant FROM tag WHERE repository = ? AND tag = ?", self._number(repository), tag
        )
        keys = [
            EntryKey(repository.registry, Kind.MANIFEST, repository.name, tag, as_text(each)) for (each,) in variants
        ]
        found = [(key, entry) for key in keys if (entry := self.entry(key)) is not None]
        return [(key, entry, max(each.when for each in entry.answers.values())) for key, entry in found]

    def held(self, repository: Repository, after: Digest | None = None) -> Iterator[Row]:
        """
        Yield the entries of what a repository holds, ordered by digest.

        @param after: the last digest of the page before.
        """
        number = self._number(repository)
        last = (b"", -1, "") if after is None else (packed(after), len(Kind), "")
        return iter(()) if number is None else self._held(number, *repository, last)

    def held_as(self, repository: Repository, digest: Digest) -> list[EntryKey]:
        """
        Return the keys of a repository's entries for a digest.
        """
        rows = self._query(
            "SELECT kind, variant FROM holds WHERE repository = ? AND digest = ?",
            *(self._number(repository), packed(digest)),
        )
        kinds = (Kind.MANIFEST, Kind.BLOB)
        return [
            EntryKey(repository.registry, kinds[kind], repository.name, str(digest), as_text(variant))
            for kind, variant in rows
            if kind in range(len(kinds))
        ]

    def is_held_beside(self, repository: Repository, digest: Digest) -> bool:
        """
        Return True if another repository holds a digest. Looks at each repository: there is no index by digest.
        """
        return bool(
            self._query(
                "SELECT 1 FROM repository CROSS JOIN holds ON holds.repository = repository.id AND digest = ?"
                " WHERE repository.id <> ? LIMIT 1",
                *(packed(digest), self._number(repository)),
            )
        )

    def _number(self, repository: Repository) -> int | None:
        return self._repository(EntryKey(repository.registry, Kind.MANIFEST, repository.name, ""))
