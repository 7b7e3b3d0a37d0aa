"""
The state of the cache directory: one check of the disk serves all callers for two seconds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.cache.troubles import TroubleKind

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

FRESH_SECONDS: Final = 2.0
"""How long the result of a check is valid."""
PATIENCE: Final = 2.0
"""Seconds that a check may take before the disk is reported as hanging. It goes on, and no other starts meanwhile."""

HANGS: Final = "hang"
TROUBLES: Final = (*(kind.name.lower() for kind in TroubleKind), HANGS)
"""Names of the troubles in metrics: a kind of call that fails, or a check that takes longer than C{PATIENCE}."""


@dataclass(frozen=True, slots=True)
class ConditionReport:
    """
    The result of a check.

    @ivar reasons: what is wrong with the directory.
    @ivar filled: True if there is content.
    @ivar index: what is wrong with the index.
    """

    reasons: tuple[str, ...] = ()
    filled: bool = False
    index: str = ""


class Condition:
    """
    The condition of one cache directory.

    @param in_thread: runs the check in a thread of its own: all other threads may be waiting for that disk.
    """

    def __init__(self, store: Store, in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._in_thread, self._clock = store, in_thread, clock
        self._last, self._fresh_until = ConditionReport(), float("-inf")
        self._began: float | None = None
        self._waiting: list[Deferred[None]] = []

    def has(self, trouble: str) -> bool:
        """
        Return True while this one of C{TROUBLES} lasts.
        """
        if trouble == HANGS:
            return self._began is not None and self._clock.seconds() >= self._began + PATIENCE
        return TroubleKind[trouble.upper()] in self._store.troubles.standing()

    async def latest(self) -> ConditionReport:
        """
        Return the result of the last check, after a new one if it is older than C{FRESH_SECONDS}.
        """
        now = self._clock.seconds()
        if self._began is None and now >= self._fresh_until:
            self._begin(now)
        if self._began is not None and now < self._began + PATIENCE:
            await self._wait(self._began + PATIENCE - now)
        if self._began is None:
            return self._last
        hangs = f"the cache directory's disk has not answered for {self._clock.seconds() - self._began:.0f} s"
        return replace(self._last, reasons=(*self._last.reasons, hangs))

    def _begin(self, now: float) -> None:
        self._began = now
        self._in_thread(self._look).addBoth(self._ended)

    def _look(self) -> ConditionReport:
        return ConditionReport(
            tuple(self._store.checks.reasons()), self._store.has_content(), self._store.index.trouble
        )

    def _ended(self, found: ConditionReport | Failure) -> None:
        self._began, self._fresh_until = None, self._clock.seconds() + FRESH_SECONDS
        if isinstance(found, Failure):
            log.failure("Looking at the cache directory", found)
            found = replace(self._last, reasons=(f"the cache directory can't be looked at: {found.value}",))
        self._last = found
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.called:
                waiter.callback(None)

    async def _wait(self, seconds: float) -> None:
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        with contextlib.suppress(DeferredTimeoutError):
            await waiter.addTimeout(seconds, self._clock)
