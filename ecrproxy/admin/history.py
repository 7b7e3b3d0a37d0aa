"""
Recent traffic: the last minutes in fine steps, the last days in coarse ones.

Memory is bounded, and small enough to be written to a file regularly: see L{kept_history}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.failures import ROUTES
from ecrproxy.metrics import BUCKETS
from ecrproxy.periodic import Periodic
from ecrproxy.ranking import SAVING

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.metrics import Figures, Row

log = Logger()

SAMPLE_SECONDS: Final = 5
STEPS: Final = 180
"""Number of steps of each scale; a chart can't show more."""
LATELY_SECONDS: Final = 300
"""Failures within this time determine the daemon's status."""
_CONTENT: Final = frozenset({"blob", "manifest"})
_NONE_TOOK: Final = (0,) * (len(BUCKETS) + 1)


@dataclass(frozen=True, slots=True)
class Scale:
    """
    The range and the steps of a chart.

    @ivar name: its name in queries.
    @ivar words: its name for people.
    @ivar samples: samples per step.
    @ivar rows: number of rows in its table.
    """

    name: str
    words: str
    samples: int
    rows: int

    @property
    def seconds(self) -> int:
        """
        The range, in seconds.
        """
        return self.samples * SAMPLE_SECONDS * STEPS


SCALES: Final = (Scale("15m", "15 min", 1, 15), Scale("6h", "6 h", 24, 12), Scale("3d", "3 days", 288, 12))
"""Finest first; recent failures are read from the first."""


class Sample(NamedTuple):
    """
    Counts within a time, or since the start.

    @ivar asked: requests that were answered with content.
    @ivar hits: those of them that were answered without fetching.
    @ivar sent: bytes to clients.
    @ivar received: bytes from upstream.
    @ivar failed: requests that were answered with a server error.
    @ivar took: the durations of C{asked}: a count for each of L{BUCKETS}, then for longer ones.
    """

    asked: int = 0
    hits: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0
    took: tuple[int, ...] = _NONE_TOOK

    @classmethod
    def of(cls, counts: Iterable[int], took: Iterable[int]) -> Sample:
        """
        Make a sample from all its numbers, in order.
        """
        asked, hits, sent, received, failed = counts
        return cls(asked, hits, sent, received, failed, tuple(took))


@dataclass(frozen=True, slots=True)
class Point:
    """
    The counts of a number of seconds, see L{Sample}.
    """

    seconds: int
    asked: int = 0
    hits: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0
    took: tuple[int, ...] = _NONE_TOOK


def totals(requests: Iterable[Row], upstream: Iterable[Row]) -> Sample:
    """
    Add up the counts of clients' requests and of upstream requests.
    """
    asked = hits = sent = failed = 0
    took = _NONE_TOOK
    for (route, _, status, cache, _), count, size, _, buckets in requests:
        sent += size
        failed += count if route in ROUTES and status.startswith("5") else 0
        if route in _CONTENT and cache != "-":
            asked += count
            hits += count if cache in SAVING else 0
            took = _column_by_column((took, buckets))
    return Sample(asked, hits, sent, sum(size for _, _, size, _, _ in upstream), failed, took)


def _column_by_column(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def _sum(samples: Iterable[Sample]) -> Sample:
    rows = list(samples)
    return Sample.of(_column_by_column(each[:5] for each in rows), _column_by_column(each.took for each in rows))


def _less(total: Sample, before: Sample) -> Sample:
    return _sum((total, Sample.of((-each for each in before[:5]), (-each for each in before.took))))


class Steps:
    """
    The counts of the last C{STEPS} steps of a scale. Pure.

    @ivar samples: samples per step.
    @ivar kept: number of samples and their sum for each step, oldest first; the last may be incomplete.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.kept: deque[tuple[int, Sample]] = deque(maxlen=STEPS)

    def note(self, sample: Sample, turns: int) -> None:
        """
        Add a sample.

        @param turns: number of sample intervals that have passed; the sample counts for the last, the others are empty.
        """
        quiet = min(turns - 1, self.samples * STEPS)
        while quiet > 0:
            taken = min(quiet, self._room())
            self._add(taken, Sample())
            quiet -= taken
        self._add(1, sample)

    def _room(self) -> int:
        begun = self.kept[-1][0] if self.kept else 0
        return self.samples - begun % self.samples

    def _add(self, turns: int, sample: Sample) -> None:
        if self.kept and self.kept[-1][0] < self.samples:
            before, held = self.kept.pop()
            turns, sample = before + turns, _sum((held, sample))
        self.kept.append((turns, sample))

    def points(self) -> tuple[Point, ...]:
        """
        Return the steps as points, oldest first.
        """
        return tuple(Point(turns * SAMPLE_SECONDS, *sample) for turns, sample in self.kept)


class History:
    """
    Traffic by scale. Pure.

    @ivar steps: by name of the scale.
    """

    def __init__(self) -> None:
        self.steps: Mapping[str, Steps] = {each.name: Steps(each.samples) for each in SCALES}
        self._last = Sample()

    def note(self, total: Sample, turns: int = 1) -> None:
        """
        Add a sample.

        @param total: the counts since the start.
        @param turns: number of sample intervals that have passed; more than one after a stall.
        """
        sample, self._last = _less(total, self._last), total
        for each in self.steps.values():
            each.note(sample, turns)

    def points(self, scale: Scale = SCALES[0]) -> tuple[Point, ...]:
        """
        Return the points, oldest first; the last may cover fewer seconds.
        """
        return self.steps[scale.name].points()

    def lately(self) -> Point:
        """
        Return the counts of the last C{LATELY_SECONDS}.
        """
        return next(stretches(self.points(), LATELY_SECONDS), Point(0))

    def latest(self) -> Point:
        """
        Return the last sample.
        """
        return merged(self.points()[-1:])


def merged(points: Iterable[Point]) -> Point:
    """
    Add up points.
    """
    rows = [astuple(each) for each in points]
    return Point(sum(row[0] for row in rows), *_sum(Sample(*row[1:]) for row in rows)) if rows else Point(0)


def stretches(points: Iterable[Point], seconds: int) -> Iterator[Point]:
    """
    Add up points to intervals of C{seconds}, newest first.
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
    Takes samples for a L{History}.
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
