"""
Have what is held in memory forgotten when somebody has purged the directory.

That may have been this process, another daemon on the directory, or a command that worked on it without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

LOOK_SECONDS: Final = 1.0


class Purges(Service):
    """
    Looks each second whether there was a purge.

    @param forget: forgets what is held in memory.
    """

    def __init__(self, store: Store, forget: Callable[[], object], in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._forget, self._in_thread = store, forget, in_thread
        self._last: tuple[int, int] | None = None
        self._again = False
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(LOOK_SECONDS).addErrback(lambda failure: log.failure("Looking for purges", failure))

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _turn(self) -> Any:  # noqa: ANN401 (a Deferred of nothing)
        return self._in_thread(self._store.last_purge).addCallback(self._learn)

    def _learn(self, last: tuple[int, int]) -> None:
        # Once more a second later: what was being read when it was removed may have got into memory since.
        purged = self._last not in (None, last)
        if purged or self._again:
            self._forget()
        self._last, self._again = last, purged

    async def look(self) -> None:
        """
        Look now.
        """
        self._learn(await self._in_thread(self._store.last_purge))
