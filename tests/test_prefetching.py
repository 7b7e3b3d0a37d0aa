"""
Prefetch an image within the daemon, as the pages' button does.
"""

from __future__ import annotations

import json
from typing import Any

from ecrproxy import prefetching
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.prefetch_progress import PrefetchProgress
from tests.daemon import Administered, Reply, noise
from tests.registry_content import Image
from tests.several import Several
from tests.test_upkeep import ECR, OWN, UpkeepTestCase

MIB = 2**20


class PrefetchTestCase(UpkeepTestCase):
    """
    A daemon, and an image that nobody has pulled.
    """

    def setUp(self) -> None:
        super().setUp()
        self.new = self.standin.push_image("team/new", "v1", layers=[noise("one", 3 * MIB), noise("two", 500)])

    def begin(self, asked: Administered | None = None, **document: Any) -> Reply:
        meant = {"registry": ECR, "repository": "team/new", "reference": "v1", **document}
        shown = {"X-Ecrproxy-Api": "1", "Content-Type": "application/json", **OWN}
        return (asked or self.daemon).ask_admin("/api/prefetch", "POST", body=json.dumps(meant).encode(), headers=shown)

    def lines(self, reply: Reply) -> list[PrefetchProgress]:
        self.assertEqual((200, "whole"), (reply.code, reply.ended), reply.body)
        return [PrefetchProgress(**json.loads(line)) for line in reply.body.splitlines()]

    def prefetch(self, **document: Any) -> PrefetchProgress:
        reply = self.begin(**document)
        self.pass_time(5)
        return self.lines(reply)[-1]

    def size(self, image: Image) -> int:
        return sum(len(self.standin.repositories["team/new"].blobs[each]) for each in (image.config, *image.layers))


class PrefetchTests(PrefetchTestCase):
    def test_an_image_is_in_the_cache_afterwards(self) -> None:
        size = self.size(self.new)
        told = self.prefetch()
        self.assertEqual(PrefetchProgress(1, size, size, told.fetched, 3, over=True), told)
        self.assertEqual(4, len(self.there(self.new)))
        self.standin.forget_asked()
        self.assertEqual("HIT", self.get(f"/v2/team/new/blobs/{self.new.layers[0]}").cache)
        self.assertEqual("HIT", self.get(f"/v2/team/new/manifests/{self.new.digest}").cache)
        self.assertEqual(0, self.standin.count("bucket", "GET"))

    def test_what_is_there_is_not_fetched_again(self) -> None:
        self.prefetch()
        self.standin.forget_asked()
        told = self.prefetch()
        self.assertEqual((0, 3, told.of), (told.fetched, told.blobs, told.there))
        self.assertEqual(0, self.standin.count("bucket", "GET"))

    def test_progress_is_told_while_it_runs(self) -> None:
        self.standin.hold(self.new.layers[0])
        reply = self.begin()
        self.pass_time(2)
        self.assertEqual("", reply.ended)
        told = PrefetchProgress(**json.loads(reply.body.splitlines()[-1]))
        self.assertEqual((2, False), (told.blobs, told.over))
        self.standin.release(self.new.layers[0])
        self.pass_time(2)
        self.assertEqual((3, True), (self.lines(reply)[-1].blobs, self.lines(reply)[-1].over))

    def test_of_an_index_the_platforms_are_fetched(self) -> None:
        amd, arm = (
            self.standin.push_image("team/new", layers=[noise(each, 700)], platform=f"linux/{each}")
            for each in ("amd64", "arm64")
        )
        self.standin.push_index("team/new", "multi", [amd, arm])
        self.prefetch(reference="multi", platforms=["linux/arm64"])
        self.assertEqual((0, 3), (len(self.there(amd)), len(self.there(arm))))
        told = self.prefetch(reference="multi")
        self.assertEqual((3, 3), (len(self.there(amd)), len(self.there(arm))))
        self.assertEqual((3, ""), (told.manifests, told.problem))
        self.assertIn("not for linux/s390x", self.prefetch(reference="multi", platforms=["linux/s390x"]).problem)
        self.assertIn("is not a platform", self.prefetch(reference="multi", platforms=["x"]).problem)

    def test_what_fails_is_told_and_the_rest_is_fetched(self) -> None:
        del self.standin.repositories["team/new"].blobs[self.new.layers[0]]
        told = self.prefetch()
        self.assertEqual((2, 1, True), (told.blobs, told.missing, told.over))
        self.assertTrue(told.problem)
        self.assertTrue(self.has(self.new.layers[1]))

    def test_what_is_not_there_or_not_allowed_is_told(self) -> None:
        self.assertTrue(self.prefetch(reference="none").problem)
        self.assertIn("not configured", self.prefetch(registry="other.test:443").problem)
        self.assertTrue(self.prefetch(repository="Team/../x").problem)
        self.start(pattern="team/app")
        self.standin.forget_asked()
        self.assertTrue(self.prefetch().problem)
        self.assertEqual(0, self.standin.count("registry", "GET"))
        self.assertEqual([], self.flushLoggedErrors())

    def test_a_client_that_leaves_ends_it(self) -> None:
        self.standin.hold(self.new.layers[0])
        self.begin()
        self.pass_time(1)
        ((client, _),) = [each for each in self.daemon.admin.ends if each[0].connected]
        client.abortConnection()
        self.flush()
        self.assertEqual([0], [each.followers for each in self.daemon.pull_through.transfers()])
        self.assertEqual(0, self.daemon.prefetching._running)  # noqa: SLF001
        self.standin.release(self.new.layers[0])
        self.pass_time(2)

    def test_few_run_at_once(self) -> None:
        self.standin.hold(self.new.layers[0])
        replies = [self.begin() for _ in range(prefetching.AT_ONCE)]
        self.assertIn("others are running", self.lines(self.begin())[-1].problem)
        self.standin.release(self.new.layers[0])
        self.pass_time(3)
        self.assertEqual([""] * prefetching.AT_ONCE, [self.lines(each)[-1].problem for each in replies])
        self.assertEqual("", self.prefetch().problem)

    def test_an_endless_image_is_refused(self) -> None:
        self.patch(prefetching, "BLOBS", 2)
        self.assertIn("more than 2 blobs", self.prefetch().problem)
        self.patch(prefetching, "MANIFESTS", 1)
        self.standin.push_index("team/new", "multi", [self.new, self.image])
        self.assertIn("more than 1 manifests", self.prefetch(reference="multi").problem)

    def test_what_does_not_fit_is_not_transferred(self) -> None:
        self.start(limit=MIB)
        told = self.prefetch()
        self.assertIn("can't be kept", told.problem)
        self.assertFalse(self.has(self.new.layers[0]))

    def test_other_pages_may_not(self) -> None:
        meant: dict[str, Any] = {"registry": ECR, "repository": "team/new", "reference": "v1"}
        self.assertEqual(403, self.post("prefetch", meant, Origin="http://evil.example").code)
        for wrong in ({"reference": None}, {"platforms": "x"}, {"platforms": [1]}, {"platforms": ["x"] * 21}):
            self.assertEqual(400, self.post("prefetch", {**meant, **wrong}).code)


class WorkersTests(PrefetchTestCase):
    """
    With workers: one of them fetches, the parent tells.
    """

    def setUp(self) -> None:
        super().setUp()
        self.several = Several(self)

    def test_a_worker_fetches(self) -> None:
        reply = self.begin(self.several)
        self.several.pass_time(5)
        told = self.lines(reply)[-1]
        self.assertEqual((3, "", True), (told.blobs, told.problem, told.over))
        self.assertEqual(4, len(self.there(self.new)))
        self.assertEqual({}, self.several.workers._prefetches)  # noqa: SLF001

    def test_one_that_leaves_ends_it_there(self) -> None:
        self.standin.hold(self.new.layers[0])
        self.begin(self.several)
        self.several.pass_time(2)
        running = [each.prefetching._running for each in self.several.daemons]  # noqa: SLF001
        self.assertEqual([0, 1], sorted(running))
        ((client, _),) = [each for each in self.several.admin.ends if each[0].connected]
        client.abortConnection()
        self.several.flush()
        self.assertEqual([0, 0], [each.prefetching._running for each in self.several.daemons])  # noqa: SLF001
        self.standin.release(self.new.layers[0])
        self.several.pass_time(2)

    def test_a_worker_that_dies_is_told(self) -> None:
        self.standin.hold(self.new.layers[0])
        reply = self.begin(self.several)
        self.several.pass_time(1)
        for each in list(self.several.machine.running):
            each.end()
        self.several.pass_time(2)
        self.assertIn("has exited", self.lines(reply)[-1].problem)
        self.standin.release(self.new.layers[0])

    def test_without_any_worker_it_is_told(self) -> None:
        workers = self.several.workers
        for each in workers._workers.values():  # noqa: SLF001
            each.listens = False
        progress = workers.prefetch(Repository(RegistryId(ECR), "team/new"), "v1", []).progress
        self.assertEqual((True, "no worker accepts connections"), (progress.over, progress.problem))
