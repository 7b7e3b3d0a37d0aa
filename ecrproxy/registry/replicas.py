"""
A registry and its replicas: other registries into which ECR copies its repositories, under the same names.

Rules:

- What is named by its digest may come from any of them: from a replica where the registry fails, throttles or takes
  longer than C{SLOW_SECONDS}. The digest is verified whoever gave it.
- A 404 or a denial of the registry is its answer. That of a replica is none: it may not have the copy yet.
- Tags and lists are the registry's alone. A replica says what it has of a tag when it is asked for that: it may be old.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IResponse

from ecrproxy.oci import RegistryError, Route
from ecrproxy.registry.bucket import Blob, UnavailableError
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.upstream import Head, Manifest, Upstream
from ecrproxy.registry.wire import Wire

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()
T = TypeVar("T")
Ask = Callable[[], Coroutine[Any, Any, T]]

SLOW_SECONDS: Final = 3.0
"""Seconds without an answer after which the next is asked, too; the one before may still answer first."""
_WHOLE: Final = 2 * SLOW_SECONDS
"""The same where a registry and a bucket have to answer: where the blob lies has had its own seconds by then."""


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

    async def blob(self, route: Route, stop: int | None = None, start: int = 0) -> Blob:
        """
        See L{Upstream.blob}.
        """
        ask = partial(super().blob, route, stop, start)
        others = [partial(each.blob, route, stop, start) for each in self.replicas]
        return await self._sooner(route, ask, others, _WHOLE)

    async def locate(self, route: Route) -> tuple[str, IResponse | None]:
        """
        See L{Upstream.locate}: the rest of a blob may lie elsewhere than its beginning.
        """
        ask = partial(super().locate, route)
        return await self._sooner(route, ask, [partial(each.locate, route) for each in self.replicas])

    def _sooner(
        self, route: Route, ask: Ask[T], others: Sequence[Ask[T]], seconds: float = SLOW_SECONDS
    ) -> Deferred[T]:
        return _Race(route, [ask, *others], seconds, self.clock.callLater).won


class _Race(Generic[T]):
    """
    Ask one after the other, until one answers.

    @ivar won: fires with the first answer, or with what became of the first that was asked. Cancelling it ends all.
    """

    def __init__(
        self, route: Route, asks: Sequence[Ask[T]], seconds: float, call_later: Callable[..., IDelayedCall]
    ) -> None:
        self._route, self._left, self._seconds, self._call_later = route, list(asks), seconds, call_later
        self._asked: list[Deferred[T]] = []
        self._failed: dict[int, Failure] = {}
        self._over = False
        self._limit: IDelayedCall | None = None
        self.won: Deferred[T] = Deferred(lambda _: self._stop())
        self._next()

    def _next(self) -> None:
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        ask, number = self._left.pop(0), len(self._asked)
        if number:
            log.info("Asking a replica for {path}", path=self._route.path, once=self._route.repository)
        if self._left:
            self._limit = self._call_later(self._seconds, self._next)
        asked = Deferred.fromCoroutine(ask())
        self._asked.append(asked)
        asked.addCallbacks(self._answered, self._lost, errbackArgs=(number,))

    def _answered(self, answer: T) -> None:
        if not self._over:
            self._stop()
            self.won.callback(answer)

    def _lost(self, failure: Failure, number: int) -> None:
        if self._over:
            return
        self._failed[number] = failure
        final = number == 0 and not failure.check(UnavailableError)
        if not final and not (number and failure.check(RegistryError) is None):
            if self._left:
                self._next()
                return
            if len(self._failed) < len(self._asked):
                return
        self._stop()
        self.won.errback(self._failed.get(0, failure))

    def _stop(self) -> None:
        self._over = True
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        for each in self._asked:
            each.cancel()
