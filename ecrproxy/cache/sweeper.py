"""
Remove what interrupted transfers have left, while the daemon runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from twisted.application.service import Service

from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

SWEEP_SECONDS: Final = 60
"""Seconds between two sweeps."""


class Sweeper(Service):
    """
    Sweeps every minute. Any process in the directory may.
    """

    def __init__(self, store: Store, in_thread: InThread, clock: IReactorTime) -> None:
        self._turns = Periodic("Sweeping the cache directory", lambda: in_thread(store.sweep), clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._turns.start(SWEEP_SECONDS, now=False)  # counting has swept

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._turns.stop()
