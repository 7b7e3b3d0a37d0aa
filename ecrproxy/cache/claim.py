"""
The right to write the file of one digest: a lock that one process on the directory holds, and its record.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import Final

from ecrproxy.cache.locks import is_in_place, open_in_place, own, see_one_name
from ecrproxy.cache.record import RECORD, UNKNOWN_BOOT, Record, Reservation

SUFFIX: Final = ".claim"
_READS: Final = 3
"""Attempts to read a record that is being written."""


class Claim:
    """
    A claim that this process holds. Only the holder writes the record, and writes or removes the data.

    @ivar data: the path of the data.
    @ivar path: the path of the claim.
    @ivar record: the record that an earlier holder left, if its data can be resumed.
    @ivar reservation: identifies the disk space that the data takes.
    """

    def __init__(self, data: Path, fd: int) -> None:
        self.data, self.path, self._fd = data, claim_path(data), fd
        self.record: Record | None = None
        self.reservation = Reservation(data.name, secrets.token_hex(4))

    @classmethod
    def take(cls, data: Path, *, make: bool = True) -> Claim | None:
        """
        Claim the digest whose data is, or will be, at C{data}. Return None if another process holds the claim.

        @param make: whether to create the claim if it does not exist.
        @raise FileNotFoundError: if it does not exist and is not to be created, or its folder does not exist.
        @raise OSError: if the disk fails or does not support locks, or if the claim is a link to a file elsewhere.
        """
        path = claim_path(data)
        while True:
            fd, made = _open(path, make=make)
            try:
                if own(fd, path):
                    see_one_name(fd, path)
                    return cls(data, fd)
                replaced = not is_in_place(fd, path)
            except OSError:
                if made:  # on a file system without locks, leave no claim behind
                    with contextlib.suppress(OSError):
                        path.unlink()
                os.close(fd)
                raise
            os.close(fd)
            if not replaced:
                return None

    def fileno(self) -> int:
        """
        Return the file descriptor of the claim.
        """
        return self._fd

    def resumes(self, size: int) -> bool:
        """
        Return True if an earlier holder left resumable data of a blob of this size.
        """
        return self.record is not None and self.record.size == size

    def read(self) -> Record | None:
        """
        Read the record. Return None if there is none, or it can't be read.
        """
        return read_record(self._fd)

    def write(self, record: Record) -> None:
        """
        Overwrite the record.

        @raise OSError: if the disk fails.
        """
        os.pwrite(self._fd, record.pack(), 0)

    def allocate(self) -> None:
        """
        Allocate the full length of the claim, so that later records fit even on a full disk.

        @raise OSError: if the disk fails.
        """
        os.pwrite(self._fd, bytes(RECORD), 0)

    def release(self) -> None:
        """
        Release the claim. The data stays for the next holder.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def check(self) -> None:
        """
        Check that nobody has removed the claim: another process may hold a new one.

        @raise OSError: if it was.
        """
        if not is_in_place(self._fd, self.path):
            raise OSError(errno.ESTALE, "the claim was removed")

    def drop(self) -> None:
        """
        Remove data and claim. If others have removed the claim, the data may belong to a new holder, and stays.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.check()
                self.data.unlink()
            self.end()

    def end(self) -> None:
        """
        Remove the claim, and keep the data.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.check()
                self.path.unlink()
            self.release()

    # A thread may have taken the claim for a transfer that has been abandoned since.
    __del__ = release


def _open(path: Path, *, make: bool) -> tuple[int, bool]:
    """
    Open a claim, or create it. Return the descriptor, and whether the claim was created.
    """
    while True:
        try:
            return open_in_place(path, os.O_RDWR), False
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):  # another process has just created it
            return open_in_place(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True


def read_record(fd: int) -> Record | None:
    """
    Read the record of an open claim. Return None if there is none, or it can't be read.
    """
    for _ in range(_READS):
        with contextlib.suppress(OSError):
            record = Record.unpack(os.pread(fd, RECORD, 0))
            if record is not None:
                return record
    return None


def claim_path(data: Path) -> Path:
    """
    Return the path of the claim for the data at C{data}.
    """
    return data.with_name(data.name + SUFFIX)


def boot_id() -> bytes:
    """
    Return an id that changes with each boot of the machine.

    Bytes that were written during the current boot can be read back, whether they were synced or not.
    """
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").replace("-", ""))
    except (OSError, ValueError):
        return UNKNOWN_BOOT
