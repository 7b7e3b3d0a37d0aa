"""
C{ecr-proxy completion}: print shell completion scripts.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.asking import DaemonRefusedError, DaemonUnreachableError
from ecrproxy.command.shells import SHELLS, words_of
from ecrproxy.command.subcommand import ASKS, FINE, REGISTRIES, CommandError, Invocation, Subcommand
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.registries import Registries
from ecrproxy.settings.config import registries_of
from ecrproxy.settings.table import ConfigError

REPOSITORIES: Final = "repositories"
"""The argument with which scripts request repository names."""
SECONDS: Final = 1.0
"""Timeout for repository names: the user is waiting after a key press."""
MOST: Final = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]*")


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    parser.add_argument("shell", choices=[*SHELLS, REPOSITORIES], help="the shell; repositories is for the scripts")


def run(call: Invocation) -> int:
    """
    Run the subcommand; return the exit status.
    """
    shell = call.options.shell
    if shell == REPOSITORIES:
        for name in _repositories(call):
            call.terminal.print(name)
    else:
        call.terminal.stdout.write(SHELLS[shell](words_of(call.options.whole)))
    return FINE


def _repositories(call: Invocation) -> list[str]:
    """
    Return the names of the cached repositories; empty if no daemon answers quickly.
    """
    found: dict[str, None] = {}
    until = call.world.seconds() + SECONDS
    try:
        tables = registries_of(call.flags, call.world.variables, call.file)
        registries = Registries(tables, call.settings["registry_aliases"] or ()) if tables else None
        for entry in call.daemon().listen("GET", "/api/entries"):
            name = str(entry.get("repository"))
            if registries is not None:
                name = registries.called(Repository(RegistryId(str(entry.get("registry"))), name))
            if _NAME.fullmatch(name):  # bash expands commands in words
                found[name] = None
            if len(found) >= MOST or call.world.seconds() > until:
                break
    except (CommandError, ConfigError, DaemonRefusedError, DaemonUnreachableError):
        pass  # an error message would disturb the user's prompt
    return sorted(found)


COMPLETION: Final = Subcommand(
    name="completion",
    summary="complete the command line in bash, zsh or fish",
    description=(
        "Prints a script for a shell that completes subcommands, flags, choices, files, and, if a daemon is running,\n"
        "the names of repositories."
    ),
    examples=(
        ("ecr-proxy completion bash > /etc/bash_completion.d/ecr-proxy", "for bash, with the package bash-completion"),
        ("source <(ecr-proxy completion bash)", "for the current bash only; zsh likewise"),
        ("ecr-proxy completion zsh > ~/.zfunc/_ecr-proxy", "for zsh, if ~/.zfunc is in fpath"),
        ("ecr-proxy completion fish > ~/.config/fish/completions/ecr-proxy.fish", "for fish"),
    ),
    settings=(*ASKS, *REGISTRIES),
    add_arguments=add_arguments,
    run=run,
)
