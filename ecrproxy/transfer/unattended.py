"""
Limit transfers without a reader: a few continue for the cache, the others stop and leave their file to the next one.

Slow ones stop, too: a client may request a blob that trickles and leave, and four of those would hold room in the
cache. Read-ahead is limited by L{reading_ahead} and does not count here until its reader has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred

if TYPE_CHECKING:
    from ecrproxy.transfer.download import Download

MOST: Final = 4
"""Maximum number of transfers without a reader: one more than a Docker client opens by default."""
SLOW: Final = 3_000_000
SLOW_SECONDS: Final = 30.0
"""Minimum number of bytes that a transfer without a reader must bring in C{SLOW_SECONDS}: 100 kB/s."""


class Unattended:
    """
    Limits the transfers without a reader.

    @param transfers: lists the running transfers, oldest first: the oldest continue.
    @param call_later: a reactor's; none to limit only their number.
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
        Stop the transfers above the limit.

        @param begun: a transfer that has just begun, whose reader is about to attach.
        """
        for each in self._without_reader(begun)[self._most :]:
            each.stop()
        self._watch()
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    async def change(self) -> None:
        """
        Wait until a transfer ends, or until readers come or leave.
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
        Stop the transfers that have brought too little since the last call.
        """
        self._watching = False
        before, self._missing = self._missing, {each: each.missing for each in self._without_reader()}
        for each, missing in self._missing.items():
            if before.get(each, missing + SLOW) - missing < SLOW:
                each.stop()
        self._watch()

    def _without_reader(self, begun: Download | None = None) -> list[Download]:
        return [each for each in self._transfers() if each.unattended and not each.ahead and each is not begun]
