"""
Problems of the settings, and how they are reported: one line on stderr, wherever the log goes.
"""

from __future__ import annotations

import select
import sys
from dataclasses import dataclass
from typing import IO, Final, NoReturn

_PATIENCE: Final = 1.0
"""Maximum seconds to wait for room in a pipe."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """
    A problem of settings that are valid one by one.

    @ivar said: what is wrong, and why.
    @ivar advice: what to do.
    @ivar grave: True to refuse to start: protection would be lost, or the value can't be intended.
    """

    said: str
    advice: str
    grave: bool = False

    def __str__(self) -> str:
        return f"{self.said}; {self.advice}"


def say(line: str, mark: str = "") -> None:
    """
    Write one line to stderr.

    @param mark: written before the line.
    """
    write(f"{mark}ecr-proxy: {' '.join(line.split())}")


def write(line: str) -> None:
    """
    Write a line to stderr, unchanged.
    """
    stderr = sys.__stderr__  # twistd redirects sys.stderr to its log
    if stderr is not None and _takes_a_line(stderr):
        stderr.write(f"{line}\n")
        stderr.flush()


def _takes_a_line(file: IO[str]) -> bool:
    """
    Wait briefly until a pipe has room: a reader that has stopped must not delay the exit.
    """
    try:
        fd = file.fileno()
    except OSError:
        return True  # not a pipe
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(_PATIENCE * 1000))


def die(line: str) -> NoReturn:
    """
    Write one line to stderr, and exit with status 1.
    """
    say(line)
    sys.exit(1)
