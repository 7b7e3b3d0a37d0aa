"""
Results, and their table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers import DIRECT, DISTRIBUTION, NGINX, OURS


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    @ivar key: the name under which the results were added.
    @ivar digits: after the decimal point.
    """

    key: str
    label: str
    digits: int = 2


ROWS: Sequence[Row] = (
    Row("tcp one", "cached blob, TCP, one stream, GB/s"),
    Row("tcp one cpu", "- CPU seconds a GB", 3),
    Row("tcp eight", "cached blob, TCP, eight streams, GB/s"),
    Row("tcp eight cpu", "- CPU seconds a GB", 3),
    Row("tls one", "cached blob, TLS 1.3, one stream, GB/s"),
    Row("tls one cpu", "- CPU seconds a GB", 3),
    Row("tls eight", "cached blob, TLS 1.3, eight streams, GB/s"),
    Row("tls eight cpu", "- CPU seconds a GB", 3),
    Row("hits digest", "manifest hits by digest, a second", 0),
    Row("hits digest cpu", "- CPU microseconds each", 0),
    Row("hits tag", "manifest hits by tag, a second", 0),
    Row("hits tag cpu", "- CPU microseconds each", 0),
    Row("hits tag of many", "manifest hits by tag, 256 clients, a second", 0),
    Row("hits tag of many cpu", "- CPU microseconds each", 0),
    Row("crowd", "hits of a blob of 1 MiB by many clients, a second", 0),
    Row("crowd cpu", "- CPU microseconds each", 0),
    Row("kept cpu", "manifest hits by digest, connections kept, CPU microseconds each", 0),
    Row("new cpu", "- a new connection for each: so many more", 0),
    Row("cold", "one client's cold pull, s"),
    Row("ahead near", "30 layers of 2 MiB, three at a time, cold, upstream answers after 30 ms, s"),
    Row("ahead far", "- after 100 ms, s"),
    Row("inbound", "one client's pull of a cold layer, of the bandwidth of four bucket connections"),
    Row("inbound cpu", "- CPU seconds a GB, nginx's with hashing by itself", 3),
    Row("inbound-tls", "- the bucket speaks TLS: of the bandwidth"),
    Row("inbound-tls cpu", "- CPU seconds a GB, nginx's with hashing by itself", 3),
    Row("rush", "one cold blob of 1 MiB for all of a crowd at once, CPU seconds"),
    Row("rush failed", "- clients that did not get it", 0),
    Row("rush asked", "- requests upstream, the bucket's among them", 0),
    Row("storm", "many clients' cold pull at once, s"),
    Row("storm blobs", "- blob requests to ECR", 0),
    Row("storm bytes", "- bytes from the bucket, in images"),
    Row("storm cpu", "- CPU seconds"),
    Row("storm stall", "- longest stall of the event loop, as it reports, ms", 0),
    Row("warm", "the same, warm, s"),
    Row("warm asked", "- requests to ECR", 0),
    Row("warm connections", "- new connections upstream", 0),
    Row("workers digest", "two workers on two cores: hits by digest, of one process's"),
    Row("workers tag", "- hits by tag"),
    Row("workers tls", "- cached blob, TLS 1.3, eight streams"),
    Row("memory", "memory, idle, MiB", 0),
    Row("memory connections", "- with idle connections, MiB", 0),
    Row("memory storm", "- after the cold pulls, MiB", 0),
)
COLUMNS = (DIRECT, NGINX, DISTRIBUTION, OURS)
RATIOS = (DIRECT, NGINX, DISTRIBUTION)


@dataclass
class Figures:
    """
    All results of a run: by measurement, by server, one for each round.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, key: str, who: str, value: float) -> None:
        """
        Add a result.
        """
        self.values.setdefault(key, {}).setdefault(who, []).append(value)

    def median(self, key: str, who: str) -> float:
        """
        Return the median of all rounds; NaN if there was none.
        """
        runs = self.values.get(key, {}).get(who)
        return statistics.median(runs) if runs else math.nan

    def ratio(self, key: str, who: str, to: str) -> float:
        """
        Return the ratio of the result of C{to} to that of C{who}.
        """
        base = self.median(key, to)
        return self.median(key, who) / base if base else math.nan

    def document(self) -> dict[str, dict[str, Any]]:
        """
        Return everything for programs.
        """
        return {
            key: {who: {"median": self.median(key, who), "rounds": rounds} for who, rounds in runs.items()}
            for key, runs in self.values.items()
        }


def _cell(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def lines_of(figures: Figures, rows: Sequence[Row] = ROWS) -> list[list[str]]:
    """
    Return the table's cells, its head first. Columns without any result are left out.
    """
    ours = {who for runs in figures.values.values() for who in runs}
    columns = [who for who in COLUMNS if who in ours]
    ratios = [who for who in RATIOS if who in ours and OURS in ours]
    table = [["", *columns, *(f"/ {who}" for who in ratios)]]
    for row in rows:
        if row.key in figures.values:
            medians = [_cell(figures.median(row.key, who), row.digits) for who in columns]
            compared = [_cell(figures.ratio(row.key, OURS, who), 2) for who in ratios]
            table.append([row.label, *medians, *compared])
    return table


def _aligned(table: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in table
    ]


def text_table(table: Sequence[Sequence[str]]) -> str:
    """
    Format the table for a terminal.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(_aligned(table, widths))


def rst_table(table: Sequence[Sequence[str]]) -> str:
    """
    Format the table for docs/benchmarks.rst, as reStructuredText's simple table.
    """
    # An empty first cell would continue the row above; a dash there would begin a list.
    filled = [[line[0].replace("- ", "… ", 1) or "measure", *(cell or "-" for cell in line[1:])] for line in table]
    widths = [max(len(cell) for cell in column) for column in zip(*filled, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    head, *body = _aligned(filled, widths)
    return "\n".join([rule, head, rule, *body, rule])


def rst_facts(facts: Mapping[str, str]) -> str:
    """
    Format facts for docs/benchmarks.rst, as a list of fields.
    """
    return "\n".join(f":{name}: {value}" for name, value in facts.items())


def report(
    facts: Mapping[str, str], table: Sequence[Sequence[str]], figures: Figures, options: argparse.Namespace
) -> None:
    """
    Print the table in the format of C{options}, and write all results to its file.
    """
    if options.rst:
        print(rst_facts(facts), rst_table(table), sep="\n\n")
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), text_table(table), sep="\n\n")
    if options.json:
        document = {"facts": facts, "figures": figures.document()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def report_options(parser: argparse.ArgumentParser) -> None:
    """
    Add the options that L{report} and the ground need.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--rst", action="store_true", help="print as docs/benchmarks.rst has it")
    parser.add_argument("--directory", help="where temporary files go (default: the system's place)")
