"""
What is wrong with the settings, and how it is said: in one line on stderr, whatever becomes of the log.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NoReturn


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
    if stderr is not None:
        stderr.write(f"{line}\n")
        stderr.flush()


def die(line: str) -> NoReturn:
    """
    Write one line to stderr, and exit with status 1.
    """
    say(line)
    sys.exit(1)
