"""
Clients that attack: by crowds, by odd targets, by requesting one kind as another, and by never reading.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections import Counter
from typing import Final

from hostile.table import Cell, Row
from hostile.world import World
from tests.registry_server import LOCAL

HERDS: Final = ("herd", "answers", "cost")
TARGETS: Final = ("targets", "without a password", "outside the pattern", "upstream")
KINDS: Final = ("requests", "answers", "memory", "content")
BYTES: Final = ("one connection", "memory")
HERD: Final = 200
NAME, PASSWORD = "ann", "correct horse"
LOGIN: Final = "Authorization: Basic " + base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()
GROWTH: Final = 32 * 2**20
"""The most bytes that one misbehaving connection may cost."""
PIPELINED: Final = 12_000
SENT: Final = 64 * 2**20

FORMS: Final = (
    *("{}", "http://proxy.example{}", "http://proxy.example:99999{}", "x{}", ":{}", "@{}", "*{}"),
    *("//evil.example{}", "/healthz/..{}", "readyz{}", "xreadyz{}", ":readyz{}", "@readyz{}", "/readyz/..{}"),
)
PLACES: Final = ("/v2/secret/app/manifests/latest", "/v2/team/../secret/app/manifests/latest", "/used", "/v2/")


async def herd(world: World) -> Row:
    """
    Request a manifest of as many repositories at once as there are clients, each with the right password.
    """
    paths = []
    for number in range(HERD):
        world.standin.push_image(f"team/herd{number}", "latest")
        paths.append(f"/v2/team/herd{number}/manifests/latest")
    got = await asyncio.gather(*(world.get(path, LOGIN) for path in paths))
    statuses = Counter(each.status for each in got)
    slowest = max(each.seconds for each in got)
    return Row(f"{HERD} clients, {HERD} repositories", [counted(statuses, {200}), Cell(f"slowest {slowest:.1f}s")])


async def same(world: World) -> Row:
    """
    Request one cold blob with as many clients: one worker fetches it, for all.
    """
    path = world.push("team/app", "herd", 4 * 2**20)
    before = world.standin.bytes_sent
    got = await asyncio.gather(*(world.get(path, LOGIN) for _ in range(HERD)))
    statuses = Counter(each.status if right(each.body, path) else 0 for each in got)
    fetched = (world.standin.bytes_sent - before) / (4 * 2**20)
    return Row(
        f"{HERD} clients, one cold blob",
        [counted(statuses, {200}), Cell(f"fetched {fetched:.2f} x", fetched < 1.1)],
    )


def right(body: bytes, path: str) -> bool:
    return path.endswith(hashlib.sha256(body).hexdigest())


def counted(statuses: Counter[int], expected: set[int]) -> Cell:
    told = ", ".join(f"{count} x {status or 'none'}" for status, count in sorted(statuses.items()))
    return Cell(told, set(statuses) <= expected)


async def targets(world: World) -> Row:
    """
    Send every form of target without a password, and with one those that lead outside the pattern.
    """
    asked = len(world.standin.asked)
    opened = [form.format(place) for form in FORMS for place in PLACES]
    without = Counter([(await world.get(target)).status for target in opened])
    outside = [target for target in opened if "secret" in target]
    within = Counter([(await world.get(target, LOGIN)).status for target in outside])
    reached = [each for each in world.standin.asked[asked:] if "secret" in each.target]
    return Row(
        f"{len(opened)} hostile targets",
        [
            counted(without, {400, 401, 403, 404}),
            counted(within, {400, 403, 404}),
            Cell(f"{len(reached)} reached ECR", not reached),
        ],
    )


async def kinds(world: World) -> Row:
    """
    Request content of one kind, and of one repository, as another.
    """
    digest = {name: path.rpartition("/")[2] for name, path in (("layer", world.large), ("small", world.small))}
    wrong = [
        f"/v2/team/app/manifests/{digest['layer']}",
        f"/v2/team/other/manifests/{digest['layer']}",
        f"/v2/team/other/blobs/{digest['layer']}",
        f"/v2/team/other/manifests/{world.image.digest}",
        f"/v2/team/app/manifests/{digest['small']}",
    ]
    before = world.memory()
    got = await asyncio.gather(*(world.get(path, LOGIN) for path in wrong * 4))
    grown = world.memory() - before
    still = await world.get(world.large, LOGIN)
    return Row(
        f"{len(wrong) * 4} requests for the wrong kind",
        [
            counted(Counter(each.status for each in got), {404}),
            grown_by(grown),
            Cell(f"then {still}", still.status == 200 and right(still.body, world.large)),
        ],
    )


def grown_by(size: int) -> Cell:
    return Cell(f"+{max(0, size) / 2**20:.0f} MiB", size < GROWTH)


async def pipelined(world: World) -> Row:
    """
    Send thousands of requests on one connection, and read nothing.
    """
    request = f"GET {world.small} HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n\r\n".encode()
    return Row(f"{PIPELINED} pipelined requests, unread", [await flood(world, b"", request * PIPELINED)])


async def only_sending(world: World) -> Row:
    """
    Request a blob, read nothing, and go on sending.
    """
    request = f"GET {world.large} HTTP/1.1\r\nHost: x\r\n{LOGIN}\r\n\r\n".encode()
    return Row(f"a blob unread, {SENT / 2**20:.0f} MiB sent behind it", [await flood(world, request, b"x" * SENT)])


async def flood(world: World, first: bytes, rest: bytes) -> Cell:
    before = world.memory()
    reader, writer = await asyncio.open_connection(LOCAL, world.daemon.port, limit=2**10)
    try:
        writer.write(first)
        await asyncio.sleep(0.3)
        writer.write(rest)
        with contextlib.suppress(OSError):
            async with asyncio.timeout(4):
                await writer.drain()
        await asyncio.sleep(0.5)
        return grown_by(world.memory() - before)
    finally:
        writer.transport.abort()
        del reader
