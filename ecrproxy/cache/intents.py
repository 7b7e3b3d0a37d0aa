"""
The digests that processes will prefetch, so that only one of them asks upstream.

Each digest maps to a byte of one file; the process that locks the byte will fetch the digest. The kernel releases locks
when the process ends. An intent is not a claim: clients of any process still fetch what they need.
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
    The digests that this process will prefetch. Thread-safe.

    @param root: the cache directory.
    """

    def __init__(self, root: Path) -> None:
        self._path, self._fd = root / NAME, -1
        self._opening = threading.Lock()

    def take(self, digest: Digest) -> bool:
        """
        Return False if another process will fetch the digest. Always True if such locks are unsupported.
        """
        try:
            with self._opening:  # locks belong to an open file description: open it only once
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
        Let other processes fetch the digest.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._lock(fcntl.F_UNLCK, digest)

    def _lock(self, kind: int, digest: Digest) -> None:
        # Lock for the open file, not for the process: process locks end when any descriptor of the file is closed.
        at = int(digest.hex[:_DIGITS], 16)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
