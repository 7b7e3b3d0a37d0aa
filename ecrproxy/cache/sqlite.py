"""
The index's rows in a SQLite database: here those of content, transfers and purges.

Rules:

- Triggers update the totals, so no statement can forget to.
- Lists are read page by page. Statements name all columns, because a newer version may have added some.
- Rows may disappear, or revert to an old state, without SQLite noticing: the meaning of a row does not depend on
  another row.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from ecrproxy.cache.cells import (
    ALGORITHMS,
    DamagedError,
    File,
    as_number,
    as_text,
    file_of,
    moment,
    on_disk,
    packed,
    the_row,
)
from ecrproxy.cache.database import connect, errors_explained
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.entry_rows import PAGE
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.cache.repository_rows import RepositoryRows
from ecrproxy.oci import Digest

PURGES: Final = 10_000
"""Number of purged items that are remembered, for processes to forget them one by one."""
_TRUE_TOTALS: Final = (
    "(SELECT count(*) FROM content), (SELECT cast(total(blocks) AS INTEGER) FROM content),"
    " (SELECT cast(total(blocks) AS INTEGER) FROM arriving)"
)


class Rows(RepositoryRows):
    """
    One database with all of its rows.
    """

    def _stamps(self, connection: sqlite3.Connection) -> Callable[[float], int]:
        """
        Return a function that makes a time later than all uses so far, by any process, even if the clock was set back.
        """
        (last,) = the_row(connection.execute("SELECT coalesce(max(used), 0) FROM content"))
        last = as_number(last)

        def stamp(when: float) -> int:
            nonlocal last
            last = max(moment(when), last + 1)
            return int(last)

        return stamp

    # Content

    def add(self, file: File, arriving: Reservation | None = None, *, asked_for: bool = True) -> None:
        """
        Add a file, with a later use than any other.

        @param arriving: its reservation, which ends.
        @param asked_for: False if no client has requested it; then its last use is that of C{file}.
        """
        with self._transaction() as connection:
            used = self._stamps(connection)(file.used) if asked_for else moment(file.used)
            connection.execute(
                "INSERT INTO content (digest, size, blocks, used, verified) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (digest) DO UPDATE SET size = excluded.size, blocks = excluded.blocks,"
                " used = max(used, excluded.used), verified = coalesce(excluded.verified, verified)",
                (
                    *(packed(file.digest), file.size, on_disk(file.size), used),
                    None if file.verified is None else moment(file.verified),
                ),
            )
            _drop(connection, [], [] if arriving is None else [arriving])

    def add_all(self, files: Iterable[File]) -> None:
        """
        Add files that have no row. Existing rows are kept.
        """
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO content (digest, size, blocks, used, verified) VALUES (?, ?, ?, ?, ?)",
                [(packed(each.digest), each.size, on_disk(each.size), moment(each.used), None) for each in files],
            )

    def use(self, uses: Mapping[Digest, float], verified: Mapping[Digest, float]) -> list[Digest]:
        """
        Record uses of content, in this order, and verifications.

        @return: the used digests that have no row.
        """
        with self._transaction() as connection:
            change, stamp = "UPDATE content SET used = ? WHERE digest = ?", self._stamps(connection)
            unknown = [
                digest
                for digest, when in uses.items()
                if not connection.execute(change, (stamp(when), packed(digest))).rowcount
            ]
            connection.executemany(
                "UPDATE content SET verified = ? WHERE digest = ?",
                [(moment(when), packed(digest)) for digest, when in verified.items()],
            )
        return unknown

    def drop(
        self,
        digests: Iterable[Digest],
        arriving: Iterable[Reservation] = (),
        is_there: Callable[[Digest], bool] = lambda _: False,
    ) -> None:
        """
        Delete the rows of content and reservations whose files are gone.

        @param is_there: returns True if a file has come back. Checked within the transaction: a file that comes back
            later is also added later.
        """
        with self._transaction() as connection:
            _drop(connection, [each for each in digests if not is_there(each)], arriving)

    def files(self, after: Digest | None = None, limit: int = PAGE) -> list[File]:
        """
        List content, ordered by digest.

        @param after: the last of the page before.
        """
        rows = self._query(
            "SELECT digest, size, used, verified FROM content WHERE digest > ? ORDER BY digest LIMIT ?",
            b"" if after is None else packed(after),
            limit,
        )
        return [file_of(*row) for row in rows]

    def names(self, algorithm: str, prefix: str) -> Iterator[set[str]]:
        """
        Yield the hashes of content that begin with C{prefix}, page by page.

        SQLite joins a page to one text: a row for each would take the interpreter a hundred times as long.

        @param prefix: an even number of hexadecimal digits.
        """
        first = bytes([ALGORITHMS.index(algorithm)]) + bytes.fromhex(prefix)
        last = first + b"\xff" * 64
        while True:
            ((names, first),) = self._query(
                "SELECT lower(group_concat(hex(substr(digest, 2)), ' ')), max(digest) FROM"
                " (SELECT digest FROM content WHERE digest > ? AND digest <= ? ORDER BY digest LIMIT ?)",
                *(first, last, PAGE),
            )
            if names is None:
                return
            yield set(names.split())

    def known(self, digest: Digest) -> File | None:
        """
        Look up a file of content.
        """
        rows = self._query("SELECT digest, size, used, verified FROM content WHERE digest = ?", packed(digest))
        return file_of(*rows[0]) if rows else None

    def least_recently_used(self) -> Iterator[File]:
        """
        Yield content, the least recently used first.
        """
        last = (-(2**63), b"")
        while rows := self._query(
            "SELECT digest, size, used, verified FROM content WHERE (used, digest) > (?, ?)"
            " ORDER BY used, digest LIMIT ?",
            *last,
            PAGE // 4,
        ):
            yield from (file_of(*row) for row in rows)
            last = rows[-1][2], rows[-1][0]

    # Transfers

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Reserve C{size} bytes for a transfer, unless content and all reservations would then exceed C{limit}.

        The reservation replaces an earlier one of the same name.

        @return: the excess in bytes; 0 if the bytes are reserved.
        """
        with self._transaction() as connection:
            (taken,) = the_row(
                connection.execute(
                    "SELECT blocks + arriving - coalesce((SELECT blocks FROM arriving WHERE name = ?), 0) FROM total"
                    " WHERE id = 0",
                    (what.name,),
                )
            )
            excess = max(0, as_number(taken) + on_disk(size) - limit)
            if not excess:
                _arrive(connection, what, size, 0)
        return int(excess)

    def arrive(self, what: Reservation, size: int, written: float) -> None:
        """
        Add a transfer, in progress or interrupted, whatever the limit. Replaces an earlier one of the same name.
        """
        with self._transaction() as connection:
            _arrive(connection, what, size, moment(written))

    def put_back(self, promised: Iterable[tuple[Reservation, int]]) -> None:
        """
        Add earlier reservations again, whatever the limit, unless their names have been taken since.
        """
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO arriving (name, token, blocks, written) VALUES (?, ?, ?, 0)",
                [(*what, on_disk(size)) for what, size in promised],
            )

    def pass_over(self, what: Reservation) -> None:
        """
        Count an interrupted transfer as one in progress.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE arriving SET written = 0 WHERE name = ? AND token = ?", what)

    def room_of(self, name: str) -> int:
        """
        Return the bytes of disk reserved for a file that is arriving, or was interrupted.
        """
        return sum(as_number(blocks) for (blocks,) in self._query("SELECT blocks FROM arriving WHERE name = ?", name))

    def arriving(self) -> list[Reserved]:
        """
        List all transfers: those in progress, then the interrupted ones, the longest unwritten first.
        """
        rows = self._query("SELECT name, token, blocks, written FROM arriving ORDER BY written, name")
        return [
            Reserved(Reservation(as_text(name), as_text(token)), as_number(blocks), as_number(written) / 1e6)
            for name, token, blocks, written in rows
        ]

    # Purges

    def purge(
        self,
        keys: Sequence[EntryKey],
        digests: Sequence[Digest],
        is_there: Callable[[Digest], bool] = lambda _: False,
    ) -> int:
        """
        Delete entries, and content whose files are gone, for all processes.

        @param is_there: see L{drop}.
        @return: the number of entries deleted.
        """
        with self._transaction(durable=True) as connection:
            count = self._forget(connection, keys)
            _drop(connection, [each for each in digests if not is_there(each)])
            purged = [(str(each),) for each in (*keys, *digests)]
            connection.executemany("INSERT INTO purge (what) VALUES (?)", purged)
            connection.execute(
                "DELETE FROM purge WHERE generation <= (SELECT max(generation) FROM purge) - ?", (PURGES,)
            )
        return count

    def purged_since(self, generation: int) -> list[EntryKey | Digest] | None:
        """
        List what was purged since a generation. Return None if that is no longer known.
        """
        rows = self._query("SELECT generation, what FROM purge WHERE generation > ? ORDER BY generation", generation)
        if rows and rows[0][0] != generation + 1:
            return None
        try:
            return [EntryKey.parse(what) if " " in what else Digest.parse(what) for _, what in rows]
        except (TypeError, ValueError):  # a newer version has purged another kind of item
            return None

    # The whole database

    def note_compared(self, began: float) -> None:
        """
        Record when a complete comparison of all files with the rows began.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE total SET compared = ?", (moment(began),))

    def check(self) -> None:
        """
        Look for damaged pages. Takes seconds for a million rows, without blocking other calls.

        Corrects the totals and SQLite's indexes. If a log was truncated, or the file was copied during a write, they do
        not match the rows: a file that C{content_by_use} lacks would never be evicted.

        @raise DamagedError: if there are damaged pages.
        """
        if self._path is None:
            return
        with errors_explained(), contextlib.closing(connect(self._path)) as connection:
            orderly = _found_by(connection, "integrity_check") == "ok"
            if not orderly and (found := _found_by(connection, "quick_check")) != "ok":
                raise DamagedError(f"the index is damaged: {found}")
            wrong = f"SELECT 1 FROM total WHERE id = 0 AND (files, blocks, arriving) <> ({_TRUE_TOTALS})"  # noqa: S608
            if orderly and not connection.execute(wrong).fetchone():
                return
        with self._transaction() as connection:
            if not orderly:
                connection.execute("REINDEX")
            connection.execute(
                f"UPDATE total SET (files, blocks, arriving) = (SELECT {_TRUE_TOTALS}) WHERE id = 0"  # noqa: S608
            )


def _found_by(connection: sqlite3.Connection, check: str) -> str:
    (found,) = connection.execute(f"PRAGMA {check}(1)").fetchone()
    return str(found)


def _drop(connection: sqlite3.Connection, digests: Iterable[Digest], arriving: Iterable[Reservation] = ()) -> None:
    connection.executemany("DELETE FROM content WHERE digest = ?", [(packed(each),) for each in digests])
    connection.executemany("DELETE FROM arriving WHERE name = ? AND token = ?", arriving)


def _arrive(connection: sqlite3.Connection, what: Reservation, size: int, written: int) -> None:
    connection.execute(
        "INSERT INTO arriving (name, token, blocks, written) VALUES (?, ?, ?, ?) ON CONFLICT (name)"
        " DO UPDATE SET token = excluded.token, blocks = excluded.blocks, written = excluded.written",
        (*what, on_disk(size), written),
    )
