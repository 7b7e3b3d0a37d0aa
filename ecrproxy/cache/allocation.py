"""
Disk space for a file, before its first byte.

glibc's posix_fallocate(3) writes a byte into each block where the file system can't allocate: over NFS and EFS,
2.6 million writes for 10 GiB. musl's fails there. So fallocate(2) itself is called, and is a hint.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def _fallocate() -> Any:  # noqa: ANN401
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)  # musl's has 64 bits by either name
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call


_call: Final = _fallocate()


def fallocate(fd: int, size: int) -> None:
    """
    Allocate the first C{size} bytes of a file by the system call, which writes nothing.

    @raise OSError: if it fails; ENOSYS where libc has no such call.
    """
    if _call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while _call(fd, 0, 0, size):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def allocate(fd: int, size: int) -> None:
    """
    Give an empty file C{size} bytes, and their disk space where the file system can allocate it.

    @raise OSError: if the disk has no room for them, or fails.
    """
    try:
        fallocate(fd, size)
    except OSError as problem:
        if problem.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(fd, size)
