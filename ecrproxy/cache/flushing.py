"""
Write a file back to disk piece by piece, so that no single call takes long, however large the file is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

PIECE: Final = 256 * 2**20
"""Bytes written back by one call: takes less than a minute even at 5 MB/s."""
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE})
_WRITE_AND_WAIT: Final = 1 | 2 | 4
"""sync_file_range(2): wait for pending writes, write the rest, and wait for that."""


def _sync_file_range() -> Any:  # noqa: ANN401
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_call: Final = _sync_file_range()


def write_back(fd: int, start: int, size: int) -> None:
    """
    Write a range of a file back to disk, if the system supports it. An fsync(2) is still needed, but has less to write.

    @raise OSError: if the disk fails. The kernel reports this only once: a later fsync may succeed all the same.
    """
    while _call is not None and _call(fd, start, size, _WRITE_AND_WAIT):
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
