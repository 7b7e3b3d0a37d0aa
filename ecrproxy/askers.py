"""
Which clients requested which manifests of a repository lately. Pure.

Clients choose the names, so their number is unlimited: only the latest of the latest repositories are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

REPOSITORIES: Final = 64
"""Maximum number of repositories."""
EACH: Final = 12
"""Maximum number of rows of each: a pull by tag is up to three manifests."""
TOGETHER: Final = 500
"""Maximum number of rows that a process tells another at once, the latest."""
LONGEST: Final = 160
"""Maximum characters of a reference that are kept: those of a sha512 digest and of a tag."""

Row = tuple[str, str, str, float, int]
"""As processes exchange it: repository, client, reference, time and count."""


@dataclass(frozen=True, slots=True)
class AskedFor:
    """
    Requests of one client for one manifest.

    @ivar client: its address.
    @ivar reference: the requested tag or digest.
    @ivar when: time of the last one, in seconds since the epoch.
    @ivar times: number of requests.
    """

    client: str
    reference: str
    when: float
    times: int


class Askers:
    """
    The latest clients of each repository.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rows: OrderedDict[str, OrderedDict[tuple[str, str], tuple[float, int]]] = OrderedDict()

    def note(self, repository: str, client: str, reference: str) -> None:
        """
        Record a request for a manifest.
        """
        self._add(repository, client, reference[:LONGEST], self._now(), 1)

    def _add(self, repository: str, client: str, reference: str, when: float, times: int) -> None:
        rows = self._rows.get(repository)
        if rows is None:
            rows = self._rows[repository] = OrderedDict()
            if len(self._rows) > REPOSITORIES:
                self._rows.popitem(last=False)
        self._rows.move_to_end(repository)
        last, before = rows.pop((client, reference), (when, 0))
        rows[client, reference] = max(last, when), before + times
        if len(rows) > EACH:
            rows.popitem(last=False)

    def of(self, repository: str) -> list[AskedFor]:
        """
        Return the latest requests in a repository, the latest first.
        """
        rows = self._rows.get(repository)
        return [] if rows is None else [AskedFor(*key, *row) for key, row in reversed(rows.items())]

    def take(self) -> list[Row]:
        """
        Return and remove the latest requests, the latest last.
        """
        rows = [
            (repository, client, reference, when, times)
            for repository, asked in self._rows.items()
            for (client, reference), (when, times) in asked.items()
        ]
        self._rows.clear()
        return rows[-TOGETHER:]

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add requests that another process has recorded.
        """
        for row in rows:
            self._add(*row)
