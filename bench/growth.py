"""
Compare the daemon over a large cache with the same over an empty one: C{python -m bench.growth}.

The large cache has an entry and a sparse content file for each name, made as the store makes them. Everything is
measured from outside: when the first answer comes, how long answers take while the daemon compares its cache with the
index, how fast hits are, and how long a pull takes that must evict others to fit. The file system's caches are warm.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from bench.clients import blob, hammer, manifest
from bench.filling import bytes_in, forget_layers, forget_manifest, layers, make_cache
from bench.ground import Ground, Upstream, prepared, say
from bench.machine import facts
from bench.measures import Sizes
from bench.peers import OURS, our_environment, served, twistd
from bench.processes import LOCAL, end, resident, running, wait_until
from bench.results import Figures, Row, report, report_options
from tests.e2e.processes import free_port

Settings = Mapping[str, str]
LARGE_LIMIT: Settings = {"PROXY_CACHE_LIMIT": "1t"}
EMPTY, LARGE, SMALL = "empty", "large", "small"
SMALL_ENTRIES = 1000
PAUSE = 0.005
SIZES = Sizes(layers=16, layer_bytes=8 * 2**20, large_bytes=4096)
QUICK = Sizes(layers=4, layer_bytes=2**20, large_bytes=4096, hammering=1)

ROWS: Sequence[Row] = (
    Row("listening", "from exec to listening, s", 3),
    Row("answering", "from exec to the first answer, s", 3),
    Row("first miss", "from exec to the first miss answered, s", 3),
    Row("stall", "slowest of /healthz meanwhile, ms", 1),
    Row("stall 99", "slowest hundredth of /healthz meanwhile, ms", 1),
    Row("memory", "memory, idle, MiB", 1),
    Row("manifest hits", "manifest hits by digest, a second", 0),
    Row("manifest median", "… median, ms", 2),
    Row("manifest slow", "… slowest hundredth, ms", 2),
    Row("blob hits", "hits of a blob of 4 KiB, a second", 0),
    Row("blob median", "… median, ms", 2),
    Row("blob slow", "… slowest hundredth, ms", 2),
    Row("evicting", "a blob's pull that must evict, median, ms", 1),
    Row("evicting slow", "… the slowest of a round, ms", 1),
    Row("roomy", "the same pull where there is room, median, ms", 1),
)
COLUMNS = (EMPTY, SMALL, LARGE)


class Probe:
    """
    Requests /healthz every few milliseconds, on one connection, until it is stopped.
    """

    def __init__(self, port: int) -> None:
        self._port, self._stopped = port, threading.Event()
        self.seconds: list[float] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with contextlib.closing(http.client.HTTPConnection(LOCAL, self._port, timeout=60)) as connection:
                self.seconds.append(_ask(connection, "/healthz"))
                while not self._stopped.wait(PAUSE):
                    self.seconds.append(_ask(connection, "/healthz"))
        except (OSError, http.client.HTTPException) as problem:
            self._failure = problem

    def tell(self, figures: Figures, who: str) -> None:
        """
        Add the results.
        """
        if self._failure is not None:
            raise self._failure
        ordered = sorted(self.seconds)
        figures.add("stall", who, ordered[-1] * 1000)
        figures.add("stall 99", who, ordered[len(ordered) * 99 // 100] * 1000)


def _ask(connection: http.client.HTTPConnection, path: str) -> float:
    began, status = time.monotonic(), _status(connection, path)
    if status != http.client.OK:
        raise RuntimeError(f"{path}: {status}")
    return time.monotonic() - began


def _status(connection: http.client.HTTPConnection, path: str) -> int:
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def fetch(port: int, path: str) -> float:
    """
    Fetch C{path} on a connection of its own, and return the seconds that it took.
    """
    with contextlib.closing(http.client.HTTPConnection(LOCAL, port, timeout=120)) as connection:
        return _ask(connection, path)


def answered(port: int, path: str) -> Callable[[], bool]:
    """
    Return a condition: C{path} is served by now. The daemon refuses it while it has no token for long.
    """

    def ask() -> bool:
        with contextlib.closing(http.client.HTTPConnection(LOCAL, port, timeout=120)) as connection:
            status = _status(connection, path)
        if status not in (http.client.OK, http.client.SERVICE_UNAVAILABLE):
            raise RuntimeError(f"{path}: {status}")
        return status == http.client.OK

    return ask


def connected(port: int) -> Callable[[], bool]:
    """
    Return a condition: the port accepts connections.
    """

    def ask() -> bool:
        with contextlib.closing(http.client.HTTPConnection(LOCAL, port, timeout=10)) as connection:
            try:
                connection.connect()
            except OSError:
                return False
            return True

    return ask


def start(
    ground: Ground,
    upstream: Upstream,
    who: str,
    cache: Path,
    watch: float,
    figures: Figures,
    settings: Settings = LARGE_LIMIT,
) -> None:
    """
    Start the daemon and watch it from the first moment, for a while at least.
    """
    home, port = ground.fresh("start"), free_port()
    env = our_environment(upstream, home, cache, port, settings)
    output = home / "ecrproxy.log"
    argv = [str(twistd()), "-n", "--pidfile=", "ecr-proxy"]
    began = time.monotonic()
    with running(argv, cpu=ground.processors.server, env=env, output=output) as process:
        wait_until(connected(port), process, output, pause=0.001)
        figures.add("listening", who, time.monotonic() - began)
        fetch(port, "/healthz")
        figures.add("answering", who, time.monotonic() - began)
        with Probe(port) as probe:
            until = time.monotonic() + watch
            wait_until(answered(port, manifest(ground.shelf.manifest)), process, output)
            figures.add("first miss", who, time.monotonic() - began)
            time.sleep(max(0.5, until - time.monotonic()))
        probe.tell(figures, who)
        figures.add("memory", who, resident(process.pid))
        end(process)
    shutil.rmtree(home, ignore_errors=True)


def hits(
    ground: Ground,
    upstream: Upstream,
    who: str,
    cache: Path,
    figures: Figures,
    seconds: int,
    settings: Settings = LARGE_LIMIT,
) -> None:
    forget_layers(ground, cache)
    with served(OURS, ground, upstream, cache=cache, settings=settings) as one:
        fetch(one.port, blob(ground.shelf.large))  # a miss: it is cached from now on
        time.sleep(0.5)
        for name, path in (("manifest", manifest(ground.shelf.manifest)), ("blob", blob(ground.shelf.large))):
            hammer(ground, one, path, 1)
            rate = hammer(ground, one, path, seconds)
            figures.add(f"{name} hits", who, rate.requests)
            figures.add(f"{name} median", who, rate.median)
            figures.add(f"{name} slow", who, rate.slow)


def pulls(ground: Ground, upstream: Upstream, cache: Path, limit: int) -> list[float]:
    """
    Pull each layer by itself into a cache of C{limit} bytes, and return the milliseconds of each.
    """
    with served(OURS, ground, upstream, cache=cache, settings={"PROXY_CACHE_LIMIT": str(limit)}) as one:
        fetch(one.port, blob(ground.shelf.large))
        time.sleep(0.5)
        return [1000 * fetch(one.port, blob(digest)) for digest in layers(ground)]


def evicting(ground: Ground, upstream: Upstream, who: str, cache: Path, figures: Figures) -> None:
    """
    Measure pulls into a cache that is full, and, in an empty one, pulls that fit.
    """
    forget_layers(ground, cache)
    if who == EMPTY:
        figures.add("roomy", who, statistics.median(pulls(ground, upstream, cache, 2**40)))
        return
    limit = bytes_in(cache) + 8 * 2**20  # the log of the index grows to 4 MiB
    found = pulls(ground, upstream, cache, limit)
    if bytes_in(cache) > 1.01 * limit:  # the size of the index's log is checked once a second
        raise RuntimeError(f"the {who} cache has outgrown its limit")
    figures.add("evicting", who, statistics.median(found))
    figures.add("evicting slow", who, max(found))


def measure(ground: Ground, options: argparse.Namespace, sizes: Sizes) -> Figures:
    """
    Measure everything, in turns.
    """
    figures, made = Figures(), {who: ground.directory / f"cache-{who}" for who in COLUMNS}
    make_cache(made[LARGE], options.entries, options.each)
    with ground.upstream() as upstream:
        for number in range(options.rounds):
            for who, cache in made.items():
                began = time.monotonic()
                if who != LARGE:
                    shutil.rmtree(cache, ignore_errors=True)
                    make_cache(cache, min(SMALL_ENTRIES, options.entries) if who == SMALL else 0, options.each)
                if who != SMALL:
                    forget_manifest(ground, cache)
                    start(ground, upstream, who, cache, options.watch, figures)
                    hits(ground, upstream, who, cache, figures, sizes.hammering)
                evicting(ground, upstream, who, cache, figures)
                say(f"round {number + 1} of {options.rounds}, {who}: {time.monotonic() - began:.1f} s")
    return figures


def lines_of(figures: Figures) -> list[list[str]]:
    """
    Return the table's cells.
    """
    table = [["", *COLUMNS, "large / empty", "large / small"]]
    for row in ROWS:
        if row.key not in figures.values:
            continue
        medians = {who: figures.median(row.key, who) for who in COLUMNS}
        ratios = [figures.ratio(row.key, LARGE, who) for who in (EMPTY, SMALL)]
        cells = [f"{value:,.{row.digits}f}" for value in medians.values()] + [f"{ratio:.2f}" for ratio in ratios]
        table.append([row.label, *("-" if cell == "nan" else cell for cell in cells)])
    return table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--entries", type=int, help="of the large cache (default 200000; quick: 2000)")
    parser.add_argument("--each", type=int, default=500_000, help="bytes of sparse content of each (default 500000)")
    parser.add_argument("--rounds", type=int, help="how often each is measured, in turns (default 3; quick: 1)")
    parser.add_argument("--watch", type=float, help="seconds of watching a start, at least (default 10; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows only that the bench runs")
    report_options(parser)
    options = parser.parse_args(arguments)
    defaults = {"entries": 2000, "rounds": 1, "watch": 1} if options.quick else {}
    for name, value in ({"entries": 200000, "rounds": 3, "watch": 10} | defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """
    Measure and print.
    """
    options = parse()
    sizes = QUICK if options.quick else SIZES
    content = f"{options.entries} entries, {options.entries * options.each / 1e9:.0f} GB of sparse content"
    with prepared(options.directory, sizes.layers, sizes.layer_bytes, sizes.large_bytes) as ground:
        described = facts() | {"Cache": content, "Rounds": str(options.rounds)}
        figures = measure(ground, options, sizes)
    report(described, lines_of(figures), figures, options)


if __name__ == "__main__":
    main()
