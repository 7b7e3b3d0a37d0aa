"""
Repository access by pattern: the whole name must match.

Some patterns take exponential time. So a match may take two milliseconds in the event loop, a thousand times the usual
time; a slower one runs in a thread, one at a time and for half a second at most. Results are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import regex
from twisted.logger import Logger

from ecrproxy.access.turns import QueueTimeoutError, Turns
from ecrproxy.flights import Flights
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.threads import InThread

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

INLINE_SECONDS: Final = 0.002
"""Maximum CPU time for one name in the event loop."""
MATCH_SECONDS: Final = 0.5
"""Maximum CPU time for one name in a thread."""
LIST_SECONDS: Final = 5.0
"""Maximum seconds for a list of names in a thread."""
LONGEST_WAIT: Final = 10.0
"""Seconds that a name may wait for the thread; after that the client is told to retry."""
REMEMBERED: Final = 8192
"""Number of results that are remembered."""


class Namespaces:
    """
    The repositories whose whole name C{pattern} matches.

    @param in_thread: runs slow matches; not the disk's thread, which a bad pattern would block.
    """

    def __init__(
        self,
        pattern: regex.Pattern[str],
        in_thread: InThread,
        clock: IReactorTime,
        seconds: float = MATCH_SECONDS,
    ) -> None:
        self._pattern, self._in_thread, self._seconds, self._clock = pattern, in_thread, seconds, clock
        self._verdicts: dict[tuple[str, str], bool] = {}
        self._flights: Flights[bool] = Flights()
        self._turns = Turns(1, LONGEST_WAIT, clock)

    async def admit(self, repository: str, registry: str = "") -> None:
        """
        Return if a repository's name matches.

        @param registry: the registry's name in the log, if there are several.
        @raise RegistryError: if the name does not match, or the match takes too long.
        """
        about = registry, repository
        verdict = self._verdicts.get(about)
        if verdict is None and about not in self._flights:
            verdict = self._match_inline(about)
        if verdict is None:
            verdict = await self._flights.join(about, lambda: self._match_in_turn(about))
        if not verdict:
            raise RegistryError(403, "DENIED", f"this proxy does not serve {repository}", reason=Reason.NAMESPACE)

    async def choose(self, repositories: Sequence[str]) -> list[str]:
        """
        Return the names that match. Runs in the thread, with C{LIST_SECONDS} for all names together.

        @raise RegistryError: if that takes too long.
        """
        try:
            async with self._turns.turn():
                return await self._in_thread(self._chosen, repositories)
        except (QueueTimeoutError, TimeoutError):
            raise _undecided("these names") from None

    def _chosen(self, repositories: Sequence[str]) -> list[str]:
        deadline, chosen = self._clock.seconds() + LIST_SECONDS, []
        for each in repositories:
            if self._matches(each):
                chosen.append(each)
            if self._clock.seconds() >= deadline:
                raise TimeoutError
        return chosen

    def _match_inline(self, about: tuple[str, str]) -> bool | None:
        try:
            verdict = self._pattern.fullmatch(about[1], timeout=INLINE_SECONDS) is not None
        except TimeoutError:
            return None
        return self._remember(about, verdict=verdict)

    async def _match_in_turn(self, about: tuple[str, str]) -> bool:
        registry, repository = about
        try:
            async with self._turns.turn():
                verdict: bool = await self._in_thread(self._matches, repository)
        except QueueTimeoutError:
            raise _undecided() from None
        except TimeoutError:
            # Not remembered: a busy machine would lock out a repository permanently.
            log.warn(
                "{setting} took more than {seconds} s for {repository}, refused: make it simpler",
                setting=_setting(registry),
                seconds=self._seconds,
                repository=repository,
                once=("PROXY_NAMESPACE_PATTERN", registry),
            )
            raise _undecided() from None
        return self._remember(about, verdict=verdict)

    def _remember(self, about: tuple[str, str], *, verdict: bool) -> bool:
        if len(self._verdicts) >= REMEMBERED:
            del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[about] = verdict
        registry, repository = about
        if not verdict:
            log.warn(
                "Refused {repository}: {setting}={pattern!r} does not match its whole name;"
                " change the pattern if clients may pull it",
                repository=repository,
                setting=_setting(registry),
                pattern=self._pattern.pattern,
                once=about,
            )
        return verdict

    def _matches(self, repository: str) -> bool:
        return self._pattern.fullmatch(repository, concurrent=True, timeout=self._seconds) is not None


def _setting(registry: str) -> str:
    return f"the namespace pattern of {registry}" if registry else "PROXY_NAMESPACE_PATTERN"


def _undecided(what: str = "this name") -> RegistryError:
    said = f"the proxy's namespace pattern takes too long for {what}"
    return RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "10"}, Reason.NAMESPACE)
