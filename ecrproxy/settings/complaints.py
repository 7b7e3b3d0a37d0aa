"""
What is wrong with the settings, and how it is said: in one line on stderr, whatever becomes of the log.
"""

from __future__ import annotations

import select
import sys
from dataclasses import dataclass
from typing import IO, Final, NoReturn

_PATIENCE: Final = 1.0
"""Seconds for which a line waits for room in a pipe."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """
    Something that is wrong with the settings, although each of them can be read.

    @ivar said: what is wrong, and why.
    @ivar advice: what to do about it.
    @ivar grave: whether the daemon must not start: protection would be lost, or the value cannot be meant.
    """

    said: str
    advice: str
    grave: bool = False

    def __str__(self) -> str:
        return f"{self.said}; {self.advice}"


def say(line: str, mark: str = "") -> None:
    """
    Write one line to stderr.

    @param mark: comes before it.
    """
    write(f"{mark}ecr-proxy: {' '.join(line.split())}")


def write(line: str) -> None:
    """
    Write a line to stderr as it is.
    """
    stderr = sys.__stderr__  # twistd makes a log of sys.stderr
    if stderr is not None and _takes_a_line(stderr):
        stderr.write(f"{line}\n")
        stderr.flush()


def _takes_a_line(file: IO[str]) -> bool:
    """
    Wait until a pipe has room, but not for long: whoever ends is not to wait for a reader that has stopped.
    """
    try:
        fd = file.fileno()
    except OSError:
        return True  # no pipe
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(_PATIENCE * 1000))


def die(line: str) -> NoReturn:
    """
    Write one line to stderr, and exit with status 1.
    """
    say(line)
    sys.exit(1)
