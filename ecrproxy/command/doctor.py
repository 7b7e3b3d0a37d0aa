"""
C{ecr-proxy doctor}: all that the daemon stands on, looked at from where it runs, a line each.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.subcommand import Call, Subcommand
from ecrproxy.settings.config import SETTINGS

SECONDS: Final = 30.0
"""How long all of it may take."""


def add_arguments(parser: ArgumentParser) -> None:
    """
    Say what it can be called with.
    """
    add = parser.add_argument
    image = parser.add_mutually_exclusive_group()
    image.add_argument(
        "--repository", metavar="NAME[:TAG]", help="an image to try each permission on; nothing of it is pulled or kept"
    )
    image.add_argument(
        "--image",
        metavar="NAME:TAG",
        help="the same, and hold what the daemon assumes of ECR against how it answers about that image",
    )
    add(
        "--report",
        metavar="FILE",
        help="write what came of --image to a file, without names, digests and secrets; - is the standard output",
    )
    add("--seconds", metavar="NUMBER", default=str(SECONDS), help=f"for all of it together [default: {SECONDS:g}]")
    add("--json", action="store_true", help="write what was found as JSON")


def _run(call: Call) -> int:
    from ecrproxy.command.checkup.doctor import run  # noqa: PLC0415 (imported by who uses it)

    return run(call)


DOCTOR: Final = Subcommand(
    name="doctor",
    summary="look at all that the daemon stands on",
    description=(
        "Looks at credentials, permissions, registry, bucket, names, clock, cache directory, ports and settings, from\n"
        "where it is run, as whom it is run: that should be the daemon's machine and user. Writes a line for each\n"
        "thing: ok, warning, failed or skipped, and below it what to do. The exit status is 1 if something failed."
    ),
    examples=(
        ("ecr-proxy doctor --repository team/app:1.2", "try each permission on an image as well"),
        ("ecr-proxy doctor --image team/app:1.2 --report ecr.txt", "see whether ECR does what the daemon assumes"),
        ("docker exec PROXY ecr-proxy doctor", "with the settings of a daemon in a container"),
    ),
    settings=[each.name for each in SETTINGS],
    add_arguments=add_arguments,
    run=_run,
)
