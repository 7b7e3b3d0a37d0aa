"""
The subcommands that inspect and change a cache, called with a daemon in memory and on its directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from http.client import IncompleteRead
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.asking import DaemonResponse
from ecrproxy.command.choosing import PurgeTarget, chosen, parse_age
from ecrproxy.command.naming import Pattern, naming_of
from ecrproxy.command.survey import CacheEntry, Survey, SurveyedFile
from ecrproxy.identity import RegistryId, Repository
from tests.caller import Caller
from tests.daemon import DaemonTestCase, noise
from tests.registry_content import Image

DAY = 86400
ANY = RegistryId("any:443")


class HoldingsTestCase(DaemonTestCase):
    """
    A daemon whose cache has two tags of one repository and one of another, and a caller of the command.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.shared, self.own = noise("shared", 200_000), noise("own", 100_000)
        self.v1 = self.standin.push_image("team/app", "v1", layers=[self.shared, self.own])
        self.v2 = self.standin.push_image("team/app", "v2", layers=[self.shared])
        self.other = self.standin.push_image("team/other", "v1", layers=[self.shared, b"other"])
        for repository, tag, image in (
            ("team/app", "v1", self.v1),
            ("team/app", "v2", self.v2),
            ("team/other", "v1", self.other),
        ):
            self.pull(repository, tag, image)
        self.caller = Caller(self.exchange, self.daemon.now())
        self.breaks_off = False

    def pull(self, repository: str, tag: str, image: Image) -> None:
        self.assertEqual(200, self.get(f"/v2/{repository}/manifests/{tag}").code)
        for digest in (image.config, *image.layers):
            self.assertEqual(200, self.get(f"/v2/{repository}/blobs/{digest}").code)

    def exchange(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
        reply = self.daemon.ask_admin(path, method, body=body or None, headers=headers)
        while not reply.ended:
            self.pass_time(1)
        if reply.ended == "broken" or (self.breaks_off and method == "POST"):
            raise IncompleteRead(bytes(reply.body))
        return DaemonResponse(reply.code, bytes(reply.body).splitlines(keepends=True))

    def call(self, *arguments: str, status: int = 0) -> str:
        written = self.caller.call(*arguments)
        self.assertEqual(status, self.caller.status, written + self.caller.complaint)
        return written

    def document(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.call(*arguments, "--json", status=status))


class LsTests(HoldingsTestCase):
    def test_lists_tags_with_sizes_and_last_use(self) -> None:
        """
        One line each, sorted; the total counts shared content once.
        """
        self.caller.time += 3 * 3600
        lines = self.call("ls").splitlines()
        self.assertEqual(["REPOSITORY", "TAG", "SIZE", "LAST", "USE"], lines[0].split())
        self.assertRegex(lines[1], r"^team/app +v1 +(29\d|30\d) KiB +3 hours ago$")
        self.assertRegex(lines[2], r"^team/app +v2 +19\d KiB +3 hours ago$")
        self.assertRegex(lines[3], r"^team/other +v1 +19\d KiB +3 hours ago$")
        self.assertRegex(lines[4], r"^3 images of 2 repositories, (29\d|30\d) KiB; shared content counts once$")

    def test_tells_programs_exactly(self) -> None:
        """
        Sizes are those of the files, as many times as each thing is in the cache.
        """
        told = self.document("ls")
        sizes = {f"sha256:{path.name}": path.stat().st_size for path in self.files()}
        self.assertEqual(sum(sizes.values()), told["bytes"])
        (app, other) = told["repositories"]
        of_other = {self.other.digest, self.other.config, *self.other.layers}
        self.assertEqual(("team/other", sum(map(sizes.__getitem__, of_other))), (other["repository"], other["bytes"]))
        self.assertEqual(["v1", "v2"], [each["tag"] for each in app["images"]])
        self.assertEqual([[self.v1.digest], [self.v2.digest]], [each["digests"] for each in app["images"]])

    def test_tells_programs_where_a_tag_led_before(self) -> None:
        moved = self.standin.push_image("team/app", "v2", layers=[self.shared, noise("moved", 100)])
        self.clock.advance(1000)
        self.get("/v2/team/app/manifests/v2")
        v1, v2 = self.document("ls", "team/app")["repositories"][0]["images"][:2]
        self.assertEqual([], v1["moves"])
        self.assertEqual([(self.v2.digest, moved.digest)], [(each["from"], each["to"]) for each in v2["moves"]])
        self.call("ls")

    def test_one_of_a_thing_is_told_as_one(self) -> None:
        self.call("purge", "--yes", "team/app:v2", "team/other")
        self.assertIn("\n1 image of 1 repository, ", self.call("ls"))
        self.assertRegex(self.call("purge", "team/app:v1", "--dry-run"), r"\n\d+ entries and \d+ files of content, ")

    def test_may_be_asked_for_some_repositories(self) -> None:
        """
        By name or by pattern; no match is status 1.
        """
        self.assertEqual(["team/other"], [each["repository"] for each in self.document("ls", "*/oth*")["repositories"]])
        self.assertIn("0 repositories", self.call("ls", "nobody", status=1))
        self.assertIn("matches nobody", self.caller.complaint)

    def test_names_by_its_digest_what_has_no_tag(self) -> None:
        """
        As in a cluster that pulls by digest; with --digests, in full.
        """
        image = self.standin.push_image("team/pinned", "never", layers=[self.shared])
        self.get(f"/v2/team/pinned/manifests/{image.digest}")
        self.assertRegex(self.call("ls", "team/pinned"), rf"team/pinned +@{image.digest[:19]} ")
        self.assertRegex(self.call("ls", "team/pinned", "--digests"), rf"{image.digest} ")

    def test_shows_a_person_that_it_is_at_work(self) -> None:
        """
        A large cache takes its time.
        """
        self.caller.at_a_terminal()
        self.caller.step = 1
        self.call("ls")
        self.assertIn("Reading 1 file, ", self.caller.complaint)

    def test_an_empty_cache_is_no_trouble(self) -> None:
        """
        The table has no rows then.
        """
        self.call("purge", "--yes", "*")
        self.assertIn("0 images of 0 repositories, 0 B", self.call("ls"))

    def test_needs_no_daemon(self) -> None:
        """
        The directory gives the same result.
        """
        asked = self.call("ls")
        self.assertEqual(asked, self.call("ls", "--offline", "--cache-dir", str(self.root)))

    def test_a_directory_that_is_none_is_told(self) -> None:
        """
        It is not taken for an empty cache.
        """
        self.call("ls", "--offline", "--cache-dir", "/nowhere", status=3)
        self.assertIn("/nowhere: not a readable cache directory", self.caller.complaint)


class PurgeTests(HoldingsTestCase):
    def test_shows_what_would_go_and_removes_nothing(self) -> None:
        """
        Without a terminal, --yes is needed.
        """
        before = self.files(), self.entries()
        written = self.call("purge", "team/app:v1")
        self.assertRegex(written, r"team/app +\d+ +v1\n")
        self.assertRegex(written, r"4 entries and 3 files of content, 98.5 KiB\n")
        self.assertIn("nothing was removed; give --yes", self.caller.complaint)
        self.assertEqual(before, (self.files(), self.entries()))

    def test_asks_a_person(self) -> None:
        """
        Anything but a yes is a no.
        """
        for typed, gone in (("\n", False), ("no\n", False), ("", False), ("y\n", True)):
            self.caller.at_a_terminal(typed)
            self.call("purge", "team/app:v1")
            self.assertIn("Remove it? [y/N]", self.caller.complaint)
            self.assertEqual(gone, not self.has(self.v1.digest), typed)

    def test_a_dry_run_asks_nobody(self) -> None:
        """
        Nor at a terminal.
        """
        self.caller.at_a_terminal("y\n")
        self.call("purge", "team/app", "--dry-run")
        self.assertNotIn("Remove", self.caller.complaint)
        self.assertTrue(self.has(self.v1.digest))

    def test_a_tag_goes_with_what_only_it_leads_to(self) -> None:
        """
        The other tag, and the other repository, keep what they share with it, and need only a check at ECR.
        """
        self.assertRegex(
            self.call("purge", "--yes", "team/app:v1"), "removed 4 entries and 3 files of content, 98.5 KiB"
        )
        self.assertEqual(
            [False, False, True], [self.has(each) for each in (self.v1.digest, self.v1.layers[1], self.v1.layers[0])]
        )
        self.standin.forget_asked()
        self.pull("team/app", "v2", self.v2)
        self.pull("team/other", "v1", self.other)
        self.assertEqual(0, self.standin.count("bucket"))
        self.assertEqual(["v2"], [each["tag"] for each in self.document("ls", "team/app")["repositories"][0]["images"]])

    def test_a_purged_tag_is_asked_afresh(self) -> None:
        """
        Even one that has a TTL.
        """
        self.start(tag_ttl=3600)
        self.assertEqual("HIT", self.get("/v2/team/app/manifests/v1").cache)
        moved = self.standin.push_image("team/app", "v1", layers=[b"moved"])
        self.call("purge", "--yes", "team/app:v1")
        reply = self.get("/v2/team/app/manifests/v1")
        self.assertEqual(("MISS", moved.digest), (reply.cache, reply.header("Docker-Content-Digest")))

    def test_a_repository_goes_and_frees_what_no_other_holds(self) -> None:
        """
        Nothing is known of it any longer.
        """
        self.call("purge", "--yes", "team/app")
        left = {f"sha256:{path.name}" for path in self.files()}
        self.assertEqual({self.other.digest, self.other.config, *self.other.layers}, left)
        self.assertEqual(["team/other"], [each["repository"] for each in self.document("ls")["repositories"]])
        self.assertEqual(self.used(), self.index.totals.blocks)

    def test_a_digest_goes_from_every_repository(self) -> None:
        """
        And its file, whichever repository had it.
        """
        layer = self.v1.layers[0]
        self.call("purge", "--yes", layer)
        self.assertFalse(self.has(layer))
        self.assertTrue(self.has(self.v1.digest))

    def test_by_age_each_file_is_judged_by_its_own_last_use(self) -> None:
        """
        Recently used files stay, whatever else of their image goes.
        """
        self.pass_time(2)
        self.clock.advance(30 * DAY)
        self.get(f"/v2/team/app/blobs/{self.v1.layers[1]}")
        self.pass_time(2)
        self.clock.advance(10 * DAY)
        self.caller.time = self.daemon.now()
        self.assertIn("nothing", self.call("purge", "--older-than", "50d", "--dry-run") + self.caller.complaint)
        self.call("purge", "--older-than", "4w", "--yes")
        self.assertEqual([self.v1.layers[1][7:]], [path.name for path in self.files()])
        self.assertEqual({self.v1.layers[1]}, {key.reference for key in self.entries()})

    def test_tells_programs_what_would_go_and_what_went(self) -> None:
        """
        The bytes that are announced are those that were removed.
        """
        before = sum(path.stat().st_size for path in self.files())
        would = self.document("purge", "team/app:v1")
        self.assertIsNone(would["removed"])
        self.assertEqual({"team/app"}, {each["repository"] for each in would["entries"]})
        self.assertIn(self.v1.layers[1], [each["digest"] for each in would["content"]])
        did = self.document("purge", "team/app:v1", "--yes")
        self.assertEqual(would["bytes"], did["removed"]["bytes"])
        after = sum(path.stat().st_size for path in self.files())
        self.assertEqual(before - after, did["removed"]["bytes"])

    def test_what_is_not_there_is_status_1(self) -> None:
        """
        A typo does not count as success.
        """
        for target in ("team/ap", "team/app:v3", f"team/app@{self.other.digest}", f"sha256:{'0' * 64}"):
            self.call("purge", "--yes", target, status=1)
            self.assertIn("nothing in the cache matches", self.caller.complaint)

    def test_misuse_is_told(self) -> None:
        """
        An argument that is not understood, or missing, purges nothing.
        """
        for arguments in (
            (),
            ("a:",),
            ("@x",),
            ("a@sha256:1",),
            ("--older-than", "soon"),
            ("sha256:1",),
        ):
            self.call("purge", "--yes", *arguments, status=2)
            self.assertRegex(self.caller.complaint, r"\Aecr-proxy: [^\n]+\n\Z")

    def test_works_on_the_directory_and_the_daemon_on_it_learns_of_it(self) -> None:
        """
        Within two seconds its memory is dropped.
        """
        self.assertEqual("HIT", self.get(f"/v2/team/app/manifests/{self.v1.digest}").cache)
        self.call("purge", "--offline", "--cache-dir", str(self.root), "--yes", "*")
        self.assertEqual(([], {}), (self.files(), self.entries()))
        self.pass_time(2)
        self.assertEqual("MISS", self.get(f"/v2/team/app/manifests/{self.v1.digest}").cache)

    def test_many_go_in_several_requests(self) -> None:
        """
        A request's body is small.
        """
        ((key, entry),) = [each for each in self.entries().items() if each[0].reference == "v2"]
        self.index.save([(key._replace(reference=f"x{number}"), entry) for number in range(1000)])
        self.assertEqual(1000, self.document("purge", "team/app:x*", "--yes")["removed"]["entries"])


class VerifyTests(HoldingsTestCase):
    def damage(self, digest: str) -> None:
        path = self.file_of(digest)
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    def test_says_that_all_is_well(self) -> None:
        """
        With how much there was.
        """
        self.assertRegex(self.call("verify"), rf"^{len(self.files())} files, (29\d|30\d) KiB: none bad\n$")

    def test_drops_what_is_bad(self) -> None:
        """
        It is reported, with status 1; the next run finds nothing, and the next pull fetches it.
        """
        self.damage(self.v1.layers[1])
        self.assertIn(": 1 bad", self.call("verify", status=1))
        self.assertIn(f"bad: {self.v1.layers[1]}, dropped", self.caller.complaint)
        self.assertFalse(self.has(self.v1.layers[1]))
        self.call("verify")
        self.pull("team/app", "v1", self.v1)

    def test_may_keep_what_is_bad(self) -> None:
        """
        Then the next run finds it again.
        """
        self.damage(self.v1.layers[1])
        for _ in range(2):
            told = self.document("verify", "--keep", status=1)
            self.assertEqual([self.v1.layers[1]], [each["digest"] for each in told["bad"]])
        shutil.copy(self.file_of(self.v1.layers[0]), self.root / "x")  # for the invariants
        self.call("verify", status=1)

    def test_shows_a_person_how_far_it_is(self) -> None:
        """
        On stderr, so that the answer stays clean.
        """
        self.caller.at_a_terminal()
        self.caller.step = 1
        self.call("verify")
        self.assertIn("Verifying [", self.caller.complaint)

    def test_goes_on_where_it_was_interrupted(self) -> None:
        """
        After an interrupt, or if the daemon stops, no content is verified twice.
        """
        digests = sorted(f"sha256:{path.name}" for path in self.files())
        self.breaks_off = True
        self.call("verify", status=3)
        self.assertIn(f"ecr-proxy verify --from {digests[0]} goes on", self.caller.complaint)
        self.breaks_off = False
        self.assertEqual(len(digests) - 2, self.document("verify", "--from", digests[2])["good"])

    def test_an_interrupt_tells_how_to_go_on(self) -> None:
        """
        With the status that shells expect.
        """

        def interrupted(method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
            if method == "POST":
                raise KeyboardInterrupt
            return self.exchange(method, path, headers, body)

        self.caller.exchange = interrupted
        self.call("verify", status=130)
        self.assertIn("interrupted; ecr-proxy verify --from sha256:", self.caller.complaint)

    def test_may_be_slow(self) -> None:
        """
        Both through the daemon and on a directory.
        """
        began = self.daemon.now()
        self.call("verify", "--rate", "100k")
        self.assertGreaterEqual(self.daemon.now() - began, 2)
        self.call("verify", "--rate", "100k", "--offline", "--cache-dir", str(self.root))
        self.assertGreaterEqual(sum(self.caller.slept), 2)
        self.call("verify", "--rate", "fast", status=2)

    def test_needs_no_daemon(self) -> None:
        """
        The directory can be verified by itself.
        """
        self.damage(self.v1.layers[1])
        self.assertIn(": 1 bad", self.call("verify", "--offline", "--cache-dir", str(self.root), status=1))
        self.assertFalse(self.has(self.v1.layers[1]))


class StatsTests(HoldingsTestCase):
    def test_tells_how_the_daemon_stands(self) -> None:
        """
        In a few lines.
        """
        self.pull("team/app", "v1", self.v1)
        written = self.call("stats")
        for pattern in (
            r"registry +http\S+, ecr-proxy \S+, up for \d+ ",
            r"ready +yes\n",
            r"cache +\d+ KiB of 1.0 GiB \(0 %\), 9 files, 0 evicted",
            r"hits +\d+ % of \d+ answers, \d+ KiB saved",
            r"now +0 B/s to clients, 0 B/s from upstream",
            r"token +expires in 1[12] hours, 0 refreshes failed",
            r"upstream +circuit closed, answered 0 seconds ago, 0 retries, 0 questions waiting",
            r"team/app +\d+ KiB +\d+\n",
        ):
            self.assertRegex(written, pattern)

    def test_tells_of_transfers(self) -> None:
        """
        With their progress.
        """
        digest = self.standin.push_blob("team/app", noise("slow", 300_000))
        self.standin.hold(digest)
        self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        self.assertRegex(self.call("stats"), rf"team/app +{digest[:19]} +0 B +293 KiB +1\n")
        self.standin.release(digest)
        self.flush()

    def test_gives_programs_the_document(self) -> None:
        """
        Unchanged.
        """
        self.assertEqual(2**30, self.document("stats")["cache"]["limit"])

    def test_a_daemon_that_is_not_ready_is_status_1(self) -> None:
        """
        With the reason.
        """

        def unready(method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
            (line,) = self.exchange(method, path, headers, body).lines
            told = json.loads(line)
            told["can_serve"] = False
            told["reasons"], told["token"]["problem"] = ["no token: denied"], "denied"
            return DaemonResponse(200, [json.dumps(told).encode()])

        self.caller.exchange = unready
        written = self.call("stats", status=1)
        self.assertRegex(written, r"ready +no: no token: denied\n")
        self.assertRegex(written, r"token +none: denied\n")

    def test_may_be_watched(self) -> None:
        """
        Repeated until interrupted.
        """

        def thrice(seconds: float) -> None:
            self.caller.slept.append(seconds)
            if len(self.caller.slept) == 3:
                raise KeyboardInterrupt

        self.caller.sleep = thrice  # type: ignore[method-assign]
        written = self.call("stats", "--watch", status=130)
        self.assertEqual(([2, 2, 2], 3), (self.caller.slept, written.count("registry")))
        self.caller.slept.clear()
        written = self.call("stats", "--json", "--watch", "0.5", status=130)
        self.assertEqual(3, len([json.loads(line) for line in written.splitlines()]))
        self.call("stats", "--watch", "0", status=2)


def held(
    name: str, repository: str, reference: str, *digests: str, manifest: bool = True, used: float = 0
) -> CacheEntry:
    """
    Return an entry.
    """
    tag = None if reference.startswith("d") else reference
    return CacheEntry(name, manifest, Repository(ANY, repository), tag, digests, used)


class ChoosingTests(SynchronousTestCase):
    """
    What a purge would remove; digests are called d1, d2 and so on.
    """

    def survey(self, *entries: CacheEntry, lists: Mapping[str, tuple[str, ...]] | None = None) -> Survey:
        digests = {digest for each in entries for digest in each.digests} | {"d9"}
        return Survey(list(entries), {each: SurveyedFile(10, 0) for each in digests}, dict(lists or {}))

    def going(self, survey: Survey, *targets: str, before: float | None = None) -> tuple[str, list[str]]:
        parsed = []
        for text in targets:
            name, _, digest = text.partition("@")
            repository, _, tag = name.partition(":")
            parsed.append(PurgeTarget(Pattern(repository), tag or None, digest or None))
        found = chosen(survey, parsed, naming_of((), (), {ANY}), before)
        return "".join(sorted(each.name for each in found.entries)), list(found.content)

    def test_a_tag_takes_along_what_only_it_leads_to(self) -> None:
        """
        Index, manifest and layer of one tag; a manifest that the other tag's index lists too stays.
        """
        survey = self.survey(
            held("a", "x", "one", "d1"),
            held("b", "x", "two", "d2"),
            held("c", "x", "d1", "d1"),
            held("d", "x", "d3", "d3"),
            held("e", "x", "d4", "d4"),
            held("f", "x", "d5", "d5", manifest=False),
            held("g", "x", "d6", "d6", manifest=False),
            lists={"d1": ("d3", "d4"), "d2": ("d4",), "d3": ("d5",), "d4": ("d6",)},
        )
        self.assertEqual(("acdf", ["d1", "d3", "d5"]), self.going(survey, "x:one"))
        self.assertEqual(("b", ["d2"]), self.going(survey, "x:two"))
        self.assertEqual(("abcdefg", ["d1", "d2", "d3", "d4", "d5", "d6"]), self.going(survey, "x:*"))

    def test_two_tags_of_one_manifest_keep_it_for_each_other(self) -> None:
        """
        Then only the tag is removed.
        """
        survey = self.survey(held("a", "x", "one", "d1"), held("b", "x", "two", "d1"), held("c", "x", "d1", "d1"))
        self.assertEqual(("a", []), self.going(survey, "x:one"))
        self.assertEqual(("abc", ["d1"]), self.going(survey, "x:one", "x:two"))

    def test_a_manifest_without_a_tag_keeps_what_it_lists(self) -> None:
        """
        A cluster may pull it by digest.
        """
        lists = {"d1": ("d5",), "d2": ("d5",)}
        survey = self.survey(
            held("a", "x", "one", "d1"),
            held("b", "x", "d2", "d2"),
            held("c", "x", "d5", "d5", manifest=False),
            lists=lists,
        )
        self.assertEqual(("a", ["d1"]), self.going(survey, "x:one"))

    def test_a_manifest_listed_in_a_circle_is_no_endless_walk(self) -> None:
        """
        Content can't be a cycle, but input could.
        """
        survey = self.survey(held("a", "x", "one", "d1"), lists={"d1": ("d2",), "d2": ("d1",)})
        self.assertEqual(("a", ["d1"]), self.going(survey, "x:one"))

    def test_content_of_another_repository_stays(self) -> None:
        """
        Also what that one only knows by a manifest.
        """
        lists = {"d1": ("d3",), "d2": ("d3",)}
        survey = self.survey(
            held("a", "x", "one", "d1"),
            held("b", "x", "d3", "d3", manifest=False),
            held("c", "y", "one", "d2"),
            lists=lists,
        )
        self.assertEqual(("ab", ["d1"]), self.going(survey, "x"))

    def test_a_digest_goes_where_it_was_named(self) -> None:
        """
        From one repository: its file stays for the other; from all: it is removed though a manifest lists it.
        """
        survey = self.survey(
            held("a", "x", "one", "d1"),
            held("b", "x", "d3", "d3", manifest=False),
            held("c", "y", "d3", "d3", manifest=False),
            lists={"d1": ("d3",)},
        )
        self.assertEqual(("b", []), self.going(survey, "x@d3"))
        self.assertEqual(("bc", ["d3"]), self.going(survey, "*@d3"))
        self.assertEqual(("", ["d9"]), self.going(survey, "*@d9"))

    def test_what_no_entry_names_is_left_alone(self) -> None:
        """
        It may be arriving: its entry is written after it.
        """
        survey = self.survey(held("a", "x", "one", "d1"))
        self.assertEqual(("a", ["d1"]), self.going(survey, "*"))

    def test_by_age_all_is_judged_by_its_own_use(self) -> None:
        """
        Entries and content, whatever leads to them; with names, only those named.
        """
        survey = self.survey(
            held("a", "x", "one", "d1", used=5),
            held("b", "x", "two", "d2", used=50),
            held("c", "y", "one", "d3", used=5),
        )
        survey.content.update(d1=SurveyedFile(10, 50), d2=SurveyedFile(10, 5), d3=SurveyedFile(10, 5))
        self.assertEqual(("ac", ["d2", "d3", "d9"]), self.going(survey, before=10))
        self.assertEqual(("a", ["d2"]), self.going(survey, "x", before=10))

    def test_targets_and_ages_are_read(self) -> None:
        """
        As people write them.
        """
        digest = f"sha256:{'a' * 64}"
        naming = naming_of((), (), ())
        for text, target in {
            "a/b": PurgeTarget(Pattern("a/b")),
            "a/*:v?": PurgeTarget(Pattern("a/*"), "v?"),
            "host:5000/a:1": PurgeTarget(Pattern("host:5000/a"), "1"),
            f"a@{digest}": PurgeTarget(Pattern("a"), digest=digest),
            digest: PurgeTarget(digest=digest),
        }.items():
            self.assertEqual(target, PurgeTarget.parse(text, naming))
        self.assertEqual(
            [30, 1800, 3600, 86400, 604800], [parse_age(text) for text in ("30s", "30m", "1h", "1d", "1w")]
        )
