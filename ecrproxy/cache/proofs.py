"""
Which files of the cache are known to match their digests.

Rules:

- A proof applies to one file in one state: its inode, size, and time of last modification. A file that another daemon
  writes under the same name, or the same file modified in place, has none.
- A use is recorded in the file's mtime, in whole milliseconds. The kernel records a modification there too, in
  nanoseconds, which is a whole millisecond once in a million times. So an mtime in whole milliseconds is a mark of
  ours, and means that nothing was written since. On a file system that keeps whole seconds, modifications are found
  only after a restart.
- Proofs last as long as the process; beyond a limit the least recently used are dropped. Then the file is verified
  again.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from ecrproxy.cache.memory import Memory

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

_MILLISECOND: Final = 10**6
_LIMIT: Final = 32 * 2**20
_RECKONED: Final = 500
"""Bytes that one proof is assumed to take: there is room for 67,000."""


def is_marked(status: os.stat_result) -> bool:
    """
    Return True if nobody has modified the file since its last use was recorded.
    """
    return status.st_mtime_ns % _MILLISECOND == 0


def mark(fd: int, now: float) -> None:
    """
    Record in the file's mtime that it is used now.

    @raise OSError: if the disk can't be written.
    """
    moment = int(now * 1000) * _MILLISECOND
    os.utime(fd, ns=(moment, moment))


class Proofs:
    """
    Verdicts about files. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verdicts: Memory[Digest, tuple[int, int, int, bool]] = Memory(_LIMIT)

    def note(self, digest: Digest, status: os.stat_result, *, good: bool) -> None:
        """
        Record whether the file with C{status} matches C{digest}.
        """
        with self._lock:
            self._verdicts.put(digest, (status.st_ino, status.st_size, status.st_mtime_ns, good), _RECKONED)

    def forget(self, digest: Digest) -> None:
        """
        Forget a file that is gone: another may reuse its inode.
        """
        with self._lock:
            self._verdicts.drop(digest)

    def verdict(self, digest: Digest, status: os.stat_result) -> bool | None:
        """
        Return True if the file with C{status} matches C{digest}, False if not, None if unknown.
        """
        with self._lock:
            found = self._verdicts.get(digest)
        if found is None:
            return None
        *proved, when, good = found
        same = proved == [status.st_ino, status.st_size] and (is_marked(status) or when == status.st_mtime_ns)
        return good if same else None
