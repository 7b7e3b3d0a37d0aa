"""
The file system of the cache directory, and whether it is still mounted.

A volume can be unmounted while it is in use: C{umount -l}, a detached disk, NFS. Its mount point is then a directory of
the file system underneath, which the cache must not fill.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Volume:
    """
    The file system that a directory is on, or would be created on.

    @ivar mount: its mount point.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._look()

    def _look(self) -> None:
        nearest = _nearest(self._directory)
        self._device = nearest.stat().st_dev
        self.mount = next(each for each in (nearest, *nearest.parents) if os.path.ismount(each))

    def is_gone(self) -> bool:
        """
        Return True if the directory is on another file system, and its own is not mounted.

        After a remount, the device may have another number. A symbolic link may now lead to another file system.
        """
        with contextlib.suppress(OSError):
            if self._directory.stat().st_dev == self._device:
                return False
        if _nearest(self._directory).stat().st_dev == self._device:
            return False
        is_there = Path(os.path.realpath(self._directory)).is_relative_to(self.mount)
        if is_there and not os.path.ismount(self.mount):
            return True
        self._look()
        return False


def _nearest(directory: Path) -> Path:
    """
    Resolve a directory, or its nearest existing parent.
    """
    resolved = Path(os.path.realpath(directory))
    return next(each for each in (resolved, *resolved.parents) if each.exists())
