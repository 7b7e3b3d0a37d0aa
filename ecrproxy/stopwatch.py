"""
Total waiting time over several intervals.
"""

from __future__ import annotations

from collections.abc import Callable


class Stopwatch:
    """
    Adds up the seconds between starts and stops.

    @param now: returns the time in seconds.
    @ivar seconds: the total.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since: float | None = None
        self.seconds = 0.0

    def start(self, since: float | None = None) -> None:
        """
        Start counting now, or as of C{since}, unless already started.
        """
        if self._since is None:
            self._since = self._now() if since is None else since

    def stop(self, *, counted: bool = True) -> None:
        """
        Stop counting.

        @param counted: whether to add the time since the start to the total.
        """
        if self._since is not None and counted:
            self.seconds += self._now() - self._since
        self._since = None
