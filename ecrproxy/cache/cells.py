"""
The values in the index's rows, and how they are encoded and decoded. Pure.

Times are whole microseconds since the epoch. A digest is one byte for its algorithm, then the hash. Values are checked
when they are read: SQLite may hold any value in any column, and an intact page may hold garbage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from ecrproxy.documents import SIZE_LIMIT
from ecrproxy.oci import HEX_LENGTHS, Digest

ALGORITHMS: Final = ("sha256", "sha512")
_BLOCK: Final = 4096


class DamagedError(OSError):
    """
    The database does not hold what was written, and can't be used any longer.
    """


class Totals(NamedTuple):
    """
    Totals of the cache directory.

    @ivar files: number of files of content.
    @ivar blocks: bytes of disk that they take.
    @ivar arriving: bytes of disk that are reserved for transfers, or taken by interrupted ones.
    @ivar oldest_use: the least recent use of a file, in seconds since the epoch, if there is a file.
    @ivar compared: start time of the last complete comparison of all files with the rows, by any process; 0 if none.
    """

    files: int = 0
    blocks: int = 0
    arriving: int = 0
    oldest_use: float | None = None
    compared: float = 0.0


class File(NamedTuple):
    """
    A file of content. Times are in seconds since the epoch.

    @ivar verified: when its bytes were last found to match the digest, if ever.
    """

    digest: Digest
    size: int
    used: float
    verified: float | None = None


class Move(NamedTuple):
    """
    A change of a tag: ECR answered with another digest than before.

    @ivar seen: when it first did, in seconds since the epoch.
    """

    before: Digest
    after: Digest
    seen: float


def on_disk(size: int) -> int:
    """
    Return the bytes of disk that a file of C{size} bytes takes, in whole blocks.
    """
    return -(-size // _BLOCK) * _BLOCK


def packed(digest: Digest) -> bytes:
    """
    Encode a digest.
    """
    return bytes([ALGORITHMS.index(digest.algorithm)]) + bytes.fromhex(digest.hex)


def unpacked(data: bytes) -> Digest:
    """
    Decode the result of L{packed}.

    @raise DamagedError: if it is anything else: SQLite does not notice garbage in an intact page.
    """
    if isinstance(data, bytes) and data and data[0] < len(ALGORITHMS):
        algorithm = ALGORITHMS[data[0]]
        if 2 * len(data) - 2 == HEX_LENGTHS[algorithm]:
            return Digest(algorithm, data[1:].hex())
    raise DamagedError("the index has something in the place of a digest")


def as_number(value: object) -> int:
    """
    Check a number of bytes, of items or of microseconds.

    @raise DamagedError: if it is anything else: SQLite may hold any value, whatever the column's type.
    """
    if type(value) is int and 0 <= value <= SIZE_LIMIT:
        return value
    raise DamagedError("the index has something in the place of a number")


def as_text(value: object) -> str:
    """
    Check a text.

    @raise DamagedError: if it is anything else.
    """
    if isinstance(value, str):
        return value
    raise DamagedError("the index has something in the place of a text")


def the_row(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """
    Return a row that always exists.

    @raise DamagedError: if it is missing.
    """
    for row in rows:
        return row
    raise DamagedError("the index lacks a row")


def state_of(rows: Iterable[tuple[Any, ...]]) -> tuple[Totals, int]:
    """
    Decode the totals and the generation: how many things were ever purged.
    """
    files, blocks, arriving, oldest, compared, generation = the_row(rows)
    used = None if oldest is None else as_number(oldest) / 1e6
    totals = Totals(as_number(files), as_number(blocks), as_number(arriving), used, as_number(compared) / 1e6)
    return totals, as_number(generation)


def moment(when: float) -> int:
    """
    Encode a time in seconds. Times before the epoch, which no row may have, become the epoch.
    """
    return max(0, round(when * 1e6))


def file_of(digest: bytes, size: int, used: int, verified: int | None) -> File:
    """
    Decode a row of content.

    @raise DamagedError: if it is anything else.
    """
    known = None if verified is None else as_number(verified) / 1e6
    return File(unpacked(digest), as_number(size), as_number(used) / 1e6, known)
