"""
The memory that bytes on their way are held in: how much is taken at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

MAPPED: Final = 256 * 2**10
"""From so many bytes on, a piece of memory is the system's own: it is given back when it is freed."""
AT_ONCE: Final = 240 * 2**10
"""
Bytes that are read or sealed at once: some less than L{MAPPED}.

The system gives its memory page by page, each filled with zeros first: pieces of 1 MiB cost more than to seal them.
"""
_M_MMAP_THRESHOLD: Final = -3
"""glibc's malloc.h."""


def map_large_pieces() -> None:
    """
    Have glibc give large pieces of memory back to the system when they are freed.

    Otherwise it comes to keep what is as large as the largest piece that was freed once, up to 32 MiB, in heaps that
    never shrink: among threads that write blobs in batches of megabytes, the daemon grew to three times its size.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc does not know it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED)


def give_memory_back() -> None:
    """
    Give the system what was freed of other pieces. Called in a thread: it takes 2 ms, and 40 ms where there are 200 MB.

    By itself glibc gives back only what is free at a heap's end: hundreds of clients over TLS cost 200 MB for ever.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
