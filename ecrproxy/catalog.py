"""
The catalog: the repositories of the default registry that clients may pull from.

Concurrent requests share one request to ECR; its result is cached for a short time, failures too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from twisted.logger import Logger

from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.registry.aws import CredentialsError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

KEPT_SECONDS: Final = 60.0
"""Seconds for which a list is cached."""
FAILED_SECONDS: Final = 5.0
"""Seconds without a request to ECR after a failure."""
PATIENCE: Final = 25.0
"""Seconds that clients wait for ECR."""
_FLIGHT: Final = "catalog"


class Catalog:
    """
    The repositories that clients may pull from, page by page.

    @param ask: returns all names in order, asking ECR in a thread.
    @param choose: drops repositories that no client may pull.
    @param clock: tells the time and schedules calls.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[str]]],
        choose: Callable[[Sequence[str]], Awaitable[Sequence[str]]],
        clock: IReactorTime,
    ) -> None:
        self._ask, self._choose, self._clock = ask, choose, clock
        self._flights: Flights[Sequence[str]] = Flights(foreseen=RegistryError)
        self._names: Sequence[str] = ()
        self._failure: Callable[[], RegistryError] | None = None
        self._until, self._late = float("-inf"), False

    async def page(self, last: str, most: int) -> tuple[Sequence[str], bool]:
        """
        Return up to C{most} names after C{last}, and whether there are more.

        @raise RegistryError: if ECR does not list them.
        """
        names = await self._latest()
        start = bisect_right(names, last)
        return names[start : start + most], 0 < most < len(names) - start

    async def _latest(self) -> Sequence[str]:
        if self._clock.seconds() < self._until:
            if self._failure is not None:
                raise self._failure()
            return self._names
        if self._late:
            raise _silent()
        try:
            return await within(PATIENCE, self._join(), self._clock.callLater)
        except DeadlineExceededError:
            self._late = True
            raise _silent() from None

    async def _join(self) -> Sequence[str]:
        return await self._flights.join(_FLIGHT, self._fetch)

    async def _fetch(self) -> Sequence[str]:
        try:
            self._names, self._failure, kept = await self._choose(await self._ask()), None, KEPT_SECONDS
        except Exception as problem:  # noqa: BLE001 (botocore raises many: each is reported; the next try may succeed)
            self._failure, kept = _failure(problem), FAILED_SECONDS
        self._until, self._late = self._clock.seconds() + kept, False
        if self._failure is not None:
            raise self._failure()
        return self._names


def _failure(problem: Exception) -> Callable[[], RegistryError]:
    """
    Log a failure, and return a factory of the error for clients.
    """
    if isinstance(problem, RegistryError):
        return partial(
            RegistryError, problem.status, problem.code, problem.message, problem.headers, reason=problem.reason
        )
    said = str(problem).strip().partition("\n")[0][:300] or type(problem).__name__
    if isinstance(problem, CredentialsError):
        advice, status, code, reason = "allow ecr:DescribeRepositories", 403, "DENIED", Reason.ECR_DENIED
        told = "ECR does not let this proxy list repositories; its log says why"
    else:
        advice, status, code, reason = "next try when a client asks", 502, "UNAVAILABLE", Reason.FAILING
        told = "ECR did not list its repositories; the proxy's log says why"
    log.error("/v2/_catalog: {problem}; {advice}", problem=said, advice=advice, once=("catalog", code))
    return partial(RegistryError, status, code, told, {} if status == 403 else _RETRY, reason=reason)  # noqa: PLR2004


def _silent() -> RegistryError:
    said = f"ECR has not listed its repositories within {PATIENCE:.0f} s"
    return RegistryError(504, "UNAVAILABLE", said, _RETRY, Reason.UNREACHABLE)


_RETRY: Final = {"Retry-After": "5"}
