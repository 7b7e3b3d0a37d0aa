"""
The connections over which a blob comes in: what they promise, how many there are, and their back-pressure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

HIGH_WATER: Final = 4 * 2**20
"""Bytes of a lane that may wait for the disk before it is paused: some 20 ms of a fast network."""


SMALLEST_PART: Final = 4 * 2**20


LARGEST_PART: Final = 16 * 2**20


SPLIT: Final = 16 * 2**20
"""Bytes from which on a blob is worth several connections."""


SMALLEST_WISH: Final = 64 * 2**10
"""Fewest bytes that are fetched out of turn: tiny ranges would leave a gap each."""


MOST_GAPS: Final = 1000
"""Number of gaps from which on nothing is fetched out of turn any more."""


AHEAD_WATER: Final = 2**20
"""The same of a lane whose bytes nobody waits for: a slow disk holds few of them."""


GATHERED: Final = 2**20
"""Bytes that are gathered before they are handed out: each batch costs turns of threads, and news to all who follow."""


GATHER_SECONDS: Final = 0.01
"""How long bytes may wait for others to be handed out with."""


BUFFERED: Final = 64 * 2**20
"""Bytes that may wait in memory, of all transfers together, before each connection is paused at its first byte."""


class Transfer(Protocol):
    """
    A connection that sends: what may be asked of it.
    """

    def pause(self) -> None:
        """Send nothing for now."""

    def resume(self) -> None:
        """Go on."""

    def abort(self) -> None:
        """Send nothing more, ever."""


class Stretch(Protocol):
    """
    Bytes of a blob that are about to come.
    """

    @property
    def start(self) -> int:
        """Give the offset of the first."""

    @property
    def stop(self) -> int | None:
        """Give the offset behind the last, if it is known."""

    def deliver(self, sink: Inflow) -> Transfer:
        """Let them come."""


class Blob(Protocol):
    """
    Where a blob's bytes come from.
    """

    @property
    def size(self) -> int | None:
        """Give its bytes, if upstream said."""

    @property
    def first(self) -> Stretch:
        """Give what has been asked for already."""

    @property
    def ranged(self) -> bool:
        """Tell whether parts of it can be had."""

    @property
    def sources(self) -> int:
        """Tell how many may have it."""

    async def open(self, start: int, stop: int | None, breaks: int = 0) -> Stretch:
        """Ask for more of it, which was asked for in vain, or nearly so, C{breaks} times in a row."""

    def look_again(self) -> None:
        """Ask who else has it by now, too, where an answer is slow."""


class Buffered:
    """
    Counts the bytes of all transfers that wait in memory, for the disk or for clients.
    """

    def __init__(self, most: int = BUFFERED) -> None:
        self.most, self.size = most, 0

    @property
    def full(self) -> bool:
        """
        Return True if no more bytes should be taken in.
        """
        return self.size > self.most

    @property
    def has_plenty(self) -> bool:
        """
        Return True if less than half waits of what may.
        """
        return 2 * self.size < self.most


class Lanes:
    """
    The connections to buckets that the daemon may have, and what a single blob may have of them.

    @param buffered: bytes that may wait in memory.
    @ivar buffered: counts what has come over them and waits in memory.
    """

    def __init__(self, each: int = 4, together: int = 64, buffered: int = BUFFERED) -> None:
        self._each, self._free, self._together = each, together, together
        self.buffered = Buffered(buffered)

    def first_part(self, expected: int | None) -> int | None:
        """
        Choose how much of a blob to ask for at first; none for all, where one lane will do.

        @param expected: its bytes, if something is known of them.
        """
        return None if self._each == 1 or (expected is not None and expected < SPLIT) else SMALLEST_PART

    def has_plenty(self, size: int, coming: int) -> bool:
        """
        Return True if a blob of so many bytes, which nobody waits for, would leave half of the connections to others.

        @param coming: how many others that nobody waits for are about to take one.
        """
        lanes = 1 if size < SPLIT else self._each
        return 2 * (self._free - lanes - coming) >= self._together and self.buffered.has_plenty

    def take(self, size: int) -> int:
        """
        Take lanes for so many bytes: always one, more while there are some.
        """
        taken = 1 if size < SPLIT else max(1, min(self._each, self._free))
        self._free -= taken
        return taken

    def give_back(self, lanes: int) -> None:
        """
        Give lanes back.
        """
        self._free += lanes


class Urgency(IntEnum):
    """
    Who waits for the part that a lane brings. A lane leaves its part for a more urgent one.
    """

    NOBODY = 0
    """It is the next part of the blob in order."""
    READER = 1
    """A client that reads on for long: the whole blob, an open-ended range, many MiB."""
    SMALL = 2
    """A client that needs no more than this."""


class Wish(NamedTuple):
    """
    What a client has still to read.
    """

    position: int
    stop: int

    @property
    def urgency(self) -> Urgency:
        """
        Return C{SMALL} if one part is all that is left to read.
        """
        return Urgency.SMALL if self.stop - self.position <= SMALLEST_PART else Urgency.READER

    def rank(self, missing: int) -> tuple[int, int]:
        """
        Return the place among other wishes, least first.

        @param missing: offset of the first byte that no lane has taken.
        """
        if self.urgency is Urgency.SMALL:
            return -1, self.stop - self.position
        return (missing - self.position) // SMALLEST_PART, 0


class Gaps:
    """
    What of a blob nobody has taken on yet, in order: lanes take part after part of it.

    @raise ValueError: for gaps that overlap, or that are empty or reversed.
    """

    def __init__(self, gaps: Iterable[tuple[int, int]]) -> None:
        self._gaps = list(gaps)
        edges = [edge for gap in self._gaps for edge in gap]
        if edges != sorted(set(edges)):
            raise ValueError(f"not gaps: {self._gaps}")

    def take(self, lanes: int) -> tuple[int, int] | None:
        """
        Take the next part, of which one of C{lanes} is to bring all; none if there is nothing left.
        """
        if not self._gaps:
            return None
        start, stop = self._gaps.pop(0)
        remaining = stop - start + sum(last - first for first, last in self._gaps)
        end = min(stop, start + part_size(remaining, lanes))
        if end < stop:
            self._gaps.insert(0, (end, stop))
        return start, end

    def take_from(self, start: int, stop: int) -> tuple[int, int] | None:
        """
        Take what is missing from C{start} on, up to C{stop} at most; none if that byte is not missing.

        None also for an empty or reversed range: taken, it would make the gap wider than it was.
        """
        if start >= stop:
            return None
        for at, (first, last) in enumerate(self._gaps):
            if first <= start < last:
                end = min(stop, last)
                self._gaps[at : at + 1] = [each for each in ((first, start), (end, last)) if each[0] < each[1]]
                return start, end
        return None

    def first_missing(self, start: int, stop: int) -> int | None:
        """
        Return the offset of the first byte from C{start} to C{stop} that no lane has taken.
        """
        at = bisect_right(self._gaps, start, key=lambda gap: gap[1])
        if at == len(self._gaps):
            return None
        missing = max(start, self._gaps[at][0])
        return missing if missing < stop else None

    def take_wished(self, wishes: Iterable[Wish]) -> tuple[int, int, Urgency] | None:
        """
        Take the next part that a client waits for, with its urgency; none if all the wishes are taken.

        Small ranges come first, the smallest before all. The others are served by how much is on its way to
        them already, in parts; between equals the order of C{wishes} decides.
        """
        if len(self._gaps) >= MOST_GAPS:
            return None
        missing = [(wish, at) for wish in wishes if (at := self.first_missing(*wish)) is not None]
        if not missing:
            return None
        wish, start = min(missing, key=lambda each: each[0].rank(each[1]))
        part = self.take_from(start, max(start + SMALLEST_WISH, min(wish.stop, start + SMALLEST_PART)))
        return (*part, wish.urgency) if part is not None else None

    def give_back(self, start: int, stop: int) -> None:
        """
        Let others take what was taken and has not come.
        """
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self._gaps, (start, stop)]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            elif first < last:
                merged.append((first, last))
        self._gaps = merged

    def __contains__(self, offset: int) -> bool:
        return any(first <= offset < last for first, last in self._gaps)

    def give_up(self) -> None:
        """
        Let nobody take another part.
        """
        self._gaps = []


def part_size(remaining: int, lanes: int) -> int:
    """
    Choose how much of a blob a lane takes next: less and less, so that all end together.
    """
    if lanes == 1:
        return remaining
    return min(remaining, LARGEST_PART, max(SMALLEST_PART, remaining // (2 * lanes)))


class Inflow:
    """
    Bytes on their way in from one connection; it is paused while too many wait.

    @param buffered: what is counted of all connections together.
    @param high_water: bytes that may wait before this one is paused.
    @param call_later: a reactor's, to gather bytes for a moment; none to hand out what there is.
    """

    def __init__(
        self, buffered: Buffered, high_water: int = HIGH_WATER, call_later: Callable[..., Any] | None = None
    ) -> None:
        self._buffered, self._high_water, self._call_later = buffered, high_water, call_later
        self._wanted = 1
        self._pending: list[bytes] = []
        self.waiting, self._in_use = 0, 0
        self._paused, self._over = False, False
        self._problem: Failure | None = None
        self._transfer: Transfer | None = None
        self._wake: Deferred[None] | None = None

    def begin(self, stretch: Stretch) -> None:
        """
        Let the bytes come.
        """
        self._transfer = stretch.deliver(self)

    def arrived(self, data: bytes) -> None:
        """
        Take bytes from the connection; those that it still brings when it was ended are nobody's.
        """
        if self._over:
            return
        self._pending.append(data)
        self.waiting += len(data)
        self._buffered.size += len(data)
        too_many = self.waiting > self._high_water or self._buffered.full
        if too_many and not self._paused and self._transfer is not None:
            self._paused = True
            self._transfer.pause()
        self._stir()

    def ended(self, problem: Failure | None) -> None:
        """
        Note the connection's end, C{problem} if it is not a good one.
        """
        self._over, self._problem = True, self._problem or problem
        self._stir()

    def refuse(self) -> None:
        """
        End the connection; what still waits is given.
        """
        if not self._over:
            self.ended(None)
            if self._transfer is not None:
                self._transfer.abort()

    def abort(self, problem: Failure | None = None) -> None:
        """
        End the connection; what still waits is dropped.
        """
        self._buffered.size -= self.waiting + self._in_use
        self._pending, self.waiting, self._in_use = [], 0, 0
        if not self._over:
            self.ended(problem)
            if self._transfer is not None:
                self._transfer.abort()

    async def batch(self, worth: int = 1) -> list[bytes]:
        """
        Wait for bytes; empty at the end. Asking for more says that the last batch is used up.

        @param worth: how many to wait for once there are some, for no longer than C{GATHER_SECONDS}; fewer if more than
            that can't wait.
        @raise Exception: if the connection broke off; all that came before was given.
        """
        self._buffered.size -= self._in_use
        self._in_use = 0
        if self._paused and not self._pending and not self._over and self._transfer is not None:
            self._paused = False  # what had been taken is written now
            self._transfer.resume()
        worth = min(worth, self._high_water // 4)
        await self._until_there_are(1)
        if self.waiting < worth and not (self._over or self._paused) and self._call_later is not None:
            enough = self._call_later(GATHER_SECONDS, self._want, 1)
            await self._until_there_are(worth)
            if enough.active():
                enough.cancel()
        if self._pending:
            batch, self._pending = self._pending, []
            self._in_use, self.waiting = self.waiting, 0
            return batch
        if self._problem is not None:
            self._problem.raiseException()
        return []

    async def _until_there_are(self, count: int) -> None:
        self._want(count)
        if not self._suffices:
            self._wake = Deferred()
            await self._wake

    def _want(self, count: int) -> None:
        self._wanted = count
        self._stir()

    @property
    def _suffices(self) -> bool:
        """
        Return True if there is nothing to wait for: a connection that is paused brings no more.
        """
        return self.waiting >= self._wanted or self._over or (self._paused and bool(self._pending))

    def _stir(self) -> None:
        if self._suffices:
            wake, self._wake = self._wake, None
            if wake is not None:
                wake.callback(None)
