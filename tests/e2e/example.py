"""
The status page with made-up data, for its looks: C{python -m tests.e2e.example PORT}.

A daemon that has run for a minute has little to show. This one has been busy, and is the same each time.
"""

from __future__ import annotations

import math
import random
import sys
import time
from typing import TYPE_CHECKING, Any, cast

from twisted.internet import reactor as global_reactor
from twisted.web.resource import Resource

from ecrproxy.admin.history import SAMPLE_SECONDS, SCALES, STEPS, Point, Scale, merged
from ecrproxy.admin.incidents import Incident
from ecrproxy.admin.port import Metrics, make_admin_site
from ecrproxy.admin.snapshot import (
    Answers,
    Clients,
    Fill,
    Leaving,
    Saving,
    Snapshot,
    TokenState,
    Transfer,
    UpstreamState,
)
from ecrproxy.failures import Failed
from ecrproxy.metrics import Figures
from ecrproxy.readiness import Readiness

if TYPE_CHECKING:
    from ecrproxy.admin.status import Status

MIB, GIB, DAY, HOUR = 2**20, 2**30, 86400, 3600
LAYER = 1800 * MIB


def digest(seed: int) -> str:
    """
    Return a digest.
    """
    return f"sha256:{random.Random(seed).getrandbits(256):064x}"


def history() -> tuple[Point, ...]:
    """
    Return a history: a quiet time, a rollout of something new, and a cluster's usual pulls.
    """
    chance, points = random.Random(3), []
    for at in range(STEPS):
        rollout = 100 < at < 115
        busy = 0.0 if 45 < at < 54 else max(0.1, math.sin(at / 13) + 0.4) + 3 * rollout
        asked = int(busy * chance.randint(4, 12))
        missed = int(asked * (0.04 * chance.random() + 0.3 * chance.random() * (100 < at < 109)))
        sent, received = (int(each * chance.uniform(8, 16) * MIB) for each in (asked, missed))
        took = (asked - missed, 0, 0, 0, missed, 0, 0, 0, 0)
        points.append(Point(SAMPLE_SECONDS, asked, asked - missed, sent, received, 9 if at == 48 else 0, took))
    return tuple(points)


class Example:
    """
    Replaces a daemon's Status.
    """

    def __init__(self) -> None:
        self._history = history()

    async def readiness(self) -> Readiness:
        """
        Return a ready state.
        """
        return Readiness(can_serve=True, can_fetch=True, reasons=())

    async def snapshot(self, registry: str | None = None, scale: Scale = SCALES[0]) -> Snapshot:
        now = time.time()
        return Snapshot(
            version="1.0.0",
            host="ecr-proxy-0",
            registry="https://123456789012.dkr.ecr.eu-west-1.amazonaws.com",
            when=now,
            uptime=3 * DAY + 1.2 * HOUR,
            reasons=(),
            cache=cache(now),
            clients=Clients(214, 21760, 16, 0.021, 2),
            transfers=transfers(),
            repositories=tuple(Saving(name, int(size * GIB), count) for name, size, count in REPOSITORIES),
            token=TokenState(None, now + 8.02 * HOUR, 2.03 * HOUR, 2),
            upstream=UPSTREAM,
            registries=(),
            answers={status: Answers(count, int(size * GIB)) for status, count, size in ANSWERS},
            now=Point(5, 12, 11, 180 * MIB, 60 * MIB),
            lately=merged(self._history[-60:]),
            scale=scale,
            history=self._history,
            failed=failed(now),
            incidents=incidents(now),
        )


REPOSITORIES = (
    ("team/web", 812.4, 90211),
    ("team/api", 420.9, 51022),
    ("team/ml/trainer-cuda", 98.2, 312),
    ("base/debian", 44.0, 80122),
    ("team/batch/importer", 12.2, 4012),
    ("team/jobs/nightly-report-of-everything-that-was-sold", 3.1, 220),
    ("tools/kubectl", 0.8, 1400),
)
ANSWERS = (
    ("HIT", 221090, 1391),
    ("JOINED", 812, 31),
    ("MISS", 4021, 88),
    ("REVALIDATED", 40213, 0.3),
    ("STALE", 12, 0.00001),
)
UPSTREAM = UpstreamState(
    "closed",
    0,
    2.2,
    {"manifests": 3, "checks": 0, "blobs": 1, "lists": 0},
    17,
    {
        "bucket": {"206": 4021, "503": 3},
        "registry": {"200": 9123, "307": 4020, "404": 12, "429": 4, "failed": 2},
    },
)


def cache(now: float) -> Fill:
    """
    Return a cache that is three quarters full.
    """
    leaving = (
        Leaving("content", digest(1), 84 * MIB, now - 3.2 * DAY),
        Leaving("entry", f"team/batch/importer@{digest(1)}", 312, now - 3.2 * DAY),
        Leaving("content", digest(3), 31 * MIB, now - 2.1 * DAY),
        Leaving("entry", "team/web:release-2026.10.1", 320, now - 2 * DAY),
        Leaving("content", digest(4), 180 * MIB, now - 1.7 * DAY),
        Leaving("unfinished", digest(5), 12 * MIB, now - 0.8 * DAY),
    )
    return Fill(int(14.3 * GIB), 256 * MIB, 20 * GIB, 18234, 1203, leaving)


def transfers() -> tuple[Transfer, ...]:
    """
    Return transfers in flight.
    """
    return (
        Transfer("team/ml/trainer-cuda", digest(11), LAYER, LAYER * 26 // 100, 12, kept=True),
        Transfer("team/ml/trainer-cuda", digest(12), 64 * MIB, 49 * MIB, 3, kept=True),
        Transfer("team/api", digest(13), None, 9 * MIB, 1, kept=False),
    )


def failed(now: float) -> tuple[Failed, ...]:
    """
    Return failed requests.
    """
    at, web, api = now - 0.18 * HOUR, "/v2/team/web/manifests/4.11.0", f"/v2/team/api/blobs/{digest(21)}"
    return (
        Failed(web, 503, "circuit-open", at - 20, at, 7, "10.0.12.31"),
        Failed(api, 502, "failing", at - 24, at - 22, 2, "10.0.40.7"),
    )


def incidents(now: float) -> tuple[Incident, ...]:
    """
    Return incidents.
    """
    return (
        Incident(now - 0.186 * HOUR, "warn", "ECR keeps failing, it is left alone for 5 s: the registry answers 503"),
        Incident(now - 1.1 * HOUR, "warn", f"The transfer of {digest(14)} failed: 1048576 bytes came", 3),
        Incident(now - 1.1 * DAY, "error", "No token: Could not connect to the endpoint URL. Next try in 1 s"),
    )


def main() -> None:
    """
    Serve the page until stopped.
    """
    reactor = cast(Any, global_reactor)
    status = cast("Status", Example())
    metrics = Metrics(Figures("1.0.0"), status.readiness)
    site = make_admin_site(metrics, Resource(), status, Resource(), Resource(), reactor)
    reactor.listenTCP(int(sys.argv[1]), site, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
