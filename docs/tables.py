"""
Directives that write the reference from the code's own tables, so that it can say nothing else.

C{settings} describes the settings that it names: flags and defaults are those of C{SETTINGS}, what they mean is told by
README.rst's table. C{metrics} describes all figures, C{subcommands} all that the command C{ecr-proxy} can do.
"""

from __future__ import annotations

import inspect
import re
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import indent
from typing import ClassVar, Final

from docutils import nodes
from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ecrproxy.admin import readings
from ecrproxy.command.program import SUBCOMMANDS
from ecrproxy.command.subcommand import Subcommand
from ecrproxy.metrics import Figures, Reading
from ecrproxy.settings.table import SETTINGS, Setting
from ecrproxy.settings.values import parse_flag

README: Final = Path(__file__).resolve().parents[1] / "README.rst"
ROW: Final = re.compile(r"^   \* - ``(\w+)``\n     - .+\n     - .+\n     - ((?:.+\n)+?)(?=   \*|\n|\Z)", re.MULTILINE)
"""A row of README's table: variable, flags, default, meaning."""
REQUIRED: Final = "required"
WORDS: Final = re.compile(rf"{REQUIRED}|none|.* (?:else|from) .*")
"""Defaults that are told rather than given."""


def meanings(readme: str) -> dict[str, str]:
    """
    Read what README.rst's table says of each variable.
    """
    return {variable: re.sub(r"\n\s+", "\n", text.strip()) for variable, text in ROW.findall(readme)}


def flags(setting: Setting) -> list[str]:
    """
    Name the flags of a setting.
    """
    flag = f"--{setting.name}"
    return [flag, f"--no-{setting.name}"] if setting.parse is parse_flag else [flag]


def setting_described(setting: Setting, meaning: str) -> str:
    """
    Describe a setting, in reStructuredText.
    """
    default = setting.default if WORDS.fullmatch(setting.default) else f"``{setting.default}``"
    told = default if default == REQUIRED else f"default: {default}"
    named = ", ".join(f"``{each}``" for each in flags(setting))
    return entry("setting", setting.variable, f"{named}; {told}", meaning)


def entry(kind: str, name: str, *paragraphs: str) -> str:
    """
    Write an entry of the reference, to which pages can link.
    """
    return f".. {kind}:: {name}\n\n" + "".join(f"{indent(each, '   ')}\n\n" for each in paragraphs)


class Settings(SphinxDirective):
    """
    Describe settings.
    """

    required_arguments = 1
    final_argument_whitespace: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """
        Give the descriptions of those that are named.
        """
        self.env.note_dependency(str(README))
        known, told = {each.name: each for each in SETTINGS}, meanings(README.read_text("utf-8"))
        chosen = [known[name] for name in self.arguments[0].split()]
        return self.parse_text_to_nodes(
            "".join(setting_described(each, told.get(each.variable, each.help)) for each in chosen)
        )


class Anybody:
    """
    Stands for any part of the daemon, of which figures are only described and not read.
    """

    def __getattr__(self, name: str) -> Anybody:
        return self

    def __call__(self, *_: object) -> Anybody:  # noqa: D102
        return self

    def __float__(self) -> float:
        return 0.0

    def __iter__(self) -> Iterator[Anybody]:
        return iter((self,))


def all_readings() -> Iterator[Reading]:
    """
    Give each figure that a part of the daemon knows.
    """
    for name, of_part in inspect.getmembers(readings, inspect.isfunction):
        if name.startswith("of_"):
            yield from of_part(*(Anybody() for _ in inspect.signature(of_part).parameters))


def metrics() -> Iterator[tuple[str, str, str, str]]:
    """
    Give name, kind, labels and help of each figure.
    """
    for family in Figures("").collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels: Iterable[str] = getattr(family, "_labelnames", ())
        yield family.name + suffix, family.type, ", ".join(f"``{each}``" for each in labels), family.documentation
    for reading in all_readings():
        figure = reading.figure
        yield f"ecr_proxy_{figure.name}", "counter" if figure.counts else "gauge", _label(reading), figure.help
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR):
        for family in collector.collect():
            suffix = "_total" if family.type == "counter" else ""
            yield family.name + suffix, family.type, "", family.documentation


def _label(reading: Reading) -> str:
    labels = reading.figure.label.split(",")
    words = (
        dict.fromkeys(each.rpartition(",")[2] for each in reading.values())
        if labels[-1] not in ("", "registry")
        else {}
    )
    told = f" ({', '.join(f'``{each}``' for each in words)})" if words else ""
    return ", ".join(f"``{each}``" for each in labels if each) + told


class Metrics(SphinxDirective):
    """
    Describe all figures.
    """

    def run(self) -> list[nodes.Node]:
        """
        Give their descriptions.
        """
        text = ""
        for name, kind, labels, told in metrics():
            text += entry("metric", name, f"{kind}{labels and ', by '}{labels}", f"{told.rstrip('.')}.")
        return self.parse_text_to_nodes(text)


def subcommand_described(subcommand: Subcommand) -> str:
    """
    Describe a subcommand, in reStructuredText: what it does, what it takes, examples.
    """
    parser = ArgumentParser(prog=f"ecr-proxy {subcommand.name}", add_help=False)
    subcommand.add_arguments(parser)
    words = parser.format_usage().removeprefix("usage: ").split()
    usage = f"``{' '.join(words)}``" + (" [*settings*]" if subcommand.settings else "")
    options = [_option(each) for each in parser._actions]  # noqa: SLF001 (argparse tells it in no other way)
    examples = [f"``{line}``\n{indent(plain(what), '   ')}" for line, what in subcommand.examples]
    taken = [f"``--{each}``" for each in subcommand.settings]
    parts = [
        usage,
        plain(subcommand.description),
        "\n\n".join(options),
        f"Settings that it takes: {', '.join(taken)}." if taken else "",
        "Examples:",
        "\n\n".join(examples),
    ]
    return entry("subcommand", f"ecr-proxy {subcommand.name}", *filter(None, parts))


def plain(text: str) -> str:
    """
    Take from a text what would be markup in it.
    """
    return re.sub(r"([*`|_\\])", r"\\\1", text)


def _option(action: Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    names = [f"``{each} {value}``".replace(" ``", "``") for each in action.option_strings] or [f"``{value}``"]
    told = plain((action.help or "") % {"default": action.default})
    return f"{', '.join(names)}\n   {told}"


class Subcommands(SphinxDirective):
    """
    Describe all subcommands of ecr-proxy.
    """

    def run(self) -> list[nodes.Node]:
        """
        Give their descriptions.
        """
        return self.parse_text_to_nodes("".join(map(subcommand_described, SUBCOMMANDS)))


def setup(app: Sphinx) -> dict[str, bool]:
    """
    Add the directives, and the roles C{:setting:} and C{:metric:} that link to what they describe.
    """
    app.add_object_type("setting", "setting", "pair: %s; setting")
    app.add_object_type("metric", "metric", "pair: %s; metric")
    app.add_directive("settings", Settings)
    app.add_object_type("subcommand", "subcommand", "pair: %s; subcommand")
    app.add_directive("metrics", Metrics)
    app.add_directive("subcommands", Subcommands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
