"""
Which repositories are let in: a pattern that a repository's whole name must match.

A pattern can be such that the time it takes doubles with each character of a name. So a name that was not judged yet
is judged in a thread, one at a time and for half a second at the most, while the event loop goes on. Verdicts are
remembered: what was pulled once costs a look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import regex
from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from ecrproxy.flights import Flights
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.threads import InThread

log = Logger()

MATCH_SECONDS: Final = 0.5
"""How long a pattern may take for a name, in time of the processor."""
WAITING: Final = 20
"""How many names may wait to be judged: they wait for ten seconds at the most."""
REMEMBERED: Final = 8192
"""How many verdicts are kept."""


class Namespaces:
    """
    The repositories whose whole name C{pattern} matches.

    @param in_thread: calls the matching; not a disk's thread, which a bad pattern would keep from its work.
    @param is_other: tells whether a name is that of another registry than the one behind.
    """

    def __init__(
        self,
        pattern: regex.Pattern[str],
        in_thread: InThread,
        is_other: Callable[[str], bool] = lambda _: False,
        seconds: float = MATCH_SECONDS,
    ) -> None:
        self._pattern, self._in_thread, self._is_other, self._seconds = pattern, in_thread, is_other, seconds
        self._verdicts: dict[str, bool] = {}
        self._flights: Flights[bool] = Flights()
        self._turn = DeferredLock()

    def admit_registry(self, name: str) -> None:
        """
        Let the name of the registry pass that a client takes this proxy for a mirror of: containerd's C{ns}.

        @raise RegistryError: if it is another one's. Its repositories may be called the same, and hold something else.
        """
        if self._is_other(name):
            said = f"this proxy is no mirror of {name}"
            raise RegistryError(404, "NAME_UNKNOWN", said, reason=Reason.NAMESPACE)

    async def admit(self, repository: str) -> None:
        """
        Let a repository's name pass.

        @raise RegistryError: if the pattern does not match it, or takes too long to tell.
        """
        verdict = self._verdicts.get(repository)
        if verdict is None:
            if len(self._turn.waiting) >= WAITING and repository not in self._flights:
                raise _undecided()
            verdict = await self._flights.join(repository, lambda: self._judge(repository))
        if not verdict:
            raise RegistryError(403, "DENIED", f"this proxy does not serve {repository}", reason=Reason.NAMESPACE)

    async def _judge(self, repository: str) -> bool:
        try:
            verdict: bool = await self._turn.run(self._in_thread, self._matches, repository)
        except TimeoutError:
            # Not remembered: a machine that was very busy would lock a repository out for good.
            log.warn(
                "PROXY_NAMESPACE_PATTERN took more than {seconds} s for {repository}, refused: make it simpler",
                seconds=self._seconds,
                repository=repository,
            )
            raise _undecided() from None
        if len(self._verdicts) >= REMEMBERED:
            del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[repository] = verdict
        if not verdict:
            log.warn(
                "Refused {repository}: PROXY_NAMESPACE_PATTERN={pattern!r} does not match its whole name;"
                " change the pattern if clients may pull it",
                repository=repository,
                pattern=self._pattern.pattern,
                once=repository,
            )
        return verdict

    def _matches(self, repository: str) -> bool:
        return self._pattern.fullmatch(repository, concurrent=True, timeout=self._seconds) is not None


def _undecided() -> RegistryError:
    said = "the proxy's namespace pattern takes too long for this name"
    return RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "10"}, Reason.NAMESPACE)
