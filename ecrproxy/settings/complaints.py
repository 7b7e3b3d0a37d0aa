"""
What is wrong, in one line on stderr: for who started the daemon, whatever becomes of the log.
"""

from __future__ import annotations

import sys
from typing import NoReturn


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
    if stderr is not None:
        stderr.write(f"{line}\n")
        stderr.flush()


def die(line: str) -> NoReturn:
    """
    Say it, and end.
    """
    say(line)
    sys.exit(1)
