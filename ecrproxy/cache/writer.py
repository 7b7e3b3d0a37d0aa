"""
One file that arrives, written in several places at once.

Rules:

- What is there, or is being written, is never written again, whoever asks for it: it may be hashed already, and shown.
- It becomes content by its digest alone, once every byte of it was hashed.
- Its claim is held until it is content, left, or given up. The file itself stays open, and locked against removal,
  until it is closed: those who follow read it.
- The record is written behind the bytes that it tells of, so that no other process sends bytes that are not there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.locks import is_in_place
from ecrproxy.cache.proofs import mark
from ecrproxy.cache.record import WORTH_RESUMING, Record, State, Stretches, Why, room_for
from ecrproxy.cache.troubles import Kind

if TYPE_CHECKING:
    from ecrproxy.cache.claim import Claim
    from ecrproxy.oci import Digest

_CATCH_UP: Final = 16 * 2**20
"""Bytes that are hashed in one go: a lane that has bytes to write waits for no more."""


class Writer:
    """
    A file that arrives, in several places at once; hashed in order; content once its digest is right.

    @param claim: the claim of C{digest}, the writer's from now on.
    @param fd: the file, open for reading and writing under a shared lock.
    @ivar room: the bytes that it takes of the disk.
    """

    def __init__(self, directory: Directory, claim: Claim, digest: Digest, size: int, fd: int) -> None:
        self._directory, self._claim, self.digest, self.size, self._fd = directory, claim, digest, size, fd
        self.room = room_for(size)
        self._state = digest.hasher(), 0
        self._there = Stretches()
        self._shown = Stretches()
        self._in_writing: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._epoch, self._progress, self._stage = 1, 0, State.ARRIVING
        self._guard = threading.Lock()
        self._users, self._let_go, self._closed, self._committed = 0, False, False, False

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

    def begin(self, earlier: Record | None = None) -> None:
        """
        Begin the record, or go on from an earlier writer's.

        What was written since the machine started may be read at once. Else it is shown when it is hashed: after
        a crash of the machine a stretch that was not synced may be full of zeros.

        @raise OSError: if the disk can't take it.
        """
        if earlier is not None:
            self._epoch, self._progress = earlier.epoch + 1, earlier.progress
            self._there = earlier.resumable
            if earlier.is_of(self._directory.boot):
                self._shown = Stretches(earlier.shown)
        else:
            self._claim.allocate()
        self._tell()

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
        with self._directory.troubles.noted(Kind.WRITE), self._using():
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
        self._begin_writing(offset, end)
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
                self._tell_if_it_can_be()
        finally:
            with self._lock:
                self._in_writing.remove((offset, end))

    def _begin_writing(self, start: int, stop: int) -> None:
        with self._lock:
            taken = any(first < stop and start < last for first, last in (*self._there, *self._in_writing))
            if taken or start < 0 or stop > self.size:
                raise ValueError(f"bytes {start} to {stop} of {self.digest} are not missing: {self.gaps}")
            self._in_writing.append((start, stop))

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
            try:
                return self._hash_on()
            finally:
                self._tell_if_it_can_be()

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
        if at:
            self._shown.add(0, at)
        return stop < end

    def _tell(self, why: Why = Why.NOTHING) -> None:
        """
        Write the record.

        @raise OSError: if the disk fails.
        """
        self._progress += 1
        record = Record(
            self.size,
            self._directory.now(),
            self._directory.boot,
            tuple(self._there),
            tuple(self._shown),
            self.hashed,
            self._epoch,
            self._progress,
            self._stage,
            why,
        )
        self._claim.tell(record)

    def _tell_if_it_can_be(self, why: Why = Why.NOTHING) -> None:
        """
        Write the record; a disk that can't take it costs those who follow elsewhere a transfer of their own.
        """
        with contextlib.suppress(OSError):
            self._tell(why)

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
        with self._directory.troubles.noted(Kind.WRITE), self._using():
            self._enter(State.VERIFIED)  # before the disk has it for good: readers need not wait for that
            self._commit()
            self._enter(State.CONTENT, then=self._claim.end)

    def _enter(self, stage: State, why: Why = Why.NOTHING, then: Callable[[], None] = lambda: None) -> None:
        """
        Tell how far the transfer has come.

        @param then: ends the claim, which no other thread of a disk that hung may write to then.
        """
        with self._lock:
            self._stage = stage
            self._tell_if_it_can_be(why)
            then()

    def _commit(self) -> None:
        if self.hashed < self.size:
            os.ftruncate(self._fd, self.hashed)
        with contextlib.suppress(OSError):
            mark(self._fd, self._directory.now())
        os.fsync(self._fd)
        proved = os.fstat(self._fd)  # before anybody finds it, and may change it
        target = self._directory.content(self.digest)
        self._check_place()  # nor is a directory made in the place of a volume that is gone
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:  # whoever gives a disk up that hangs does it before or afterwards
            self._check_place()
            self._claim.data.rename(target)
            self._committed = True
        self._directory.proofs.note(self.digest, proved, good=True)
        self._directory.index.add(self.digest, self.hashed, self._claim.reservation)

    def _check_place(self) -> None:
        """
        See that the file still has its name, which is the next writer's once this one has been given up.

        @raise OSError: if it has not.
        """
        if not is_in_place(self._fd, self._claim.data):
            raise OSError(errno.ESTALE, "somebody has removed the file that was arriving")

    def close(self) -> None:
        """
        Let go of the file, committed, left or given up before.
        """
        with self._guard:
            self._closed = self._let_go = True
            self._close_unused()

    def _close_unused(self) -> None:
        if self._users:
            return
        if self._let_go:
            self._claim.release()
        if self._closed and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def release(self) -> None:
        """
        Leave the transfer to whoever claims it next, if what came is worth that. The file stays open until L{close}.
        """
        if self._let_go or self._committed:
            return
        left = self._claim.read()
        if self.size < WORTH_RESUMING or left is None or not left.there:
            self.give_up()
            return
        self._directory.index.arrive(self._claim.reservation, self.room, self._directory.now())
        with self._guard:
            self._let_go = True
            self._close_unused()

    def give_up(self, why: Why = Why.DISK) -> None:
        """
        Remove the file, for it is of no use. It stays open until L{close}: what came may be read.
        """
        if self._let_go or self._committed:
            return
        verified = self._stage is State.VERIFIED  # others may finish with that
        self._enter(self._stage if verified else State.FAILED, Why.NOTHING if verified else why, self._claim.drop)
        self._directory.index.drop(arriving=[self._claim.reservation])
        self._let_go = True

    def leave(self) -> None:
        """
        Leave the transfer to the next, and let go of the file.
        """
        self.release()
        self.close()

    def discard(self) -> None:
        """
        Remove the file and let go of it.
        """
        self.give_up()
        self.close()
