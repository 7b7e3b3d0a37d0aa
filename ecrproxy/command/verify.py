"""
C{ecr-proxy verify}: hold all content against its digests.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ecrproxy.command.asking import UnreachableError
from ecrproxy.command.holdings import SETTINGS, Holdings, add_offline, holdings_of
from ecrproxy.command.subcommand import FINE, INTERRUPTED, MISUSED, UNDONE, WRONG, Call, CommandError, Subcommand
from ecrproxy.command.terminal import Progress, counted, size_in_words
from ecrproxy.settings.values import parse_size


def add_arguments(parser: ArgumentParser) -> None:
    """
    Say what it can be called with.
    """
    add = parser.add_argument
    add("--keep", action="store_true", help="leave what is bad where it is, and only tell of it")
    add("--rate", metavar="SIZE", help="hash so much a second at the most: 100m")
    add("--from", dest="first", metavar="DIGEST", help="begin with this one: where a run that was interrupted stopped")
    add("--json", action="store_true", help="write JSON")
    add_offline(parser)


@dataclass(slots=True)
class Found:
    """
    What was found so far.

    @ivar at: the digest whose turn it is.
    @ivar bad: what was told of those that are not good.
    """

    at: str | None = None
    good: int = 0
    gone: int = 0
    hashed: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)


def run(call: Call) -> int:
    """
    Hash them all, and drop what is bad.
    """
    options = call.options
    try:
        rate = float(parse_size(options.rate)) if options.rate is not None else None
    except ValueError as problem:
        raise CommandError(f"--rate={options.rate!r}: {problem}", MISUSED) from None
    holdings, found = holdings_of(call), Found()
    try:
        files = {told["digest"]: told["bytes"] for told in holdings.content()}
        left = [each for each in files if options.first is None or each >= options.first]
        with Progress(call.terminal, "Verifying", sum(files[each] for each in left), call.world.seconds) as progress:
            for told in _verdicts(holdings, left, rate, found, keep=options.keep):
                progress.advance(told.get("hashed", 0))
                if told.get("verdict", "good") not in ("good", "gone") and not options.json:
                    progress.say(_line(told, keep=options.keep))
    except (KeyboardInterrupt, UnreachableError) as problem:
        why, status = (str(problem), UNDONE) if isinstance(problem, UnreachableError) else ("interrupted", INTERRUPTED)
        further = f"; ecr-proxy verify --from {found.at} goes on" if found.at else ""
        raise CommandError(f"{why}{further}", status) from problem
    _sum_up(call, found)
    return WRONG if found.bad else FINE


def _verdicts(
    holdings: Holdings, digests: Sequence[str], rate: float | None, found: Found, *, keep: bool
) -> Iterator[Any]:
    """
    Yield what is told, and note it.
    """
    left = iter(digests)
    found.at = next(left, None)
    for told in holdings.verify(digests, rate, keep=keep):
        found.hashed += told.get("hashed", 0)
        if "verdict" in told:
            found.good += told["verdict"] == "good"
            found.gone += told["verdict"] == "gone"
            if told["verdict"] not in ("good", "gone"):
                found.bad.append(told)
            found.at = next(left, None)
        yield told


def _line(told: dict[str, Any], *, keep: bool) -> str:
    fate = "kept" if keep or "bytes" not in told else "dropped"
    why = f": {told['why']}" if "why" in told else ""
    return f"{told['verdict']}: {told['digest']}{why}, {fate}"


def _sum_up(call: Call, found: Found) -> None:
    if call.options.json:
        document = {"good": found.good, "gone": found.gone, "bytes": found.hashed, "bad": found.bad}
        call.terminal.tell(document)
        return
    bad = f"{len(found.bad)} bad" if found.bad else "none bad"
    call.terminal.print(f"{counted(found.good + len(found.bad), 'file')}, {size_in_words(found.hashed)}: {bad}")


VERIFY: Final = Subcommand(
    name="verify",
    summary="hold all content against its digests",
    description=(
        "Hashes every file of content, and drops what is not what its name says: it is fetched anew when it is asked\n"
        "for. Status 1 says that there was some. It can be interrupted at any time, and goes on where it was with\n"
        "--from. The daemon does it beside its work, in small steps; --rate leaves the disk more time."
    ),
    examples=(
        ("ecr-proxy verify", "all of it"),
        ("ecr-proxy verify --rate 50m", "gently, 50 MiB a second"),
        ("ecr-proxy verify --keep --json", "find out, and change nothing"),
    ),
    settings=SETTINGS,
    add_arguments=add_arguments,
    run=run,
)
