"""
Kill -9 at a random instant of a storm, a hundred times; with workers, and with two daemons on one directory, too.

C{ECRPROXY_E2E_KILLS=100} is the number for each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.clients import Crowd, Tally
from soak.daemon import Daemon, StandIn, wait_for
from soak.goods import Goods, fill
from tests.registry_content import Shelves

from .asking import answers
from .chain import LOOKS
from .conftest import Figures
from .processes import alive, children, eventually

ONE, WORKERS, DAEMONS = "one process", "two workers", "two daemons"
KILLS = {ONE: 100, WORKERS: 15, DAEMONS: 15}
"""Number of times that all are killed; of several, one is killed a moment before."""
LONGEST = {ONE: 0.6, WORKERS: 1.5, DAEMONS: 1.5}
"""Maximum seconds until a kill: two processes need longer than one until both can fetch."""
CLIENTS = 12
LIMIT = 48 * 2**20
RATE = 24 * 2**20
"""Bytes per second and bucket connection, so that many transfers are in flight at the kill."""


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """
    Run a stand-in for ECR that behaves.
    """
    standin = StandIn("--rate", str(RATE))
    yield standin
    standin.stop()


def make(kind: str, twistd: Path, home: Path, registry: str) -> list[Daemon]:
    """
    Create the daemons without starting them.
    """
    more = {"PROXY_CACHE_DIR": str(home / "cache"), "PROXY_WORKER_PROCESSES": "2" if kind == WORKERS else "1"}
    made = []
    for number in range(2 if kind == DAEMONS else 1):
        folder = home / str(number)
        folder.mkdir(parents=True)
        daemon = Daemon(twistd, folder, registry, LIMIT, **more)
        daemon.cache = home / "cache"
        made.append(daemon)
    return made


def ready(port: int) -> bool:
    """
    Return True if a daemon, or one of its workers, can serve.
    """
    return answers(f"http://127.0.0.1:{port}/readyz")()


def processes(daemons: list[Daemon]) -> list[int]:
    """
    List the processes that serve clients.
    """
    return [pid for each in daemons for pid in children(each.process.pid) or [each.process.pid]]


def kill_all(daemons: list[Daemon]) -> None:
    """
    Kill daemons, each with its workers: the parent first, or it would replace them.
    """
    for daemon in daemons:
        if not hasattr(daemon, "process"):  # the one before it did not start
            continue
        workers = children(daemon.process.pid) if daemon.process.status is None else []
        daemon.process.kill()
        for pid in filter(alive, workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(alive, workers)), "they are gone")  # noqa: B023


async def storm(
    daemons: list[Daemon], goods: Goods, tally: Tally, chance: random.Random, longest: float, seed: str
) -> None:
    """
    Have clients pull until all is killed, in the middle of it; with several processes, first one of them.
    """
    crowds = [
        asyncio.ensure_future(Crowd(each.port, goods, tally).run(CLIENTS // len(daemons), f"{seed}-{each.port}"))
        for each in daemons
    ]
    await asyncio.sleep(chance.uniform(0, longest))
    running = processes(daemons)
    if len(running) > 1:
        victim = chance.choice(running)
        os.kill(victim, signal.SIGKILL)
        await asyncio.sleep(chance.uniform(0, 0.6))
    kill_all(daemons)
    await asyncio.sleep(0)
    for each in crowds:
        each.cancel()
    await asyncio.wait(crowds)


def problems(daemon: Daemon, tally: Tally) -> list[str]:
    """
    Return what is wrong with a daemon that was just started, and with the clients' results so far.
    """
    wrong = [f"{path} is not what its name says" for path in daemon.wrong_content()]
    wrong += wait_for(lambda: daemon.used() <= daemon.limit, f"the directory is within {daemon.limit} bytes")
    return wrong + tally.wrong


@pytest.mark.parametrize("kind", KILLS)
def test_a_hundred_kills_in_a_storm_leave_nothing_wrong(
    home: Path, twistd: Path, standin: StandIn, figures: Figures, kind: str
) -> None:
    """
    After each start all content is right and within the limit, no client got anything partial, and leftovers are swept.
    """
    seed, times = random.randrange(2**32), int(os.environ.get("ECRPROXY_E2E_KILLS", KILLS[kind]))
    print(f"seed {seed}")
    chance, goods, tally = random.Random(seed), fill(Shelves()), Tally()
    assert goods.size > 2 * LIMIT, "all of it would fit"
    daemons = make(kind, twistd, home / f"kills {kind}", standin.registry)
    left, started = 0, time.monotonic()
    for kills in range(times):
        try:
            for each in daemons:
                each.start()
                # Whichever worker answers, it has a token by then.
                each.process.wait_until(lambda: all(map(ready, [each.port] * LOOKS)))  # noqa: B023
            assert problems(daemons[0], tally) == [], f"after kill {kills} of seed {seed}"
            asyncio.run(storm(daemons, goods, tally, chance, LONGEST[kind], f"{seed}-{kills}"))
        finally:
            kill_all(daemons)
        left += bool(daemons[0].files("arriving"))
    daemons[0].age()
    try:
        for each in daemons:
            each.start()
        assert problems(daemons[0], tally) == []
        assert wait_for(lambda: not daemons[0].files("arriving"), "old leftovers are swept") == []
    finally:
        kill_all(daemons)
    whole = sum(count for what, count in tally.counts.items() if what.endswith("whole"))
    figures.append(
        f"{kind}: {times} kills in {time.monotonic() - started:.0f} s, {left} of them in the middle of transfers; "
        f"{whole} answers and {tally.bytes / 2**20:.0f} MiB were whole and right; seed {seed}"
    )
    assert left, "no kill hit a transfer"
    assert whole, "no client got anything"
