"""
What went through the daemon in the last hour, in samples of a few seconds. Its memory is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.failures import ROUTES
from ecrproxy.periodic import Periodic
from ecrproxy.ranking import SAVING

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.metrics import Figures, Row

log = Logger()

SAMPLE_SECONDS: Final = 5
KEPT: Final = 3600 // SAMPLE_SECONDS
TOGETHER: Final = 6
"""Samples that make a point of a chart: what an hour has room for."""
_CONTENT: Final = frozenset({"blob", "manifest"})


class Sample(NamedTuple):
    """
    So much within a time, or since the start.

    @ivar asked: requests for content that were answered with it.
    @ivar hits: those of them for which nothing was fetched.
    @ivar sent: bytes to clients.
    @ivar received: bytes from upstream.
    @ivar failed: requests that were answered with an error of the server's.
    """

    asked: int = 0
    hits: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """
    What there was in so many seconds. As L{Sample} has it.
    """

    seconds: int
    asked: int = 0
    hits: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0


def totals(requests: Iterable[Row], upstream: Iterable[Row]) -> Sample:
    """
    Add up what was counted of clients' requests and of those upstream.
    """
    asked = hits = sent = failed = 0
    for (route, _, status, cache, _), count, size, _, _ in requests:
        sent += size
        failed += count if route in ROUTES and status.startswith("5") else 0
        if route in _CONTENT and cache != "-":
            asked += count
            hits += count if cache in SAVING else 0
    return Sample(asked, hits, sent, sum(size for _, _, size, _, _ in upstream), failed)


class History:
    """
    The samples of an hour. Pure.
    """

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._taken, self._last = 0, Sample()

    def note(self, total: Sample, turns: int = 1) -> None:
        """
        Take a sample.

        @param total: all there was since the start.
        @param turns: how many samples' time has passed: more than one, if the daemon stood still.
        """
        for _ in range(min(turns - 1, KEPT)):
            self._samples.append(Sample())
        self._samples.append(Sample(*(now - before for now, before in zip(total, self._last, strict=True))))
        self._taken += turns
        self._last = total

    def points(self) -> tuple[Point, ...]:
        """
        Give the hour, the oldest first, in points of C{TOGETHER} samples; the first and the last may have fewer.
        """

        def place(item: tuple[int, Sample]) -> int:
            return item[0] // TOGETHER

        numbered = enumerate(self._samples, self._taken - len(self._samples))
        return tuple(_point(sample for _, sample in group) for _, group in groupby(numbered, place))

    def latest(self) -> Point:
        """
        Give the last sample.
        """
        return _point(list(self._samples)[-1:])


def _point(samples: Iterable[Sample]) -> Point:
    columns = list(zip(*samples, strict=True))
    return Point(len(columns[0]) * SAMPLE_SECONDS, *map(sum, columns)) if columns else Point(0)


def merged(points: Iterable[Point]) -> Point:
    """
    Add points up.
    """
    rows = [(each.seconds, each.asked, each.hits, each.sent, each.received, each.failed) for each in points]
    return Point(*map(sum, zip(*rows, strict=True))) if rows else Point(0)


def stretches(points: Iterable[Point], seconds: int) -> Iterator[Point]:
    """
    Add up the points of each C{seconds}, the newest first.
    """
    gathered: list[Point] = []
    for point in reversed(list(points)):
        gathered.append(point)
        if sum(each.seconds for each in gathered) >= seconds:
            yield merged(gathered)
            gathered = []
    if gathered:
        yield merged(gathered)


class Sampler(Service):
    """
    Takes the samples of a L{History}.
    """

    def __init__(self, history: History, figures: Figures, clock: IReactorTime) -> None:
        self._history, self._figures = history, figures
        self._loop = Periodic("Taking samples", self._turn, clock, counted=True)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(SAMPLE_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    def _turn(self, turns: int) -> None:
        self._history.note(totals(self._figures.served.requests.rows(), self._figures.upstream.rows()), turns)
