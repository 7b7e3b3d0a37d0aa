"""
The measurements as tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """
    One measurement.

    @ivar holds: whether the promise was kept.
    """

    text: str
    holds: bool = True

    def __str__(self) -> str:
        return self.text if self.holds else f"{self.text} BROKEN"


@dataclass(frozen=True)
class Row:
    """
    The measurements of one adversity.
    """

    name: str
    cells: Sequence[Cell]


@dataclass
class Table:
    """
    Rows with the same promises.
    """

    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """
        Return the broken promises.
        """
        return [
            f"{self.title}: {row.name}: {column}: {cell.text}"
            for row in self.rows
            for column, cell in zip(self.columns[1:], row.cells, strict=True)
            if not cell.holds
        ]

    def __str__(self) -> str:
        lines = [list(self.columns), *([row.name, *map(str, row.cells)] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self.title, "-" * len(self.title), *text, ""])
