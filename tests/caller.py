"""
Call C{ecr-proxy} in a test, with a terminal, environment variables, a clock and a daemon.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ecrproxy.command.asking import DaemonResponse, Exchange
from ecrproxy.command.program import SUBCOMMANDS, main
from ecrproxy.command.subcommand import Subcommand, Surroundings
from ecrproxy.command.terminal import Terminal
from ecrproxy.healthcheck import Place

NOW = 4_000_000_000.0


class Stream(io.StringIO):
    """
    A file that may be a terminal.
    """

    tty = False

    def isatty(self) -> bool:
        return self.tty


class Caller:
    """
    Calls the command and captures its output.

    @ivar status: the last exit status.
    @ivar asked: the URLs that were requested.
    @ivar exchange: answers to those requests.
    @ivar started: the command lines of the daemons that this process became.
    """

    def __init__(self, exchange: Exchange | None = None, now: float = NOW) -> None:
        self.variables: dict[str, str] = {}
        self.time, self.step = now, 0.0
        self.exchange = exchange or nobody
        self.asked: list[Place] = []
        self.slept: list[float] = []
        self.started: list[Sequence[str]] = []
        self.stdin, self.stdout, self.stderr = Stream(), Stream(), Stream()
        self.status = -1

    def at_a_terminal(self, typed: str = "") -> None:
        """
        Act as a terminal on which this will be typed.
        """
        self.stdin = Stream(typed)
        self.stdin.tty = self.stderr.tty = self.stdout.tty = True

    def call(self, *arguments: str, subcommands: Sequence[Subcommand] = SUBCOMMANDS) -> str:
        """
        Run the command.

        @return: what it wrote to stdout.
        """
        for stream in (self.stdout, self.stderr):
            stream.seek(0)
            stream.truncate()
        terminal = Terminal(self.stdin, self.stdout, self.stderr)
        world = Surroundings(
            self.variables, terminal, lambda: self.time, self.seconds, self.sleep, self.reach, self.become_daemon
        )
        self.status = main(arguments, world, subcommands)
        return self.stdout.getvalue()

    @property
    def complaint(self) -> str:
        """
        Return what it wrote to stderr.
        """
        return self.stderr.getvalue()

    def seconds(self) -> float:
        """
        Return the time, which advances by one step with each call.
        """
        self.time += self.step
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept.append(seconds)

    def become_daemon(self, arguments: Sequence[str]) -> NoReturn:
        self.started.append(arguments)
        raise SystemExit(0)

    def reach(self, place: Place) -> Exchange:
        self.asked.append(place)
        return self.exchange


def nobody(method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
    """
    Return a port on which nothing listens.
    """
    raise ConnectionRefusedError(111, "Connection refused")
