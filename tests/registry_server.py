"""
The stand-in for ECR as a program: C{python -m tests.registry_server --port 0}.

It prints one line of JSON with its URLs when it is ready, and serves until it
is stopped. Point C{AWS_ENDPOINT_URL} at C{api}, and a proxy at C{registry}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IReactorCore, IReactorTCP, IReactorTime
from twisted.internet.protocol import ServerFactory
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.web.http import Request
from twisted.web.pages import notFound
from twisted.web.resource import IResource
from twisted.web.server import Site

from tests.registry import StandIn, layer
from tests.registry_content import SCHEMA2

LOCAL = "127.0.0.1"


class _Reactor(IReactorCore, IReactorTCP, IReactorTime):
    """
    What the program needs of a reactor.
    """


class QuietSite(Site):
    """
    A Site without an access log, which would cost more than the answers.
    """

    def log(self, request: Request) -> None:
        pass


def _site() -> QuietSite:
    site: Callable[[IResource], QuietSite] = QuietSite  # not annotated in twisted.web
    return site(notFound())


@lru_cache(maxsize=32)  # most tests request the same again, and a MiB takes as long as a small test
def noise(seed: str, length: int) -> bytes:
    """
    Return incompressible bytes, the same for the same seed.
    """
    return hashlib.shake_128(seed.encode()).digest(length)


def push_samples(standin: StandIn, layers: int, layer_bytes: int) -> dict[str, str]:
    """
    Push the images for a demonstration: one of several layers, one for several platforms.
    """
    app = standin.push_image(
        "demo/app",
        "latest",
        layers=[layer(f"part{n}", noise(f"part{n}", layer_bytes)) for n in range(layers)],
        media_type=SCHEMA2,
    )
    shared = layer("shared", noise("shared", layer_bytes))
    images = [
        standin.push_image("demo/multi", layers=[shared, layer("arch", name.encode())], platform=name)
        for name in ("linux/amd64", "linux/arm64")
    ]
    index = standin.push_index("demo/multi", "latest", images)
    return {"demo/app:latest": app.digest, "demo/multi:latest": index}


def push_many(standin: StandIn, total: int) -> dict[str, str]:
    """
    Push blobs of 16 KiB to 4 MiB into one repository, until they have so many bytes together.
    """
    chance, pushed, names = random.Random("many"), 0, dict[str, str]()
    while pushed < total:
        size = int(2 ** chance.uniform(14, 22))
        names[f"demo/many/{len(names)}"] = standin.push_blob("demo/many", noise(f"many{len(names)}", size))
        pushed += size
    return names


def listen(reactor: _Reactor, port: int, site: QuietSite) -> int:
    """
    Listen on loopback only; return the port.
    """
    host = reactor.listenTCP(port, cast("ServerFactory", site), interface=LOCAL).getHost()
    assert isinstance(host, IPv4Address)
    return host.port


def serve(reactor: _Reactor, options: argparse.Namespace) -> dict[str, object]:
    """
    Listen, build the stand-in for the allocated ports, and print its URLs.
    """
    sites = _site(), _site()
    port = listen(reactor, options.port, sites[0])
    registry = f"http://{LOCAL}:{port}"
    bucket = f"http://{LOCAL}:{listen(reactor, options.bucket_port, sites[1])}"
    standin = StandIn(reactor, registry=registry, bucket=bucket)
    standin.quirks.latency, standin.quirks.rate = options.latency, options.rate
    for site in sites:
        site.resource = standin.resource
    images = push_samples(standin, options.layers, options.layer_bytes)
    if options.blob_bytes:
        images["demo/blob"] = standin.push_blob("demo/blob", noise("blob", options.blob_bytes))
    if options.many_bytes:
        images |= push_many(standin, options.many_bytes)
    api = f"http://localhost:{port}"
    return {
        "registry": registry,
        "bucket": bucket,
        "api": api,
        "asked": f"{api}/_asked",
        "images": images,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Parse the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.registry_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="registry and AWS API; 0: any")
    parser.add_argument("--bucket-port", type=int, default=0, help="the bucket; 0: any")
    parser.add_argument("--latency", type=float, default=0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, help="bytes a second on each bucket connection")
    parser.add_argument("--layers", type=int, default=4, help="layers of demo/app")
    parser.add_argument("--layer-bytes", type=int, default=2**20, help="size of each layer")
    parser.add_argument("--blob-bytes", type=int, default=0, help="size of one blob in demo/blob")
    parser.add_argument("--many-bytes", type=int, default=0, help="size of many blobs in demo/many, all together")
    return parser.parse_args(arguments)


def main() -> None:
    """
    Run until stopped; errors go to standard error.
    """
    from twisted.internet import reactor as installed

    reactor = cast("_Reactor", installed)
    complaints = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    observer = FilteringLogObserver(textFileLogObserver(sys.stderr), [complaints])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
    print(json.dumps(serve(reactor, parse(sys.argv[1:]))), flush=True)
    reactor.run()


if __name__ == "__main__":
    main()
