"""
What processes are about to fetch before anybody asks for it, so that only one of them asks upstream.

A digest is a byte of one file, and whoever locks it is about to fetch that. The kernel releases locks with the process.
It is no claim: clients, of any process, fetch what they want all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

NAME: Final = "ahead.lock"
_DIGITS: Final = 15


class Intents:
    """
    What this process is about to fetch. May be called in several threads.

    @param root: the cache directory.
    """

    def __init__(self, root: Path) -> None:
        self._path, self._fd = root / NAME, -1
        self._opening = threading.Lock()

    def take(self, digest: Digest) -> bool:
        """
        Return False if another process is about to fetch it. Where there are no such locks, none is.
        """
        try:
            with self._opening:  # locks are of whoever opened it: there is to be one of these
                if self._fd < 0:
                    self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._lock(fcntl.F_WRLCK, digest)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def release(self, digest: Digest) -> None:
        """
        Have others fetch it if they like.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._lock(fcntl.F_UNLCK, digest)

    def _lock(self, kind: int, digest: Digest) -> None:
        # Of the open file, not of the process: those end when any descriptor of the file is closed.
        at = int(digest.hex[:_DIGITS], 16)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
