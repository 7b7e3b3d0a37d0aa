"""
All metrics of the daemon.

Rules:

- Counting during a request is a few additions on plain lists. The Prometheus text is made on scrape.
- Values that a part of the daemon has anyway are not counted twice: they are read from it on scrape, see L{Reading}.
- Labels have few values: never a repository, digest, host or address. Registries are labeled by their configured names.
- The parent adds up its workers' counts, so one scrape covers all; L{Figure.combine} says how to merge other figures.
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

from ecrproxy.askers import Askers
from ecrproxy.failures import Failures
from ecrproxy.ranking import Ranking

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

TICK_SECONDS: Final = 0.02
"""Interval of the timer that measures the event loop's delays."""
STALL_SECONDS: Final = 150.0
"""Minimum time for which a stall is reported: longer than Prometheus' scrape interval."""
BUCKETS: Final = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)
"""Upper bounds in seconds: from a hit in memory to the largest layer over a slow network."""

Key = tuple[str, ...]
Row = tuple[Key, int, int, float, Sequence[int]]
"""Labels, count, bytes, seconds, and the count of each bucket."""


class Tally:
    """
    Counts, durations and bytes by labels.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, list[float]] = {}

    def note(self, key: Key, seconds: float, size: int = 0) -> None:
        """
        Count one event.
        """
        row = self._row(key)
        row[0] += 1
        row[1] += size
        row[2] += seconds
        row[3 + bisect_left(BUCKETS, seconds)] += 1

    def moved(self, key: Key, size: int) -> None:
        """
        Add bytes to an event that was counted before.
        """
        self._row(key)[1] += size

    def _row(self, key: Key) -> list[float]:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = [0] * (3 + len(BUCKETS) + 1)
        return row

    def rows(self) -> Iterator[Row]:
        """
        Yield all rows.
        """
        for key, (count, size, seconds, *buckets) in sorted(self._rows.items()):
            yield key, int(count), int(size), seconds, [int(each) for each in buckets]

    def take(self) -> list[Row]:
        """
        Return the counts since the last call.
        """
        rows = list(self.rows())
        self._rows.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add the counts of another process.
        """
        for key, count, size, seconds, buckets in rows:
            row = self._row(tuple(key))
            for at, more in enumerate((count, size, seconds, *buckets)):
                row[at] += more


@dataclass(frozen=True, slots=True)
class Served:
    """
    What was sent to clients.

    @ivar requests: requests by route, method, status, cache status and registry.
    @ivar saved: bytes served from the cache, by repository.
    @ivar failed: failed requests.
    @ivar askers: the latest clients of each repository.
    """

    failed: Failures
    askers: Askers
    requests: Tally = field(default_factory=Tally)
    saved: Ranking = field(default_factory=Ranking)


@dataclass(frozen=True, slots=True)
class Figure:
    """
    A value that a part of the daemon provides.

    @ivar name: without the prefix; a name that ends with C{_total} is a counter.
    @ivar label: one or more label names, separated by commas; empty for a single value.
    @ivar combine: merges the values of several processes.
    """

    name: str
    help: str
    label: str = ""
    combine: Callable[[Iterable[float]], float] = sum

    @property
    def counts(self) -> bool:
        """
        Return True for counters.
        """
        return self.name.endswith("_total")


Values = Mapping[str, float]
"""A figure's values by label value; several label values are separated by commas. Without labels, by the empty text."""


@dataclass(frozen=True, slots=True)
class Reading:
    """
    A figure and its source.

    @ivar read: returns the value, None if there is none now, or several values by label value.
    """

    figure: Figure
    read: Callable[[], float | Values | None]

    def values(self) -> Values:
        """
        Read the values.
        """
        told = self.read()
        if told is None:
            return {}
        several = told if isinstance(told, Mapping) else {"": told}
        return {label: float(number) for label, number in several.items()}  # some values are booleans


class Figures(Collector):
    """
    The Prometheus collector of all figures.

    @param workers: returns the workers' process ids; their memory, CPU time and files are added to this process's.
    @param now: returns seconds since the epoch.
    @ivar version: the daemon's version.
    @ivar served: what was sent to clients.
    @ivar upstream: requests to registries and buckets, by kind of host, outcome and registry.
    """

    def __init__(
        self, version: str, workers: Callable[[], Iterable[int]] = tuple, now: Callable[[], float] = time.time
    ) -> None:
        self.version = version
        self.served, self.upstream = Served(Failures(now), Askers(now)), Tally()
        self._readings: list[Reading] = []
        self._registry = CollectorRegistry()
        for collector in (self, Processes(workers), PLATFORM_COLLECTOR):
            self._registry.register(collector)

    def watch(self, *readings: Reading) -> None:
        """
        Add readings.
        """
        self._readings += readings

    def values(self) -> dict[str, Values]:
        """
        Read all readings, by the figures' names.
        """
        return {each.figure.name: each.values() for each in self._readings}

    def page(self) -> bytes:
        """
        Return all metrics in Prometheus' text format, version 0.0.4.
        """
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """
        Yield all metrics.
        """
        yield InfoMetricFamily("ecr_proxy_build", "The version of the daemon", {"version": self.version})
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
    Make three metric families of a tally: requests, bytes, and durations by the first label.
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
    The kernel's figures of this process and its workers, added up; the start time is the earliest.

    The CPU time of exited workers stays included, because the kernel adds it to their parent's. Prometheus takes a
    decreasing counter for a restart, and its rate would jump by the whole total.
    """

    def __init__(self, workers: Callable[[], Iterable[int]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """
        Yield the metrics.
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
    The workers' latest figures, merged into those of one daemon.

    Counters include workers that have exited.
    """

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures = list(figures)
        self._told: dict[int, Mapping[str, Values]] = {}
        self._past: dict[str, dict[str, float]] = {}

    def workers(self) -> list[int]:
        """
        Return the process ids of the running workers.
        """
        return list(self._told)

    def tell(self, worker: int, values: Mapping[str, Values]) -> None:
        """
        Record the figures of the worker with this process id.
        """
        self._told[worker] = values

    def ended(self, worker: int) -> None:
        """
        Record that a worker has exited.
        """
        last = self._told.pop(worker, {})
        for each in self._figures:
            past = self._past.setdefault(each.name, {})
            for label, count in last.get(each.name, {}).items() if each.counts else ():
                past[label] = past.get(label, 0) + count

    def readings(self) -> list[Reading]:
        """
        Return readings of the merged figures.
        """
        return [Reading(each, partial(self._values, each)) for each in self._figures]

    def _values(self, figure: Figure) -> Values:
        parts = [each.get(figure.name, {}) for each in (*self._told.values(), self._past)]
        labels = dict.fromkeys(label for part in parts for label in part)
        return {label: figure.combine([part[label] for part in parts if label in part]) for label in labels}


class LoopStall(Service):
    """
    Measures stalls of the event loop: by how much a regular timer is late.

    @param now: a monotonic clock, which also runs while the process is suspended.
    @ivar longest: longest stall since the start, in seconds.
    """

    def __init__(self, clock: IReactorTime, now: Callable[[], float]) -> None:
        self.longest = 0.0
        self._before, self._lately, self._until = 0.0, 0.0, 0.0
        self._clock, self._now, self._last = clock, now, 0.0
        self._next: IDelayedCall | None = None

    @property
    def lately(self) -> float:
        """
        The longest stall in a recent window of C{STALL_SECONDS} to twice that, in seconds.
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
        # Not Periodic: at this rate its Deferreds would be most of an idle process's work.
        self._next = self._clock.callLater(TICK_SECONDS, self._turn)
        now = self._now()
        if now >= self._until:
            self._before, self._lately, self._until = self._lately, 0.0, now + STALL_SECONDS
        self._lately = max(self._lately, now - self._last - TICK_SECONDS)
        self.longest = max(self.longest, self._lately)
        self._last = now
