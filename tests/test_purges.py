"""
A purge also drops what is in memory.
"""

from __future__ import annotations

from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cached.bodies import SMALL_BLOB
from ecrproxy.oci import Digest
from ecrproxy.threads import Disk, InThread
from tests.daemon import DaemonTestCase, Hands, Reply, at_once, noise
from tests.registry_content import OCI_LAYER, OCI_MANIFEST

TEAMS = ("a", "b")
TTL = 1000
"""Seconds for which a tag is served without asking ECR."""


class KeyedTests(DaemonTestCase):
    """
    With a PROXY_CACHE_KEY that distinguishes clients.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.start(cache_key="$uri$http_x_team")
        self.image = self.standin.push_image("team/app", "latest")
        self.manifest = f"/v2/team/app/manifests/{self.image.digest}"

    def words(self, path: str) -> list[str | None]:
        """
        Return how each team's request is answered.
        """
        return [self.get(path, X_Team=team).cache for team in TEAMS]

    def purge(self, *keys: EntryKey) -> None:
        Inventory(self.daemon.store).remove(keys, [])
        self.pass_time(1)

    def test_what_a_manifest_tells_is_forgotten_whatever_the_key(self) -> None:
        """
        Of the manifest itself, and of a small blob that it lists, which memory has read from the index.
        """
        self.get("/v2/team/app/manifests/latest", X_Team="a")
        self.start(cache_key="$uri$http_x_team")
        paths = [f"/v2/team/app/blobs/{self.image.config}", self.manifest]
        self.get(paths[0], X_Team="a")  # it is fetched
        self.assertEqual([["HIT", "HIT"]] * 2, [self.words(path) for path in paths])
        self.purge(*self.entries())
        self.assertEqual(["REVALIDATED"] * 2, [self.get(path, X_Team="b").cache for path in paths])

    def test_what_the_index_keeps_no_more_is_forgotten_with_what_it_keeps(self) -> None:
        """
        It keeps a number of keys for each digest, and a purge knows only those.
        """
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('blob', 1000))}"
        for _ in TEAMS:
            self.words(path)
        kept, lost = (key for key in self.entries() if key.reference in path)
        self.index.forget(lost)
        self.purge(kept)
        self.assertEqual(["REVALIDATED"] * 2, self.words(path))


class SlowDiskTests(DaemonTestCase):
    """
    What was read or written before a purge, and is delivered after it, is not kept in memory.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.tag = "/v2/team/app/manifests/latest"
        self.manifest = f"/v2/team/app/manifests/{self.image.digest}"
        self.config = f"/v2/team/app/blobs/{self.image.config}"
        for path in (self.tag, self.config):
            self.get(path)
        self.hands = Hands()

    def start_slow(self, *slow: str, tag_ttl: int = 0) -> None:
        """
        Start a daemon whose threads for some kinds of work wait to be told.
        """
        kinds = ("reading", "writing", "committing", "hashing", "digesting", "closing")
        threads: dict[str, InThread] = {**dict.fromkeys(kinds, at_once), **dict.fromkeys(slow, self.hands)}
        self.start(tag_ttl=tag_ttl, disk=Disk(**threads))

    def purge(self, *content: str) -> None:
        """
        Purge everything known of repositories, and some content, and let the daemon notice.
        """
        Inventory(self.daemon.store).remove(list(self.entries()), map(Digest.parse, content))
        self.pass_time(3)

    def work_off(self) -> None:
        self.hands.idle = True
        self.hands.work_off()
        self.flush()

    def get_slowly(self, path: str) -> Reply:
        """
        Send a request, and run the next disk call without delivering its result yet.
        """
        self.hands.idle = False
        reply = self.daemon.send("GET", path)
        self.flush()
        self.hands.do()
        return reply

    def test_a_manifests_permission_does_not_come_back(self) -> None:
        self.start_slow("reading")
        reply = self.get_slowly(self.manifest)
        self.purge()
        self.work_off()
        self.assertWhole(reply, self.image.manifest, "HIT")
        self.assertWhole(self.get(self.manifest), self.image.manifest, "REVALIDATED")

    def test_a_blobs_permission_does_not_come_back(self) -> None:
        self.start_slow("reading")
        reply = self.get_slowly(self.config)
        self.purge()
        self.work_off()
        self.assertEqual("HIT", reply.cache)
        self.assertEqual("REVALIDATED", self.get(self.config).cache)

    def test_a_blob_does_not_come_back(self) -> None:
        self.start_slow("reading")
        self.get_slowly(self.config)
        self.purge(self.image.config)
        self.work_off()
        self.assertEqual("MISS", self.get(self.config).cache)

    def test_a_manifest_does_not_come_back(self) -> None:
        """
        Of a tag: it is read after its entry.
        """
        self.start_slow("reading")
        reply = self.get_slowly(self.tag)
        self.hands.tell()
        self.flush()
        self.hands.do()
        self.purge(self.image.digest)
        self.work_off()
        self.assertWhole(reply, self.image.manifest, "MISS")

    def test_who_asks_after_the_purge_waits_for_no_look_of_before(self) -> None:
        self.start_slow("reading")
        self.get_slowly(self.manifest)
        self.purge()
        later = self.daemon.send("GET", self.manifest)
        self.flush()
        self.work_off()
        self.assertWhole(later, self.image.manifest, "REVALIDATED")

    def test_what_was_being_written_does_not_come_back(self) -> None:
        """
        ECR confirmed it, and it was purged as soon as it was written.
        """
        path = f"/v2/team/other/blobs/{self.image.config}"
        self.standin.push_blob("team/other", self.standin.repositories["team/app"].blobs[self.image.config])
        self.start_slow("writing")
        self.get_slowly(path)
        self.purge()
        self.work_off()
        self.assertEqual("REVALIDATED", self.get(path).cache)

    def test_what_a_tag_led_to_does_not_come_back(self) -> None:
        """
        It has moved, and ECR's answer for a client of other types is saved beside what was read of it.
        """
        types = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
        moved = self.standin.push_image("team/app", "latest", layers=[b"another"])
        self.start_slow("reading", tag_ttl=TTL)
        self.hands.idle = False
        reply = self.daemon.send("GET", self.tag, Accept=types)
        self.flush()
        while not reply.ended:
            self.hands.work()
            self.flush()
        self.hands.do()
        self.purge()
        self.work_off()
        self.assertWhole(self.get(self.tag), moved.manifest, "MISS")

    def assert_not_noted(self, kind: str, path: str, *, done: int = 0) -> None:
        """
        Send a request, and purge before a thread writes ECR's answer.

        @param done: how many calls are done before.
        """
        self.start_slow(kind)
        self.hands.idle = False
        reply = self.daemon.send("GET", path)
        self.flush()
        self.hands.work(done)
        self.flush()
        self.assertTrue(self.hands.waiting)
        self.purge()
        self.work_off()
        self.assertEqual(200, reply.code)
        self.assertEqual({}, self.entries())

    def test_what_ecr_confirmed_of_a_blob_is_not_written_after_it(self) -> None:
        self.standin.push_blob("team/other", self.standin.repositories["team/app"].blobs[self.image.config])
        self.assert_not_noted("writing", f"/v2/team/other/blobs/{self.image.config}")

    def test_what_ecr_gave_of_a_blob_is_not_written_after_it(self) -> None:
        self.assert_not_noted(
            "writing", f"/v2/team/other/blobs/{self.standin.push_blob('team/other', noise('cold', 300_000))}", done=1
        )

    def test_what_a_tag_leads_to_is_not_written_after_it(self) -> None:
        self.standin.push_image("team/other", "latest")
        self.assert_not_noted("writing", "/v2/team/other/manifests/latest")

    def test_what_a_new_manifest_tells_is_not_written_after_it(self) -> None:
        self.standin.push_image("team/other", "latest", layers=[b"another"])
        self.assert_not_noted("committing", "/v2/team/other/manifests/latest")

    def test_what_a_confirmed_manifest_tells_is_not_written_after_it(self) -> None:
        """
        That the repository has it was written before the purge.
        """
        self.standin.push_image("team/other", "latest")
        self.assert_not_noted("writing", f"/v2/team/other/manifests/{self.image.digest}", done=1)

    def test_what_waits_to_be_written_vouches_for_nothing_after_it(self) -> None:
        """
        Whoever purges has not seen what was in the memory of one process alone.
        """
        layer = self.image.layers[0]
        self.get(f"/v2/team/app/blobs/{layer}")
        data = self.standin.repositories["team/app"].blobs[layer]
        self.standin.push_image("team/other", "latest", layers=[data, b"another"])
        self.start_slow("committing")
        self.hands.idle = False
        self.assertEqual("MISS", self.get("/v2/team/other/manifests/latest").cache)
        self.assertEqual("HIT", self.get(f"/v2/team/other/blobs/{layer}").cache)
        self.purge()
        self.standin.deny()
        for _ in range(2):
            self.assertRefused(self.get(f"/v2/team/other/blobs/{layer}"), 403, "DENIED")
            self.work_off()

    def test_a_tag_that_waits_to_be_written_is_asked_for_after_it(self) -> None:
        self.standin.push_image("team/other", "latest")
        self.start_slow("writing", tag_ttl=TTL)
        self.hands.idle = False
        self.assertEqual(200, self.get("/v2/team/other/manifests/latest").code)
        self.assertEqual("HIT", self.get("/v2/team/other/manifests/latest").cache)
        self.purge()
        self.standin.deny()
        for _ in range(2):
            self.assertRefused(self.get("/v2/team/other/manifests/latest"), 403, "DENIED")
            self.work_off()

    def test_what_is_read_of_a_large_manifest_vouches_for_nothing_after_it(self) -> None:
        """
        ECR confirmed it, and it is read in a thread until the purge has been heard of, then waits to be written.
        """
        layer = self.image.layers[0]
        self.get(f"/v2/team/app/blobs/{layer}")
        described = {"mediaType": OCI_LAYER, "digest": layer, "size": 1}
        manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [described], "text": "x" * SMALL_BLOB}
        for repository in ("team/app", "team/other"):
            self.standin.push_blob(repository, self.standin.repositories["team/app"].blobs[layer])
            digest = self.standin.push_manifest(repository, manifest, OCI_MANIFEST, "large")
        self.get(f"/v2/team/app/manifests/{digest}")
        self.start_slow("digesting", "writing")
        self.hands.idle = False
        reply = self.daemon.send("GET", f"/v2/team/other/manifests/{digest}")
        self.flush()
        while not reply.ended:
            self.hands.work()
            self.flush()
        self.hands.work()
        self.flush()
        self.purge()
        self.hands.work()
        self.flush()
        self.standin.deny()
        self.assertRefused(self.get(f"/v2/team/other/blobs/{layer}"), 403, "DENIED")


class TransferTests(DaemonTestCase):
    """
    A transfer during a purge goes on for its clients. Later requests are confirmed again.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("blob", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.standin.hold(self.digest)

    def purge(self) -> None:
        """
        Purge everything known of repositories, and let the daemon notice.
        """
        Inventory(self.daemon.store).remove(list(self.entries()), [])
        self.pass_time(1)

    def release(self) -> None:
        self.standin.release(self.digest)
        self.flush()

    def test_who_comes_after_it_follows_once_ecr_has_said_so_again(self) -> None:
        first = self.get(self.path)
        self.arrive(self.digest, 100_000)
        self.purge()
        later = [self.daemon.send("GET", self.path) for _ in range(3)]
        self.flush()
        self.release()
        for reply, word in ((first, "MISS"), *((each, "JOINED") for each in later)):
            self.assertWhole(reply, self.data, word)
        self.assertEqual(1, self.standin.count("registry", "HEAD"))
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def test_who_lacks_it_by_now_does_not_follow(self) -> None:
        """
        Nor does ECR's earlier answer come back with the request.
        """
        first = self.get(self.path)
        self.arrive(self.digest, 100_000)
        self.purge()
        del self.standin.repositories["team/app"].blobs[self.digest]
        self.assertRefused(self.get(self.path), 404, "BLOB_UNKNOWN")
        self.release()
        self.assertWhole(first, self.data, "MISS")
        self.assertEqual({}, self.entries())
        self.assertRefused(self.get(self.path), 404, "BLOB_UNKNOWN")

    def test_what_ecr_was_asked_before_it_is_not_noted_after_it(self) -> None:
        """
        Requests after a purge, of whatever, do not wait for that answer, either.
        """
        self.release()
        self.get(self.path)
        self.purge()
        self.standin.quirks.latency = 3
        first = self.daemon.send("GET", self.path)
        self.flush()
        self.daemon.store.index.purge([], [Digest.of(b"other")])
        self.pass_time(1)
        later = self.daemon.send("GET", self.path)
        self.pass_time(6)
        self.assertWhole(first, self.data, "REVALIDATED")
        self.assertWhole(later, self.data, "REVALIDATED")
        self.assertEqual(2, self.standin.count("registry", "HEAD"))

    def test_what_ecr_gave_before_it_is_not_noted_where_the_bucket_answers_after_it(self) -> None:
        self.release()
        self.standin.quirks.latency = 4
        first = self.daemon.send("GET", self.path)
        self.pass_time(5)
        self.assertEqual(1, self.standin.count("bucket"))
        self.daemon.store.index.purge([], [Digest.of(b"other")])
        self.pass_time(1)
        self.standin.deny("ecr:GetDownloadUrlForLayer")
        self.pass_time(5)
        self.assertWhole(first, self.data, "MISS")
        self.assertEqual({}, self.entries())
        self.standin.quirks.latency = 0
        self.assertRefused(self.get(self.path), 403, "DENIED")


class ManifestTests(DaemonTestCase):
    """
    A manifest that ECR is asked for during a purge.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.standin.quirks.latency = 3

    def assert_asked_anew(self, path: str) -> None:
        """
        Send a request, and purge: the next request asks ECR again, and the earlier answer is not saved.
        """
        first = self.daemon.send("GET", path)
        self.pass_time(1)
        self.daemon.store.index.purge([], [Digest.of(b"other")])
        self.pass_time(1)
        later = self.daemon.send("GET", path)
        self.pass_time(2)
        self.standin.deny()
        self.assertWhole(first, self.image.manifest)
        self.assertEqual({}, self.entries())
        self.pass_time(3)
        self.assertRefused(later, 403, "DENIED")

    def test_by_digest(self) -> None:
        self.assert_asked_anew(f"/v2/team/app/manifests/{self.image.digest}")

    def test_by_tag(self) -> None:
        self.assert_asked_anew("/v2/team/app/manifests/latest")
