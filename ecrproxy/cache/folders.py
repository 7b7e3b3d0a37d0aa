"""
The folders of the cache directory, in which files are created.

Deleted folders are made again. The folders of a file system that is no longer mounted are not: the one underneath must
not be filled.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from twisted.logger import Logger

from ecrproxy.cache.database import FULL
from ecrproxy.cache.ownership import give
from ecrproxy.cache.space import DiskSpace
from ecrproxy.cache.volume import Volume

log = Logger()

T = TypeVar("T")

NO_INODES: Final = "No inodes left on device"
_TRIES: Final = 4


class Folders:
    """
    The cache directory, and the folders in it.

    @param root: its path; created if it is missing.
    @ivar evict: evicts a number of bytes when the disk is full; returns False if it can't.
    """

    evict: Callable[[int], bool] = staticmethod(lambda _: False)

    def __init__(self, root: Path, space: DiskSpace) -> None:
        self._root, self._space = root, space
        self._volume: Volume | None = None

    def prepare(self) -> None:
        """
        Create the folders, and remember their file system.

        @raise OSError: if that fails.
        """
        self._volume = Volume(self._root)
        self._make()

    def _make(self) -> None:
        for name in ("content", "arriving"):
            path = self._root / name
            if not path.is_dir():
                if path.is_symlink():
                    raise OSError(errno.ENOTDIR, f"{name}/ is a link that leads to no directory")
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                give(path, self._root)

    def create(self, make: Callable[[], T], size: int) -> T:
        """
        Create a file of C{size} bytes. Retry if its folder is gone, or if a full disk has something to evict.

        @raise OSError: if that fails.
        """
        for _ in range(_TRIES):
            try:
                self.check_mounted()
                return make()
            except FileNotFoundError:
                log.warn("{root} is not what it was: its directories are created again", root=str(self._root))
                self._make()
            except OSError as problem:
                if problem.errno not in FULL or not self.evict(size):
                    raise self._explained(problem) from None
        try:
            return make()
        except OSError as problem:
            raise self._explained(problem) from None

    def check_mounted(self) -> None:
        """
        Check that the directory's file system is still mounted.

        @raise OSError: if it is not.
        """
        if self._volume is not None and self._volume.is_gone():
            raise OSError(errno.ENODEV, f"its file system is not mounted on {self._volume.mount} any more")

    def _explained(self, problem: OSError) -> OSError:
        """
        Return a clearer error if a full disk lacks inodes: the kernel has one error for both.
        """
        lacks_inodes = problem.errno == errno.ENOSPC and self._space.lacks_inodes()
        return OSError(errno.ENOSPC, NO_INODES) if lacks_inodes else problem
