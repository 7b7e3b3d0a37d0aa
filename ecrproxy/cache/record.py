"""
The record of a transfer, and what those who read it do next. Pure.

A record stands in the claim of an arriving file. The process that writes the file writes the record after each piece;
other processes read it to know which bytes they may send. A record proves nothing: a torn one fails its checksum and
is read again, and a wrong one costs a transfer its head start, never its bytes' rightness.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

WORTH_RESUMING: Final = 2**20
"""Bytes from which on an interrupted transfer keeps what came: less is fetched again sooner than looked for."""
UNKNOWN_BOOT: Final = bytes(16)
"""The boot id on a machine that has none."""
RECORD: Final = 4096
"""Bytes of a claim."""
POLL_SECONDS: Final = 0.02
"""Seconds between two looks at a record."""
STALLED_SECONDS: Final = 10.0
"""How long a writer may make no progress before others fetch the rest without keeping it."""
_VERSION: Final = 1
_MAGIC: Final = b"ecrclaim"
_HEAD: Final = struct.Struct(">8sHBB16sQQQQdHH")
_SPAN: Final = struct.Struct(">QQ")
_MOST_SPANS: Final = (RECORD - _HEAD.size - 4) // (2 * _SPAN.size)
"""A lane leaves one gap; more come of small ranges that were fetched first, and are not told."""
_END_OF_TIME: Final = 2.0**34
"""Seconds since the epoch that are no moment of ours: in nanoseconds they still fit 64 bits."""

Spans = tuple[tuple[int, int], ...]


class Reservation(NamedTuple):
    """
    Room on the disk that is reserved for one holder of a claim, or taken by what it has left.

    @ivar name: of the file in C{arriving/}; holders that follow each other have the same.
    @ivar token: tells the holders apart: what one of them changes too late is not its successor's.
    """

    name: str
    token: str = ""


class Reserved(NamedTuple):
    """
    A reservation as the index has it.

    @ivar size: in bytes of disk.
    @ivar written: when an interrupted transfer was written last, in seconds since the epoch; zero for one under way.
    """

    what: Reservation
    size: int
    written: float


class State(enum.IntEnum):
    """
    How far a transfer has come.
    """

    CLAIMED = 0
    """A process has claimed what another has left, and nothing of it may be sent yet."""
    ARRIVING = 1
    VERIFIED = 2
    """All bytes are there and are what the digest names; they may not have reached the disk yet."""
    CONTENT = 3
    """The file has its place in content/."""
    FAILED = 4
    """The file is of no use."""


class Why(enum.IntEnum):
    """
    Why a transfer has failed.
    """

    NOTHING = 0
    DISK = 1
    """The bytes that the record shows are right as far as they go."""
    DIGEST = 2
    """The bytes are not what the digest names."""


_STATES: Final = frozenset(map(int, State))
_WHYS: Final = frozenset(map(int, Why))


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

        @raise ValueError: if there are none between them.
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
class Record:
    """
    What a claim says of its transfer.

    @ivar size: bytes of the blob, as announced.
    @ivar when: time of the last write, in seconds since the epoch.
    @ivar boot: boot id of the machine when C{shown} was written: see L{claim.boot_id}.
    @ivar there: the stretches that were written, in order. Under another boot they may not have reached the disk.
    @ivar shown: the stretches that may be sent, in order: written, or hashed again, under this boot.
    @ivar hashed: bytes that the writer has hashed, from the first on.
    @ivar epoch: the writers that the transfer has had.
    @ivar progress: grows with each write of the record.
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
        Write it in C{RECORD} bytes at most. Stretches beyond the first hundred are left out.
        """
        there, shown = self.there[:_MOST_SPANS], self.shown[:_MOST_SPANS]
        counts = (self.epoch, self.progress, self.size, self.hashed, self.when, len(there), len(shown))
        packed = _HEAD.pack(_MAGIC, _VERSION, self.state, self.why, self.boot, *counts)
        packed += b"".join(_SPAN.pack(*each) for each in (*there, *shown))
        return packed + zlib.crc32(packed).to_bytes(4, "big")

    @classmethod
    def unpack(cls, data: bytes) -> Record | None:
        """
        Read what L{pack} wrote; none if it is anything else, or makes no sense.
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
        sound = state in _STATES and why in _WHYS and 0 <= when < _END_OF_TIME  # which no number but a number is
        if not (sound and hashed <= size and _are_spans(there, size) and _are_spans(shown, size)):
            return None
        return cls(size, when, boot, there, shown, hashed, epoch, progress, State(state), Why(why))

    def reach(self, offset: int, boot: bytes) -> int:
        """
        Tell up to where all bytes from C{offset} on may be sent under C{boot}.
        """
        return Stretches(self.shown if self.is_of(boot) else ()).end_of(offset)

    def is_of(self, boot: bytes) -> bool:
        """
        Return True if what was written is as it was written, whether it has reached the disk or not.
        """
        return self.boot == boot != UNKNOWN_BOOT

    @property
    def resumable(self) -> Stretches:
        """
        What the next writer takes for there. One byte is always missing: what it costs is that ECR is asked for it.
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
    What a process sees of another one's transfer.

    @ivar record: none if it never could be read.
    @ivar in_place: whether claim and data are the files that they were.
    @ivar free: whether no process holds the claim.
    @ivar moved: whether the record is another one than at the look before.
    """

    record: Record | None
    in_place: bool = True
    free: bool = False
    moved: bool = False


class Step(enum.Enum):
    """
    What a process does that follows another one's transfer.
    """

    WAIT = "look again"
    FINISH = "send the rest: all of it is verified"
    TAKE_OVER = "claim the transfer: its writer has exited"
    GO_ALONE = "fetch the rest without keeping it"
    FAIL = "abort: the bytes are wrong"


def next_step(look: Look, idle: float) -> Step:
    """
    Choose what to do after a look.

    @param idle: seconds for which the record has not changed.
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
    Tell how many bytes of the disk a blob of C{size} bytes takes while it arrives.

    The claim of a small one counts for nothing: it is there for moments.
    """
    return size + RECORD if size >= WORTH_RESUMING else size
