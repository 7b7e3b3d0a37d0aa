"""
The space of the disk that has the cache directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_MARGIN: Final = 64 * 2**20
"""Bytes of disk left free for entries and other files. On a small disk a hundredth of it, if less."""


class DiskSpace:
    """
    The disk's size, and what is free of it.

    @param root: the cache directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def capacity(self, held: int, *, counted: bool) -> int | None:
        """
        Return how many bytes of the cache the disk can hold, less the spare space. None if unknown.

        @param held: bytes that the cache takes already.
        @param counted: False until the files have been counted: then the disk's size is used.
        """
        try:
            disk = os.statvfs(self._root)
        except OSError:
            return None
        size = disk.f_blocks * disk.f_frsize
        return (held + disk.f_bavail * disk.f_frsize if counted else size) - _spare(disk) if size else None

    def spare(self) -> int:
        """
        Return the bytes of disk to leave free for other files; 0 if the disk's size is unknown.
        """
        try:
            return _spare(os.statvfs(self._root))
        except OSError:
            return 0

    def lacks_inodes(self) -> bool:
        """
        Return True if the disk has bytes left, but no inode for another file.
        """
        try:
            disk = os.statvfs(self._root)
        except OSError:
            return False
        # If inodes are allocated from free space, as on XFS, a disk without free bytes has no free inodes either.
        return bool(disk.f_files) and disk.f_favail == 0 and disk.f_bavail * disk.f_frsize >= 2**20


def _spare(disk: os.statvfs_result) -> int:
    return min(_MARGIN, disk.f_blocks * disk.f_frsize // 100)
