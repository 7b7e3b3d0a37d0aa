"""
What a subcommand is made of, and what it is handed.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ecrproxy.command.asking import Daemon, Exchange, place_of
from ecrproxy.command.terminal import Terminal
from ecrproxy.healthcheck import Place
from ecrproxy.settings.config import Filed

FINE: Final = 0
WRONG: Final = 1
"""Something was found that is not as it should be."""
MISUSED: Final = 2
UNDONE: Final = 3
"""What was asked for could not be done."""
INTERRUPTED: Final = 130
"""What shells give to an end by SIGINT."""

STATUSES: Final = (
    "exit status: 0 all is well; 1 something was found wrong; 2 the command was used wrongly;"
    " 3 it could not be done; 130 it was interrupted"
)


class CommandError(Exception):
    """
    Why it can't be done, in one line, with what to do about it.

    @ivar status: the exit status.
    """

    def __init__(self, line: str, status: int = UNDONE) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True, slots=True)
class World:
    """
    What the command meets of the world.

    @ivar variables: of the environment.
    @ivar terminal: who called it.
    @ivar now: seconds since the epoch.
    @ivar seconds: seconds on a clock that is never set.
    @ivar sleep: waits for so many seconds.
    @ivar exchange: asks a daemon.
    @ivar become_daemon: runs C{twistd ecr-proxy} in this process, with the flags given.
    """

    variables: Mapping[str, str]
    terminal: Terminal
    now: Callable[[], float]
    seconds: Callable[[], float]
    sleep: Callable[[float], object]
    exchange: Callable[[Place], Exchange]
    become_daemon: Callable[[Sequence[str]], NoReturn]


@dataclass(frozen=True, slots=True)
class Call:
    """
    One call of a subcommand.

    @ivar options: what it was called with.
    @ivar flags: the settings among it as text, by setting name: what C{Config.load} takes.
    @ivar file: what the configuration file says.
    @ivar settings: the values of the settings that it names, by attribute of C{Config}; none if it does not read them.
    """

    options: Namespace
    flags: Mapping[str, str]
    file: Filed
    settings: Mapping[str, Any]
    world: World

    @property
    def terminal(self) -> Terminal:
        """
        Who called.
        """
        return self.world.terminal

    def daemon(self) -> Daemon:
        """
        The daemon, to be asked on its operator's port. Needs C{ASKS} among the subcommand's settings.

        @raise CommandError: if it has no such port.
        """
        try:
            place = place_of(self.options.admin_url, self.settings["admin_listen"])
        except ValueError as problem:
            raise CommandError(str(problem), MISUSED) from None
        return Daemon(self.world.exchange(place), place)


ASKS: Final = ("admin-listen",)
"""The settings of a subcommand that asks the daemon on its operator's port."""

REGISTRIES: Final = ("ecr-endpoint", "registry-aliases")
"""The settings of a subcommand that is told of repositories."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subcommand:
    """
    One subcommand.

    @ivar summary: what it does, in half a line.
    @ivar description: what it does, in a few sentences.
    @ivar examples: command lines, each with what it does.
    @ivar settings: the names of the settings that it takes as flags, with the daemon's own names and variables.
    @ivar reads: whether it needs their values.
    @ivar add_arguments: adds what else it takes.
    @ivar run: does it.
    @return: the exit status.
    """

    name: str
    summary: str
    description: str
    examples: Sequence[tuple[str, str]]
    settings: Sequence[str] = ()
    reads: bool = True
    add_arguments: Callable[[ArgumentParser], object] = lambda _: None
    run: Callable[[Call], int]
