"""
How images are called by people, and what that is in the registry. Pure.

The grammar is docker's: C{[HOST/]REPOSITORY[:TAG][@DIGEST]}. What stands before the first slash is a host if it has a
dot or a colon, or is C{localhost}. A digest wins over a tag; without either it is C{latest}.

Which registry is meant, the daemon is told by C{ns}, unless it is the default: a path prefix would say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote, urlsplit

from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import RegistryError, Route, parse_route
from ecrproxy.registries import Registries, UnknownRegistryError

_DEFAULT: Final = RegistryId("the daemon's")
"""The default registry: which one it is, the daemon knows."""
_HUB: Final = "docker.io"


class ForeignImageError(ValueError):
    """
    An image of another registry.
    """


@dataclass(frozen=True, slots=True)
class Image:
    """
    One image of a registry that the daemon is a proxy of.

    @ivar name: as somebody wrote it.
    @ivar route: its manifest.
    """

    name: str
    route: Route


def parse_image(text: str, hosts: Collection[str], registries: Registries | None = None, *, bare: bool = True) -> Image:
    """
    Understand an image's name.

    @param hosts: under which the proxy is known, in lower case.
    @param registries: those of the configuration; None if there is none.
    @param bare: whether a name without a host is the default registry's, and not Docker Hub's.
    @raise ForeignImageError: if it is of a registry that the daemon is no proxy of.
    @raise ValueError: if it is none.
    """
    first, slash, rest = text.partition("/")
    named = bool(slash) and ("." in first or ":" in first or first == "localhost")
    host = first.lower() if named else "" if bare else _HUB
    name, at, digest = (rest if named else text).partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon:
        repository, tag = name, "latest"
    if at and ":" not in digest:
        raise ValueError("what follows the @ is not a digest")
    if host not in hosts and registries is None and host:
        raise _foreign(host, named=named)
    try:
        route = parse_route(f"/v2/{repository}/manifests/{digest if at else tag}", _DEFAULT)
        return Image(text, route if registries is None else _meant(route, host, hosts, registries))
    except UnknownRegistryError:
        raise _foreign(host, named=named) from None
    except RegistryError as problem:
        raise ValueError(problem.message) from None


def _foreign(host: str, *, named: bool) -> ForeignImageError:
    if not named:
        return ForeignImageError("of Docker Hub, for it names no registry")
    return ForeignImageError(f"of another registry, {host}; --host {host} says that it is this proxy's")


def _meant(route: Route, host: str, hosts: Collection[str], registries: Registries) -> Route:
    """
    Find the registry and the repository that a name means to the daemon.
    """
    own = urlsplit(f"//{host}").hostname or ""
    if not host or host in hosts or registries.is_own(own):
        chosen = registries.choose(route, None, own)
    else:
        chosen = registries.choose(route, host, "")
    known = chosen.registry
    if known is registries.default and registries.split(chosen.name) == (known, chosen.name):
        return replace(route, repository=Repository(_DEFAULT, chosen.name))
    return replace(route, repository=Repository(RegistryId.of_host(known.table.name), chosen.name))


def target(route: Route) -> str:
    """
    Return what to ask the daemon for.
    """
    registry = route.repository.registry
    return route.path if registry == _DEFAULT else f"{route.path}?ns={quote(registry.host, safe='[]:')}"


def listed_images(text: str) -> Iterable[str]:
    """
    Read a list: one name a line; what follows a C{#} says nothing.
    """
    for line in text.splitlines():
        name = line.partition("#")[0].strip()
        if name:
            yield name
