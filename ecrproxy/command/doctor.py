"""
C{ecr-proxy doctor}: check everything that the daemon depends on.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.subcommand import Invocation, Subcommand
from ecrproxy.settings.table import SETTINGS

SECONDS: Final = 30.0
"""Timeout for all checks together."""


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    add = parser.add_argument
    image = parser.add_mutually_exclusive_group()
    image.add_argument(
        "--repository", metavar="NAME[:TAG]", help="an image to test each permission with; it is not pulled or kept"
    )
    image.add_argument(
        "--image",
        metavar="NAME:TAG",
        help="the same, and compare what the daemon assumes about ECR with ECR's responses for that image",
    )
    add(
        "--report",
        metavar="FILE",
        help="write the results of --image to a file, without names, digests and secrets; - is the standard output",
    )
    add("--seconds", metavar="NUMBER", default=str(SECONDS), help=f"timeout for all checks [default: {SECONDS:g}]")
    add("--json", action="store_true", help="print the findings as JSON")


def _run(call: Invocation) -> int:
    from ecrproxy.command.checkup.doctor import run  # noqa: PLC0415 (slow to import)

    return run(call)


DOCTOR: Final = Subcommand(
    name="doctor",
    summary="check everything that the daemon depends on",
    description=(
        "Checks credentials, permissions, registry, bucket, DNS, clock, cache directory, ports and settings. Run it\n"
        "on the daemon's machine, as its user. Prints one line for each check: ok, warning, failed or skipped,\n"
        "and below it what to do. The exit status is 1 if a check failed."
    ),
    examples=(
        ("ecr-proxy doctor --repository team/app:1.2", "also test each permission with an image"),
        ("ecr-proxy doctor --image team/app:1.2 --report ecr.txt", "check that ECR behaves as the daemon assumes"),
        ("docker exec PROXY ecr-proxy doctor", "use the settings of a daemon in a container"),
    ),
    settings=[each.name for each in SETTINGS],
    add_arguments=add_arguments,
    run=_run,
)
