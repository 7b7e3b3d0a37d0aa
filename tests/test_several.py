"""
A parent and its workers as one daemon: what the operator sees of them, and what workers see of each other.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import LogLevel

from ecrproxy.access.limits import Limits
from ecrproxy.answers import Asked
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.manifest_requests import INDEX_SECONDS
from ecrproxy.oci import Descriptor, Digest, parse_route
from ecrproxy.threads import Disk
from ecrproxy.workers.worker import CLOSE_SECONDS, TELL_SECONDS, TOGETHER
from tests.daemon import NAMED, DaemonTestCase, Hands, noise
from tests.registry_content import OCI_MANIFEST, SCHEMA2, layer
from tests.several import Several


class SeveralTestCase(DaemonTestCase):
    """
    A parent with two workers.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("several", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"
        self.several = self.make()

    def make(self, **options: Any) -> Several:
        """
        Start another parent.
        """
        return Several(self, **options)

    def status(self) -> dict[str, Any]:
        """
        Return /status.json of the parent.
        """
        reply = self.several.ask_admin("/status.json")
        self.assertEqual(200, reply.code)
        document: dict[str, Any] = json.loads(reply.body)
        return document

    def second(self) -> None:
        """
        Let workers report their counts.
        """
        self.several.pass_time(int(TELL_SECONDS))


class FiguresTests(SeveralTestCase):
    def test_requests_of_all_workers_are_counted(self) -> None:
        """
        Once each, no more than a second late; so are upstream requests.
        """
        for daemon in (*self.several.daemons, self.several.daemons[0]):
            self.assertWhole(daemon.ask("GET", self.blob), self.data)
        for _ in range(3):
            self.second()
        counted = 'ecr_proxy_requests_total{cache="%s",method="GET",%s,route="blob",status="200"}'
        self.assertEqual((1, 2), tuple(self.several.figure(counted % (word, NAMED)) for word in ("MISS", "HIT")))
        self.assertEqual(900_000, self.several.figure('ecr_proxy_client_bytes_total{route="blob"}'))
        received = self.several.figure('ecr_proxy_upstream_received_bytes_total{host="bucket"}')
        self.assertEqual(300_000, received)
        saved = {"repository": "team/app", "bytes": 600_000, "answers": 2}
        self.assertEqual([saved], self.status()["repositories"])
        self.assertEqual({"registry": {"307": 1}, "bucket": {"206": 1}}, self.status()["upstream"]["outcomes"])

    def test_gauges_become_one_by_what_they_mean(self) -> None:
        """
        Clients and transfers are added; of values about the same directory, one is used; of tokens, the worst.
        """
        self.several.daemons[0].ask("GET", self.blob)
        for number, daemon in enumerate(self.several.daemons):
            another = self.standin.push_blob("team/app", noise(f"another{number}", 300_000))
            self.standin.hold(another)
            daemon.send("GET", f"/v2/team/app/blobs/{another}")
        self.several.pass_time(1)
        self.assertEqual(2, self.several.figure("ecr_proxy_client_connections"))
        self.assertEqual(2, self.several.figure("ecr_proxy_client_transfers"))
        self.assertEqual(2, self.several.figure("ecr_proxy_transfers"))
        indexes = [daemon.store.index for daemon in self.several.daemons]
        held = max(each.totals.blocks + each.size for each in indexes)
        self.assertEqual(held, self.several.figure("ecr_proxy_cache_bytes"))
        self.assertEqual(2**30, self.several.figure("ecr_proxy_cache_limit_bytes"))
        self.assertEqual(1, self.several.figure('ecr_proxy_circuit_state{state="closed"}'))
        expiries = [daemon.tokens.expires or 0 for daemon in self.several.daemons]
        self.assertEqual(min(expiries), self.several.figure("ecr_proxy_token_expiry_timestamp_seconds"))
        self.standin.heal()
        self.several.flush()

    def test_what_a_worker_refused_stays_counted_when_it_has_died(self) -> None:
        """
        Its clients are gone with it.
        """
        self.several = self.make(limits=Limits(connections_per_address=1))
        for daemon in self.several.daemons:
            for _ in range(2):
                daemon.raw(b"")
        met = 'ecr_proxy_client_limits_total{limit="connections"}'
        self.assertEqual((2, 2), (self.several.figure(met), self.several.figure("ecr_proxy_client_connections")))
        self.several.machine.running[0].end()
        self.assertEqual((2, 1), (self.several.figure(met), self.several.figure("ecr_proxy_client_connections")))
        self.several.pass_time(2)
        self.assertEqual((2, 1), (self.several.figure(met), self.several.figure("ecr_proxy_client_connections")))

    def test_those_of_a_worker_that_hangs_stay_as_they_were(self) -> None:
        self.several.daemons[0].raw(b"")
        self.assertEqual(1, self.several.figure("ecr_proxy_client_connections"))
        self.several.machine.running[0].hangs = True
        asked = self.several.ask_admin("/metrics")
        self.several.pass_time(5)
        self.assertIn(b"ecr_proxy_client_connections 1.0", asked.body)

    def test_more_rows_than_a_message_has_are_told_in_several(self) -> None:
        figures = self.several.daemons[0].figures
        for number in range(3 * TOGETHER):
            figures.upstream.note(("bucket", str(number), "one.test"), 0.1, 1)
        self.second()
        self.assertEqual(3 * TOGETHER, len(self.status()["upstream"]["outcomes"]["bucket"]))
        self.assertEqual(2, len(self.several.machine.running))

    def test_the_last_of_a_worker_that_ends_in_order_are_told(self) -> None:
        self.several.daemons[0].ask("GET", self.blob)
        self.several.machine.running[0].end_in_order()
        self.assertEqual(1, self.status()["answers"]["MISS"]["count"])

    def test_a_worker_ends_though_its_parent_reads_nothing(self) -> None:
        """
        It waits for two seconds, and no longer.
        """
        worker = self.several.machine.running[0]
        worker.hangs = True
        worker.reports.running = False
        stopping = worker.reports.stopService()
        self.clock.advance(CLOSE_SECONDS - 0.1)
        self.assertNoResult(stopping)
        self.clock.advance(0.1)
        worker.hangs = False
        self.several.flush()
        self.successResultOf(stopping)

    def test_a_worker_waits_for_a_parent_that_is_slow(self) -> None:
        """
        It goes on counting, and reports everything when the parent has caught up.
        """
        worker = self.several.machine.running[0]
        worker.channel._flow.pauseProducing()  # noqa: SLF001
        self.several.daemons[0].ask("GET", self.blob)
        self.several.pass_time(3)
        self.assertEqual({}, self.status()["answers"])
        worker.channel._flow.resumeProducing()  # noqa: SLF001
        self.second()
        self.assertEqual(1, self.status()["answers"]["MISS"]["count"])


class StatusTests(SeveralTestCase):
    def test_transfers_of_all_workers_are_told(self) -> None:
        digests = [self.standin.push_blob("team/app", noise(f"held{number}", 300_000)) for number in range(2)]
        for daemon, digest in zip(self.several.daemons, digests, strict=True):
            self.standin.hold(digest)
            daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.several.flush()
        self.assertEqual(set(digests), {each["digest"] for each in self.status()["transfers"]})
        for digest in digests:
            self.standin.release(digest)
        self.several.flush()

    def test_what_went_through_is_that_of_all(self) -> None:
        for daemon in self.several.daemons:
            daemon.ask("GET", self.blob)
        self.several.pass_time(10)
        told = self.status()["lately"]
        self.assertEqual((2, 1, 600_000), (told["asked"], told["hits"], told["sent"]))

    def test_what_went_wrong_in_a_worker_is_told(self) -> None:
        """
        With lone surrogates escaped, so that the page can show it.
        """
        incidents = self.several.daemons[1].status.incidents
        for _ in range(3):
            incidents({"log_level": LogLevel.warn, "log_format": "bad \udfff {why}", "why": "disk"})
        self.second()
        (told,) = self.status()["incidents"]
        self.assertEqual((3, "warn"), (told["times"], told["level"]))
        self.assertEqual(200, self.several.ask_admin("/").code)

    def test_readiness_is_that_of_all(self) -> None:
        """
        As long as one worker can't serve, some clients are rejected, and the admin port says so; each worker's own port
        reports only that worker.
        """
        self.assertEqual(200, self.several.ask_admin("/readyz").code)
        worse, better = self.several.daemons
        self.patch(worse.store.checks, "reasons", lambda: ["the disk fails"])
        self.several.pass_time(3)
        found = self.several.ask_admin("/readyz")
        self.assertEqual(503, found.code)
        self.assertEqual(["the disk fails"], json.loads(found.body)["reasons"])
        self.assertEqual((503, 200), (worse.ask("GET", "/readyz").code, better.ask("GET", "/readyz").code))

    def test_a_worker_that_is_not_there_is_told(self) -> None:
        """
        The others serve; a second later it is replaced.
        """
        self.several.machine.running[0].end()
        found = json.loads(self.several.ask_admin("/readyz").body)
        self.assertEqual((True, ["1 of 2 worker processes do not answer"]), (found["can_serve"], found["reasons"]))
        self.several.pass_time(1)
        self.assertEqual([], json.loads(self.several.ask_admin("/readyz").body)["reasons"])

    def test_a_worker_whose_parent_has_gone_ends(self) -> None:
        worker = self.several.machine.running[0]
        worker.ends[0]._over(ConnectionError())  # noqa: SLF001
        worker.ends[0].peer._fin = True  # noqa: SLF001
        self.several.flush()
        self.assertEqual(1, worker.orphaned)


class DirectoryTests(SeveralTestCase):
    """
    The directory that all workers share.
    """

    def test_what_one_brought_the_other_has(self) -> None:
        """
        With the permission: it sends no request.
        """
        one, other = self.several.daemons
        self.assertWhole(one.ask("GET", self.blob), self.data, "MISS")
        self.standin.forget_asked()
        self.assertWhole(other.ask("GET", self.blob), self.data, "HIT")
        self.assertEqual([], self.standin.asked)

    def test_a_cold_blob_is_brought_once(self) -> None:
        """
        By the worker that is asked first; clients of the other get its bytes as they arrive.
        """
        self.standin.hold(self.digest)
        exchanges = [daemon.send("GET", self.blob) for daemon in self.several.daemons]
        self.several.flush()
        self.standin.release(self.digest)
        for _ in range(3):
            self.several.pass_time(1)
        for exchange, word in zip(exchanges, ("MISS", "JOINED"), strict=True):
            self.assertWhole(exchange, self.data, word)
        self.assertEqual(len(self.data), self.standin.bytes_sent)

    def test_a_worker_drops_what_was_altered(self) -> None:
        """
        Whichever finds it; the next request fetches it again, in any of them.
        """
        one, other = self.several.daemons
        one.ask("GET", self.blob)
        path = self.file_of(self.digest)
        path.write_bytes(self.data[::-1])
        self.assertBroken(other.ask("GET", self.blob), b"")
        self.assertFalse(path.exists())
        self.assertWhole(other.ask("GET", self.blob), self.data, "MISS")
        for daemon in (one, other):
            self.assertWhole(daemon.ask("GET", self.blob), self.data, "HIT")

    def test_what_the_operator_purged_is_asked_for_afresh(self) -> None:
        """
        By each worker, within two seconds; the parent has removed it.
        """
        image = self.standin.push_image("team/app", "latest")
        by_digest = f"/v2/team/app/manifests/{image.digest}"
        for daemon in self.several.daemons:
            self.assertEqual(200, daemon.ask("GET", by_digest).code)
        told = {"X-Ecrproxy-Api": "1", "Content-Type": "application/json"}
        entries = [str(key) for key in self.entries()]
        body = json.dumps({"content": [image.digest], "entries": entries}).encode()
        self.assertEqual(200, self.several.ask_admin("/api/remove", "POST", body=body, headers=told).code)
        self.several.pass_time(2)
        for daemon, word in zip(self.several.daemons, ("MISS", "HIT"), strict=True):
            self.assertEqual(word, daemon.ask("GET", by_digest).cache)


class TagsTests(SeveralTestCase):
    """
    What ECR told one worker about a tag, when another can't ask.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"

    def test_of_a_tag_that_is_gone_no_worker_serves_the_image(self) -> None:
        one, other = self.several.daemons
        for daemon in (one, other):
            self.assertWhole(daemon.ask("GET", self.path), self.image.manifest)
        self.standin.delete_tag("team/app", "latest")
        self.assertRefused(one.ask("GET", self.path), 404, "MANIFEST_UNKNOWN")
        self.standin.refuse("registry")
        for daemon in (other, one):
            self.assertRefused(daemon.ask("GET", self.path), 502, "UNAVAILABLE")

    def test_of_a_tag_that_has_moved_every_worker_serves_where_it_leads(self) -> None:
        one, other = self.several.daemons
        for daemon in (one, other):
            daemon.ask("GET", self.path)
        moved = self.standin.push_image("team/app", "latest", layers=[layer("new", b"moved")])
        self.assertWhole(one.ask("GET", self.path), moved.manifest, "MISS")
        self.standin.refuse("registry")
        for daemon in (other, one):
            self.assertWhole(daemon.ask("GET", self.path), moved.manifest, "STALE")

    def test_answers_that_come_late_to_one_change_nothing_of_what_another_was_told_since(self) -> None:
        """
        The time when ECR was asked counts, whichever worker asked.
        """
        one, other = self.several.daemons
        asked = Asked(parse_route(self.path, one.registry), self.path, frozenset({OCI_MANIFEST}))
        key, old = EntryKey.of(asked.route, asked.key), Descriptor(OCI_MANIFEST, Digest.of(b"old"), 3)
        early = self.moment()
        self.several.pass_time(5)
        self.assertWhole(other.ask("GET", self.path, Accept=OCI_MANIFEST), self.image.manifest)
        self.done(one.cache.tags.forget(asked, early))
        self.done(one.cache.tags.record(asked, early, old, None, 0))
        self.standin.refuse("registry")
        for daemon in (one, other, self.start()):
            self.assertWhole(daemon.ask("GET", self.path, Accept=OCI_MANIFEST), self.image.manifest, "STALE")
        self.several.pass_time(1)
        self.done(one.cache.tags.forget(asked, self.moment()))
        self.assertIsNone(other.store.written(key))

    def test_what_was_said_before_the_clock_was_set_back_is_no_news(self) -> None:
        one, other = self.several.daemons
        asked = Asked(parse_route(self.path, one.registry), self.path, frozenset({OCI_MANIFEST}))
        key, new = EntryKey.of(asked.route, asked.key), Descriptor(OCI_MANIFEST, Digest.of(b"new"), 3)
        for _ in range(2):
            other.store.save((key, Entry({asked.accept: Confirmed(new, one.now() + 3600)})))
            self.done(one.cache.tags.forget(asked, self.moment()))
            self.assertIsNone(other.store.written(key))
        other.store.save((key, Entry({asked.accept: Confirmed(new, one.now() + 3600)})))
        self.assertWhole(one.ask("GET", self.path, Accept=OCI_MANIFEST), self.image.manifest)
        found = other.store.written(key)
        assert found is not None
        self.assertEqual(self.image.digest, str(found.answers[asked.accept].descriptor.digest))

    def moment(self) -> int:
        """
        Return the number of a request that is sent now.
        """
        return round(self.daemon.now() * 1e6)

    def done(self, work: Coroutine[Any, Any, Any]) -> None:
        self.successResultOf(Deferred.fromCoroutine(work))

    def test_answers_to_clients_of_each_worker_are_known_to_all_and_after_a_start(self) -> None:
        """
        ECR converts manifests: clients of different types get different ones. No worker removes what another was told.
        """
        one, other = self.several.daemons
        digests = {}
        for daemon, accept in ((one, OCI_MANIFEST), (other, OCI_MANIFEST), (one, SCHEMA2), (other, OCI_MANIFEST)):
            self.several.pass_time(61)  # a confirmation is written again after a minute
            digests[accept] = daemon.ask("GET", self.path, Accept=accept).header("Docker-Content-Digest")
        self.assertEqual(2, len(set(digests.values())))
        self.standin.refuse("registry")
        for daemon in (one, other, self.start()):
            for accept, digest in digests.items():
                reply = daemon.ask("GET", self.path, Accept=accept)
                self.assertEqual((200, "STALE"), (reply.code, reply.cache))
                self.assertEqual(digest, reply.header("Docker-Content-Digest"))

    def test_a_disk_that_hangs_keeps_no_worker_from_what_it_knows(self) -> None:
        """
        The index has a second to answer.
        """
        hands = Hands()
        daemon = self.start(disk=Disk.of(hands))
        self.assertWhole(daemon.ask("GET", self.path), self.image.manifest)
        self.standin.refuse("registry")
        hands.idle = False
        reply = daemon.ask("GET", self.path)
        self.assertEqual("", reply.ended)
        self.pass_time(INDEX_SECONDS)
        self.assertWhole(reply, self.image.manifest, "STALE")
        hands.idle = True
        hands.work_off()
