"""
Run the daemon among adversities, alone and with workers, and print the measurements: C{python -m hostile}.

The exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bcrypt
from twisted.internet import asyncioreactor
from twisted.internet.defer import Deferred

from hostile import clients
from hostile.adversities import ADVERSITIES, COLUMNS, Adversity, suffer
from hostile.table import Row, Table
from hostile.world import World


async def surrounded(reactor: Any, twistd: str, home: Path, label: str, **settings: str) -> Table:
    """
    Let every dependency fail: those of a group one after the other, the groups in parallel.
    """

    async def suffer_group(number: int, group: Sequence[Adversity]) -> list[Row]:
        world = World(reactor, twistd, home / f"{label}-{number}", **settings)
        try:
            await world.start()
            return [await suffer(world, each) for each in group]
        finally:
            await asyncio.to_thread(world.stop)

    groups = (suffer_group(*each) for each in enumerate(ADVERSITIES))
    rows: list[Row] = []
    failures: list[Exception] = []
    for outcome in await asyncio.gather(*groups, return_exceptions=True):  # each ends its daemon, also if another fails
        if isinstance(outcome, Exception):
            failures.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            rows += outcome
    if failures:
        raise ExceptionGroup("measuring failed", failures)
    return Table(f"Dependencies, {label}", COLUMNS, rows)


async def attacked(reactor: Any, twistd: str, home: Path, label: str, **settings: str) -> list[Table]:
    """
    Let clients attack a daemon that requires passwords.
    """
    passwords = home / f"htpasswd-{label}"
    hashed = bcrypt.hashpw(clients.PASSWORD.encode(), bcrypt.gensalt(8)).decode()
    passwords.write_text(f"{clients.NAME}:{hashed}\n")
    world = World(reactor, twistd, home / f"clients-{label}", PROXY_HTPASSWD=str(passwords), **settings)
    try:
        await world.start(clients.LOGIN)
        return [
            Table(f"Herds, {label}", clients.HERDS, [await clients.herd(world), await clients.same(world)]),
            Table(f"Targets, {label}", clients.TARGETS, [await clients.targets(world)]),
            Table(f"Kinds, {label}", clients.KINDS, [await clients.kinds(world)]),
        ]
    finally:
        await asyncio.to_thread(world.stop)


async def flooded(reactor: Any, twistd: str, home: Path, label: str, **settings: str) -> Table:
    """
    Let clients send without reading.
    """
    world = World(reactor, twistd, home / f"bytes-{label}", **settings)
    try:
        await world.start()
        return Table(
            f"Bytes, {label}", clients.BYTES, [await clients.pipelined(world), await clients.only_sending(world)]
        )
    finally:
        await asyncio.to_thread(world.stop)


async def run(reactor: Any, twistd: str, home: Path) -> list[Table]:
    """
    Measure everything, with the daemon alone and with workers.
    """
    tables = []
    for label, settings in (("one process", {}), ("two workers", {"PROXY_WORKER_PROCESSES": "2"})):
        tables.append(await surrounded(reactor, twistd, home, label, **settings))
        tables += await attacked(reactor, twistd, home, label, **settings)
        tables.append(await flooded(reactor, twistd, home, label, **settings))
    return tables


def main() -> int:
    """
    Return the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m hostile", description=__doc__)
    parser.add_argument("--twistd", default=str(Path(sys.executable).parent / "twistd"))
    options = parser.parse_args()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    asyncioreactor.install(loop)
    from twisted.internet import reactor

    found: list[Table] = []
    failed: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="ecrproxy-hostile-") as home:

        def begin() -> None:
            measured = Deferred.fromFuture(asyncio.ensure_future(run(reactor, options.twistd, Path(home))))
            measured.addCallbacks(found.extend, failed.append).addBoth(lambda _: reactor.stop())

        reactor.callWhenRunning(begin)
        reactor.run()
    for problem in failed:
        problem.printTraceback(sys.stderr)
    print("\n".join(map(str, found)))
    broken = [each for table in found for each in table.broken]
    if not failed:
        print(f"{len(broken)} promises broken" if broken else "every promise was kept")
    for each in broken:
        print(f"  {each}")
    return 1 if broken or failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
