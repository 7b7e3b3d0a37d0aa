"""
A SQLite database: open, read, and write in transactions.

Rules:

- Every write is one transaction that begins with BEGIN IMMEDIATE: a transaction that reads first could not be retried
  (SQLITE_BUSY_SNAPSHOT).
- One connection reads and another writes, each behind a lock, so there are at most two page caches in memory.
  In WAL mode neither waits for the other. No transaction outlives a call.
- Errors of sqlite3 are raised as L{BusyError}, L{DamagedError} or L{UnusableError}, which are OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ecrproxy.cache.cells import DamagedError, Totals, state_of
from ecrproxy.cache.schema import MIGRATIONS, STATE

BUSY_SECONDS: Final = 2.0
"""Seconds to wait for another process's write lock, which is held for milliseconds."""
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a full disk."""
_DAMAGED: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
)
"""Includes constraints: no statement here violates those of our schema, so the schema is a different one."""
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FULL_IN_DETAIL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_DAMAGED_IN_DETAIL: Final = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_READONLY_DBMOVED})


class BusyError(OSError):
    """
    Another process is writing; retry later.
    """


class UnusableError(OSError):
    """
    The database can't be opened, or can't be written at the moment.
    """


class FullError(UnusableError):
    """
    The disk is full.
    """


class UnfitError(UnusableError):
    """
    The file system does not support a database that several processes use.
    """


class Database:
    """
    One SQLite database.

    @param path: its file; None to keep it in memory.
    @param read_only: True if its directory can't be written.
    @ivar read_only: the same.
    @ivar closed: True once it is closed.
    @raise OSError: if it can't be opened, is damaged, or its file system does not support WAL (see L{UnusableError}).
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self._reading, self._writing = threading.RLock(), threading.RLock()
        self.totals, self._path = Totals(), path
        self.read_only, self.closed, self._together = read_only, False, False
        with errors_explained():
            self._log = _log_of(path) if read_only and path is not None else None
            self._writer = self._reader = connect(path, read_only=read_only)
            try:
                if path is None or read_only:
                    self._reading = self._writing
                else:
                    self._reader = connect(path)
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
        if version >= len(MIGRATIONS):  # so it can be read however long another process writes
            return
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            for each in MIGRATIONS[version:]:
                for statement in _statements(each):
                    connection.execute(statement)
            if version < len(MIGRATIONS):
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    @property
    def outdated(self) -> bool:
        """
        Return True if a process writes a database that was opened as immutable.
        """
        return self._log == 0 and self._path is not None and _log_of(self._path) > 0

    def close(self) -> None:
        """
        Close the database. Later calls raise L{BusyError}.
        """
        self.closed = True
        with self._writing, self._reading, contextlib.suppress(sqlite3.Error):
            self._reader.close()
            self._writer.close()

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """
        Write in one transaction, which is rolled back if the block fails.

        @param durable: True if it must also survive a crash of the machine.
        """
        with errors_explained(), self._writing:
            connection = self._writer
            if self._together:  # of this thread, which holds the lock
                yield connection
                return
            if durable:
                connection.execute("PRAGMA synchronous = FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                totals, _ = state_of(connection.execute(STATE))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # some errors, such as a full disk, have already ended it
                    connection.execute("ROLLBACK")
                self._undone()
                raise
            finally:
                if durable:
                    connection.execute("PRAGMA synchronous = NORMAL")
            self.totals = totals

    def _undone(self) -> None:
        """
        Forget what was read in a failed transaction.
        """

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
        with errors_explained(), self._reading:
            return self._reader.execute(statement, values).fetchall()

    def refresh(self) -> int:
        """
        Read the totals again: other processes change them, too.

        @return: the generation, the number of things ever purged.
        """
        self.totals, generation = state_of(self._query(STATE))
        return generation

    def try_writing(self) -> None:
        """
        Check that the database can be written, without changing anything.

        @raise OSError: if it can't.
        """
        with self._transaction():
            pass


def connect(path: Path | None, *, read_only: bool = False) -> sqlite3.Connection:
    """
    Open a connection to a database and create it if it is missing. Without a path, open one in memory.
    """
    name = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode=rw"
    if path is not None and not read_only and not path.exists():
        _create(path)
    if path is not None and read_only:
        # Without a log there is no writer, and the database can be read even if no file can be created.
        name = f"{path.absolute().as_uri()}?{'mode=ro' if _log_of(path) else 'immutable=1'}"
    connection = sqlite3.connect(
        name, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=path is not None
    )
    for pragma in ("synchronous = NORMAL", "mmap_size = 0", "journal_size_limit = 4194304", "cache_size = -1024"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _create(path: Path) -> None:
    """
    Create an empty database that only this user can access. SQLite gives the files beside it the same mode.

    @raise UnusableError: if it can't be created.
    """
    try:
        path.touch(mode=0o600)
    except OSError as problem:
        raise (FullError if problem.errno in FULL else UnusableError)(str(problem)) from None


def _log_of(path: Path) -> int:
    """
    Return the size of a database's log in bytes; 0 if there is none.
    """
    try:
        return Path(f"{path}-wal").stat().st_size
    except OSError:
        return 0


def _statements(script: str) -> Iterator[str]:
    """
    Split a script into statements; executescript() would commit first.
    """
    lines = ""
    for line in script.splitlines():
        lines += line + "\n"
        if sqlite3.complete_statement(lines):
            yield lines
            lines = ""


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """
    Translate errors of sqlite3 that the block raises.
    """
    try:
        yield
    except sqlite3.ProgrammingError as problem:  # closed meanwhile: the index has moved to another file
        raise BusyError(str(problem)) from None
    except sqlite3.Error as problem:
        raise explained(problem) from None


def explained(problem: sqlite3.Error) -> OSError:
    """
    Translate an error of sqlite3 to one of this module.
    """
    detailed = getattr(problem, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = detailed & 0xFF
    if code in _BUSY:
        return BusyError(str(problem))
    # The database is somebody else's, or a text is not UTF-8.
    wrong = code == sqlite3.SQLITE_ERROR and str(problem).startswith(("no such", "table", "Could not decode"))
    if wrong or code in _DAMAGED or detailed in _DAMAGED_IN_DETAIL:
        return DamagedError(str(problem))
    return (FullError if detailed in _FULL_IN_DETAIL else UnusableError)(str(problem))
