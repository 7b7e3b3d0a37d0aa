"""
The configuration file: any setting, named like its flag, and tables of registries, in TOML 1.0.

Flags and variables override it, so one file can serve many machines.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Final

from ecrproxy.files import open_file, unread
from ecrproxy.settings.config import NO_FILE, Filed, config_file, given
from ecrproxy.settings.registries import parse_registries
from ecrproxy.settings.table import CONFIG, RELOADED, SETTINGS, ConfigError

LIMIT: Final = 2**16
"""Maximum bytes of the file. Its registries, up to three times as long there, must fit into the environment."""
REGISTRIES: Final = "ECRPROXY_REGISTRIES"
"""
The variable that passes the file's registries to a worker, see L{about_registries}: the first C{_PIECE} characters. The
rest follows in variables of the same name with the suffixes _1, _2.
"""
_PIECE: Final = 100_000
"""Linux allows 128 KiB per variable: execve(2), MAX_ARG_STRLEN."""
_NAMES: Final = tuple(each.name for each in SETTINGS if each.name != CONFIG)


def read_file(flags: Mapping[str, str], environ: Mapping[str, str]) -> Filed:
    """
    Read the configuration file that flags or variables name; return nothing if none is named.

    A worker reads no file: it receives the settings as flags, and the registries in a variable.

    @raise ConfigError: if the file is unreadable or invalid.
    """
    path = config_file(flags, environ)
    if path is None:
        pieces = itertools.takewhile(bool, (environ.get(name) for name in _names()))
        return read_handed("".join(map(str, pieces)))
    try:
        with open_file(path) as file:
            data = file.read(LIMIT + 1)
    except OSError as problem:
        source = given(flags, environ)[CONFIG][1]
        raise ConfigError(f"{source}={path!r}: {unread(problem)}; give a TOML file") from None
    return parse_file(path, data)


def for_worker(filed: Filed) -> dict[str, str]:
    """
    Return the variables of a worker. It does not read the file again, because that may have changed since.
    """
    text = about_registries(filed)
    pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
    return {"PROXY_CONFIG": "", **dict(zip(_names(), pieces, strict=False))}


def _names() -> Iterator[str]:
    return itertools.chain([REGISTRIES], (f"{REGISTRIES}_{number}" for number in itertools.count(1)))


def about_registries(filed: Filed) -> str:
    """
    Serialize a file's registries for L{read_handed}: JSON, in ASCII.
    """
    settings = {name: each for name, each in filed.settings.items() if name in RELOADED}
    return json.dumps([settings, filed.tables])


def read_handed(text: str) -> Filed:
    """
    Parse what the parent serialized with L{about_registries}; empty text gives nothing.
    """
    if not text:
        return NO_FILE
    settings, tables = json.loads(text)
    given = {name: (value, source) for name, (value, source) in settings.items()}
    return Filed(given, parse_registries("the parent", tables)[0], tables)


def parse_file(name: str, data: bytes) -> Filed:
    """
    Parse a configuration file.

    @param name: the file's name, for errors.
    @return: the text of each setting, as a flag would have it, with its position; and the registries.
    @raise ConfigError: for all invalid keys; the texts of settings are checked later, like those of flags.
    """
    if len(data) > LIMIT:
        raise ConfigError(f"{name}: has more than {LIMIT} bytes; give a file of settings")
    try:
        table = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: not UTF-8, as TOML requires; save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise ConfigError(f"{name}: not TOML: {problem}; see docs/reference/daemon.rst") from None
    tables = table.pop("registry", {})
    registries, wrong = parse_registries(name, tables)
    errors, texts = [*_unknown(name, table), *wrong], {}
    for key in _NAMES:
        if key in table:
            try:
                texts[key] = _text(table[key]), f"{name}: {key}"
            except ValueError as problem:
                errors.append(f"{name}: {key}: {problem}")
    if errors:
        raise ConfigError(*errors)
    return Filed(texts, registries, tables)


def _unknown(name: str, table: Mapping[str, object]) -> Iterator[str]:
    for key in table:
        if key not in _NAMES:
            near = get_close_matches(key.lower().replace("_", "-").removeprefix("proxy-"), _NAMES, 1)
            advice = f"set {near[0]} if that is meant" if near else "settings are named like the flags of --help"
            yield f"{name}: {key!r} is not a setting; {advice}"


def _text(value: object) -> str:
    """
    Write a value as a flag has it.

    @raise ValueError: if the value has a type that no setting has.
    """
    match value:
        case bool():
            return str(value).lower()
        case str() | int() | float():
            return str(value)
        case list() if all(isinstance(each, str) for each in value):
            return " ".join(value)
    raise ValueError("give a text, a number, true, false, or a list of texts")
