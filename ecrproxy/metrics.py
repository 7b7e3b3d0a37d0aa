"""
Every figure that the daemon keeps about itself.

Rules:

- What is counted on the way of a request is a few additions on plain lists; it becomes Prometheus' text when somebody
  asks.
- What a part knows anyway is not counted twice: it is read from the part when somebody asks, see L{Reading}.
- Labels have few values: never a repository, a digest, a host or an address; of registries, their names
  in the configuration.
- Workers' counts are added up by their parent, so that one page tells of all; a figure that each of them knows says how
  theirs become one, see L{Figure}.
"""

from __future__ import annotations

import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from prometheus_client import PLATFORM_COLLECTOR, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from twisted.application.service import Service

from ecrproxy.failures import Failures
from ecrproxy.ranking import Ranking

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

TICK_SECONDS: Final = 0.02
"""How often the event loop is asked for its turn."""
STALL_SECONDS: Final = 150.0
"""For how long a stall is told at least: Prometheus asks more often."""
BUCKETS: Final = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)
"""Seconds: from a hit in memory to the largest layer over a slow network."""

Key = tuple[str, ...]
Row = tuple[Key, int, int, float, Sequence[int]]
"""Labels, how many, their bytes, their seconds, how many in each bucket."""


class Tally:
    """
    How many there were of a kind, how long they took and how many bytes they moved; kinds are told by labels.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, list[float]] = {}

    def note(self, key: Key, seconds: float, size: int = 0) -> None:
        """
        Count one.
        """
        row = self._row(key)
        row[0] += 1
        row[1] += size
        row[2] += seconds
        row[3 + bisect_left(BUCKETS, seconds)] += 1

    def moved(self, key: Key, size: int) -> None:
        """
        Count bytes of something that was counted before.
        """
        self._row(key)[1] += size

    def _row(self, key: Key) -> list[float]:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = [0] * (3 + len(BUCKETS) + 1)
        return row

    def rows(self) -> Iterator[Row]:
        """
        Yield what was counted.
        """
        for key, (count, size, seconds, *buckets) in sorted(self._rows.items()):
            yield key, int(count), int(size), seconds, [int(each) for each in buckets]

    def take(self) -> list[Row]:
        """
        Return what was counted since the last call.
        """
        rows = list(self.rows())
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add what another process has counted.
        """
        for key, count, size, seconds, buckets in rows:
            row = self._row(tuple(key))
            for at, more in enumerate((count, size, seconds, *buckets)):
                row[at] += more


@dataclass(frozen=True, slots=True)
class Served:
    """
    What clients were given.

    @ivar requests: theirs, by route, method, status, cache status and registry.
    @ivar saved: the bytes for which nothing was fetched, by repository.
    @ivar failed: what they asked for in vain.
    """

    failed: Failures
    requests: Tally = field(default_factory=Tally)
    saved: Ranking = field(default_factory=Ranking)


@dataclass(frozen=True, slots=True)
class Figure:
    """
    Something that a part of the daemon knows in figures.

    @ivar name: without the prefix; C{_total} at its end makes it a counter.
    @ivar label: the label whose values tell several figures apart, or several, separated by commas; empty if there is
        one figure.
    @ivar combine: makes one of the figures of several processes.
    """

    name: str
    help: str
    label: str = ""
    combine: Callable[[Iterable[float]], float] = sum

    @property
    def counts(self) -> bool:
        """
        Return True if it only grows.
        """
        return self.name.endswith("_total")


Values = Mapping[str, float]
"""A figure by the value of its label, or by their values, separated by commas; by the empty text if it has none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """
    A figure, and how it is read.

    @ivar read: gives it, none if there is none now; or several, by the value of the label.
    """

    figure: Figure
    read: Callable[[], float | Values | None]

    def values(self) -> Values:
        """
        Read it.
        """
        told = self.read()
        if told is None:
            return {}
        several = told if isinstance(told, Mapping) else {"": told}
        return {label: float(number) for label, number in several.items()}  # parts may know a yes or no


class Figures(Collector):
    """
    The figures, for Prometheus.

    @param workers: lists the process ids of workers, whose memory, time and files count with this process's.
    @param now: seconds since the epoch.
    @ivar version: of what runs here.
    @ivar served: what clients were given.
    @ivar upstream: requests to the registry and to buckets, by kind of host, outcome and registry.
    """

    def __init__(
        self, version: str, workers: Callable[[], Iterable[int]] = tuple, now: Callable[[], float] = time.time
    ) -> None:
        self.version = version
        self.served, self.upstream = Served(Failures(now)), Tally()
        self._readings: list[Reading] = []
        self._registry = CollectorRegistry()
        for collector in (self, Processes(workers), PLATFORM_COLLECTOR):
            self._registry.register(collector)

    def watch(self, *readings: Reading) -> None:
        """
        Tell these too.
        """
        self._readings += readings

    def values(self) -> dict[str, Values]:
        """
        Read what the parts know, by the names of the figures.
        """
        return {each.figure.name: each.values() for each in self._readings}

    def page(self) -> bytes:
        """
        Write all figures in Prometheus' text format, version 0.0.4.
        """
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """
        Yield them.
        """
        yield InfoMetricFamily("ecr_proxy_build", "What runs here", {"version": self.version})
        yield from _families(
            self.served.requests,
            "ecr_proxy",
            ("route", "method", "status", "cache", "registry"),
            "of clients",
            "client",
        )
        yield from _families(
            self.upstream, "ecr_proxy_upstream", ("host", "outcome", "registry"), "upstream", "received"
        )
        for reading in self._readings:
            yield from _family(reading)


def _families(
    tally: Tally, prefix: str, labels: Sequence[str], whose: str, direction: str
) -> tuple[CounterMetricFamily, CounterMetricFamily, HistogramMetricFamily]:
    """
    Tell a tally as three families: how many, how many bytes, how long by the first label.
    """
    count = CounterMetricFamily(f"{prefix}_requests", f"Requests {whose}", labels=labels)
    size = CounterMetricFamily(f"{prefix}_{direction}_bytes", f"Bytes of bodies, requests {whose}", labels=labels[:1])
    seconds = HistogramMetricFamily(f"{prefix}_request_seconds", f"Seconds of requests {whose}", labels=labels[:1])
    by_first: dict[str, list[float]] = {}
    for key, counted, moved, took, buckets in tally.rows():
        count.add_metric(key, counted)
        sums = by_first.setdefault(key[0], [0.0] * (2 + len(buckets)))
        for at, more in enumerate((moved, took, *buckets)):
            sums[at] += more
    bounds = [*map(str, BUCKETS), "+Inf"]
    for first, sums in by_first.items():
        size.add_metric([first], sums[0])
        upto = [(bound, sum(sums[2 : at + 3])) for at, bound in enumerate(bounds)]
        seconds.add_metric([first], upto, sums[1])
    return count, size, seconds


def _family(reading: Reading) -> Iterator[Metric]:
    figure, values = reading.figure, reading.values()
    if not values:
        return
    kind = CounterMetricFamily if figure.counts else GaugeMetricFamily
    family = kind(f"ecr_proxy_{figure.name}", figure.help, labels=figure.label.split(",") if figure.label else [])
    for value, number in values.items():
        family.add_metric(value.split(",") if figure.label else [], number)
    yield family


class Processes(Collector):
    """
    What the kernel knows of this process and its workers, added up; they began when the first of them did.

    The processor time of workers that have ended stays counted: the kernel adds it up for their parent. A counter that
    goes back would look to Prometheus like a restart, and its rate jump by all that was ever used.
    """

    def __init__(self, workers: Callable[[], Iterable[int]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """
        Yield it.
        """
        found: dict[str, list[Metric]] = {}
        for pid in ("self", *self._workers()):
            of_one = ProcessCollector(pid=lambda pid=pid: pid, registry=None)  # type: ignore[misc]
            for family in of_one.collect():
                found.setdefault(family.name, []).append(family)
        for name, (family, *others) in found.items():
            values = [each.samples[0].value for each in (family, *others)]
            value = min(values) if name == "process_start_time_seconds" else sum(values)
            if name == "process_cpu_seconds":
                ended = resource.getrusage(resource.RUSAGE_CHILDREN)
                value += ended.ru_utime + ended.ru_stime
            family.samples = [family.samples[0]._replace(value=value)]
            yield family


class Gathered:
    """
    The figures of workers, as they told them last, as figures of one daemon.

    What a worker counted stays counted when it has ended.
    """

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures = list(figures)
        self._told: dict[int, Mapping[str, Values]] = {}
        self._past: dict[str, dict[str, float]] = {}

    def workers(self) -> list[int]:
        """
        List the process ids of those that run.
        """
        return list(self._told)

    def tell(self, worker: int, values: Mapping[str, Values]) -> None:
        """
        Take in what the worker with this process id knows.
        """
        self._told[worker] = values

    def ended(self, worker: int) -> None:
        """
        Note that a worker has ended.
        """
        last = self._told.pop(worker, {})
        for each in self._figures:
            past = self._past.setdefault(each.name, {})
            for label, count in last.get(each.name, {}).items() if each.counts else ():
                past[label] = past.get(label, 0) + count

    def readings(self) -> list[Reading]:
        """
        Give what reads them.
        """
        return [Reading(each, partial(self._values, each)) for each in self._figures]

    def _values(self, figure: Figure) -> Values:
        parts = [each.get(figure.name, {}) for each in (*self._told.values(), self._past)]
        labels = dict.fromkeys(label for part in parts for label in part)
        return {label: figure.combine([part[label] for part in parts if label in part]) for label in labels}


class LoopStall(Service):
    """
    How long the event loop stood still at the most: the time by which its turns come late.

    @param now: seconds that nobody sets, and that go on while the process stands still.
    @ivar longest: in seconds, since the start.
    """

    def __init__(self, clock: IReactorTime, now: Callable[[], float]) -> None:
        self.longest = 0.0
        self._before, self._lately, self._until = 0.0, 0.0, 0.0
        self._clock, self._now, self._last = clock, now, 0.0
        self._next: IDelayedCall | None = None

    @property
    def lately(self) -> float:
        """
        The longest of the last C{STALL_SECONDS} to twice as many, in seconds.
        """
        return max(self._before, self._lately)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._last = self._now()
        self._next = self._clock.callLater(TICK_SECONDS, self._turn)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _turn(self) -> None:
        # Not Periodic: at this rate its Deferreds would be most of what an idle process does.
        self._next = self._clock.callLater(TICK_SECONDS, self._turn)
        now = self._now()
        if now >= self._until:
            self._before, self._lately, self._until = self._lately, 0.0, now + STALL_SECONDS
        self._lately = max(self._lately, now - self._last - TICK_SECONDS)
        self.longest = max(self.longest, self._lately)
        self._last = now
