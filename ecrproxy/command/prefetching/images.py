"""
Image names, and what they mean in the registry. Pure.

The grammar is docker's: C{[HOST/]REPOSITORY[:TAG][@DIGEST]}. The part before the first slash is a host if it has a dot
or a colon, or is C{localhost}. A digest overrides a tag; without either the tag is C{latest}.

The registry is sent to the daemon as C{ns}, except for the default registry. A path prefix would have the same effect.
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
"""A placeholder for the daemon's default registry."""
_HUB: Final = "docker.io"


class ForeignImageError(ValueError):
    """
    The image belongs to a registry that the daemon does not serve.
    """


@dataclass(frozen=True, slots=True)
class WantedImage:
    """
    An image of a registry that the daemon serves.

    @ivar name: as the user wrote it.
    @ivar route: the route of its manifest.
    """

    name: str
    route: Route


def parse_image(
    text: str, hosts: Collection[str], registries: Registries | None = None, *, bare: bool = True
) -> WantedImage:
    """
    Parse an image's name.

    @param hosts: the proxy's host names, in lower case.
    @param registries: the configured registries; None without a configuration.
    @param bare: True if a name without a host belongs to the default registry instead of Docker Hub.
    @raise ForeignImageError: if the daemon does not serve its registry.
    @raise ValueError: if the name is invalid.
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
        return WantedImage(text, route if registries is None else _meant(route, host, hosts, registries))
    except UnknownRegistryError:
        raise _foreign(host, named=named) from None
    except RegistryError as problem:
        raise ValueError(problem.message) from None


def _foreign(host: str, *, named: bool) -> ForeignImageError:
    if not named:
        return ForeignImageError("of Docker Hub, because the name has no registry")
    return ForeignImageError(f"of another registry, {host}; --host {host} says that it is this proxy's")


def _meant(route: Route, host: str, hosts: Collection[str], registries: Registries) -> Route:
    """
    Return the registry and repository that a name means to the daemon.
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
    Return the request target for a route.
    """
    registry = route.repository.registry
    return route.path if registry == _DEFAULT else f"{route.path}?ns={quote(registry.host, safe='[]:')}"


def listed_images(text: str) -> Iterable[str]:
    """
    Parse a list with one name per line; C{#} starts a comment.
    """
    for line in text.splitlines():
        name = line.partition("#")[0].strip()
        if name:
            yield name
