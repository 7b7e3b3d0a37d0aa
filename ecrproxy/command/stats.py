"""
C{ecr-proxy stats}: show the state of the daemon.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ecrproxy.command.holdings import targets_of
from ecrproxy.command.naming import naming_of
from ecrproxy.command.subcommand import ASKS, FINE, MISUSED, REGISTRIES, WRONG, CommandError, Invocation, Subcommand
from ecrproxy.command.terminal import age_in_words, counted, size_in_words, table
from ecrproxy.identity import RegistryId
from ecrproxy.ranking import SAVING
from ecrproxy.settings.config import registries_of
from ecrproxy.settings.values import parse_patience

_ANEW: Final = "\x1b[H\x1b[2J"
"""Clears a terminal."""
_HASH: Final = 19
"""Characters of a digest that are shown."""


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    parser.add_argument(
        "repositories",
        metavar="REPOSITORY",
        nargs="*",
        help="show only these repositories, [REGISTRY/]NAME, which may have * and ?",
    )
    parser.add_argument("--json", action="store_true", help="print the contents of /status.json")
    parser.add_argument(
        "--watch", metavar="SECONDS", nargs="?", const="2", help="repeat at this interval, by default 2 seconds"
    )


def run(call: Invocation) -> int:
    """
    Run the subcommand; return the exit status.
    """
    options, daemon = call.options, call.daemon()
    try:
        pause = parse_patience(options.watch) if options.watch is not None else None
    except ValueError as problem:
        raise CommandError(f"--watch={options.watch!r}: {problem}", MISUSED) from None
    while True:
        status = daemon.ask("GET", "/status.json")
        if options.repositories:
            status = _narrowed(call, status)
        if options.json:
            call.terminal.tell(status, in_one_line=pause is not None)
        else:
            _print(call, status, refreshing=pause is not None)
        if pause is None:
            return WRONG if status["reasons"] else FINE
        call.terminal.stdout.flush()
        call.world.sleep(pause)


def _narrowed(call: Invocation, status: Mapping[str, Any]) -> dict[str, Any]:
    """
    Keep only the transfers and repositories that the caller named.
    """
    tables = registries_of(call.flags, call.world.variables, call.file)
    default = {RegistryId.of_url(status["registry"])} if status["registry"] else set()
    naming = naming_of(tables, call.settings["registry_aliases"] or (), default)
    targets = targets_of(call.options.repositories, naming)

    def kept(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        named = [(each, naming.named(each["repository"])) for each in rows]
        return [row for row, repository in named if any(naming.is_of(each.repository, repository) for each in targets)]

    return {**status, "transfers": kept(status["transfers"]), "repositories": kept(status["repositories"])}


def _print(call: Invocation, status: Mapping[str, Any], *, refreshing: bool) -> None:
    if refreshing:
        call.terminal.stdout.write(_ANEW if call.terminal.stdout.isatty() else "\n")
    for line in [*_lines(status), *_registries(status), *_transfers(status), *_repositories(status)]:
        call.terminal.print(line)


def _ready(status: Mapping[str, Any]) -> str:
    reasons = "; ".join(status["reasons"])
    if not status["can_serve"]:
        return f"no: {reasons}"
    return f"yes, but {reasons}" if reasons else "yes"


def _lines(status: Mapping[str, Any]) -> list[str]:
    cache, token, upstream, now = status["cache"], status["token"], status["upstream"], status["now"]
    share = 100 * cache["bytes"] // (cache["limit"] or 1)  # the limit is unknown while no worker answers
    fill = f"{size_in_words(cache['bytes'])} of {size_in_words(cache['limit'])} ({share} %)"
    rows = [
        ("registry", f"{status['registry']}, ecr-proxy {status['version']}, up for {_time(status['uptime'])}"),
        ("ready", _ready(status)),
        ("cache", f"{fill}, {counted(cache['files'], 'file')}, {cache['evicted']} evicted"),
        ("hits", _hits(status["answers"])),
        ("now", f"{_rate(now, 'sent')} to clients, {_rate(now, 'received')} from upstream"),
        ("token", _token(token, status["when"])),
        ("upstream", _upstream(upstream)),
    ]
    return table(rows)


def _time(seconds: float) -> str:
    return age_in_words(seconds).removesuffix(" ago")


def _hits(answers: Mapping[str, Any]) -> str:
    total = sum(each["count"] for each in answers.values())
    saved = [each for word, each in answers.items() if word in SAVING]
    count, size = sum(each["count"] for each in saved), sum(each["bytes"] for each in saved)
    share = f"{100 * count // total} % of {counted(total, 'answer')}" if total else "no answers yet"
    return f"{share}, {size_in_words(size)} saved"


def _rate(now: Mapping[str, Any], what: str) -> str:
    return f"{size_in_words(now[what] / now['seconds'] if now['seconds'] else 0)}/s"


def _token(token: Mapping[str, Any], when: float) -> str:
    if token["problem"]:
        return f"none: {token['problem']}"
    if token["expires"] is None:
        return "none yet"
    return f"expires in {_time(token['expires'] - when)}, {counted(token['failures'], 'refresh', 'refreshes')} failed"


def _upstream(upstream: Mapping[str, Any]) -> str:
    since = upstream["answered_seconds"]
    answered = "has not answered yet" if since is None else f"answered {age_in_words(since)}"
    waiting = sum(upstream["waiting"].values())
    alone = upstream["open_repositories"]
    circuit = upstream["circuit"] + (f", {counted(alone, 'repository', 'repositories')} left alone" if alone else "")
    retries = counted(upstream["retries"], "retry", "retries")
    return f"circuit {circuit}, {answered}, {retries}, {counted(waiting, 'question')} waiting"


def _registries(status: Mapping[str, Any]) -> Iterator[str]:
    """
    Yield a line for each registry, if there are several.
    """
    if len(status["registries"]) > 1:
        yield ""
        rows = [["REGISTRY", "CIRCUIT", "TOKEN", "SAVED"]]
        for each in status["registries"]:
            saved = sum(answers["bytes"] for word, answers in each["answers"].items() if word in SAVING)
            needs = each["token"]["problem"] or each["token"]["expires"] is not None
            token = _token(each["token"], status["when"]) if needs else "none of AWS"
            rows.append([each["name"], each["upstream"]["circuit"], token, size_in_words(saved)])
        yield from table(rows, right=[3])


def _transfers(status: Mapping[str, Any]) -> Iterator[str]:
    if status["transfers"]:
        yield ""
        rows = [["TRANSFER", "BLOB", "RECEIVED", "OF", "CLIENTS"]]
        for each in status["transfers"]:
            size = size_in_words(each["size"]) if each["size"] is not None else "?"
            received = size_in_words(each["received"])
            rows.append([each["repository"], each["digest"][:_HASH], received, size, str(each["followers"])])
        yield from table(rows, right=[2, 3, 4])


def _repositories(status: Mapping[str, Any]) -> Iterator[str]:
    if status["repositories"]:
        yield ""
        rows = [
            [each["repository"], size_in_words(each["bytes"]), str(each["answers"])] for each in status["repositories"]
        ]
        yield from table([["REPOSITORY", "SAVED", "ANSWERS"], *rows], right=[1, 2])


STATS: Final = Subcommand(
    name="stats",
    summary="show the state of the daemon",
    description=(
        "Shows the size of the cache, its hits and savings, current transfers, and the state of token and upstream.\n"
        "The exit status is 1 if the daemon is not ready."
    ),
    examples=(
        ("ecr-proxy stats", "once"),
        ("ecr-proxy stats 'team/*'", "show the repositories of a team"),
        ("ecr-proxy stats --watch", "repeat every two seconds until interrupted"),
        ("ecr-proxy stats --json | jq .cache.bytes", "output for a program"),
    ),
    settings=(*ASKS, *REGISTRIES),
    add_arguments=add_arguments,
    run=run,
)
