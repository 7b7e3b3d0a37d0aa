"""
The figures that the daemon keeps about itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IReactorTime

log = Logger()

TICK_SECONDS: Final = 0.02
"""How often the event loop is asked for its turn."""


class LoopStall(Service):
    """
    How long the event loop stood still at the most: the time by which its turns come late.

    @param monotonic: seconds on a clock that is never set.
    @ivar longest: in seconds.
    """

    def __init__(self, clock: IReactorTime, monotonic: Callable[[], float]) -> None:
        self.longest = 0.0
        self._monotonic, self._last = monotonic, 0.0
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._last = self._monotonic()
        self._loop.start(TICK_SECONDS, now=False).addErrback(lambda failure: log.failure("Measuring stalls", failure))

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        log.info("The event loop stood still for {longest:.3f} s at the most", longest=self.longest)

    def _turn(self) -> None:
        now = self._monotonic()
        self.longest = max(self.longest, now - self._last - TICK_SECONDS)
        self._last = now
