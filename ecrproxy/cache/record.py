"""
The record of a transfer, and the next step of its followers. Pure.

The record is in the claim of an arriving file. The process that writes the file writes the record after each piece;
other processes read it to learn which bytes they may send. A record proves nothing: a torn one fails its checksum and
is read again. If a record is wrong, more bytes than necessary are fetched, or the digest does not match and the file is
dropped.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

WORTH_RESUMING: Final = 2**20
"""Minimum size in bytes of a blob whose interrupted transfer is kept: smaller ones are fetched again."""
UNKNOWN_BOOT: Final = bytes(16)
"""The boot id if the kernel provides none."""
RECORD: Final = 4096
"""Size of a claim in bytes."""
POLL_SECONDS: Final = 0.02
"""Seconds between two reads of a record."""
STALLED_SECONDS: Final = 10.0
"""Seconds without progress of the writer after which followers fetch the rest themselves, without keeping it."""
TRICKLE: Final = 2**10
"""Fewer bytes than this within that time do not count as progress, as with buckets."""
_VERSION: Final = 1
_MAGIC: Final = b"ecrclaim"
_HEAD: Final = struct.Struct(">8sHBB16sQQQQdHH")
_SPAN: Final = struct.Struct(">QQ")
_MOST_SPANS: Final = (RECORD - _HEAD.size - 4) // (2 * _SPAN.size)
"""There is usually one gap per lane. Small ranges fetched first cause more; spans beyond this limit are left out."""
_END_OF_TIME: Final = 2.0**34
"""Upper bound of valid times, in seconds since the epoch: in nanoseconds they still fit in 64 bits."""

Spans = tuple[tuple[int, int], ...]


class Reservation(NamedTuple):
    """
    Disk space that is reserved for the holder of a claim, or taken by the data that it left.

    @ivar name: the name of the file in C{arriving/}; the same for all holders of the claim.
    @ivar token: different for each holder: a late change of one holder does not affect its successor.
    """

    name: str
    token: str = ""


class Reserved(NamedTuple):
    """
    A reservation in the index.

    @ivar size: in bytes of disk.
    @ivar written: when an interrupted transfer was last written, in seconds since the epoch; 0 for one in progress.
    """

    what: Reservation
    size: int
    written: float


class State(enum.IntEnum):
    """
    The state of a transfer.
    """

    CLAIMED = 0
    """A process has claimed an interrupted transfer, and has not begun to write."""
    ARRIVING = 1
    VERIFIED = 2
    """All bytes were written and match the digest. They may not have reached the disk yet."""
    CONTENT = 3
    """The file is in content/."""
    FAILED = 4
    """The file is removed."""


class Why(enum.IntEnum):
    """
    Why a transfer has failed.
    """

    NOTHING = 0
    DISK = 1
    """The disk failed; the bytes that the record shows are usable."""
    DIGEST = 2
    """The bytes do not match the digest."""


_STATES: Final = frozenset(map(int, State))
_WHYS: Final = frozenset(map(int, Why))


class Stretches:
    """
    The ranges of a file that have been written. Several may be written at once.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]] = ()) -> None:
        self._stretches = list(stretches)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._stretches)

    def add(self, start: int, stop: int) -> None:
        """
        Add the bytes from C{start} to C{stop}.

        @raise ValueError: if the range is empty or reversed.
        """
        if start >= stop:
            raise ValueError(f"no bytes from {start} to {stop}")
        joined = [(start, stop)]
        for first, last in self._stretches:
            if last < joined[0][0] or joined[0][1] < first:
                joined.append((first, last))
            else:
                joined[0] = (min(first, joined[0][0]), max(last, joined[0][1]))
        self._stretches = sorted(joined)

    def end_of(self, offset: int) -> int:
        """
        Return the offset up to which all bytes from C{offset} on were written.
        """
        return next((stop for start, stop in self._stretches if start <= offset <= stop), offset)

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """
        Return which of the first C{size} bytes are missing.
        """
        bounds = [0, *(edge for stretch in self._stretches for edge in stretch), size]
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return [(start, stop) for start, stop in pairs if start < stop]


@dataclass(frozen=True, slots=True)
class Record:
    """
    The state of a transfer, as stored in its claim.

    @ivar size: announced size of the blob, in bytes.
    @ivar when: time of the last write, in seconds since the epoch.
    @ivar boot: the boot id under which C{shown} was written; see L{claim.boot_id}.
    @ivar there: the ranges that were written, in order. A restart of the machine may lose them.
    @ivar shown: the ranges that may be sent, in order: written, or hashed again, since the machine started.
    @ivar hashed: bytes that the writer has hashed, from offset 0 on.
    @ivar epoch: number of writers that the transfer has had.
    @ivar progress: increases with each write of the record.
    """

    size: int
    when: float
    boot: bytes = UNKNOWN_BOOT
    there: Spans = ()
    shown: Spans = ()
    hashed: int = 0
    epoch: int = 1
    progress: int = 0
    state: State = State.ARRIVING
    why: Why = Why.NOTHING

    def pack(self) -> bytes:
        """
        Encode the record in at most C{RECORD} bytes. Ranges beyond the first hundred are left out.
        """
        there, shown = self.there[:_MOST_SPANS], self.shown[:_MOST_SPANS]
        counts = (self.epoch, self.progress, self.size, self.hashed, self.when, len(there), len(shown))
        packed = _HEAD.pack(_MAGIC, _VERSION, self.state, self.why, self.boot, *counts)
        packed += b"".join(_SPAN.pack(*each) for each in (*there, *shown))
        return packed + zlib.crc32(packed).to_bytes(4, "big")

    @classmethod
    def unpack(cls, data: bytes) -> Record | None:
        """
        Decode the result of L{pack}. Return None if it is anything else, or inconsistent.
        """
        if len(data) < _HEAD.size:
            return None
        magic, version, state, why, boot, *counts, theres, showns = _HEAD.unpack_from(data)
        end = _HEAD.size + (theres + showns) * _SPAN.size
        if (magic, version) != (_MAGIC, _VERSION) or max(theres, showns) > _MOST_SPANS:
            return None
        if zlib.crc32(data[:end]).to_bytes(4, "big") != data[end : end + 4]:
            return None
        spans = tuple(_SPAN.iter_unpack(data[_HEAD.size : end]))
        there, shown = spans[:theres], spans[theres:]
        epoch, progress, size, hashed, when = counts
        sound = state in _STATES and why in _WHYS and 0 <= when < _END_OF_TIME  # False for NaN, too
        if not (sound and hashed <= size and _are_spans(there, size) and _are_spans(shown, size)):
            return None
        return cls(size, when, boot, there, shown, hashed, epoch, progress, State(state), Why(why))

    def reach(self, offset: int, boot: bytes) -> int:
        """
        Return the offset up to which all bytes from C{offset} on may be sent if the current boot id is C{boot}.
        """
        return Stretches(self.shown if self.is_of(boot) else ()).end_of(offset)

    def is_of(self, boot: bytes) -> bool:
        """
        Return True if the machine has not restarted since: what was written can be read back.
        """
        return self.boot == boot != UNKNOWN_BOOT

    def is_progress_since(self, earlier: Record) -> bool:
        """
        Return True if the transfer has progressed since C{earlier}: an occasional byte is not worth waiting for.
        """
        came = self._known - earlier._known
        return (self.epoch, self.state) != (earlier.epoch, earlier.state) or not 0 <= came < TRICKLE

    @property
    def _known(self) -> int:
        return self.hashed + sum(stop - start for start, stop in self.there)

    @property
    def resumable(self) -> Stretches:
        """
        Return the ranges that the next writer need not fetch. It fetches at least one byte, to ask ECR for the blob.
        """
        stretches = Stretches(self.there)
        if stretches.gaps(self.size):
            return stretches
        return Stretches([(0, self.size - 1)] if self.size > 1 else ())


def _are_spans(spans: Spans, size: int) -> bool:
    edges = [edge for span in spans for edge in span]
    return edges == sorted(set(edges)) and (not edges or edges[-1] <= size)


class Look(NamedTuple):
    """
    What a process learns by looking at another process's transfer.

    @ivar record: None if it could never be read.
    @ivar in_place: True if the paths of claim and data still lead to the same files.
    @ivar free: True if no process holds the claim.
    @ivar moved: True if the record has changed since the last look.
    """

    record: Record | None
    in_place: bool = True
    free: bool = False
    moved: bool = False


class Step(enum.Enum):
    """
    What a follower of another process's transfer does next.
    """

    WAIT = "look again"
    FINISH = "send the rest: all of it is verified"
    TAKE_OVER = "claim the transfer: its writer has exited"
    GO_ALONE = "fetch the rest without keeping it"
    FAIL = "abort: the bytes are wrong"


def next_step(look: Look, idle: float) -> Step:
    """
    Choose what a follower does after a look.

    @param idle: seconds since the record showed progress: see L{Record.is_progress_since}.
    """
    record = look.record
    if record is not None and record.state in (State.VERIFIED, State.CONTENT):
        return Step.FINISH
    if record is not None and record.state is State.FAILED:
        return Step.FAIL if record.why is Why.DIGEST else Step.GO_ALONE
    if not look.in_place:
        return Step.GO_ALONE
    if look.free:
        return Step.TAKE_OVER
    return Step.GO_ALONE if idle >= STALLED_SECONDS else Step.WAIT


def room_for(size: int) -> int:
    """
    Return the bytes of disk to reserve for a blob of C{size} bytes.

    The claim of a small blob is not counted: it exists only briefly.
    """
    return size + RECORD if size >= WORTH_RESUMING else size
