"""
The right to write the file of one digest: a lock that one process in the directory holds, and the record beside it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

from ecrproxy.cache.locks import is_in_place, open_in_place, own
from ecrproxy.cache.record import RECORD, UNKNOWN_BOOT, Record, Reservation

SUFFIX: Final = ".claim"
_READS: Final = 3
"""Times that a record is read if it was being written meanwhile."""


class Claim:
    """
    A claim that this process holds: only its holder writes the record, and writes or removes the data.

    @ivar data: the path of the data.
    @ivar path: the path of the claim.
    @ivar record: what an earlier holder has left, if its data can be gone on with.
    @ivar reservation: names the room that the data takes.
    """

    def __init__(self, data: Path, fd: int) -> None:
        self.data, self.path, self._fd = data, claim_path(data), fd
        self.record: Record | None = None
        self.reservation = Reservation(data.name, secrets.token_hex(4))

    @classmethod
    def take(cls, data: Path, *, make: bool = True) -> Claim | None:
        """
        Claim the digest whose data is, or will be, at C{data}; none if another process holds the claim.

        @param make: whether to make a claim where there is none.
        @raise FileNotFoundError: if there is none, or no folder for it.
        @raise OSError: if the disk fails, or has no locks.
        """
        path = claim_path(data)
        while True:
            fd, made = _open(path, make=make)
            try:
                if own(fd, path):
                    return cls(data, fd)
                replaced = not is_in_place(fd, path)
            except OSError:
                if made:  # leave no claim on a file system without locks
                    with contextlib.suppress(OSError):
                        path.unlink()
                os.close(fd)
                raise
            os.close(fd)
            if not replaced:
                return None

    def read(self) -> Record | None:
        """
        Read the record.
        """
        return read_record(self._fd)

    def tell(self, record: Record) -> None:
        """
        Write the record.

        @raise OSError: if the disk fails.
        """
        os.pwrite(self._fd, record.pack(), 0)

    def allocate(self) -> None:
        """
        Give the claim its full length, so that no later record lacks room.

        @raise OSError: if the disk fails.
        """
        os.pwrite(self._fd, bytes(RECORD), 0)

    def release(self) -> None:
        """
        Let others claim it. What is there stays for them.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def drop(self) -> None:
        """
        Remove data and claim, unless somebody has removed the claim: the data may be the next holder's then.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if is_in_place(self._fd, self.path):
                    self.data.unlink(missing_ok=True)
            self.end()

    def end(self) -> None:
        """
        Remove the claim. The data has its place, or there is none.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if is_in_place(self._fd, self.path):  # else somebody has removed the directory
                    self.path.unlink()
            self.release()

    # A thread may have claimed it for a transfer that was given up meanwhile.
    __del__ = release


def _open(path: Path, *, make: bool) -> tuple[int, bool]:
    """
    Open a claim, or make one; returns the descriptor, and whether it was made.
    """
    while True:
        try:
            return open_in_place(path, os.O_RDWR), False
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):  # another process has made it just now
            return open_in_place(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True


def read_record(fd: int) -> Record | None:
    """
    Read an open claim's record; none if it has none, or it can't be read.
    """
    for _ in range(_READS):
        with contextlib.suppress(OSError):
            record = Record.unpack(os.pread(fd, RECORD, 0))
            if record is not None:
                return record
    return None


def claim_path(data: Path) -> Path:
    """
    Name the claim of the data at C{data}.
    """
    return data.with_name(data.name + SUFFIX)


def boot_id() -> bytes:
    """
    Name the current start of the machine. Bytes that were written since then are as they were written, synced or not.
    """
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").replace("-", ""))
    except (OSError, ValueError):
        return UNKNOWN_BOOT
