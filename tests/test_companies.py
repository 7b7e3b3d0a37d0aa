"""
One daemon for several registries: none is taken for another, and none is affected when another fails.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionRefusedError
from twisted.logger import LogLevel, capturedLogs, formatEvent

from ecrproxy.admin.units import size
from ecrproxy.http.access_log import GATHER_SECONDS
from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.blob_range import SOONER_SECONDS
from ecrproxy.registry.circuit import FAILURES
from ecrproxy.registry.ecr import Token
from ecrproxy.registry.race import SLOW_SECONDS
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from tests.daemon import MIB, DaemonTestCase, Reply, noise
from tests.markup import Node, Reader
from tests.registry import StandIn

ONE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
TWO = "444455556666.dkr.ecr.us-east-1.amazonaws.com"
THREE = "777788889999.dkr.ecr.eu-north-1.amazonaws.com"


class SeveralRegistriesTests(DaemonTestCase):
    """
    The default registry, and another with a path prefix and a host.
    """

    def setUp(self) -> None:
        super().setUp()
        bucket = "https://prod-us-east-1-starport-layer-bucket.s3.us-east-1.amazonaws.com"
        self.other = StandIn(self.clock, registry=f"https://{TWO}", bucket=bucket)
        self.layer = noise("shared", 100_000)
        self.image = self.standin.push_image("team/app", "latest", layers=[self.layer, b"one"])
        self.theirs = self.other.push_image("team/app", "latest", layers=[self.layer, b"two"])
        self.table = RegistryTable(
            name=TWO,
            protocol=Protocol.ECR,
            endpoint=f"https://{TWO}",
            region="us-east-1",
            path_prefix="us",
            hosts=frozenset({"us.example"}),
        )
        self.start(others={self.table: self.other})

    @property
    def blob(self) -> str:
        """
        Return the path of a layer that both have.
        """
        digest = json.loads(self.image.manifest)["layers"][0]["digest"]
        return f"/v2/team/app/blobs/{digest}"

    def theirs_by(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """
        Return the ways in which clients request C{path} from the other registry.
        """
        return [
            (f"{path}?ns={TWO}", {}),
            (path.replace("/v2/", "/v2/us/"), {}),
            (path.replace("/v2/", f"/v2/{TWO}/"), {}),
            (path, {"Host": "us.example:5000"}),
        ]

    def test_one_repository_and_tag_of_two_are_two(self) -> None:
        """
        However the client names the registry, cold and warm, by tag and by digest, with ECR and without.
        """
        for _ in range(2):
            for path, headers in self.theirs_by("/v2/team/app/manifests/latest"):
                self.assertWhole(self.get(path, **headers), self.theirs.manifest, None)
                self.assertWhole(self.get("/v2/team/app/manifests/latest"), self.image.manifest, None)
        self.standin.refuse("registry")
        self.other.refuse("registry")
        for path, headers in self.theirs_by("/v2/team/app/manifests/latest"):
            self.assertWhole(self.get(path, **headers), self.theirs.manifest, "STALE")
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), self.image.manifest, "STALE")

    def test_says_for_which_one_it_speaks_where_that_was_said(self) -> None:
        self.assertEqual(TWO, self.get(f"/v2/team/app/manifests/latest?ns={TWO}").header("OCI-Namespace"))
        self.assertIsNone(self.get("/v2/us/team/app/manifests/latest").header("OCI-Namespace"))

    def test_says_so_of_what_it_refuses_and_what_is_not_there(self) -> None:
        self.assertEqual(TWO, self.get(f"/v2/team/none/manifests/latest?ns={TWO}").header("OCI-Namespace"))
        self.assertIsNone(self.get("/v2/team/app/manifests/latest?ns=quay.io").header("OCI-Namespace"))
        self.start(pattern="other/.*")
        self.assertEqual(ONE, self.get(f"/v2/team/app/manifests/latest?ns={ONE}").header("OCI-Namespace"))

    def test_log_and_errors_name_the_registry(self) -> None:
        """
        Stale, refused and failed requests, and their clients: by the registry's name, not as ECR.
        """
        path = "/v2/us/team/app/manifests/latest"
        self.assertWhole(self.get(path), self.theirs.manifest)
        self.other.refuse("registry")
        with capturedLogs() as events:
            self.assertWhole(self.get(path), self.theirs.manifest, "STALE")
            failed = self.get("/v2/us/team/other/manifests/latest")
            self.clock.advance(GATHER_SECONDS)
        said = [str(formatEvent(event)) for event in events]
        self.assertTrue(any(f"/manifests/latest of {TWO} as last known: " in each for each in said), said)
        self.assertEqual([], [each for each in said if "ECR" in each])
        self.assertRefused(failed, 502, "UNAVAILABLE", "")
        self.assertNotIn("ECR", failed.body.decode())
        lines = "\n".join(each for each in said if f"GET {path}" in each)
        self.assertRegex(lines, rf"GET {path} 200 .* id \S+ registry {TWO}(\n|$)")

    def test_a_refusal_by_its_namespaces_names_the_registry(self) -> None:
        self.start(pattern="other/.*", others={self.table: self.other})
        with capturedLogs() as events:
            for path in ("/v2/us/team/app/manifests/latest", "/v2/team/app/manifests/latest"):
                self.assertRefused(self.get(path), 403, "DENIED", "team/app")
        said = [str(formatEvent(event)) for event in events if event.get("log_level") is LogLevel.warn]
        for name in (TWO, ONE):
            self.assertTrue(
                any(f"Refused team/app: the namespace pattern of {name}='other/.*'" in each for each in said)
            )

    def test_what_is_not_configured_is_never_contacted(self) -> None:
        """
        Whether the client names it by ns or by Host: another account, another region, another vendor.
        """
        path, asked = "/v2/team/app/manifests/latest", len(self.standin.asked)
        for name in (TWO.replace("4444", "5555"), TWO.replace("us-east-1", "us-east-2"), "Docker.IO.", "quay.io"):
            for refused in (
                self.get(f"{path}?ns={name}"),
                self.get(path, Host=name),
                self.get(path, Host=f"{name}:443"),
            ):
                self.assertRefused(refused, 404, "NAME_UNKNOWN", "give it a table")
                self.assertEqual("unknown-registry", refused.header("X-Cache-Reason"))
        self.start(unknown_status=403)
        self.assertRefused(self.get(f"{path}?ns=quay.io"), 403, "DENIED", "this proxy is no mirror of 'quay.io'")
        self.assertEqual((asked, 0), (len(self.standin.asked), len(self.other.asked)))

    def test_a_host_is_one_however_it_is_spelled(self) -> None:
        for host in ("US.example", "us.example.", "us.example:80", "US.Example.:5000", TWO.upper(), f"{TWO}.:443"):
            reply = self.get("/v2/team/app/manifests/latest", Host=host)
            self.assertWhole(reply, self.theirs.manifest)

    def test_bytes_are_shared_and_permission_is_not(self) -> None:
        """
        Content that one registry has delivered needs confirmation by the other; a repository that doesn't have it
        doesn't get it.
        """
        self.assertWhole(self.get(self.blob), self.layer, "MISS")
        sent = self.other.bytes_sent
        for path, headers in self.theirs_by(self.blob):
            self.assertWhole(self.get(path, **headers), self.layer, None)
        self.assertLess(self.other.bytes_sent - sent, 10_000)
        self.assertEqual(404, self.get(self.blob.replace("team/app", "us/team/none")).code)

    def test_a_transfer_in_progress_is_shared(self) -> None:
        digest = self.blob.rpartition("/")[2]
        self.standin.hold(digest)
        one = self.daemon.send("GET", self.blob)
        self.flush()
        two = self.daemon.send("GET", self.blob.replace("/v2/", "/v2/us/"))
        self.flush()
        self.standin.release(digest)
        self.flush()
        self.assertWhole(one, self.layer, "MISS")
        self.assertWhole(two, self.layer, "JOINED")

    def shared(self, layer: bytes, brought: int) -> tuple[str, Reply, Reply]:
        """
        Begin a transfer from the default registry that a client of the other one has joined.

        @param brought: how many bytes have arrived over each connection.
        """
        digest = str(self.standin.push_blob("team/app", layer))
        self.other.push_blob("team/app", layer)
        self.standin.hold(digest)
        one = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        two = self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}")
        self.flush()
        self.standin.deliver(digest, brought)
        self.flush()
        self.assertGreater(len(two.body), 0)
        return digest, one, two

    def test_what_one_breaks_off_another_that_has_it_finishes(self) -> None:
        """
        A client that has joined another registry's transfer is not affected by its failure: the rest comes from its own
        registry, from the byte at which the other broke off.
        """
        for count, brought, lanes in ((100_000, 40_000, 1), (20 * MIB, MIB, 4)):
            layer = noise(f"layer {count}", count)
            digest, one, two = self.shared(layer, brought)
            sent = self.other.bytes_sent
            for service in ("registry", "bucket"):
                self.standin.refuse(service)
            self.standin.cut(digest)
            self.pass_time(30)
            self.assertWhole(two, layer, "JOINED")
            self.assertWhole(one, layer, "MISS")
            self.assertEqual(count - lanes * brought, self.other.bytes_sent - sent)
            self.standin.heal()
            self.standin.release(digest)

    def test_what_one_stops_to_send_another_that_has_it_finishes(self) -> None:
        """
        Soon, also if that one is silent when the next range is requested.
        """
        for count, brought in ((100_000, 40_000), (20 * MIB, MIB)):
            layer = noise(f"stalled {count}", count)
            digest, one, two = self.shared(layer, brought)
            self.standin.slow("bucket", 0)
            self.pass_time(2 * SOONER_SECONDS)
            self.assertWhole(two, layer, "JOINED")
            self.assertWhole(one, layer, "MISS")
            self.standin.heal()
            self.standin.release(digest)

    def test_what_one_stops_to_send_another_that_has_it_finishes_however_slow_it_is_to_answer(self) -> None:
        """
        Though the first one answers sooner each time: it sends nothing then, or next to nothing.
        """
        for pace, count, brought in ((0, 100_000, 40_000), (20, 100_000, 40_000), (0, 20 * MIB, MIB)):
            layer = noise(f"late {pace} {count}", count)
            digest, one, two = self.shared(layer, brought)
            self.other.quirks.latency = 2 * SLOW_SECONDS / 3
            self.standin.slow("bucket", pace)
            self.pass_time(3 * SOONER_SECONDS)
            self.assertWhole(two, layer, "JOINED")
            self.assertWhole(one, layer, "MISS")
            self.other.quirks.latency = 0
            self.standin.heal()
            self.standin.release(digest)

    def test_what_one_does_not_begin_to_send_another_that_has_it_brings(self) -> None:
        layer = noise("silent", 100_000)
        digest, _, two = self.shared(layer, 40_000)
        for service in ("registry", "bucket"):
            self.standin.hang(service)
        self.standin.cut(digest)
        self.pass_time(SLOW_SECONDS + 2)
        self.assertWhole(two, layer, "JOINED")
        self.standin.heal()
        self.standin.release(digest)

    def test_who_joins_while_a_silent_one_is_asked_for_the_rest_has_it_from_its_own(self) -> None:
        layer = noise("asked already", 100_000)
        digest = str(self.standin.push_blob("team/app", layer))
        self.other.push_blob("team/app", layer)
        self.standin.hold(digest)
        one = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        self.standin.deliver(digest, 40_000)
        self.standin.hang("bucket")
        self.standin.cut(digest)
        self.pass_time(SLOW_SECONDS + 1)
        two = self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}")
        self.pass_time(1)
        self.assertWhole(two, layer, "JOINED")
        self.assertWhole(one, layer, "MISS")
        self.standin.heal()
        self.standin.release(digest)

    def test_a_client_that_waits_for_a_silent_registry_is_served_by_its_own(self) -> None:
        """
        Soon. A client of the silent one gets nothing that this one has not confirmed, except what a manifest lists.
        """
        layer = noise("opened", 100_000)
        for listed in (False, True):
            if listed:
                layer = noise("listed", 100_000)
                self.standin.push_image("team/app", "listed", layers=[layer])
                self.get("/v2/team/app/manifests/listed")
            digest = str(self.standin.push_blob("team/app", layer))
            self.other.push_blob("team/app", layer)
            self.standin.hang("registry")
            one = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
            self.flush()
            two = self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}")
            self.pass_time(SLOW_SECONDS + 1)
            self.assertWhole(two, layer, "JOINED")
            if listed:
                self.assertWhole(one, layer, "JOINED")
            else:
                self.assertEqual((0, b""), (one.code, bytes(one.body)))
                self.pass_time(60)
                self.assertEqual(504, one.code)
            self.standin.heal()
            self.assertWhole(self.get(f"/v2/us/team/app/blobs/{digest}"), layer, "HIT")
            self.pass_time(60)

    def test_nobody_of_a_silent_registry_has_what_another_registry_gives(self) -> None:
        """
        However many of them wait: the silent one has not confirmed that its repository has it. It does not.
        """
        layer = noise("theirs alone", 100_000)
        digest = str(self.other.push_blob("team/app", layer))
        self.standin.hang("registry")
        waiting = [self.daemon.send("GET", f"/v2/team/app/blobs/{digest}") for _ in range(3)]
        self.flush()
        theirs = self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}")
        self.pass_time(SLOW_SECONDS + 1)
        self.assertWhole(theirs, layer, "JOINED")
        self.assertEqual([(0, b"")] * 3, [(each.code, bytes(each.body)) for each in waiting])
        self.standin.heal()
        self.pass_time(60)
        self.assertEqual({404}, {each.code for each in waiting})
        self.assertRefused(self.get(f"/v2/team/app/blobs/{digest}"), 404, "BLOB_UNKNOWN", "")

    def three(self, layer: bytes) -> tuple[str, StandIn]:
        """
        Add a third registry, and one layer to all of them.
        """
        bucket = "https://prod-eu-north-1-starport-layer-bucket.s3.eu-north-1.amazonaws.com"
        third = StandIn(self.clock, registry=f"https://{THREE}", bucket=bucket)
        named = replace(self.table, name=THREE, endpoint=f"https://{THREE}", region="eu-north-1")
        table = replace(named, path_prefix="north", hosts=frozenset())
        self.start(others={self.table: self.other, table: third})
        for each in (self.standin, self.other, third):
            digest = str(each.push_blob("team/app", layer))
        return digest, third

    def test_several_silent_registries_keep_a_client_waiting_no_longer_than_one(self) -> None:
        layer = noise("silent ones", 100_000)
        digest, _ = self.three(layer)
        self.standin.hang("registry")
        self.other.hang("registry", method="GET")
        replies = [self.daemon.send("GET", f"/v2/{each}team/app/blobs/{digest}") for each in ("", "us/", "north/")]
        self.pass_time(SLOW_SECONDS + 1)
        self.assertWhole(replies[2], layer, "JOINED")
        self.assertWhole(replies[1], layer, "JOINED")

    def test_one_whose_client_comes_when_others_have_failed_or_are_late_is_asked_at_once(self) -> None:
        """
        Whichever other registry was asked a moment ago, and is silent.
        """
        digest, _ = self.three(noise("failed", 100_000))
        self.standin.hang("registry")
        self.other.hang("registry", method="GET")
        self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.pass_time(SLOW_SECONDS + 0.5)
        self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}")
        self.pass_time(0.5)
        self.assertEqual(200, self.get(f"/v2/north/team/app/blobs/{digest}").code)
        digest, _ = self.three(noise("late", 100_000))
        self.standin.heal()
        self.standin.refuse("registry")
        self.standin.quirks.latency = 0.5
        replies = [self.daemon.send("GET", f"/v2/{each}team/app/blobs/{digest}") for each in ("", "us/", "north/")]
        self.pass_time(SLOW_SECONDS + 1)  # it fails after two
        self.assertEqual(200, replies[2].code)

    def test_where_all_of_them_are_silent_nobody_waits_for_one_after_the_other(self) -> None:
        """
        As if no bucket were reachable: the result of a client's own registry is reported when its time is over.
        """
        digest, third = self.three(noise("all silent", 100_000))
        for each in (self.standin, self.other, third):
            each.hang("bucket")
        replies = [self.daemon.send("GET", f"/v2/{each}team/app/blobs/{digest}") for each in ("", "us/", "north/")]
        self.pass_time(SLOW_SECONDS + 26)
        self.assertEqual([504, 504, 504], [each.code for each in replies])

    def test_a_client_that_waits_for_a_failing_registry_is_served_by_its_own(self) -> None:
        """
        Cached or not, the whole or a part; what the other registry says about its repository has no effect.
        """
        for number, (limit, wanted) in enumerate(((2**30, ""), (1, ""), (1, "bytes=10-19"), (2**30, "bytes=10-19"))):
            self.start(others={self.table: self.other}, limit=limit)
            layer = noise(f"fails {number}", 100_000)
            digest = str(self.standin.push_blob("team/app", layer))
            self.other.push_blob("team/app", layer)
            fault = self.standin.hang("registry")
            headers = {"Range": wanted} if wanted else {}
            one = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}", **headers)
            self.flush()
            two = self.daemon.send("GET", f"/v2/us/team/app/blobs/{digest}", **headers)
            self.pass_time(80)
            self.assertEqual(layer[10:20] if wanted else layer, bytes(two.body))
            self.assertEqual(504, one.code)
            fault.remove()

    def test_a_part_that_is_not_kept_comes_from_the_registry_of_who_wants_it(self) -> None:
        """
        Also if both are known to have it, and the one that was asked first is silent: its client gets that error in
        time.
        """
        for number in range(2):
            self.start(others={self.table: self.other}, limit=90_000)
            layer = noise(f"too large {number}", 100_000)
            for standin, prefix in ((self.standin, ""), (self.other, "us/")):
                image = standin.push_image("team/app", "listed", layers=[layer])
                self.get(f"/v2/{prefix}team/app/manifests/listed")
            fault, asked = self.standin.hang("registry"), len(self.other.asked)
            path = f"team/app/blobs/{image.layers[0]}"
            one = self.daemon.send("GET", f"/v2/{path}", Range="bytes=10-19")
            self.flush()
            two = self.daemon.send("GET", f"/v2/us/{path}", Range="bytes=10-19")
            self.pass_time(SLOW_SECONDS + 1)
            self.assertWhole(two, layer[10:20], "BYPASS", code=206)
            self.pass_time(26)
            self.assertEqual(504, one.code)
            self.assertLess(len(self.other.asked) - asked, 6)
            fault.remove()
            self.pass_time(60)

    def test_one_that_is_slow_alone_is_waited_for(self) -> None:
        """
        No client of another registry waits for it: it has its full time.
        """
        layer = noise("slow", 100_000)
        digest = str(self.standin.push_blob("team/app", layer))
        self.standin.hold(digest)
        one = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        self.pass_time(25)
        self.standin.deliver(digest, 5000)
        self.pass_time(25)
        self.assertEqual(1, self.standin.count("bucket", path_contains=digest))
        self.standin.release(digest)
        self.flush()
        self.assertWhole(one, layer, "MISS")

    def test_one_that_sends_again_is_asked_again_where_the_other_has_stopped_too(self) -> None:
        layer = noise("in turns", 100_000)
        digest, _, two = self.shared(layer, 40_000)
        self.standin.slow("bucket", 0, times=1)
        self.other.slow("bucket", 0)
        self.standin.cut(digest)
        self.standin.release(digest)
        self.pass_time(70)
        self.assertWhole(two, layer, "JOINED")
        (asked,) = [each for each in self.other.requests("bucket") if each.headers.get("range") == "bytes=40000-99999"]
        self.assertEqual("GET", asked.method)

    def test_what_any_number_of_them_stop_to_send_the_one_that_sends_brings(self) -> None:
        accounts, others = [12 * digit for digit in "6789"], {self.table: self.other}
        for account in accounts:
            name = f"{account}.dkr.ecr.us-east-1.amazonaws.com"
            table = replace(self.table, name=name, endpoint=f"https://{name}", path_prefix=account, hosts=frozenset())
            others[table] = StandIn(self.clock, registry=table.endpoint or "", bucket=self.other.bucket)
        self.start(others=others)
        layer = noise("any number", 100_000)
        *silent, _ = others.values()
        for each in others.values():
            each.push_blob("team/app", layer)
        digest, *replies = self.shared(layer, 40_000)
        replies += [self.daemon.ask("GET", f"/v2/{each}/team/app/blobs/{digest}") for each in accounts]
        for each in (self.standin, *silent):
            each.slow("bucket", 0)
        self.pass_time(SOONER_SECONDS * (2 + len(silent)))
        for reply in replies:
            self.assertWhole(reply, layer)
        self.standin.release(digest)

    def test_one_that_breaks_off_after_some_bytes_each_time_gives_way_to_the_other(self) -> None:
        layer = noise("crumbs", 100_000)
        digest, one, two = self.shared(layer, 40_000)
        self.standin.break_off(10, times=None)
        sent = self.other.bytes_sent
        self.standin.cut(digest)
        self.standin.release(digest)
        self.pass_time(2)
        self.assertWhole(two, layer, "JOINED")
        self.assertWhole(one, layer, "MISS")
        self.assertEqual(59_990, self.other.bytes_sent - sent)

    def test_what_none_of_them_gives_any_more_ends(self) -> None:
        digest, one, two = self.shared(noise("gone", 100_000), 40_000)
        self.standin.refuse("bucket")
        self.other.deny()
        self.standin.cut(digest)
        self.pass_time(60)
        for each in (one, two):
            self.assertEqual("broken", each.ended)

    def test_a_token_goes_to_its_own_registry(self) -> None:
        self.other.issue_token()  # else both would count from one
        self.daemon.others[TWO].tokens._due = 0  # noqa: SLF001 (the next is due)
        self.pass_time(2)
        self.get("/v2/team/app/manifests/latest")
        self.get("/v2/us/team/app/manifests/latest")
        shown = [
            {each.headers.get("authorization") for each in standin.asked} for standin in (self.standin, self.other)
        ]
        self.assertEqual([1, 1, 0], [len(shown[0]), len(shown[1]), len(shown[0] & shown[1])])

    def test_one_that_fails_is_named_and_costs_the_others_nothing(self) -> None:
        """
        Neither its circuit, nor readiness, nor time.
        """
        self.other.fail("registry", status=500)
        for number in range(3 * FAILURES):
            self.daemon.send("GET", f"/v2/us/team{number}/app/manifests/latest")
        self.pass_time(30)
        reply = self.get("/v2/team/app/manifests/latest")
        self.assertWhole(reply, self.image.manifest, "MISS")
        ready = json.loads(self.get("/readyz").body)
        self.assertEqual((True, True), (ready["can_serve"], ready["can_fetch"]))
        self.assertTrue(any(each.startswith(f"{TWO}: ") for each in ready["reasons"]), ready["reasons"])
        states = {each["name"]: each["upstream"]["circuit"] for each in self.status()["registries"]}
        self.assertEqual("closed", states.pop(ONE))
        self.assertNotEqual({TWO: "closed"}, states)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.daemon.ask_admin("/status.json").body)
        return found

    def test_one_without_a_token_is_named_and_the_others_are_ready(self) -> None:
        def refuse() -> Deferred[Token]:
            return fail(TokenUnavailableError("AWS answers AccessDenied"))

        self.daemon.others[TWO].tokens._fetch = refuse  # noqa: SLF001 (as if the role was taken away)
        self.daemon.others[TWO].tokens._token = None  # noqa: SLF001
        self.daemon.others[TWO].tokens._due = 0  # noqa: SLF001
        reply = self.daemon.send("GET", "/v2/us/team/app/manifests/latest")
        self.pass_time(12)
        self.assertEqual(503, reply.code)
        reply = self.get("/readyz")
        ready = json.loads(reply.body)
        self.assertEqual((200, True, True), (reply.code, ready["can_serve"], ready["can_fetch"]))
        self.assertEqual([f"{TWO}: no token: AWS answers AccessDenied"], ready["reasons"])
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), self.image.manifest)

    def test_requests_are_counted_by_the_registry_of_the_configuration(self) -> None:
        self.get("/v2/us/team/app/manifests/latest")
        self.get("/v2/team/app/manifests/latest?ns=nobody.example")
        page = self.daemon.ask_admin("/metrics").body.decode()
        upstream = 'ecr_proxy_upstream_requests_total{host="registry",outcome="200",registry="%s"} 1.0'
        self.assertIn(upstream % TWO, page)
        self.assertNotIn(upstream % ONE, page)
        asked = 'ecr_proxy_requests_total{cache="%s",method="GET",registry="%s",route="manifest",status="%s"} 1.0'
        self.assertIn(asked % ("MISS", TWO, 200), page)
        self.assertIn(asked % ("-", "-", 404), page)

    def test_what_a_wildcard_stands_for_has_the_wildcards_name(self) -> None:
        """
        In metrics and on the page; in reasons each has its own.
        """
        name = "*.dkr.ecr.eu-central-1.amazonaws.com"
        table = RegistryTable(name=name, protocol=Protocol.ECR, endpoint=None, region="eu-central-1")
        self.start(others={table: self.other})
        hosts = [name.replace("*", 12 * digit) for digit in "123"]
        for host in hosts:
            self.get(f"/v2/team/app/manifests/latest?ns={host}")
        figures = self.daemon.ask_admin("/metrics").body.decode()
        self.assertEqual([], [host for host in hosts if host in figures])
        self.assertIn(f'ecr_proxy_circuit_state{{registry="{name}",state="closed"}} 1.0', figures)
        self.assertEqual([ONE, name], [each["name"] for each in self.status()["registries"]])
        self.assertEqual(3, sum(self.status()["registries"][1]["upstream"]["outcomes"]["registry"].values()))

    def test_status_page_has_a_row_for_each(self) -> None:
        for _ in range(2):
            self.get(self.blob.replace("/v2/", "/v2/us/"))
        self.other.fail("registry", status=500)
        self.get("/v2/us/team/none/manifests/latest")
        self.pass_time(20)
        first, second = self.rows(self.page("/"), "Registries")
        self.assertEqual([ONE, "closed", "good", "0", "0 B"], first)
        self.assertEqual([TWO, "closed", "good", "3", size(len(self.layer))], second)

    def test_status_page_leads_to_a_page_of_each(self) -> None:
        for path in (self.blob, self.blob, self.blob.replace("/v2/", "/v2/us/"), self.blob.replace("/v2/", "/v2/us/")):
            self.get(path)
        links = [each.attributes["href"] for each in self.page("/").all("a")]
        for name, repository in ((ONE, "team/app"), (TWO, f"{TWO}/team/app")):
            self.assertIn(f"?registry={name}", links)
            page = self.page(f"/?registry={name}")
            self.assertEqual(name, page.all("bdi")[0].text)
            self.assertEqual([repository], [row[0] for row in self.rows(page, "Repositories by bytes saved")])
            headings = [each.text for each in page.all("h2")]
            self.assertEqual(["At a glance", "On the way from ECR"], headings[:2])
            self.assertNotIn("Cache", headings)
            self.assertIn("./", [each.attributes["href"] for each in page.all("a")])
        self.assertEqual(404, self.daemon.ask_admin("/?registry=nobody.example").code)

    def page(self, path: str) -> Node:
        return Reader(self.daemon.ask_admin(path).body.decode().removeprefix("<!DOCTYPE html>")).top

    def rows(self, page: Node, heading: str) -> list[list[str]]:
        (section,) = [each for each in page.all("section") if each.all("h2")[0].text == heading]
        return [[cell.text for cell in row.all("th", "td")] for row in section.all("tr")][1:]

    def test_repositories_and_transfers_are_told_with_their_registry(self) -> None:
        digest = self.blob.rpartition("/")[2]
        self.other.hold(digest)
        self.daemon.send("GET", self.blob.replace("/v2/", "/v2/us/"))
        self.flush()
        self.assertEqual([f"{TWO}/team/app"], [each["repository"] for each in self.status()["transfers"]])
        self.other.release(digest)
        self.flush()
        self.get(self.blob.replace("/v2/", "/v2/us/"))
        self.get(self.blob)
        told = {each["repository"] for each in self.status()["repositories"]}
        self.assertEqual({f"{TWO}/team/app", "team/app"}, told)

    def test_pages_of_a_list_lead_on_to_the_same_one(self) -> None:
        self.other.push_image("team/app", *(f"v{number}" for number in range(5)))
        for path, headers in self.theirs_by("/v2/team/app/tags/list"):
            reply = self.get(f"{path}{'&' if '?' in path else '?'}n=2", **headers)
            link = reply.header("Link") or ""
            self.assertTrue(link.startswith(f"<{path.partition('?')[0]}?"), link)
            following = self.get(link[1 : link.index(">")], **headers)
            self.assertEqual(2, len(json.loads(following.body)["tags"]), link)

    def test_figures_have_a_line_for_each(self) -> None:
        page = self.daemon.ask_admin("/metrics").body.decode()
        for name in (ONE, TWO):
            self.assertIn(f'ecr_proxy_circuit_state{{registry="{name}",state="closed"}} 1.0', page)
            self.assertIn(f'ecr_proxy_token_expiry_timestamp_seconds{{registry="{name}"}}', page)

    def test_from_two_daemons_to_one_the_cache_is_kept(self) -> None:
        """
        From the one whose directory is kept, everything; from the other, whose content was copied, whatever its
        registry confirms.
        """
        for daemon in self.daemons:
            daemon.kill()
        self.start()
        self.get("/v2/team/app/manifests/latest")
        self.get(self.blob)
        self.daemon.kill()
        theirs = json.loads(self.theirs.manifest)["layers"][1]["digest"]
        path = f"/v2/team/app/blobs/{theirs}"
        there = self.kind(self.other, self.clock, self.root / "there")
        self.addCleanup(there.store.index.close)
        there.flush()
        self.assertWhole(there.ask("GET", path), b"two", "MISS")
        there.kill()
        shutil.copytree(self.root / "there/content", self.root / "content", dirs_exist_ok=True)
        shutil.rmtree(self.root / "there")
        asked, sent = len(self.standin.asked), self.other.bytes_sent
        self.start(others={self.table: self.other})
        self.assertWhole(self.get(self.blob), self.layer, "HIT")
        self.assertEqual(asked, len(self.standin.asked))
        self.assertWhole(self.get(f"{path}?ns={TWO}"), b"two", "REVALIDATED")
        self.assertEqual(sent, self.other.bytes_sent)


class CentralTests(DaemonTestCase):
    """
    A daemon on a node whose registry is another daemon, which all nodes share.
    """

    def setUp(self) -> None:
        super().setUp()
        self.layer = noise("central", 20 * MIB)
        self.image = self.standin.push_image("team/app", "latest", layers=[self.layer])
        self.path = f"/v2/team/app/blobs/{self.image.layers[0]}"
        root = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, root)
        central = self.daemon
        self.node = self.kind(
            self.standin, self.clock, root, agent=lambda _: central.front.agent(persistent=True), chance=0.5
        )
        self.addCleanup(self.node.store.index.close)
        self.daemons.append(self.node)
        self.flush()

    def flush(self) -> None:
        for _ in range(20):
            for each in self.daemons:
                each.flush()

    def stop_central(self) -> None:
        self.daemon.front.down = ConnectionRefusedError()
        for _, server in self.daemon.front.ends:
            server.loseConnection()

    def ask(self, path: str) -> Reply:
        reply: Reply = self.node.send("GET", path)
        self.pass_time(1)
        return reply

    def test_what_it_lacks_comes_from_there(self) -> None:
        """
        Without that one it has its own content: a tag as it was last known.
        """
        tag = "/v2/team/app/manifests/latest"
        self.assertWhole(self.ask(tag), self.image.manifest, "MISS")
        self.assertWhole(self.ask(self.path), self.layer, "MISS")
        self.assertWhole(self.ask(tag), self.image.manifest, "REVALIDATED")
        self.assertWhole(self.get(self.path), self.layer, "HIT")
        self.assertEqual(len(self.layer), self.standin.bytes_sent)
        self.stop_central()
        reply = self.ask(tag)
        self.pass_time(10)
        self.assertWhole(reply, self.image.manifest, "STALE")
        self.assertWhole(self.ask(self.path), self.layer, "HIT")

    def test_a_restart_there_breaks_off_nothing_here(self) -> None:
        digest = self.image.layers[0]
        self.standin.hold(digest)
        reply = self.node.send("GET", self.path)
        self.flush()
        self.standin.deliver(digest, 5 * MIB)
        self.flush()
        self.stop_central()
        self.standin.release(digest)
        self.flush()
        self.assertEqual("", reply.ended)
        self.daemon.front.down = None
        self.pass_time(10)
        self.assertWhole(reply, self.layer, "MISS")
