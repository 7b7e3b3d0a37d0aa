"""
Recent failed requests of clients, with reasons and clients. Pure.

Clients choose the paths, so their number is unlimited: only a fixed number of the latest failures is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

ROUTES: Final = frozenset({"blob", "manifest", "tags", "referrers"})
"""The routes whose failures are recorded, by their names in metrics."""
NOBODYS: Final = "-"
"""The path of requests that were refused before admission."""
LIMIT: Final = 20
LONGEST: Final = 300
"""Maximum characters of a path that are kept."""

Row = tuple[str, int, str, float, float, int, str]
"""A failure as processes exchange it: its attributes in order."""


@dataclass(frozen=True, slots=True)
class Failed:
    """
    Failed requests for the same path.

    @ivar path: the requested path.
    @ivar status: the response's status.
    @ivar reason: the value of X-Cache-Reason.
    @ivar since: time of the first failure, in seconds since the epoch.
    @ivar when: time of the last failure.
    @ivar times: number of failures.
    @ivar client: the client of the last failure.
    """

    path: str
    status: int
    reason: str
    since: float
    when: float
    times: int
    client: str


class Failures:
    """
    The latest failures.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rows: OrderedDict[tuple[str, int, str], Failed] = OrderedDict()

    def note(self, path: str, status: int, reason: str, client: str) -> None:
        """
        Record a failed request.
        """
        now = self._now()
        self._add(Failed(path[:LONGEST], status, reason, now, now, 1, client))

    def _add(self, each: Failed) -> None:
        key = each.path, each.status, each.reason
        known = self._rows.pop(key, None)
        if known is not None:
            since, when = min(known.since, each.since), max(known.when, each.when)
            client = each.client if each.when >= known.when else known.client
            each = Failed(*key, since, when, known.times + each.times, client)
        self._rows[key] = each
        if len(self._rows) > LIMIT:
            self._rows.popitem(last=False)

    def latest(self) -> tuple[Failed, ...]:
        """
        Return the failures, latest first.
        """
        return tuple(reversed(self._rows.values()))

    def take(self) -> list[Row]:
        """
        Return the failures since the last call, latest last.
        """
        rows = [
            (each.path, each.status, each.reason, each.since, each.when, each.times, each.client)
            for each in self._rows.values()
        ]
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add failures that another process has recorded.
        """
        for row in rows:
            self._add(Failed(*row))
