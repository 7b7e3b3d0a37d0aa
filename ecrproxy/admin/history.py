"""
What went through the daemon lately: the last minutes in fine steps, the last days in coarse ones.

Its memory is bounded, and what it knows is little enough to be written to a file now and then: see L{kept_history}.
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
"""Of each scale: more than that, and a chart shows no more."""
LATELY_SECONDS: Final = 300
"""What failed within this time is told before all else."""
_CONTENT: Final = frozenset({"blob", "manifest"})
_NONE_TOOK: Final = (0,) * (len(BUCKETS) + 1)


@dataclass(frozen=True, slots=True)
class Scale:
    """
    How far back a chart goes, and in which steps.

    @ivar name: what a query calls it.
    @ivar words: what people do.
    @ivar samples: those of a step.
    @ivar rows: of a table of it.
    """

    name: str
    words: str
    samples: int
    rows: int

    @property
    def seconds(self) -> int:
        """
        How far back it goes.
        """
        return self.samples * SAMPLE_SECONDS * STEPS


SCALES: Final = (Scale("15m", "15 min", 1, 15), Scale("6h", "6 h", 24, 12), Scale("3d", "3 days", 288, 12))
"""The finest first; what failed lately is told from it."""


class Sample(NamedTuple):
    """
    So much within a time, or since the start.

    @ivar asked: requests for content that were answered with it.
    @ivar hits: those of them for which nothing was fetched.
    @ivar sent: bytes to clients.
    @ivar received: bytes from upstream.
    @ivar failed: requests that were answered with an error of the server's.
    @ivar took: of those asked, how many took as long as each of L{BUCKETS} says, and longer than the last.
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
        Make one of all its numbers, in order.
        """
        asked, hits, sent, received, failed = counts
        return cls(asked, hits, sent, received, failed, tuple(took))


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
    took: tuple[int, ...] = _NONE_TOOK


def totals(requests: Iterable[Row], upstream: Iterable[Row]) -> Sample:
    """
    Add up what was counted of clients' requests and of those upstream.
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
    What there was in the last C{STEPS} steps of a scale. Pure.

    @ivar samples: those of a step.
    @ivar kept: of each step, how many samples it has and their sum, the oldest first; the last may have fewer.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.kept: deque[tuple[int, Sample]] = deque(maxlen=STEPS)

    def note(self, sample: Sample, turns: int) -> None:
        """
        Take a sample.

        @param turns: how many samples' time has passed: of all but the last there is nothing.
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
        Give the steps as points, the oldest first.
        """
        return tuple(Point(turns * SAMPLE_SECONDS, *sample) for turns, sample in self.kept)


class History:
    """
    What went through, by scale. Pure.

    @ivar steps: by the name of the scale.
    """

    def __init__(self) -> None:
        self.steps: Mapping[str, Steps] = {each.name: Steps(each.samples) for each in SCALES}
        self._last = Sample()

    def note(self, total: Sample, turns: int = 1) -> None:
        """
        Take a sample.

        @param total: all there was since the start.
        @param turns: how many samples' time has passed: more than one, if the daemon stood still.
        """
        sample, self._last = _less(total, self._last), total
        for each in self.steps.values():
            each.note(sample, turns)

    def points(self, scale: Scale = SCALES[0]) -> tuple[Point, ...]:
        """
        Give what there was, the oldest first; the last point may be of fewer seconds.
        """
        return self.steps[scale.name].points()

    def lately(self) -> Point:
        """
        Give the last C{LATELY_SECONDS}.
        """
        return next(stretches(self.points(), LATELY_SECONDS), Point(0))

    def latest(self) -> Point:
        """
        Give the last sample.
        """
        return merged(self.points()[-1:])


def merged(points: Iterable[Point]) -> Point:
    """
    Add points up.
    """
    rows = [astuple(each) for each in points]
    return Point(sum(row[0] for row in rows), *_sum(Sample(*row[1:]) for row in rows)) if rows else Point(0)


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
