"""
The image that the doctor tests permissions with, or checks assumptions about ECR with.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from ecrproxy.command.subcommand import MISUSED, CommandError
from ecrproxy.oci import RegistryError, parse_route
from ecrproxy.registries import Known, Registries, own_name
from ecrproxy.settings.registry_table import Protocol


@dataclass(frozen=True, slots=True)
class TriedImage:
    """
    An image to test the permissions with.

    @ivar name: the repository's name for clients of the registry; C{asked} is its name upstream.
    @ivar reference: a tag or digest; None for any.
    """

    registry: Known
    name: str
    asked: str
    reference: str | None


def image_of(options: Namespace, registries: Registries) -> TriedImage | None:
    """
    Parse the image of the command line; None if there is none.

    @raise CommandError: if it is malformed, or not of a private ECR registry that is configured.
    """
    flag, text = ("--repository", options.repository) if options.image is None else ("--image", options.image)
    if text is None:
        return None
    whole, at, digest = text.partition("@")
    folder, slash, last = whole.rpartition("/")
    last, colon, tag = last.partition(":")
    known, rest = registries.split(folder + slash + last)
    first, slash, _ = rest.partition("/")
    if slash and ("." in first or ":" in first):
        raise CommandError(f"{flag}={text!r}: {first} is not a configured registry", MISUSED)
    if known.table.protocol is not Protocol.ECR:
        said = f"{known.table.name} is not a private ECR registry, so permissions can't be tested"
        raise CommandError(f"{flag}={text!r}: {said}", MISUSED)
    name, asked = own_name(known.table, rest)
    reference = digest if at else tag if colon else None
    if options.image is not None and (at or not colon):
        raise CommandError(f"--image={text!r}: name a tag, as in NAME:TAG", MISUSED)
    try:
        parse_route(f"/v2/{asked}/manifests/{reference or 'latest'}", known.identity)
    except RegistryError as problem:
        raise CommandError(f"{flag}={text!r}: {problem.message}", MISUSED) from None
    return TriedImage(known, name, asked, reference)
