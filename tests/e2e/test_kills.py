"""
Kill -9 at a random instant of a storm, a hundred times over.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.clients import Crowd, Tally
from soak.daemon import Daemon, StandIn, wait_for
from soak.goods import Goods, fill
from tests.registry_content import Shelves

from .conftest import Figures

KILLS = 100
"""When to stop, on a machine too slow for all of them."""
CLIENTS = 12
LIMIT = 48 * 2**20
RATE = 24 * 2**20
"""Bytes a second on each of the bucket's connections: so many transfers are under way when the kill comes."""


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """
    Run a stand-in for ECR that behaves.
    """
    standin = StandIn("--rate", str(RATE))
    yield standin
    standin.stop()


async def storm(daemon: Daemon, goods: Goods, tally: Tally, seconds: float, seed: str) -> None:
    """
    Have clients pull until the daemon is killed, in the middle of it.
    """
    crowd = asyncio.ensure_future(Crowd(daemon.port, goods, tally).run(CLIENTS, seed))
    await asyncio.sleep(seconds)
    daemon.process.kill()
    await asyncio.sleep(0)
    crowd.cancel()
    await asyncio.wait([crowd])


def problems(daemon: Daemon, tally: Tally) -> list[str]:
    """
    Say what is wrong with a daemon that was just started, and with what clients got so far.
    """
    wrong = [f"{path} is not what its name says" for path in daemon.wrong_content()]
    wrong += wait_for(lambda: daemon.used() <= daemon.limit, f"the directory is within {daemon.limit} bytes")
    return wrong + tally.wrong


def test_a_hundred_kills_in_a_storm_leave_nothing_wrong(
    home: Path, twistd: Path, standin: StandIn, figures: Figures
) -> None:
    """
    After each start all content is right and within the limit, nobody got anything partial, and leftovers are swept.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, goods, tally = random.Random(seed), fill(Shelves()), Tally()
    assert goods.size > 2 * LIMIT, "all of it would fit"
    directory = home / "kills"
    directory.mkdir()
    daemon = Daemon(twistd, directory, standin.registry, LIMIT)
    left, started = 0, time.monotonic()
    for kills in range(KILLS):
        daemon.start()
        try:
            assert problems(daemon, tally) == [], f"after kill {kills} of seed {seed}"
            asyncio.run(storm(daemon, goods, tally, chance.uniform(0, 0.6), f"{seed}-{kills}"))
        finally:
            daemon.process.kill()
        left += bool(daemon.files("arriving"))
    daemon.age()
    daemon.start()
    try:
        assert problems(daemon, tally) == []
        assert wait_for(lambda: not daemon.files("arriving"), "old leftovers are swept") == []
    finally:
        daemon.process.kill()
    whole = sum(count for what, count in tally.counts.items() if what.endswith("whole"))
    figures.append(
        f"{KILLS} kills in {time.monotonic() - started:.0f} s, {left} of them in the middle of transfers; "
        f"{whole} answers and {tally.bytes / 2**20:.0f} MiB were whole and right; seed {seed}"
    )
    assert left, "no kill hit a transfer"
    assert whole, "no client got anything"
