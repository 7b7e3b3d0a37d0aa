"""
Transfers that nobody reads: a few go on for the cache, the others stop and leave their file to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from ecrproxy.transfer.download import Download

MOST: Final = 4
"""Transfers without a reader that go on at the same time: one more than a Docker client has by default."""


class Unattended:
    """
    Bounds the transfers without a reader.

    @param transfers: lists those that are under way, oldest first: these go on.
    """

    def __init__(self, transfers: Callable[[], Iterable[Download]], most: int = MOST) -> None:
        self._transfers, self._most = transfers, most
        self._waiting: list[Deferred[None]] = []

    def is_full(self, coming: int) -> bool:
        """
        Return True if no more transfers may be begun for which nobody has asked.

        @param coming: how many of them are about to begin.
        """
        return len(self._without_reader()) + coming >= self._most

    def settle(self, begun: Download | None = None) -> None:
        """
        Stop those that are too many.

        @param begun: one that was begun just now, whose reader is about to come.
        """
        for each in self._without_reader(begun)[self._most :]:
            each.stop()
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

    def _without_reader(self, begun: Download | None = None) -> list[Download]:
        return [each for each in self._transfers() if each.unattended and each is not begun]
