"""
The registries' upstreams, each with its own connections, circuit breaker and quotas. Tokens are shared.

An upstream is created on first use. Beyond C{MOST}, the least recently used of those that match a wildcard is
dropped. A reload creates a new set, which reuses the upstreams whose settings have not changed.
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
"""Maximum number of upstreams."""


class Upstreams:
    """
    Returns the upstream of a route.

    @param registries: the registries that may be contacted.
    @param make: creates an upstream.
    @param before: those before a reload. Upstreams of registries with unchanged tables are reused.
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
        Return the upstream of C{route}'s registry.
        """
        return self._of(route.repository.registry)[0]

    def unchanged(self, registries: Registries) -> dict[RegistryId, tuple[Upstream, Asking]]:
        """
        Return the upstreams whose tables are the same in C{registries}.
        """
        return {
            each: made for each, made in self._made.items() if _known(registries, each) == self._registries.of(each)
        }

    def leave(self, staying: Mapping[RegistryId, tuple[Upstream, Asking]]) -> None:
        """
        Stop the probes of all upstreams except those in C{staying}; a failing registry is probed until it answers.
        """
        for each, made in self._made.items():
            if staying.get(each) != made:
                made[0].leave()

    def askings(self) -> Sequence[Asking]:
        """
        Return the clients of the registries, the default first.
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
