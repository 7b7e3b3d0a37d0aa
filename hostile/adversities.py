"""
Each dependency failing, slow and hung; and what is promised meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.stale import STALE_SECONDS
from hostile.table import Cell, Row
from hostile.world import Got, World

AT_ONCE: Final = 5.0
"""Seconds within which what needs no dependency is answered, on a busy machine."""
IN_TIME: Final = 30.0
"""Seconds within which a request that needs the dependency has some answer: containerd waits no longer for one."""
RECOVERED: Final = 15.0
"""Seconds within which all is well again after the adversity."""
COLUMNS: Final = ("adversity", "small hit", "large hit", "tag", "cold blob", "/healthz", "/readyz", "well again after")


@dataclass(frozen=True)
class Adversity:
    """
    A fault of a dependency.

    @ivar begin: starts the fault; returns a function that ends it.
    @ivar cold: the allowed statuses of requests for uncached content.
    @ivar reads: whether content on the disk can be read meanwhile.
    @ivar ready: the statuses of /readyz meanwhile: a read-only disk is reported, so that an operator can act.
    """

    name: str
    begin: Callable[[World], Callable[[], object]]
    cold: tuple[int, ...] = (502, 503, 504)
    reads: bool = True
    ready: tuple[int, ...] = (200,)


def failing(service: str, **how: object) -> Callable[[World], Callable[[], object]]:
    return lambda world: world.standin.fail(service, status=500, **how).remove  # type: ignore[arg-type]


def hung(service: str) -> Callable[[World], Callable[[], object]]:
    return lambda world: world.standin.hang(service).remove  # type: ignore[arg-type]


def slow(world: World) -> Callable[[], object]:
    world.standin.quirks.latency = 1.0

    def mend() -> None:
        world.standin.quirks.latency = 0

    return mend


def trickling(world: World) -> Callable[[], object]:
    world.standin.quirks.rate = 5000

    def mend() -> None:
        world.standin.quirks.rate = None

    return mend


def without_token(begin: Callable[[World], Callable[[], object]]) -> Callable[[World], Callable[[], object]]:
    """
    Have ECR forget all tokens as well: the daemon must ask AWS for another.
    """

    def both(world: World) -> Callable[[], object]:
        end = begin(world)
        world.standin.forget_tokens()
        return end

    return both


def names(mood: str) -> Callable[[World], Callable[[], object]]:
    def begin(world: World) -> Callable[[], object]:
        world.names.mood = mood
        for site in world.sites:
            site.hang_up()

        def mend() -> None:
            world.names.mood = "well"

        return mend

    return begin


def disk(word: str) -> Callable[[World], Callable[[], object]]:
    def begin(world: World) -> Callable[[], object]:
        world.disk(word)
        return lambda: world.disk("well")

    return begin


ADVERSITIES: Final = (
    # ECR's rejections cost one token a minute: each of these begins with a daemon that has not requested one lately.
    (Adversity("AWS fails", without_token(failing("api"))),),
    (Adversity("AWS is slow", without_token(slow), cold=(200,)),),
    (Adversity("AWS hangs", without_token(hung("api"))),),
    (
        Adversity("ECR fails", failing("registry")),
        Adversity("ECR is slow", slow, cold=(200,)),
        Adversity("ECR hangs", hung("registry")),
    ),
    (
        Adversity("bucket fails", failing("bucket")),
        Adversity("bucket is slow", trickling, cold=(200,)),
        Adversity("bucket hangs", hung("bucket")),
    ),
    (
        # The last known addresses are used as long as no server knows better.
        Adversity("DNS fails", names("failing"), cold=(200,)),
        Adversity("DNS is slow", names("slow"), cold=(200,)),
        Adversity("DNS hangs", names("hung"), cold=(200,)),
    ),
    (
        Adversity("disk fails", disk("failing"), cold=(200,), reads=False, ready=(503,)),
        Adversity("disk is full", disk("full"), cold=(200,), ready=(503,)),
        Adversity("disk is slow", disk("slow"), cold=(200,), ready=(200, 503)),
        Adversity("disk hangs", disk("hung"), cold=(200,), reads=False, ready=(503,)),
    ),
)
"""Those of one group come one after the other, each group over a daemon of its own."""


async def suffer(world: World, adversity: Adversity) -> Row:
    """
    Start the fault, measure, and end it.
    """
    end = adversity.begin(world)
    try:
        cold = asyncio.ensure_future(world.get(world.cold(), seconds=IN_TIME))
        await asyncio.sleep(0.2)  # whatever can be delayed is
        large = asyncio.ensure_future(world.get(world.large, seconds=AT_ONCE))
        small, tag, health = await asyncio.gather(world.get(world.small), world.get(world.tag), world.get("/healthz"))
        await asyncio.sleep(FRESH_SECONDS)
        ready = await world.get("/readyz")
        cells = [
            at_once(small, 200),
            at_once(await large, 200) if adversity.reads else Cell(str(await large)),
            Cell(str(tag), tag.status == 200 and tag.seconds <= STALE_SECONDS + AT_ONCE),
            Cell(str(await cold), (await cold).status in adversity.cold),
            at_once(health, 200),
            at_once(ready, *adversity.ready),
        ]
    finally:
        end()
    return Row(adversity.name, [*cells, await recover(world)])


def at_once(got: Got, *statuses: int) -> Cell:
    return Cell(str(got), got.status in statuses and got.seconds <= AT_ONCE)


async def recover(world: World) -> Cell:
    """
    Request uncached content until it is served.
    """
    began = time.monotonic()
    while (await world.get(world.cold(), seconds=RECOVERED)).status != 200:
        if time.monotonic() > began + RECOVERED:
            return Cell("never", holds=False)
        await asyncio.sleep(0.2)
    return Cell(f"{time.monotonic() - began:.1f}s")
