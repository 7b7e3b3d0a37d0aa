"""
The console script: parses the arguments, runs a subcommand, and exits with its status.

Invalid arguments and failures of the operation are one line on stderr, never a traceback.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NoReturn

from ecrproxy import __version__
from ecrproxy.command.asking import DaemonRefusedError, DaemonUnreachableError, over_http
from ecrproxy.command.completion import COMPLETION
from ecrproxy.command.config import CONFIG_COMMAND
from ecrproxy.command.doctor import DOCTOR
from ecrproxy.command.ls import LS
from ecrproxy.command.prefetch import PREFETCH
from ecrproxy.command.purge import PURGE
from ecrproxy.command.serve import SERVE
from ecrproxy.command.stats import STATS
from ecrproxy.command.subcommand import (
    ASKS,
    INTERRUPTED,
    MISUSED,
    STATUSES,
    UNDONE,
    CommandError,
    Invocation,
    Subcommand,
    Surroundings,
)
from ecrproxy.command.terminal import Terminal
from ecrproxy.command.verify import VERIFY
from ecrproxy.registry.proxy_variables import for_botocore
from ecrproxy.settings.config import NO_FILE, read_settings
from ecrproxy.settings.file import read_file
from ecrproxy.settings.table import CONFIG, GROUPS, SETTINGS, ConfigError, Setting
from ecrproxy.settings.values import parse_flag

SUBCOMMANDS: Final[Sequence[Subcommand]] = (
    *(SERVE, LS, PURGE, VERIFY, STATS, PREFETCH),
    *(DOCTOR, CONFIG_COMMAND, COMPLETION),
)
"""All subcommands, in the order of the help."""
CUT_OFF: Final = 141
"""The exit status of shells after SIGPIPE."""


class _Parser(ArgumentParser):
    """
    A parser that prints to the terminal, and accepts no abbreviated flags.
    """

    def __init__(self, terminal: Terminal, **how: Any) -> None:  # noqa: ANN401
        super().__init__(allow_abbrev=False, **how)
        self._terminal = terminal

    def _print_message(self, message: str, file: object = None) -> None:
        (self._terminal.stderr if file is sys.stderr else self._terminal.stdout).write(message)


def make_parser(terminal: Terminal, subcommands: Sequence[Subcommand] = SUBCOMMANDS) -> ArgumentParser:
    """
    Make the argument parser; shell completion is generated from it, too.
    """
    parser = _Parser(
        terminal,
        prog="ecr-proxy",
        description="Start an ecr-proxy daemon, or manage a running daemon and its cache.",
        epilog=STATUSES,
    )
    parser.add_argument("--version", action="version", version=f"ecr-proxy {__version__}")
    made: Any = partial(_Parser, terminal)  # (typeshed wants a class, argparse whatever makes a parser)
    choices = parser.add_subparsers(
        title="subcommands",
        metavar="SUBCOMMAND",
        dest="subcommand",
        required=True,
        parser_class=made,
    )
    for each in subcommands:
        inner = choices.add_parser(
            each.name,
            help=each.summary,
            description=each.description,
            epilog=_epilog(each),
            formatter_class=RawDescriptionHelpFormatter,
        )
        each.add_arguments(inner)
        _add_settings(inner, each)
        inner.set_defaults(chosen=each, whole=parser)
    return parser


def _epilog(subcommand: Subcommand) -> str:
    examples = [f"  {line}\n      {what}" for line, what in subcommand.examples]
    return "\n".join(["examples:", *examples, "", *_wrapped(STATUSES)])


def _wrapped(text: str) -> list[str]:
    import textwrap  # noqa: PLC0415 (argparse imports it only for help)

    return textwrap.wrap(text, 100)


def _add_settings(parser: ArgumentParser, subcommand: Subcommand) -> None:
    """
    Add a subcommand's settings as flags.
    """
    if not subcommand.settings:
        return
    named = [each for each in SETTINGS if each.name in (CONFIG, *subcommand.settings)]
    group = parser.add_argument_group("settings", "The daemon's settings; a flag overrides its variable.")
    about = dict.fromkeys((each.name for each in named), group)
    if not subcommand.reads:  # many settings, shown in groups
        for title, names in GROUPS.items():
            about |= dict.fromkeys(names, parser.add_argument_group(title))
    for each in named:
        told = f"{each.help} [{each.variable}, default: {each.default}]".replace("%", "%%")
        how: dict[str, Any] = {"metavar": "VALUE"}
        if each.parse is parse_flag:
            how = {"action": BooleanOptionalAction}
        elif each.name == "listen":
            how = {"metavar": "ENDPOINT", "action": "append"}
        about[each.name].add_argument(f"--{each.name}", dest=_destination(each), help=told, default=SUPPRESS, **how)
    if subcommand.reads and set(ASKS) <= set(subcommand.settings):
        group.add_argument(
            "--admin-url",
            metavar="URL",
            help="the admin port, as http://host:port or unix:/path [default: from --admin-listen]",
        )


def _destination(setting: Setting) -> str:
    return f"setting {setting.name}"


def _flags(options: Namespace) -> dict[str, str]:
    """
    Return the settings that were given as flags, as text.
    """
    given = {each.name: getattr(options, _destination(each), None) for each in SETTINGS}
    return {
        name: " ".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value
        for name, value in given.items()
        if value is not None
    }


def main(arguments: Sequence[str], world: Surroundings, subcommands: Sequence[Subcommand] = SUBCOMMANDS) -> int:
    """
    Run the command with C{arguments}.

    @return: the exit status.
    """
    try:
        options = make_parser(world.terminal, subcommands).parse_args(arguments)
        status = _call(options, world)
        world.terminal.stdout.flush()
    except SystemExit as ended:  # argparse has printed the reason
        return ended.code if isinstance(ended.code, int) else MISUSED
    except BrokenPipeError:  # the reader has closed the pipe
        return CUT_OFF
    except KeyboardInterrupt:
        world.terminal.say("ecr-proxy: interrupted")
        return INTERRUPTED
    except (CommandError, ConfigError, DaemonRefusedError, DaemonUnreachableError, OSError) as problem:
        for line in _lines_of(problem):
            world.terminal.say(f"ecr-proxy: {' '.join(line.split())}")
        return _status_of(problem)
    return status


def _status_of(problem: Exception) -> int:
    if isinstance(problem, CommandError):
        return problem.status
    return MISUSED if isinstance(problem, ConfigError) else UNDONE


def _lines_of(problem: Exception) -> list[str]:
    match problem:
        case ConfigError():
            return [*(f"warning: {each}" for each in problem.warnings), *problem.errors]
        case OSError(strerror=str()):
            return [f"{problem.filename or 'reading or writing'}: {problem.strerror}"]
    return [str(problem)]


def _call(options: Namespace, world: Surroundings) -> int:
    subcommand: Subcommand = options.chosen
    flags = _flags(options)
    if not subcommand.reads:
        return subcommand.run(Invocation(options, flags, NO_FILE, {}, world))
    file = read_file(flags, world.variables)
    settings = read_settings(subcommand.settings, flags, world.variables, file)
    return subcommand.run(Invocation(options, flags, file, settings, world))


def become_daemon(arguments: Sequence[str]) -> NoReturn:
    """
    Run C{twistd -n --pidfile= ecr-proxy} in this process.
    """
    from twisted.scripts import twistd  # noqa: PLC0415 (slower to import than most subcommands run)

    sys.argv[:] = ["twistd", "-n", "--pidfile=", "ecr-proxy", *arguments]
    twistd.run()
    sys.exit()


def run() -> NoReturn:
    """
    Run the console script.
    """
    terminal = Terminal(sys.stdin, sys.stdout, sys.stderr)
    os.environ.update(for_botocore(os.environ))
    world = Surroundings(os.environ, terminal, time.time, time.monotonic, time.sleep, over_http, become_daemon)
    status = main(sys.argv[1:], world)
    if status == CUT_OFF:  # else Python would flush again at exit, and print an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


if __name__ == "__main__":
    run()
