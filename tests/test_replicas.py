"""
A registry and a replica of it: what comes from which, and when.
"""

from __future__ import annotations

import json
from dataclasses import replace

from twisted.internet.defer import Deferred

from ecrproxy.manifests import REPLICA_SECONDS
from ecrproxy.oci import parse_route
from ecrproxy.registry.circuit import FAILURES
from ecrproxy.registry.race import SLOW_SECONDS
from ecrproxy.registry.replicas import LATE_SECONDS, SOON_SECONDS
from ecrproxy.settings.registries import table_of_settings
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from tests.daemon import DaemonTestCase, Reply, noise
from tests.registry import Fault, StandIn
from tests.registry import Reply as Answer

REPLICA = "https://123456789012.dkr.ecr.us-east-1.amazonaws.com"
WEST = "123456789012.dkr.ecr.us-west-2.amazonaws.com"
BUCKET = "https://prod-us-east-1-starport-layer-bucket.s3.us-east-1.amazonaws.com"


def ways() -> list[Fault]:
    """
    Break off, fail, throttle, or be silent.
    """
    replies = Answer(500), Answer(429)
    return [Fault("registry", drop=True), *(Fault("registry", reply=each) for each in replies), Fault("registry")]


class ReplicaTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.replica = StandIn(self.clock, registry=REPLICA, bucket=BUCKET)
        self.layer = noise("layer", 300_000)
        self.image = self.standin.push_image("team/app", "latest", layers=[self.layer])
        self.replica.push_image("team/app", "latest", layers=[self.layer])
        self.start(replica=self.replica)

    @property
    def blob(self) -> str:
        return f"/v2/team/app/blobs/{json.loads(self.image.manifest)['layers'][0]['digest']}"

    @property
    def by_digest(self) -> str:
        return f"/v2/team/app/manifests/{self.image.digest}"

    def wait(self, path: str, seconds: float, method: str = "GET") -> Reply:
        reply = self.daemon.send(method, path)
        self.pass_time(seconds)
        return reply

    def test_it_is_not_asked_while_the_registry_answers(self) -> None:
        for path in (self.by_digest, "/v2/team/app/manifests/latest", self.blob):
            self.assertEqual(200, self.get(path).code)
        self.assertEqual([], self.replica.asked)

    def test_what_a_digest_names_comes_from_it_where_the_registry_does_not_give_it(self) -> None:
        for fault in ways():
            self.standin.fault(fault)
            self.start(replica=self.replica, limit=1)  # which caches nothing
            self.assertWhole(self.wait(self.by_digest, 3 * SLOW_SECONDS), self.image.manifest, None)
            self.assertWhole(self.wait(self.blob, 3 * SLOW_SECONDS), self.layer, None)
            self.assertEqual(200, self.wait(self.blob, 3 * SLOW_SECONDS, "HEAD").code)
            fault.remove()

    def test_so_it_does_where_the_bucket_does_not(self) -> None:
        self.standin.fault(Fault("bucket", reply=Answer(503)))
        self.assertWhole(self.wait(self.blob, 30), self.layer, None)

    def test_the_rest_of_a_blob_may_come_from_it(self) -> None:
        """
        The registry of the first bytes is asked first for the rest.
        """
        self.standin.fault(ways()[1])
        route = parse_route(self.blob, self.daemon.registry)
        locating = Deferred.fromCoroutine(self.daemon.upstream.locate(route))
        self.pass_time(10)
        url, _ = self.successResultOf(locating)
        self.assertTrue(url.startswith(BUCKET), url)

    def interrupted(self, fault: Fault, seconds: float) -> None:
        """
        A partial transfer when the registry, and all that it leads to, begin to fail.
        """
        digest = self.blob.rpartition("/")[2]
        self.standin.hold(digest)
        reply = self.daemon.send("GET", self.blob)
        self.flush()
        self.standin.deliver(digest, 100_000)
        self.flush()
        faults = [self.standin.fault(replace(fault, service=each)) for each in ("registry", "bucket")]
        if fault.drop or fault.reply is not None:
            self.standin.cut(digest)
        sent = self.replica.bytes_sent
        self.pass_time(seconds)
        self.assertWhole(reply, self.layer, None)
        self.assertEqual(200_000, self.replica.bytes_sent - sent)
        for each in faults:
            each.remove()
        self.standin.release(digest)

    def test_what_the_registry_breaks_off_it_finishes(self) -> None:
        for fault in ways()[:3]:
            self.start(replica=self.replica, limit=1)
            self.interrupted(fault, 30)

    def test_what_the_registry_stops_to_send_it_finishes(self) -> None:
        self.interrupted(Fault("bucket"), 3 * SLOW_SECONDS + 10)

    def test_where_the_replica_lacks_it_the_registry_has_all_its_time(self) -> None:
        digest = self.blob.rpartition("/")[2]
        self.replica.repositories.clear()
        self.standin.hold(digest)
        reply = self.daemon.send("GET", self.blob)
        self.flush()
        self.standin.deliver(digest, 100_000)
        self.pass_time(25)
        self.standin.release(digest)
        self.pass_time(5)
        self.assertWhole(reply, self.layer, "MISS")

    def test_a_slow_registry_is_not_waited_for_and_may_still_win(self) -> None:
        self.standin.quirks.latency = SLOW_SECONDS + 1
        self.replica.quirks.latency = 60
        self.assertWhole(self.wait(self.by_digest, SLOW_SECONDS + 2), self.image.manifest, "MISS")
        self.assertEqual(1, self.replica.count("registry", path_contains="/manifests/"))

    def test_a_registry_that_was_silent_is_not_waited_for_by_each(self) -> None:
        """
        One request in a while waits for it; for the others the replica is asked soon, or its known answer is used.
        """
        images = [self.replica.push_image("team/app", layers=[noise(f"silent {number}", 10)]) for number in range(9)]
        paths = [f"/v2/team/app/manifests/{image.digest}" for image in images]
        fault = self.standin.fault(ways()[3])
        self.wait(paths[0], SLOW_SECONDS + 1)
        for path, image in zip(paths[1:6], images[1:6], strict=True):
            reply = self.get(path)
            self.pass_time(SOON_SECONDS)
            self.assertWhole(reply, image.manifest, "MISS")
        fault.remove()
        asked = len(self.replica.asked)
        self.assertWhole(self.get(self.by_digest), self.image.manifest, "MISS")
        self.standin.fault(ways()[3])
        self.pass_time(LATE_SECONDS)
        reply = self.get(paths[6])
        self.pass_time(SOON_SECONDS)
        self.assertEqual((0, asked), (reply.code, len(self.replica.asked)))
        self.pass_time(SLOW_SECONDS)
        self.assertWhole(reply, images[6].manifest, "MISS")

    def test_what_the_registry_denies_is_denied(self) -> None:
        """
        The registry no longer has it, or denies it; the replica still has it.
        """
        self.standin.deny()
        self.assertEqual(403, self.get(self.by_digest).code)
        self.standin.fault(Fault("registry", reply=Answer(404, {}, b'{"errors": [{"code": "X"}]}')))
        self.assertEqual(404, self.get(self.blob).code)
        self.assertEqual([], self.replica.asked)

    def test_what_the_replica_lacks_is_the_registrys_failure(self) -> None:
        self.replica.repositories.clear()
        self.standin.fault(ways()[1])
        self.assertEqual(502, self.wait(self.by_digest, 60).code)

    def test_wrong_bytes_of_it_are_not_served(self) -> None:
        self.standin.fault(ways()[0])
        self.replica.corrupt(self.image.digest, b"wrong")
        self.assertEqual(502, self.wait(self.by_digest, 60).code)

    def test_a_tag_is_the_registrys_then_the_last_answer_then_the_replicas(self) -> None:
        newer = self.replica.push_image("team/app", "latest", layers=[b"newer"])
        path = "/v2/team/app/manifests/latest"
        self.assertWhole(self.get(path), self.image.manifest, "MISS")
        self.standin.refuse("registry")
        self.assertWhole(self.wait(path, 20), self.image.manifest, "STALE")
        other = self.replica.push_image("team/new", "latest", layers=[b"other"])
        self.assertWhole(self.wait("/v2/team/new/manifests/latest", 20), other.manifest, "STALE")
        self.assertEqual(502, self.wait("/v2/team/new/manifests/v2", 60).code)
        self.assertNotEqual(newer.manifest, self.image.manifest)

    def test_a_silent_registry_leaves_time_to_ask_it_for_a_tag(self) -> None:
        """
        Clients wait for 30 s.
        """
        self.standin.fault(ways()[3])
        self.assertWhole(self.wait("/v2/team/app/manifests/latest", 10), self.image.manifest, "STALE")

    def test_a_silent_replica_keeps_a_tag_no_longer_than_the_next_one_takes(self) -> None:
        """
        As for digests, the next one is asked after some seconds.
        """
        silent = StandIn(self.clock, registry=f"https://{WEST}", bucket=BUCKET.replace("east-1", "west-2"))
        table = RegistryTable(
            name=WEST, protocol=Protocol.ECR, endpoint=f"https://{WEST}", region="us-west-2", path_prefix="west"
        )
        self.start(replica=self.replica, others={table: silent})
        self.assertEqual(404, self.get("/v2/west/team/app/manifests/none").code)
        self.daemon.upstream.replicas = self.daemon.others[WEST].upstream, *self.daemon.upstream.replicas
        for standin in (self.standin, silent):
            standin.fault(ways()[3])
        reply = self.wait("/v2/team/app/manifests/latest", REPLICA_SECONDS + SLOW_SECONDS + 1)
        self.assertWhole(reply, self.image.manifest, "STALE")
        silent.heal()
        self.assertEqual(504, self.wait("/v2/team/new/manifests/latest", 60).code)  # none of them has that

    def test_a_denial_of_a_tag_is_heard_while_replicas_are_asked(self) -> None:
        self.standin.deny()
        self.standin.quirks.latency = REPLICA_SECONDS + 1
        self.replica.quirks.latency = 3
        reply = self.wait("/v2/team/app/manifests/latest", REPLICA_SECONDS + 2)
        self.assertRefused(reply, 403, "DENIED", "")
        self.pass_time(30)

    def test_what_the_registry_says_of_a_tag_after_a_replica_is_noted(self) -> None:
        newer = self.standin.push_image("team/app", "latest", layers=[b"newer"])
        self.standin.quirks.latency = REPLICA_SECONDS + 2
        reply = self.wait("/v2/team/app/manifests/latest", REPLICA_SECONDS + 1)
        self.assertWhole(reply, self.image.manifest, "STALE")
        self.pass_time(REPLICA_SECONDS)
        for each in (self.standin, self.replica):
            each.refuse("registry")
        self.assertWhole(self.wait("/v2/team/app/manifests/latest", 30), newer.manifest, "STALE")

    def test_a_tag_that_nobody_gives_is_refused_before_clients_give_up(self) -> None:
        for standin in (self.standin, self.replica):
            standin.hang("registry")
        self.assertEqual(504, self.wait("/v2/team/app/manifests/latest", 26).code)
        self.pass_time(60)

    def test_a_tag_that_was_asked_for_before_a_reload_comes_from_it_after_that(self) -> None:
        """
        Though the registry is no longer configured: a request keeps its configuration.
        """
        self.standin.hang("registry")
        reply = self.wait("/v2/team/app/manifests/latest", 1)
        self.daemon.table = table_of_settings(f"https://{WEST}", "us-west-2", instance_auth=False)
        self.daemon.reload({})
        self.pass_time(REPLICA_SECONDS)
        self.assertWhole(reply, self.image.manifest, "STALE")

    def test_who_leaves_ends_the_questions_to_both(self) -> None:
        self.standin.fault(ways()[3])
        self.replica.fault(Fault("registry"))
        reply = self.daemon.send("GET", self.blob)
        self.pass_time(SLOW_SECONDS + 1)
        reply.leave()
        self.pass_time(60)
        self.assertEqual([], self.flushLoggedErrors())

    def test_what_is_configured_no_longer_is_not_asked_whether_it_is_well(self) -> None:
        """
        Neither the registry nor its replica gets probes.
        """
        self.standin.fault(ways()[1])
        self.replica.fault(ways()[1])
        for number in range(3 * FAILURES):
            self.daemon.send("GET", f"/v2/team/app{number}/manifests/{self.image.digest}")
        self.pass_time(60)
        self.daemon.upstream.leave()
        self.pass_time(60)
        asked = len(self.standin.asked), len(self.replica.asked)
        self.pass_time(60)
        self.assertEqual(asked, (len(self.standin.asked), len(self.replica.asked)))
