"""
Each second: write what the index has gathered, and have memory forget what somebody has purged.

That may have been this process, another one on the directory, or a command that worked on it without a daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.index import Index, News
    from ecrproxy.threads import InThread

log = Logger()

LOOK_SECONDS: Final = 1.0


class Purges(Service):
    """
    Looks each second whether there was a purge.

    @param forget: forgets what is held in memory of what was purged.
    """

    def __init__(
        self, index: Index, forget: Callable[[News], object], in_thread: InThread, clock: IReactorTime
    ) -> None:
        self._index, self._forget, self._in_thread = index, forget, in_thread
        self._again: News | None = None
        self._loop = LoopingCall(self._turn)
        self._loop.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(LOOK_SECONDS).addErrback(lambda failure: log.failure("Looking for purges", failure))

    def stopService(self) -> Deferred[None]:
        """
        Stop, once what was gathered is written.
        """
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        return self._turn()

    def _turn(self) -> Deferred[None]:
        turn = self._in_thread(self._index.settle).addCallback(self._learn)
        turn.addErrback(lambda failure: failure.trap(TimeoutError))  # L{Bounded} has told of it
        return turn.addErrback(lambda failure: log.failure("Looking for purges", failure))

    def _learn(self, news: News) -> None:
        # Once more a second later: what was being read when it was removed may have got into memory since.
        again, self._again = self._again, news
        for each in (again, news):
            if each:
                self._forget(each)

    async def look(self) -> None:
        """
        Look now.
        """
        self._learn(await self._in_thread(self._index.settle))
