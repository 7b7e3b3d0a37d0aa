"""
Have what is held in memory forgotten when somebody has purged the directory.

That may have been this process, another daemon on the directory, or a command that worked on it without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service

from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

LOOK_SECONDS: Final = 1.0
_UNKNOWN: Final = -1, -1
"""What is told of no directory."""


class Purges(Service):
    """
    Looks each second whether there was a purge.

    @param forget: forgets what is held in memory.
    """

    def __init__(self, store: Store, forget: Callable[[], object], in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._forget, self._in_thread = store, forget, in_thread
        self._last: tuple[int, int] | None = None
        self._again = False
        self._loop = Periodic("Looking for purges", self.look, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(LOOK_SECONDS)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    async def look(self) -> None:
        """
        Look now.

        @raise OSError: if the disk doesn't answer. What is in memory is forgotten when it answers again.
        """
        try:
            last = await self._in_thread(self._store.last_purge)
        except OSError:
            self._last = _UNKNOWN
            raise
        # Once more a second later: what was being read when it was removed may have got into memory since.
        purged = self._last not in (None, last)
        if purged or self._again:
            self._forget()
        self._last, self._again = last, purged
