"""
C{ecr-proxy purge}: remove entries and content from the cache.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter, defaultdict
from typing import Final

from ecrproxy.command.choosing import Selection, chosen, parse_age
from ecrproxy.command.holdings import SETTINGS, Holdings, add_offline, holdings_of, naming_in, survey_of, targets_of
from ecrproxy.command.naming import Naming
from ecrproxy.command.subcommand import FINE, MISUSED, WRONG, CommandError, Invocation, Subcommand
from ecrproxy.command.survey import Survey
from ecrproxy.command.terminal import Progress, counted, size_in_words, table

_MOST_TAGS: Final = 5
_OUTCOMES: Final = ("entries", "files", "bytes", "used", "stuck")


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    add = parser.add_argument
    add(
        "targets",
        metavar="TARGET",
        nargs="*",
        help="[REGISTRY/]REPOSITORY, with :TAG or @DIGEST, or DIGEST; all except digests may have * and ?",
    )
    add("--older-than", metavar="AGE", help="only what was not used for this long: 30d, 12h, 2w")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="remove without asking")
    how.add_argument("--dry-run", action="store_true", help="show what would be removed, without asking")
    add("--json", action="store_true", help="print JSON, without asking")
    add_offline(parser)


def run(call: Invocation) -> int:
    """
    Show what would be removed, and remove it after confirmation.
    """
    options = call.options
    before = _before(call)
    holdings = holdings_of(call)
    survey = survey_of(call, holdings)
    naming = naming_in(call, survey)
    going = chosen(survey, targets_of(options.targets, naming), naming, before)
    size = survey.size(going.content)
    if not (going.entries or going.content):
        call.terminal.say("ecr-proxy: nothing in the cache matches")
    wanted = bool(options.yes and (going.entries or going.content))
    if not options.json:
        _show(call, going, size, naming)
        if (going.entries or going.content) and not options.yes and not options.dry_run:
            wanted = call.terminal.asks("Remove it?") is True
            if not wanted:
                call.terminal.say("ecr-proxy: nothing was removed; give --yes to remove it")
    outcome = _remove(call, holdings, going, size, before) if wanted else Counter()
    if options.json:
        _tell(call, survey, going, size, naming, outcome if wanted else None)
    elif wanted:
        _sum_up(call, outcome)
    missed = bool(options.targets) and before is None and not (going.entries or going.content)
    return WRONG if outcome["stuck"] or missed else FINE


def _before(call: Invocation) -> float | None:
    """
    Return the time before which content must have been used last to be removed; None without an age.
    """
    options = call.options
    if not options.targets and options.older_than is None:
        raise CommandError("nothing given to purge: see ecr-proxy purge --help; '*' is everything", MISUSED)
    try:
        age = parse_age(options.older_than) if options.older_than is not None else None
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None
    return None if age is None else call.world.now() - age


def _remove(call: Invocation, holdings: Holdings, going: Selection, size: int, before: float | None) -> Counter[str]:
    outcome: Counter[str] = Counter()
    names = [each.name for each in going.entries]
    with Progress(call.terminal, "Removing", size, call.world.seconds) as progress:
        for told in holdings.remove(names, going.content, before):
            outcome.update(told)
            progress.advance(told["bytes"])
    return outcome


def _show(call: Invocation, going: Selection, size: int, naming: Naming) -> None:
    tags: defaultdict[str, set[str]] = defaultdict(set)
    counts = Counter(naming.called(each.repository) for each in going.entries)
    for each in going.entries:
        if each.tag is not None:
            tags[naming.called(each.repository)].add(each.tag)
    rows = [["REPOSITORY", "ENTRIES", "TAGS"]]
    for repository, count in sorted(counts.items()):
        some = sorted(tags[repository])
        more = [f"and {len(some) - _MOST_TAGS} more"] if len(some) > _MOST_TAGS else []
        rows.append([repository, str(count), " ".join(some[:_MOST_TAGS] + more)])
    if len(rows) > 1:
        for line in table(rows, right=[1]):
            call.terminal.print(line)
    if going.entries or going.content:
        what = f"{counted(len(going.entries), 'entry', 'entries')} and {counted(len(going.content), 'file')} of content"
        call.terminal.print(f"{what}, {size_in_words(size)}")


def _sum_up(call: Invocation, outcome: Counter[str]) -> None:
    gone = f"{counted(outcome['entries'], 'entry', 'entries')} and {counted(outcome['files'], 'file')} of content"
    call.terminal.print(f"removed {gone}, {size_in_words(outcome['bytes'])}")
    if outcome["used"]:
        call.terminal.print(f"{counted(outcome['used'], 'file')} kept: used meanwhile")
    if outcome["stuck"]:
        call.terminal.say(f"ecr-proxy: {counted(outcome['stuck'], 'file')} can't be removed; the daemon's log says why")


def _tell(
    call: Invocation, survey: Survey, going: Selection, size: int, naming: Naming, outcome: Counter[str] | None
) -> None:
    document = {
        "entries": [
            {
                "repository": naming.called(each.repository),
                "reference": each.tag or each.digests[0],
                "digests": list(each.digests),
            }
            for each in going.entries
            if each.digests
        ],
        "content": [{"digest": each, "bytes": survey.content[each].bytes} for each in going.content],
        "bytes": size,
        "removed": None
        if outcome is None
        else {name: outcome[name] for name in ("entries", "files", "bytes", "used", "stuck")},
    }
    call.terminal.tell(document)


PURGE: Final = Subcommand(
    name="purge",
    summary="remove images and content from the cache",
    description=(
        "Shows what would be removed, with its size, and removes it after confirmation, or with --yes. Purging a tag\n"
        "also removes what only this tag references; purging a repository removes all its entries. Content is removed\n"
        "when nothing references it. Responses in progress finish normally. Later pulls ask ECR again.\n"
        "With --older-than, each file is selected by its own last use, as for eviction."
    ),
    examples=(
        ("ecr-proxy purge team/app:v1", "show what a tag would remove; on a terminal, ask"),
        ("ecr-proxy purge --yes team/app 'team/test-*'", "remove repositories"),
        ("ecr-proxy purge --yes 'team/app:pr-*'", "remove all matching tags"),
        (
            "ecr-proxy purge --yes 444455556666.dkr.ecr.us-east-1.amazonaws.com/team/app:v1",
            "a registry other than the default",
        ),
        ("ecr-proxy purge --older-than 30d --dry-run", "show what was not used for a month"),
        ("ecr-proxy purge --yes '*'", "empty the cache"),
    ),
    settings=SETTINGS,
    add_arguments=add_arguments,
    run=run,
)
