"""
Files that are being downloaded: one per digest, with a claim beside it, shared by all processes on the directory.

Rules:

- C{arriving/D} is the data, at its full size from the start; C{arriving/D.claim} has the writer's lock and its record.
- A process that needs a digest claims it. One process gets the claim and writes; the others follow its record.
- The kernel releases the lock when the process ends. A transfer whose claim is free is I{interrupted}: the next process
  that needs the digest resumes it, hashes the data, and fetches the missing ranges.
- After taking a claim, look for the content again: its writer may have just finished.
- Bytes that a record lists are hashed before they complete a response. The digest of the whole decides.
- Only the holder of the claim writes or removes the data, or removes bad content.
- Each reader of the data holds a shared lock on it, which prevents eviction while the data is being sent.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from ecrproxy.cache.allocation import allocate
from ecrproxy.cache.claim import SUFFIX, Claim, claim_path
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.locks import (
    is_free,
    is_in_place,
    open_in_place,
    own,
    remove_unused,
    see_one_name,
    share,
    without_side_effects,
)
from ecrproxy.cache.paths import arriving_path
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import WORTH_RESUMING, Record, Reserved, State, room_for
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest

LEFT_SECONDS: Final = 24 * 3600
"""Seconds to keep an interrupted transfer: clients that need it retry sooner."""
_PROBE: Final = "probe."
_YOUNG_SECONDS: Final = 60
"""Seconds during which another process may still be using a probe: probes have no lock."""


class Left(NamedTuple):
    """
    The resumable part of an interrupted transfer.

    @ivar size: announced size of the blob, in bytes.
    @ivar gaps: the missing ranges, at least one.
    """

    size: int
    gaps: Sequence[tuple[int, int]]


class Met(enum.Enum):
    """
    Why a digest can't be claimed.
    """

    CONTENT = "it is content"
    BUSY = "another process has it, and has no bytes to show yet; or evicts it"


class Arriving:
    """
    The transfers in progress, and the interrupted ones.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory, self.folder = directory, directory.root / "arriving"

    def claim(self, digest: Digest) -> Claim | PeerTransfer | Met:
        """
        Claim a digest. If another process holds the claim, return its transfer, which must be closed.

        @raise OSError: if the disk fails, or does not support locks.
        """
        data = self._data(digest)
        claim = Claim.take(data)
        if claim is None:
            return PeerTransfer.open(data, self.directory) or Met.BUSY
        try:
            found = self._find_content(digest)
            if found is Met.BUSY:
                self.let_go(claim)
            elif found is Met.CONTENT:
                claim.drop()
            if found is not None:
                return found
            claim.record = self._resumable(claim)
            if claim.record is not None:
                with contextlib.suppress(OSError):
                    claim.write(replace(claim.record, state=State.CLAIMED))
        except BaseException:
            claim.release()
            raise
        return claim

    def is_claimed(self, digest: Digest) -> bool:
        """
        Return True if any process holds the claim on a digest. Does not take the claim.
        """
        path = claim_path(self._data(digest))
        return os.path.lexists(path) and not is_free(path)

    def hold(self, digest: Digest) -> Claim | None:
        """
        Claim a digest in order to remove its content. Return None if another process holds the claim.

        @raise OSError: if the disk fails.
        """
        try:
            return Claim.take(self._data(digest))
        except FileNotFoundError:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            return Claim.take(self._data(digest))

    def let_go(self, claim: Claim) -> None:
        """
        Release a claim without having written. Keep a resumable transfer for the next holder; remove any other data.
        """
        claim.drop() if self._resumable(claim) is None else claim.release()

    def left(self, claim: Claim) -> Left | None:
        """
        Return the resumable part of the transfer that an earlier holder of the claim left, if any.
        """
        record = claim.record
        return Left(record.size, record.resumable.gaps(record.size)) if record is not None else None

    def begin(self, claim: Claim, digest: Digest, size: int) -> Writer:
        """
        Create the data, and remove that of an earlier holder of the claim.

        @param size: in bytes; allocated at once if the file system supports that.
        @raise OSError: if the disk is full, or fails. The claim is still held then.
        """
        claim.check()
        with contextlib.suppress(OSError):
            claim.data.unlink()
        fd = open_in_place(claim.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _share(fd, claim)
            if size:
                allocate(fd, size)  # so that a full disk fails the transfer now, not in the middle
            writer = Writer(self.directory, claim, digest, size, fd)
            writer.begin()
        except BaseException:
            with contextlib.suppress(OSError):
                claim.data.unlink()
            os.close(fd)
            raise
        return writer

    def resume(self, claim: Claim, digest: Digest, size: int) -> Writer | None:
        """
        Resume the data of an earlier holder of the claim. Return None if there is none, or its size differs.

        @raise OSError: if the disk fails. The claim is still held then.
        """
        if claim.record is None or not claim.resumes(size):
            return None
        fd = open_in_place(claim.data, os.O_RDWR)
        return self._go_on(claim, digest, fd, claim.record)

    def take_over(self, peer: PeerTransfer, digest: Digest) -> Writer | None:
        """
        Resume the transfer of another process whose writer has exited. Return None if the caller must look again.

        @raise OSError: if the disk fails, or there is nothing to resume.
        """
        claim = Claim.take(peer.data, make=False)
        if claim is None:
            return None
        with contextlib.ExitStack() as undone:
            undone.callback(claim.release)
            record = claim.read()
            if record is not None and record.state not in (State.CLAIMED, State.ARRIVING):
                return None
            if record is None or not record.size or not peer.is_in_place():
                raise OSError(errno.ESTALE, "nothing can be resumed, or the file is another one")
            writer = self._go_on(claim, digest, os.dup(peer.fileno()), record)
            undone.pop_all()
            return writer

    def _go_on(self, claim: Claim, digest: Digest, fd: int, record: Record) -> Writer:
        try:
            claim.check()
            _share(fd, claim)
            see_one_name(fd, claim.data)
            self._see_own(fd, claim.fileno())
            writer = Writer(self.directory, claim, digest, record.size, fd)
            writer.begin(record)
        except BaseException:
            os.close(fd)
            raise
        self.directory.index.reservations.arrive(claim.reservation, writer.room)  # it may not be counted yet
        return writer

    def _resumable(self, claim: Claim) -> Record | None:
        """
        Return the record of a claim if its data can be resumed.
        """
        record = claim.read()
        if record is None or record.state in (State.CONTENT, State.FAILED):
            return None
        if record.size < WORTH_RESUMING or not record.there:
            return None
        try:
            status = os.lstat(claim.data)
            own = all(map(self.directory.is_own, (status, os.fstat(claim.fileno()))))
        except OSError:
            return None
        good = own and stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == record.size
        return record if good else None

    def _see_own(self, *files: int) -> None:
        """
        Raise C{OSError} if another user owns one of these open files, and could alter it after it was verified.
        """
        if not all(self.directory.is_own(os.fstat(each)) for each in files):
            raise OSError(errno.EPERM, "it is another user's")

    def _find_content(self, digest: Digest) -> Met | None:
        """
        Find out whether the digest is content, or is being evicted. The claim must be held.

        Content that is known to be bad, or that another user may change, is removed and does not count.
        """
        path = self.directory.content(digest)
        try:
            fd = open_in_place(path, os.O_RDONLY)
        except OSError:  # content that can't be opened is replaced
            return None
        try:
            if not share(fd, path):
                return Met.BUSY if is_in_place(fd, path) else None
            status = os.fstat(fd)
            if self.directory.is_own(status) and self.directory.proofs.verdict(digest, status) is not False:
                return Met.CONTENT
            with contextlib.suppress(OSError):  # if this fails, it is replaced
                path.unlink()
            return None
        finally:
            os.close(fd)

    def sweep(self) -> None:
        """
        Remove unusable files, and add the interrupted transfers that stay to the index.

        Unusable are transfers that are a day old, can't be resumed, or whose digest is content by now; reservations
        without a file; and old probes. Content whose reservation is removed is added to the index if it is not there.
        """
        reserved: dict[str, Reserved] = {}
        with contextlib.suppress(OSError):  # first: a claim exists before its reservation
            reserved = {each.what.name: each for each in self.directory.index.arriving()}
        names = set(reserved)
        for path in self._names():
            if path.name.startswith(_PROBE):
                self._sweep_probe(path)
            else:
                names.add(path.name.removesuffix(SUFFIX))
        gone = [name for name in names if self._is_of_no_use(name, reserved.get(name))]
        ended = [name for name in gone if name in reserved]
        if not ended:
            return
        digests = [_digest_of(self.folder / name) for name in ended]
        found = [self.directory.found(each) for each in digests if each is not None]
        try:
            self.directory.index.adopt([each for each in found if each is not None])
        except OSError:  # until the next sweep, the reservations count in place of the content
            return
        self.directory.index.drop(arriving=[reserved[name].what for name in ended])

    def _sweep_probe(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if self.directory.now() - path.stat().st_mtime >= _YOUNG_SECONDS:
                path.unlink()

    def _is_of_no_use(self, name: str, known: Reserved | None) -> bool:
        """
        Return True if a transfer is gone, or was unusable and has been removed.

        @param known: the transfer's reservation in the index at the start of the sweep.
        """
        digest, data = _digest_of(self.folder / name), self.folder / name
        if digest is None or not (os.path.lexists(data) or os.path.lexists(claim_path(data))):
            return known is not None
        try:
            if os.path.lexists(claim_path(data)) and not is_free(claim_path(data)):
                return False
            claim = Claim.take(data)
        except OSError:
            return False
        if claim is None:
            return False
        record = self._resumable(claim)
        young = record is not None and abs(self.directory.now() - record.when) < LEFT_SECONDS
        if record is None or not young or self.directory.content(digest).exists():
            claim.drop()
            return True
        if known is None or not known.written:
            self.directory.index.reservations.arrive(claim.reservation, room_for(record.size), record.when)
        claim.release()
        return False

    def remove(self, name: str) -> bool:
        """
        Remove an interrupted transfer, unless a process has claimed or follows it.

        @return: True if it is gone.
        @raise OSError: if it can't be removed.
        """
        try:
            claim = Claim.take(self.folder / name, make=False)
        except FileNotFoundError:
            return remove_unused(self.folder / name)
        if claim is None:
            return False
        try:
            gone = remove_unused(claim.data)
            if gone:
                claim.end()
        finally:
            claim.release()
        return gone

    def _data(self, digest: Digest) -> Path:
        return self.directory.root / arriving_path(digest)

    def _names(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from sorted(self.folder.iterdir())


def _share(fd: int, claim: Claim) -> None:
    """
    Take a shared lock on the data of a claim, so that it is not removed.

    @raise OSError: if it is being removed.
    """
    without_side_effects(fd)
    if not share(fd, claim.data):
        raise OSError(errno.ESTALE, "the data is another file")


def _digest_of(path: Path) -> Digest | None:
    """
    Return the digest of a file in arriving/, or None if the name is not that of a transfer.
    """
    try:
        return Digest.parse(path.name.removesuffix(SUFFIX).replace("-", ":", 1))
    except ValueError:
        return None


def sweep_ingest(folder: Path) -> int:
    """
    Remove what earlier versions left in C{ingest/}. A running daemon of such a version locks the files that it writes.

    @return: the number of files removed.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                fd = open_in_place(path, os.O_RDWR)
                try:
                    if own(fd, path):  # otherwise a daemon of such a version is running
                        path.unlink()
                        removed += 1
                finally:
                    os.close(fd)
        folder.rmdir()
    return removed
