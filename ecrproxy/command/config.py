"""
C{ecr-proxy config}: the settings and registries as the daemon would have them, and where each value comes from.

No secret is among them: passwords and keys are named by their files, and a URL with a password is refused.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ecrproxy.command.subcommand import FINE, WRONG, Call, Subcommand
from ecrproxy.cores import usable_cores
from ecrproxy.settings.config import CONFIG, SETTINGS, Config, config_file, given, texts_of
from ecrproxy.settings.contradictions import Machine, load, look_at_settings
from ecrproxy.settings.registries import RegistryTable, keys_of
from ecrproxy.settings.values import region_of


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
        for line in (*_lines(call), *_tables(call, config)):
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
            lines.append(f"{name} = {_toml(text)}  # {source if name in chosen else 'default'}")
    return lines


def _tables(call: Call, config: Config) -> Iterator[str]:
    """
    Write the table of each registry, and in comments where its values come from.
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
    Return which settings the keys of a table come from that the file does not have.
    """
    always = {"default": "ecr-endpoint", "namespaces": "namespace-pattern"}
    if in_file:
        return always
    region = {} if region_of(table.endpoint or "") else {"region": "region"}
    return {**always, **region, "endpoint": "ecr-endpoint", "instance-auth": "instance-auth"}


def _toml(value: Any) -> str:  # noqa: ANN401
    """
    Write a value as TOML 1.0 has it, in ASCII. It is JSON's way, but has no pairs of surrogates.
    """
    return re.sub("[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", json.dumps(value, ensure_ascii=False))


CONFIG_COMMAND: Final = Subcommand(
    name="config",
    summary="show the settings and registries, and where each value comes from",
    description=(
        "Writes the settings and registries that a daemon has with this file, environment and these flags,\n"
        "as a configuration file, each value with where it comes from. What is wrong with them goes to\n"
        "standard error; the exit status is 1 if the daemon would not start, and 2 if a setting can't be read."
    ),
    examples=(
        ("ecr-proxy config --config ecr-proxy.toml", "show what a file comes to, with this environment"),
        ("ecr-proxy config --check --config ecr-proxy.toml", "see whether a daemon would start with it, for CI"),
    ),
    settings=[each.name for each in SETTINGS],
    add_arguments=add_arguments,
    run=run,
)
