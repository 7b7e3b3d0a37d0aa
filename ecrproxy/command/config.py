"""
C{ecr-proxy config}: the settings as the daemon would have them, and where each comes from.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.subcommand import FINE, WRONG, Call, Subcommand
from ecrproxy.cores import usable_cores
from ecrproxy.settings.config import CONFIG, SETTINGS, given, texts_of
from ecrproxy.settings.contradictions import Machine, load, look_at_settings


def add_arguments(parser: ArgumentParser) -> None:
    """
    Say what it can be called with.
    """
    parser.add_argument("--check", action="store_true", help="write what is wrong with them, and nothing else")


def run(call: Call) -> int:
    """
    Write the settings as a configuration file, and what is wrong with them together to stderr.
    """
    sources = call.flags, call.world.variables, call.file
    config = load(*sources)
    if not call.options.check:
        for line in _lines(call):
            call.terminal.print(line)
    found = look_at_settings(config, given(*sources), call.world.variables, Machine(usable_cores()))
    for each in found:
        call.terminal.say(f"ecr-proxy: {'' if each.grave else 'warning: '}{each}")
    return WRONG if any(each.grave for each in found) else FINE


def _lines(call: Call) -> list[str]:
    """
    Write each setting that has a value, and in a comment where it comes from.
    """
    sources = call.flags, call.world.variables, call.file
    chosen, texts = given(*sources), texts_of(*sources)
    lines = []
    for name in (each.name for each in SETTINGS if each.name != CONFIG):
        text, source = texts.get(name, ("", ""))
        if text:
            lines.append(f"{name} = {json.dumps(text)}  # {source if name in chosen else 'default'}")
    return lines


CONFIG_COMMAND: Final = Subcommand(
    name="config",
    summary="show the settings, and where each comes from",
    description=(
        "Writes the settings that a daemon has with this file, environment and these flags, as a configuration file,\n"
        "each with where it comes from. What is wrong with them goes to standard error; the exit status is 1 if the\n"
        "daemon would not start, and 2 if a setting can't be read."
    ),
    examples=(
        ("ecr-proxy config --config ecr-proxy.toml", "show what a file comes to, with this environment"),
        ("ecr-proxy config --check --config ecr-proxy.toml", "see whether a daemon would start with it, for CI"),
    ),
    settings=[each.name for each in SETTINGS],
    add_arguments=add_arguments,
    run=run,
)
