"""
Read-ahead of the layers after those that clients fetch, seen from the client.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.answers import Asked
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.record import POLL_SECONDS
from ecrproxy.cache.troubles import TroubleKind as Trouble
from ecrproxy.cache.writer import UNASKED_SECONDS
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.images import IMAGES, NOTED, Image, Images, image_of
from ecrproxy.oci import Descriptor, Digest, Kind, Route
from ecrproxy.pulls import PATIENCE_SECONDS
from ecrproxy.reading_ahead import (
    BEGIN_SECONDS,
    BYTES,
    JUDGED_SECONDS,
    LEFT_SECONDS,
    REST_SECONDS,
    ReadingAhead,
    Transfers,
    most_bytes,
)
from ecrproxy.registry.circuit import FAILURES, CircuitState
from ecrproxy.threads import Disk
from ecrproxy.transfer.inflow import Lanes
from tests.daemon import MIB, Daemon, DaemonTestCase, Hands, Reply, at_once, noise
from tests.registry import Fault
from tests.registry import Image as Pushed
from tests.registry_content import OCI_LAYER, OCI_MANIFEST
from tests.routes import REGISTRY

T = TypeVar("T")

SIZE = 1_100_000
COUNT = 12
LAYERS = [noise(f"ahead{number}", SIZE) for number in range(COUNT)]
PARALLEL = 3


class AheadTestCase(DaemonTestCase):
    """
    A daemon that reads ahead, and an image of twelve layers.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest", layers=LAYERS)
        self.start()

    def start(self, **options: Any) -> Daemon:
        return super().start(**{"read_ahead": True, **options})

    def blob(self, digest: str, repository: str = "team/app") -> str:
        return f"/v2/{repository}/blobs/{digest}"

    def begin(self) -> None:
        """
        Advance the clock past the time reserved for clients' own requests.
        """
        self.clock.advance(2 * BEGIN_SECONDS)
        self.flush()

    def manifest(self, image: Pushed | None = None) -> None:
        image = image or self.image
        self.assertEqual(200, self.get(f"/v2/{image.repository}/manifests/{image.digest}").code)

    def hold(self, *digests: str) -> None:
        for digest in digests or self.image.layers:
            self.standin.hold(digest)

    def release(self) -> None:
        for digest in self.image.layers:
            self.standin.release(digest)
        self.flush()

    def asked(self, digest: str) -> int:
        return self.standin.count("registry", "GET", digest)

    def fetched(self) -> list[int]:
        """
        Return how often each layer was requested from the bucket.
        """
        return [self.standin.count("bucket", "GET", digest) for digest in self.image.layers]

    def figure(self, name: str) -> float:
        for line in self.daemon.figures.page().decode().splitlines():
            if line.startswith(f"ecr_proxy_{name} "):
                return float(line.split()[1])
        raise LookupError(name)


class ClientTests(AheadTestCase):
    """
    Clients as they are.
    """

    def pull_as_docker(self, reference: str = "latest") -> list[Reply]:
        """
        Request the tag, the manifest, the config, and then three layers at a time, in order.
        """
        digest = self.head(f"/v2/team/app/manifests/{reference}").header("Docker-Content-Digest")
        self.assertEqual(self.image.manifest, bytes(self.get(f"/v2/team/app/manifests/{digest}").body))
        self.assertEqual(200, self.get(self.blob(self.image.config)).code)
        left, replies = list(self.image.layers), list[Reply]()
        while left or any(not each.ended for each in replies):
            while left and sum(not each.ended for each in replies) < PARALLEL:
                replies.append(self.daemon.send("GET", self.blob(left.pop(0))))
            self.flush()
            self.begin()
        return replies

    def test_docker_gets_later_layers_from_the_cache(self) -> None:
        replies = self.pull_as_docker()
        for reply, data in zip(replies, LAYERS, strict=True):
            self.assertWhole(reply, data)
        self.assertEqual("MISS", replies[0].cache)
        self.assertEqual(["HIT"] * (COUNT - PARALLEL), [each.cache for each in replies[PARALLEL:]])
        self.assertEqual([1] * COUNT, self.fetched())

    def test_a_second_docker_is_answered_as_ever(self) -> None:
        self.pull_as_docker()
        self.standin.forget_asked()
        self.assertEqual(["HIT"] * COUNT, [each.cache for each in self.pull_as_docker()])
        self.assertEqual([0] * COUNT, self.fetched())

    def test_layers_that_are_slow_to_come_are_joined(self) -> None:
        self.manifest()
        self.hold()
        first = self.get(self.blob(self.image.layers[0]))
        self.begin()
        for digest in self.image.layers:
            self.standin.deliver(digest, 10_000)
        self.flush()
        later = [self.get(self.blob(digest)) for digest in self.image.layers[5:8]]
        self.assertEqual(["JOINED"] * 3, [each.cache for each in later])
        self.release()
        for reply, data in zip([first, *later], [LAYERS[0], *LAYERS[5:8]], strict=True):
            self.assertWhole(reply, data)
        self.assertEqual([1] * COUNT, self.fetched())

    def test_whoever_gets_a_manifest_or_a_config_begins_nothing(self) -> None:
        for path in ("/v2/team/app/manifests/latest", f"/v2/team/app/manifests/{self.image.digest}"):
            self.get(path)
            self.get(self.blob(self.image.config))
            self.head(self.blob(self.image.layers[0]))
            self.pass_time(5)
        self.assertEqual([0] * COUNT, self.fetched())

    def test_a_part_of_a_layer_begins_nothing(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[0]), Range="bytes=1000-1999")
        self.pass_time(5)
        self.assertEqual([0] * (COUNT - 1), self.fetched()[1:])

    def test_a_part_that_is_outside_of_a_layer_is_refused(self) -> None:
        self.manifest()
        reply = self.get(self.blob(self.image.layers[0]), Range=f"bytes={SIZE}-")
        self.assertEqual(416, reply.code)
        self.pass_time(5)
        self.assertEqual([0] * COUNT, self.fetched())

    def test_a_range_of_all_is_no_part(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[0]), Range="bytes=0-")
        self.begin()
        self.assertEqual([1] * COUNT, self.fetched())

    def test_layers_before_the_one_that_is_asked_for_are_left(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[8]))
        self.begin()
        self.assertEqual([0] * 8 + [1] * 4, self.fetched())

    def test_what_is_cached_is_not_fetched(self) -> None:
        for at in (3, 5):
            self.get(self.blob(self.image.layers[at]))
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.assertEqual([1] * COUNT, self.fetched())

    def test_a_manifest_from_memory_counts(self) -> None:
        """
        Layers were evicted meanwhile; the hot path answers the manifest, by its digest or by the tag.
        """
        for path in (f"/v2/team/app/manifests/{self.image.digest}", "/v2/team/app/manifests/latest"):
            for _ in range(3):
                self.assertEqual(200, self.get(path).code)
            for digest in self.image.layers:
                self.file_of(digest).unlink(missing_ok=True)
            self.standin.forget_asked()
            self.get(path)
            self.get(self.blob(self.image.layers[0]))
            self.begin()
            self.assertEqual([1] * COUNT, self.fetched())
            self.pass_time(LEFT_SECONDS + 1)

    def test_after_a_restart_the_index_tells_which_manifest_it_is(self) -> None:
        """
        As when another process has answered the client's request for the manifest.
        """
        self.manifest()
        self.start()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.assertEqual([1] * COUNT, self.fetched())

    def test_of_what_many_clients_miss_at_once_the_manifest_is_looked_for_once(self) -> None:
        hands = Hands()
        self.start(in_thread=hands)
        self.hold(self.image.layers[0])
        hands.idle = False
        for _ in range(20):
            self.daemon.ask("GET", self.blob(self.image.layers[0]))
        while others := [at for at, call in enumerate(hands.waiting) if call[1] != self.daemon.store.entry]:
            hands.do(others[0])
            hands.tell()
            self.flush()
        self.assertEqual([self.daemon.store.entry], [call[1] for call in hands.waiting])
        hands.idle = True
        hands.work_off()

    def test_a_large_manifest_by_tag_is_answered_and_read_ahead(self) -> None:
        layers = [noise(f"many{number}", 1000) for number in range(500)]
        image = self.standin.push_image("team/app", "large", layers=layers)
        self.assertGreater(len(image.manifest), 2**16)
        for _ in range(3):
            self.assertWhole(self.get("/v2/team/app/manifests/large"), image.manifest)
        self.get(self.blob(image.layers[0]))
        for _ in range(50):
            self.begin()
        self.pass_time(5)
        self.assertEqual(500, sum(self.has(each) for each in image.layers))

    def test_an_index_and_nonsense_begin_nothing(self) -> None:
        self.standin.push_index("team/app", "index", [self.image])
        manifest = json.loads(self.image.manifest)
        manifest["layers"] = [None, 3, {"digest": 3, "size": 1}, {"digest": "md5:abc", "size": 1}]
        self.standin.push_manifest("team/app", manifest, self.image.media_type, "strange")
        for tag in ("index", "strange"):
            self.assertEqual(200, self.get(f"/v2/team/app/manifests/{tag}").code)
        self.get(self.blob(self.image.layers[0]))
        self.pass_time(5)
        self.assertEqual([1, *[0] * (COUNT - 1)], self.fetched())
        self.assertEqual([], self.flushLoggedErrors())

    def test_another_repository_is_given_nothing(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.standin.push_blob("team/other", b"x")
        self.assertEqual(404, self.get(self.blob(self.image.layers[5], "team/other")).code)

    def test_a_cache_key_that_tells_clients_apart_hinders_nothing(self) -> None:
        """
        Each has what the manifest lists, and nothing else that was read ahead.
        """
        self.start(cache_key="$http_x_client$uri")
        for client in ("a", "b"):
            path = f"/v2/team/app/manifests/{self.image.digest}"
            self.assertEqual(200, self.get(path, X_Client=client).code)
        self.get(self.blob(self.image.layers[0]), X_Client="a")
        self.begin()
        self.assertEqual("HIT", self.get(self.blob(self.image.layers[5]), X_Client="b").cache)
        self.assertEqual([1] * COUNT, self.fetched())

    def test_it_is_not_done_where_it_is_turned_off(self) -> None:
        self.start(read_ahead=False)
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.pass_time(5)
        self.assertEqual([1, *[0] * (COUNT - 1)], self.fetched())


class PurgeTests(AheadTestCase):
    """
    Purges during the request.
    """

    index_in_memory = False

    def test_who_comes_after_a_purge_does_not_join_what_ecr_gave_before_it(self) -> None:
        self.manifest()
        self.hold()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.daemon.store.index.purge(list(self.entries()), [])
        self.pass_time(1)
        for digest in self.image.layers:
            self.standin.deliver(digest, 10_000)
        self.flush()
        self.standin.deny("ecr:GetDownloadUrlForLayer")
        self.assertRefused(self.get(self.blob(self.image.layers[1])), 403, "DENIED")
        self.assertEqual({}, self.entries())


class ClientsFirstTests(AheadTestCase):
    """
    Read-ahead costs clients nothing.
    """

    def fetch_first(self) -> Reply:
        self.manifest()
        reply = self.get(self.blob(self.image.layers[0]))
        self.begin()
        return reply

    def hang(self) -> list[Fault]:
        """
        Have ECR answer nothing about any layer but the first.
        """
        return [self.standin.hang("registry", path_contains=digest) for digest in self.image.layers[1:]]

    def test_a_failing_question_opens_no_circuit(self) -> None:
        for digest in self.image.layers[1:]:
            self.standin.fail("registry", status=500, path_contains=digest)
        self.fetch_first()
        self.pass_time(2 * REST_SECONDS)
        self.assertEqual((CircuitState.CLOSED, 0), (self.daemon.circuit.state, self.daemon.circuit.open_repositories))
        self.assertIsNone(self.daemon.circuit.problem())
        self.assertGreater(self.asked(self.image.layers[1]), 0)
        self.assertLessEqual(self.asked(self.image.layers[1]), 1)

    def test_after_a_failure_it_rests(self) -> None:
        self.start(together=16)
        fault = self.standin.fail("registry", status=500, path_contains=self.image.layers[1])
        self.fetch_first()
        self.pass_time(REST_SECONDS / 2)
        self.assertEqual([1, 0, 1, 1, *[0] * (COUNT - 4)], self.fetched())
        fault.remove()
        self.pass_time(REST_SECONDS)
        self.assertEqual([True, False, *[True] * (COUNT - 2)], [self.has(digest) for digest in self.image.layers])
        self.assertWhole(self.get(self.blob(self.image.layers[1])), LAYERS[1], "MISS")

    def test_it_is_no_probe(self) -> None:
        self.manifest()
        for digest in self.image.layers:
            self.standin.fail("registry", status=500, path_contains=digest)
        for _ in range(FAILURES):
            self.get(self.blob(self.image.layers[-1]))
            self.pass_time(1)
        self.assertEqual(1, self.daemon.circuit.open_repositories)
        self.pass_time(4)
        self.standin.forget_asked()
        self.pass_time(LEFT_SECONDS)
        self.assertEqual(0, self.standin.count("registry", "GET", "blobs"))

    def test_a_client_of_what_hangs_asks_by_itself(self) -> None:
        faults = self.hang()
        self.fetch_first()
        for each in faults:
            each.remove()
        reply = self.get(self.blob(self.image.layers[1]))
        self.assertEqual("", reply.ended)
        self.pass_time(PATIENCE_SECONDS)
        self.assertWhole(reply, LAYERS[1], "MISS")
        self.assertEqual(1, self.fetched()[1])

    def test_clients_of_what_fails_ask_by_themselves(self) -> None:
        """
        Also those that joined the request, and those that disconnect.
        """
        faults = self.hang()
        self.fetch_first()
        replies = [self.daemon.send("GET", self.blob(self.image.layers[1])) for _ in range(3)]
        self.flush()
        replies[0].leave()
        for each in faults:
            each.remove()
        self.pass_time(PATIENCE_SECONDS)
        for reply in replies[1:]:
            self.assertWhole(reply, LAYERS[1])

    def test_a_client_of_another_process_does_not_wait_for_what_hangs(self) -> None:
        faults = self.hang()
        self.fetch_first()
        for each in faults:
            each.remove()
        other = self.start(read_ahead=False)
        reply = other.ask("GET", self.blob(self.image.layers[1]))
        self.assertWhole(reply, LAYERS[1], "MISS")

    def test_a_client_of_what_stands_still_gets_it_anew(self) -> None:
        self.hold()
        self.fetch_first()
        self.standin.deliver(self.image.layers[1], 100_000)
        self.flush()
        self.standin.release(self.image.layers[0])
        reply = self.get(self.blob(self.image.layers[1]))
        self.assertEqual("JOINED", reply.cache)
        self.pass_time(1)
        self.assertEqual(2, self.fetched()[1])
        self.release()
        self.assertWhole(reply, LAYERS[1])

    def test_half_of_the_places_are_left_to_clients(self) -> None:
        self.start(together=16)
        self.hang()
        self.fetch_first()
        self.assertEqual(3, sum(self.asked(digest) for digest in self.image.layers[1:]))
        other = self.standin.push_blob("team/other", b"x")
        self.assertEqual(200, self.get(self.blob(other, "team/other")).code)

    def test_half_of_the_connections_are_left_to_clients(self) -> None:
        self.start(lanes=Lanes(4, 8))
        self.hold()
        self.fetch_first()
        self.assertEqual(4, sum(self.standin.held(digest) for digest in self.image.layers))
        self.release()
        self.pass_time(5)
        self.assertEqual([True] * COUNT, [self.has(digest) for digest in self.image.layers])

    def test_nothing_is_begun_beside_many_transfers_of_clients(self) -> None:
        others = [self.standin.push_blob("team/other", noise(f"other{number}", SIZE)) for number in range(31)]
        for digest in others:
            self.standin.hold(digest)
            self.get(self.blob(digest, "team/other"))
        self.hold()
        self.fetch_first()
        self.assertEqual([1, *[0] * (COUNT - 1)], self.fetched())
        for digest in others:
            self.standin.release(digest)
        self.flush()
        self.assertEqual([1] * COUNT, self.fetched())
        self.release()

    def test_what_is_read_ahead_does_not_stop_what_clients_have_left(self) -> None:
        others = [self.standin.push_blob("team/other", noise(f"left{number}", SIZE)) for number in range(4)]
        for digest in others:
            self.standin.hold(digest)
            self.get(self.blob(digest, "team/other")).leave()
        self.flush()
        self.hold()
        self.fetch_first()
        for digest in others:
            self.standin.release(digest)
        self.flush()
        self.assertEqual([True] * 4, [self.has(digest) for digest in others])
        self.release()

    def test_nothing_is_begun_while_the_disk_is_in_trouble_or_the_daemon_ends(self) -> None:
        self.daemon.store.troubles.failed(Trouble.WRITE, OSError(5, "broken"))
        self.fetch_first()
        self.assertEqual(0, sum(self.fetched()[1:]))
        self.start()
        self.daemon.draining = True
        self.get(self.blob(self.image.layers[1]))
        self.begin()
        self.assertEqual(0, sum(self.fetched()[2:]))

    def test_what_another_process_brings_is_left_to_it(self) -> None:
        claim = self.daemon.store.claim(Digest.parse(self.image.layers[3]))
        assert isinstance(claim, Claim)
        self.fetch_first()
        self.assertEqual([1, 1, 1, 0, *[1] * (COUNT - 4)], self.fetched())
        claim.end()

    def test_of_two_processes_one_asks_ahead(self) -> None:
        one, two = self.daemon, self.start(read_ahead=True)
        for daemon, layer in ((one, self.image.layers[0]), (two, self.image.layers[1])):
            self.assertEqual(200, daemon.ask("GET", f"/v2/team/app/manifests/{self.image.digest}").code)
            daemon.ask("GET", self.blob(layer))
        for _ in range(20):
            self.clock.advance(BEGIN_SECONDS)
            for daemon in (one, two):
                daemon.flush()
        self.assertEqual([1] * COUNT, self.fetched())
        self.assertEqual([True] * COUNT, [self.has(digest) for digest in self.image.layers])

    def test_what_a_slow_disk_told_too_late_keeps_no_other_process_from_asking(self) -> None:
        late, slow = list[Callable[[], object]](), False

        def reading(blocking: Callable[..., T], *args: Any) -> Deferred[T]:
            if not slow:
                return at_once(blocking, *args)
            late.append(partial(blocking, *args))
            return fail(TimeoutError())

        self.start(disk=Disk(reading, *[at_once] * 5))
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        slow = True
        self.begin()
        slow = False
        for each in late:
            each()
        self.assertEqual([1, *[0] * (COUNT - 1)], self.fetched())
        two = self.start()
        self.manifest()
        self.get(self.blob(self.image.layers[1]))
        self.begin()
        two.flush()
        self.assertEqual([1] * COUNT, self.fetched())


class BoundsTests(AheadTestCase):
    """
    How much is read ahead, and what happens to content that is not requested.
    """

    def test_it_stops_when_nobody_asks_for_more(self) -> None:
        self.hold()
        self.manifest()
        reply = self.get(self.blob(self.image.layers[0]))
        self.begin()
        for digest in self.image.layers[1:]:
            self.standin.deliver(digest, 200_000)
        self.flush()
        self.pass_time(2 * LEFT_SECONDS)
        self.assertEqual(COUNT, len(self.daemon.pull_through.transfers()))  # the client still reads
        reply.leave()
        self.flush()
        self.pass_time(2 * LEFT_SECONDS)
        self.assertEqual(
            [Digest.parse(self.image.layers[0])], [each.digest for each in self.daemon.pull_through.transfers()]
        )
        again = self.get(self.blob(self.image.layers[4]))
        self.release()
        self.assertWhole(again, LAYERS[4])
        self.assertLess(self.standin.bytes_sent, COUNT * (SIZE + 200_000))

    def test_a_small_cache_takes_few_bytes(self) -> None:
        self.start(limit=16 * 3 * SIZE)
        self.hold()
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.assertEqual([1] * 4 + [0] * (COUNT - 4), self.fetched())
        self.release()
        self.get(self.blob(self.image.layers[1]))
        self.assertEqual([1] * 5 + [0] * (COUNT - 5), self.fetched())

    def test_a_layer_larger_than_all_that_may_be_ahead_is_left_out(self) -> None:
        large = noise("large", 5 * MIB)
        image = self.standin.push_image("team/app", "other", layers=[LAYERS[0], large, LAYERS[1]])
        self.start(limit=64 * MIB)
        self.manifest(image)
        self.get(self.blob(image.layers[0]))
        self.begin()
        self.assertEqual([True, False, True], [self.has(each) for each in image.layers])

    def test_it_evicts_nothing_that_was_used_lately(self) -> None:
        old = [self.standin.push_blob("team/old", noise(f"old{number}", SIZE)) for number in range(15)]
        self.start(limit=16 * (SIZE + 4096))
        for digest in old:
            self.get(self.blob(digest, "team/old"))
        self.manifest()
        self.get(self.blob(self.image.layers[10]))
        self.begin()
        self.assertFalse(self.has(self.image.layers[11]))
        self.assertGreaterEqual(sum(self.has(digest) for digest in old), 14)

    def test_it_evicts_what_was_not_used_for_long(self) -> None:
        old = [self.standin.push_blob("team/old", noise(f"old{number}", SIZE)) for number in range(16)]
        self.start(limit=17 * (SIZE + 4096))
        for digest in old:
            self.get(self.blob(digest, "team/old"))
        self.daemon.set_by = 3 * UNASKED_SECONDS
        self.manifest()
        self.get(self.blob(self.image.layers[10]))
        self.begin()
        self.assertTrue(self.has(self.image.layers[11]))

    def test_what_nobody_has_asked_for_goes_before_what_somebody_has(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.get(self.blob(self.image.layers[5]))
        self.pass_time(2)
        order = [str(each.what) for each in self.daemon.store.candidates()]
        asked_for = {self.image.digest, self.image.layers[0], self.image.layers[5]}
        self.assertEqual(asked_for, set(order[-3:]))

    def test_a_client_that_joins_makes_it_asked_for(self) -> None:
        self.hold()
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.get(self.blob(self.image.layers[5]))
        self.release()
        self.pass_time(2)
        order = [str(each.what) for each in self.daemon.store.candidates()]
        self.assertEqual({self.image.digest, self.image.layers[0], self.image.layers[5]}, set(order[-3:]))

    def test_a_head_asks_for_it_too(self) -> None:
        """
        As prefetch does before it transfers a layer.
        """
        self.hold()
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.head(self.blob(self.image.layers[5]))
        self.release()
        self.head(self.blob(self.image.layers[6]))
        self.pass_time(2)
        order = [str(each.what) for each in self.daemon.store.candidates()]
        self.assertEqual({self.image.digest, *(self.image.layers[at] for at in (0, 5, 6))}, set(order[-4:]))

    def test_what_a_client_of_another_process_follows_is_used(self) -> None:
        """
        As one that had the manifest from this process, and requests a layer on another connection.
        """
        one, two = self.daemon, self.start(read_ahead=False)
        self.daemon = one
        self.hold()
        self.manifest()
        self.get(self.blob(self.image.layers[0]))
        self.begin()
        self.standin.deliver(self.image.layers[5], SIZE // 2)
        self.flush()
        reply = two.send("GET", self.blob(self.image.layers[5]))
        for step in range(200):
            self.clock.advance(POLL_SECONDS)
            for daemon in (one, two):
                daemon.flush()
            if step == 100:
                self.release()
        self.assertEqual((200, "JOINED"), (reply.code, reply.header("X-Cache-Status")))
        order = [str(each.what) for each in one.store.candidates()]
        self.assertEqual({self.image.digest, self.image.layers[0], self.image.layers[5]}, set(order[-3:]))

    def test_figures_tell_what_was_fetched_in_vain(self) -> None:
        self.manifest()
        self.get(self.blob(self.image.layers[8]))
        self.begin()
        self.assertEqual(3 * SIZE, self.figure("read_ahead_bytes_total"))
        self.get(self.blob(self.image.layers[9]))
        other = self.start(read_ahead=False)
        first = self.daemons[-2]
        other.ask("GET", self.blob(self.image.layers[10]))
        self.pass_time(LEFT_SECONDS + JUDGED_SECONDS + 2)
        self.daemon = first
        self.assertEqual(SIZE, self.figure("read_ahead_unasked_bytes_total"))
        self.assertEqual(0, first.pull_through.ahead.pulls if first.pull_through.ahead else None)


def descriptor(name: str, size: int = 1000) -> Descriptor:
    return Descriptor("application/octet-stream", Digest.of(name.encode()), size)


class TurnsTests(SynchronousTestCase):
    """
    Many images that wait for spare capacity.
    """

    def test_layers_that_are_left_out_cost_the_other_images_no_look(self) -> None:
        """
        An image may list a thousand without a size: that blocked the event loop for a second.
        """
        clock, looks = Clock(), list[Route]()

        def has_plenty(route: Route, *_: int) -> bool:
            looks.append(route)
            return False

        wanted: Any = Transfers(list, lambda _: False, has_plenty, cast(Any, None), cast(Any, None))
        cache: Any = SimpleNamespace(is_well=True, limit=2**40)
        ahead = ReadingAhead(wanted, cache, clock.seconds, clock.callLater)
        for number in range(IMAGES):
            sizes = [SIZE, *[0] * 400] if number == IMAGES - 1 else [SIZE] * 3
            digests = [Digest.of(b"%d %d" % (number, at)) for at in range(len(sizes))]
            layers = [
                {"mediaType": OCI_LAYER, "digest": str(digest), "size": size}
                for digest, size in zip(digests, sizes, strict=True)
            ]
            manifest = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
            route = Route(Kind.BLOB, Repository(REGISTRY, "team/app"), str(digests[0]), digests[0])
            ahead.answered(route, Digest.of(manifest), manifest, OCI_MANIFEST)
            ahead.missed(Asked(route, ""))
            looks.clear()
            clock.advance(BEGIN_SECONDS)
        self.assertEqual(IMAGES, ahead.pulls)
        self.assertLessEqual(len(looks), 2 * IMAGES)


class ImagesTests(SynchronousTestCase):
    """
    Which image a client pulls.
    """

    def setUp(self) -> None:
        self.repository = Repository(RegistryId("123456789012.dkr.ecr.eu-west-1.amazonaws.com"), "team/app")
        self.base = descriptor("base")

    def image(self, *names: str) -> Image:
        return Image(self.repository, [self.base, *map(descriptor, names)])

    def test_it_is_the_one_whose_manifest_was_given_last(self) -> None:
        images, one, two = Images(), self.image("one"), self.image("two")
        images.note(Digest.of(b"1"), one)
        images.note(Digest.of(b"2"), two)
        self.assertIs(two, images.listing(self.repository, self.base.digest))
        self.assertTrue(images.touch(self.repository, Digest.of(b"1")))
        self.assertIs(one, images.listing(self.repository, self.base.digest))
        self.assertIs(two, images.listing(self.repository, Digest.of(b"two")))

    def test_it_is_none_of_another_repository(self) -> None:
        images = Images()
        images.note(Digest.of(b"1"), self.image("one"))
        other = Repository(self.repository.registry, "team/other")
        self.assertIsNone(images.listing(other, self.base.digest))

    def test_few_are_noted(self) -> None:
        images = Images(most_layers=2 * NOTED)
        for number in range(10 * NOTED):
            images.note(Digest.of(b"%d" % number), self.image("one"))
        noted = [number for number in range(10 * NOTED) if images.touch(self.repository, Digest.of(b"%d" % number))]
        self.assertEqual(noted, list(range(noted[0], 10 * NOTED)))
        self.assertLessEqual(len(noted), NOTED)

    def test_what_is_no_manifest_has_no_layers(self) -> None:
        self.assertEqual([], list(image_of(self.repository, b"{", "application/json").layers))

    def test_a_small_cache_has_little_ahead(self) -> None:
        self.assertEqual(BYTES, most_bytes(2**40))
        self.assertEqual(2**20, most_bytes(2**24))
