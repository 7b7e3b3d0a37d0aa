"""
Which user owns the files of a cache directory: all processes on it run as one user, except root's commands.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ecrproxy.cache.database import UnusableError
from ecrproxy.cache.presence import status_of

ONE_USER: Final = "have all processes on the directory run as the user that owns it, and give its files to that user"


def give(path: Path, root: Path) -> None:
    """
    Give a file that root has created to the owner of the cache directory.

    Root's commands must not lock out a daemon, nor must a daemon that starts as root (C{twistd --uid}) lock itself out.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            owner = root.stat()
            # The owner may have put links into it.
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def may_use(files: Iterable[Path]) -> bool:
    """
    Return False if this user may not read and write one of its own files: somebody has changed its mode.

    @raise UnusableError: if a file is another user's. A new index would take the old one from that user's processes,
        which could not open the new one, and would make another in turn.
    """
    for path in files:
        status = status_of(path)
        if status is None or os.access(path, os.R_OK | os.W_OK):
            continue
        if status.st_uid != os.geteuid():
            raise UnusableError(
                f"{path.name} belongs to user {status.st_uid}, this process runs as {os.geteuid()}; {ONE_USER}"
            )
        return False
    return True
