"""
How long something was waited for, in several turns.
"""

from __future__ import annotations

from collections.abc import Callable


class Stopwatch:
    """
    Counts the seconds between its starts and its stops.

    @param now: tells the time.
    @ivar seconds: those that were counted.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since: float | None = None
        self.seconds = 0.0

    def start(self, since: float | None = None) -> None:
        """
        Count from now on, or from C{since} on, unless it counts already.
        """
        if self._since is None:
            self._since = self._now() if since is None else since

    def stop(self, *, counted: bool = True) -> None:
        """
        Count no more.

        @param counted: whether the time since the start was what is to be counted.
        """
        if self._since is not None and counted:
            self.seconds += self._now() - self._since
        self._since = None
