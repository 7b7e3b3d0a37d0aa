"""
Memory for bytes in transit: sizes of pieces, and malloc settings.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

MAPPED: Final = 256 * 2**10
"""Minimum size of allocations that malloc maps separately, and so returns to the system when they are freed."""
AT_ONCE: Final = 240 * 2**10
"""
Bytes that are read or sealed at once: slightly less than L{MAPPED}.

The system zeroes each page of mapped memory: for pieces of 1 MiB this costs more than sealing them.
"""
_M_MMAP_THRESHOLD: Final = -3
"""glibc's malloc.h."""


def map_large_pieces() -> None:
    """
    Make glibc return large allocations to the system when they are freed.

    Otherwise glibc raises its threshold to the largest piece freed so far, up to 32 MiB, and keeps smaller ones in
    heaps that never shrink: with threads that write blobs in batches of megabytes, the daemon tripled in size.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc has no mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED)


def give_memory_back() -> None:
    """
    Return other freed memory to the system. Called in a thread: it takes 2 ms, and 40 ms for 200 MB.

    glibc itself returns only free memory at the end of a heap: hundreds of clients over TLS cost 200 MB for ever.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
