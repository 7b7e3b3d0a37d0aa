"""
The repositories for which the cache saved the most bytes. Pure.

Clients choose the names, so their number is unlimited. A fixed number of rows is kept by the space-saving algorithm
(Metwally, Agrawal, El Abbadi 2005): in a full table, a new name replaces the smallest row and inherits its count. A
name with more than the total divided by the number of rows is always in the table; a count may be too high by the
inherited part, and is never too low.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LIMIT: Final = 64
SAVING: Final = frozenset({"HIT", "JOINED", "REVALIDATED", "STALE"})
"""Values of X-Cache-Status for answers without a download of content."""

Saved = tuple[str, int, int]
"""A repository, the bytes saved, and the number of answers."""


class Ranking:
    """
    The names with the most bytes.

    @param limit: maximum number of rows.
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
        Return the first C{count} rows, largest first.
        """
        return [(name, *row) for name, row in sorted(self._rows.items(), key=lambda item: item[1], reverse=True)][
            :count
        ]

    def of(self, name: str) -> Saved | None:
        """
        Return the row of a name, if it has one.
        """
        row = self._rows.get(name)
        return None if row is None else (name, *row)

    def take(self) -> list[Saved]:
        """
        Return and remove all rows.
        """
        rows = self.top(self._limit)
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Saved]) -> None:
        """
        Add the counts of another process.
        """
        for name, size, count in rows:
            self.note(name, size, count)
