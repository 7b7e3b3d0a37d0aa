"""
C{ecr-proxy ls}: list the contents of the cache.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any, Final

from ecrproxy.command.holdings import SETTINGS, add_offline, holdings_of, naming_in, survey_of, targets_of
from ecrproxy.command.subcommand import FINE, WRONG, Invocation, Subcommand
from ecrproxy.command.survey import CachedImage, CacheEntry, Survey
from ecrproxy.command.terminal import age_in_words, counted, size_in_words, table

_SHORT: Final = len("sha256:") + 12


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    parser.add_argument(
        "repositories",
        metavar="REPOSITORY",
        nargs="*",
        help="list only this repository, [REGISTRY/]NAME[:TAG], which may have * and ?",
    )
    parser.add_argument("--digests", action="store_true", help="show the digests of the manifests")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: times in seconds since the epoch, sizes in bytes"
    )
    add_offline(parser)


def run(call: Invocation) -> int:
    """
    Run the subcommand; return the exit status.
    """
    options, holdings = call.options, holdings_of(call)
    survey = survey_of(call, holdings)
    naming = naming_in(call, survey)
    targets = targets_of(options.repositories, naming)
    repositories: dict[str, list[CacheEntry]] = {}
    for repository, entries in survey.by_repository(naming.called).items():
        here = [each for each in targets if naming.is_of(each.repository, repository)]
        named = entries if not targets else [entry for entry in entries if any(each.names(entry) for each in here)]
        if named:
            repositories[naming.called(repository)] = named
    if targets and not repositories:
        call.terminal.say(f"ecr-proxy: nothing in the cache matches {' '.join(options.repositories)}")
    told = [_told(survey, name, entries) for name, entries in repositories.items()]
    total = survey.size(_all(survey, [each for entries in repositories.values() for each in entries]))
    if options.json:
        call.terminal.tell({"repositories": told, "bytes": total})
    else:
        images = [(name, image) for name, entries in repositories.items() for image in survey.images(entries)]
        _print(call, images, len(repositories), total)
    return FINE if repositories or not options.repositories else WRONG


def _all(survey: Survey, entries: Sequence[CacheEntry]) -> set[str]:
    return survey.reached(digest for each in entries for digest in each.digests)


def _told(survey: Survey, name: str, entries: Sequence[CacheEntry]) -> dict[str, Any]:
    return {
        "repository": name,
        "bytes": survey.size(_all(survey, entries)),
        "used": max(each.used for each in entries),
        "images": [
            {
                "tag": image.tag,
                "digests": list(image.digests),
                "bytes": image.bytes,
                "used": image.used,
                "moves": list(image.moves),
            }
            for image in survey.images(entries)
        ],
    }


def _print(call: Invocation, images: Sequence[tuple[str, CachedImage]], repositories: int, total: int) -> None:
    now = call.world.now()
    rows = [["REPOSITORY", "TAG", "SIZE", "LAST USE"]]
    for name, image in images:
        tag = image.tag if image.tag is not None else f"@{image.digests[0][:_SHORT]}"
        rows.append([name, tag, size_in_words(image.bytes), age_in_words(now - image.used)])
    if call.options.digests:
        for row, digests in zip(rows, ["DIGEST", *(" ".join(image.digests) for _, image in images)], strict=True):
            row.insert(2, digests)
    for line in table(rows, right=[len(rows[0]) - 2]):
        call.terminal.print(line)
    held = f"{counted(len(images), 'image')} of {counted(repositories, 'repository', 'repositories')}"
    call.terminal.print(f"{held}, {size_in_words(total)}; shared content counts once")


LS: Final = Subcommand(
    name="ls",
    summary="list the contents of the cache",
    description=(
        "Lists repositories and their tags, with size in the cache and last use. Repositories outside the default\n"
        "registry are listed with the registry. Manifests without a tag are listed by digest. Content that several\n"
        "images share counts in the size of each image, and once in the total."
    ),
    examples=(
        ("ecr-proxy ls", "list everything"),
        ("ecr-proxy ls 'team/*' --digests", "list the repositories of a team, with digests"),
        ("ecr-proxy ls '444455556666.dkr.ecr.us-east-1.amazonaws.com/*'", "list the contents of a registry"),
        ("ecr-proxy ls --json | jq '.repositories[] | {repository, bytes}'", "output for a program"),
        ("ecr-proxy ls --json | jq '.repositories[].images[] | select(.moves != [])'", "list the tags that have moved"),
        ("ecr-proxy ls --offline --cache-dir /var/cache/ecr-proxy", "list a cache without a running daemon"),
    ),
    settings=SETTINGS,
    add_arguments=add_arguments,
    run=run,
)
