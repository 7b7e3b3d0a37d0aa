"""
Which files of the cache were seen to be what their digests name.

Rules:

- A proof is of one file as it was: its inode, its size, and the time of its last change. Another daemon's file of the
  same name, or the same file changed in place, has none.
- A use is noted in the file's mtime, in whole milliseconds. The kernel notes a change there too, in nanoseconds: that
  it hits a whole millisecond happens once in a million. So an mtime in whole milliseconds is a mark of ours, and says
  that nothing was written since. Where a file system keeps whole seconds alone, changes show at the next start.
- They are forgotten with the process, and the least recently used ones when there are too many: then a file is proved
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
"""Bytes that one proof is reckoned at: there is room for 67,000."""


def is_marked(status: os.stat_result) -> bool:
    """
    Tell whether a file was changed by nobody since its last use was noted.
    """
    return status.st_mtime_ns % _MILLISECOND == 0


def mark(fd: int, now: float) -> None:
    """
    Note that a file is used now.

    @raise OSError: if the disk can't be written.
    """
    moment = int(now * 1000) * _MILLISECOND
    os.utime(fd, ns=(moment, moment))


class Proofs:
    """
    Verdicts about files, shared by threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verdicts: Memory[Digest, tuple[int, int, int, bool]] = Memory(_LIMIT)

    def note(self, digest: Digest, status: os.stat_result, *, good: bool) -> None:
        """
        Note whether the file of C{status} is what C{digest} names.
        """
        with self._lock:
            self._verdicts.put(digest, (status.st_ino, status.st_size, status.st_mtime_ns, good), _RECKONED)

    def forget(self, digest: Digest) -> None:
        """
        Forget a file that is gone: another may have its inode.
        """
        with self._lock:
            self._verdicts.drop(digest)

    def verdict(self, digest: Digest, status: os.stat_result) -> bool | None:
        """
        Tell whether the file of C{status} is what C{digest} names; none if that isn't known.
        """
        with self._lock:
            found = self._verdicts.get(digest)
        if found is None:
            return None
        *proved, when, good = found
        same = proved == [status.st_ino, status.st_size] and (is_marked(status) or when == status.st_mtime_ns)
        return good if same else None
