"""
The registries as they are asked: each with its own connections, circuit and quotas. Tokens are shared.

A registry is wired when it is asked for first. Those that a wildcard stands for are forgotten, the least recently asked
first, when there are more than C{MOST}. A reload makes others of them, which keep what has not changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ecrproxy.admin.status import Asking
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Route
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.upstream import Upstream

MOST: Final = 1000
"""Registries that are wired at the same time."""


class Upstreams:
    """
    Gives the upstream of a route.

    @param registries: those that may be asked.
    @param make: wires one.
    @param before: those of before a reload. Registries whose tables are the same stay wired as they are.
    """

    def __init__(
        self,
        registries: Registries,
        make: Callable[[Known], tuple[Upstream, Asking]],
        before: Upstreams | None = None,
    ) -> None:
        self._registries, self._make = registries, make
        self._made: OrderedDict[RegistryId, tuple[Upstream, Asking]] = OrderedDict()
        kept = {} if before is None else before.unchanged(registries)
        for known in registries.named:
            self._made[known.identity] = kept.pop(known.identity) if known.identity in kept else make(known)
        self._made.update(kept)  # of wildcards
        if before is not None:
            before.leave(self._made)

    def __call__(self, route: Route) -> Upstream:
        """
        Return the upstream of the registry that C{route} is about.
        """
        return self._of(route.repository.registry)[0]

    def unchanged(self, registries: Registries) -> dict[RegistryId, tuple[Upstream, Asking]]:
        """
        Return what is wired of which other tables say the same.
        """
        return {
            each: made for each, made in self._made.items() if _known(registries, each) == self._registries.of(each)
        }

    def leave(self, staying: Mapping[RegistryId, tuple[Upstream, Asking]]) -> None:
        """
        Stop the probes of all registries but those that stay: one that fails is probed until it answers.
        """
        for each, made in self._made.items():
            if staying.get(each) != made:
                made[0].leave()

    def askings(self) -> Sequence[Asking]:
        """
        List what asks, the default first.
        """
        return [asking for _, asking in self._made.values()]

    def _of(self, identity: RegistryId) -> tuple[Upstream, Asking]:
        made = self._made.get(identity)
        if made is None:
            made = self._made[identity] = self._make(self._registries.of(identity))
            if len(self._made) > MOST:
                gone = next(each for each in self._made if self._registries.is_by_wildcard(each))
                self._made.pop(gone)[0].leave()
        elif self._registries.is_by_wildcard(identity):
            self._made.move_to_end(identity)
        return made


def _known(registries: Registries, identity: RegistryId) -> Known | None:
    try:
        return registries.of(identity)
    except LookupError:
        return None
