"""
Every second, write the index's pending changes, and drop purged items from memory.

The purge may come from this process, from another one on the directory, or from a command that ran without a daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service

from ecrproxy.cache.purge_log import News
from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.index import Index
    from ecrproxy.threads import InThread

LOOK_SECONDS: Final = 1.0


class Purges(Service):
    """
    Checks for purges every second.

    @param forget: drops purged items from memory.
    """

    def __init__(
        self, index: Index, forget: Callable[[News], object], in_thread: InThread, clock: IReactorTime
    ) -> None:
        self._index, self._forget, self._in_thread = index, forget, in_thread
        self._missed = False
        self._loop = Periodic("Looking for purges", self.look, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(LOOK_SECONDS)

    def stopService(self) -> Deferred[object]:
        """
        Stop after writing pending changes.
        """
        super().stopService()
        self._loop.stop()
        written: Deferred[object] = self._in_thread(self._index.settle)
        return written.addErrback(lambda failure: failure.trap(OSError))

    async def look(self) -> None:
        """
        Check now.

        @raise OSError: if the disk doesn't answer. Once it does, everything in memory is dropped.
        """
        try:
            news = await self._in_thread(self._index.settle)
        except OSError:
            self._missed = True
            raise
        if self._missed:
            news, self._missed = News(everything=True), False
        if news:
            self._forget(news)
