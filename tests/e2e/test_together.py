"""
Many clients ask for one large blob that is not there yet.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .asking import Transfer, download
from .chain import Chain
from .conftest import Figures, MakeChain
from .images import Images

CLIENTS = 20
RATE = 32 * 2**20


@pytest.fixture
def chain(make_chain: MakeChain) -> Chain:
    """
    Give a chain whose bucket takes two seconds for the large blob.
    """
    return make_chain(front=("--rate", str(RATE)))


def download_together(url: str, clients: int) -> tuple[float, list[Transfer]]:
    """
    Start so many downloads at the same moment, and tell when that was.
    """
    barrier = threading.Barrier(clients, timeout=30)
    starts: list[float] = []

    def one() -> Transfer:
        barrier.wait()
        starts.append(time.monotonic())
        return download(url)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(one) for _ in range(clients)]
        transfers = [each.result(timeout=90) for each in running]
    return min(starts), transfers


def blob_path(images: Images) -> str:
    """
    Give the path of the large blob.
    """
    return f"/v2/{images.big.repository}/blobs/{images.big.layers[0]}"


def test_twenty_clients_cost_one_transfer(chain: Chain, images: Images, figures: Figures) -> None:
    """
    All get the right bytes while they arrive; the bucket sends each byte once.
    """
    url = chain.daemon.url + blob_path(images)
    started, transfers = download_together(url, CLIENTS)
    bucket = chain.counters()["bucket"]
    last_first = max(each.first for each in transfers) - started
    first_end = min(each.end for each in transfers) - started
    last_end = max(each.end for each in transfers) - started
    figures.append(
        f"{CLIENTS} clients: the last one's first byte after {last_first:.2f} s,"
        f" the first one's end after {first_end:.2f} s, the last one's after {last_end:.2f} s"
    )
    assert {each.status for each in transfers} == {200}
    assert {each.digest for each in transfers} == {images.big.layers[0]}
    assert bucket["bytes"] == transfers[0].size  # over several connections, but each byte once
    assert sorted(each.cache for each in transfers) == ["JOINED"] * (CLIENTS - 1) + ["MISS"]
    assert last_first < first_end / 2


def test_a_range_joins_a_transfer_under_way(chain: Chain, images: Images) -> None:
    """
    Who asks for a part gets it while it arrives, from the same transfer.

    All but its very end, that is: this waits until the digest is known to be right.
    """
    url = chain.daemon.url + blob_path(images)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(download, url)
        part = pool.submit(download, url, {"Range": "bytes=1000000-1999999"})
        whole_seen, part_seen = whole.result(timeout=90), part.result(timeout=90)
    assert (part_seen.status, part_seen.size) == (206, 1_000_000)
    assert part_seen.half < (whole_seen.first + whole_seen.end) / 2
    assert whole_seen.digest == images.big.layers[0]
    chain.daemon.settle()
    again = chain.daemon.ask(blob_path(images))
    assert again.headers["x-cache-status"] == "HIT"
    wanted = hashlib.sha256(again.body[1_000_000:2_000_000]).hexdigest()
    assert part_seen.digest == f"sha256:{wanted}"
    assert chain.counters()["bucket"]["bytes"] == len(again.body)
