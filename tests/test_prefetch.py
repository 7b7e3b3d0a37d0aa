"""
The command C{ecr-proxy prefetch}: its images, its daemon, and its output.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.prefetch import PREFETCH
from ecrproxy.command.prefetching.door import Ask, Door
from ecrproxy.command.prefetching.work import run
from ecrproxy.oci import Digest
from tests.caller import Caller
from tests.test_prefetch_pulling import INDEX, LAYER, MANIFEST, Proxy, descriptor

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


class PrefetchTests(SynchronousTestCase):
    """
    One run.
    """

    def setUp(self) -> None:
        """
        Create a daemon with an image, and a caller.
        """
        self.proxy, self.caller = Proxy(), Caller()
        self.doors: list[Door] = []
        self.body = self.proxy.manifest("team/app", LAYER)
        self.proxy.tag("team/app", "1", MANIFEST, self.body)
        self.folder = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.caller.variables = {"PROXY_ECR_ENDPOINT": ECR, "HOME": str(self.folder)}

    def prefetch(self, *arguments: str) -> str:
        """
        Run the command.
        """

        def ask_of(door: Door) -> Ask:
            self.doors.append(door)
            return self.proxy.ask

        subcommands = [replace(PREFETCH, run=partial(run, ask_of=ask_of))]
        return self.caller.call("prefetch", *arguments, subcommands=subcommands)

    def file(self, text: str) -> str:
        path = self.folder / "file"
        path.write_text(text)
        return str(path)

    def test_images_are_brought_in(self) -> None:
        """
        The result is one line, and the second run transfers nothing.
        """
        self.assertEqual("1 image, 0 failed; 5.0 MiB downloaded, 0 B cached; 0 s\n", self.prefetch("team/app:1"))
        self.assertEqual(0, self.caller.status)
        self.assertIn("team/app:1: 5.0 MiB downloaded, 0 B cached\n", self.caller.complaint)
        self.assertEqual("1 image, 0 failed; 0 B downloaded, 5.0 MiB cached; 0 s\n", self.prefetch("team/app:1"))

    def test_one_that_can_not_be_had_keeps_back_none_of_the_others(self) -> None:
        """
        It is reported at the end, with the reason, and by the exit status.
        """
        said = self.prefetch("team/none:1", f"{ECR}/team/app:1")
        self.assertEqual(1, self.caller.status)
        self.assertIn("2 images, 1 failed; 5.0 MiB downloaded", said)
        self.assertIn("failed: team/none:1: MANIFEST_UNKNOWN: no such image\n", said)

    def test_a_blob_that_fails_fails_the_images_that_have_it(self) -> None:
        """
        And no others.
        """
        other = self.proxy.tag("team/app", "2", MANIFEST, self.proxy.manifest("team/app", b"small"))
        digest = descriptor("", LAYER)["digest"]
        del self.proxy.content[f"/v2/team/app/blobs/{digest}"]
        said = self.prefetch("team/app:1", other.name)
        self.assertIn("2 images, 1 failed", said)
        self.assertIn("failed: team/app:1:", said)

    def test_programs_read_json(self) -> None:
        """
        One document, with each image and its result.
        """
        told = json.loads(self.prefetch("--json", "team/app:1", "team/none"))
        self.assertEqual(1, told["failed"])
        good, bad = told["images"]
        self.assertEqual(("team/app:1", True, None, len(LAYER) + 2, 0), tuple(good.values()))
        self.assertEqual(("team/none", False), (bad["image"], bad["ok"]))

    def test_a_blob_that_two_images_have_is_moved_once(self) -> None:
        """
        It counts for both of them, and once in total.
        """
        self.proxy.tag("team/app", "same", MANIFEST, self.body)
        said = self.prefetch("team/app:1", "team/app:same", "team/app:1")
        self.assertIn("2 images, 0 failed; 5.0 MiB downloaded", said)

    def test_a_list_and_stdin_are_read(self) -> None:
        """
        Comments and blank lines are skipped.
        """
        self.prefetch("--file", self.file("# what we run\nteam/app:1\n\n"))
        self.assertEqual(0, self.caller.status)
        self.caller.at_a_terminal("team/app:1 # again\n")
        self.assertIn("1 image, 0 failed", self.prefetch("--file", "-"))

    def test_of_a_manifest_the_registrys_own_images_are_taken(self) -> None:
        """
        Those of other registries are skipped with a message, and are no failure.
        """
        text = f"spec: {{containers: [{{image: {ECR}/team/app:1}}, {{image: nginx}}, {{image: quay.io/x/y}}]}}"
        said = self.prefetch("--manifest", self.file(text))
        self.assertIn("1 image, 0 failed", said)
        self.assertIn("nginx: skipped: of Docker Hub", self.caller.complaint)
        self.assertIn("quay.io/x/y: skipped: of another registry", self.caller.complaint)
        self.prefetch("--manifest", self.file("image: proxy.example:5000/team/app:1"), "--host", "proxy.example:5000")
        self.assertEqual(0, self.caller.status)
        self.assertIn("0 images, 0 failed", self.prefetch("--manifest", self.file("image: nginx")))
        self.assertEqual(0, self.caller.status)

    def test_the_daemon_beside_is_known_as_this_machine(self) -> None:
        """
        By its port, as docker would name it here; another port is another registry's.
        """
        said = self.prefetch("localhost:5000/team/app:1", "127.0.0.1:5000/team/app:1")
        self.assertIn("1 image, 0 failed", said)
        self.prefetch("localhost:5001/team/app:1")
        self.assertEqual(2, self.caller.status)

    def test_the_platform_can_be_chosen(self) -> None:
        """
        One, several, or all; both flags at once are rejected.
        """
        bodies = {each: self.proxy.manifest("team/app", each.encode()) for each in ("amd64", "arm64")}
        listed = [
            descriptor(MANIFEST, body, platform={"os": "linux", "architecture": each}) for each, body in bodies.items()
        ]
        self.proxy.tag("team/app", "all", INDEX, json.dumps({"mediaType": INDEX, "manifests": listed}).encode())
        self.assertIn("; 7 B downloaded", self.prefetch("team/app:all", "--platform", "linux/arm64"))
        self.assertIn("; 5 B downloaded, 7 B", self.prefetch("team/app:all", "--all-platforms"))
        self.assertIn("not for linux/s390x", self.prefetch("team/app:all", "--platform", "linux/s390x"))
        self.assertEqual(1, self.caller.status)
        self.prefetch("team/app:all", "--platform", "linux/arm64", "--all-platforms")
        self.assertEqual(2, self.caller.status)

    def test_a_listed_manifest_that_is_missing_fails_the_image_and_keeps_nothing_else_back(self) -> None:
        """
        Registries delete a platform's manifest and keep the index.
        """
        bodies = {each: self.proxy.manifest("team/app", each.encode()) for each in ("amd64", "arm64", "s390x")}
        listed = [
            descriptor(MANIFEST, body, platform={"os": "linux", "architecture": each}) for each, body in bodies.items()
        ]
        self.proxy.tag("team/app", "all", INDEX, json.dumps({"mediaType": INDEX, "manifests": listed}).encode())
        gone = Digest.of(bodies["arm64"])
        del self.proxy.content[f"/v2/team/app/manifests/{gone}"]
        said = self.prefetch("team/app:all", "--all-platforms")
        self.assertEqual(1, self.caller.status)
        self.assertIn("1 image, 1 failed; 12 B downloaded", said)
        why = f"1 of 4 manifests can't be pulled, the rest is: {gone}: MANIFEST_UNKNOWN: no such image"
        self.assertIn(f"failed: team/app:all: {why}\n", said)
        self.assertIn(
            f"failed: team/app:all: {gone}: MANIFEST_UNKNOWN",
            self.prefetch("team/app:all", "--platform", "linux/arm64"),
        )

    def test_what_is_wrong_with_the_call_is_told_before_anything_is_moved(self) -> None:
        """
        In one line, with the exit status for usage errors.
        """
        broken = self.file("a: [")
        for arguments in (
            (),
            ("App",),
            ("docker.io/library/x",),
            ("a", "--jobs", "0"),
            ("a", "--jobs", "many"),
            ("a", "--jobs", "9" * 5000),
            ("a", "--platform", "arm64"),
            ("a", "--user", "ann"),
            ("a", "--proxy-url", "ftp://x"),
            ("a", "--proxy-url", "https://x", "--ca", "/no/such/file"),
            ("--file", "/no/such/file"),
            ("--manifest", broken),
        ):
            self.prefetch(*arguments)
            self.assertEqual(2, self.caller.status, arguments)
            self.assertEqual(1, self.caller.complaint.count("\n"), self.caller.complaint)
        self.assertEqual([], self.proxy.asked)

    def test_the_daemon_beside_is_found_by_its_settings(self) -> None:
        """
        Its port, its endpoints, or what the caller says.
        """
        self.prefetch("team/app:1")
        self.caller.variables["PROXY_PORT"] = "5007"
        self.prefetch("team/app:1")
        self.prefetch("team/app:1", "--listen", "unix:/run/x.sock")
        self.prefetch("team/app:1", "--proxy-url", "http://proxy.example:5008")
        places = [("127.0.0.1", 5000), ("127.0.0.1", 5007), "/run/x.sock", ("proxy.example", 5008)]
        self.assertEqual(places, [door.place.address for door in self.doors])

    def test_the_password_is_no_flag_and_is_not_shown(self) -> None:
        """
        It comes from a variable, or from docker login's file.
        """
        self.caller.variables["ECR_PROXY_PASSWORD"] = "secret"
        self.prefetch("team/app:1", "--user", "ann")
        docker = self.folder / ".docker"
        docker.mkdir()
        (docker / "config.json").write_text('{"auths": {"proxy.example:5000": {"auth": "Ym9iOm90aGVy"}}}')
        self.prefetch("team/app:1", "--proxy-url", "http://proxy.example:5000")
        self.prefetch("team/app:1")
        (docker / "config.json").write_text('{"auths": {"localhost:5000": {"auth": "Ym9iOm90aGVy"}}}')
        self.prefetch("team/app:1")
        logins = [("ann", "secret"), ("bob", "other"), None, ("bob", "other")]
        self.assertEqual(logins, [door.login for door in self.doors])
        self.assertNotIn("secret", repr(self.doors[0]))

    def test_a_password_that_docker_keeps_elsewhere_is_told(self) -> None:
        """
        It can't be read from here, and the error says so before ECR rejects anything.
        """
        (self.folder / "config.json").write_text('{"auths": {"proxy.example": {}}, "credsStore": "desktop"}')
        self.caller.variables["DOCKER_CONFIG"] = str(self.folder)
        self.prefetch("team/app:1", "--proxy-url", "https://proxy.example")
        self.assertEqual(2, self.caller.status)
        self.assertIn("give --user", self.caller.complaint)
