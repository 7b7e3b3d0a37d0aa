"""
Input and output of the command: lines, tables, progress bars, and formatted numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self, TextIO

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_KIBI: Final = 1024
_TEN: Final = 10
_AGES: Final = ((86400 * 2, 86400, "day"), (3600 * 2, 3600, "hour"), (60 * 2, 60, "minute"), (0, 1, "second"))
_DRAWN_SECONDS: Final = 0.1
"""Minimum interval between redraws of a bar."""
_TOLD_SECONDS: Final = 10.0
"""Interval between progress lines in logs."""
_BAR: Final = 24
_NARROW: Final = 80


def size_in_words(size: float) -> str:
    """
    Format a number of bytes in powers of 1024, like the settings.
    """
    for unit in _UNITS:
        if abs(size) < _KIBI or unit == _UNITS[-1]:
            break
        size /= _KIBI
    return f"{size:.0f} {unit}" if unit == "B" or size >= _TEN * _TEN else f"{size:.1f} {unit}"


def counted(count: int, one: str, many: str = "") -> str:
    """
    Format a count with its noun.

    @param many: the plural, if it is not C{one} with an s.
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def age_in_words(seconds: float) -> str:
    """
    Format how long ago something was.
    """
    for least, unit, name in _AGES:
        if seconds >= least:
            return f"{counted(int(seconds // unit), name)} ago"
    return "just now"  # negative if the clock was set back


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """
    Format rows as a table; the first row has the headings.

    @param right: the columns to align right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Terminal:
    """
    The caller's standard input, output and error.
    """

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO

    @property
    def watched(self) -> bool:
        """
        Return True if stderr is a terminal.
        """
        return self.stderr.isatty()

    @property
    def columns(self) -> int:
        """
        Return the width of stderr in characters.
        """
        try:
            return os.get_terminal_size(self.stderr.fileno()).columns or _NARROW
        except (OSError, ValueError):
            return _NARROW

    def print(self, line: str = "") -> None:
        """
        Print a line of output.
        """
        self.stdout.write(printable(line) + "\n")

    def tell(self, document: object, *, in_one_line: bool = False) -> None:
        """
        Print output for programs: JSON, in ASCII.
        """
        self.stdout.write(json.dumps(document, indent=None if in_one_line else 2) + "\n")

    def say(self, line: str) -> None:
        """
        Print a message to stderr.
        """
        self.stderr.write(printable(line) + "\n")
        self.stderr.flush()

    def asks(self, question: str) -> bool | None:
        """
        Ask for confirmation; None if stdin is not a terminal.
        """
        if not (self.stdin.isatty() and self.watched):
            return None
        self.stdout.flush()
        self.stderr.write(f"{printable(question)} [y/N] ")
        self.stderr.flush()
        return self.stdin.readline().strip().lower() in ("y", "yes")


def printable(line: str) -> str:
    """
    Remove control characters from a line: names may come from an attacker.
    """
    return line if line.isprintable() else "".join(each if each.isprintable() else "?" for each in line)


class Progress:
    """
    Progress of an operation: a bar on terminals, a line now and then in logs.

    Use as a context manager, so that the bar is erased however the operation ends.

    @param what: name of the operation.
    @param total: total bytes; None if unknown.
    @param seconds: a monotonic clock.
    @param in_words: formats an amount, if it is not in bytes.
    """

    def __init__(
        self,
        terminal: Terminal,
        what: str,
        total: int | None,
        seconds: Callable[[], float],
        in_words: Callable[[float], str] = size_in_words,
    ) -> None:
        self._terminal, self._what, self._seconds, self._in_words = terminal, what, seconds, in_words
        self.total, self.done = total, 0
        self._began = self._told = seconds()
        self._drawn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()

    def advance(self, size: int) -> None:
        """
        Add completed bytes.
        """
        self.done += size
        now = self._seconds()
        if now - self._told >= (_DRAWN_SECONDS if self._terminal.watched else _TOLD_SECONDS):
            self._told = now
            self._draw()

    def say(self, line: str) -> None:
        """
        Print a line above the bar.
        """
        self._wipe()
        self._terminal.say(line)

    def _draw(self) -> None:
        if not self._terminal.watched:
            self._terminal.say(f"{self._what}: {self.words()}")
            return
        line = f"{self._what} {self._bar()}{self.words()}"[: self._terminal.columns - 1]
        self._terminal.stderr.write("\r" + line.ljust(self._drawn))
        self._terminal.stderr.flush()
        self._drawn = len(line)

    def _wipe(self) -> None:
        if self._drawn:
            self._terminal.stderr.write("\r" + " " * self._drawn + "\r")
            self._terminal.stderr.flush()
            self._drawn = 0

    def _bar(self) -> str:
        if not self.total:
            return ""
        full = min(_BAR, _BAR * self.done // self.total)
        return f"[{'#' * full}{'.' * (_BAR - full)}] "

    def words(self) -> str:
        """
        Format the progress, the speed and the remaining time.
        """
        rate = self.done / max(self._seconds() - self._began, 1e-3)
        told = f"{self._in_words(self.done)}, {self._in_words(rate)}/s"
        if not self.total:
            return told
        left = (self.total - self.done) / rate if rate else 0
        share = f"{min(100, 100 * self.done // self.total)} %"
        return f"{share} of {self._in_words(self.total)}, {self._in_words(rate)}/s, {_clock(left)} left"


def _clock(seconds: float) -> str:
    """
    Format a duration like a clock.
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
