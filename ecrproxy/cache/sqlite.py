"""
The rows of the index, in a SQLite database. All SQL of the project is here.

Rules:

- Every write is one transaction that begins with BEGIN IMMEDIATE: one that read first could not be retried
  (SQLITE_BUSY_SNAPSHOT). Triggers keep the totals, so no statement can forget them.
- One connection reads, another writes, each behind a lock, so no more than two page caches are in memory.
  In WAL mode neither waits for the other. No transaction outlives a call: a list is read by pages.
- Migrations only add: an older daemon may have the same database open. All columns are named.
- Times are whole microseconds since the epoch. A digest is a byte for its algorithm and the hash.
- Any rows may be lost, and come back as they were, without SQLite noticing it: no row's meaning depends on another's
  having stayed. What is read is checked, and is damage if nobody can have written it.
- sqlite3's errors leave as L{BusyError}, L{DamagedError} or L{UnusableError}, which are OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from ecrproxy.cache.entries import ANSWERS_LIMIT, VARIANTS_LIMIT, Confirmed, Entry, EntryKey
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, HEX_LENGTHS, MANIFEST_TYPES, SIZE_LIMIT, Descriptor, Digest, Kind

BUSY_SECONDS: Final = 2.0
"""How long a write waits for the write lock of another process: it is held for milliseconds."""
PAGE: Final = 1000
"""Rows that are read in one statement."""
PURGES: Final = 10_000
"""Purged things that are remembered, for processes to forget them one by one."""
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk that has no room."""
_BLOCK: Final = 4096
_DAMAGED: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
)
"""No statement here breaks a constraint of what is made here: some other rule is in its place."""
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FULL_IN_DETAIL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_DAMAGED_IN_DETAIL: Final = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_READONLY_DBMOVED})
_ALGORITHMS: Final = ("sha256", "sha512")
_KINDS: Final = (Kind.MANIFEST, Kind.BLOB)

_STATE: Final = (
    "SELECT files, blocks, arriving, (SELECT min(used) FROM content), compared,"
    " coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'purge'), 0) FROM total WHERE id = 0"
)
_TRUE_TOTALS: Final = (
    "(SELECT count(*) FROM content), (SELECT cast(total(blocks) AS INTEGER) FROM content),"
    " (SELECT cast(total(blocks) AS INTEGER) FROM arriving)"
)
_MIGRATIONS: Final = (
    """
    CREATE TABLE content (
        digest BLOB PRIMARY KEY, size INTEGER NOT NULL, blocks INTEGER NOT NULL, used INTEGER NOT NULL, verified INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX content_by_use ON content (used);
    CREATE TABLE arriving (
        name TEXT PRIMARY KEY, token TEXT NOT NULL, blocks INTEGER NOT NULL, written INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE repository (
        id INTEGER PRIMARY KEY, registry TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (registry, name)
    );
    CREATE TABLE holds (
        repository INTEGER NOT NULL, digest BLOB NOT NULL, kind INTEGER NOT NULL, variant TEXT NOT NULL,
        media_type TEXT, size INTEGER NOT NULL, manifest BLOB, confirmed INTEGER NOT NULL,
        PRIMARY KEY (repository, digest, kind, variant)
    ) WITHOUT ROWID;
    CREATE TABLE tag (
        repository INTEGER NOT NULL, tag TEXT NOT NULL, variant TEXT NOT NULL, accepts TEXT NOT NULL,
        digest BLOB NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL, confirmed INTEGER NOT NULL,
        PRIMARY KEY (repository, tag, variant, accepts)
    ) WITHOUT ROWID;
    CREATE TABLE tag_move (
        id INTEGER PRIMARY KEY, repository INTEGER NOT NULL, tag TEXT NOT NULL, from_digest BLOB NOT NULL,
        to_digest BLOB NOT NULL, seen INTEGER NOT NULL
    );
    CREATE INDEX tag_move_by_tag ON tag_move (repository, tag);
    -- A move that another row of the tag, one of other types, has shown since this one was confirmed is the same.
    CREATE TRIGGER tag_moved AFTER UPDATE OF digest ON tag WHEN old.digest <> new.digest AND NOT EXISTS (
        SELECT 1 FROM tag_move WHERE repository = new.repository AND tag = new.tag
            AND from_digest = old.digest AND to_digest = new.digest AND seen > old.confirmed
    ) BEGIN
        INSERT INTO tag_move (repository, tag, from_digest, to_digest, seen)
            VALUES (new.repository, new.tag, old.digest, new.digest, new.confirmed);
        DELETE FROM tag_move WHERE repository = new.repository AND tag = new.tag AND id <= (
            SELECT id FROM tag_move WHERE repository = new.repository AND tag = new.tag
                ORDER BY id DESC LIMIT 1 OFFSET 100);  -- it does not drive out the moves of others
        DELETE FROM tag_move WHERE id <= (SELECT id FROM tag_move ORDER BY id DESC LIMIT 1 OFFSET 10000);
    END;
    CREATE TABLE purge (generation INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL);
    CREATE TABLE total (
        id INTEGER PRIMARY KEY, files INTEGER NOT NULL, blocks INTEGER NOT NULL, arriving INTEGER NOT NULL,
        compared INTEGER NOT NULL
    );
    INSERT INTO total (id, files, blocks, arriving, compared) VALUES (0, 0, 0, 0, 0);
    CREATE TRIGGER content_in AFTER INSERT ON content BEGIN
        UPDATE total SET files = files + 1, blocks = blocks + new.blocks; END;
    CREATE TRIGGER content_out AFTER DELETE ON content BEGIN
        UPDATE total SET files = files - 1, blocks = blocks - old.blocks; END;
    CREATE TRIGGER content_resized AFTER UPDATE OF blocks ON content WHEN old.blocks <> new.blocks BEGIN
        UPDATE total SET blocks = blocks - old.blocks + new.blocks; END;
    CREATE TRIGGER arriving_in AFTER INSERT ON arriving BEGIN
        UPDATE total SET arriving = arriving + new.blocks; END;
    CREATE TRIGGER arriving_out AFTER DELETE ON arriving BEGIN
        UPDATE total SET arriving = arriving - old.blocks; END;
    CREATE TRIGGER arriving_resized AFTER UPDATE OF blocks ON arriving WHEN old.blocks <> new.blocks BEGIN
        UPDATE total SET arriving = arriving - old.blocks + new.blocks; END;
    """,
)
"""What brings a database from each version, its PRAGMA user_version, to the next."""
LAYOUT: Final = 1
"""Part of the file's name. A change that an older daemon can't live with raises it, and makes another file."""


class BusyError(OSError):
    """
    Another process writes; a later try will succeed.
    """


class DamagedError(OSError):
    """
    The database is not what was written: it is of no more use.
    """


class UnusableError(OSError):
    """
    The database can't be opened, or can't be written at the moment.
    """


class FullError(UnusableError):
    """
    The disk has no room for what is to be written.
    """


class UnfitError(UnusableError):
    """
    The file system can't have a database that several processes use.
    """


class Totals(NamedTuple):
    """
    What the cache directory holds.

    @ivar files: how many files of content there are.
    @ivar blocks: bytes of disk that they take.
    @ivar arriving: bytes of disk that are promised to what is arriving, or taken by what transfers have left.
    @ivar oldest_use: the least recent use of a file, in seconds since the epoch, if there is one.
    @ivar compared: when some process began to compare all files with the rows, and came to the end; zero if none has.
    """

    files: int = 0
    blocks: int = 0
    arriving: int = 0
    oldest_use: float | None = None
    compared: float = 0.0


class File(NamedTuple):
    """
    A file of content. Times are in seconds since the epoch.

    @ivar verified: when its bytes were last seen to be what the digest names, if they were.
    """

    digest: Digest
    size: int
    used: float
    verified: float | None = None


class Move(NamedTuple):
    """
    That ECR answered a tag with another digest than before.

    @ivar seen: when it first did, in seconds since the epoch.
    """

    before: Digest
    after: Digest
    seen: float


class Rows:
    """
    One database.

    @param path: its file; none to keep it in memory.
    @param read_only: whether its directory can't be written.
    @ivar read_only: the same.
    @ivar closed: whether it was closed.
    @raise OSError: if it can't be opened, is damaged, or its file system can't do WAL (see L{UnusableError}).
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self._reading, self._writing = threading.RLock(), threading.RLock()
        self.totals, self._path = Totals(), path
        self.read_only, self.closed, self._together = read_only, False, False
        self._repositories: dict[tuple[str, str], int] = {}
        with _explained():
            self._log = _log_of(path) if read_only and path is not None else None
            self._writer = self._reader = _connect(path, read_only=read_only)
            try:
                if path is None or read_only:
                    self._reading = self._writing
                else:
                    self._reader = _connect(path)
                if not read_only:
                    self._prepare(wal=path is not None)
                self.refresh()
            except BaseException:
                self.close()
                raise

    def _prepare(self, *, wal: bool) -> None:
        if wal:
            (mode,) = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise UnfitError(f"SQLite can't use write-ahead logging there, only {mode}")
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version >= len(_MIGRATIONS):  # and it can be read while another process writes, however long
            return
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            for each in _MIGRATIONS[version:]:
                for statement in _statements(each):
                    connection.execute(statement)
            if version < len(_MIGRATIONS):
                connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    @property
    def outdated(self) -> bool:
        """
        Whether somebody writes a database that was opened as if nobody did.
        """
        return self._log == 0 and self._path is not None and _log_of(self._path) > 0

    def close(self) -> None:
        """
        Close the database. Calls that come later raise L{BusyError}.
        """
        self.closed = True
        with self._writing, self._reading, contextlib.suppress(sqlite3.Error):
            self._reader.close()
            self._writer.close()

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """
        Write in one transaction, which is undone if the block fails.

        @param durable: whether it must outlive a crash of the machine, too.
        """
        with _explained(), self._writing:
            connection = self._writer
            if self._together:  # by this thread, for it has the lock
                yield connection
                return
            if durable:
                connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                totals, _ = _state(connection.execute(_STATE))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # some errors, such as a full disk, have ended it
                    connection.execute("ROLLBACK")
                self._repositories.clear()
                raise
            finally:
                if durable:
                    connection.execute("PRAGMA synchronous = NORMAL")
            self.totals = totals

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """
        Make all changes of the block in one transaction.
        """
        with self._transaction():
            self._together = True
            try:
                yield
            finally:
                self._together = False

    def _query(self, statement: str, *values: object) -> list[Any]:
        with _explained(), self._reading:
            return self._reader.execute(statement, values).fetchall()

    def _stamps(self, connection: sqlite3.Connection) -> Callable[[float], int]:
        """
        Return what makes a time a use later than all before it, by any process, also after the clock was set back.
        """
        (last,) = _one(connection.execute("SELECT coalesce(max(used), 0) FROM content"))
        last = _number(last)

        def stamp(when: float) -> int:
            nonlocal last
            last = max(_moment(when), last + 1)
            return int(last)

        return stamp

    # Content

    def add(self, file: File, arriving: Reservation | None = None) -> None:
        """
        Note that a file is there, used later than any other.

        @param arriving: its reservation, which ends.
        """
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO content (digest, size, blocks, used, verified) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (digest) DO UPDATE SET size = excluded.size, blocks = excluded.blocks,"
                " used = max(used, excluded.used), verified = coalesce(excluded.verified, verified)",
                (
                    *(_packed(file.digest), file.size, on_disk(file.size), self._stamps(connection)(file.used)),
                    None if file.verified is None else _moment(file.verified),
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
                [(_packed(each.digest), each.size, on_disk(each.size), _moment(each.used), None) for each in files],
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
                if not connection.execute(change, (stamp(when), _packed(digest))).rowcount
            ]
            connection.executemany(
                "UPDATE content SET verified = ? WHERE digest = ?",
                [(_moment(when), _packed(digest)) for digest, when in verified.items()],
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
            b"" if after is None else _packed(after),
            limit,
        )
        return [_file(*row) for row in rows]

    def names(self, algorithm: str, prefix: str) -> Iterator[set[str]]:
        """
        Yield the hashes of content that begin with C{prefix}, page by page.

        SQLite makes one text of a page: a row each would take the interpreter a hundred times as long.

        @param prefix: an even number of hexadecimal digits.
        """
        first = bytes([_ALGORITHMS.index(algorithm)]) + bytes.fromhex(prefix)
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
        rows = self._query("SELECT digest, size, used, verified FROM content WHERE digest = ?", _packed(digest))
        return _file(*rows[0]) if rows else None

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
            yield from (_file(*row) for row in rows)
            last = rows[-1][2], rows[-1][0]

    # What is arriving

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Promise C{size} bytes to what arrives, unless content and all that is promised were beyond C{limit}.

        What its name had before is its own from then on.

        @return: by how many bytes: zero if they are promised now.
        """
        with self._transaction() as connection:
            (taken,) = _one(
                connection.execute(
                    "SELECT blocks + arriving - coalesce((SELECT blocks FROM arriving WHERE name = ?), 0) FROM total"
                    " WHERE id = 0",
                    (what.name,),
                )
            )
            excess = max(0, _number(taken) + on_disk(size) - limit)
            if not excess:
                _arrive(connection, what, size, 0)
        return int(excess)

    def arrive(self, what: Reservation, size: int, written: float) -> None:
        """
        Note a file that arrives, or is left over, whatever the limit; in place of what its name had.
        """
        with self._transaction() as connection:
            _arrive(connection, what, size, _moment(written))

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

    def arriving(self) -> list[Reserved]:
        """
        List what is arriving, or was interrupted, the longest unwritten first.
        """
        rows = self._query("SELECT name, token, blocks, written FROM arriving ORDER BY written, name")
        return [
            Reserved(Reservation(_text(name), _text(token)), _number(blocks), _number(written) / 1e6)
            for name, token, blocks, written in rows
        ]

    # Entries

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look an entry up; a fact is one of every variant.
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
                *(repository, _packed(Digest.parse(key.reference)), _KINDS.index(key.kind), key.variant),
            )
        return _entry(rows)

    def save(self, entries: Iterable[tuple[EntryKey, Entry]], now: float) -> None:
        """
        Note entries: each answer in place of an older one that was known to the same set of types.

        @param now: what is known as of later than that was noted before the clock was set back, and is older.
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
        Drop what a tag led to for some sets of types, but for answers to questions of after C{asked}, up to C{now}.
        """
        with self._transaction() as connection:
            repository = self._repository(key)
            connection.executemany(
                "DELETE FROM tag WHERE repository = ? AND tag = ? AND variant = ? AND accepts = ?"
                " AND NOT (confirmed > ? AND confirmed <= ?)",
                [
                    (repository, key.reference, key.variant, " ".join(sorted(accept)), _moment(asked), _moment(now))
                    for accept in accepts
                ],
            )

    def forget(self, keys: Iterable[EntryKey]) -> None:
        """
        Drop entries.
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
                    (repository, _packed(Digest.parse(key.reference)), _KINDS.index(key.kind), key.variant),
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
            (found,) = _one(connection.execute("SELECT id FROM repository WHERE registry = ? AND name = ?", names))
            self._remember_repository(names, found)
            return int(found)
        return known

    def _remember_repository(self, names: tuple[str, str], number: int) -> None:
        if len(self._repositories) >= PAGE:
            self._repositories.clear()
        self._repositories[names] = number

    def entries(self) -> Iterator[tuple[EntryKey, Entry, float]]:
        """
        Yield all entries with their last use: of content, or when ECR confirmed them, what is later.
        """
        repositories = self._query("SELECT id, registry, name FROM repository ORDER BY name, registry")
        for number, registry, name in repositories:
            yield from self._tags(number, RegistryId(_text(registry)), _text(name))
            yield from self._held(number, RegistryId(_text(registry)), _text(name))

    def _tags(self, repository: int, registry: RegistryId, name: str) -> Iterator[tuple[EntryKey, Entry, float]]:
        last = "", "", ""
        while rows := self._query(
            "SELECT tag, variant, accepts, digest, media_type, size, confirmed FROM tag"
            " WHERE repository = ? AND (tag, variant, accepts) > (?, ?, ?) ORDER BY tag, variant, accepts LIMIT ?",
            *(repository, *last, PAGE),
        ):
            if len(rows) == PAGE:  # the last entry may go on: it begins the next page
                rows = [row for row in rows if row[:2] != rows[-1][:2]]
            last = *rows[-1][:2], "\U0010ffff"
            for (tag, variant), some in itertools.groupby(rows, lambda row: row[:2]):
                answers = list(some)
                entry = _entry([(*row[2:], None) for row in answers]) or Entry()
                key = EntryKey(registry, Kind.MANIFEST, name, _text(tag), _text(variant))
                yield key, entry, max(row[6] for row in answers) / 1e6

    def _held(self, repository: int, registry: RegistryId, name: str) -> Iterator[tuple[EntryKey, Entry, float]]:
        last: tuple[object, ...] = b"", -1, ""
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
                key = EntryKey(registry, _KINDS[kind], name, str(_unpacked(digest)), _text(variant))
                entry = _entry([("", digest, media_type, size, confirmed, manifest)]) or Entry()
                yield key, entry, max(_number(used), confirmed) / 1e6
            last = rows[-1][:3]

    def forget_absent(self, before: float) -> Iterator[None]:
        """
        Drop entries that ECR confirmed last before this moment, and whose content is not there; page by page.
        """
        yield from self._forget_absent(before, "holds", {"repository": -1, "digest": b"", "kind": -1, "variant": ""})
        yield from self._forget_absent(before, "tag", {"repository": -1, "tag": "", "variant": "", "accepts": ""})

    def _forget_absent(self, before: float, table: str, first: Mapping[str, object]) -> Iterator[None]:
        keys, marks, last = ", ".join(first), ", ".join("?" * len(first)), tuple(first.values())
        page = f"{table} WHERE ({keys}) > ({marks}) AND ({keys}) <= ({marks})"
        absent = f"{page} AND confirmed < ? AND digest NOT IN (SELECT digest FROM content)"  # noqa: S608
        while True:
            # The page's last row, and whether any must go: no row of those that stay gets out of SQLite.
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
            values = (*last, *ends[0], _moment(before))
            if self._query(f"SELECT 1 FROM {absent} LIMIT 1", *values):  # noqa: S608
                with self._transaction() as connection:
                    connection.execute(f"DELETE FROM {absent}", values)  # noqa: S608
            last = ends[0]
            yield

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

    def moves(self, key: EntryKey) -> list[Move]:
        """
        List the moves of a tag, the newest first.
        """
        rows = self._query(
            "SELECT from_digest, to_digest, seen FROM tag_move WHERE repository = ? AND tag = ? ORDER BY id DESC",
            *(self._repository(key), key.reference),
        )
        return [Move(_unpacked(before), _unpacked(after), _number(seen) / 1e6) for before, after, seen in rows]

    # The whole

    def note_compared(self, began: float) -> None:
        """
        Note that all files were compared with the rows, from this moment on.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE total SET compared = ?", (_moment(began),))

    def try_writing(self) -> None:
        """
        Change nothing.

        @raise OSError: if nothing can be changed.
        """
        with self._transaction():
            pass

    def refresh(self) -> int:
        """
        Read the totals again, which other processes change, too.

        @return: how many things were ever purged.
        """
        self.totals, generation = _state(self._query(_STATE))
        return generation

    def check(self) -> None:
        """
        Look for damaged pages, which takes 0.2 s for a million rows; other calls go on meanwhile. And correct totals.

        Where a log was cut they may be those of an older page than the rows are on.

        @raise DamagedError: if there are any.
        """
        if self._path is None:
            return
        with _explained(), contextlib.closing(_connect(self._path)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise DamagedError(f"the index is damaged: {found}")
            wrong = f"SELECT 1 FROM total WHERE id = 0 AND (files, blocks, arriving) <> ({_TRUE_TOTALS})"  # noqa: S608
            if not connection.execute(wrong).fetchone():
                return
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE total SET (files, blocks, arriving) = (SELECT {_TRUE_TOTALS}) WHERE id = 0"  # noqa: S608
            )


def on_disk(size: int) -> int:
    """
    Return the bytes of disk that a file of C{size} bytes takes: whole blocks.
    """
    return -(-size // _BLOCK) * _BLOCK


def number_of(registry: str, repository: str) -> int:
    """
    Number a repository by its names: where rows are lost, those that are left must not become another's.

    A log that was cut brings older pages back: a number that is given to the next one who comes would be given twice.
    """
    names = hashlib.sha256(f"{registry}\0{repository}".encode("utf-8", "surrogateescape"))
    return int.from_bytes(names.digest()[:8], "big") >> 1


def _connect(path: Path | None, *, read_only: bool = False) -> sqlite3.Connection:
    name = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode=rw"
    if path is not None and not read_only and not path.exists():
        _create(path)
    if path is not None and read_only:
        # Without a log nobody writes, and the database can be read where no file can be made.
        name = f"{path.absolute().as_uri()}?{'mode=ro' if _log_of(path) else 'immutable=1'}"
    connection = sqlite3.connect(
        name, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=path is not None
    )
    for pragma in ("synchronous = NORMAL", "mmap_size = 0", "journal_size_limit = 4194304", "cache_size = -1024"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _create(path: Path) -> None:
    """
    Create an empty database for this user alone. SQLite gives the files beside it the same mode.

    @raise UnusableError: if it can't be created.
    """
    try:
        path.touch(mode=0o600)
    except OSError as problem:
        raise (FullError if problem.errno in FULL else UnusableError)(str(problem)) from None


def _log_of(path: Path) -> int:
    """
    Tell how many bytes the log of a database has.
    """
    try:
        return Path(f"{path}-wal").stat().st_size
    except OSError:
        return 0


def _statements(script: str) -> Iterator[str]:
    """
    Take a script apart; executescript() would commit first.
    """
    lines = ""
    for line in script.splitlines():
        lines += line + "\n"
        if sqlite3.complete_statement(lines):
            yield lines
            lines = ""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """
    Raise sqlite3's errors as what they mean here.
    """
    try:
        yield
    except sqlite3.ProgrammingError as problem:  # closed meanwhile, because the index is another file now
        raise BusyError(str(problem)) from None
    except sqlite3.Error as problem:
        raise explained(problem) from None


def explained(problem: sqlite3.Error) -> OSError:
    """
    Translate an error of sqlite3.
    """
    detailed = getattr(problem, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = detailed & 0xFF
    if code in _BUSY:
        return BusyError(str(problem))
    # It is another's database, or a text is none.
    wrong = code == sqlite3.SQLITE_ERROR and str(problem).startswith(("no such", "table", "Could not decode"))
    if wrong or code in _DAMAGED or detailed in _DAMAGED_IN_DETAIL:
        return DamagedError(str(problem))
    return (FullError if detailed in _FULL_IN_DETAIL else UnusableError)(str(problem))


def _packed(digest: Digest) -> bytes:
    return bytes([_ALGORITHMS.index(digest.algorithm)]) + bytes.fromhex(digest.hex)


def _unpacked(data: bytes) -> Digest:
    """
    Read what L{_packed} wrote.

    @raise DamagedError: if it is anything else: SQLite does not notice a page that is sound and holds nonsense.
    """
    if isinstance(data, bytes) and data and data[0] < len(_ALGORITHMS):
        algorithm = _ALGORITHMS[data[0]]
        if 2 * len(data) - 2 == HEX_LENGTHS[algorithm]:
            return Digest(algorithm, data[1:].hex())
    raise DamagedError("the index has something in the place of a digest")


def _number(value: object) -> int:
    """
    Read a number of bytes, of things or of microseconds.

    @raise DamagedError: if it is anything else: whatever its column's type, SQLite may hold any value there.
    """
    if type(value) is int and 0 <= value <= SIZE_LIMIT:
        return value
    raise DamagedError("the index has something in the place of a number")


def _text(value: object) -> str:
    """
    Read a text.

    @raise DamagedError: if it is anything else.
    """
    if isinstance(value, str):
        return value
    raise DamagedError("the index has something in the place of a text")


def _one(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """
    Read a row that is always there.

    @raise DamagedError: if it isn't.
    """
    for row in rows:
        return row
    raise DamagedError("the index lacks a row")


def _state(rows: Iterable[tuple[Any, ...]]) -> tuple[Totals, int]:
    """
    Read the totals, and how many things were ever purged.
    """
    files, blocks, arriving, oldest, compared, generation = _one(rows)
    used = None if oldest is None else _number(oldest) / 1e6
    totals = Totals(_number(files), _number(blocks), _number(arriving), used, _number(compared) / 1e6)
    return totals, _number(generation)


def _moment(when: float) -> int:
    return round(when * 1e6)


def _file(digest: bytes, size: int, used: int, verified: int | None) -> File:
    known = None if verified is None else _number(verified) / 1e6
    return File(_unpacked(digest), _number(size), _number(used) / 1e6, known)


def _drop(connection: sqlite3.Connection, digests: Iterable[Digest], arriving: Iterable[Reservation] = ()) -> None:
    connection.executemany("DELETE FROM content WHERE digest = ?", [(_packed(each),) for each in digests])
    connection.executemany("DELETE FROM arriving WHERE name = ? AND token = ?", arriving)


def _arrive(connection: sqlite3.Connection, what: Reservation, size: int, written: int) -> None:
    connection.execute(
        "INSERT INTO arriving (name, token, blocks, written) VALUES (?, ?, ?, ?) ON CONFLICT (name)"
        " DO UPDATE SET token = excluded.token, blocks = excluded.blocks, written = excluded.written",
        (*what, on_disk(size), written),
    )


def _entry(rows: Sequence[tuple[str, bytes, str | None, int, int, bytes | None]]) -> Entry | None:
    answers = {}
    for accepts, digest, media_type, size, confirmed, manifest in rows:
        if media_type is not None and media_type not in MANIFEST_TYPES:  # whoever wrote that
            continue
        descriptor = Descriptor(media_type or BLOB_TYPE, _unpacked(digest), _number(size))
        through = _unpacked(manifest) if manifest else None
        # Of these strings: each is in memory once.
        accept = MANIFEST_TYPES.intersection(_text(accepts).split())
        answers[accept] = Confirmed(descriptor, _number(confirmed) / 1e6, through)
    return Entry(answers) if answers else None


def _save_tag(connection: sqlite3.Connection, repository: int, key: EntryKey, entry: Entry, now: float) -> None:
    """
    Note what ECR said of a tag to each set of types. Other processes have been told of others, which stay.

    What they were told of the same types stays, too, if they have asked later.
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
                *(_packed(known.descriptor.digest), known.descriptor.media_type, known.descriptor.size),
                *(_moment(known.when), _moment(now)),
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
    Note what a repository holds. What ECR was asked for by itself does not become a fact again.
    """
    for known in entry.answers.values():
        descriptor = known.descriptor
        connection.execute(
            "INSERT INTO holds (repository, digest, kind, variant, media_type, size, manifest, confirmed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, digest, kind, variant) DO UPDATE SET"
            " media_type = excluded.media_type, size = excluded.size, confirmed = excluded.confirmed,"
            " manifest = CASE WHEN manifest IS NULL THEN NULL ELSE excluded.manifest END",
            (
                *(repository, _packed(descriptor.digest), _KINDS.index(key.kind), key.variant),
                *(descriptor.media_type if key.kind is Kind.MANIFEST else None, descriptor.size),
                *(None if known.manifest is None else _packed(known.manifest), _moment(known.when)),
            ),
        )
        if key.variant:
            about = repository, _packed(descriptor.digest), _KINDS.index(key.kind)
            connection.execute(
                "DELETE FROM holds WHERE (repository, digest, kind) = (?, ?, ?) AND variant IN"
                " (SELECT variant FROM holds WHERE (repository, digest, kind) = (?, ?, ?) AND variant <> ''"
                " ORDER BY confirmed DESC LIMIT -1 OFFSET ?)",
                (*about, *about, VARIANTS_LIMIT),
            )
