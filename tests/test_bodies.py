"""
Response bodies that are sent from memory.
"""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.bodies import SPARED_SECONDS, Bodies, MemoryResponse, NoRoomError
from ecrproxy.transfer.response_body import LEAST_PIECE
from tests.daemon import MIB, DaemonTestCase, Hands, Reply
from tests.registry_content import OCI_MANIFEST


class BodiesTests(SynchronousTestCase):
    """
    Bodies of 10 bytes, with space for three.
    """

    def setUp(self) -> None:
        self.bodies, self.cut = Bodies(30), list[int]()
        self.sendings: dict[int, MemoryResponse] = {}

    def begin(self, number: int, body: bytes, now: float = 0) -> None:
        self.sendings[number] = self.bodies.begin(body, now, lambda: self.end(number))

    def end(self, number: int) -> None:
        self.cut.append(number)
        self.bodies.end(self.sendings.pop(number))

    def test_a_body_counts_once(self) -> None:
        """
        However many clients receive it, until the last one has it.
        """
        body = bytes(10)
        for number in range(5):
            self.begin(number, body)
        self.assertEqual(10, self.bodies.held)
        for number in range(4):
            self.end(number)
        self.assertEqual(10, self.bodies.held)
        self.end(4)
        self.assertEqual(0, self.bodies.held)

    def test_who_began_first_gives_way(self) -> None:
        """
        As many as needed, once they have had their minimum time.
        """
        for number in range(3):
            self.begin(number, bytes(bytearray(10)), now=number)
        self.begin(3, bytes(bytearray(15)), now=1 + SPARED_SECONDS)
        self.assertEqual(([0, 1], 25), (self.cut, self.bodies.held))

    def test_a_newcomer_is_refused_while_all_have_their_time(self) -> None:
        """
        No body is cut off before its minimum time; a body that is already held needs no space.
        """
        bodies = [bytes(bytearray(10)) for _ in range(3)]
        for number, body in enumerate(bodies):
            self.begin(number, body)
        self.assertRaises(NoRoomError, self.begin, 3, bytes(bytearray(1)), SPARED_SECONDS - 0.1)
        self.begin(3, bodies[2], SPARED_SECONDS - 0.1)
        self.assertEqual(([], 30), (self.cut, self.bodies.held))

    def test_a_body_that_is_too_large_for_all_is_sent_alone(self) -> None:
        """
        A limit never prevents a body from being sent.
        """
        self.begin(0, bytes(100))
        self.assertEqual(100, self.bodies.held)


class StuckTests(DaemonTestCase):
    """
    Clients that do not read.
    """

    def _stuck(self, path: str) -> Reply:
        reply = self.daemon.send("GET", path)
        reply.stop_reading()
        self.flush()
        return reply

    def test_large_lists_share_a_bound(self) -> None:
        """
        A client that has not read its list for long is cut off for another client, and none before.
        """
        for name in ("one", "two", "three"):
            self.standin.push_image(f"team/{name}", *(f"{number:0>100}" for number in range(900)))
        self.daemon.crowd.bodies = Bodies(200_000)
        first = self._stuck("/v2/team/one/tags/list")
        second = self._stuck("/v2/team/two/tags/list")
        self.assertEqual(2, self.daemon.crowd.transferring)
        refused = self.get("/v2/team/three/tags/list")
        self.assertEqual(
            (503, "busy", "5"), (refused.code, refused.header("X-Cache-Reason"), refused.header("Retry-After"))
        )
        self.clock.advance(SPARED_SECONDS)
        self.assertEqual(200, self.get("/v2/team/three/tags/list").code)
        for stuck in (first, second):
            stuck.read_on()
        self.flush()
        self.assertEqual(("broken", "whole"), (first.ended, second.ended))
        self.assertEqual((0, 0), (self.daemon.crowd.transferring, self.daemon.crowd.bodies.held))

    def test_large_manifests_are_transfers(self) -> None:
        """
        Cached manifests and those that can't be cached; each is in memory once.
        """
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "text": "x" * MIB}).encode()
        for limit, held in ((64 * MIB, 0), (1000, len(manifest))):
            digest = self.standin.push_manifest("team/app", manifest, OCI_MANIFEST, "large")
            self.start(limit=limit)
            path = f"/v2/team/app/manifests/{digest}"
            self.assertWhole(self.get(path), manifest)
            stuck = [self._stuck(path), self._stuck(path)]
            self.assertEqual((2, held), (self.daemon.crowd.transferring, self.daemon.crowd.bodies.held))
            for reply in stuck:
                reply.read_on()
            self.flush()
            self.assertEqual((0, 0), (self.daemon.crowd.transferring, self.daemon.crowd.bodies.held))

    def test_a_list_that_is_the_same_again_is_one(self) -> None:
        """
        Also a list that is larger than what is kept for outages.
        """
        self.standin.push_image("team/tags", *(f"{number:0>300}" for number in range(4000)))
        first, second = self._stuck("/v2/team/tags/tags/list"), self._stuck("/v2/team/tags/tags/list")
        held = self.daemon.crowd.bodies.held
        for reply in (first, second):
            reply.read_on()
        self.flush()
        self.assertEqual((held, "whole", "whole"), (first.length, first.ended, second.ended))
        self.assertGreater(held, MIB)

    def test_a_manifest_is_read_once_for_all_who_ask_at_once(self) -> None:
        """
        Many requests for a manifest that is not in memory cost one read and one copy.
        """
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "text": "x" * MIB}).encode()
        path = f"/v2/team/app/manifests/{self.standin.push_manifest('team/app', manifest, OCI_MANIFEST, 'large')}"
        self.get(path)
        hands = Hands()
        self.start(in_thread=hands)
        hands.idle = False
        replies = [self.daemon.send("GET", path) for _ in range(5)]
        self.flush()
        looks = [blocking for _, blocking, _ in hands.waiting if blocking.__name__ == "_look_up_manifest"]
        self.assertEqual(1, len(looks))
        hands.work_off()
        hands.idle = True
        self.flush()
        for reply in replies:
            self.assertWhole(reply, manifest)
            self.assertEqual("HIT", reply.cache)

    def test_a_client_that_leaves_lets_go(self) -> None:
        """
        What it was being sent is no longer counted.
        """
        self.standin.push_image("team/tags", *(f"{number:0>100}" for number in range(900)))
        stuck = self._stuck("/v2/team/tags/tags/list")
        self.assertGreater(self.daemon.crowd.bodies.held, LEAST_PIECE)
        stuck.wire.abortConnection()
        self.flush()
        self.assertEqual((0, 0), (self.daemon.crowd.transferring, self.daemon.crowd.bodies.held))
