"""
Which repositories the cache saved the most bytes for. Pure.

There may be any number of repositories, and clients choose which they ask for. So a fixed number of rows is kept, by
the space-saving algorithm (Metwally, Agrawal, El Abbadi 2005): a name that is not in a full table takes the place of
the smallest, and its count. Who has more than the total divided by the number of rows is always in the table; a count
may be too high by what it took over, and is never too low.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LIMIT: Final = 64
SAVING: Final = frozenset({"HIT", "JOINED", "REVALIDATED", "STALE"})
"""Words of X-Cache-Status of an answer for which no content was fetched."""

Saved = tuple[str, int, int]
"""A repository, the bytes that were saved, in how many answers."""


class Ranking:
    """
    The names with the most bytes.

    @param limit: how many rows there are.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rows: dict[str, tuple[int, int]] = {}

    def note(self, name: str, size: int, count: int = 1) -> None:
        """
        Count bytes.
        """
        row = self._rows.get(name)
        if row is None:
            row = 0, 0
            if len(self._rows) >= self._limit:
                smallest = min(self._rows, key=self._rows.__getitem__)
                row = self._rows.pop(smallest)[0], 0
        self._rows[name] = row[0] + size, row[1] + count

    def top(self, count: int) -> list[Saved]:
        """
        Give the first of them, the one with the most bytes first.
        """
        return [(name, *row) for name, row in sorted(self._rows.items(), key=lambda item: item[1], reverse=True)][
            :count
        ]

    def take(self) -> list[Saved]:
        """
        Return all rows since the last call.
        """
        rows = self.top(self._limit)
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Saved]) -> None:
        """
        Add what another process has counted.
        """
        for name, size, count in rows:
            self.note(name, size, count)
