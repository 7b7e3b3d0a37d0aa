"""
A registry and its replicas: other registries into which ECR replicates its repositories, under the same names.

Rules:

- Content named by digest may come from any of them: from a replica if the registry fails, throttles or takes
  longer than C{SLOW_SECONDS}. The digest is verified in each case.
- After a replica has answered instead, it is asked after C{SOON_SECONDS} for the next C{LATE_SECONDS}. Its answers are
  not reported to the circuit: a slow registry must still be asked for its tags.
- A 404 or a denial of the registry is an answer. That of a replica is not: it may not have the copy yet.
- Tags and lists come from the registry alone. A replica is asked for a tag only on request: its answer may be old.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.web.iweb import IResponse

from ecrproxy.oci import Route
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.race import SLOW_SECONDS, Ask, Race
from ecrproxy.registry.unavailable import is_passed_on
from ecrproxy.registry.upstream import Head, Manifest, Upstream
from ecrproxy.registry.wire import Wire

log = Logger()
T = TypeVar("T")

_WHOLE: Final = 2 * SLOW_SECONDS
"""The same if a registry and a bucket have to answer: the registry has had its own seconds by then."""

SOON_SECONDS: Final = 0.5
"""The same after the registry was slow: enough for one that answers again."""
LATE_SECONDS: Final = 30.0
"""Seconds for which it then counts as slow. After that, one request waits for it."""


class Replicated(Upstream):
    """
    A registry that has replicas.

    @param replicas: in the order in which they are asked.
    """

    def __init__(
        self, endpoint: Endpoint, wire: Wire, replicas: Sequence[Upstream], *, stall_seconds: float = 30
    ) -> None:
        super().__init__(endpoint, wire, stall_seconds=stall_seconds)
        self.replicas = replicas
        self._late_until = 0.0

    def leave(self) -> None:
        """
        See L{Upstream.leave}.
        """
        for each in self.replicas:
            each.leave()
        super().leave()

    async def head_manifest(self, route: Route, accept: str) -> Head:
        """
        See L{Upstream.head_manifest}.
        """
        ask = partial(super().head_manifest, route, accept)
        if route.digest is None:
            return await ask()
        return await self._sooner(route, ask, [partial(each.head_manifest, route, accept) for each in self.replicas])

    async def manifest(self, route: Route, accept: str) -> Manifest:
        """
        See L{Upstream.manifest}.
        """
        ask = partial(super().manifest, route, accept)
        if route.digest is None:
            return await ask()
        return await self._sooner(route, ask, [partial(each.manifest, route, accept) for each in self.replicas])

    async def blob_size(self, route: Route) -> int:
        """
        See L{Upstream.blob_size}.
        """
        ask = partial(super().blob_size, route)
        return await self._sooner(route, ask, [partial(each.blob_size, route) for each in self.replicas], _WHOLE)

    async def blob(self, route: Route, stop: int | None = None, start: int = 0, *, ahead: bool = False) -> BlobSource:
        """
        See L{Upstream.blob}. Replicas are not asked for what no client waits for, except for the rest after a break.
        """
        ask = partial(super().blob, route, stop, start, ahead=ahead)
        others = [partial(each.blob, route, stop, start) for each in self.replicas]
        blob = await (ask() if ahead else self._sooner(route, ask, others, _WHOLE))
        blob.copies = (self, *self.replicas)
        return blob

    async def locate(self, route: Route, span: str = "", *, ahead: bool = False) -> tuple[str, IResponse | None]:
        """
        See L{Upstream.locate}: the rest of a blob may be elsewhere than its beginning.
        """
        if ahead:
            return await super().locate(route, span, ahead=ahead)
        ask = partial(super().locate, route, span)
        return await self._sooner(route, ask, [partial(each.locate, route, span) for each in self.replicas])

    def _sooner(
        self, route: Route, ask: Ask[T], others: Sequence[Ask[T]], seconds: float = SLOW_SECONDS
    ) -> Deferred[T]:
        was_late = self.clock.seconds() < self._late_until

        async def instead(other: Ask[T]) -> T:
            answer = await other()
            if not was_late:
                self._late_until = self.clock.seconds() + LATE_SECONDS
            return answer

        def asking(number: int) -> None:
            if number:
                log.info("Asking a replica for {path}", path=route.path, once=route.repository)

        asks: list[Ask[T]] = [ask, *(partial(instead, each) for each in others)]
        return Race(asks, SOON_SECONDS if was_late else seconds, self.clock.callLater, is_passed_on, asking).won
