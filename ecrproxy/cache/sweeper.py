"""
Remove what interrupted transfers have left, while the daemon runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

SWEEP_SECONDS: Final = 60
"""Seconds between two sweeps."""


class Sweeper(Service):
    """
    Sweeps every minute. Any process in the directory may.
    """

    def __init__(self, store: Store, in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._in_thread = store, in_thread
        self._loop = LoopingCall(self._sweep)
        self._loop.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(SWEEP_SECONDS, now=False)  # the start has swept

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _sweep(self) -> Any:  # noqa: ANN401 (a Deferred of nothing)
        swept = self._in_thread(self._store.sweep)
        return swept.addErrback(lambda problem: log.warn("Not swept: {problem}", problem=problem.value, once="sweep"))
