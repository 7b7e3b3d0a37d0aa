"""
C{ecr-proxy config}: show the settings and registries that a daemon would use, and the source of each value.

The output has no secrets: passwords and keys are given by file name, and URLs with a password are rejected.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ecrproxy.command.subcommand import FINE, WRONG, Invocation, Subcommand
from ecrproxy.cores import usable_cores
from ecrproxy.settings.config import Config, config_file, given, texts_of
from ecrproxy.settings.contradictions import Machine, load, look_at_settings
from ecrproxy.settings.endpoints import region_of
from ecrproxy.settings.registries import keys_of
from ecrproxy.settings.registry_table import RegistryTable
from ecrproxy.settings.table import CONFIG, SETTINGS


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    parser.add_argument("--check", action="store_true", help="print errors and warnings only")


def run(call: Invocation) -> int:
    """
    Print the settings as a configuration file, and problems of their combination to stderr.
    """
    sources = call.flags, call.world.variables, call.file
    config = load(*sources)
    if not call.options.check:
        for line in (*_lines(call), *_tables(call, config)):
            call.terminal.print(line)
    found = look_at_settings(config, given(*sources), call.world.variables, Machine(usable_cores()))
    for each in found:
        call.terminal.say(f"ecr-proxy: {'' if each.grave else 'warning: '}{each}")
    return WRONG if any(each.grave for each in found) else FINE


def _lines(call: Invocation) -> list[str]:
    """
    Return a line for each setting that has a value, with its source in a comment.
    """
    sources = call.flags, call.world.variables, call.file
    chosen, texts = given(*sources), texts_of(*sources)
    lines = []
    for name in (each.name for each in SETTINGS if each.name != CONFIG):
        text, source = texts.get(name, ("", ""))
        if text:
            lines.append(f"{name} = {_toml(text)}  # {source if name in chosen else 'default'}")
    return lines


def _tables(call: Invocation, config: Config) -> Iterator[str]:
    """
    Yield the lines of each registry's table, with sources in comments.
    """
    sources = call.flags, call.world.variables, call.file
    chosen = {name: source for name, (_, source) in given(*sources).items()}
    path = config_file(call.flags, call.world.variables)
    read = {each.name: name for each, name in zip(call.file.registries, call.file.tables, strict=True)}
    for table in config.registries:
        written = read.get(table.name)
        stands: Mapping[str, object] = {} if written is None else call.file.tables[written]
        elsewhere = _settings_of(table, in_file=written is not None)
        keys = {**keys_of(table), "namespaces": (table.namespaces or config.namespace_pattern).pattern}
        yield from ("", f'[registry."{table.name}"]')
        for key, value in keys.items():
            named = f'{path}: registry."{written}".{key}'
            source = named if key in stands else chosen.get(elsewhere.get(key, ""), "default")
            yield f"{key} = {_toml(value)}  # {source}"


def _settings_of(table: RegistryTable, *, in_file: bool) -> Mapping[str, str]:
    """
    Return the setting that gives each key of a table that is not in the file.
    """
    always = {"default": "ecr-endpoint", "namespaces": "namespace-pattern"}
    if in_file:
        return always
    region = {} if region_of(table.endpoint or "") else {"region": "region"}
    return {**always, **region, "endpoint": "ecr-endpoint", "instance-auth": "instance-auth"}


def _toml(value: Any) -> str:  # noqa: ANN401
    """
    Format a value as TOML 1.0, in ASCII. Like JSON, but without surrogate pairs.
    """
    return re.sub("[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", json.dumps(value, ensure_ascii=False))


CONFIG_COMMAND: Final = Subcommand(
    name="config",
    summary="show the settings and registries, and where each value comes from",
    description=(
        "Prints the settings and registries that a daemon would use with this file, environment and these flags, as\n"
        "a configuration file with the source of each value. Problems go to standard error. The exit status is 1 if\n"
        "the daemon would not start, and 2 if a setting is invalid."
    ),
    examples=(
        ("ecr-proxy config --config ecr-proxy.toml", "show the result of a file and this environment"),
        ("ecr-proxy config --check --config ecr-proxy.toml", "check in CI whether a daemon would start"),
    ),
    settings=[each.name for each in SETTINGS],
    add_arguments=add_arguments,
    run=run,
)
