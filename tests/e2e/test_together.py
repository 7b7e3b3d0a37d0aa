"""
Many clients request one large uncached blob.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .asking import Transfer, download
from .chain import Chain
from .conftest import COUNTS, MakeChain
from .images import Images
from .processes import PATIENCE

CLIENTS = 20


@pytest.fixture
def chain(make_chain: MakeChain, hold: Path) -> Chain:
    """
    Return a chain whose bucket sends no more than half of the large blob for now.
    """
    return make_chain(front=("--hold", str(hold)), settings={"PROXY_STALL_SECONDS": "300"})


def download_together(url: str, clients: int, all_have_some: Callable[[], None]) -> list[Transfer]:
    """
    Start so many downloads at the same moment.

    @param all_have_some: called once each of them has got its first bytes.
    """
    start = threading.Barrier(clients, timeout=PATIENCE)
    first = threading.Barrier(clients, all_have_some, timeout=PATIENCE)

    def one() -> Transfer:
        start.wait()
        return download(url, begun=first.wait)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(one) for _ in range(clients)]
        return [each.result(timeout=2 * PATIENCE) for each in running]


def blob_path(images: Images) -> str:
    """
    Return the path of the large blob.
    """
    return f"/v2/{images.big.repository}/blobs/{images.big.layers[0]}"


def test_twenty_clients_cost_one_transfer(chain: Chain, images: Images, hold: Path) -> None:
    """
    All get the right bytes while they arrive; the bucket sends each byte once.
    """
    transfers = download_together(chain.daemon.url + blob_path(images), CLIENTS, hold.unlink)
    bucket = chain.counters()["bucket"]
    assert {each.status for each in transfers} == {200}
    assert {each.digest for each in transfers} == {images.big.layers[0]}
    assert bucket["bytes"] == transfers[0].size  # over several connections, but each byte once
    assert sorted(each.cache for each in transfers) == ["JOINED"] * (CLIENTS - 1) + ["MISS"]


@COUNTS
def test_a_range_joins_a_transfer_under_way(make_chain: MakeChain, images: Images, hold: Path, count: str) -> None:
    """
    A client gets its range while the whole arrives. Few bytes come twice, for a range does not wait.
    """
    settings = {"PROXY_STALL_SECONDS": "300", "PROXY_WORKER_PROCESSES": count}
    chain = make_chain(front=("--hold", str(hold)), settings=settings)
    url = chain.daemon.url + blob_path(images)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(download, url)
        part = pool.submit(download, url, {"Range": "bytes=1000000-1999999"}, hold.unlink)
        whole_seen, part_seen = whole.result(timeout=2 * PATIENCE), part.result(timeout=2 * PATIENCE)
    assert (part_seen.status, part_seen.size) == (206, 1_000_000)
    assert whole_seen.digest == images.big.layers[0]
    chain.daemon.settle()
    again = chain.daemon.ask(blob_path(images))
    assert again.headers["x-cache-status"] == "HIT"
    wanted = hashlib.sha256(again.body[1_000_000:2_000_000]).hexdigest()
    assert part_seen.digest == f"sha256:{wanted}"
    assert chain.counters()["bucket"]["bytes"] <= 1.5 * len(again.body)
