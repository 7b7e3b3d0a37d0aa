"""
The files of the index: a pointer, and the database that it names.

Rules:

- A new index has a new file name. C{index-1}, replaced by rename, names the current one: a process never writes to a
  database that another process has put in place of the one it opened.
- Only SQLite opens the files: closing any other descriptor of them would release its locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from twisted.logger import Logger

from ecrproxy.cache.cells import DamagedError
from ecrproxy.cache.locks import open_in_place
from ecrproxy.cache.ownership import give, may_use
from ecrproxy.cache.presence import status_of
from ecrproxy.cache.schema import LAYOUT
from ecrproxy.cache.sqlite import Rows

log = Logger()

POINTER: Final = f"index-{LAYOUT}"
LONG_LOG: Final = 64 * 2**20
"""Bytes beyond which a log larger than its database is long. SQLite restarts it unless a reader prevents that."""
LONG_LOOKS: Final = 600
"""Number of checks, one a second, that may find a long log grown. A long log without writers does no harm."""
_NAME: Final = re.compile(rf"{POINTER}-[0-9a-f]{{8}}\.sqlite3")
_POINTER_BYTES: Final = 100
"""More than the length of the name and a newline."""
_SUFFIXES: Final = "", "-wal", "-shm"


class IndexFiles:
    """
    The files of the index that this process has open. Not thread-safe.

    @param root: the cache directory.
    @ivar paths: the database, its log and its shared memory; empty if none of them is open.
    @ivar size: bytes of disk that they took when they were last looked at.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.paths: tuple[Path, ...] = ()
        self.size = 0
        self._identities: tuple[object, ...] = ()
        self._heights = [0, 0]
        self._log_size = self._log_grew = 0

    @property
    def pointed(self) -> Path:
        """
        The current database.

        @raise OSError: if the pointer can't be read.
        """
        fd = open_in_place(self._root / POINTER, os.O_RDONLY)
        try:
            name = os.read(fd, _POINTER_BYTES).strip().decode("ascii", "replace")
        finally:
            os.close(fd)
        return self._root / (name if _NAME.fullmatch(name) else "no-index")

    def open(self) -> Rows:
        """
        Open the database that the pointer names; create a new one if there is none, or it is unusable.

        The lock of the index is held.

        @raise OSError: if that fails.
        """
        return self._open_current() or self._create()

    def _open_current(self) -> Rows | None:
        """
        Open the database that the pointer names. Return None if it is unusable.
        """
        try:
            path = self.pointed
        except FileNotFoundError:
            return None
        paths = _files_of(path)
        found = [status_of(each) for each in paths]
        if found[0] is None or not all(each is None or stat.S_ISREG(each.st_mode) for each in found):
            log.warn("The cache's index is lost: beginning a new one")
            return None
        if max(each.st_nlink for each in found if each is not None) > 1:
            log.warn("The cache's index is also that of a copy of the directory by links: beginning a new one")
            return None
        why = ""
        if self.paths and path == self.paths[0]:
            why = "another program has been reading it, and its log grows" if self._is_held_up else "it was changed"
        elif not may_use(paths):
            why = "its mode was changed"
        if why:
            log.warn("The cache's index can't be used: {why}; beginning a new one", why=why)
            return None
        try:
            rows = Rows(path)
        except DamagedError as problem:
            log.warn("The cache's index is damaged: {problem}; beginning a new one", problem=str(problem))
            return None
        self.paths = paths
        return rows

    def _create(self) -> Rows:
        """
        Create a new database, point to it, and remove older ones.
        """
        path = self._root / f"{POINTER}-{secrets.token_hex(4)}.sqlite3"
        paths = _files_of(path)
        draft = self._root / f"{POINTER}.{secrets.token_hex(4)}"
        try:
            rows = Rows(path)
            draft.touch(mode=0o600)
            draft.write_text(f"{path.name}\n", "ascii")
            for each in (*paths, draft):
                give(each, self._root)
            draft.rename(self._root / POINTER)
        except BaseException:
            for each in (*paths, draft):
                with contextlib.suppress(OSError):
                    each.unlink()
            raise
        self.paths = paths
        for each in self._root.glob(f"{POINTER}-*.sqlite3*"):
            if each not in paths:
                with contextlib.suppress(OSError):
                    each.unlink()
        return rows

    def note(self) -> None:
        """
        Note the identities of the files that have just been opened.
        """
        self._identities, self._heights = self._look()

    def are_in_place(self) -> bool:
        """
        Return False if the files are no longer those that were opened, have shrunk, or have a log that only grows.
        """
        identities, heights = self._look()
        same = identities == self._identities
        same = same and all(was <= now for was, now in zip(self._heights, heights, strict=True))
        if not same or self._is_held_up:
            return False
        self._heights = heights
        return True

    def _look(self) -> tuple[tuple[object, ...], list[int]]:
        """
        Return the identities of the files, and the sizes of those that only grow.
        """
        if not self.paths:
            return (), [0, 0]
        found = [status_of(path) for path in (self._root / POINTER, *self.paths)]
        self.size = sum(each.st_blocks * 512 for each in found if each is not None)
        database, log_size = (each.st_size if each else 0 for each in found[1:3])
        is_long = log_size > max(LONG_LOG, database)
        self._log_size, self._log_grew = log_size, self._log_grew + (log_size > self._log_size) if is_long else 0
        identities = tuple((each.st_dev, each.st_ino) if each else None for each in found)
        return identities, [each.st_size if each else 0 for each in (found[1], found[3])]

    @property
    def _is_held_up(self) -> bool:
        """
        Return True if some program has been reading for so long that the log would grow without bound.
        """
        return self._log_grew >= LONG_LOOKS


def _files_of(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(f"{path.name}{each}") for each in _SUFFIXES)
