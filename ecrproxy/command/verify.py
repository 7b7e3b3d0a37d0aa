"""
C{ecr-proxy verify}: verify the digests of all content.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ecrproxy.command.asking import DaemonUnreachableError
from ecrproxy.command.holdings import SETTINGS, Holdings, add_offline, holdings_of
from ecrproxy.command.subcommand import FINE, INTERRUPTED, MISUSED, UNDONE, WRONG, CommandError, Invocation, Subcommand
from ecrproxy.command.terminal import Progress, counted, size_in_words
from ecrproxy.settings.values import parse_size


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    add = parser.add_argument
    add("--keep", action="store_true", help="report corrupt content, but keep it")
    add("--rate", metavar="SIZE", help="maximum bytes to hash per second: 100m")
    add("--from", dest="first", metavar="DIGEST", help="start at this digest, to resume an interrupted run")
    add("--json", action="store_true", help="write JSON")
    add_offline(parser)


@dataclass(slots=True)
class VerifyProgress:
    """
    The results so far.

    @ivar at: the current digest.
    @ivar bad: the reports of corrupt files.
    """

    at: str | None = None
    good: int = 0
    gone: int = 0
    hashed: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)


def run(call: Invocation) -> int:
    """
    Hash all content, and drop what is corrupt.
    """
    options = call.options
    try:
        rate = float(parse_size(options.rate)) if options.rate is not None else None
    except ValueError as problem:
        raise CommandError(f"--rate={options.rate!r}: {problem}", MISUSED) from None
    holdings, found = holdings_of(call), VerifyProgress()
    try:
        files = {told["digest"]: told["bytes"] for told in holdings.content()}
        left = [each for each in files if options.first is None or each >= options.first]
        with Progress(call.terminal, "Verifying", sum(files[each] for each in left), call.world.seconds) as progress:
            for told in _verdicts(holdings, left, rate, found, keep=options.keep):
                progress.advance(told.get("hashed", 0))
                if told.get("verdict", "good") not in ("good", "gone") and not options.json:
                    progress.say(_line(told, keep=options.keep))
    except (KeyboardInterrupt, DaemonUnreachableError) as problem:
        why, status = (
            (str(problem), UNDONE) if isinstance(problem, DaemonUnreachableError) else ("interrupted", INTERRUPTED)
        )
        further = f"; ecr-proxy verify --from {found.at} goes on" if found.at else ""
        raise CommandError(f"{why}{further}", status) from problem
    _sum_up(call, found)
    return WRONG if found.bad else FINE


def _verdicts(
    holdings: Holdings, digests: Sequence[str], rate: float | None, found: VerifyProgress, *, keep: bool
) -> Iterator[Any]:
    """
    Yield the reports, and record them.
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


def _sum_up(call: Invocation, found: VerifyProgress) -> None:
    if call.options.json:
        document = {"good": found.good, "gone": found.gone, "bytes": found.hashed, "bad": found.bad}
        call.terminal.tell(document)
        return
    bad = f"{len(found.bad)} bad" if found.bad else "none bad"
    call.terminal.print(f"{counted(found.good + len(found.bad), 'file')}, {size_in_words(found.hashed)}: {bad}")


VERIFY: Final = Subcommand(
    name="verify",
    summary="verify the digests of all content",
    description=(
        "Hashes every file of content, and drops corrupt ones, which are fetched again on request. The exit status is\n"
        "1 if there were any. You can interrupt it at any time, and resume with --from. The daemon does the work in\n"
        "small steps; --rate leaves more of the disk's bandwidth to clients."
    ),
    examples=(
        ("ecr-proxy verify", "verify everything"),
        ("ecr-proxy verify --rate 50m", "limit the load to 50 MiB per second"),
        ("ecr-proxy verify --keep --json", "report only, and change nothing"),
    ),
    settings=SETTINGS,
    add_arguments=add_arguments,
    run=run,
)
