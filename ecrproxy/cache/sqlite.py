"""
The rows of the index, in a SQLite database: here those of content, of what is arriving, and of purges.

Rules:

- Triggers keep the totals, so no statement can forget them.
- A list is read by pages. All columns are named: a newer version may have added some.
- Any rows may be lost, and come back as they were, without SQLite noticing it: no row's meaning depends on another's
  having stayed.
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
from ecrproxy.cache.entry_rows import PAGE, EntryRows
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.oci import Digest

PURGES: Final = 10_000
"""Purged things that are remembered, for processes to forget them one by one."""
_TRUE_TOTALS: Final = (
    "(SELECT count(*) FROM content), (SELECT cast(total(blocks) AS INTEGER) FROM content),"
    " (SELECT cast(total(blocks) AS INTEGER) FROM arriving)"
)


class Rows(EntryRows):
    """
    One database, with all of its rows.
    """

    def _stamps(self, connection: sqlite3.Connection) -> Callable[[float], int]:
        """
        Return what makes a time a use later than all before it, by any process, also after the clock was set back.
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
        Note that a file is there, used later than any other.

        @param arriving: its reservation, which ends.
        @param asked_for: whether anybody has asked for it; else it is used when C{file} says.
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
        Note that files are there of which nothing is known; what is known of others stays.
        """
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO content (digest, size, blocks, used, verified) VALUES (?, ?, ?, ?, ?)",
                [(packed(each.digest), each.size, on_disk(each.size), moment(each.used), None) for each in files],
            )

    def use(self, uses: Mapping[Digest, float], verified: Mapping[Digest, float]) -> list[Digest]:
        """
        Note when content was used, in this order, and when it was verified.

        @return: what was used, and nothing is known of.
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
        Note that files of content, and those that reservations were of, are gone.

        @param is_there: whether a file has come back: looked at within the transaction, so that whoever brings it
            later notes it later.
        """
        with self._transaction() as connection:
            _drop(connection, [each for each in digests if not is_there(each)], arriving)

    def files(self, after: Digest | None = None, limit: int = PAGE) -> list[File]:
        """
        List content in the order of digests.

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

        SQLite makes one text of a page: a row each would take the interpreter a hundred times as long.

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
        Look a file of content up.
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

    # What is arriving

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Promise C{size} bytes to what arrives, unless content and all that is promised were beyond C{limit}.

        What its name had before is its own from then on.

        @return: by how many bytes: zero if they are promised now.
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
        Note a file that arrives, or is left over, whatever the limit; in place of what its name had.
        """
        with self._transaction() as connection:
            _arrive(connection, what, size, moment(written))

    def put_back(self, promised: Iterable[tuple[Reservation, int]]) -> None:
        """
        Note what was promised before, whatever the limit, unless somebody else has the name by now.
        """
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO arriving (name, token, blocks, written) VALUES (?, ?, ?, 0)",
                [(*what, on_disk(size)) for what, size in promised],
            )

    def pass_over(self, what: Reservation) -> None:
        """
        Count an interrupted transfer as one under way.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE arriving SET written = 0 WHERE name = ? AND token = ?", what)

    def room_of(self, name: str) -> int:
        """
        Return how many bytes of disk a file has that arrives, or is left over.
        """
        return sum(as_number(blocks) for (blocks,) in self._query("SELECT blocks FROM arriving WHERE name = ?", name))

    def arriving(self) -> list[Reserved]:
        """
        List what is arriving, or was interrupted, the longest unwritten first.
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
        Forget entries, and content whose files are gone, for all processes.

        @param is_there: see L{drop}.
        @return: how many entries there were.
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
        List what was purged since; none if that isn't known any more.
        """
        rows = self._query("SELECT generation, what FROM purge WHERE generation > ? ORDER BY generation", generation)
        if rows and rows[0][0] != generation + 1:
            return None
        try:
            return [EntryKey.parse(what) if " " in what else Digest.parse(what) for _, what in rows]
        except (TypeError, ValueError):  # a newer version has purged something else
            return None

    # The whole

    def note_compared(self, began: float) -> None:
        """
        Note that all files were compared with the rows, from this moment on.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE total SET compared = ?", (moment(began),))

    def check(self) -> None:
        """
        Look for damaged pages, which takes seconds for a million rows: other calls go on meanwhile.

        Totals and SQLite's indexes are corrected. Where a log was cut, or the file was copied while it was written,
        they are of another time than the rows: what C{content_by_use} lacks is never evicted.

        @raise DamagedError: if there are any.
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
