"""
Run the claim protocol: processes that fetch blobs into one directory, follow each other, evict, and are killed.

``python -m tests.claims_model --seconds 8 --seed 1`` prints what happened, as JSON. Each process is a fork of this
one, which has no file of the directory open; it kills only its own children.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from ecrproxy.cache.arriving import LEFT_SECONDS
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, Step, next_step
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest

CLIENTS: Final = 5
PIECE: Final = 2**16
MIB: Final = 2**20
SIZES: Final = (10_000, 300_000, MIB, 2 * MIB, 2 * MIB + 1, 6 * MIB)
LONGEST: Final = 8
"""Maximum seconds for a pull: fewer than those after which followers give up on a live writer."""
EVICTS: Final = 4
"""One in this many operations is an eviction."""
SWEEPS: Final = 20
"""One in this many pulls follows a sweep, which a daemon does every minute."""
LEAVES: Final = 300
"""One in this many pieces fails to arrive: upstream fails."""


class Client:
    """
    One process: pulls blobs as fast as it can, and evicts.
    """

    def __init__(self, root: Path, seed: str, blobs: list[bytes]) -> None:
        self.store, self.chance = Store(root, time.time), random.Random(seed)
        self.blobs = {Digest.of(data): data for data in blobs}
        self.log = os.open(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str) -> None:
        os.write(self.log, f"{what}\n".encode())

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            digest = self.chance.choice(list(self.blobs))
            if self.chance.randrange(EVICTS) == 0:
                if self.store.has(digest) and self.store.evict_unused([digest]):
                    self.note("evicted")
                continue
            if self.chance.randrange(SWEEPS) == 0:
                self.store.sweep()
            began = time.monotonic()
            while not self.pull(digest):
                time.sleep(POLL_SECONDS / 4)
            self.note("pulled")
            if time.monotonic() - began > 3:
                self.note(f"wrong: a pull took {time.monotonic() - began:.1f} s")

    def pull(self, digest: Digest) -> bool:
        content = self.store.open(digest)
        if content is not None:
            self.read(content.fileno(), 0, content.size, self.blobs[digest])
            if os.fstat(content.fileno()).st_size != len(self.blobs[digest]):
                self.note("wrong: content of another size")
            content.close()
            return True
        claimed = self.store.claim(digest)
        if isinstance(claimed, Claim):
            size = len(self.blobs[digest])
            writer = self.store.arriving.resume(claimed, digest, size)
            self.note("begun" if writer is None else "resumed")
            self.bring(writer or self.store.writer(claimed, digest, size), 0)
            return True
        return isinstance(claimed, PeerTransfer) and self.follow(claimed, digest)

    def read(self, fd: int, start: int, stop: int, data: bytes) -> None:
        """
        Send bytes to a client, which compares them with the expected ones.
        """
        for offset in range(start, stop, PIECE):
            end = min(stop, offset + PIECE)
            if os.pread(fd, end - offset, offset) != data[offset:end]:
                self.note(f"wrong: other bytes at {offset}")
            if not os.fstat(fd).st_nlink:
                self.note("wrong: unlinked while it was sent")

    def bring(self, writer: Writer, position: int) -> None:
        """
        Fetch the missing ranges while a client reads from C{position} on.
        """
        data = self.blobs[writer.digest]
        for start, stop in self.pieces(writer):
            if writer.hashed <= position:
                writer.catch_up()
            writer.write(start, [data[start:stop]])
            reach = min(len(data) - 1, writer.reach(position))
            self.read(writer.fileno(), position, reach, data)
            position = max(position, reach)
            time.sleep(self.chance.uniform(0, 0.002))
            if self.chance.randrange(LEAVES) == 0:
                self.note("upstream failed")
                writer.leave()
                return
        while writer.catch_up():
            pass
        writer.commit()
        self.read(writer.fileno(), position, len(data), data)
        writer.close()

    def pieces(self, writer: Writer) -> Iterator[tuple[int, int]]:
        """
        Yield the missing ranges, out of order.
        """
        missing = [
            (offset, min(stop, offset + PIECE)) for start, stop in writer.gaps for offset in range(start, stop, PIECE)
        ]
        at = self.chance.randrange(len(missing) + 1)
        yield from (*missing[at:], *missing[:at])

    def follow(self, peer: PeerTransfer, digest: Digest) -> bool:
        data, position, idle = self.blobs[digest], 0, 0.0
        try:
            while True:
                look = peer.look()
                idle = 0.0 if look.moved else idle + POLL_SECONDS
                step = next_step(look, idle)
                reach = len(data) if step is Step.FINISH else min(len(data) - 1, peer.reach(position))
                if step in (Step.FINISH, Step.WAIT):
                    self.read(peer.fileno(), position, reach, data)
                    position = max(position, reach)
                if step is Step.FINISH:
                    self.note("followed")
                    return True
                if step is Step.TAKE_OVER and (writer := self.store.arriving.take_over(peer, digest)) is not None:
                    self.note("taken over")
                    self.bring(writer, position)
                    return True
                if step in (Step.GO_ALONE, Step.FAIL):
                    self.note(f"left: {step.name}")
                    return True
                time.sleep(POLL_SECONDS / 4)
        finally:
            peer.close()


def start(root: Path, seed: str, blobs: list[bytes], until: float) -> int:
    """
    Start a client; return its process id.
    """
    pid = os.fork()
    if not pid:
        run(root, seed, blobs, until)
    return pid


def run(root: Path, seed: str, blobs: list[bytes], until: float) -> NoReturn:
    client = Client(root, seed, blobs)
    try:
        client.run(until)
    except BaseException as problem:  # noqa: BLE001 (whatever it is, it is a finding)
        client.note(f"wrong: {problem!r}")
    os._exit(0)


def model(root: Path, seconds: float, seed: int) -> dict[str, object]:
    """
    Run the model and check the directory afterwards.
    """
    chance = random.Random(seed)
    blobs = [random.Random(f"{seed}-{size}").randbytes(size) for size in SIZES]
    Store(root, time.time).prepare()
    until, kills = time.monotonic() + seconds, 0
    running = [start(root, f"{seed}-{number}", blobs, until) for number in range(CLIENTS)]
    while time.monotonic() < until - 1:
        time.sleep(chance.uniform(0, 0.1))
        at = chance.randrange(CLIENTS)
        os.kill(running[at], signal.SIGKILL)
        os.waitpid(running[at], 0)
        kills += 1
        running[at] = start(root, f"{seed}-{kills}-again", blobs, until)
    deadline = until + 10
    while running and time.monotonic() < deadline:
        running = [pid for pid in running if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    happened = Counter((root / "log").read_text().splitlines())
    wrong = {what: times for what, times in happened.items() if what.startswith("wrong")}
    wrong |= {f"{path} is not what its name says": 1 for path in (root / "content").rglob("*") if is_wrong(path)}
    if running:
        wrong["stuck"] = len(running)
    Store(root, lambda: time.time() + LEFT_SECONDS).sweep()
    wrong |= {f"left over: {path.name}": 1 for path in (root / "arriving").iterdir()}
    return {"kills": kills, "wrong": wrong, **{what: times for what, times in happened.items() if what not in wrong}}


def is_wrong(path: Path) -> bool:
    return path.is_file() and Digest.of(path.read_bytes()).hex != path.name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="ecrproxy-claims-"))
    try:
        print(json.dumps(model(root, chosen.seconds, chosen.seed)))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
