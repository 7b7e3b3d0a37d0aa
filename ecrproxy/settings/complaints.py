"""
What is wrong, in one line on stderr: for who started the daemon, whatever becomes of the log.
"""

from __future__ import annotations

import select
import sys
from typing import IO, Final, NoReturn

_PATIENCE: Final = 1.0
"""Seconds for which a line waits for room in a pipe."""


def say(line: str, mark: str = "") -> None:
    """
    Say it.

    @param mark: comes before it.
    """
    write(f"{mark}ecr-proxy: {' '.join(line.split())}")


def write(line: str) -> None:
    """
    Write a line as it is.
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
    Say it, and end.
    """
    say(line)
    sys.exit(1)
