"""
What people and programs read of the command: lines, tables, progress, and figures in words.
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
"""How often a bar is drawn at the most."""
_TOLD_SECONDS: Final = 10.0
"""How often a log is told of progress."""
_BAR: Final = 24
_NARROW: Final = 80


def size_in_words(size: float) -> str:
    """
    Write a number of bytes for people, in powers of 1024 as the settings have it.
    """
    for unit in _UNITS:
        if abs(size) < _KIBI or unit == _UNITS[-1]:
            break
        size /= _KIBI
    return f"{size:.0f} {unit}" if unit == "B" or size >= _TEN * _TEN else f"{size:.1f} {unit}"


def counted(count: int, one: str, many: str = "") -> str:
    """
    Write how many there are of something.

    @param many: its plural, if that has more than an s behind C{one}.
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def age_in_words(seconds: float) -> str:
    """
    Write how long ago something was.
    """
    for least, unit, name in _AGES:
        if seconds >= least:
            return f"{counted(int(seconds // unit), name)} ago"
    return "just now"  # by a clock that was set back


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """
    Write rows below each other, the first of which names the columns.

    @param right: the columns whose ends are below each other, as those of figures.
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
    Who called the command: what he types, and what he reads.
    """

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO

    @property
    def watched(self) -> bool:
        """
        Tell whether a person reads stderr.
        """
        return self.stderr.isatty()

    @property
    def columns(self) -> int:
        """
        Tell how many characters a line of stderr has.
        """
        try:
            return os.get_terminal_size(self.stderr.fileno()).columns or _NARROW
        except (OSError, ValueError):
            return _NARROW

    def print(self, line: str = "") -> None:
        """
        Write a line of the answer.
        """
        self.stdout.write(printable(line) + "\n")

    def tell(self, document: object, *, in_one_line: bool = False) -> None:
        """
        Write the answer for a program: JSON, in ASCII.
        """
        self.stdout.write(json.dumps(document, indent=None if in_one_line else 2) + "\n")

    def say(self, line: str) -> None:
        """
        Write a line about the work itself.
        """
        self.stderr.write(printable(line) + "\n")
        self.stderr.flush()

    def asks(self, question: str) -> bool | None:
        """
        Ask for a yes; none if nobody is there to answer.
        """
        if not (self.stdin.isatty() and self.watched):
            return None
        self.stdout.flush()
        self.stderr.write(f"{printable(question)} [y/N] ")
        self.stderr.flush()
        return self.stdin.readline().strip().lower() in ("y", "yes")


def printable(line: str) -> str:
    """
    Take from a line what would be a terminal's commands: names come from elsewhere.
    """
    return line if line.isprintable() else "".join(each if each.isprintable() else "?" for each in line)


class Progress:
    """
    How far something is: a bar that is drawn again and again for people, a line now and then for logs.

    To be used with C{with}: whatever ends the work, the bar does not stay behind.

    @param what: is being done.
    @param total: bytes in all; none while that isn't known.
    @param seconds: a clock that is never set.
    @param in_words: writes an amount, where it is none of bytes.
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
        Note that so many bytes more are done.
        """
        self.done += size
        now = self._seconds()
        if now - self._told >= (_DRAWN_SECONDS if self._terminal.watched else _TOLD_SECONDS):
            self._told = now
            self._draw()

    def say(self, line: str) -> None:
        """
        Write a line that stays.
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
        Write how far it is, how fast, and how long it will take.
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
    Write a time as clocks do.
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
