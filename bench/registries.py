"""
Compare the daemon with one registry with the same with fifty: C{python -m bench.registries}.

Those beside the default have tables in a configuration file, and are built but get no requests. Everything is measured
from
outside, as in L{bench.growth}.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from bench.ground import Ground, prepared, say
from bench.growth import LARGE_LIMIT, QUICK, ROWS, SIZES, Settings, hits, start
from bench.machine import facts
from bench.measures import Sizes
from bench.results import Figures, Row, report, report_options

ONE, FIFTY = "one", "fifty"
COLUMNS = (ONE, FIFTY)
TABLE = """
[registry."{account:012}.dkr.ecr.eu-west-1.amazonaws.com"]
path-prefix = "r{account}"
hosts = ["r{account}.example"]
namespaces = "team/.*"
"""
"""Of one registry."""
MEASURED: Sequence[Row] = (
    *(row for row in ROWS if "evicting" not in row.key and row.key != "roomy"),
    Row("tokens", "tokens asked for", 0),
)


def settings_of(ground: Ground, count: int) -> Settings:
    """
    Write a configuration file with so many registries beside the default.
    """
    file = ground.directory / f"{count}.toml"
    file.write_text("".join(TABLE.format(account=number + 1) for number in range(count)))
    return {**LARGE_LIMIT, "PROXY_CONFIG": str(file)}


def measure_one(ground: Ground, who: str, cache: Path, watch: float, sizes: Sizes, figures: Figures) -> None:
    """
    Measure a start over an empty cache, and hits.
    """
    settings = settings_of(ground, 49 if who == FIFTY else 0)
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    with ground.upstream() as upstream:
        start(ground, upstream, who, cache, watch, figures, settings)
        figures.add("tokens", who, upstream.counts()["tokens"])
        hits(ground, upstream, who, cache, figures, sizes.hammering, settings)


def measure(ground: Ground, options: argparse.Namespace, sizes: Sizes) -> Figures:
    """
    Measure both, in turns.
    """
    figures = Figures()
    for number in range(options.rounds):
        for who in COLUMNS if number % 2 == 0 else reversed(COLUMNS):
            began = time.monotonic()
            measure_one(ground, who, ground.directory / f"cache-{who}", options.watch, sizes, figures)
            say(f"round {number + 1} of {options.rounds}, {who}: {time.monotonic() - began:.1f} s")
    return figures


def lines_of(figures: Figures) -> list[list[str]]:
    """
    Return the table's cells.
    """
    table = [["", *COLUMNS, "fifty / one"]]
    for row in MEASURED:
        medians = [figures.median(row.key, who) for who in COLUMNS]
        cells = [f"{value:,.{row.digits}f}" for value in medians]
        table.append([row.label, *cells, f"{figures.ratio(row.key, FIFTY, ONE):.2f}"])
    return table


def main() -> None:
    """
    Measure and print.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.registries", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how often each is measured, in turns (default 3; quick: 1)")
    parser.add_argument("--watch", type=float, default=3, help="seconds of watching a start, at least (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows only that the bench runs")
    report_options(parser)
    options = parser.parse_args()
    sizes = QUICK if options.quick else SIZES
    options.rounds = options.rounds or (1 if options.quick else 3)
    with prepared(options.directory, sizes.layers, sizes.layer_bytes, sizes.large_bytes) as ground:
        described = facts() | {"Rounds": str(options.rounds)}
        figures = measure(ground, options, sizes)
    report(described, lines_of(figures), figures, options)


if __name__ == "__main__":
    main()
