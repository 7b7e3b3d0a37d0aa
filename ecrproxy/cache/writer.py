"""
One file that arrives, written in several places at once.

Rules:

- What is there, or is being written, is never written again, whoever asks for it: it may be hashed already, and shown.
- It becomes content by its digest alone, once every byte of it was hashed.
- It is locked as long as it is open. Whoever it was for, it is closed, left or discarded at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ecrproxy.cache.content import DigestMismatchError, content_path
from ecrproxy.cache.proofs import mark
from ecrproxy.cache.trailer import UNKNOWN_BOOT, Stretches, Trailer, room_for
from ecrproxy.cache.troubles import Kind
from ecrproxy.oci import Digest

if TYPE_CHECKING:
    from ecrproxy.cache.ingest import Ingest

_CATCH_UP: Final = 16 * 2**20
"""Bytes that are hashed in one go: a lane that has bytes to write waits for no more."""


class Writer:
    """
    A file that arrives, in several places at once; hashed in order; content once its digest is right.

    @ivar room: the bytes that it takes of the disk.
    """

    def __init__(self, ingest: Ingest, digest: Digest, size: int, path: Path, fd: int) -> None:
        self._ingest, self.digest, self.size, self._path, self._fd = ingest, digest, size, path, fd
        self.room = room_for(size)
        self._state = digest.hasher(), 0
        self._there = Stretches()
        self._shown = Stretches()
        self._claims: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._committed = False
        self._guard = threading.Lock()
        self._users, self._closed = 0, False

    @property
    def hashed(self) -> int:
        """
        Tell how many bytes are there and hashed, from the first on.
        """
        return self._state[1]

    def fileno(self) -> int:
        """
        Hand out the file descriptor, for reading what was written.
        """
        return self._fd

    def take_up(self, trailer: Trailer) -> None:
        """
        Go on from what C{trailer} says.

        What was written since the machine started may be read at once. Else it is shown when it is hashed: after
        a crash of the machine a stretch that was not synced may be full of zeros.
        """
        self._there = Stretches(trailer.there)
        if trailer.boot == self._ingest.boot != UNKNOWN_BOOT:
            self._shown = Stretches(trailer.there)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """
        Tell which bytes are missing.
        """
        return self._there.gaps(self.size)

    @property
    def missing(self) -> int:
        """
        Tell how many bytes are missing.
        """
        return sum(stop - start for start, stop in self.gaps)

    @property
    def front(self) -> int:
        """
        Tell up to where all bytes from the first on are there.
        """
        return self._there.end_of(0)

    def write(self, offset: int, pieces: Sequence[bytes]) -> None:
        """
        Write C{pieces} from C{offset} on. Threads may do so at the same time, in different places.

        @raise ValueError: if some of these bytes are there or are being written, or lie outside the blob. Nothing is
            written then.
        @raise OSError: if the disk fails; what was written before stays readable.
        """
        with self._ingest.troubles.noted(Kind.WRITE), self._using():
            self._write(offset, pieces)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """
        Keep the file descriptor open: when the disk has been given up, a thread may still be at it.
        """
        with self._guard:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                self._close_unused()

    def _write(self, offset: int, pieces: Sequence[bytes]) -> None:
        end = offset + sum(map(len, pieces))
        if end == offset:
            return
        self._claim(offset, end)
        try:
            self._put(offset, pieces)
            with self._lock:
                self._there.add(offset, end)
                self._shown.add(offset, end)
                if offset == self.hashed:  # as it comes, from memory
                    state, _ = self.reached
                    for piece in pieces:
                        state.update(piece)
                    self._state = state, end
                self._hash_on()
                self._tell()
        finally:
            with self._lock:
                self._claims.remove((offset, end))

    def _claim(self, start: int, stop: int) -> None:
        with self._lock:
            taken = any(first < stop and start < last for first, last in (*self._there, *self._claims))
            if taken or start < 0 or stop > self.size:
                raise ValueError(f"bytes {start} to {stop} of {self.digest} are not missing: {self.gaps}")
            self._claims.append((start, stop))

    def _put(self, offset: int, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def catch_up(self) -> bool:
        """
        Hash some of what came before its turn, or was there from the start.

        @return: whether there is more of it.
        @raise OSError: if the disk fails.
        """
        with self._using(), self._lock:
            return self._hash_on()

    def _hash_on(self) -> bool:
        end = self._there.end_of(self.hashed)
        state, at = self.reached
        stop = min(end, at + _CATCH_UP)
        while at < stop:
            data = os.pread(self._fd, min(2**20, stop - at), at)
            if not data:
                raise OSError(errno.EIO, "what was written can't be read")
            state.update(data)
            at += len(data)
        self._state = state, at  # at once: whoever gives the disk up goes on from there
        return stop < end

    def _tell(self) -> None:
        """
        Note in the file what is there of it; a disk that can't take that costs a transfer, another time.
        """
        there = tuple(self._there)
        if self.room > self.size and there != ((0, self.size),):
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, Trailer(self.size, self._ingest.now(), there, self._ingest.boot).pack(), self.size)

    def reach(self, offset: int) -> int:
        """
        Tell up to where all bytes from C{offset} on may be read.
        """
        return self._shown.end_of(offset)

    @property
    def reached(self) -> tuple[Any, int]:
        """
        Give the state of the hash, and over how many bytes it is, also while a thread is at it.
        """
        state, hashed = self._state
        return state.copy(), hashed

    def verify(self) -> None:
        """
        Hold the hash against the digest.

        @raise DigestMismatchError: if they differ.
        """
        if self._state[0].hexdigest() != self.digest.hex:
            raise DigestMismatchError(f"what arrived is not {self.digest}")

    def commit(self) -> None:
        """
        Make the file content, for good. The file descriptor stays open until L{close}.

        @raise DigestMismatchError: if it is not what its digest names.
        @raise OSError: if the disk fails; the file is not content then.
        """
        self.verify()
        with self._ingest.troubles.noted(Kind.WRITE), self._using():
            self._commit()

    def _commit(self) -> None:
        if self.hashed < self.room:
            os.ftruncate(self._fd, self.hashed)
        with contextlib.suppress(OSError):
            mark(self._fd, self._ingest.now())
        os.fsync(self._fd)
        proved = os.fstat(self._fd)  # before anybody finds it, and may change it
        path = content_path(self.digest)
        target = self._ingest.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path.rename(target)
        self._ingest.proofs.note(self.digest, proved, good=True)
        self._ingest.readers.add(self.digest, 1)  # by those who follow, until it is closed
        self._committed = True
        self._ingest.index.add(self.digest, self.hashed, self._path.name)

    def close(self) -> None:
        """
        Let go of the file, committed or discarded before.
        """
        with self._guard:
            self._closed = True
            self._close_unused()

    def _close_unused(self) -> None:
        if self._closed and not self._users and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._committed:
                self._ingest.readers.add(self.digest, -1)

    def leave(self) -> None:
        """
        Let go of the file, and leave it to the next transfer of its digest if it is worth that.
        """
        if self._closed or self._committed:
            self.close()
        elif Trailer.read(self._fd) is None:
            self.discard()
        else:
            self._ingest.index.arrive(self._path.name, self.room, self._ingest.now())
            self.close()

    def discard(self) -> None:
        """
        Unlink the file and let go of it.
        """
        if not self._committed and not self._closed:
            with contextlib.suppress(OSError):
                self._path.unlink()
                self._ingest.index.drop(arriving=[self._path.name])
        self.close()
