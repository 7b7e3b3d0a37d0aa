"""
Several processes over one cache directory fetch each blob once, and finish what a killed one has begun.

C{ECRPROXY_E2E_BLOB_MIB=256} does it with a blob of that size; it always comes at 20 MB a second.
"""

from __future__ import annotations

import contextlib
import http.client
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .asking import Transfer
from .conftest import Figures
from .group import DAEMONS, WORKERS, Group, StandIn, pull, standing_in
from .processes import PATIENCE, eventually

SIZE = int(os.environ.get("ECRPROXY_E2E_BLOB_MIB", "96")) * 2**20
LANES = 4
RATE = 20 * 10**6 // LANES
"""Bytes per second and bucket connection."""
LIMIT = 2**30


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """
    Run a stand-in with one large blob.
    """
    with standing_in("--blob-bytes", str(SIZE), "--rate", str(RATE)) as running:
        yield running


@pytest.fixture(params=[DAEMONS, WORKERS])
def group(home: Path, twistd: Path, standin: StandIn, request: pytest.FixtureRequest) -> Iterator[Group]:
    """
    Start the processes.
    """
    group = Group(request.param, twistd, home / request.node.name, standin, LIMIT)
    yield group
    group.stop()


def pull_blob(connection: http.client.HTTPConnection, standin: StandIn) -> Transfer:
    return pull(connection, "demo/blob", standin.names["demo/blob"])


def test_a_cold_blob_comes_once(standin: StandIn, group: Group, figures: Figures) -> None:
    """
    Clients of all processes get it while it arrives, and the bucket sends each byte once.
    """
    digest = standin.names["demo/blob"]
    clients = [client for each in group.connect(3).values() for client in each]
    again = group.connect(1)
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(pull_blob, client, standin) for client in clients]
        transfers = [each.result(timeout=2 * PATIENCE) for each in running]
    assert {(each.status, each.digest, each.size) for each in transfers} == {(200, digest, SIZE)}
    assert sorted(each.cache for each in transfers) == ["JOINED"] * (len(clients) - 1) + ["MISS"]
    figures.append(f"{group.kind}, {SIZE >> 20} MiB: {standin.sent / SIZE:.2f} x its bytes from the bucket")
    assert standin.sent == SIZE
    eventually(lambda: not group.one.files("arriving"), "it is content")
    assert {pull_blob(client, standin).cache for (client,) in again.values()} == {"HIT"}
    assert group.one.wrong_content() == []


def test_the_others_finish_for_one_that_is_killed(standin: StandIn, group: Group, figures: Figures) -> None:
    """
    Their clients get right bytes without a break, and few bytes come twice.
    """
    digest = standin.names["demo/blob"]
    (carrier, (first, second)), *others = group.connect(2).items()
    again = group.connect(1)
    followers = [client for _, clients in others for client in clients]
    with ThreadPoolExecutor(2 + len(followers)) as pool:
        lost = [pool.submit(pull_blob, first, standin)]
        eventually(lambda: standin.sent > SIZE // 16, "it has begun")
        lost.append(pool.submit(pull_blob, second, standin))
        running = [pool.submit(pull_blob, client, standin) for client in followers]
        eventually(lambda: standin.sent > SIZE // 2, "half of it has come")
        group.kill(carrier)
        for each in lost:
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                assert each.result(timeout=PATIENCE).size < SIZE
        transfers = [each.result(timeout=2 * PATIENCE) for each in running]
    assert {(each.status, each.cache, each.digest, each.size) for each in transfers} == {(200, "JOINED", digest, SIZE)}
    figures.append(
        f"{group.kind}, {SIZE >> 20} MiB, the one that brings it killed midway: {standin.sent / SIZE:.2f} x; "
        f"the others' clients waited {max(each.pause for each in transfers):.2f} s at the most"
    )
    assert standin.sent <= 1.3 * SIZE
    eventually(lambda: not group.one.files("arriving"), "it is content")
    assert group.one.wrong_content() == []
    (alive, *_) = [pid for pid, _ in others]
    (client,) = again[alive]
    assert pull_blob(client, standin).cache == "HIT"
    assert "Traceback" not in group.said()
