"""
Which bytes of a file the kernel has in memory.

mincore(2) tells, of a mapping of the file. preadv2(2) with RWF_NOWAIT has the disk read what is missing, and so waits
until the disk's queue has room.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from mmap import MAP_SHARED, PAGESIZE, PROT_READ
from typing import Any, Final

_PAGES: Final = 1024
"""The most pages that are looked at in one call."""
_FAILED: Final = ctypes.c_void_p(-1).value
LATELY_SECONDS: Final = 0.05
"""How long bytes that were in memory are taken to be there still: one may wait for its client for longer anyway."""
_KEPT: Final = 64
_lately: Final[OrderedDict[tuple[int, int, int, int], tuple[float, int]]] = OrderedDict()
"""When which bytes were asked for, and how many of them were there: by device and inode."""


def _calls() -> tuple[Any, Any, Any]:
    libc = ctypes.PyDLL(None)  # which keeps the interpreter's lock: the calls are short
    mmap = getattr(libc, "mmap64", None) or libc.mmap
    mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    mmap.restype = ctypes.c_void_p
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return mmap, libc.mincore, libc.munmap


_mmap, _mincore, _munmap = _calls()
_pages: Final = ctypes.create_string_buffer(_PAGES)


def in_memory(fd: int, offset: int, count: int, now: Callable[[], float] = time.monotonic) -> int:
    """
    Return how many of the C{count} bytes from C{offset} on are in memory, before the first that isn't.

    All of them, where the kernel can't or won't tell. Of a crowd that is sent the same, one asks for all. To be called
    in the event loop alone.
    """
    status, when = os.fstat(fd), now()
    key = status.st_dev, status.st_ino, offset, count
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
