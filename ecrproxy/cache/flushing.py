"""
Write a file to the disk a piece at a time, so that no call takes longer the larger the file is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

PIECE: Final = 256 * 2**20
"""Bytes that are written to the disk in one call: in a minute, even if it takes 5 MB/s."""
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE})
_WRITE_AND_WAIT: Final = 1 | 2 | 4
"""sync_file_range(2): wait for what is being written, write the rest, and wait for that."""


def _sync_file_range() -> Any:  # noqa: ANN401
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_call: Final = _sync_file_range()


def write_back(fd: int, start: int, size: int) -> None:
    """
    Write a range of a file to the disk, if the system can do that. It is durable after fsync(2), fast then.

    @raise OSError: if the disk fails. That is told once, so fsync may succeed after it.
    """
    while _call is not None and _call(fd, start, size, _WRITE_AND_WAIT):
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
