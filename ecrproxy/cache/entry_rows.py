"""
The rows about repositories: the content of each, the digests of its tags, and how these changed.
"""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from ecrproxy.cache.cells import ALGORITHMS, DamagedError, Move, as_number, as_text, moment, packed, the_row, unpacked
from ecrproxy.cache.database import Database
from ecrproxy.cache.entries import ANSWERS_LIMIT, VARIANTS_LIMIT, Confirmed, Entry, EntryKey
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, MANIFEST_TYPES, Descriptor, Digest, Kind

PAGE: Final = 1000
"""Rows read by one statement."""
_KINDS: Final = (Kind.MANIFEST, Kind.BLOB)
_PREFIXES: Final = " ".join(f"WHEN x'{number:02x}' THEN '{each}-'" for number, each in enumerate(ALGORITHMS))
_ARRIVING_NAME: Final = f"CASE substr(digest, 1, 1) {_PREFIXES} END || lower(hex(substr(digest, 2)))"
"""The name of a digest's file in arriving/: see L{ecrproxy.cache.paths.arriving_path}."""


class EntryRows(Database):
    """
    The entries of a database.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self._repositories: dict[tuple[str, str], int] = {}
        super().__init__(path, read_only=read_only)

    def _undone(self) -> None:
        self._repositories.clear()

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry. A fact applies to every variant.
        """
        repository = self._repository(key)
        if repository is None:
            return None
        if key.is_tag:
            rows = self._query(
                "SELECT accepts, digest, media_type, size, confirmed, NULL FROM tag"
                " WHERE repository = ? AND tag = ? AND variant = ?",
                *(repository, key.reference, key.variant),
            )
        else:
            rows = self._query(
                "SELECT '', digest, media_type, size, confirmed, manifest FROM holds"
                " WHERE repository = ? AND digest = ? AND kind = ? AND"
                " (variant = ? OR variant = '' AND manifest IS NOT NULL) ORDER BY variant DESC LIMIT 1",
                *(repository, packed(Digest.parse(key.reference)), _KINDS.index(key.kind), key.variant),
            )
        return _entry(rows)

    def save(self, entries: Iterable[tuple[EntryKey, Entry]], now: float) -> None:
        """
        Store entries. Each answer replaces an older one for the same set of types.

        @param now: answers confirmed later than this are from before the clock was set back, and count as older.
        """
        with self._transaction() as connection:
            for key, entry in entries:
                repository = self._made(connection, key)
                if key.is_tag:
                    _save_tag(connection, repository, key, entry, now)
                else:
                    _save_held(connection, repository, key, entry)

    def forget_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float, now: float) -> None:
        """
        Delete a tag's answers for some sets of types, except those requested after C{asked} and up to C{now}.
        """
        with self._transaction() as connection:
            repository = self._repository(key)
            connection.executemany(
                "DELETE FROM tag WHERE repository = ? AND tag = ? AND variant = ? AND accepts = ?"
                " AND NOT (confirmed > ? AND confirmed <= ?)",
                [
                    (repository, key.reference, key.variant, " ".join(sorted(accept)), moment(asked), moment(now))
                    for accept in accepts
                ],
            )

    def forget(self, keys: Iterable[EntryKey]) -> None:
        """
        Delete entries.
        """
        with self._transaction() as connection:
            self._forget(connection, keys)

    def _forget(self, connection: sqlite3.Connection, keys: Iterable[EntryKey]) -> int:
        before = connection.total_changes
        for key in keys:
            repository = self._repository(key)
            if key.is_tag:
                connection.execute(
                    "DELETE FROM tag WHERE repository = ? AND tag = ? AND variant = ?",
                    (repository, key.reference, key.variant),
                )
            else:
                connection.execute(
                    "DELETE FROM holds WHERE repository = ? AND digest = ? AND kind = ? AND variant = ?",
                    (repository, packed(Digest.parse(key.reference)), _KINDS.index(key.kind), key.variant),
                )
        return connection.total_changes - before

    def _repository(self, key: EntryKey) -> int | None:
        names = str(key.registry), key.repository
        known = self._repositories.get(names)
        if known is not None:
            return known
        for (found,) in self._query("SELECT id FROM repository WHERE registry = ? AND name = ?", *names):
            self._remember_repository(names, found)
            return int(found)
        return None

    def _made(self, connection: sqlite3.Connection, key: EntryKey) -> int:
        names = str(key.registry), key.repository
        known = self._repositories.get(names)  # another thread may forget it at any time
        if known is None:
            connection.execute(
                "INSERT OR IGNORE INTO repository (id, registry, name) VALUES (?, ?, ?)", (number_of(*names), *names)
            )
            (found,) = the_row(connection.execute("SELECT id FROM repository WHERE registry = ? AND name = ?", names))
            self._remember_repository(names, found)
            return int(found)
        return known

    def _remember_repository(self, names: tuple[str, str], number: int) -> None:
        if len(self._repositories) >= PAGE:
            self._repositories.clear()
        self._repositories[names] = number

    def entries(self) -> Iterator[tuple[EntryKey, Entry, float]]:
        """
        Yield all entries with their last use: that of the content, or ECR's last confirmation if it is later.
        """
        repositories = self._query("SELECT id, registry, name FROM repository ORDER BY name, registry")
        for number, registry, name in repositories:
            yield from self._tags(number, RegistryId(as_text(registry)), as_text(name))
            yield from self._held(number, RegistryId(as_text(registry)), as_text(name))

    def _tags(
        self, repository: int, registry: RegistryId, name: str, last: tuple[str, str, str] = ("", "", "")
    ) -> Iterator[tuple[EntryKey, Entry, float]]:
        while rows := self._query(
            "SELECT tag, variant, accepts, digest, media_type, size, confirmed FROM tag"
            " WHERE repository = ? AND (tag, variant, accepts) > (?, ?, ?) ORDER BY tag, variant, accepts LIMIT ?",
            *(repository, *last, PAGE),
        ):
            if len(rows) == PAGE:  # the last entry may continue: it begins the next page
                rows = [row for row in rows if row[:2] != rows[-1][:2]]
            last = *rows[-1][:2], "\U0010ffff"
            for (tag, variant), some in itertools.groupby(rows, lambda row: row[:2]):
                answers = list(some)
                entry = _entry([(*row[2:], None) for row in answers]) or Entry()
                key = EntryKey(registry, Kind.MANIFEST, name, as_text(tag), as_text(variant))
                yield key, entry, max(row[6] for row in answers) / 1e6

    def _held(
        self, repository: int, registry: RegistryId, name: str, last: tuple[object, ...] = (b"", -1, "")
    ) -> Iterator[tuple[EntryKey, Entry, float]]:
        while rows := self._query(
            "SELECT holds.digest, kind, variant, media_type, holds.size, confirmed, manifest, coalesce(used, 0)"
            " FROM holds LEFT JOIN content ON content.digest = holds.digest"
            " WHERE repository = ? AND (holds.digest, kind, variant) > (?, ?, ?)"
            " ORDER BY holds.digest, kind, variant LIMIT ?",
            *(repository, *last, PAGE),
        ):
            for digest, kind, variant, media_type, size, confirmed, manifest, used in rows:
                if kind not in range(len(_KINDS)):
                    raise DamagedError("the index has something in the place of a kind")
                key = EntryKey(registry, _KINDS[kind], name, str(unpacked(digest)), as_text(variant))
                entry = _entry([("", digest, media_type, size, confirmed, manifest)]) or Entry()
                yield key, entry, max(as_number(used), confirmed) / 1e6
            last = rows[-1][:3]

    def forget_absent(self, before: float) -> Iterator[None]:
        """
        Delete entries last confirmed by ECR before this time whose content is neither there nor arriving.

        Yields after each page.
        """
        yield from self._forget_absent(before, "holds", {"repository": -1, "digest": b"", "kind": -1, "variant": ""})
        yield from self._forget_absent(before, "tag", {"repository": -1, "tag": "", "variant": "", "accepts": ""})

    def _forget_absent(self, before: float, table: str, first: Mapping[str, object]) -> Iterator[None]:
        keys, marks, last = ", ".join(first), ", ".join("?" * len(first)), tuple(first.values())
        page = f"{table} WHERE ({keys}) > ({marks}) AND ({keys}) <= ({marks})"
        absent = (
            f"{page} AND confirmed < ? AND digest NOT IN (SELECT digest FROM content)"  # noqa: S608
            f" AND {_ARRIVING_NAME} NOT IN (SELECT name FROM arriving)"
        )
        while True:
            # Find the page's last row, and whether any must go: rows that stay never leave SQLite.
            ends = self._query(
                f"SELECT {keys} FROM {table} WHERE ({keys}) > ({marks}) ORDER BY {keys} LIMIT 1 OFFSET ?",  # noqa: S608
                *(*last, PAGE - 1),
            ) or self._query(
                f"SELECT {keys} FROM {table} WHERE ({keys}) > ({marks})"  # noqa: S608
                f" ORDER BY {', '.join(f'{each} DESC' for each in first)} LIMIT 1",
                *last,
            )
            if not ends:
                return
            values = (*last, *ends[0], moment(before))
            if self._query(f"SELECT 1 FROM {absent} LIMIT 1", *values):  # noqa: S608
                with self._transaction() as connection:
                    connection.execute(f"DELETE FROM {absent}", values)  # noqa: S608
            last = ends[0]
            yield

    def moves(self, key: EntryKey) -> list[Move]:
        """
        List the moves of a tag, the newest first.
        """
        rows = self._query(
            "SELECT from_digest, to_digest, seen FROM tag_move WHERE repository = ? AND tag = ? ORDER BY id DESC",
            *(self._repository(key), key.reference),
        )
        return [Move(unpacked(before), unpacked(after), as_number(seen) / 1e6) for before, after, seen in rows]


def number_of(registry: str, repository: str) -> int:
    """
    Derive a repository's id from its names: if rows are lost, the remaining ones must not become another's.

    A truncated log brings older pages back: sequential ids would be assigned twice.
    """
    names = hashlib.sha256(f"{registry}\0{repository}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(names.digest()[:8], "big") >> 1


def _entry(rows: Sequence[tuple[str, bytes, str | None, int, int, bytes | None]]) -> Entry | None:
    answers = {}
    for accepts, digest, media_type, size, confirmed, manifest in rows:
        if media_type is not None and media_type not in MANIFEST_TYPES:  # unknown, whatever wrote it
            continue
        descriptor = Descriptor(media_type or BLOB_TYPE, unpacked(digest), as_number(size))
        through = unpacked(manifest) if manifest else None
        # Use these strings, so that each is in memory once.
        accept = MANIFEST_TYPES.intersection(as_text(accepts).split())
        answers[accept] = Confirmed(descriptor, as_number(confirmed) / 1e6, through)
    return Entry(answers) if answers else None


def _save_tag(connection: sqlite3.Connection, repository: int, key: EntryKey, entry: Entry, now: float) -> None:
    """
    Store ECR's answers about a tag, one for each set of types. Answers of other processes for other types stay.

    So do theirs for the same types if they were requested later.
    """
    answers = {" ".join(sorted(accept)): known for accept, known in entry.answers.items()}
    connection.executemany(
        "INSERT INTO tag (repository, tag, variant, accepts, digest, media_type, size, confirmed)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, tag, variant, accepts) DO UPDATE SET"
        " digest = excluded.digest, media_type = excluded.media_type, size = excluded.size,"
        " confirmed = excluded.confirmed WHERE excluded.confirmed >= confirmed OR confirmed > ?",
        [
            (
                *(repository, key.reference, key.variant, accepts),
                *(packed(known.descriptor.digest), known.descriptor.media_type, known.descriptor.size),
                *(moment(known.when), moment(now)),
            )
            for accepts, known in answers.items()
        ],
    )
    connection.execute(
        "DELETE FROM tag WHERE (repository, tag, variant) = (?, ?, ?) AND accepts NOT IN (SELECT accepts FROM tag"
        " WHERE (repository, tag, variant) = (?, ?, ?) ORDER BY confirmed DESC LIMIT ?)",
        (repository, key.reference, key.variant) * 2 + (ANSWERS_LIMIT,),
    )
    if key.variant:
        connection.execute(
            "DELETE FROM tag WHERE (repository, tag) = (?, ?) AND variant IN (SELECT variant FROM tag"
            " WHERE (repository, tag) = (?, ?) AND variant <> ''"
            " GROUP BY variant ORDER BY max(confirmed) DESC LIMIT -1 OFFSET ?)",
            (repository, key.reference) * 2 + (VARIANTS_LIMIT,),
        )


def _save_held(connection: sqlite3.Connection, repository: int, key: EntryKey, entry: Entry) -> None:
    """
    Store what a repository holds. An object that ECR has confirmed directly does not become a fact again.
    """
    for known in entry.answers.values():
        descriptor = known.descriptor
        connection.execute(
            "INSERT INTO holds (repository, digest, kind, variant, media_type, size, manifest, confirmed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, digest, kind, variant) DO UPDATE SET"
            " media_type = excluded.media_type, size = excluded.size, confirmed = excluded.confirmed,"
            " manifest = CASE WHEN manifest IS NULL THEN NULL ELSE excluded.manifest END",
            (
                *(repository, packed(descriptor.digest), _KINDS.index(key.kind), key.variant),
                *(descriptor.media_type if key.kind is Kind.MANIFEST else None, descriptor.size),
                *(None if known.manifest is None else packed(known.manifest), moment(known.when)),
            ),
        )
        if key.variant:
            about = repository, packed(descriptor.digest), _KINDS.index(key.kind)
            connection.execute(
                "DELETE FROM holds WHERE (repository, digest, kind) = (?, ?, ?) AND variant IN"
                " (SELECT variant FROM holds WHERE (repository, digest, kind) = (?, ?, ?) AND variant <> ''"
                " ORDER BY confirmed DESC LIMIT -1 OFFSET ?)",
                (*about, *about, VARIANTS_LIMIT),
            )
