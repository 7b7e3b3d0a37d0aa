"""
The command line of C{twistd ecr-proxy}, generated from the table of settings.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

from twisted.python import usage

from ecrproxy import __version__
from ecrproxy.settings.complaints import die
from ecrproxy.settings.table import CONFIG, GROUPS, SETTINGS, Setting
from ecrproxy.settings.values import parse_flag

WIDTH: Final = 100
"""Columns of the help."""


def _described_setting(setting: Setting) -> str:
    return f"{setting.help} [{setting.variable}, default: {setting.default}]"


def _flag(setting: Setting) -> str:
    """
    Format a setting as a command-line flag.
    """
    if setting.parse is parse_flag:
        return f"--{setting.name}, --no-{setting.name}"
    return f"--{setting.name}=ENDPOINT, repeatable" if setting.name == "listen" else f"--{setting.name}=VALUE"


def arguments_of(flags: Mapping[str, str]) -> list[str]:
    """
    Format flags, given by setting name, as a daemon's command line.
    """
    written = []
    for each in SETTINGS:
        value = flags.get(each.name)
        if value is None:
            continue
        if each.name == "listen":
            written += [f"--listen={endpoint}" for endpoint in value.split()]
        elif each.parse is parse_flag:
            written.append(f"--{each.name}" if parse_flag(value) else f"--no-{each.name}")
        else:
            written.append(f"--{each.name}={value}")
    return written


class Options(usage.Options):
    """
    The flags, generated from the table of settings.
    """

    synopsis = "[options]"
    longdesc = (
        "A caching pull-through proxy for Amazon ECR. Each flag has a variable; the flag wins. AWS credentials are"
        " found as AWS's own tools find them (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE,"
        " roles); they are no flags, for every process could read those."
    )
    optParameters = [  # noqa: RUF012 (Twisted's way)
        [each.name, None, None, _described_setting(each)]
        for each in SETTINGS
        if each.parse is not parse_flag and each.name != "listen"
    ]
    optFlags = [  # noqa: RUF012
        flag
        for each in SETTINGS
        if each.parse is parse_flag
        for flag in (
            [each.name, None, _described_setting(each)],
            [f"no-{each.name}", None, f"disable, even if {each.variable} is true"],
        )
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def opt_listen(self, endpoint: str) -> None:
        """
        Twisted endpoint string, repeatable [PROXY_LISTEN, default: made from port and TLS files].
        """
        self.listen.append(endpoint)

    def getUsage(self, width: int | None = None) -> str:
        """
        Format the help, with the settings grouped by topic.
        """
        columns = width or WIDTH
        by_name = {each.name: each for each in SETTINGS}
        lines: list[str] = []
        for group, names in GROUPS.items():
            lines += ["", f"{group}:"]
            for setting in map(by_name.__getitem__, names):
                described = textwrap.wrap(
                    _described_setting(setting), columns - 6, break_long_words=False, break_on_hyphens=False
                )
                lines += [f"  {_flag(setting)}", *(f"      {line}" for line in described)]
        lines += ["", "  --version, --help", "", *textwrap.wrap(self.longdesc, columns), ""]
        return "\n".join(lines)

    def opt_version(self) -> None:
        """
        Show the version and exit.
        """
        print(f"ecrproxy {__version__}")  # noqa: T201
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """
        Parse the command line; exit with one line on errors.
        """
        try:
            super().parseOptions(options)
        except usage.UsageError as problem:
            die(f"{problem}; see twistd ecr-proxy --help")

    def arguments(self, more: Mapping[str, str]) -> list[str]:
        """
        Format the given flags for another process, without the configuration file.

        @param more: flags for the settings in that file, by name.
        """
        return arguments_of({name: value for name, value in {**more, **self.flags()}.items() if name != CONFIG})

    def flags(self) -> dict[str, str]:
        """
        Return the given flags, by setting name.
        """
        given = {}
        for each in SETTINGS:
            if each.parse is parse_flag:
                if self[each.name] or self[f"no-{each.name}"]:
                    given[each.name] = "true" if self[each.name] else "false"
            elif self.get(each.name) is not None:
                given[each.name] = self[each.name]
        if self.listen:
            given["listen"] = " ".join(self.listen)
        return given
