"""
What the index has in its rows, and how that is written and read. Pure.

Times are whole microseconds since the epoch. A digest is a byte for its algorithm and the hash. What is read is
checked: whatever a column's type, SQLite may hold any value there, and a page that is sound may hold nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from ecrproxy.oci import HEX_LENGTHS, SIZE_LIMIT, Digest

ALGORITHMS: Final = ("sha256", "sha512")
_BLOCK: Final = 4096


class DamagedError(OSError):
    """
    The database is not what was written: it is of no more use.
    """


class Totals(NamedTuple):
    """
    What the cache directory holds.

    @ivar files: how many files of content there are.
    @ivar blocks: bytes of disk that they take.
    @ivar arriving: bytes of disk that are promised to what is arriving, or taken by what transfers have left.
    @ivar oldest_use: the least recent use of a file, in seconds since the epoch, if there is one.
    @ivar compared: when some process began to compare all files with the rows, and came to the end; zero if none has.
    """

    files: int = 0
    blocks: int = 0
    arriving: int = 0
    oldest_use: float | None = None
    compared: float = 0.0


class File(NamedTuple):
    """
    A file of content. Times are in seconds since the epoch.

    @ivar verified: when its bytes were last seen to be what the digest names, if they were.
    """

    digest: Digest
    size: int
    used: float
    verified: float | None = None


class Move(NamedTuple):
    """
    That ECR answered a tag with another digest than before.

    @ivar seen: when it first did, in seconds since the epoch.
    """

    before: Digest
    after: Digest
    seen: float


def on_disk(size: int) -> int:
    """
    Return the bytes of disk that a file of C{size} bytes takes: whole blocks.
    """
    return -(-size // _BLOCK) * _BLOCK


def packed(digest: Digest) -> bytes:
    """
    Write a digest.
    """
    return bytes([ALGORITHMS.index(digest.algorithm)]) + bytes.fromhex(digest.hex)


def unpacked(data: bytes) -> Digest:
    """
    Read what L{packed} wrote.

    @raise DamagedError: if it is anything else: SQLite does not notice a page that is sound and holds nonsense.
    """
    if isinstance(data, bytes) and data and data[0] < len(ALGORITHMS):
        algorithm = ALGORITHMS[data[0]]
        if 2 * len(data) - 2 == HEX_LENGTHS[algorithm]:
            return Digest(algorithm, data[1:].hex())
    raise DamagedError("the index has something in the place of a digest")


def as_number(value: object) -> int:
    """
    Read a number of bytes, of things or of microseconds.

    @raise DamagedError: if it is anything else: whatever its column's type, SQLite may hold any value there.
    """
    if type(value) is int and 0 <= value <= SIZE_LIMIT:
        return value
    raise DamagedError("the index has something in the place of a number")


def as_text(value: object) -> str:
    """
    Read a text.

    @raise DamagedError: if it is anything else.
    """
    if isinstance(value, str):
        return value
    raise DamagedError("the index has something in the place of a text")


def the_row(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """
    Read a row that is always there.

    @raise DamagedError: if it isn't.
    """
    for row in rows:
        return row
    raise DamagedError("the index lacks a row")


def state_of(rows: Iterable[tuple[Any, ...]]) -> tuple[Totals, int]:
    """
    Read the totals, and how many things were ever purged.
    """
    files, blocks, arriving, oldest, compared, generation = the_row(rows)
    used = None if oldest is None else as_number(oldest) / 1e6
    totals = Totals(as_number(files), as_number(blocks), as_number(arriving), used, as_number(compared) / 1e6)
    return totals, as_number(generation)


def moment(when: float) -> int:
    """
    Write a time in seconds; one of before the epoch, which no row may have, as the epoch.
    """
    return max(0, round(when * 1e6))


def file_of(digest: bytes, size: int, used: int, verified: int | None) -> File:
    """
    Read a row of content.

    @raise DamagedError: if it is anything else.
    """
    known = None if verified is None else as_number(verified) / 1e6
    return File(unpacked(digest), as_number(size), as_number(used) / 1e6, known)
