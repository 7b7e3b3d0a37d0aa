"""
What a file that arrives says of itself, behind the blob's bytes: which stretches of them are there.

It proves nothing: a torn or wrong one costs a transfer its head start, never its bytes' rightness.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

WORTH_RESUMING: Final = 2**20
"""Bytes from which on a blob has a trailer: less is had again sooner than looked for."""
UNKNOWN_BOOT: Final = bytes(16)
"""The start of a machine that does not tell them apart."""
_MAGIC: Final = b"ecrprxy2"
_HEAD: Final = struct.Struct(">8sQd16sI")
_SPAN: Final = struct.Struct(">QQ")
_MOST_SPANS: Final = 60
"""A lane leaves one gap; more come of a transfer that was interrupted often, and are forgotten."""
_END_OF_TIME: Final = 2.0**34
"""Seconds since the epoch that are no moment of ours: in nanoseconds they still fit 64 bits."""
TRAILER: Final = 1024
"""Bytes that are kept for the trailer."""


class Stretches:
    """
    Which bytes of a file are there, where they come in several places at once.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]] = ()) -> None:
        self._stretches = list(stretches)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._stretches)

    def add(self, start: int, stop: int) -> None:
        """
        Note that the bytes from C{start} to C{stop} are there.
        """
        joined = [(start, stop)]
        for first, last in self._stretches:
            if last < joined[0][0] or joined[0][1] < first:
                joined.append((first, last))
            else:
                joined[0] = (min(first, joined[0][0]), max(last, joined[0][1]))
        self._stretches = sorted(joined)

    def end_of(self, offset: int) -> int:
        """
        Tell up to where all bytes from C{offset} on are there.
        """
        return next((stop for start, stop in self._stretches if start <= offset <= stop), offset)

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """
        Tell which of the first C{size} bytes are not there.
        """
        bounds = [0, *(edge for stretch in self._stretches for edge in stretch), size]
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return [(start, stop) for start, stop in pairs if start < stop]


@dataclass(frozen=True, slots=True)
class Trailer:
    """
    What a file says of itself.

    @ivar size: the bytes that the blob was announced with.
    @ivar when: seconds since the epoch, of the last write.
    @ivar there: the stretches that are there, in order.
    @ivar boot: the start of the machine during which they were written: see L{boot_id}.
    """

    size: int
    when: float
    there: tuple[tuple[int, int], ...]
    boot: bytes = UNKNOWN_BOOT

    def pack(self) -> bytes:
        """
        Write it in C{TRAILER} bytes at most.
        """
        there = self.there[:_MOST_SPANS]
        packed = _HEAD.pack(_MAGIC, self.size, self.when, self.boot, len(there))
        packed += b"".join(_SPAN.pack(*each) for each in there)
        return packed + zlib.crc32(packed).to_bytes(4, "big")

    @classmethod
    def unpack(cls, data: bytes) -> Trailer | None:
        """
        Read what L{pack} wrote; none if it is anything else, or tells of no stretch or of no gap.
        """
        if len(data) < _HEAD.size:
            return None
        magic, size, when, boot, count = _HEAD.unpack_from(data)
        end = _HEAD.size + count * _SPAN.size
        if magic != _MAGIC or count > _MOST_SPANS or zlib.crc32(data[:end]).to_bytes(4, "big") != data[end : end + 4]:
            return None
        there = tuple(_SPAN.iter_unpack(data[_HEAD.size : end]))
        edges = [edge for stretch in there for edge in stretch]
        sound = edges == sorted(set(edges)) and len(edges) > 0 and edges[-1] <= size and there != ((0, size),)
        sound = sound and 0 <= when < _END_OF_TIME  # which no number but a number is
        return cls(size, when, there, boot) if sound else None

    @classmethod
    def read(cls, fd: int) -> Trailer | None:
        """
        Read a file's trailer; none if it has none that fits, or it can't be read.
        """
        with contextlib.suppress(OSError):
            return cls._read(fd)
        return None

    @classmethod
    def _read(cls, fd: int) -> Trailer | None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size < TRAILER:
            return None
        size = status.st_size - TRAILER
        trailer = cls.unpack(os.pread(fd, TRAILER, size))
        return trailer if trailer is not None and trailer.size == size else None


def boot_id() -> bytes:
    """
    Name the current start of the machine. Bytes that were written since then are as they were written, synced or not.
    """
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").replace("-", ""))
    except (OSError, ValueError):
        return UNKNOWN_BOOT


def room_for(size: int) -> int:
    """
    Tell how many bytes of the disk a blob of C{size} bytes takes while it arrives.
    """
    return size + TRAILER if size >= WORTH_RESUMING else size
