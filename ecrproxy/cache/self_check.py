"""
Check that the cache directory can be used: files can be created, renamed and read, and there is room for more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Final

from ecrproxy.cache import locks
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.folders import Folders
from ecrproxy.cache.troubles import TroubleKind
from ecrproxy.oci import HEX_LENGTHS

_PROBE: Final = b"ok" + bytes(2**16)
"""Data written by a check: more than a disk that reports itself full still accepts."""
_TOGETHER: Final = "move the whole directory there, and have PROXY_CACHE_DIR name that"


class SelfCheck:
    """
    Checks one cache directory, and notes what is wrong with it.

    @ivar see_room: raises C{OSError} if other files have taken the disk's space.
    """

    see_room: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, directory: Directory, folders: Folders) -> None:
        self._directory, self._folders = directory, folders
        self._arriving = directory.root / "arriving"

    def run(self) -> None:
        """
        Check that a file can be written and read, and that there is room for more.

        @raise OSError: if not.
        """
        troubles = self._directory.troubles
        self._see_one_file_system()
        try:
            self.see_room()
        except OSError as problem:  # not as a write error, which successful small writes would end
            troubles.failed(TroubleKind.ROOM, problem)
            raise
        probe = self._arriving / f"probe.{secrets.token_hex(4)}"
        try:
            with troubles.noted(TroubleKind.WRITE):
                self._folders.create(lambda: probe.write_bytes(_PROBE), len(_PROBE))
            with troubles.noted(TroubleKind.READ):
                probe.read_bytes()
            self._see_owner()
            troubles.succeeded(TroubleKind.ROOM)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def _see_one_file_system(self) -> None:
        """
        Check that arriving files can be renamed into content.

        @raise OSError: if not: one of the folders is a mount point, or a link to another file system.
        """
        content, nothing = self._directory.root / "content", "no-file"
        for folder in (content, *(content / each for each in HEX_LENGTHS)):
            try:
                other = folder.stat().st_dev != self._arriving.stat().st_dev
                os.rename(self._arriving / nothing, folder / nothing)  # noqa: PTH104 (the mount is looked at first)
            except OSError as problem:
                other = problem.errno == errno.EXDEV
            if other:
                name = folder.relative_to(self._directory.root)
                apart = OSError(errno.EXDEV, f"{name}/ is on another file system than arriving/; {_TOGETHER}")
                self._directory.troubles.failed(TroubleKind.WRITE, apart)
                raise apart

    def _see_owner(self) -> None:
        """
        Find out which user the file system reports as owner of our files: NFS and FUSE may map all of them to one.
        """
        with contextlib.suppress(OSError), TemporaryFile(prefix="probe.", dir=self._arriving) as file:
            self._directory.owners.add(os.fstat(file.fileno()).st_uid)

    def reasons(self) -> list[str]:
        """
        Check the directory, and return the reasons why it can't be used.
        """
        with contextlib.suppress(OSError):
            self.run()
        return self._directory.troubles.reasons()

    def has_locks(self) -> bool:
        """
        Return True if files of the directory can be locked against other processes.

        @raise OSError: if no file can be created there.
        """
        return locks.exclude(self._arriving)
