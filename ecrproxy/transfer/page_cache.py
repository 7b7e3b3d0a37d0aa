"""
Find out which bytes of a file are in the kernel's page cache.

Uses mincore(2) on a mapping of the file. preadv2(2) with RWF_NOWAIT would make the disk read what is missing, and so
wait until the disk's queue has room.

Files are identified with statx(2), which answers from what the kernel has cached. fstat(2) asks the file system's
server, such as a program or another machine, and waits for the answer.
"""

from __future__ import annotations

import ctypes
import time
from collections import OrderedDict
from collections.abc import Callable
from mmap import MAP_SHARED, PAGESIZE, PROT_READ
from typing import Any, Final

_PAGES: Final = 1024
"""Maximum number of pages per mincore call."""
_FAILED: Final = ctypes.c_void_p(-1).value
LATELY_SECONDS: Final = 0.05
"""How long a result is reused, in seconds: bytes may wait longer than that for their client anyway."""
_KEPT: Final = 64
_lately: Final[OrderedDict[tuple[bytes, int, int], tuple[float, int]]] = OrderedDict()
"""Recent results by inode and device, offset and count: the time, and how many of the bytes were in memory."""
_EMPTY_PATH: Final = 0x1000
_DONT_SYNC: Final = 0x4000
_INODE_WANTED: Final = 0x100
_INODE: Final = slice(32, 40)
_DEVICE: Final = slice(136, 144)
"""Constants of Linux's fcntl.h and stat.h; positions in the 256 bytes of struct statx."""


def _calls() -> tuple[Any, Any, Any, Any]:
    libc = ctypes.PyDLL(None)  # keeps the GIL: the calls are short
    mmap = getattr(libc, "mmap64", None) or libc.mmap
    mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    mmap.restype = ctypes.c_void_p
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    statx = getattr(libc, "statx", None)
    if statx is not None:
        statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return mmap, libc.mincore, libc.munmap, statx


_mmap, _mincore, _munmap, _statx = _calls()
_pages: Final = ctypes.create_string_buffer(_PAGES)
_status: Final = ctypes.create_string_buffer(256)


def in_memory(fd: int, offset: int, count: int, now: Callable[[], float] = time.monotonic) -> int:
    """
    Return how many of the C{count} bytes at C{offset} are in memory, up to the first that isn't.

    Returns C{count} if the kernel can't or won't tell. Of many clients that are sent the same bytes, one asks the
    kernel for all; if the file can't be identified, each asks. Call it in the event loop only.
    """
    file, when = _file(fd), now()
    if file is None:
        return _asked(fd, offset, count)
    key = file, offset, count
    known = _lately.get(key)
    if known is not None and 0 <= when - known[0] < LATELY_SECONDS:
        return known[1]
    there = _asked(fd, offset, count)
    if there:
        _lately[key] = when, there
        _lately.move_to_end(key)
        if len(_lately) > _KEPT:
            _lately.popitem(last=False)
    return there


def _file(fd: int) -> bytes | None:
    """
    Return the identity of an open file as the kernel has it cached; none if unknown.
    """
    if _statx is None or _statx(fd, b"", _EMPTY_PATH | _DONT_SYNC, _INODE_WANTED, _status):
        return None
    status = _status.raw
    return status[_INODE] + status[_DEVICE]


def _asked(fd: int, offset: int, count: int) -> int:
    start = offset // PAGESIZE * PAGESIZE
    length = min(offset + count - start, _PAGES * PAGESIZE)
    address = _mmap(None, length, PROT_READ, MAP_SHARED, fd, start)
    if address == _FAILED:
        return count
    failed = _mincore(address, length, _pages)
    _munmap(address, length)
    if failed:
        return count
    missing = _pages.raw[: -(-length // PAGESIZE)].find(0)
    end = start + (length if missing < 0 else missing * PAGESIZE)
    return max(0, end - offset)
