"""
The whole daemon, alone or with another on its directory, with wires, threads, clients and time acting in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ecrproxy.blobs import parts as blob_parts
from ecrproxy.cache.intents import NAME
from ecrproxy.cache.kept_open import KEPT_SECONDS
from ecrproxy.cache.locks import is_free
from ecrproxy.cache.record import POLL_SECONDS
from ecrproxy.transfer import gaps, inflow, peer_backed
from tests.daemon import Daemon, DaemonTestCase, Hands, Reply, noise
from tests.test_following import opened

BLOBS = [noise(f"any order {size}", size) for size in (3000, 200_000, 1_300_000, 3_000_000)]
"""One held in memory, one of several batches, and two worth resuming."""
CLIENTS = 7
STEPS = 20_000
"""Far more steps than any example takes."""
PAUSES = 500
"""Advances of the clock, with nothing else to do, after which something counts as hanging."""
COMES, LEAVES, MOVES, WAITS = 0.02, 0.003, 0.002, 0.02
"""Probability per step that a client arrives or leaves, that the tag moves, and that time passes."""


@dataclass
class Client:
    """
    A client that has sent a request.

    @ivar wanted: the bodies that it may get.
    """

    reply: Reply
    wanted: list[bytes]
    stays: bool = True


class AnyOrderTests(DaemonTestCase):
    """
    Each example has a directory and daemons of its own.
    """

    def setUp(self) -> None:
        pass

    def setup_example(self) -> None:
        super().setUp()
        self.digests = [self.standin.push_blob("team/app", data) for data in BLOBS]
        self.standin.push_blob("team/two", BLOBS[1])
        self.manifests: list[bytes] = []
        self.push()
        self.clients: list[Client] = []
        self.hands: list[Hands] = []
        self.daemons.clear()

    def teardown_example(self, _: object) -> None:
        self.doCleanups()

    @settings(max_examples=8, phases=[Phase.generate])
    @given(st.integers(1, 2), st.booleans(), st.integers(0, 2**32))
    def test_each_client_gets_what_it_asked_for(self, count: int, parts: bool, seed: int) -> None:
        """
        It gets the right bytes, and all of them. Then no file is open, no claim locked, nothing in use or reserved, and
        the index matches the directory.
        """
        if parts:  # the size of some of the blobs
            for module in (blob_parts, inflow, gaps, peer_backed):
                self.patch(module, "SMALLEST_PART", 2**18)
            self.patch(gaps, "LARGEST_PART", 2**19)
            self.patch(inflow, "SPLIT", 2**20)
        chance = Random(seed)
        for _ in range(count):
            hands = Hands()
            self.start(in_thread=hands, read_ahead=chance.random() < 1 / 3)
            hands.idle = False
            self.hands.append(hands)
        self.play(chance)
        for each in self.clients:
            if each.stays:
                wanted = next((data for data in each.wanted if data == each.reply.body), each.wanted[0])
                self.assertWhole(each.reply, wanted, code=each.reply.code)
        self.check_rest()
        self.check_all()

    def push(self) -> None:
        """
        Point the tag at another image.
        """
        layers = [BLOBS[1], BLOBS[len(self.manifests) % len(BLOBS)]]
        self.manifests.append(self.standin.push_image("team/app", "tag", layers=layers).manifest)

    def play(self, chance: Random) -> None:
        """
        Run until nothing waits any longer.
        """
        pauses = 0
        for _ in range(STEPS):
            if self.happens(chance):
                pauses = 0
            elif len(self.clients) < CLIENTS:
                self.come(chance)
            elif all(each.reply.ended for each in self.clients) and not self.transfers():
                break
            else:
                pauses += 1
                self.assertLess(pauses, PAUSES, "somebody waits for ever")
                self.clock.advance(POLL_SECONDS)
        for hands in self.hands:
            hands.idle = True
            hands.work_off()

    def transfers(self) -> list[Any]:
        return [each for daemon in self.daemons for each in daemon.pull_through.transfers()]

    def happens(self, chance: Random) -> bool:
        """
        Do one thing. Return True if there was any.
        """
        if len(self.clients) < CLIENTS and chance.random() < COMES:
            self.come(chance)
            return True
        if chance.random() < MOVES and len(self.manifests) < len(BLOBS):
            self.push()
            return True
        if chance.random() < WAITS:
            self.clock.advance(POLL_SECONDS)
        stay = [each for each in self.clients if each.stays and not each.reply.ended]
        if stay and chance.random() < LEAVES:
            gone = chance.choice(stay)
            gone.stays = False
            gone.reply.leave()
        events = self.possible()
        chance.shuffle(events)
        return any(event() for event in events)

    def possible(self) -> list[Callable[[], bool]]:
        """
        Return what may happen next: each returns True if it did.
        """
        events: list[Callable[[], bool]] = []
        for daemon, hands in zip(self.daemons, self.hands, strict=True):
            for network in (daemon.back, daemon.front):
                network.ends = [wire for wire in network.ends if any(end.connected for end in wire)]
                events += [end.move for wire in network.ends for end in wire]
            events += [partial(done, hands.do, which) for which in range(len(hands.waiting))]
            events += [partial(done, hands.tell, which) for which in range(len(hands.untold))]
        return events

    def come(self, chance: Random) -> None:
        """
        Have a client request a blob, a part of one, or the tag.
        """
        daemon, at = chance.choice(self.daemons), chance.randrange(len(BLOBS))
        data, path = BLOBS[at], f"/v2/team/app/blobs/{self.digests[at]}"
        if chance.random() < 1 / 4:
            reply = daemon.send("GET", "/v2/team/app/manifests/tag")
            self.clients.append(Client(reply, self.manifests))
        elif chance.random() < 1 / 3:
            start = chance.randrange(len(data))
            stop = min(len(data), start + chance.choice([1, 5000, 2**20]))
            reply = daemon.send("GET", path, Range=f"bytes={start}-{stop - 1}")
            self.clients.append(Client(reply, [data[start:stop]]))
        else:
            repository = "two" if at == 1 and chance.random() < 1 / 2 else "app"
            reply = daemon.send("GET", path.replace("app", repository, 1))
            self.clients.append(Client(reply, [data]))

    def check_rest(self) -> None:
        """
        Compare what is left with what there should be.
        """
        self.clock.advance(KEPT_SECONDS)
        for daemon in self.daemons:
            daemon.flush()
        kept = str(self.root / NAME)  # as long as the process runs
        self.assertEqual([], [path for path in opened() if path.startswith(str(self.root)) and path != kept])
        self.assertEqual([], [path for path in self.files("arriving") if path.suffix and not is_free(path)])
        for daemon in self.daemons:
            self.assertEqual((64, 0), (free(daemon), daemon.lanes.buffered.size))
        self.index.settle()
        self.index.refresh()
        there = {path.name for path in self.files()}
        self.assertEqual(there, {each.digest.hex for each in self.index.files()})
        left = {path.name for path in self.arriving()}
        self.assertEqual(left, {each.what.name for each in self.index.arriving()})


def done(act: Callable[[int], None], which: int) -> bool:
    act(which)
    return True


def free(daemon: Daemon) -> int:
    """
    Return how many connections to buckets are free.
    """
    taken = 0
    while (more := daemon.lanes.take(2**60)) > 1:
        taken += more
    daemon.lanes.give_back(taken + 1)
    return taken
