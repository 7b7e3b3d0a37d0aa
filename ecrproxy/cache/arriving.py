"""
What is arriving: a file for each digest, named by it, and a claim beside it, for all processes in the directory.

Rules:

- C{arriving/D} is the data, of its full size from the start; C{arriving/D.claim} has the writer's lock and its record.
- Whoever wants a digest claims it. One process gets the claim and writes; the others follow its record.
- The kernel drops the lock with the process. A transfer whose claim is free is I{interrupted}: the next process that
  wants the digest takes it over, hashes what is there, and fetches what is missing.
- Content is looked for again after the claim was had: its writer may have just finished.
- What a record tells of is hashed before it is part of a complete response. The digest of the whole decides.
- Only who holds the claim writes or removes the data, or removes content that is bad.
- Whoever has data open has it locked, so nothing that is being sent is evicted.
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
from ecrproxy.cache.directory import Directory, arriving_path
from ecrproxy.cache.locks import is_free, is_in_place, open_in_place, own, remove_unused, share
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import WORTH_RESUMING, Record, Reserved, State, room_for
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest

LEFT_SECONDS: Final = 24 * 3600
"""How long an interrupted transfer is kept: clients that want it come back sooner."""
_PROBE: Final = "probe."
_YOUNG_SECONDS: Final = 60
"""Seconds for which a probe, which has no lock, may be another process's."""


class Left(NamedTuple):
    """
    What an interrupted transfer is good for.

    @ivar size: the bytes that the blob was announced with.
    @ivar gaps: the stretches of it that are missing, one at least.
    """

    size: int
    gaps: Sequence[tuple[int, int]]


class Met(enum.Enum):
    """
    What keeps a process from claiming a digest.
    """

    CONTENT = "it is content"
    BUSY = "another process has it, and has no bytes to show yet; or evicts it"


class Arriving:
    """
    The transfers under way, and those that were interrupted.
    """

    def __init__(self, directory: Directory) -> None:
        self.directory, self.folder = directory, directory.root / "arriving"

    def claim(self, digest: Digest) -> Claim | PeerTransfer | Met:
        """
        Claim a digest; or give what is there instead: another process's transfer, to be closed.

        @raise OSError: if the disk fails, or has no locks.
        """
        data = self._data(digest)
        claim = Claim.take(data)
        if claim is None:
            return PeerTransfer.open(data, self.directory.boot) or Met.BUSY
        try:
            found = self._find_content(digest)
            if found is Met.BUSY:
                self.let_go(claim)
            elif found is Met.CONTENT:
                claim.drop()
            if found is not None:
                return found
            claim.record = _resumable(claim)
            if claim.record is not None:
                with contextlib.suppress(OSError):
                    claim.tell(replace(claim.record, state=State.CLAIMED))
        except BaseException:
            claim.release()
            raise
        return claim

    def hold(self, digest: Digest) -> Claim | None:
        """
        Claim a digest to remove its content; none if another process has the claim.

        @raise OSError: if the disk fails.
        """
        try:
            return Claim.take(self._data(digest))
        except FileNotFoundError:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            return Claim.take(self._data(digest))

    def let_go(self, claim: Claim) -> None:
        """
        Let go of a claim that nothing was brought in with; an interrupted transfer stays for the next.
        """
        claim.drop() if _resumable(claim) is None else claim.release()

    def left(self, claim: Claim) -> Left | None:
        """
        See what an earlier holder of a claim has left.
        """
        record = claim.record
        return Left(record.size, record.resumable.gaps(record.size)) if record is not None else None

    def begin(self, claim: Claim, digest: Digest, size: int) -> Writer:
        """
        Begin a file. What an earlier holder of the claim has left is removed.

        @param size: in bytes; so many are taken of the disk at once, where the file system can do that.
        @raise OSError: if the disk has no room for them, or fails. The claim is still held then.
        """
        with contextlib.suppress(OSError):
            claim.data.unlink()
        fd = open_in_place(claim.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _share(fd, claim)
            if size:
                allocate(fd, size)  # a disk too full says so now, not in the middle
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
        Go on with what an earlier holder of a claim has left; none if it is of another size, or there is nothing.

        @raise OSError: if the disk fails. The claim is still held then.
        """
        if claim.record is None or claim.record.size != size:
            return None
        fd = open_in_place(claim.data, os.O_RDWR)
        return self._go_on(claim, digest, fd, claim.record)

    def take_over(self, peer: PeerTransfer, digest: Digest) -> Writer | None:
        """
        Go on with another process's transfer, whose writer has exited; none if it has to be looked at again.

        @raise OSError: if the disk fails, or there is nothing to go on with.
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
                raise OSError(errno.ESTALE, "there is nothing to go on with, or another file")
            writer = self._go_on(claim, digest, os.dup(peer.fileno()), record)
            undone.pop_all()
            return writer

    def _go_on(self, claim: Claim, digest: Digest, fd: int, record: Record) -> Writer:
        try:
            _share(fd, claim)
            writer = Writer(self.directory, claim, digest, record.size, fd)
            writer.begin(record)
        except BaseException:
            os.close(fd)
            raise
        self.directory.index.arrive(claim.reservation, writer.room)  # it may not be counted yet
        return writer

    def _find_content(self, digest: Digest) -> Met | None:
        """
        See whether there is a file of content that this process would open, or one that is about to be evicted.

        One that it knows to be bad is removed: the claim is held.
        """
        path = self.directory.content(digest)
        try:
            fd = open_in_place(path, os.O_RDONLY)
        except OSError:  # also what can't be opened is replaced
            return None
        try:
            if not share(fd, path):
                return Met.BUSY if is_in_place(fd, path) else None
            if self.directory.proofs.verdict(digest, os.fstat(fd)) is not False:
                return Met.CONTENT
            with contextlib.suppress(OSError):  # it is replaced then
                path.unlink()
            return None
        finally:
            os.close(fd)

    def sweep(self) -> None:
        """
        Remove what is of no use, and count the interrupted transfers that stay.

        Of no use are those that are a day old, can't be gone on with, or are of what is content; and reservations of
        which nothing is there. Probes have no lock; another process may be about to read a young one.
        """
        reserved: dict[str, Reserved] = {}
        with contextlib.suppress(OSError):  # before the look: a claim is there before its reservation
            reserved = {each.what.name: each for each in self.directory.index.arriving()}
        names = set(reserved)
        for path in self._names():
            if path.name.startswith(_PROBE):
                self._sweep_probe(path)
            else:
                names.add(path.name.removesuffix(SUFFIX))
        gone = [name for name in names if self._is_of_no_use(name, reserved.get(name))]
        if not reserved.keys().isdisjoint(gone):
            self.directory.index.drop(arriving=[reserved[name].what for name in gone if name in reserved])

    def _sweep_probe(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if self.directory.now() - path.stat().st_mtime >= _YOUNG_SECONDS:
                path.unlink()

    def _is_of_no_use(self, name: str, known: Reserved | None) -> bool:
        """
        Return True if there is nothing of a transfer, or nothing any more.

        @param known: what the index knew of it before.
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
        record = _resumable(claim)
        young = record is not None and abs(self.directory.now() - record.when) < LEFT_SECONDS
        if record is None or not young or self.directory.content(digest).exists():
            claim.drop()
            return True
        if known is None or not known.written:
            self.directory.index.arrive(claim.reservation, room_for(record.size), record.when)
        claim.release()
        return False

    def remove(self, name: str) -> bool:
        """
        Remove an interrupted transfer, unless some process writes it, or waits for it to go on.

        @return: whether it is gone.
        @raise OSError: if that can't be done.
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
    Lock the data of a claim against removal.

    @raise OSError: if it is about to be removed, or was: somebody has removed the claim before.
    """
    if not share(fd, claim.data):
        raise OSError(errno.ESTALE, "the file that arrives is another one")


def _resumable(claim: Claim) -> Record | None:
    """
    Return the record of a claim whose data can be gone on with.
    """
    record = claim.read()
    if record is None or record.state in (State.CONTENT, State.FAILED):
        return None
    if record.size < WORTH_RESUMING or not record.there:
        return None
    try:
        status = os.lstat(claim.data)
    except OSError:
        return None
    good = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == record.size
    return record if good else None


def _digest_of(path: Path) -> Digest | None:
    """
    Return the digest that a file in arriving/ is of.
    """
    try:
        return Digest.parse(path.name.removesuffix(SUFFIX).replace("-", ":", 1))
    except ValueError:
        return None


def sweep_ingest(folder: Path) -> int:
    """
    Remove what earlier versions have left in C{ingest/}, whose files were locked by their writers.

    @return: how many files went.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                fd = open_in_place(path, os.O_RDWR)
                try:
                    if own(fd, path):  # else a daemon of such a version runs beside this one
                        path.unlink()
                        removed += 1
                finally:
                    os.close(fd)
        folder.rmdir()
    return removed
