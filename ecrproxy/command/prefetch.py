"""
C{ecr-proxy prefetch}: images brought into the cache before anybody asks for them, through the running daemon.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.prefetching import PASSWORD
from ecrproxy.command.subcommand import REGISTRIES, Call, Subcommand

JOBS: Final = 4


def add_arguments(parser: ArgumentParser) -> None:
    """
    Say what it can be called with.
    """
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="[REGISTRY/]REPOSITORY[:TAG][@DIGEST]; without a registry, of the default one",
    )
    add("--file", metavar="LIST", action="append", default=[], help="read images from a file, one a line; - for stdin")
    add(
        "--manifest",
        metavar="FILE",
        action="append",
        default=[],
        help="read images from Kubernetes manifests or a compose file; those of other registries are left out",
    )
    add(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        action="append",
        default=[],
        help="of images for several platforms pull this one; can be given again [default: linux and this machine's]",
    )
    add("--all-platforms", action="store_true", help="pull them for all platforms")
    add("--jobs", metavar="NUMBER", default=str(JOBS), help=f"blobs that are pulled at a time [default: {JOBS}]")
    add("--host", metavar="HOST", action="append", default=[], help="one more host that images name the proxy by")
    add("--proxy-url", metavar="URL", help="the proxy's client port [default: what the settings say, on this machine]")
    add(
        "--user",
        metavar="NAME",
        help=f"log in; the password is in {PASSWORD} [default: docker's login, if there is one]",
    )
    add("--ca", metavar="FILE", help="CA of the proxy's certificate [default: the system's]")
    add("--client-certificate", metavar="FILE", help="certificate and key to show where PROXY_CLIENT_CA wants one")
    add("--json", action="store_true", help="write what came of each image as JSON")


def _run(call: Call) -> int:
    from ecrproxy.command.prefetching.work import run  # noqa: PLC0415 (imported by who uses it)

    return run(call)


PREFETCH: Final = Subcommand(
    name="prefetch",
    summary="bring images into the cache before anybody asks for them",
    description=(
        "Pulls images through the running daemon, and throws away what comes: it stays in the cache. What is there\n"
        "already is not moved, so a run that was interrupted goes on where it was. One image that can't be had keeps\n"
        "none of the others from being brought in; the exit status is 1 then."
    ),
    examples=(
        ("ecr-proxy prefetch team/app:1.2 team/base@sha256:...", "two images, for this machine's platform"),
        ("ecr-proxy prefetch --manifest deploy.yaml --platform linux/arm64", "what a Kubernetes manifest names"),
        ("ecr-proxy prefetch --file images.txt --proxy-url https://proxy.example:5000", "through a proxy elsewhere"),
    ),
    settings=(*REGISTRIES, "port", "listen", "ssl-certificate"),
    add_arguments=add_arguments,
    run=_run,
)
