"""
Transfers that nobody reads: a few go on for the cache, the others stop and leave their file to the next.

Those that are slow stop, too: a client that has left may have asked for what trickles, and four of them would keep room
in the cache. What is read ahead is bounded by L{reading_ahead}, and is none of these until its reader has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from ecrproxy.transfer.download import Download

MOST: Final = 4
"""Transfers without a reader that go on at the same time: one more than a Docker client has by default."""
SLOW: Final = 3_000_000
SLOW_SECONDS: Final = 30.0
"""Bytes that a transfer without a reader must bring in each so many seconds: 100 kB/s."""


class Unattended:
    """
    Bounds the transfers without a reader.

    @param transfers: lists those that are under way, oldest first: these go on.
    @param call_later: a reactor's; none to bound their number alone.
    """

    def __init__(
        self,
        transfers: Callable[[], Iterable[Download]],
        call_later: Callable[..., object] | None = None,
        most: int = MOST,
    ) -> None:
        self._transfers, self._call_later, self._most = transfers, call_later, most
        self._missing: dict[Download, int] = {}
        self._watching = False
        self._waiting: list[Deferred[None]] = []

    def settle(self, begun: Download | None = None) -> None:
        """
        Stop those that are too many.

        @param begun: one that was begun just now, whose reader is about to come.
        """
        for each in self._without_reader(begun)[self._most :]:
            each.stop()
        self._watch()
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    async def change(self) -> None:
        """
        Wait until a transfer has ended, or its readers have come or left.
        """
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        await waiter

    def _watch(self) -> None:
        if not self._watching and self._call_later is not None and self._without_reader():
            self._watching = True
            self._call_later(SLOW_SECONDS, self._stop_slow_ones)

    def _stop_slow_ones(self) -> None:
        """
        Stop those that have brought too little since the last time.
        """
        self._watching = False
        before, self._missing = self._missing, {each: each.missing for each in self._without_reader()}
        for each, missing in self._missing.items():
            if before.get(each, missing + SLOW) - missing < SLOW:
                each.stop()
        self._watch()

    def _without_reader(self, begun: Download | None = None) -> list[Download]:
        return [each for each in self._transfers() if each.unattended and not each.ahead and each is not begun]
