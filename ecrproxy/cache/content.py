"""
Verified files, as those who read them have them: open, shared, and not evicted meanwhile.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from ecrproxy.cache.proofs import is_marked
from ecrproxy.oci import MANIFEST_LIMIT, Digest

if TYPE_CHECKING:
    from ecrproxy.cache.store import Store


class DigestMismatchError(Exception):
    """
    The bytes are not those that the digest names.
    """


class UnreadError(Exception):
    """
    Content was not read whole, for a reason that says nothing about its bytes.
    """


class Content:
    """
    One open file of content. While it is open it stays readable and is not evicted.

    @param status: what the file was when it was opened.
    @ivar size: in bytes.
    """

    def __init__(self, store: Store, digest: Digest, file: OpenFile, status: os.stat_result) -> None:
        self._store, self.digest, self._file, self.status = store, digest, file, status
        self.size = status.st_size
        self._open = True

    @property
    def proved(self) -> bool:
        """
        Tell whether it is known to be what its digest names.
        """
        return self._store.proofs.verdict(self.digest, self.status) is True

    def fileno(self) -> int:
        """
        Hand out the file descriptor, for reading at offsets.
        """
        return self._file.fd

    def read(self) -> bytes:
        """
        Read all of it: small content, which is held in memory.

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
        Hand out the file once more, to be closed by itself.
        """
        file = self._file.share()
        if file is None:
            raise UnreadError(f"{self.digest} is closed")
        return Content(self._store, self.digest, file, self.status)

    def hash(self, state: Any, offset: int, limit: int) -> int:  # noqa: ANN401 (hashlib's objects have no public type)
        """
        Hash the bytes from C{offset} on, up to C{limit}.

        @return: how many there were.
        """
        return hash_range(self._file.fd, state, offset, limit)

    def settle(self, state: Any) -> bool:  # noqa: ANN401
        """
        Hold the hash of all its bytes against the digest, and note that it was found right.

        @return: false if the file was changed meanwhile: then nothing is said.
        @raise DigestMismatchError: if it is not what its digest names.
        """
        if state.hexdigest() != self.digest.hex:
            raise DigestMismatchError("it is not what it was")
        before, self.status = self.status, os.fstat(self._file.fd)
        changed = self.status.st_mtime_ns != before.st_mtime_ns and not is_marked(self.status)
        if not changed:
            self._store.proofs.note(self.digest, self.status, good=True)
            self._store.mark(self._file.fd)
            self._store.index.verified(self.digest)
        return not changed

    def drop(self, why: Exception) -> None:
        """
        Take the file out of the cache: it is bad. If it can't be, it is not opened again.
        """
        self._store.drop(self.digest, self.status, why)

    def close(self) -> None:
        """
        Let go of the file.
        """
        if self._open:
            self._open = False
            self._file.let_go()

    # A thread may open a file for a client who has gone meanwhile: nobody is left to close it then.
    __del__ = close


class OpenFile:
    """
    A file descriptor that several may hold: closed with the last of them.

    @param status: tells which file it is.
    """

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self.fd, self._holders, self._lock = fd, 1, threading.Lock()
        self._identity = status.st_ino, status.st_dev

    def is_same(self, status: os.stat_result) -> bool:
        """
        Tell whether C{status} is of this file.
        """
        return self._identity == (status.st_ino, status.st_dev)

    def share(self) -> OpenFile | None:
        """
        Hold it as well; none if it has been closed.
        """
        with self._lock:
            if not self._holders:
                return None
            self._holders += 1
            return self

    def let_go(self) -> None:
        """
        Release it; the last one closes it.
        """
        with self._lock:
            self._holders -= 1
            if not self._holders:
                os.close(self.fd)
                self.fd = -1


def hash_range(fd: int, state: Any, offset: int, limit: int) -> int:  # noqa: ANN401
    """
    Hash the bytes of an open file from C{offset} on, up to C{limit}.

    @return: how many there were.
    """
    end = offset + limit
    at = offset
    while at < end and (data := os.pread(fd, min(2**20, end - at), at)):
        state.update(data)
        at += len(data)
    return at - offset
