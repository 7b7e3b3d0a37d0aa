"""
Verified files that are open for reading. They are locked, and not evicted while they are open.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Final, Protocol

from ecrproxy.buffers import AT_ONCE
from ecrproxy.cache.proofs import is_marked
from ecrproxy.oci import MANIFEST_LIMIT, Digest

_AHEAD: Final = 8 * 2**20
"""Bytes that the kernel is asked to read ahead while the bytes before them are hashed."""


class DigestMismatchError(Exception):
    """
    The bytes do not match the digest.
    """


class UnreadError(Exception):
    """
    The content was not read to its end, for a reason that says nothing about its bytes.
    """


class Shelf(Protocol):
    """
    The source of content, which is told whether it turns out to be good or bad.
    """

    def is_proved(self, digest: Digest, status: os.stat_result) -> bool:
        """
        Return True if the file with this status has been verified since it was last modified.
        """

    def prove(self, digest: Digest, status: os.stat_result, fd: int) -> None:
        """
        Record that a file was verified.
        """

    def drop(self, digest: Digest, status: os.stat_result, why: Exception) -> None:
        """
        Remove a bad file.
        """


class Content:
    """
    One open file of content. While it is open it stays readable and is not evicted.

    @param shelf: the source of the file.
    @param status: the file's status when it was opened.
    @ivar size: in bytes.
    """

    def __init__(self, shelf: Shelf, digest: Digest, file: OpenFile, status: os.stat_result) -> None:
        self._shelf, self.digest, self._file, self.status = shelf, digest, file, status
        self.size = status.st_size
        self._open = True

    @property
    def proved(self) -> bool:
        """
        Return True if the content has been verified since it was last modified.
        """
        return self._shelf.is_proved(self.digest, self.status)

    def is_unchanged(self) -> bool:
        """
        Return True if the open file is verified and still has its name. Costs one fstat(2).

        Unlinking or replacing the file reduces its link count.
        """
        before, now = self.status, os.fstat(self._file.fd)
        same = before.st_nlink == now.st_nlink and before.st_size == now.st_size and before.st_uid == now.st_uid
        return same and self._shelf.is_proved(self.digest, now)

    def fileno(self) -> int:
        """
        Return the file descriptor, for reading at offsets.
        """
        return self._file.fd

    def read(self) -> bytes:
        """
        Read small content to its end.

        @raise UnreadError: if it has more than C{MANIFEST_LIMIT} bytes, or fewer than when it was opened.
        """
        if self.size > MANIFEST_LIMIT:
            raise UnreadError(f"{self.digest} has {self.size} bytes, {MANIFEST_LIMIT} at most are read into memory")
        body = bytearray()
        while missing := self.size - len(body):
            data = os.pread(self._file.fd, missing, len(body))
            if not data:
                raise UnreadError(f"{self.digest} has been cut to {len(body)} bytes while it was read")
            body += data
        return bytes(body)

    def share(self) -> Content:
        """
        Return another handle to the same file; each must be closed.

        @raise UnreadError: if this one is closed.
        """
        file = self._file.share()
        if file is None:
            raise UnreadError(f"{self.digest} is closed")
        return Content(self._shelf, self.digest, file, self.status)

    def hash(self, state: Any, offset: int, limit: int) -> int:  # noqa: ANN401 (hashlib's objects have no public type)
        """
        Hash up to C{limit} bytes from C{offset} on.

        @return: the number of bytes hashed, 0 at the end.
        """
        return hash_range(self._file.fd, state, offset, limit)

    def settle(self, state: Any) -> bool:  # noqa: ANN401
        """
        Compare the hash of all bytes with the digest, and record that the content is verified.

        @return: False if the file was modified meanwhile; then nothing is recorded.
        @raise DigestMismatchError: if they differ.
        """
        if state.hexdigest() != self.digest.hex:
            raise DigestMismatchError("its bytes have changed")
        before, self.status = self.status, os.fstat(self._file.fd)
        changed = self.status.st_mtime_ns != before.st_mtime_ns and not is_marked(self.status)
        if not changed:
            self._shelf.prove(self.digest, self.status, self._file.fd)
        return not changed

    def drop(self, why: Exception) -> None:
        """
        Remove the bad file from the cache. If that fails, this process does not open it again.
        """
        self._shelf.drop(self.digest, self.status, why)

    def close(self) -> None:
        """
        Close this handle.
        """
        if self._open:
            self._open = False
            self._file.let_go()

    # A thread may have opened the file for a client that has disconnected: then nothing else closes it.
    __del__ = close


class OpenFile:
    """
    A file descriptor with a reference count.

    @param status: the file's status.
    """

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self.fd, self._holders, self._lock = fd, 1, threading.Lock()
        self._identity = status.st_ino, status.st_dev

    def is_same(self, status: os.stat_result) -> bool:
        """
        Return True if C{status} is this file's.
        """
        return self._identity == (status.st_ino, status.st_dev)

    def share(self) -> OpenFile | None:
        """
        Add a reference. Return None if the descriptor is closed.
        """
        with self._lock:
            if not self._holders:
                return None
            self._holders += 1
            return self

    def let_go(self) -> None:
        """
        Release one reference; close the descriptor with the last.
        """
        with self._lock:
            self._holders -= 1
            if not self._holders:
                os.close(self.fd)
                self.fd = -1


def hash_range(fd: int, state: Any, offset: int, limit: int) -> int:  # noqa: ANN401
    """
    Hash up to C{limit} bytes of an open file from C{offset} on.

    @return: the number of bytes hashed, 0 at the end.
    """
    end = offset + limit
    at = offset
    while at < end and (data := os.pread(fd, min(AT_ONCE, end - at), at)):
        at += len(data)
        if at < end:  # the kernel does no readahead by itself: see locks.without_side_effects
            os.posix_fadvise(fd, at, min(_AHEAD, end - at), os.POSIX_FADV_WILLNEED)
        state.update(data)
    return at - offset
