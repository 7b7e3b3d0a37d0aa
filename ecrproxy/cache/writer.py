"""
Write one file that is being downloaded, in several places at once.

Rules:

- Bytes that were written, or are being written, are never written again: they may have been hashed, and sent.
- The file becomes content once every byte has been hashed and the digest matches.
- The claim is held until the file is content, left to others, or given up. The file stays open under a shared lock
  until L{Writer.close}: clients are sent from it.
- One thread hashes at a time. Others write meanwhile, and leave their bytes to be hashed later.
- The record is written after the bytes that it lists, so that no other process sends missing bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ecrproxy.cache.descriptor import HeldFile
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.flushing import write_back
from ecrproxy.cache.locks import is_in_place
from ecrproxy.cache.proofs import mark
from ecrproxy.cache.record import WORTH_RESUMING, Record, State, Stretches, Why, room_for
from ecrproxy.cache.running_hash import RunningHash
from ecrproxy.cache.troubles import TroubleKind

if TYPE_CHECKING:
    from ecrproxy.cache.claim import Claim
    from ecrproxy.oci import Digest

UNASKED_SECONDS: Final = 3600.0
"""How long ago unrequested content counts as used: it is evicted before anything requested since."""


class Writer:
    """
    A file that is written in several places at once, and hashed in order.

    @param claim: the claim of C{digest}, which the writer releases.
    @param fd: the file, open for reading and writing under a shared lock.
    @ivar room: bytes of disk that it takes.
    @ivar asked_for: True if a client has requested it.
    """

    asked_for = True

    def __init__(self, directory: Directory, claim: Claim, digest: Digest, size: int, fd: int) -> None:
        self._directory, self._claim, self.digest, self.size = directory, claim, digest, size
        self._file = HeldFile(fd)
        self.room = room_for(size)
        self._hash = RunningHash(digest)
        self._there = Stretches()
        self._shown = Stretches()
        self._in_writing: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._epoch, self._progress, self._stage = 1, 0, State.ARRIVING
        self._flushed = 0
        self._let_go, self._committed = False, False

    @property
    def hashed(self) -> int:
        """
        Return the number of bytes hashed, from offset 0 on.
        """
        return self._hash.hashed

    def fileno(self) -> int:
        """
        Return the file descriptor, for reading written bytes.
        """
        return self._file.fd

    def begin(self, earlier: Record | None = None) -> None:
        """
        Write the first record, or resume from the record of an earlier writer.

        Bytes that were written since the machine booted may be sent at once, others only after they have been hashed
        again: after a crash of the machine, a range that was not synced may be all zeros.

        @raise OSError: if the disk fails.
        """
        if earlier is not None:
            self._epoch, self._progress = earlier.epoch + 1, earlier.progress
            self._there = earlier.resumable
            if earlier.is_of(self._directory.boot):
                self._shown = Stretches(earlier.shown)
        else:
            self._claim.allocate()
        self._write_record()

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """
        Return the missing ranges.
        """
        return self._there.gaps(self.size)

    @property
    def missing(self) -> int:
        """
        Return the number of missing bytes.
        """
        return sum(stop - start for start, stop in self.gaps)

    def lacks_only(self, start: int, stop: int) -> bool:
        """
        Return True if the bytes from C{start} to C{stop} complete the blob, and all before them have been hashed.
        """
        return start == self.hashed and stop == self.size and self.missing == stop - start

    @property
    def front(self) -> int:
        """
        Return the offset up to which all bytes from 0 on have been written.
        """
        return self._there.end_of(0)

    def write(self, offset: int, pieces: Sequence[bytes]) -> None:
        """
        Write C{pieces} from C{offset} on. Several threads may write at the same time, in different places.

        @raise ValueError: if some of these bytes were written or are being written, or are outside the blob. Nothing
            is written then.
        @raise OSError: if the disk fails. Bytes written before stay readable.
        """
        with self._directory.troubles.noted(TroubleKind.WRITE), self._file.using():
            self._write(offset, pieces)

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
            self._hash_if_idle(offset, pieces)
            with self._lock:
                self._write_record_if_possible()
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
                count = os.pwrite(self._file.fd, view, offset)
                view, offset = view[count:], offset + count

    def catch_up(self) -> bool:
        """
        Hash some of the bytes that arrived out of order, or from an earlier writer.

        @return: True if there is more to hash.
        @raise OSError: if the disk fails.
        """
        with self._file.using():
            try:
                with self._hash.turn:
                    return self._hash_on()
            finally:
                with self._lock:
                    self._write_record_if_possible()

    def _hash_if_idle(self, offset: int, pieces: Sequence[bytes]) -> None:
        """
        Hash the written bytes if they are next in order and no other thread is hashing.
        """
        if not self._hash.turn.acquire(blocking=False):
            return
        try:
            if offset == self.hashed:  # from memory, without reading them back
                self._hash.add(pieces)
            self._hash_on()
        finally:
            self._hash.turn.release()

    def _hash_on(self) -> bool:
        with self._lock:
            end = self._there.end_of(self.hashed)
        hashed = self._hash.read_on(self._file.fd, end)
        if hashed:
            with self._lock:
                self._shown.add(0, hashed)
        return hashed < end

    def _write_record(self, why: Why = Why.NOTHING) -> None:
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
        self._claim.write(record)

    def _write_record_if_possible(self, why: Why = Why.NOTHING) -> None:
        """
        Write the record. If the disk fails, followers in other processes fetch the blob themselves.
        """
        with contextlib.suppress(OSError):
            self._write_record(why)

    def reach(self, offset: int) -> int:
        """
        Return the offset up to which all bytes from C{offset} on may be read.
        """
        return self._shown.end_of(offset)

    @property
    def reached(self) -> tuple[Any, int]:
        """
        Return a copy of the hash, and the number of bytes hashed. Safe while a thread is hashing.
        """
        return self._hash.reached

    def verify(self) -> None:
        """
        Compare the hash with the digest.

        @raise DigestMismatchError: if they differ.
        """
        self._hash.verify()

    def flush(self, piece: int) -> bool:
        """
        Write a piece of a complete file back to disk. Call this until it returns False, then L{commit}.

        @return: True if there is more.
        @raise DigestMismatchError: if the file does not match its digest.
        @raise OSError: if the disk fails.
        """
        self.verify()
        with self._directory.troubles.noted(TroubleKind.WRITE), self._file.using():
            if not self._flushed:
                self._enter(State.VERIFIED)  # readers need not wait for the disk
            write_back(self._file.fd, self._flushed, piece)
        self._flushed += piece
        return self._flushed < self.size

    def commit(self) -> None:
        """
        Sync the file, and make it content. The file descriptor stays open until L{close}.

        @raise DigestMismatchError: if the file does not match its digest.
        @raise OSError: if the disk fails. The file is not content then.
        """
        self.verify()
        with self._directory.troubles.noted(TroubleKind.WRITE), self._file.using():
            self._enter(State.VERIFIED)  # before fsync: readers need not wait for the disk
            self._commit()
            self._enter(State.CONTENT, then=self._claim.end)

    def finish(self, offset: int, rest: bytes, *, closes: bool) -> None:
        """
        Write the missing bytes, and L{commit}.

        @param closes: True if the file has no readers: close it then, and discard it if it does not become content.
        @raise DigestMismatchError: if the file does not match its digest.
        @raise OSError: if the disk fails. The file is not content then.
        """
        try:
            self.write(offset, [rest])
            more = self.hashed < self.size  # another thread was hashing
            while more:
                more = self.catch_up()
            self.commit()
        except BaseException:
            if closes:
                self.discard()
            raise
        if closes:
            self.close()

    def _enter(self, stage: State, why: Why = Why.NOTHING, then: Callable[[], None] = lambda: None) -> None:
        """
        Write the record with another state.

        @param then: ends the claim, under the lock: a thread that hung may be about to write a record.
        """
        with self._lock:
            self._stage = stage
            self._write_record_if_possible(why)
            then()

    def _commit(self) -> None:
        if self.hashed < self.size:
            os.ftruncate(self._file.fd, self.hashed)
        used = None if self.asked_for else self._directory.now() - UNASKED_SECONDS
        with contextlib.suppress(OSError):
            mark(self._file.fd, self._directory.now() if used is None else used)
        os.fsync(self._file.fd)
        proved = os.fstat(self._file.fd)  # before others can open and modify it
        target = self._directory.content(self.digest)
        self._check_place()  # otherwise a folder might be created under an unmounted volume
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:  # if the disk hangs, the writer is given up either before or after this
            self._check_place()
            self._claim.data.rename(target)
            self._committed = True
        self._directory.proofs.note(self.digest, proved, good=True)
        self._directory.index.add(self.digest, self.hashed, self._claim.reservation, used)

    def _check_place(self) -> None:
        """
        Check that the data is still this file. If this writer was given up, the next one may have created another.

        @raise OSError: if it is not.
        """
        if not is_in_place(self._file.fd, self._claim.data):
            raise OSError(errno.ESTALE, "the data was removed")

    def close(self) -> None:
        """
        Close the file, after L{commit}, L{release} or L{give_up}.
        """
        self._let_go = True
        self._file.close(self._claim.release)

    def release(self) -> None:
        """
        Release the claim, and keep the data for the next writer if it is worth it. The file stays open until L{close}.
        """
        if self._let_go or self._committed:
            return
        left = self._claim.read()
        if self.size < WORTH_RESUMING or left is None or not left.there:
            self.give_up()
            return
        self._directory.index.reservations.arrive(self._claim.reservation, self.room, self._directory.now())
        self._let_go = True
        self._file.once_unused(self._claim.release)

    def give_up(self, why: Why = Why.DISK) -> None:
        """
        Remove the data and release the claim. The file stays open and readable until L{close}.
        """
        if self._let_go or self._committed:
            return
        verified = self._stage is State.VERIFIED  # followers may have finished because of that
        self._enter(self._stage if verified else State.FAILED, Why.NOTHING if verified else why, self._claim.drop)
        self._directory.index.drop(arriving=[self._claim.reservation])
        self._let_go = True

    def leave(self) -> None:
        """
        L{release} and close.
        """
        self.release()
        self.close()

    def discard(self) -> None:
        """
        L{give_up} and close.
        """
        self.give_up()
        self.close()
