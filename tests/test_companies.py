"""
One daemon for several registries: none of them is taken for another, and none notices that another fails.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from ecrproxy.registry.circuit import FAILURES
from ecrproxy.settings.registries import Protocol, RegistryTable
from tests.daemon import DaemonTestCase, noise
from tests.registry import StandIn

TWO = "444455556666.dkr.ecr.us-east-1.amazonaws.com"


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
        The path of a layer that both have.
        """
        digest = json.loads(self.image.manifest)["layers"][0]["digest"]
        return f"/v2/team/app/blobs/{digest}"

    def theirs_by(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """
        The ways in which clients ask the other registry for what is at C{path}.
        """
        return [
            (f"{path}?ns={TWO}", {}),
            (path.replace("/v2/", "/v2/us/"), {}),
            (path.replace("/v2/", f"/v2/{TWO}/"), {}),
            (path, {"Host": "us.example:5000"}),
        ]

    def test_one_repository_and_tag_of_two_are_two(self) -> None:
        """
        However the client says which one it means, cold and warm, by tag and by digest, with ECR and without.
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

    def test_bytes_are_shared_and_permission_is_not(self) -> None:
        """
        What one has brought in, the other confirms; a repository that has it not gets it not.
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
        Not its circuit, not readiness, and no time.
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
        self.assertEqual("closed", states.pop("123456789012.dkr.ecr.eu-west-1.amazonaws.com"))
        self.assertNotEqual({TWO: "closed"}, states)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.daemon.ask_admin("/status.json").body)
        return found

    def test_pages_of_a_list_lead_on_to_the_same_one(self) -> None:
        self.other.push_image("team/app", *(f"v{number}" for number in range(5)))
        reply = self.get("/v2/us/team/app/tags/list?n=2")
        link = reply.header("Link") or ""
        self.assertTrue(link.startswith("</v2/us/team/app/tags/list?"), link)
        following = self.get(link[1 : link.index(">")])
        self.assertEqual(2, len(json.loads(following.body)["tags"]))

    def test_figures_have_a_line_for_each(self) -> None:
        page = self.daemon.ask_admin("/metrics").body.decode()
        for name in (TWO, "123456789012.dkr.ecr.eu-west-1.amazonaws.com"):
            self.assertIn(f'ecr_proxy_circuit_state{{registry="{name}",state="closed"}} 1.0', page)
            self.assertIn(f'ecr_proxy_token_expiry_timestamp_seconds{{registry="{name}"}}', page)

    def test_from_two_daemons_to_one_the_cache_is_kept(self) -> None:
        """
        All of the one whose directory it has; of the other, whose content was copied, bytes that its registry confirms.
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
