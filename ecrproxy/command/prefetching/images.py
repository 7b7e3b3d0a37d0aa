"""
How images are called by people, and what that is in the registry. Pure.

The grammar is docker's: C{[HOST/]REPOSITORY[:TAG][@DIGEST]}. What stands before the first slash is a host if it has a
dot or a colon, or is C{localhost}. A digest wins over a tag; without either it is C{latest}.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from ecrproxy.identity import RegistryId
from ecrproxy.oci import RegistryError, Route, parse_route

_REGISTRY: Final = RegistryId("the daemon's")
"""Which one it is, the daemon knows."""


class ForeignImageError(ValueError):
    """
    An image of another registry.
    """


@dataclass(frozen=True, slots=True)
class Image:
    """
    One image of the registry.

    @ivar name: as somebody wrote it.
    @ivar route: its manifest.
    """

    name: str
    route: Route


def parse_image(text: str, hosts: Collection[str], *, bare: bool = True) -> Image:
    """
    Understand an image's name.

    @param hosts: under which the registry is known, in lower case.
    @param bare: whether a name without a host is one of this registry's.
    @raise ForeignImageError: if it is another registry's.
    @raise ValueError: if it is none.
    """
    first, slash, rest = text.partition("/")
    named = bool(slash) and ("." in first or ":" in first or first == "localhost")
    if named and first.lower() not in hosts:
        raise ForeignImageError(f"of another registry, {first}; --host {first} says that it is this proxy's")
    if not named and not bare:
        raise ForeignImageError("of Docker Hub, for it names no registry")
    name, at, digest = (rest if named else text).partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon:
        repository, tag = name, "latest"
    if at and ":" not in digest:
        raise ValueError("what follows the @ is not a digest")
    try:
        return Image(text, parse_route(f"/v2/{repository}/manifests/{digest if at else tag}", _REGISTRY))
    except RegistryError as problem:
        raise ValueError(problem.message) from None


def listed_images(text: str) -> Iterable[str]:
    """
    Read a list: one name a line; what follows a C{#} says nothing.
    """
    for line in text.splitlines():
        name = line.partition("#")[0].strip()
        if name:
            yield name
