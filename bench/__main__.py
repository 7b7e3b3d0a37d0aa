"""
Compare the daemon with the alternatives that are installed: C{python -m bench}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from bench.ground import Ground, prepared, say
from bench.machine import facts
from bench.measures import HUGE, MEASURES, QUICK, Sizes
from bench.peers import DIRECT, DISTRIBUTION, NGINX, available
from bench.results import Figures, lines_of, report, report_options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows only that the benches run")
    parser.add_argument("--rounds", type=int, help="how often each is measured, in turns (default 5; quick: 1)")
    parser.add_argument("--only", action="append", choices=MEASURES, help="one measure; repeatable")
    report_options(parser)
    return parser.parse_args(arguments)


def measure(ground: Ground, sizes: Sizes, names: Sequence[str], rounds: int) -> Figures:
    """
    Measure everything, in turns.
    """
    figures, present = Figures(), {DIRECT, *available()}
    for name in (NGINX, DISTRIBUTION):
        if name not in present:
            say(f"{name} is not installed: skipped; see bench/install-packages.sh")
    for name in names:
        work, peers = MEASURES[name]
        for number in range(rounds):
            for peer in (each for each in peers if each in present):
                began = time.monotonic()
                work(ground, sizes, peer, figures)
                say(f"{name}, round {number + 1} of {rounds}, {peer}: {time.monotonic() - began:.1f} s")
    return figures


def main() -> None:
    """
    Measure and print.
    """
    options = parse()
    sizes = QUICK if options.quick else Sizes()
    rounds = options.rounds or (1 if options.quick else 5)
    names = options.only or list(MEASURES)
    huge = sizes.huge_bytes if set(names) & HUGE else 4096
    with prepared(options.directory, sizes.layers, sizes.layer_bytes, sizes.large_bytes, huge) as ground:
        described = facts() | {"Rounds": str(rounds) + (" (small sizes)" if options.quick else "")}
        figures = measure(ground, sizes, names, rounds)
    report(described, lines_of(figures), figures, options)


if __name__ == "__main__":
    main()
