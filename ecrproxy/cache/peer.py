"""
Read a transfer that another process writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

from ecrproxy.cache.claim import claim_path, read_record
from ecrproxy.cache.content import hash_range
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.locks import is_free, is_in_place, open_in_place, share, without_side_effects
from ecrproxy.cache.record import Look, Record, State


class PeerTransfer:
    """
    The data of another process's transfer, open under a shared lock, and its record.

    @ivar data: the path of the data.
    @ivar record: as of the last look.
    """

    def __init__(self, data: Path, claim: int, fd: int, record: Record, boot: bytes) -> None:
        self.data, self._path = data, claim_path(data)
        self._claim, self._fd, self.record, self._boot = claim, fd, record, boot

    @classmethod
    def open(cls, data: Path, directory: Directory) -> PeerTransfer | None:
        """
        Open a transfer. Return None if its writer has no bytes to show yet, has finished, or is an untrusted user.
        """
        boot = directory.boot
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            claim = open_in_place(claim_path(data), os.O_RDONLY)
            opened.callback(os.close, claim)
            fd = open_in_place(data, os.O_RDWR)  # writable, in case the transfer must be taken over
            opened.callback(os.close, fd)
            without_side_effects(fd)
            locked = share(fd, data)
            record = read_record(claim)
            own = directory.is_own(os.fstat(claim)) and directory.is_own(os.fstat(fd))
            shown = locked and own and record is not None and _is_shown(record, boot)
            if shown and record is not None and os.fstat(fd).st_size == record.size:
                opened.pop_all()
                return cls(data, claim, fd, record, boot)
        return None

    @property
    def size(self) -> int:
        """
        Return the announced size of the blob in bytes.
        """
        return self.record.size

    def fileno(self) -> int:
        """
        Return the file descriptor of the data, for reading.
        """
        return self._fd

    def reach(self, offset: int) -> int:
        """
        Return the offset up to which all bytes from C{offset} on may be read.
        """
        return self.record.reach(offset, self._boot)

    def look(self) -> Look:
        """
        Read the record again, and probe the claim. Blocks on the disk.
        """
        moved = self._see()
        in_place = self.is_in_place() and (moved or is_in_place(self._claim, self._path))
        free = not moved and is_free(self._path)
        if free or not in_place:
            moved = self._see() or moved  # the last record is written before the claim is released
        return Look(self.record, in_place=in_place, free=free, moved=moved)

    def _see(self) -> bool:
        before, found = self.record, read_record(self._claim)
        self.record = found or before
        return self.record != before

    def is_in_place(self) -> bool:
        """
        Return True if the path of the data still leads to the open file.
        """
        return is_in_place(self._fd, self.data)

    def hash(self, state: Any, offset: int, limit: int) -> int:  # noqa: ANN401 (hashlib's objects have no public type)
        """
        Hash up to C{limit} bytes from C{offset} on, which must be readable.

        @return: the number of bytes hashed.
        @raise OSError: if they can't be read.
        """
        count = hash_range(self._fd, state, offset, limit)
        if not count:
            raise OSError(errno.EIO, "what was written can't be read")
        return count

    def close(self) -> None:
        """
        Close data and claim.
        """
        for fd in (self._claim, self._fd):
            if fd >= 0:
                os.close(fd)
        self._claim = self._fd = -1

    # A thread may have opened it for a client that has disconnected since.
    __del__ = close


def _is_shown(record: Record, boot: bytes) -> bool:
    """
    Return True if the transfer can be followed.

    Bytes verified before a crash of the machine may not have reached the disk: their writer was killed before fsync.
    """
    return record.state is State.ARRIVING or (record.state is State.VERIFIED and record.is_of(boot))
