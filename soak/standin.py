"""
The stand-in for ECR as a program that misbehaves all the time: C{python -m soak.standin --seed 1 --faults}.

It prints its URLs when it is ready, and serves until it is stopped. Each fault lasts for a moment, one follows the
other, and the seed chooses them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, cast

from twisted.web.pages import notFound

from soak.goods import WRONG, Goods, fill
from tests.registry import StandIn
from tests.registry_http import Service
from tests.registry_server import LOCAL, QuietSite, listen

PULLING: Final[tuple[Service, ...]] = ("registry", "bucket")
EVERYWHERE: Final[tuple[Service, ...]] = (*PULLING, "api")
LONGEST: Final = 1.5
"""Seconds that a fault lasts, but for a stall."""
STALL: Final = 4.0
"""Longer than the daemon waits for a body, see soak.daemon."""
BREATHER: Final = 0.6
"""The most seconds between two faults."""


class Weather:
    """
    A sequence of faults.
    """

    def __init__(self, standin: StandIn, goods: Goods, chance: random.Random) -> None:
        self._standin, self._goods, self._chance = standin, goods, chance
        self.counts: Counter[str] = Counter()
        self._faults: list[Callable[[], Callable[[], object] | None]] = [
            self.reset,
            self.reset,
            self.stall,
            self.silence,
            self.refuse,
            self.throttle,
            self.fail,
            self.wrong_bytes,
            self.other_length,
            self.expire_urls,
            self.expire_tokens,
            self.forget_tokens,
            self.late_headers,
            self.error_page,
        ]

    def turn(self) -> None:
        """
        Start the next fault, and end it later.
        """
        fault = self._chance.choice(self._faults)
        self.counts[fault.__name__] += 1
        mend = fault()
        clock = self._standin.clock
        lasting = STALL if fault == self.stall else self._chance.uniform(0.1, LONGEST)
        if mend is not None:
            clock.callLater(lasting, mend)
        clock.callLater(self._chance.uniform(0.05, BREATHER), self.turn)

    def digest(self) -> str:
        paths = self._goods.large if self._chance.random() < 0.6 else self._goods.small
        return self._chance.choice(list(paths)).rpartition("/")[2]

    def reset(self) -> Callable[[], object]:
        after = int(2 ** self._chance.uniform(0, 24))
        return self._standin.break_off(after, times=self._chance.randint(1, 6)).remove

    def stall(self) -> Callable[[], object]:
        """
        Send the headers, and not a byte of the body.
        """
        digest = self.digest()
        self._standin.hold(digest)

        def release() -> None:
            self._standin.cut(digest)
            self._standin.release(digest)

        return release

    def silence(self) -> Callable[[], object]:
        service = self._chance.choice(PULLING)
        fault = self._standin.hang(service, times=self._chance.randint(1, 3))
        return fault.remove

    def refuse(self) -> Callable[[], object]:
        return self._standin.refuse(self._chance.choice(PULLING)).remove

    def throttle(self) -> Callable[[], object]:
        service = self._chance.choice(EVERYWHERE)
        return self._standin.throttle(service, retry_after=self._chance.choice((None, "1"))).remove

    def fail(self) -> Callable[[], object]:
        service = self._chance.choice(EVERYWHERE)
        return self._standin.fail(service, status=self._chance.choice((500, 502, 503, 504))).remove

    def wrong_bytes(self) -> Callable[[], object]:
        digest = self.digest()
        size = len(next(data for path, data in self._goods.blobs.items() if path.endswith(digest)))
        return self.corrupt(digest, WRONG[:size])

    def other_length(self) -> Callable[[], object]:
        digest = self.digest()
        data = next(data for path, data in self._goods.blobs.items() if path.endswith(digest))
        return self.corrupt(digest, self._chance.choice((data[: len(data) // 2], data + b"more", b"")))

    def corrupt(self, digest: str, data: bytes) -> Callable[[], object]:
        self._standin.corrupt(digest, data)
        return lambda: self._standin._corrupted.pop(digest, None)  # noqa: SLF001

    def expire_urls(self) -> None:
        self._standin.expire_urls()

    def expire_tokens(self) -> None:
        self._standin.expire_tokens()

    def forget_tokens(self) -> None:
        self._standin.forget_tokens()

    def late_headers(self) -> Callable[[], object]:
        quirks = self._standin.quirks
        quirks.latency = self._chance.uniform(0.1, 1)

        def mend() -> None:
            quirks.latency = 0

        return mend

    def error_page(self) -> Callable[[], object]:
        service = self._chance.choice(PULLING)
        page = b"<html>Something went wrong, but this says 200</html>"
        return self._standin.fail(service, status=200, body=page, headers={"Content-Type": "text/html"}).remove


def serve(reactor: Any, options: argparse.Namespace) -> dict[str, str]:
    """
    Listen, and print the addresses.
    """
    site = QuietSite(notFound())
    registry = f"http://{LOCAL}:{listen(reactor, 0, site)}"
    buckets = QuietSite(notFound())
    bucket = f"http://{LOCAL}:{listen(reactor, 0, buckets)}"
    standin = StandIn(reactor, registry=registry, bucket=bucket)
    standin.quirks.rate = options.rate
    standin.quirks.token_lifetime = 600
    site.resource = buckets.resource = standin.resource
    goods = fill(standin)
    if options.faults:
        weather = Weather(standin, goods, random.Random(options.seed))
        reactor.callLater(0, weather.turn)
        reactor.addSystemEventTrigger("after", "shutdown", lambda: print(json.dumps(weather.counts), flush=True))
    forget_often(reactor, standin)
    return {"registry": registry}


def forget_often(reactor: Any, standin: StandIn) -> None:
    """
    Drop the list of requests: it would grow for as long as this runs.
    """
    standin.forget_asked()
    reactor.callLater(1, forget_often, reactor, standin)


def main() -> None:
    """
    Run until stopped.
    """
    from twisted.internet import reactor

    parser = argparse.ArgumentParser(prog="python -m soak.standin", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--rate", type=float, help="bytes a second on each bucket connection")
    print(json.dumps(serve(reactor, parser.parse_args(sys.argv[1:]))), flush=True)
    cast("Any", reactor).run()


if __name__ == "__main__":
    main()
