"""
The database of the index that is in use: opened at the first query, and replaced when it is lost or damaged.

Rules:

- The daemon goes on whatever is wrong with the database: with a new one if it is damaged, with a read-only one or rows
  in memory while no file can be opened.
- A process that can't open an index that others may have open reserves no space: neither would know of the other's
  files.
- C{index.lock} is held while an index is opened or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from twisted.logger import Logger

from ecrproxy.cache.cells import DamagedError
from ecrproxy.cache.database import FULL, BusyError, FullError, UnfitError, UnusableError
from ecrproxy.cache.index_files import IndexFiles
from ecrproxy.cache.locks import locked
from ecrproxy.cache.mounts import find_mount, mountinfo
from ecrproxy.cache.ownership import ONE_USER
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.troubles import is_exhaustion

log = Logger()
T = TypeVar("T")

LOCK: Final = "index.lock"
AGAIN_SECONDS: Final = 5.0
"""Seconds between attempts to open a database that can't be opened."""
_NOTHING_TO_KEEP: Final = FULL | {errno.EROFS}
"""Errors of a disk that accepts no files: no process keeps anything new there."""


class CurrentDatabase:
    """
    The database in use. Thread-safe.

    @param root: the cache directory.
    @param now: returns seconds since the epoch.
    @param memory: True to keep the rows in memory only.
    @param before_opening: called before files are opened or created; raises if they must not be.
    @param adopt: called with the rows of each database that is opened, before others use it.
    @ivar rows: its rows.
    @ivar files: its files.
    @ivar opened: number of databases opened so far.
    @ivar shared: True if other processes see it.
    @ivar unfit: True if the file system can't have an index that processes share.
    @ivar shut_out: True if other processes may use an index that this one can't open.
    @ivar problem: why the rows are in memory, or read-only; empty if they are not.
    """

    def __init__(
        self,
        root: Path,
        now: Callable[[], float],
        adopt: Callable[[Rows], object],
        *,
        memory: bool = False,
        before_opening: Callable[[], object] = lambda: None,
    ) -> None:
        self._root, self._now, self._adopt, self._memory = root, now, adopt, memory
        self._before_opening, self._swapping, self._tried = before_opening, threading.RLock(), float("-inf")
        self.rows, self.files, self.opened = Rows(), IndexFiles(root), 0
        self.shared, self.unfit, self.shut_out, self.problem = False, False, False, ""

    @property
    def lasts(self) -> bool:
        """
        Return True if its rows will not be lost to another database that becomes usable again.
        """
        return self.shared or self.unfit or self._memory

    @property
    def trouble(self) -> str:
        """
        Return why nothing new is cached; empty if it is.
        """
        return f"the cache's index can't be used, and nothing new is cached: {self.problem}" if self.shut_out else ""

    def open(self) -> None:
        """
        Open the database, unless that has been tried. The first query does this, too.
        """
        if not self.opened and not self._memory:
            with self._swapping:
                if not self.opened:
                    self._open()

    def _open(self) -> None:
        """
        Open the database that the pointer names, or a new one in its place.
        """
        self._tried = self._now()
        with self._swapping:
            old = self.rows
            try:
                self._before_opening()
                _refuse_far(self._root)
                with locked(self._root / LOCK):
                    if old.read_only:  # SQLite would give its read-only mapped memory to the next one
                        old.close()
                    self.rows = self.files.open()
            except OSError as problem:
                self._fall_back(problem, old)
                return
            if self.problem:
                log.info("Recovered: the cache's index can be used")
            self.shared, self.unfit, self.shut_out, self.problem = True, False, False, ""
            self._replaced(old)

    def _fall_back(self, problem: OSError, old: Rows) -> None:
        """
        Continue with a read-only database, or with one in memory.
        """
        begins, self.problem, self.unfit = not self.problem, _why(problem), isinstance(problem, UnfitError)
        self.shut_out = not self.unfit and not isinstance(problem, FullError) and problem.errno not in _NOTHING_TO_KEEP
        if begins:
            told = "The cache's index can't be used: {problem}; "
            told += "nothing new is cached until it can" if self.shut_out else "going on with one in memory"
            log.warn(told, problem=self.problem)
        if self.shared or not self.opened or old.closed or self.rows.outdated:
            self.shared, self.files.paths, self.rows = False, (), Rows()
            if not isinstance(problem, UnusableError):  # the directory is read-only, or another user's
                with contextlib.suppress(OSError):
                    self.rows = Rows(self.files.pointed, read_only=True)
            self._replaced(old)

    def _replaced(self, old: Rows) -> None:
        self.opened += 1
        old.close()
        self._adopt(self.rows)
        self.files.note()

    def check_files(self) -> None:
        """
        Check that the files are still those that were opened; if not, open the new ones.
        """
        if self._memory:
            return
        with self._swapping:
            if not self.shared:
                if not 0 <= self._now() - self._tried < AGAIN_SECONDS:
                    self._open()
            elif not self.files.are_in_place():
                self._open()

    def _replace(self, rows: Rows, problem: OSError) -> None:
        """
        Replace damaged C{rows} with a new database, unless that has been done.
        """
        with self._swapping:
            if rows is self.rows and not self._memory:
                log.warn("The cache's index is damaged: {problem}", problem=str(problem))
                self._open()

    def ask(self, question: Callable[[Rows], T]) -> T:
        """
        Query the database, or change it; retry once if it turns out to be damaged.

        @raise OSError: if that fails.
        """
        self.open()
        rows = self.rows
        try:
            return question(rows)
        except DamagedError as problem:
            self._replace(rows, problem)
        except BusyError:
            if rows is self.rows:
                raise
        return question(self.rows)

    def each(self, listed: Callable[[Rows], Iterator[T]]) -> Iterator[T]:
        """
        Yield a list that is read page by page.

        @raise OSError: if the database can't be read. A damaged one has been replaced.
        """
        self.open()
        rows = self.rows
        try:
            yield from listed(rows)
        except DamagedError as problem:
            self._replace(rows, problem)
            raise

    def rows_if(self, opened: int) -> Rows | None:
        """
        Return the rows; None if another database has been opened since C{opened} had this value.
        """
        with self._swapping:
            return self.rows if self.opened == opened else None


def _why(problem: OSError) -> str:
    """
    Return why the index can't be opened, and what to do. SQLite reports neither.
    """
    if problem.errno in (errno.EACCES, errno.EPERM):
        return f"{problem}; {ONE_USER}"
    may_lack_files = is_exhaustion(problem) or str(problem) == "unable to open database file"
    return f"{problem}; raise the limit of open files (LimitNOFILE=, ulimit -n)" if may_lack_files else str(problem)


def _refuse_far(root: Path) -> None:
    """
    Refuse a file system whose locks and shared memory may not work.

    @raise UnfitError: if it is one.
    """
    mount = find_mount(mountinfo(), os.path.realpath(root))
    if mount is not None and mount.is_far:
        raise UnfitError(f"{root} is on {mount.kind}, whose locks and shared memory may not hold; use a local disk")
