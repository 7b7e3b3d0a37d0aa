"""
The hash of a file from offset 0 on, while the rest is still written.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from ecrproxy.buffers import AT_ONCE
from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.oci import Digest

_CATCH_UP: Final = 16 * 2**20
"""Maximum number of bytes hashed by one call."""


class RunningHash:
    """
    Hashes a file in order. Any thread may read the result so far.

    @param digest: what the whole file should have.
    @ivar turn: held by the thread that hashes.
    """

    def __init__(self, digest: Digest) -> None:
        self._digest, self._state = digest, (digest.hasher(), 0)
        self.turn = threading.Lock()

    @property
    def hashed(self) -> int:
        """
        Return the number of bytes hashed, from offset 0 on.
        """
        return self._state[1]

    @property
    def reached(self) -> tuple[Any, int]:
        """
        Return a copy of the hash, and the number of bytes hashed. Safe while a thread is hashing.
        """
        state, hashed = self._state
        return state.copy(), hashed

    def add(self, pieces: Sequence[bytes]) -> None:
        """
        Hash the next bytes, which are in memory.
        """
        state, at = self.reached
        for piece in pieces:
            state.update(piece)
            at += len(piece)
        self._state = state, at

    def read_on(self, fd: int, end: int) -> int:
        """
        Hash the next bytes of an open file, some of them if there are many.

        @param end: the offset up to which they have been written.
        @return: the number of bytes hashed, from offset 0 on.
        @raise OSError: if the disk fails. Nothing is hashed then.
        """
        state, at = self.reached
        stop = min(end, at + _CATCH_UP)
        buffer = memoryview(bytearray(min(AT_ONCE, stop - at)))
        while at < stop:
            count = os.preadv(fd, [buffer[: stop - at]], at)
            if not count:
                raise OSError(errno.EIO, "what was written can't be read")
            state.update(buffer[:count])
            at += count
        self._state = state, at  # one assignment: a transfer that gives up the disk continues from there
        return at

    def verify(self) -> None:
        """
        Compare the hash with the digest.

        @raise DigestMismatchError: if they differ.
        """
        if self._state[0].hexdigest() != self._digest.hex:
            raise DigestMismatchError(f"what arrived is not {self._digest}")
