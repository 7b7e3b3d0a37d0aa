"""
The measurements, each in a separate round for each server.

A round starts everything from scratch, so that no order of them helps any server; the results of several rounds are
kept, and
their median counts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.clients import (
    GB,
    ask,
    blob,
    download,
    fetch_all_at_once,
    fetch_together,
    hammer,
    hashing_seconds,
    idle,
    manifest,
    pull,
)
from bench.content import MEDIUM_BYTES, TAG, fill
from bench.ground import Ground, Upstream
from bench.peers import DIRECT, DISTRIBUTION, MANIFESTS, NGINX, OURS, Served, served
from bench.processes import cpu_seconds, resident
from bench.results import Figures
from bench.upstream import SECRET


@dataclass(frozen=True)
class Sizes:
    """
    The sizes of everything.

    @ivar times: how often one stream fetches the large blob in a round, over TCP and over TLS.
    @ivar shares: the same for each of eight streams.
    @ivar hammering: seconds of small answers.
    @ivar latency: seconds before each upstream answer of the cold pulls.
    @ivar rate: bytes a second of each bucket connection of the cold pulls.
    @ivar crowd: clients that fetch a warm blob of 1 MiB at once.
    @ivar fetches: how often each of them does.
    @ivar huge_bytes: size of the layer of which only the bytes count.
    @ivar rushing: clients that request a cold blob of 1 MiB at once.
    @ivar small_layers: layers of an image that has many small ones.
    @ivar latencies: seconds before each upstream answer of the cold pulls of that.
    """

    large_bytes: int = 256 * 2**20
    times: tuple[int, int] = (8, 4)
    shares: tuple[int, int] = (2, 1)
    hammering: int = 5
    layers: int = 8
    layer_bytes: int = 24 * 2**20
    clients: int = 16
    latency: float = 0.03
    rate: float = 60e6
    connections: int = 1000
    crowd: int = 500
    fetches: int = 10
    huge_bytes: int = 2**30
    rushing: int = 2000
    small_layers: int = 30
    small_layer_bytes: int = 2 * 2**20
    latencies: tuple[float, ...] = (0.03, 0.1)


QUICK = Sizes(
    large_bytes=16 * 2**20,
    times=(2, 2),
    shares=(1, 1),
    hammering=1,
    layers=3,
    layer_bytes=2 * 2**20,
    clients=4,
    latency=0.005,
    connections=100,
    crowd=50,
    fetches=4,
    huge_bytes=32 * 2**20,
    rushing=100,
    small_layers=9,
    small_layer_bytes=2**18,
    latencies=(0.005, 0.01),
)

STREAMS = 8
LANES = 4
"""Connections to a bucket that the daemon has for one blob."""
FEW, MANY = 32, 256
"""Connections on which manifests are asked for."""
SETTLED = 0.5
"""Seconds for work after the last client has its answer, such as committing the file."""
Measure = Callable[[Ground, Sizes, str, Figures], None]


def _stream(ground: Ground, sizes: Sizes, one: Served, streams: int, times: int) -> tuple[float, float]:
    """
    Fetch the large blob; return GB a second, and the server's CPU seconds per GB.
    """
    used = cpu_seconds(one.pid)
    seconds = download(ground, one, blob(ground.shelf.large), sizes.large_bytes, streams, times)
    moved = sizes.large_bytes * streams * times / GB
    return moved / seconds, (cpu_seconds(one.pid) - used) / moved


def hot(ground: Ground, sizes: Sizes, peer: str, figures: Figures, *, secure: bool = False) -> None:
    """
    Measure a cached blob, for one stream and for eight.
    """
    name = "tls" if secure else "tcp"
    with ground.upstream() as upstream, served(peer, ground, upstream, secure=secure) as one:
        for _ in range(2):  # the second time it is certainly cached
            download(ground, one, blob(ground.shelf.large), sizes.large_bytes, 1, 1)
        time.sleep(0.5)
        speed, cost = _stream(ground, sizes, one, 1, sizes.times[secure])
        figures.add(f"{name} one", peer, speed)
        figures.add(f"{name} one cpu", peer, cost)
        speed, cost = _stream(ground, sizes, one, STREAMS, sizes.shares[secure])
        figures.add(f"{name} eight", peer, speed)
        figures.add(f"{name} eight cpu", peer, cost)


def hot_tls(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure a cached blob over TLS.
    """
    hot(ground, sizes, peer, figures, secure=True)


def hits(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure manifests that are in the cache. nginx keeps tags for a year here. The others ask upstream each time; the
    daemon asks once for all clients that ask meanwhile.
    """
    settings = {MANIFESTS: "yes"} if peer == NGINX else {}
    with ground.upstream() as upstream, served(peer, ground, upstream, settings=settings) as one:
        pull(ground, one.url)
        digest = ground.shelf.manifest
        asked = [("digest", digest, FEW), ("tag", TAG, FEW)]
        if peer != DISTRIBUTION:  # in a short run, it may answer none of so many
            asked.append(("tag of many", TAG, MANY))
        for name, reference, clients in asked:
            hammer(ground, one, manifest(reference), 1, clients)
            used = cpu_seconds(one.pid)
            rate = hammer(ground, one, manifest(reference), sizes.hammering, clients)
            figures.add(f"hits {name}", peer, rate.requests)
            figures.add(f"hits {name} cpu", peer, (cpu_seconds(one.pid) - used) / rate.count * 1e6)


def crowd(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure a cached blob of 1 MiB that many clients fetch at once, again and again.
    """
    path = blob(ground.shelf.medium)
    with ground.upstream() as upstream, served(peer, ground, upstream) as one:
        for _ in range(2):
            download(ground, one, path, MEDIUM_BYTES, 1, 1)
        time.sleep(0.5)
        fetch_together(one, path, MEDIUM_BYTES, sizes.crowd, 1)
        used = cpu_seconds(one.pid)
        seconds = fetch_together(one, path, MEDIUM_BYTES, sizes.crowd, sizes.fetches)
        count = sizes.crowd * sizes.fetches
        figures.add("crowd", peer, count / seconds)
        figures.add("crowd cpu", peer, (cpu_seconds(one.pid) - used) / count * 1e6)


def connecting(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure cached manifests, on keep-alive connections and on a new one each.
    """
    settings, path = {MANIFESTS: "yes"} if peer == NGINX else {}, manifest(ground.shelf.manifest)
    with ground.upstream() as upstream, served(peer, ground, upstream, settings=settings) as one:
        pull(ground, one.url)
        costs = []
        for reconnecting in (False, True):
            ask(one, path, 0.5, reconnecting=reconnecting)
            used = cpu_seconds(one.pid)
            count = ask(one, path, sizes.hammering, reconnecting=reconnecting)
            costs.append((cpu_seconds(one.pid) - used) / count * 1e6)
        figures.add("kept cpu", peer, costs[0])
        figures.add("new cpu", peer, costs[1] - costs[0])


def cold(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure one client's pull of uncached content.
    """
    with ground.upstream(sizes.latency, sizes.rate) as upstream:
        if peer == DIRECT:
            figures.add("cold", peer, pull(ground, upstream.registry, token=SECRET))
            return
        with served(peer, ground, upstream) as one:
            figures.add("cold", peer, pull(ground, one.url))


def inbound(ground: Ground, sizes: Sizes, peer: str, figures: Figures, *, secure: bool = False) -> None:
    """
    Measure an uncached large layer, from a bucket with a rate limit per connection.

    nginx verifies nothing: what C{openssl dgst -sha256} takes for as many bytes is added to its CPU time.
    """
    name, size, shelf = "inbound-tls" if secure else "inbound", sizes.huge_bytes, ground.shelf
    settings = {"SSL_CERT_FILE": str(ground.certificate.chain)} if secure and peer == OURS else {}
    with (
        ground.upstream(rate=sizes.rate, secure=secure) as upstream,
        served(peer, ground, upstream, settings=settings) as one,
    ):
        used = cpu_seconds(one.pid)
        seconds = download(ground, one, blob(shelf.huge), size, 1, 1)
        time.sleep(SETTLED)
        cost = cpu_seconds(one.pid) - used
    if peer == NGINX:
        cost += hashing_seconds(ground, Path(shelf.directory, shelf.huge.partition(":")[2]))
    figures.add(name, peer, size / seconds / (LANES * sizes.rate))
    figures.add(f"{name} cpu", peer, cost / size * GB)


def inbound_tls(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure an uncached large layer, from a bucket with TLS.
    """
    inbound(ground, sizes, peer, figures, secure=True)


def rush(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure an uncached blob of 1 MiB that many clients request at once.
    """
    settings = {"PROXY_CONNECTIONS_PER_ADDRESS": "0"} if peer == OURS else {}  # all of them have one
    with (
        ground.upstream(sizes.latency, sizes.rate) as upstream,
        served(peer, ground, upstream, settings=settings) as one,
    ):
        before, used = upstream.counts(), cpu_seconds(one.pid)
        failed = fetch_all_at_once(one, blob(ground.shelf.medium), MEDIUM_BYTES, sizes.rushing)
        time.sleep(SETTLED)
        figures.add("rush", peer, cpu_seconds(one.pid) - used)
        figures.add("rush failed", peer, failed)
        figures.add("rush asked", peer, _asked(upstream, before, "blobs", "blob heads", "bucket requests"))


def ahead(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure one client's pull of many small uncached layers, three at a time, with a distant upstream.
    """
    shelf = fill(ground.fresh("layers") / "content", sizes.small_layers, sizes.small_layer_bytes, 0, 0)
    afar = replace(ground, shelf=shelf)
    try:
        for number, latency in enumerate(sizes.latencies):
            key = ("ahead near", "ahead far")[number]
            with afar.upstream(latency, sizes.rate) as upstream:
                if peer == DIRECT:
                    figures.add(key, peer, pull(afar, upstream.registry, token=SECRET))
                    continue
                with served(peer, afar, upstream) as one:
                    figures.add(key, peer, pull(afar, one.url))
    finally:
        shutil.rmtree(shelf.directory)


def _asked(upstream: Upstream, before: dict[str, int], *names: str) -> int:
    counts = upstream.counts()
    return sum(counts.get(name, 0) - before.get(name, 0) for name in names)


def storm(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure many clients' pull at once, of uncached content, and then again.
    """
    with ground.upstream(sizes.latency, sizes.rate) as upstream, served(peer, ground, upstream) as one:
        before, used = upstream.counts(), cpu_seconds(one.pid)
        figures.add("storm", peer, pull(ground, one.url, clients=sizes.clients))
        figures.add("storm blobs", peer, _asked(upstream, before, "blobs"))
        figures.add("storm bytes", peer, _asked(upstream, before, "bucket bytes") / ground.shelf.image_bytes)
        figures.add("storm cpu", peer, cpu_seconds(one.pid) - used)
        figures.add("memory storm", peer, resident(one.pid))
        time.sleep(0.5)
        before = upstream.counts()
        figures.add("warm", peer, pull(ground, one.url, clients=sizes.clients))
        figures.add("warm asked", peer, _asked(upstream, before, "manifests", "blobs", "blob heads", "pings"))
        figures.add("warm connections", peer, _asked(upstream, before, "connections"))
    for stall in one.stalls:
        figures.add("storm stall", peer, stall * 1000)


def memory(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure the memory of an idle server, and of one with idle clients.
    """
    with ground.upstream() as upstream, served(peer, ground, upstream) as one:
        time.sleep(0.5)
        figures.add("memory", peer, resident(one.pid))
        with idle(ground, one, sizes.connections):
            time.sleep(0.5)
            figures.add("memory connections", peer, resident(one.pid))


def workers(ground: Ground, sizes: Sizes, peer: str, figures: Figures) -> None:
    """
    Measure two workers on two processors as multiples of one process that may use both. Clients have one of the two.
    """
    one, two = (_of_processes(ground, sizes, peer, count) for count in ("1", "2"))
    for name, speed in one.items():
        figures.add(f"workers {name}", peer, two[name] / speed)


def _of_processes(ground: Ground, sizes: Sizes, peer: str, count: str) -> dict[str, float]:
    found: dict[str, float] = {}
    settings = {"PROXY_WORKER_PROCESSES": count}
    with ground.upstream() as upstream, served(peer, ground, upstream, settings=settings) as one:
        pull(ground, one.url)
        for name, reference in (("digest", ground.shelf.manifest), ("tag", TAG)):
            hammer(ground, one, manifest(reference), 2)
            found[name] = hammer(ground, one, manifest(reference), sizes.hammering).requests
    with ground.upstream() as upstream, served(peer, ground, upstream, secure=True, settings=settings) as one:
        path = blob(ground.shelf.large)
        for _ in range(2):
            download(ground, one, path, sizes.large_bytes, STREAMS, 1)
        time.sleep(0.5)
        seconds = download(ground, one, path, sizes.large_bytes, STREAMS, sizes.shares[1])
        found["tls"] = sizes.large_bytes * STREAMS * sizes.shares[1] / GB / seconds
    return found


PEERS = (NGINX, DISTRIBUTION, OURS)
MEASURES: dict[str, tuple[Measure, Sequence[str]]] = {
    "tcp": (hot, PEERS),
    "tls": (hot_tls, PEERS),
    "hits": (hits, PEERS),
    "crowd": (crowd, PEERS),
    "connecting": (connecting, PEERS),
    "cold": (cold, (DIRECT, *PEERS)),
    "inbound": (inbound, (NGINX, OURS)),
    "inbound-tls": (inbound_tls, (NGINX, OURS)),
    "rush": (rush, (NGINX, OURS)),
    "ahead": (ahead, (DIRECT, *PEERS)),
    "storm": (storm, PEERS),
    "memory": (memory, PEERS),
    "workers": (workers, (OURS,)),
}
HUGE = {"inbound", "inbound-tls"}
"""The measures that need a layer of that size."""
