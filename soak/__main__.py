"""
Run it, and report: C{python -m soak --seconds 600 --seed 1}.

The exit status is 1 if an invariant was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from soak.clients import Crowd, Tally
from soak.daemon import DRAIN_SECONDS, Daemon, Size, StandIn, wait_for
from soak.goods import fill
from tests.e2e.processes import PATIENCE
from tests.registry_content import Shelves

CLIENTS: Final = 50
LIMIT: Final = 48 * 2**20
QUIET: Final = 0.6
"""The part of the time in which the daemon is ended now and then; in the rest it must not grow."""
BUSY: Final = 128 * 2**20
"""One that has less has started just now, as in a short run or on a slow machine, and is yet to take what it needs."""
GROWTH: Final = 96 * 2**20
LARGEST: Final = 256 * 2**20
THREADS: Final = 64
DESCRIPTORS: Final = 64


class Soak:
    """
    One run.
    """

    def __init__(self, daemon: Daemon, seconds: float, seed: int) -> None:
        self.daemon, self._seconds, self._seed = daemon, seconds, seed
        self._chance = random.Random(seed)
        self.tally, self.wrong = Tally(), list[str]()
        self.kills, self.ends, self.peak = 0, 0, Size(0, 0, 0)
        self.quiet = self.peak, self.peak

    async def run(self) -> None:
        """
        Keep the clients busy while the daemon is restarted, and then stays.
        """
        goods = fill(Shelves())
        crowd = asyncio.ensure_future(Crowd(self.daemon.port, goods, self.tally).run(CLIENTS, str(self._seed)))
        started = time.monotonic()
        while time.monotonic() < started + self._seconds * QUIET and not crowd.done():
            await self.watch(self._chance.uniform(2, min(15.0, self._seconds / 8)))
            await asyncio.to_thread(self.restart)
        await self.watch((started + self._seconds - time.monotonic()) / 3)
        before = self.daemon.size()
        await self.watch(started + self._seconds - time.monotonic())
        self.quiet = before, self.daemon.size()
        if self.quiet[1].rss > max(before.rss, BUSY) + GROWTH:
            self.wrong.append("it grew")
        if crowd.done():  # it ends by itself only if it fails
            crowd.result()
        crowd.cancel()
        await asyncio.wait([crowd])

    async def watch(self, seconds: float) -> None:
        """
        Let it run for a while, and record its size.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))
            if self.daemon.process.status is not None:
                self.wrong.append(f"it ended by itself with {self.daemon.process.status}")
                await asyncio.to_thread(self.daemon.start, "/healthz")
            size = self.daemon.size()
            self.peak = Size(*(max(pair) for pair in zip(astuple(self.peak), astuple(size), strict=True)))

    def restart(self) -> None:
        """
        Kill or stop the daemon, check what it left, and start it again.
        """
        if self._chance.random() < 0.7:
            self.daemon.process.kill()
            self.kills += 1
        else:
            self.end()
        self.look()
        self.daemon.start("/healthz")

    def end(self) -> None:
        """
        Stop the daemon, which must exit cleanly and in time.
        """
        self.ends += 1
        status = self.daemon.process.terminate(DRAIN_SECONDS + PATIENCE)
        if status != 0:
            self.wrong.append(f"asked to end, it gave {status}")

    def look(self) -> None:
        self.wrong += [f"{path} is not what its name says" for path in self.daemon.wrong_content()]

    def settle(self) -> None:
        """
        Check, after all clients have left, that nothing of them is left either.
        """
        small = "descriptors and threads are few when nobody is there"
        self.wrong += wait_for(lambda: is_small(self.daemon.size()), f"{small}: {self.daemon.size()}")
        self.wrong += wait_for(lambda: self.daemon.used() <= LIMIT, f"the directory is within {LIMIT} bytes")
        self.end()
        self.look()
        self.daemon.age()
        self.daemon.start("/healthz")
        self.wrong += wait_for(lambda: not self.daemon.files("arriving"), "old leftovers are swept")
        self.end()
        if self.peak.rss > LARGEST or self.peak.threads > THREADS:
            self.wrong.append(f"it got as large as {self.peak}")
        if not any(what.startswith("pull: whole") for what in self.tally.counts):
            self.wrong.append("no pull came to anything")
        if "Traceback" in self.daemon.process.output.read_text("utf-8", "replace"):
            self.wrong.append("there is a traceback in the log")


def astuple(size: Size) -> tuple[int, int, int]:
    return size.rss, size.threads, size.descriptors


def is_small(size: Size) -> bool:
    return size.threads <= THREADS and size.descriptors <= DESCRIPTORS


def report(soak: Soak, faults: dict[str, int], seed: int) -> None:
    """
    Print the result.
    """
    print(f"seed {seed}: killed {soak.kills} times, ended {soak.ends} times; at most {soak.peak}")
    print("left alone, it went from {} to {}".format(*soak.quiet))
    print(f"{soak.tally.bytes / 2**20:.0f} MiB in whole answers; stand-in's faults: {sum(faults.values())}")
    for what, count in sorted(faults.items()):
        print(f"  {count:6} {what}")
    print("what clients got:")
    for what, count in sorted(soak.tally.counts.items()):
        print(f"  {count:6} {what}")
    wrong = soak.tally.wrong + soak.wrong
    print("nothing that must never be was seen" if not wrong else f"{len(wrong)} things that must never be:")
    for what in wrong[:20]:
        print(f"  {what}")


def main() -> int:
    """
    Return the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--twistd", default=str(Path(sys.executable).parent / "twistd"))
    parser.add_argument("--keep", type=Path, help="where to keep the daemon's directory and log")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:.0f} s", flush=True)
    standin = StandIn("--faults", "--seed", str(options.seed))
    faults: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="ecrproxy-soak-") as scratch:
        home = options.keep or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        daemon = Daemon(options.twistd, home, standin.registry, LIMIT)
        soak = Soak(daemon, options.seconds, options.seed)
        try:
            daemon.start("/healthz")
            asyncio.run(soak.run())
            soak.settle()
        finally:
            daemon.process.kill()
            faults = standin.stop()
            report(soak, faults, options.seed)
    return 1 if soak.tally.wrong or soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
