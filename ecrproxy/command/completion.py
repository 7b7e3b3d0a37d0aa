"""
C{ecr-proxy completion}: scripts by which shells complete the command line.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.asking import RefusedError, UnreachableError
from ecrproxy.command.shells import SHELLS, words_of
from ecrproxy.command.subcommand import ASKS, FINE, REGISTRIES, Call, CommandError, Subcommand
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.registries import Registries
from ecrproxy.settings.config import ConfigError, registries_of

REPOSITORIES: Final = "repositories"
"""What a script asks for, when it needs them."""
SECONDS: Final = 1.0
"""How long somebody who has pressed a key waits."""
MOST: Final = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]*")


def add_arguments(parser: ArgumentParser) -> None:
    """
    Say what it can be called with.
    """
    parser.add_argument("shell", choices=[*SHELLS, REPOSITORIES], help="for which shell; or what the scripts ask for")


def run(call: Call) -> int:
    """
    Write the script.
    """
    shell = call.options.shell
    if shell == REPOSITORIES:
        for name in _repositories(call):
            call.terminal.print(name)
    else:
        call.terminal.stdout.write(SHELLS[shell](words_of(call.options.whole)))
    return FINE


def _repositories(call: Call) -> list[str]:
    """
    Name the repositories of the cache, as far as they are quickly told; none where no daemon tells.
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
            if _NAME.fullmatch(name):  # bash looks for commands in words
                found[name] = None
            if len(found) >= MOST or call.world.seconds() > until:
                break
    except (CommandError, ConfigError, RefusedError, UnreachableError):
        pass  # nobody who presses a key wants to read why
    return sorted(found)


COMPLETION: Final = Subcommand(
    name="completion",
    summary="complete the command line in bash, zsh or fish",
    description=(
        "Writes a script that a shell reads to complete subcommands, flags, choices, files, and, where a daemon tells\n"
        "them, the names of repositories."
    ),
    examples=(
        ("ecr-proxy completion bash > /etc/bash_completion.d/ecr-proxy", "for bash, with its package bash-completion"),
        ("source <(ecr-proxy completion bash)", "for this bash alone; zsh takes the same"),
        ("ecr-proxy completion zsh > ~/.zfunc/_ecr-proxy", "for zsh, where ~/.zfunc is in its fpath"),
        ("ecr-proxy completion fish > ~/.config/fish/completions/ecr-proxy.fish", "for fish"),
    ),
    settings=(*ASKS, *REGISTRIES),
    add_arguments=add_arguments,
    run=run,
)
