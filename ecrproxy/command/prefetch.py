"""
C{ecr-proxy prefetch}: download images into the cache before clients pull them, through the running daemon.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Final

from ecrproxy.command.prefetching import PASSWORD
from ecrproxy.command.subcommand import REGISTRIES, Invocation, Subcommand

JOBS: Final = 4


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments to the parser.
    """
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="[REGISTRY/]REPOSITORY[:TAG][@DIGEST]; without a registry, in the default one",
    )
    add(
        "--file", metavar="LIST", action="append", default=[], help="read images from a file, one per line; - for stdin"
    )
    add(
        "--manifest",
        metavar="FILE",
        action="append",
        default=[],
        help="read images from Kubernetes manifests or a compose file; images of other registries are skipped",
    )
    add(
        "--platform",
        metavar="OS/ARCH[/VARIANT]",
        action="append",
        default=[],
        help="platform to pull of multi-platform images; repeatable [default: linux and this machine's]",
    )
    add("--all-platforms", action="store_true", help="pull all platforms")
    add("--jobs", metavar="NUMBER", default=str(JOBS), help=f"number of parallel downloads [default: {JOBS}]")
    add("--host", metavar="HOST", action="append", default=[], help="another host name of the proxy in image names")
    add("--proxy-url", metavar="URL", help="the proxy's client port [default: from the settings, on this machine]")
    add(
        "--user",
        metavar="NAME",
        help=f"user name; the password is in {PASSWORD} [default: docker's login, if there is one]",
    )
    add("--ca", metavar="FILE", help="CA of the proxy's certificate [default: the system's]")
    add("--client-certificate", metavar="FILE", help="client certificate and key, if PROXY_CLIENT_CA is set")
    add("--json", action="store_true", help="print the result of each image as JSON")


def _run(call: Invocation) -> int:
    from ecrproxy.command.prefetching.work import run  # noqa: PLC0415 (slow to import)

    return run(call)


PREFETCH: Final = Subcommand(
    name="prefetch",
    summary="download images into the cache before clients pull them",
    description=(
        "Pulls images through the running daemon, which caches them, and discards the data. Cached content is not\n"
        "transferred, so you can repeat an interrupted run. If an image can't be pulled, the others still are, and\n"
        "the exit status is 1."
    ),
    examples=(
        ("ecr-proxy prefetch team/app:1.2 team/base@sha256:...", "prefetch two images for this machine's platform"),
        ("ecr-proxy prefetch --manifest deploy.yaml --platform linux/arm64", "prefetch a Kubernetes manifest's images"),
        ("ecr-proxy prefetch --file images.txt --proxy-url https://proxy.example:5000", "use a proxy elsewhere"),
    ),
    settings=(*REGISTRIES, "port", "listen", "ssl-certificate"),
    add_arguments=add_arguments,
    run=_run,
)
