"""
The interface of subcommands.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ecrproxy.command.asking import AdminClient, Exchange, place_of
from ecrproxy.command.terminal import Terminal
from ecrproxy.healthcheck import Place
from ecrproxy.settings.config import Filed

FINE: Final = 0
WRONG: Final = 1
"""Problems were found."""
MISUSED: Final = 2
UNDONE: Final = 3
"""The operation failed."""
INTERRUPTED: Final = 130
"""The exit status of shells after SIGINT."""

STATUSES: Final = "exit status: 0 success; 1 problems found; 2 invalid arguments; 3 operation failed; 130 interrupted"


class CommandError(Exception):
    """
    An operation failed. One line says why, and what to do.

    @ivar status: the exit status.
    """

    def __init__(self, line: str, status: int = UNDONE) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True, slots=True)
class Surroundings:
    """
    The command's interface to the outside world.

    @ivar variables: environment variables.
    @ivar terminal: the caller's terminal.
    @ivar now: returns seconds since the epoch.
    @ivar seconds: a monotonic clock.
    @ivar sleep: sleeps for a number of seconds.
    @ivar exchange: sends requests to a daemon.
    @ivar become_daemon: runs C{twistd ecr-proxy} in this process, with the given flags.
    """

    variables: Mapping[str, str]
    terminal: Terminal
    now: Callable[[], float]
    seconds: Callable[[], float]
    sleep: Callable[[float], object]
    exchange: Callable[[Place], Exchange]
    become_daemon: Callable[[Sequence[str]], NoReturn]


@dataclass(frozen=True, slots=True)
class Invocation:
    """
    One invocation of a subcommand.

    @ivar options: the parsed arguments.
    @ivar flags: the settings among them as text, by name, as for C{Config.load}.
    @ivar file: the configuration file's contents.
    @ivar settings: the values of the subcommand's settings, by attribute of C{Config}; empty if it does not read them.
    """

    options: Namespace
    flags: Mapping[str, str]
    file: Filed
    settings: Mapping[str, Any]
    world: Surroundings

    @property
    def terminal(self) -> Terminal:
        """
        The caller's terminal.
        """
        return self.world.terminal

    def daemon(self) -> AdminClient:
        """
        Return the daemon, reached by its admin port. Needs C{ASKS} among the subcommand's settings.

        @raise CommandError: if the admin port is off.
        """
        try:
            place = place_of(self.options.admin_url, self.settings["admin_listen"])
        except ValueError as problem:
            raise CommandError(str(problem), MISUSED) from None
        return AdminClient(self.world.exchange(place), place)


ASKS: Final = ("admin-listen",)
"""The settings of subcommands that use the daemon's admin port."""

REGISTRIES: Final = ("ecr-endpoint", "registry-aliases")
"""The settings of subcommands that take repository names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subcommand:
    """
    One subcommand.

    @ivar summary: half a line of help.
    @ivar description: a few sentences of help.
    @ivar examples: command lines with explanations.
    @ivar settings: names of the daemon's settings that it takes as flags and variables.
    @ivar reads: True if it needs their values.
    @ivar add_arguments: adds its other arguments.
    @ivar run: runs it; returns the exit status.
    """

    name: str
    summary: str
    description: str
    examples: Sequence[tuple[str, str]]
    settings: Sequence[str] = ()
    reads: bool = True
    add_arguments: Callable[[ArgumentParser], object] = lambda _: None
    run: Callable[[Invocation], int]
