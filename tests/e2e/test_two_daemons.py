"""
Two daemons that were started separately over one cache directory.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from soak.daemon import Daemon
from tests.registry_server import noise

from .asking import Transfer, ask, download
from .conftest import Figures
from .installing import CHECKOUT
from .processes import PATIENCE, eventually

SIZE = 256 * 2**20
LANES = 4
RATE = 20 * 10**6 // LANES
"""Bytes a second on each of the bucket's connections."""
LIMIT = 2**30


@dataclass
class StandIn:
    """A stand-in for ECR with one blob, which counts the bytes that its bucket sends."""

    process: subprocess.Popen[str]
    registry: str
    asked: str
    digest: str

    @property
    def sent(self) -> int:
        return int(ask(self.asked).json()["bytes_sent"])


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """
    Run the stand-in.
    """
    argv = [sys.executable, "-m", "tests.registry_server", "--blob-bytes", str(SIZE), "--rate", str(RATE)]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        said: dict[str, Any] = json.loads(process.stdout.readline())
        yield StandIn(process, said["registry"], said["asked"], said["images"]["demo/blob"])
        process.terminate()


@pytest.fixture
def daemons(home: Path, twistd: Path, standin: StandIn, request: pytest.FixtureRequest) -> Iterator[list[Daemon]]:
    """
    Start two daemons on one directory.
    """
    folder = home / request.node.name
    more = {"PROXY_CACHE_DIR": str(folder / "cache"), "PROXY_NAMESPACE_PATTERN": "demo/.*", "PROXY_STALL_SECONDS": "60"}
    made = []
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        daemon = Daemon(twistd, folder / name, standin.registry, LIMIT, **more)
        daemon.cache = folder / "cache"
        daemon.start()
        made.append(daemon)
    yield made
    for daemon in made:
        daemon.process.stop()


def pull(daemon: Daemon, standin: StandIn, begun: Callable[[], object] = lambda: None) -> Transfer:
    """
    Pull the blob.
    """
    return download(f"http://127.0.0.1:{daemon.port}/v2/demo/blob/blobs/{standin.digest}", begun=begun)


def test_one_of_them_downloads_a_blob(standin: StandIn, daemons: list[Daemon], figures: Figures) -> None:
    """
    Clients of both get it while it arrives, and the bucket sends each byte once.
    """
    one, two = daemons
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(pull, daemon, standin) for daemon in (one, two, one, two, two, one)]
        transfers = [each.result(timeout=2 * PATIENCE) for each in running]
    assert {(each.status, each.digest, each.size) for each in transfers} == {(200, standin.digest, SIZE)}
    assert sorted(each.cache for each in transfers) == ["JOINED"] * 5 + ["MISS"]
    figures.append(f"two daemons, one directory: {standin.sent / SIZE:.2f} x a blob's bytes from the bucket")
    assert standin.sent == SIZE
    eventually(lambda: not one.files("arriving"), "it is content")
    assert pull(two, standin).cache == "HIT"
    assert one.wrong_content() == []


def test_the_other_finishes_for_one_that_is_killed(standin: StandIn, daemons: list[Daemon], figures: Figures) -> None:
    """
    Its clients get right bytes without a break, and little comes twice.
    """
    one, two = daemons
    with ThreadPoolExecutor(5) as pool:
        lost = pool.submit(pull, one, standin)
        eventually(lambda: standin.sent > SIZE // 16, "it has begun")
        running = [pool.submit(pull, two, standin) for _ in range(4)]
        eventually(lambda: standin.sent > SIZE // 2, "half of it has come")
        one.process.kill()
        assert lost.result(timeout=PATIENCE).size < SIZE
        transfers = [each.result(timeout=2 * PATIENCE) for each in running]
    expected = (200, "JOINED", f"sha256:{hashlib.sha256(noise('blob', SIZE)).hexdigest()}", SIZE)
    assert {(each.status, each.cache, each.digest, each.size) for each in transfers} == {expected}
    figures.append(f"its writer killed midway: {standin.sent / SIZE:.2f} x")
    assert standin.sent <= 1.3 * SIZE
    eventually(lambda: not two.files("arriving"), "it is content")
    assert two.wrong_content() == []
    assert pull(two, standin).cache == "HIT"
