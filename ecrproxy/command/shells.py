"""
Completion scripts for bash, zsh and fish, generated from the argument parser. Pure.

Subcommands, flags and choices are written into the script. Repository names are queried on completion, with C{ecr-proxy
completion repositories}, which returns quickly or prints nothing.
"""

from __future__ import annotations

import enum
import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

ASK: Final = "ecr-proxy completion repositories 2>/dev/null"


class Value(enum.Enum):
    """
    The kind of an argument's value.
    """

    NONE = enum.auto()
    WORD = enum.auto()
    FILE = enum.auto()
    REPOSITORY = enum.auto()


_FILES: Final = ("FILE", "LIST", "PATH")
_REPOSITORIES: Final = ("REPOSITORY", "IMAGE", "NAME[:TAG]", "NAME:TAG")
_PATHS: Final = re.compile(r"--(ssl-key|ssl-certificate|client-ca|htpasswd|cache-dir)")
"""Settings whose value is a path, although their metavar is VALUE."""


@dataclass(frozen=True, slots=True)
class Argument:
    """
    A flag, or a positional argument.

    @ivar flags: empty for positional arguments.
    @ivar choices: all valid values; empty if any value is.
    """

    flags: Sequence[str]
    help: str
    value: Value
    choices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Word:
    """
    A subcommand.
    """

    name: str
    summary: str
    arguments: Sequence[Argument]

    @property
    def flags(self) -> Iterator[Argument]:
        """
        Yield the flags.
        """
        return (each for each in self.arguments if each.flags)

    @property
    def rest(self) -> Argument | None:
        """
        Return the positional argument; None if there is none.
        """
        return next((each for each in self.arguments if not each.flags), None)


def words_of(parser: ArgumentParser) -> list[Word]:
    """
    Return the subcommands of a parser; the first, without a name, is the program itself.
    """
    (choices,) = (each for each in parser._actions if each.dest == "subcommand")  # noqa: SLF001 (no public API)
    inner: Mapping[str, ArgumentParser] = dict(choices.choices or {})
    summaries = {each.dest: each.help or "" for each in choices._get_subactions()}  # type: ignore[attr-defined]  # noqa: SLF001
    words = [Word("", "", _arguments([each for each in parser._actions if each is not choices]))]  # noqa: SLF001
    return words + [Word(name, summaries[name], _arguments(each._actions)) for name, each in inner.items()]  # noqa: SLF001


def _arguments(actions: Iterable[Action]) -> list[Argument]:
    return [_argument(each) for each in actions if each.help != SUPPRESS]


def _argument(action: Action) -> Argument:
    choices = [str(each) for each in action.choices or ()]
    # Leave out variable and default (in brackets): too long for a menu.
    told = re.split(r" \[|; ", (action.help or "").replace("%%", "%"))[0]
    return Argument(list(action.option_strings), told, _value(action), choices)


def _value(action: Action) -> Value:
    metavar = str(action.metavar or "")
    if action.nargs == 0:
        return Value.NONE
    if metavar in _FILES or any(_PATHS.fullmatch(flag) for flag in action.option_strings):
        return Value.FILE
    return Value.REPOSITORY if metavar in _REPOSITORIES else Value.WORD


# bash


def for_bash(words: Sequence[Word]) -> str:
    """
    Generate the script for bash.
    """
    values = [
        f"    '{word.name} {flag}') {_bash_value(each)} ;;"
        for word in words
        for each in word.flags
        if each.value is not Value.NONE
        for flag in each.flags
    ]
    flags = [
        f"    {_quoted(word.name)}) words={_quoted(' '.join(flag for each in word.flags for flag in each.flags))} ;;"
        for word in words
    ]
    rest = [f"    {_quoted(word.name)}) {_bash_value(word.rest)} ;;" for word in words if word.rest is not None]
    names = " ".join(word.name for word in words if word.name)
    return "\n".join(
        [_BASH_HEAD, *values, _BASH_FLAGS, *flags, _BASH_REST, f"    '') words='{names}' ;;", *rest, _BASH_END]
    )


def _bash_value(argument: Argument) -> str:
    if argument.choices:
        return f"words={_quoted(' '.join(argument.choices))}"
    if argument.value is Value.FILE:
        return "files=1"
    return f"words=$({ASK})" if argument.value is Value.REPOSITORY else "return"


_BASH_HEAD: Final = r"""# bash completion for ecr-proxy
_ecr_proxy() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} sub='' words='' files='' at
    # bash takes --flag=value apart.
    if [[ $cur == = ]]; then
        cur=''
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for ((at = 1; at < COMP_CWORD; at++)); do
        if [[ ${COMP_WORDS[at]} != -* ]]; then
            sub=${COMP_WORDS[at]}
            break
        fi
    done
    COMPREPLY=()
    case "$sub $prev" in"""
_BASH_FLAGS: Final = r"""    *) case $cur in
    -*) case $sub in"""
_BASH_REST: Final = r"""    esac ;;
    *) case $sub in"""
_BASH_END: Final = r"""    esac ;;
    esac ;;
    esac
    if [[ $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    else
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    fi
}
complete -F _ecr_proxy ecr-proxy
"""


# zsh


def for_zsh(words: Sequence[Word]) -> str:
    """
    Generate the script for zsh: to be sourced, or installed as C{_ecr-proxy} in C{fpath}.
    """
    named = [word for word in words if word.name]
    lines = [_ZSH_HEAD, "    _arguments -C \\"]
    lines += [f"        {each} \\" for argument in words[0].flags for each in _zsh_flag(argument)]
    lines += ["        '1:subcommand:->subcommand' '*::argument:->argument'", "    case $state in", "    subcommand)"]
    lines += ["        subcommands=("]
    lines += [f"            {_quoted(f'{word.name}:{word.summary}')}" for word in named]
    lines += [
        "        )",
        "        _describe subcommand subcommands",
        "        ;;",
        "    argument)",
        "        case $words[1] in",
    ]
    for word in named:
        specs = [each for argument in word.flags for each in _zsh_flag(argument)]
        if word.rest is not None:
            specs.append(_quoted(f"*:{_zsh_value(word.rest)}"))
        lines += [
            f"        {word.name})",
            "            _arguments \\",
            *(f"                {each} \\" for each in specs),
        ]
        lines += ["                && return", "            ;;"]
    return "\n".join([*lines, _ZSH_END])


def _zsh_flag(argument: Argument) -> Iterator[str]:
    told = re.sub(r"([\[\]:\\])", r"\\\1", argument.help)
    for flag in argument.flags:
        value = "" if argument.value is Value.NONE else f":{_zsh_value(argument)}"
        repeated = "*" if value else ""
        equals = "=" if value and flag.startswith("--") else ""
        yield _quoted(f"{repeated}{flag}{equals}[{told}]{value}")


def _zsh_value(argument: Argument) -> str:
    if argument.choices:
        return f"value:({' '.join(argument.choices)})"
    kinds = {Value.FILE: "file:_files", Value.REPOSITORY: "repository:_ecr_proxy_repositories"}
    return kinds.get(argument.value, "value: ")


_ZSH_HEAD: Final = f"""#compdef ecr-proxy
_ecr_proxy_repositories() {{
    local -a repositories
    repositories=(${{(f)"$({ASK})"}})
    compadd -a repositories
}}
_ecr_proxy() {{
    local context state state_descr line
    local -a subcommands
    typeset -A opt_args"""
_ZSH_END: Final = """        esac
        ;;
    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _ecr_proxy "$@"
else
    compdef _ecr_proxy ecr-proxy
fi
"""


# fish


def for_fish(words: Sequence[Word]) -> str:
    """
    Generate the script for fish.
    """
    lines = ["# fish completion for ecr-proxy", "complete -c ecr-proxy -f"]
    for word in words:
        when = f"'__fish_seen_subcommand_from {word.name}'" if word.name else "__fish_use_subcommand"
        if word.name:
            lines.append(
                f"complete -c ecr-proxy -n __fish_use_subcommand -a {word.name} -d {_fish_quoted(word.summary)}"
            )
        lines += [_fish_flag(when, each) for each in word.flags]
        if word.rest is not None and (taken := _fish_value(word.rest)):
            lines.append(f"complete -c ecr-proxy -n {when} {taken}")
    return "\n".join(lines) + "\n"


def _fish_flag(when: str, argument: Argument) -> str:
    names = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags]
    taken = {Value.NONE: "", Value.FILE: "-r "}.get(argument.value, "-x ")
    parts = [f"complete -c ecr-proxy -n {when}", *names, f"{taken}{_fish_value(argument)}".strip()]
    return " ".join([*(part for part in parts if part), f"-d {_fish_quoted(argument.help)}"])


def _fish_value(argument: Argument) -> str:
    if argument.choices:
        return f"-a {_fish_quoted(' '.join(argument.choices))}"
    return {Value.FILE: "-F", Value.REPOSITORY: f"-a '({ASK})'"}.get(argument.value, "")


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _quoted(text: str) -> str:
    """
    Quote a word for bash and zsh.
    """
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: Final[Mapping[str, Callable[[Sequence[Word]], str]]] = {"bash": for_bash, "zsh": for_zsh, "fish": for_fish}
