"""
The parts of a blob that are missing, and which of them comes next. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

SMALLEST_PART: Final = 4 * 2**20
LARGEST_PART: Final = 16 * 2**20
SPLIT: Final = 16 * 2**20
"""Smallest blob, in bytes, that is fetched over several connections."""
SMALLEST_WISH: Final = 64 * 2**10
"""Minimum number of bytes fetched out of order: each tiny range would leave a gap."""
MOST_GAPS: Final = 1000
"""Number of gaps above which nothing more is fetched out of order."""


class Urgency(IntEnum):
    """
    What waits for the part that a lane brings. A lane gives up its part for a more urgent one.
    """

    NOBODY = 0
    """No client waits: the next part of the blob in order."""
    READER = 1
    """A client that reads much more: the whole blob, an open-ended range, many MiB."""
    SMALL = 2
    """A client that needs only this part."""


class Wish(NamedTuple):
    """
    The range that a client has yet to read.
    """

    position: int
    stop: int

    @property
    def urgency(self) -> Urgency:
        """
        Return C{SMALL} if a single part is all that is left to read.
        """
        return Urgency.SMALL if self.stop - self.position <= SMALLEST_PART else Urgency.READER

    def rank(self, missing: int) -> tuple[int, int]:
        """
        Return the sort key among other wishes; the smallest is served first.

        @param missing: offset of the first byte that no lane has taken.
        """
        if self.urgency is Urgency.SMALL:
            return -1, self.stop - self.position
        return (missing - self.position) // SMALLEST_PART, 0


class Gaps:
    """
    The ranges of a blob that no lane has taken yet, in order.

    @raise ValueError: if gaps overlap, are empty or reversed.
    """

    def __init__(self, gaps: Iterable[tuple[int, int]]) -> None:
        self._gaps = list(gaps)
        edges = [edge for gap in self._gaps for edge in gap]
        if edges != sorted(set(edges)):
            raise ValueError(f"not gaps: {self._gaps}")

    def take(self, lanes: int) -> tuple[int, int] | None:
        """
        Take the next part, sized for C{lanes} lanes that share the rest; none if nothing is left.
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
        Take the missing bytes from C{start} on, up to C{stop} at most; none if the byte at C{start} is not missing.

        Also none for an empty or reversed range: taking it would widen the gap.
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
        Return the offset of the first byte between C{start} and C{stop} that no lane has taken.
        """
        at = bisect_right(self._gaps, start, key=lambda gap: gap[1])
        if at == len(self._gaps):
            return None
        missing = max(start, self._gaps[at][0])
        return missing if missing < stop else None

    def take_wished(self, wishes: Iterable[Wish]) -> tuple[int, int, Urgency] | None:
        """
        Take the next part that a client waits for, with its urgency; none if all wishes are taken.

        Small ranges come first, the smallest before all. The others are ranked by how many parts are already in flight
        for them; ties keep the order of C{wishes}.
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
        Put back a range that was taken and has not arrived.
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
        Drop all gaps, so that no lane takes another part.
        """
        self._gaps = []


def part_size(remaining: int, lanes: int) -> int:
    """
    Return how many bytes a lane takes next: parts get smaller towards the end, so that all lanes end together.
    """
    if lanes == 1:
        return remaining
    return min(remaining, LARGEST_PART, max(SMALLEST_PART, remaining // (2 * lanes)))
