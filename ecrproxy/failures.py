"""
Which requests of clients have failed lately, why, and for whom. Pure.

There may be any number, and clients choose what they ask for. So a fixed number of rows is kept: of what failed last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

ROUTES: Final = frozenset({"blob", "manifest", "tags", "referrers"})
"""The routes of what clients may ask for in vain, as the figures call them."""
NOBODYS: Final = "-"
"""The path of what was refused before anybody was let in."""
LIMIT: Final = 20
LONGEST: Final = 300
"""Characters of a path that are kept."""

Row = tuple[str, int, str, float, float, int, str]
"""A failure, as processes tell it: its attributes in their order."""


@dataclass(frozen=True, slots=True)
class Failed:
    """
    Something that clients asked for in vain.

    @ivar path: what they asked for.
    @ivar status: of the answer.
    @ivar reason: the word of X-Cache-Reason.
    @ivar since: when it failed first, in seconds since the epoch.
    @ivar when: when it did last.
    @ivar times: how often.
    @ivar client: who got the last answer.
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
    The last of them.

    @param now: seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rows: OrderedDict[tuple[str, int, str], Failed] = OrderedDict()

    def note(self, path: str, status: int, reason: str, client: str) -> None:
        """
        Note that a request has failed now.
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
        Give them, what failed last first.
        """
        return tuple(reversed(self._rows.values()))

    def take(self) -> list[Row]:
        """
        Return those since the last call, what failed last at the end.
        """
        rows = [
            (each.path, each.status, each.reason, each.since, each.when, each.times, each.client)
            for each in self._rows.values()
        ]
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add what another process has noted.
        """
        for row in rows:
            self._add(Failed(*row))
