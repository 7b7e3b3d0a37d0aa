"""
What comes from the cache, what through it, and which clients may have it.
"""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent

from ecrproxy.answers import Asked
from ecrproxy.cache import allocation
from ecrproxy.cache.entries import Entry
from ecrproxy.cache.store import Store
from ecrproxy.cached.permissions import FACTS
from ecrproxy.logs.repeats import kind_of
from ecrproxy.manifest_requests import NAMED_SECONDS
from ecrproxy.oci import MANIFEST_LIMIT, Descriptor, Digest, parse_route
from ecrproxy.registry.blob_range import BEGUN, BEGUN_SECONDS
from ecrproxy.registry.ecr import Token
from tests.daemon import MIB, DaemonTestCase, Hands, Reply, at_once, noise
from tests.registry import StandIn, digest_of, layer
from tests.registry_content import OCI_INDEX, OCI_MANIFEST, SCHEMA2, SCHEMA2_LIST
from tests.registry_replies import registry_error
from tests.store_contract import being_read

EVERY_TYPE = f"{OCI_MANIFEST}, {SCHEMA2}, application/vnd.oci.image.index.v1+json, {SCHEMA2_LIST}"
REPOSITORIES = ("team/app", "team/other", "third")


class BlobTestCase(DaemonTestCase):
    """
    A blob of some pieces in a repository.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("blob", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def also_in(self, repository: str) -> str:
        """
        Push the same blob into another repository, and return its path there.
        """
        self.standin.push_blob(repository, self.data)
        return f"/v2/{repository}/blobs/{self.digest}"

    def transfers(self) -> int:
        """
        Return how many transfers of the blob were begun.
        """
        spans = [
            asked.headers.get("range", "bytes=0-") for asked in self.standin.requests("bucket", "GET", self.digest)
        ]
        return sum(span.startswith("bytes=0-") and span != "bytes=0-0" for span in spans)


class BlobTests(BlobTestCase):
    def test_is_fetched_once_for_one_repository(self) -> None:
        """
        The second pull of a blob sends ECR no request, not even to check that it still has it.
        """
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.standin.forget_asked()
        self.assertWhole(self.get(self.path), self.data, "HIT")
        self.assertEqual([], self.standin.asked)

    def test_survives_a_restart(self) -> None:
        """
        What was pulled before a restart is served after it with ECR unreachable.
        """
        self.get(self.path)
        self.standin.refuse("registry")
        self.standin.refuse("bucket")
        self.start()
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def test_has_either_algorithm(self) -> None:
        """
        A blob with a sha512 digest is verified and cached like any other.
        """
        digest = self.standin.push_blob("team/app", self.data, "sha512")
        path = f"/v2/team/app/blobs/{digest}"
        self.assertWhole(self.get(path), self.data, "MISS")
        self.assertWhole(self.get(path), self.data, "HIT")
        self.assertEqual(1, self.standin.count("bucket", "GET", digest))

    def test_of_no_bytes(self) -> None:
        """
        The empty blob is fetched, cached and served.
        """
        digest = self.standin.push_blob("team/app", b"")
        path = f"/v2/team/app/blobs/{digest}"
        self.assertWhole(self.get(path), b"", "MISS")
        self.assertWhole(self.get(path), b"", "HIT")

    def test_unknown(self) -> None:
        """
        A blob that the repository doesn't have is BLOB_UNKNOWN, and the next request asks again.
        """
        missing = digest_of(b"missing")
        path = f"/v2/team/app/blobs/{missing}"
        self.assertRefused(self.get(path), 404, "BLOB_UNKNOWN", "blob unknown to registry")
        self.assertEqual(b"", self.head(path).body)
        self.standin.push_blob("team/app", b"missing")
        self.assertWhole(self.get(path), b"missing", "MISS")

    def test_of_an_unknown_repository(self) -> None:
        """
        A repository that ECR doesn't have is NAME_UNKNOWN, in ECR's own words.
        """
        reply = self.get(f"/v2/nobody/blobs/{self.digest}")
        self.assertRefused(reply, 404, "NAME_UNKNOWN", "The repository with name 'nobody' does not exist")

    def test_evicted_is_fetched_again(self) -> None:
        """
        A blob whose file is gone is fetched again, without a request about the repository.
        """
        self.get(self.path)
        self.file_of(self.digest).unlink()
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.assertEqual(2, self.transfers())

    def test_cut_behind_our_back_is_fetched_again(self) -> None:
        """
        A cached file that was truncated by another program is not served, but fetched again.
        """
        self.get(self.path)
        os.truncate(self.file_of(self.digest), 1000)
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.assertWhole(self.get(self.path), self.data, "HIT")


class HeadTests(BlobTestCase):
    def test_never_downloads(self) -> None:
        """
        HEAD of a cold blob costs a request, no transfer, and leaves nothing in the cache.
        """
        reply = self.head(self.path)
        self.assertEqual((200, "MISS", len(self.data), b""), (reply.code, reply.cache, reply.length, reply.body))
        self.assertEqual(0, self.standin.bytes_sent)
        self.assertFalse(self.has(self.digest))

    def test_where_ecr_redirects_head(self) -> None:
        """
        If ECR answers HEAD with a redirect, one byte of the bucket gives the size.
        """
        self.standin.quirks.blob_head = 307
        reply = self.head(self.path)
        self.assertEqual((200, len(self.data)), (reply.code, reply.length))
        self.assertEqual(1, self.standin.bytes_sent)

    def test_of_a_cached_blob(self) -> None:
        """
        HEAD of a cached blob sends no request.
        """
        self.get(self.path)
        self.standin.forget_asked()
        reply = self.head(self.path)
        self.assertEqual((200, "HIT", len(self.data)), (reply.code, reply.cache, reply.length))
        self.assertEqual([], self.standin.asked)

    def test_in_another_repository(self) -> None:
        """
        For HEAD of a blob that another repository fetched, ECR has to confirm it, once.
        """
        other = self.also_in("team/other")
        self.get(self.path)
        self.assertEqual("REVALIDATED", self.head(other).cache)
        self.assertEqual("HIT", self.head(other).cache)
        self.assertEqual(1, self.standin.count("registry", "HEAD"))

    def test_of_what_is_here_has_the_size_of_its_get(self) -> None:
        """
        Whatever size a bucket reports for a blob that another repository fetched.
        """
        other = self.also_in("team/other")
        self.get(self.path)
        self.standin.quirks.blob_head = 307
        self.standin.corrupt(self.digest, self.data + b"more")
        reply = self.head(other)
        self.assertEqual((200, "REVALIDATED", len(self.data)), (reply.code, reply.cache, reply.length))

    def test_lets_a_later_get_follow_without_asking(self) -> None:
        """
        After HEAD, GET knows that the repository has the blob: another's content is served at once.
        """
        other = self.also_in("team/other")
        self.head(other)
        self.get(self.path)
        self.standin.forget_asked()
        self.assertWhole(self.get(other), self.data, "HIT")
        self.assertEqual([], self.standin.asked)

    def test_of_a_blob_that_is_not_there(self) -> None:
        """
        HEAD of a blob that the repository doesn't have is 404, whichever other repository has it.
        """
        self.get(self.path)
        self.standin.push_blob("team/other", b"something else")
        self.assertEqual(404, self.head(f"/v2/team/other/blobs/{self.digest}").code)


class TogetherTests(BlobTestCase):
    """
    Several clients at once.
    """

    def setUp(self) -> None:
        super().setUp()
        self.standin.hold(self.digest)

    def many(self, count: int) -> list[Reply]:
        """
        Let so many clients send a request, and all of them wait.
        """
        replies = [self.daemon.send("GET", self.path) for _ in range(count)]
        self.flush()
        return replies

    def deliver(self, count: int) -> None:
        self.arrive(self.digest, count)

    def release(self) -> None:
        self.standin.release(self.digest)
        self.flush()

    def test_one_transfer_for_all(self) -> None:
        """
        Twenty clients that request a cold blob at once cost one transfer, and all stream from its first byte on.
        """
        replies = self.many(20)
        self.deliver(100_000)
        self.assertEqual({100_000}, {len(reply.body) for reply in replies})
        self.assertEqual({""}, {reply.ended for reply in replies})
        self.release()
        for reply in replies:
            self.assertWhole(reply, self.data)
        self.assertEqual(["JOINED"] * 19 + ["MISS"], sorted(str(reply.cache) for reply in replies))
        self.assertEqual(1, self.standin.count("bucket"))
        self.assertEqual(1, self.standin.count("registry"))

    def test_who_comes_late_gets_all(self) -> None:
        """
        A client that joins in the middle of a transfer gets what has arrived at once, from byte 0 on.
        """
        (first,) = self.many(1)
        self.deliver(200_000)
        (late,) = self.many(1)
        self.assertEqual(200_000, len(late.body))
        self.release()
        self.assertWhole(late, self.data, "JOINED")
        self.assertWhole(first, self.data, "MISS")
        self.assertEqual(1, self.transfers())

    def test_who_leaves_cancels_nobody(self) -> None:
        """
        A client that disconnects, the first one too, cancels no transfer.
        """
        first, second, third = self.many(3)
        self.deliver(100_000)
        first.leave()
        self.flush()
        self.deliver(100_000)
        third.leave()
        self.release()
        self.assertWhole(second, self.data, "JOINED")
        self.assertLess(len(first.body), len(self.data))
        self.assertEqual(1, self.transfers())

    def test_who_leaves_before_ecr_answers_cancels_nobody(self) -> None:
        """
        The first client may disconnect before the first byte; those that joined it are served.
        """
        self.standin.quirks.latency = 1
        first, second = self.many(2)
        first.leave()
        self.flush()
        self.release()
        self.pass_time(3)
        self.assertWhole(second, self.data)
        self.assertEqual(1, self.transfers())

    def test_goes_on_when_all_have_left(self) -> None:
        """
        A transfer to the cache goes on for later clients.
        """
        for reply in self.many(2):
            reply.leave()
        self.flush()
        self.release()
        self.assertWhole(self.get(self.path), self.data, "HIT")
        self.assertEqual(1, self.transfers())

    def test_a_slow_reader_slows_nobody(self) -> None:
        """
        A client that stops reading gets the rest when it reads on; meanwhile the others and the cache are done.
        """
        slow, quick = self.many(2)
        slow.stop_reading()
        self.release()
        self.assertWhole(quick, self.data)
        self.assertEqual("", slow.ended)
        self.assertTrue(self.has(self.digest))
        slow.read_on()
        self.flush()
        self.assertWhole(slow, self.data)

    def test_a_clock_that_is_set_disturbs_no_transfer(self) -> None:
        """
        A clock set by years, either way, ends no transfer and evicts nothing.
        """
        self.standin.hold(self.digest)
        client = self.daemon.send("GET", self.path)
        self.flush()
        for jump in (10 * 365 * 86400, -10 * 365 * 86400):
            self.daemon.set_by = jump
            self.standin.deliver(self.digest, 1000)
            self.pass_time(1)
            self.assertEqual("", client.ended)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(client, self.data, "MISS")
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def test_errors_are_shared(self) -> None:
        """
        All clients that wait for the same blob of a repository get ECR's one answer.
        """
        self.standin.quirks.latency = 1
        path = f"/v2/team/app/blobs/{digest_of(b'missing')}"
        replies = [self.daemon.send("GET", path) for _ in range(5)]
        self.pass_time(3)
        for reply in replies:
            self.assertRefused(reply, 404, "BLOB_UNKNOWN")
        self.assertEqual(1, self.standin.count("registry"))

    def test_what_breaks_off_is_gone_on_with(self) -> None:
        """
        When the bucket breaks off, the rest is requested from the last good byte on; no client notices.
        """
        replies = self.many(3)
        self.deliver(100_000)
        self.standin.cut(self.digest)
        self.flush()
        self.assertEqual({(100_000, "")}, {(len(reply.body), reply.ended) for reply in replies})
        self.release()
        for reply in replies:
            self.assertWhole(reply, self.data)
        spans = [asked.headers["range"] for asked in self.standin.requests("bucket")]
        self.assertEqual(["bytes=0-4194303", "bytes=100000-299999"], spans)
        self.assertEqual(1, self.standin.count("registry"))

    def test_what_goes_on_breaking_off_breaks_for_all_and_not_for_the_next(self) -> None:
        """
        If the bucket sends nothing more, no client takes its part for the whole; the next request succeeds.
        """
        replies = self.many(3)
        self.deliver(100_000)
        for _ in range(4):
            self.assertEqual({""}, {reply.ended for reply in replies})
            self.standin.cut(self.digest)
            self.flush()
        for reply in replies:
            self.assertBroken(reply, self.data)
        self.assertFalse(self.has(self.digest))
        self.standin.release(self.digest)
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_stall_is_gone_on_with(self) -> None:
        """
        After 30 seconds without a byte the rest is requested again.
        """
        (reply,) = self.many(1)
        self.deliver(100_000)
        self.pass_time(29)
        self.assertEqual(1, self.standin.count("bucket"))
        self.pass_time(2)
        self.assertEqual("bytes=100000-299999", self.standin.requests("bucket")[-1].headers["range"])
        self.release()
        self.assertWhole(reply, self.data, "MISS")

    def test_stalls_end_the_answers(self) -> None:
        """
        After four times 30 seconds without a byte the clients are cut off, and the next request starts again.
        """
        replies = self.many(2)
        self.deliver(100_000)
        self.pass_time(119)
        self.assertEqual({""}, {reply.ended for reply in replies})
        self.pass_time(2)
        for reply in replies:
            self.assertBroken(reply, self.data)
        self.assertEqual(0, self.promised())
        self.standin.release(self.digest)
        self.assertWhole(self.get(self.path), self.data, "MISS")


class PermissionTests(BlobTestCase):
    """
    Content is shared, permission is not.
    """

    def test_another_repository_is_confirmed_first(self) -> None:
        """
        A repository gets what another fetched once ECR has confirmed that it has it too; that is asked only once.
        """
        other = self.also_in("team/other")
        self.get(self.path)
        self.standin.forget_asked()
        self.assertWhole(self.get(other), self.data, "REVALIDATED")
        self.assertEqual([("registry", "HEAD")], [(asked.service, asked.method) for asked in self.standin.asked])
        self.assertWhole(self.get(other), self.data, "HIT")
        self.assertEqual(1, len(self.standin.asked))

    def test_a_repository_without_the_blob_is_told_nothing(self) -> None:
        """
        Cached content is not available to repositories that don't have it.
        """
        self.get(self.path)
        self.standin.push_blob("team/other", b"something else")
        reply = self.get(f"/v2/team/other/blobs/{self.digest}")
        self.assertRefused(reply, 404, "BLOB_UNKNOWN")

    def test_unconfirmed_content_is_withheld(self) -> None:
        """
        While ECR can't be asked, a repository does not get what only another was confirmed to have.
        """
        other = self.also_in("team/other")
        self.get(self.path)
        self.standin.refuse("registry")
        self.assertRefused(self.get(other), 502, "UNAVAILABLE")

    def test_a_transfer_is_followed_after_a_confirmation(self) -> None:
        """
        Another repository follows a transfer in flight once ECR confirmed that it has the blob.
        """
        other = self.also_in("team/other")
        self.standin.hold(self.digest)
        first = self.get(self.path)
        second = self.get(other)
        self.arrive(self.digest, 100_000)
        self.assertEqual(100_000, len(second.body))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(first, self.data, "MISS")
        self.assertWhole(second, self.data, "JOINED")
        self.assertEqual((1, 1), (self.transfers(), self.standin.count("registry", "HEAD", "team/other")))

    def test_a_transfer_is_not_followed_by_who_lacks_the_blob(self) -> None:
        """
        A transfer in flight gives nothing to a repository that doesn't have the blob.
        """
        self.standin.push_blob("team/other", b"something else")
        self.standin.hold(self.digest)
        self.get(self.path)
        self.assertRefused(self.get(f"/v2/team/other/blobs/{self.digest}"), 404, "BLOB_UNKNOWN")

    def test_what_ecr_says_to_one_repository_is_not_the_others_answer(self) -> None:
        """
        The first repository gets 404; another one, which has the blob, gets it.
        """
        self.standin.push_blob("third", b"something else")
        self.standin.quirks.latency = 1
        without = self.daemon.send("GET", f"/v2/third/blobs/{self.digest}")
        self.flush()
        with_it = self.daemon.send("GET", self.path)
        self.pass_time(6)
        self.assertRefused(without, 404, "BLOB_UNKNOWN")
        self.assertWhole(with_it, self.data)

    def test_a_known_holder_outlives_the_failure_of_another(self) -> None:
        """
        A repository known to have the blob, waiting with one that is rejected, fetches it itself.
        """
        self.standin.push_blob("third", b"something else")
        self.head(self.path)
        self.standin.quirks.latency = 1
        without = self.daemon.send("GET", f"/v2/third/blobs/{self.digest}")
        self.flush()
        with_it = self.daemon.send("GET", self.path)
        self.pass_time(6)
        self.assertRefused(without, 404, "BLOB_UNKNOWN")
        self.assertWhole(with_it, self.data, "MISS")

    def test_a_cached_manifest_vouches_for_what_it_lists(self) -> None:
        """
        Layers in a cached manifest of this repository are served from another's content without a request.
        """
        layers = [layer("hello", b"shared"), layer("more", b"too")]
        here = self.standin.push_image("team/app", "latest", layers=layers)
        there = self.standin.push_image("team/other", "latest", layers=layers)
        for digest in here.layers:
            self.get(f"/v2/team/app/blobs/{digest}")
        self.get("/v2/team/other/manifests/latest")
        self.standin.forget_asked()
        for digest, data in zip(there.layers, layers, strict=True):
            self.assertWhole(self.get(f"/v2/team/other/blobs/{digest}"), data, "HIT")
        self.assertEqual([], self.standin.asked)

    def test_a_manifest_that_another_brought_vouches_too(self) -> None:
        """
        If ECR says that a tag leads to a manifest that another repository fetched, what it lists is available.
        """
        shared = self.standin.push_image("team/app", "latest")
        for path in (f"manifests/{shared.digest}", *(f"blobs/{digest}" for digest in shared.layers)):
            self.get(f"/v2/team/app/{path}")
        self.standin.push_image("team/other", "latest", layers=[layer("x", b"other")])
        self.get("/v2/team/other/manifests/latest")
        self.standin.push_image("team/other", "latest")
        self.assertWhole(self.get("/v2/team/other/manifests/latest"), shared.manifest, "REVALIDATED")
        self.standin.forget_asked()
        for digest in shared.layers:
            self.assertEqual("HIT", self.get(f"/v2/team/other/blobs/{digest}").cache)
        self.assertEqual([], self.standin.asked)

    def test_a_manifest_does_not_vouch_for_foreign_layers(self) -> None:
        """
        Layers that a registry need not have, foreign ones and those with URLs, still need a request.
        """
        foreign, linked = noise("foreign", 100), noise("linked", 100)
        for data in (foreign, linked):
            self.standin.push_blob("team/app", data)
        kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        manifest = {
            "schemaVersion": 2,
            "mediaType": SCHEMA2,
            "layers": [
                {"mediaType": kind, "digest": digest_of(foreign), "size": 100},
                {"mediaType": "x", "digest": digest_of(linked), "size": 100, "urls": ["https://example.com/x"]},
            ],
        }
        self.standin.push_manifest("team/other", manifest, SCHEMA2, "latest")
        self.get("/v2/team/other/manifests/latest")
        for data in (foreign, linked):
            self.get(f"/v2/team/app/blobs/{digest_of(data)}")
            self.assertRefused(self.get(f"/v2/team/other/blobs/{digest_of(data)}"), 404, "BLOB_UNKNOWN")

    def test_a_manifest_is_confirmed_for_another_repository(self) -> None:
        """
        A manifest that another repository fetched is served by its digest after ECR confirmed it, once.
        """
        image = self.standin.push_image("team/app", "latest")
        self.standin.push_image("team/other", "latest")
        self.standin.push_blob("third", b"something else")
        self.get("/v2/team/app/manifests/latest")
        self.standin.forget_asked()
        path = f"/v2/team/other/manifests/{image.digest}"
        self.assertWhole(self.get(path), image.manifest, "REVALIDATED")
        self.assertWhole(self.get(path), image.manifest, "HIT")
        self.assertEqual(["HEAD"], [asked.method for asked in self.standin.asked])
        self.assertRefused(self.get(f"/v2/third/manifests/{image.digest}"), 404, "MANIFEST_UNKNOWN")

    def test_a_manifest_vouches_for_the_fields_of_its_media_type_alone(self) -> None:
        """
        ECR checks no other field of a pushed manifest: what is listed there may be another repository's.
        """
        self.get(self.path)
        victim = {"mediaType": "application/octet-stream", "digest": self.digest, "size": len(self.data)}
        for number, (media_type, fields) in enumerate(
            (
                (OCI_MANIFEST, ("blobs", "manifests")),
                (SCHEMA2, ("blobs", "manifests")),
                (OCI_INDEX, ("layers", "blobs")),
                (SCHEMA2_LIST, ("layers", "blobs")),
            )
        ):
            manifest: dict[str, Any] = {each: [victim] for each in fields}
            if media_type in (OCI_INDEX, SCHEMA2_LIST):
                manifest["config"] = victim
            self.standin.push_manifest("evil", manifest | {"mediaType": media_type}, media_type, f"tag{number}")
            self.assertEqual(200, self.get(f"/v2/evil/manifests/tag{number}").code)
            self.assertRefused(self.get(f"/v2/evil/blobs/{self.digest}"), 404, "BLOB_UNKNOWN")

    def test_a_manifest_that_readers_may_read_differently_vouches_for_nothing(self) -> None:
        """
        It is still passed on: ECR accepted it, by whichever of its members.
        """
        self.get(self.path)
        victim = json.dumps({"mediaType": "application/octet-stream", "digest": self.digest, "size": len(self.data)})
        for number, name in enumerate(("layers", "Layers")):
            text = f'{{"mediaType": "{OCI_MANIFEST}", "{name}": [], "layers": [{victim}]}}'
            self.standin.push_manifest("evil", text.encode(), OCI_MANIFEST, f"tag{number}")
            self.assertWhole(self.get(f"/v2/evil/manifests/tag{number}"), text.encode())
            self.assertRefused(self.get(f"/v2/evil/blobs/{self.digest}"), 404, "BLOB_UNKNOWN")

    def test_a_manifest_does_not_vouch_for_what_may_live_elsewhere(self) -> None:
        """
        Nor if it says so in another case than usual: ECR may have accepted it without having that layer.
        """
        self.get(self.path)
        foreign = "application/vnd.docker.image.rootfs.Foreign.diff.tar.gzip"
        elsewhere: tuple[dict[str, object], ...] = ({"urls": ["a:b"]}, {"URLs": ["a:b"]}, {"mediaType": foreign})
        for number, more in enumerate(elsewhere):
            victim = {"mediaType": "application/octet-stream", "digest": self.digest, "size": len(self.data), **more}
            text = json.dumps({"mediaType": OCI_MANIFEST, "layers": [victim]})
            self.standin.push_manifest("evil", text.encode(), OCI_MANIFEST, f"tag{number}")
            self.assertWhole(self.get(f"/v2/evil/manifests/tag{number}"), text.encode())
            self.assertRefused(self.get(f"/v2/evil/blobs/{self.digest}"), 404, "BLOB_UNKNOWN")

    def test_what_a_manifest_vouches_for_is_written_once(self) -> None:
        """
        However many tags lead to it, and whatever else their clients accept.
        """
        image = self.standin.push_image("team/other", "latest", media_type=OCI_MANIFEST)
        self.get("/v2/team/other/manifests/latest")
        before = self.entries()
        self.clock.advance(0.1)
        for number in range(3):
            self.standin.push_manifest("team/other", image.manifest, OCI_MANIFEST, f"tag{number}")
            for other in (SCHEMA2, OCI_INDEX, SCHEMA2_LIST):
                self.head(f"/v2/team/other/manifests/tag{number}", Accept=f"{OCI_MANIFEST}, {other}")
            self.get(f"/v2/team/other/manifests/tag{number}")
        after = self.entries()
        self.assertEqual(len(before) + 3, len(after))
        self.assertEqual(before, {key: after[key] for key in before})

    def test_an_index_vouches_for_no_media_type(self) -> None:
        """
        What an index says is not passed on if it is no manifest's type, or not the manifest's own.
        """
        image = self.standin.push_image("team/app", "latest", media_type=OCI_MANIFEST)
        self.standin.push_image("team/other", "latest", media_type=OCI_MANIFEST)
        for number, media_type in enumerate(("text/html", "application/json", SCHEMA2)):
            item = {"mediaType": media_type, "digest": image.digest, "size": len(image.manifest)}
            index = {"mediaType": OCI_INDEX, "manifests": [item], "annotations": {"number": str(number)}}
            self.standin.push_manifest("team/app", index, OCI_INDEX, "index")
            self.start()
            if media_type == SCHEMA2:  # so that it is in memory
                self.get(f"/v2/team/other/manifests/{image.digest}")
            self.get("/v2/team/app/manifests/index")
            for _ in range(2):
                reply = self.get(f"/v2/team/app/manifests/{image.digest}")
                self.assertEqual((200, OCI_MANIFEST), (reply.code, reply.header("Content-Type")))
            self.lose_index()

    def test_what_a_stored_entry_calls_a_manifest_is_not_passed_on(self) -> None:
        """
        Only a manifest's media type is, whatever wrote the row.
        """
        image = self.standin.push_image("team/app", "latest", media_type=OCI_MANIFEST)
        path = f"/v2/team/app/manifests/{image.digest}"
        self.get("/v2/team/app/manifests/latest")
        self.get(path)
        for media_type in ("text/html", "", OCI_INDEX):
            for key, entry in self.entries().items():
                answers = {
                    accept: replace(known, descriptor=replace(known.descriptor, media_type=media_type))
                    for accept, known in entry.answers.items()
                }
                self.index.save([(key, Entry(answers))])
            self.start()
            self.standin.refuse("registry")
            self.assertRefused(self.get("/v2/team/app/manifests/latest"), 502, "UNAVAILABLE")
            self.standin.heal()
            reply = self.get(path)
            self.assertEqual("REVALIDATED", reply.cache)
            self.assertEqual(OCI_MANIFEST, reply.header("Content-Type"))


class WrongKindTests(BlobTestCase):
    """
    One digest may be requested as a blob and as a manifest.
    """

    def test_a_layer_is_not_read_for_who_asks_for_a_manifest(self) -> None:
        """
        Neither before ECR has confirmed it for the repository, nor if it is too large for a manifest.
        """
        large = noise("large", 5 * MIB)
        digest = self.standin.push_blob("team/app", large)
        self.get(f"/v2/team/app/blobs/{digest}")
        self.get(self.path)
        read: list[int] = []
        pread = os.pread

        def spy(fd: int, count: int, offset: int) -> bytes:
            read.append(count)
            return pread(fd, count, offset)

        self.patch(os, "pread", spy)
        for repository in ("team/app", "no/such/repo"):
            for name in (digest, self.digest):
                reply = self.get(f"/v2/{repository}/manifests/{name}")
                self.assertEqual(404, reply.code)
        self.assertEqual([], read)
        self.assertTrue(self.has(digest))

    def test_a_layer_that_an_index_calls_a_manifest_is_not_read(self) -> None:
        large = noise("large", 5 * MIB)
        digest = self.standin.push_blob("team/app", large)
        self.get(f"/v2/team/app/blobs/{digest}")
        item = {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(large)}
        self.standin.push_manifest("team/app", {"manifests": [item]}, OCI_INDEX, "latest")
        self.get("/v2/team/app/manifests/latest")
        self.assertRefused(self.get(f"/v2/team/app/manifests/{digest}"), 404, "MANIFEST_UNKNOWN")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), large, "HIT")

    def test_a_manifest_is_no_blob(self) -> None:
        image = self.standin.push_image("team/app", "latest")
        self.get("/v2/team/app/manifests/latest")
        self.get(f"/v2/team/app/manifests/{image.digest}")
        self.assertRefused(self.get(f"/v2/team/app/blobs/{image.digest}"), 404, "BLOB_UNKNOWN")

    def test_a_short_read_drops_no_content(self) -> None:
        """
        A read may return fewer bytes than requested, as it does beyond 2 GiB: that says nothing about the file.
        """
        image = self.standin.push_image("team/app", "latest")
        path = f"/v2/team/app/manifests/{image.digest}"
        self.get(path)
        self.start()
        pread = os.pread
        self.patch(os, "pread", lambda fd, count, offset: pread(fd, min(count, 100), offset))
        self.assertWhole(self.get(path), image.manifest, "HIT")
        self.start()
        self.patch(os, "pread", lambda fd, count, offset: pread(fd, 100, offset) if offset < 100 else b"")
        self.get(path)
        self.patch(os, "pread", pread)
        self.assertTrue(self.has(image.digest))


class OtherRegistryTests(DaemonTestCase):
    """
    A cache directory with content of several registries.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.paths = [
            "/v2/team/app/manifests/latest",
            f"/v2/team/app/manifests/{self.image.digest}",
            f"/v2/team/app/blobs/{self.image.config}",
        ]
        for path in self.paths:
            self.get(path)

    def ask(self, registry: str) -> list[tuple[int, str | None]]:
        """
        Send a request to a daemon on the same directory whose registry has nothing, and has this name.
        """
        self.standin = StandIn(self.clock, registry=f"https://{registry}")
        self.standin.push_blob("team/app", b"something else")
        self.start()
        replies = [self.get(path) for path in self.paths[1:]]
        self.standin.refuse("registry")
        return [(reply.code, reply.cache) for reply in (*replies, self.get(self.paths[0]))]

    def test_is_not_answered_for(self) -> None:
        """
        Another account's or region's repository of the same name needs its own requests, for stale tags too.
        """
        for other in ("123456789012.dkr.ecr.eu-west-2.amazonaws.com", "210987654321.dkr.ecr.eu-west-1.amazonaws.com"):
            self.assertEqual([404, 404, 502], [code for code, _ in self.ask(other)])

    def test_by_another_of_its_names_is_the_same(self) -> None:
        found = self.ask("123456789012.dkr-ecr.eu-west-1.on.aws")
        self.assertEqual([(200, "HIT"), (200, "HIT"), (200, "STALE")], found)


class SharedKeyTests(DaemonTestCase):
    """
    A PROXY_CACHE_KEY that different requests share.
    """

    def setUp(self) -> None:
        super().setUp()
        self.start(cache_key="$scheme", tag_ttl=1000)

    def test_blobs_keep_apart(self) -> None:
        """
        Blobs that share a key are each served under their own digest, and to their own repository.
        """
        blobs = [noise(f"blob{n}", 1000) for n in range(3)]
        digests = [self.standin.push_blob("team/app", data) for data in blobs]
        self.standin.push_blob("team/other", b"something else")
        for _ in range(2):
            for digest, data in zip(digests, blobs, strict=True):
                self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), data)
                self.assertRefused(self.get(f"/v2/team/other/blobs/{digest}"), 404, "BLOB_UNKNOWN")

    def test_tags_keep_apart(self) -> None:
        """
        Tags that share a key lead each to the image of their own repository and name.
        """
        images = {
            (repository, tag): self.standin.push_image(
                repository, tag, layers=[layer("x", f"{repository}{tag}".encode())]
            )
            for repository in ("team/app", "team/other")
            for tag in ("v1", "v2")
        }
        for word in ("MISS", "HIT"):
            for (repository, tag), image in images.items():
                self.assertWhole(self.get(f"/v2/{repository}/manifests/{tag}"), image.manifest, word)

    def test_kinds_keep_apart(self) -> None:
        """
        A manifest's digest requested as a blob is requested from ECR as a blob.
        """
        image = self.standin.push_image("team/app", "v1")
        self.get(f"/v2/team/app/manifests/{image.digest}")
        self.assertRefused(self.get(f"/v2/team/app/blobs/{image.digest}"), 404, "BLOB_UNKNOWN")


class KeyTests(DaemonTestCase):
    def test_a_key_with_more_in_it_keeps_more_entries(self) -> None:
        """
        With the client's address in the key, what one client was confirmed to get is confirmed for the other too.
        """
        self.start(cache_key="$uri$http_x_team")
        data = noise("blob", 1000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        self.assertWhole(self.get(path, X_Team="a"), data, "MISS")
        self.assertWhole(self.get(path, X_Team="a"), data, "HIT")
        self.assertWhole(self.get(path, X_Team="b"), data, "REVALIDATED")


class BypassTests(BlobTestCase):
    """
    What can't be cached streams through.
    """

    def bypass(self, cache: str = "BYPASS") -> None:
        """
        Request the blob twice, and assert that it comes whole both times, and is not cached.
        """
        for _ in range(2):
            self.assertWhole(self.get(self.path), self.data, cache)
        self.assertFalse(self.has(self.digest))
        self.assertEqual([], self.arriving())

    def test_a_blob_larger_than_the_limit(self) -> None:
        """
        A blob for which no eviction could make room streams through, and costs the cache nothing.
        """
        self.start(limit=200_000)
        small = self.standin.push_blob("team/app", b"small")
        self.get(f"/v2/team/app/blobs/{small}")
        self.bypass()
        self.assertWhole(self.get(f"/v2/team/app/blobs/{small}"), b"small", "HIT")

    def test_a_blob_that_a_full_disk_had_no_room_for_is_kept_once_there_is(self) -> None:
        """
        Not only after the next count of the directory.
        """
        free = [0]
        status = {"f_blocks": 2**30, "f_frsize": 1, "f_files": 0, "f_favail": 0}
        self.patch(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free[0], **status))
        self.start(limit=2**29)
        self.flush()
        self.bypass()
        self.assertEqual(503, self.get("/readyz").code)
        free[0] = 2**30
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def fill(self) -> list[str]:
        """
        Fill a small cache; return its content.
        """
        self.start(limit=400_000)
        digests = [self.standin.push_blob("team/app", noise(f"small {number}", 30_000)) for number in range(10)]
        for digest in digests:
            self.get(f"/v2/team/app/blobs/{digest}")
        self.standin.hold(self.digest)
        return digests

    def test_a_blob_that_does_not_begin_to_come_evicts_nothing(self) -> None:
        """
        Whether its client waits or disconnects; later requests are still served.
        """
        kept = self.fill()
        self.daemon.send("GET", self.path).leave()
        self.flush()
        self.assertTrue(all(map(self.has, kept)))
        reply = self.daemon.send("GET", self.path)
        self.flush()
        self.standin.deliver(self.digest, BEGUN // 2)
        self.pass_time(int(BEGUN_SECONDS) + 1)
        self.assertTrue(all(map(self.has, kept)))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data, "JOINED")
        self.assertFalse(self.has(self.digest))
        self.assertTrue(all(map(self.has, kept)))

    def test_a_blob_that_comes_evicts_others(self) -> None:
        kept = self.fill()
        reply = self.daemon.send("GET", self.path)
        self.flush()
        self.standin.deliver(self.digest, BEGUN)
        self.flush()
        self.assertFalse(all(map(self.has, kept)))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data, "MISS")
        self.assertTrue(self.has(self.digest))

    def test_a_blob_that_comes_over_a_slow_link_evicts_others(self) -> None:
        """
        A dozen blobs come at the same time over a link of one Mbit/s: some 10 kB/s each.
        """
        self.fill()
        reply = self.daemon.send("GET", self.path)
        self.flush()
        for _ in range(10):
            self.standin.deliver(self.digest, 10_000)
            self.pass_time(1)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data, "MISS")
        self.assertTrue(self.has(self.digest))

    def test_a_full_disk(self) -> None:
        """
        If the disk has no space for a blob it streams through.
        """

        def full(fd: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.patch(allocation, "fallocate", full)
        self.bypass()
        self.assertIn("No space left on device", self.logged())
        self.assertEqual(0, self.promised())

    def test_what_a_disk_does_not_keep_is_one_line_a_minute_whatever_its_names(self) -> None:
        def read_only(_: Store, digest: Digest) -> None:
            raise OSError(errno.EROFS, f"Read-only file system: {digest}")

        self.patch(Store, "claim", read_only)
        with capturedLogs() as events:
            for tag in ("1", "2"):
                image = self.standin.push_image("team/app", tag, layers=[tag.encode()])
                self.assertWhole(self.get(f"/v2/team/app/manifests/{image.digest}"), image.manifest, "MISS")
        kinds = [kind_of(each) for each in events if formatEvent(each).startswith("Not kept: ")]
        self.assertEqual((2, 1), (len(kinds), len(set(kinds))))

    def test_a_disk_that_fails_midway(self) -> None:
        """
        If the disk fails in the middle of a transfer, its clients get all of it, also late and slow ones; and nothing
        is cached.
        """
        write, budget = os.pwrite, [150_000]

        def failing(fd: int, data: Any, offset: int) -> int:
            budget[0] -= len(data)
            if budget[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
            return write(fd, data, offset)

        self.patch(os, "pwrite", failing)
        self.standin.hold(self.digest)
        first, slow = self.get(self.path), self.get(self.path)
        slow.stop_reading()
        self.arrive(self.digest, 100_000)
        self.arrive(self.digest, 100_000)
        late = self.get(self.path)
        self.standin.release(self.digest)
        self.flush()
        slow.read_on()
        self.flush()
        for reply, word in ((first, "MISS"), (slow, "JOINED"), (late, "JOINED")):
            self.assertWhole(reply, self.data, word)
        self.assertEqual(1, self.transfers())
        self.assertFalse(self.has(self.digest))
        self.assertEqual([], self.arriving())
        self.assertEqual(0, self.promised())

    def test_a_file_that_can_not_be_committed(self) -> None:
        """
        If the disk fails as the file becomes content, the client still has its answer.
        """

        def failing(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(os, "fsync", failing)
        self.bypass("MISS")

    def test_of_an_unknown_length(self) -> None:
        """
        A blob of unannounced length streams through, and ends well if its digest is right.
        """
        body = b"5\r\nhello\r\n0\r\n\r\n"
        digest = digest_of(b"hello")
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.answer_with(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        self.assertWhole(reply, b"hello", "BYPASS")
        self.assertFalse(self.has(digest))

    def test_of_a_length_that_only_a_manifest_tells(self) -> None:
        data = noise("layer", 5000)
        image = self.standin.push_image("team/app", "latest", layers=[data])
        self.assertEqual(200, self.get("/v2/team/app/manifests/latest").code)
        path = f"/v2/team/app/blobs/{image.layers[0]}"
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for body in (data[:-1] + b"x", data):
            reply = self.daemon.send("GET", path)
            self.answer_with(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            self.assertEqual((200, 5000), (reply.code, reply.length))
            self.assertEqual(body == data, reply.ended == "whole", len(body))
        self.assertWhole(reply, data, "MISS")
        self.assertWhole(self.get(path), data, "HIT")

    def test_of_an_unknown_length_with_other_bytes(self) -> None:
        """
        If a blob of unknown length has another digest, no client sees a good end.
        """
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest_of(b'hello')}")
        self.answer_with(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\njello\r\n0\r\n\r\n")
        self.assertEqual("broken", reply.ended)

    def test_joined_from_its_start(self) -> None:
        """
        A request while an uncached transfer still holds its first bytes follows it.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        first, second = self.get(self.path), self.get(self.path)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(first, self.data, "BYPASS")
        self.assertWhole(second, self.data, "JOINED")
        self.assertEqual(1, self.transfers())

    def test_past_its_start_others_get_their_own(self) -> None:
        """
        A request when an uncached transfer has dropped its first bytes gets a transfer of its own.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        first = self.get(self.path)
        self.arrive(self.digest, 100_000)
        late = self.get(self.path)
        self.standin.release(self.digest)
        self.flush()
        for reply in (first, late):
            self.assertWhole(reply, self.data, "BYPASS")
        self.assertEqual(2, self.transfers())

    def test_ranges_elsewhere_do_not_wait_for_the_shared_transfer(self) -> None:
        """
        A range that an uncached transfer has not reached, or has passed, is requested separately: no other bytes come.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        ahead = self.get(self.path, Range="bytes=200000-250000")
        behind = self.get(self.path, Range="bytes=10-20")
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(ahead, self.data[200_000:250_001], "BYPASS", 206)
        self.assertWhole(behind, self.data[10:21], "BYPASS", 206)
        self.assertEqual(len(self.data) + 50_001 + 11, self.standin.bytes_sent)

    def test_past_its_start_a_range_that_does_not_count_gets_all(self) -> None:
        """
        A client whose If-Range does not match gets the whole blob, however far an uncached transfer is.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        reply = self.get(self.path, Range="bytes=200000-", If_Range='"another"')
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data)

    def test_past_its_start_a_range_that_makes_no_sense_gets_all(self) -> None:
        """
        A client with an invalid Range gets the whole blob, however far an uncached transfer is.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        reply = self.get(self.path, Range="bytes=200000-100")
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data)

    def test_a_client_that_rests_is_waited_for(self) -> None:
        """
        An uncached transfer waits for its client, minutes if need be: a paused upstream is no stall.
        """
        data = noise("large", 12 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.start(limit=200_000)
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        reply.stop_reading()
        self.pass_time(120)
        self.assertLess(self.standin.bytes_sent, 10 * MIB)
        self.assertEqual("", reply.ended)
        reply.read_on()
        self.flush()
        self.assertWhole(reply, data, "BYPASS")

    def test_ends_with_its_last_client(self) -> None:
        """
        An uncached transfer without followers ends: there is no use for its bytes.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        reply.leave()
        self.flush()
        self.assertEqual(0, self.standin.held(self.digest))
        self.standin.release(self.digest)
        self.assertWhole(self.get(self.path), self.data, "BYPASS")

    def test_ends_when_its_client_left_before_it_began(self) -> None:
        """
        An uncached transfer whose client left before the first byte ends as soon as its window is full.
        """
        data = noise("large", 12 * MIB)
        digest = self.standin.push_blob("team/app", data)
        self.start(limit=200_000)
        self.standin.quirks.latency = 1
        self.standin.quirks.rate = 2 * MIB
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        reply.leave()
        self.pass_time(12)
        self.assertLess(self.standin.bytes_sent, 8 * MIB)
        self.assertEqual(0, self.standin.held(digest))


class BrokenCacheTests(BlobTestCase):
    """
    A failure of the cache never fails a pull that ECR could serve.
    """

    def test_an_index_that_is_lost(self) -> None:
        """
        Cached content is served after ECR's confirmation, and not fetched again.
        """
        image = self.standin.push_image("team/app", "latest")
        self.get(self.path)
        self.get("/v2/team/app/manifests/latest")
        self.lose_index()
        self.start()
        self.standin.forget_asked()
        self.assertWhole(self.get(self.path), self.data, "REVALIDATED")
        self.assertWhole(self.get(f"/v2/team/app/manifests/{image.digest}"), image.manifest, "REVALIDATED")
        self.assertEqual([], self.standin.requests("bucket"))

    def test_an_index_that_can_not_be_used(self) -> None:
        """
        Pulls work, and nothing is cached, as the free space is unknown.
        """
        image = self.standin.push_image("team/app", "latest")
        self.index.database.rows.close()
        self.assertWhole(self.get(self.path), self.data, "BYPASS")
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), image.manifest, "MISS")
        self.assertRefused(self.get("/v2/team/app/manifests/other"), 404, "MANIFEST_UNKNOWN")
        self.assertEqual([], self.files())

    def test_a_janitor_that_fails(self) -> None:
        """
        A janitor that fails, in whatever way, costs the caching and not the pull.
        """
        image = self.standin.push_image("team/app", "latest")
        self.start(limit=100_000)

        def failing(name: str, size: int) -> bool:
            raise ZeroDivisionError

        self.patch(self.daemon.janitor, "make_room", failing)
        small = self.standin.push_blob("team/app", noise("small", 50_000))
        self.assertWhole(self.get(f"/v2/team/app/blobs/{small}"), noise("small", 50_000), "BYPASS")
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), image.manifest, "MISS")
        self.flushLoggedErrors(ZeroDivisionError)

    def test_a_content_file_that_can_not_be_opened(self) -> None:
        """
        A cached file that can't be opened is no reason to fail: the blob is fetched.
        """
        self.get(self.path)
        path = self.file_of(self.digest)
        path.rename(self.root / "elsewhere")
        path.symlink_to(self.root / "elsewhere")
        self.assertWhole(self.get(self.path), self.data)

    def test_a_directory_in_a_files_place(self) -> None:
        """
        A directory in the place of a cached file is no reason to fail: the blob comes from ECR.
        """
        path = self.file_of(self.digest)
        path.mkdir(parents=True)
        self.assertWhole(self.get(self.path), self.data)

    def test_no_more_file_descriptors(self) -> None:
        """
        Without descriptors for files, blobs stream through.
        """
        self.get(self.path)
        really = os.open

        def full(path: Any, *args: Any, **kwargs: Any) -> int:
            if str(self.root) in str(path):
                raise OSError(errno.EMFILE, "Too many open files")
            return really(path, *args, **kwargs)

        self.patch(os, "open", full)
        self.assertWhole(self.get(self.path), self.data)

    def test_a_manifest_that_rotted(self) -> None:
        """
        A cached manifest whose bytes have changed is not served but fetched again.
        """
        image = self.standin.push_image("team/app", "latest")
        path = f"/v2/team/app/manifests/{image.digest}"
        self.get(path)
        self.file_of(image.digest).write_bytes(image.manifest.replace(b"linux", b"xunil").replace(b"2", b"3"))
        self.start()
        self.assertWhole(self.get(path), image.manifest, "MISS")
        self.assertWhole(self.get(path), image.manifest, "HIT")

    def test_a_rotten_manifest_on_a_disk_that_can_not_be_written(self) -> None:
        """
        A manifest whose cached bytes have changed is fetched even if they can't be removed.
        """
        image = self.standin.push_image("team/app", "latest")
        path = f"/v2/team/app/manifests/{image.digest}"
        self.get(path)
        file = self.file_of(image.digest)
        file.write_bytes(image.manifest.replace(b"2", b"3"))
        self.start()

        def read_only(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        with self.monkey(os, "unlink", read_only), self.monkey(os, "rename", read_only):
            self.assertWhole(self.get(path), image.manifest, "MISS")
        file.unlink()

    def monkey(self, owner: Any, name: str, value: Any) -> Any:
        patch = self.patch(owner, name, value)

        class Until:
            def __enter__(self) -> None:
                pass

            def __exit__(self, *exc: object) -> None:
                patch.restore()

        return Until()

    def test_a_manifest_that_can_not_be_read(self) -> None:
        """
        A manifest that can't be read from disk is fetched.
        """
        image = self.standin.push_image("team/app", "latest")
        path = f"/v2/team/app/manifests/{image.digest}"
        self.get(path)
        self.start()

        def failing(fd: int, count: int, offset: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(os, "pread", failing)
        self.assertWhole(self.get(path), image.manifest)

    def test_a_manifest_for_which_there_is_no_room(self) -> None:
        """
        Manifests are passed on even if they can't be cached: the cache is too small, or its disk fails.
        """
        image = self.standin.push_image("team/app", "latest")

        def failing(fd: int, data: Any, offset: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(os, "pwrite", failing)
        path = f"/v2/team/app/manifests/{image.digest}"
        self.assertWhole(self.get(path), image.manifest, "MISS")
        self.assertEqual(([], 0), (self.arriving(), self.promised()))
        self.start(limit=100)
        self.assertWhole(self.get(path), image.manifest, "MISS")


class LimitTests(DaemonTestCase):
    def test_holds_at_every_step(self) -> None:
        """
        Whatever is pulled in whatever order, the files of the cache never exceed the limit.
        """
        chance = random.Random(7)
        limit = 300_000
        self.start(limit=limit)
        sizes = [chance.choice([100, 5_000, 20_000, 60_000, 240_000, 310_000]) for _ in range(20)]
        blobs = {
            self.standin.push_blob("team/app", data): data for data in (noise(f"b{n}", s) for n, s in enumerate(sizes))
        }
        for number in range(4):
            self.standin.push_image("team/app", f"v{number}", layers=[layer("x", bytes([number]))])
        for _ in range(120):
            digest = chance.choice(list(blobs))
            if chance.random() < 0.3:
                self.assertEqual(200, self.get(f"/v2/team/app/manifests/v{chance.randrange(4)}").code)
            elif chance.random() < 0.3:
                self.standin.hold(digest)
                reply = self.get(f"/v2/team/app/blobs/{digest}")
                self.assertLessEqual(self.used(), limit)
                if chance.random() < 0.3:
                    self.standin.cut(digest)
                self.standin.release(digest)
                self.flush()
                self.assertIn(reply.ended, ("whole", "broken"))
            else:
                self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), blobs[digest])
            self.assertLessEqual(self.used(), limit)
            self.clock.advance(1)
        self.assertGreater(self.used(), limit / 4)
        self.assertEqual(0, self.promised())

    def test_what_was_used_last_stays(self) -> None:
        """
        The least recently used is evicted first; a hit counts as use, also after a restart.
        """
        self.start(limit=110_000)
        old, used, new = (self.standin.push_blob("team/app", noise(name, 40_000)) for name in ("old", "used", "new"))
        for digest in (old, used, old):  # the second use of "old" is the more recent
            self.clock.advance(5)
            self.get(f"/v2/team/app/blobs/{digest}")
        self.clock.advance(5)
        self.start(limit=110_000)
        self.get(f"/v2/team/app/blobs/{new}")
        self.assertEqual((True, False, True), (self.has(old), self.has(used), self.has(new)))

    def test_what_is_being_sent_stays(self) -> None:
        """
        Content that is being sent to a client is not evicted: another blob goes uncached instead.
        """
        self.start(limit=500_000)
        sent = noise("sent", 300_000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', sent)}"
        self.get(path)
        slow = self.daemon.send("GET", path)
        slow.stop_reading()
        self.flush()
        other = noise("other", 300_000)
        reply = self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}")
        self.assertWhole(reply, other, "BYPASS")
        self.assertTrue(self.has(digest_of(sent)))
        slow.read_on()
        self.flush()
        self.assertWhole(slow, sent, "HIT")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest_of(other)}"), other, "MISS")
        self.assertFalse(self.has(digest_of(sent)))

    def test_what_is_still_being_sent_after_its_arrival_stays(self) -> None:
        """
        A complete blob that a slow client still reads is not evicted either.
        """
        self.start(limit=500_000)
        sent = noise("sent", 300_000)
        slow = self.daemon.send("GET", f"/v2/team/app/blobs/{self.standin.push_blob('team/app', sent)}")
        slow.stop_reading()
        self.flush()
        self.assertTrue(self.has(digest_of(sent)))
        other = noise("other", 300_000)
        reply = self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}")
        self.assertWhole(reply, other)
        self.assertTrue(self.has(digest_of(sent)), "evicted while a client was being sent it")
        slow.read_on()
        self.flush()
        self.assertWhole(slow, sent, "MISS")

    def test_requests_do_not_wait_for_the_count(self) -> None:
        data = noise("blob", 1000)
        digest = self.standin.push_blob("team/app", data)
        hands = Hands()
        hands.idle = False
        daemon = self.start(in_thread=hands)
        hands.idle = True
        self.assertWhole(daemon.ask("GET", f"/v2/team/app/blobs/{digest}"), data, "MISS")
        self.assertTrue(self.has(digest))
        self.assertEqual(1, len(hands.waiting))


class LandedTests(BlobTestCase):
    def test_who_leaves_while_a_thread_looks(self) -> None:
        """
        A file that a thread opens for a client that has disconnected meanwhile is closed, and may be evicted.
        """
        self.get(self.path)
        hands = Hands()
        daemon = self.start(in_thread=hands)
        hands.idle = False
        reply = daemon.ask("GET", self.path)
        reply.leave()
        self.flush()
        hands.idle = True
        hands.work_off()
        self.flush()
        self.assertEqual(set(), being_read(daemon.store))

    def test_what_lands_while_one_looks_is_served(self) -> None:
        """
        A blob that another process adds just after the lookup is served from the cache.
        """
        hands = Hands()
        daemon = self.start(in_thread=hands)
        hands.idle = False
        reply = daemon.ask("GET", self.path)
        second = daemon.ask("GET", self.path)
        hands.work(2)  # it is not there
        path = self.file_of(self.digest)
        path.parent.mkdir(parents=True)
        path.write_bytes(self.data)
        hands.work_off()
        self.flush()
        hands.idle = True
        hands.work_off()
        self.flush()
        for each in (reply, second):
            self.assertEqual("REVALIDATED", each.cache)
            self.assertWhole(each, self.data)
        self.assertEqual(0, self.standin.bytes_sent)


class ManifestTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = f"/v2/team/app/manifests/{self.image.digest}"

    def test_by_digest_is_asked_once(self) -> None:
        """
        The second pull by digest sends ECR no request.
        """
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.standin.refuse("registry")
        reply = self.get(self.path)
        self.assertWhole(reply, self.image.manifest, "HIT")
        self.assertEqual(OCI_MANIFEST, reply.header("Content-Type"))

    def test_by_digest_is_never_converted(self) -> None:
        """
        By digest the bytes are those of the digest, whatever the client accepts.
        """
        reply = self.get(self.path, Accept=SCHEMA2)
        self.assertWhole(reply, self.image.manifest)
        self.assertEqual(OCI_MANIFEST, reply.header("Content-Type"))

    def test_by_digest_of_either_algorithm(self) -> None:
        """
        A manifest with a sha512 digest is verified by sha512.
        """
        digest = digest_of(self.image.manifest, "sha512")
        repository = self.standin.repositories["team/app"]
        repository.manifests[digest] = repository.manifests[self.image.digest]
        path = f"/v2/team/app/manifests/{digest}"
        reply = self.get(path)
        self.assertWhole(reply, self.image.manifest, "MISS")
        self.assertEqual(digest, reply.header("Docker-Content-Digest"))
        self.assertWhole(self.get(path), self.image.manifest, "HIT")

    def test_by_digest_is_asked_once_for_all_who_wait(self) -> None:
        """
        Simultaneous requests for a manifest by digest cost one request.
        """
        self.standin.quirks.latency = 1
        replies = [self.daemon.send("GET", self.path) for _ in range(5)]
        self.pass_time(3)
        for reply in replies:
            self.assertWhole(reply, self.image.manifest)
        self.assertEqual(["JOINED"] * 4 + ["MISS"], sorted(str(reply.cache) for reply in replies))
        self.assertEqual(1, self.standin.count("registry"))

    def test_head_by_digest(self) -> None:
        """
        HEAD by digest fetches nothing; for cached manifests it sends no request.
        """
        for word in ("MISS", "HIT"):
            reply = self.head(self.path)
            self.assertEqual((200, word, len(self.image.manifest)), (reply.code, reply.cache, reply.length))
            self.assertEqual((OCI_MANIFEST, b""), (reply.header("Content-Type"), bytes(reply.body)))
            self.assertEqual(self.image.digest, reply.header("Docker-Content-Digest"))
            self.assertEqual(word == "HIT", self.has(self.image.digest))
            self.get(self.path)
        self.assertEqual(["HEAD", "GET"], [asked.method for asked in self.standin.asked])

    def test_head_by_digest_of_another_repository(self) -> None:
        """
        For HEAD of a manifest that another repository fetched, ECR has to confirm it.
        """
        self.get(self.path)
        self.standin.push_image("team/other")
        other = f"/v2/team/other/manifests/{self.image.digest}"
        reply = self.head(other)
        self.assertEqual((200, "REVALIDATED", b""), (reply.code, reply.cache, bytes(reply.body)))
        self.assertWhole(self.get(other), self.image.manifest, "HIT")

    def test_head_that_speaks_of_another_digest(self) -> None:
        """
        If ECR answers HEAD by digest with another digest, the client does not get that one.
        """
        self.standin.fail(
            "registry",
            status=200,
            method="HEAD",
            headers={"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest_of(b"another")},
            body=b"another",
        )
        self.assertEqual(502, self.head(self.path).code)

    def test_other_bytes_are_refused(self) -> None:
        """
        A manifest with another digest is rejected with 502, not cached, and the next request succeeds.
        """
        self.standin.corrupt(self.image.digest, self.image.manifest.replace(b"2", b"3"))
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE", "something else")
        self.assertEqual([], self.files())
        self.standin.heal()
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")

    def test_what_is_no_manifest_is_refused(self) -> None:
        """
        A web page in a manifest's place, bytes that contradict their type, and invalid JSON are rejected and not
        cached.
        """
        cases = {
            "text/html": b"<html>Log in</html>",
            OCI_MANIFEST: b'{"mediaType": "application/vnd.oci.image.index.v1+json"}',
            SCHEMA2: b"not JSON",
            "": self.image.manifest,
        }
        for content_type, body in cases.items():
            headers = {"Content-Type": content_type} if content_type else {}
            fault = self.standin.fail("registry", status=200, body=body, headers=headers)
            self.assertRefused(self.get("/v2/team/app/manifests/latest"), 502, "UNAVAILABLE", "no manifest")
            fault.remove()
        self.assertEqual([], self.files())
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), self.image.manifest, "MISS")

    def test_of_more_than_4_mib_is_refused(self) -> None:
        """
        A manifest of 4 MiB passes, one byte more is rejected, whether or not its length was announced.
        """
        for size, status in ((4 * MIB, 200), (4 * MIB + 1, 502)):
            start = b'{"mediaType": "%s", "x": "' % OCI_MANIFEST.encode()
            manifest = start + b"x" * (size - len(start) - 2) + b'"}'
            digest = self.standin.push_manifest("team/app", manifest, OCI_MANIFEST)
            reply = self.get(f"/v2/team/app/manifests/{digest}")
            self.assertEqual((status, "whole"), (reply.code, reply.ended))
            self.assertEqual(status == 200, self.has(digest))

    def test_unknown(self) -> None:
        """
        What ECR doesn't have is MANIFEST_UNKNOWN or NAME_UNKNOWN, as ECR says it.
        """
        for name in ("nothing", digest_of(b"nothing")):
            reply = self.get(f"/v2/team/app/manifests/{name}")
            self.assertRefused(reply, 404, "MANIFEST_UNKNOWN", "Requested image not found")
            self.assertEqual(404, self.head(f"/v2/team/app/manifests/{name}").code)
        self.assertRefused(self.get("/v2/nobody/manifests/latest"), 404, "NAME_UNKNOWN", "nobody")

    def test_an_index_fetches_only_what_is_asked(self) -> None:
        """
        An index is cached unchanged; of its platforms only the requested one is fetched, without a second request.
        """
        images = [
            self.standin.push_image("multi", layers=[layer("arch", p.encode())], platform=p)
            for p in ("linux/amd64", "linux/arm64")
        ]
        index = self.standin.push_index("multi", "latest", images)
        reply = self.get("/v2/multi/manifests/latest", Accept=EVERY_TYPE)
        self.assertEqual((index, "MISS"), (reply.header("Docker-Content-Digest"), reply.cache))
        self.assertEqual(
            [image.digest for image in images], [each["digest"] for each in json.loads(reply.body)["manifests"]]
        )
        self.assertWhole(self.get(f"/v2/multi/manifests/{images[1].digest}"), images[1].manifest, "MISS")
        self.assertTrue(self.has(index))
        self.assertFalse(self.has(images[0].digest))
        self.assertEqual(2, self.standin.count("registry"))


class TagTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"

    def moved(self) -> bytes:
        """
        Move the tag, and return its new manifest.
        """
        return self.standin.push_image("team/app", "latest", layers=[layer("new", b"moved")]).manifest

    def test_is_asked_for_each_time(self) -> None:
        """
        By default each request for a tag sends HEAD to ECR; if it is unchanged, its bytes come from the cache.
        """
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.standin.forget_asked()
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")
        self.assertEqual(["HEAD"], [asked.method for asked in self.standin.asked])

    def test_that_moved_is_followed(self) -> None:
        """
        A tag that moved leads to its new image with the next request, and back again from the cache.
        """
        self.get(self.path)
        manifest = self.moved()
        self.assertWhole(self.get(self.path), manifest, "MISS")
        self.standin.push_image("team/app", "latest")
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_brings_its_digest_in(self) -> None:
        """
        What was pulled by tag is cached by digest, without a request.
        """
        self.get(self.path)
        self.standin.refuse("registry")
        self.assertWhole(self.get(f"/v2/team/app/manifests/{self.image.digest}"), self.image.manifest, "HIT")

    def test_one_question_for_all_who_ask_at_once(self) -> None:
        """
        Simultaneous requests for a tag cost one request, whether or not it is cached.
        """
        self.standin.quirks.latency = 1
        for words in (["JOINED"] * 4 + ["MISS"], ["REVALIDATED"] * 5):
            self.standin.forget_asked()
            replies = [self.daemon.send("GET", self.path) for _ in range(5)]
            self.pass_time(3)
            self.assertEqual(words, sorted(str(reply.cache) for reply in replies))
            for reply in replies:
                self.assertWhole(reply, self.image.manifest)
            self.assertEqual(1, len(self.standin.asked))

    def test_who_leaves_does_not_end_the_question(self) -> None:
        """
        The client that caused the request may disconnect; the others get the answer.
        """
        self.get(self.path)
        self.standin.quirks.latency = 1
        first, second = self.daemon.send("GET", self.path), self.daemon.send("GET", self.path)
        self.flush()
        first.leave()
        self.pass_time(3)
        self.assertWhole(second, self.image.manifest, "REVALIDATED")

    def test_is_trusted_for_its_time(self) -> None:
        """
        Within the TTL a tag is answered without a request; after it ECR is asked, and the TTL starts again.
        """
        self.start(tag_ttl=60)
        self.get(self.path)
        manifest = self.moved()
        self.standin.forget_asked()
        self.pass_time(59)
        self.assertWhole(self.get(self.path), self.image.manifest, "HIT")
        self.assertEqual([], self.standin.asked)
        self.pass_time(1)
        self.assertWhole(self.get(self.path), manifest, "MISS")
        self.pass_time(59)
        self.assertWhole(self.get(self.path), manifest, "HIT")

    def test_confirmed_anew_is_trusted_anew(self) -> None:
        """
        A tag that ECR confirmed unchanged has another TTL.
        """
        self.start(tag_ttl=10)
        self.get(self.path)
        self.pass_time(11)
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")
        self.pass_time(9)
        self.assertWhole(self.get(self.path), self.image.manifest, "HIT")

    def test_whose_manifest_is_gone_is_fetched_within_its_time(self) -> None:
        """
        A tag within its TTL whose manifest was evicted is requested.
        """
        self.start(tag_ttl=60)
        self.get(self.path)
        self.start(tag_ttl=60)
        self.file_of(self.image.digest).unlink()
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")

    def test_of_the_future_is_not_trusted(self) -> None:
        """
        A clock that was set back does not extend a TTL.
        """
        self.start(tag_ttl=60)
        self.get(self.path)
        manifest = self.moved()
        self.daemon.set_by = -3600
        self.assertWhole(self.get(self.path), manifest, "MISS")

    def test_after_a_clock_was_set_is_trusted_for_its_time(self) -> None:
        """
        Whichever way the clock was set, ECR is asked once, and the TTL applies from then on.
        """
        for jump in (10 * 365 * 86400, -10 * 365 * 86400):
            self.start(tag_ttl=60)
            self.get(self.path)
            self.daemon.set_by = jump
            self.standin.forget_asked()
            self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")
            self.pass_time(59)
            self.assertWhole(self.get(self.path), self.image.manifest, "HIT")
            self.assertEqual(1, len(self.standin.asked))
            self.pass_time(1)
            self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_head(self) -> None:
        """
        HEAD of a tag returns what it leads to without fetching it.
        """
        reply = self.head(self.path)
        self.assertEqual((200, "MISS", len(self.image.manifest)), (reply.code, reply.cache, reply.length))
        self.assertEqual(self.image.digest, reply.header("Docker-Content-Digest"))
        self.assertFalse(self.has(self.image.digest))
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.standin.forget_asked()
        self.assertEqual("REVALIDATED", self.head(self.path).cache)
        self.assertEqual(["HEAD"], [asked.method for asked in self.standin.asked])

    def test_whose_head_says_no_digest_is_fetched(self) -> None:
        """
        A registry whose HEAD has no digest is asked with GET.
        """
        self.get(self.path)
        headers = {"Content-Type": OCI_MANIFEST}
        self.standin.fail("registry", status=200, method="HEAD", headers=headers, body=self.image.manifest)
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.assertEqual(self.image.digest, self.head(self.path).header("Docker-Content-Digest"))

    def test_whose_head_says_another_type_keeps_its_own(self) -> None:
        """
        If ECR's HEAD has a type that the manifest contradicts, the client gets the manifest's.
        """
        self.get(self.path)
        for wrong in ("text/html", SCHEMA2):
            headers = {"Content-Type": wrong, "Docker-Content-Digest": self.image.digest}
            fault = self.standin.fail("registry", status=200, method="HEAD", headers=headers)
            reply = self.get(self.path)
            self.assertNotEqual((200, wrong), (reply.code, reply.header("Content-Type")))
            fault.remove()

    def test_that_ecr_has_no_more_is_forgotten(self) -> None:
        """
        A tag that ECR no longer has is 404, and is not served stale later.
        """
        self.get(self.path)
        self.standin.delete_tag("team/app", "latest")
        self.assertRefused(self.get(self.path), 404, "MANIFEST_UNKNOWN")
        self.standin.refuse("registry")
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")

    def test_that_ecr_has_no_more_is_forgotten_though_the_client_has_left(self) -> None:
        """
        Whatever it waited for when it disconnected.
        """
        hands, told = Hands(), 0
        self.start(in_thread=hands)
        for steps in range(8):
            path = f"/v2/team/app/manifests/left{steps}"
            self.standin.push_image("team/app", f"left{steps}")
            self.get(path)
            self.standin.delete_tag("team/app", f"left{steps}")
            asked = len(self.standin.asked)
            hands.idle = False
            reply = self.daemon.send("GET", path)
            self.flush()
            for _ in range(steps):
                hands.work(min(1, len(hands.waiting)))
                self.flush()
            reply.leave()
            self.flush()
            hands.idle = True
            hands.work_off()
            self.flush()
            if len(self.standin.asked) > asked:
                told += 1
                self.standin.refuse("registry")
                self.assertRefused(self.get(path), 502, "UNAVAILABLE")
                self.standin.heal()
        self.assertGreater(told, 2)

    def test_that_ecr_has_no_more_is_forgotten_though_nobody_waits_for_the_answer(self) -> None:
        """
        The client has disconnected before ECR answers.
        """
        self.start()
        for which in ("tag", "other"):
            path = f"/v2/team/app/manifests/{which}-left"
            self.standin.push_image("team/app", f"{which}-left")
            self.get(path)
            self.standin.delete_tag("team/app", f"{which}-left")
            self.standin.quirks.latency = 1
            replies = [self.daemon.send("GET", path) for _ in range(2 if which == "other" else 1)]
            self.flush()
            for reply in replies:
                reply.leave()
            self.flush()
            self.standin.quirks.latency = 0
            self.pass_time(2)
            self.standin.refuse("registry")
            self.assertRefused(self.get(path), 502, "UNAVAILABLE")
            self.standin.heal()

    def test_that_ecr_has_not_for_one_client_is_kept_for_the_others(self) -> None:
        """
        Registries answer 404 if a tag has nothing that the client accepts: this says nothing about other types.
        """
        self.get(self.path, Accept=OCI_MANIFEST)
        self.deny_once()
        self.assertRefused(self.get(self.path, Accept=SCHEMA2), 404, "MANIFEST_UNKNOWN")
        for _ in range(2):
            self.standin.refuse("registry")
            self.assertWhole(self.get(self.path, Accept=OCI_MANIFEST), self.image.manifest, "STALE")
            self.assertRefused(self.get(self.path, Accept=SCHEMA2), 502, "UNAVAILABLE")
            self.start()

    def test_that_one_client_was_told_is_gone_is_so_for_all_who_ask_less(self) -> None:
        for accept in (OCI_MANIFEST, f"{OCI_MANIFEST}, {SCHEMA2}"):
            self.get(self.path, Accept=accept)
        self.standin.delete_tag("team/app", "latest")
        self.assertRefused(self.get(self.path, Accept=f"{OCI_MANIFEST}, {SCHEMA2}"), 404, "MANIFEST_UNKNOWN")
        self.standin.refuse("registry")
        for accept in (OCI_MANIFEST, f"{OCI_MANIFEST}, {SCHEMA2}"):
            self.assertRefused(self.get(self.path, Accept=accept), 502, "UNAVAILABLE")

    def test_that_ecr_denies_once_is_served(self) -> None:
        """
        A 404 to HEAD is checked with GET: a temporary one reaches no client.
        """
        self.get(self.path)
        self.deny_once()
        self.assertEqual(200, self.get(self.path).code)

    def deny_once(self) -> None:
        unknown = registry_error(404, "MANIFEST_UNKNOWN", "Requested image not found")
        self.standin.fail("registry", status=404, body=bytes(unknown.body), headers=unknown.headers, times=1)

    def test_that_was_denied_is_not_served(self) -> None:
        """
        IAM's refusal is the answer: cached content is neither served in spite of it, nor dropped.
        """
        self.get(self.path)
        denial = self.standin.deny()
        self.assertRefused(self.get(self.path), 403, "DENIED")
        denial.remove()
        self.standin.refuse("registry")
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")


class StaleTests(DaemonTestCase):
    """
    A tag when ECR can't be asked.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"
        self.get(self.path)

    def test_when_connections_break(self) -> None:
        """
        With ECR unreachable the last answer is served, as STALE, for GET and HEAD.
        """
        self.standin.refuse("registry")
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
        reply = self.head(self.path)
        self.assertEqual((200, "STALE", b""), (reply.code, reply.cache, bytes(reply.body)))

    def test_when_there_is_no_answer_for_five_seconds(self) -> None:
        self.standin.hang("registry")
        reply = self.daemon.send("GET", self.path)
        self.pass_time(4)
        self.assertEqual(0, reply.code)
        self.pass_time(2)
        self.assertWhole(reply, self.image.manifest, "STALE")
        self.assertEqual("unreachable", reply.header("X-Cache-Reason"))

    def test_who_waits_while_the_last_answer_is_forgotten_waits_for_ecr(self) -> None:
        """
        As when another process learns that there is no such tag, or it is purged.
        """
        self.standin.quirks.latency = 8
        reply = self.daemon.send("GET", self.path)
        self.pass_time(2)
        for key, entry in self.entries().items():
            self.index.forget_answers(key, entry.answers, self.daemon.now())
        self.pass_time(5)
        self.assertEqual(0, reply.code)
        self.pass_time(5)
        self.assertWhole(reply, self.image.manifest, "REVALIDATED")

    def test_an_answer_that_comes_late_counts_for_the_next_request(self) -> None:
        moved = self.standin.push_image("team/app", "latest", layers=(b"another",))
        self.standin.quirks.latency = 8
        reply = self.daemon.send("GET", self.path)
        self.pass_time(6)
        self.assertWhole(reply, self.image.manifest, "STALE")
        self.pass_time(20)
        self.standin.quirks.latency = 0
        self.standin.refuse("registry")
        self.assertWhole(self.get(self.path), moved.manifest, "STALE")

    def test_when_ecr_fails_or_throttles(self) -> None:
        """
        On 5xx and 429 from ECR the last answer is served.
        """
        for status in (500, 502, 503, 504):
            fault = self.standin.fail("registry", status=status)
            self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
            fault.remove()
        self.standin.throttle("registry")
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")

    def test_when_something_else_answers_for_ecr(self) -> None:
        for status in (403, 404):
            for page in (b"<html>Blocked by the gateway</html>", b"404 page not found\n", b""):
                fault = self.standin.fail("registry", status=status, body=page)
                self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
                self.assertEqual(200, self.head(self.path).code)
                fault.remove()
        # The tag is kept: it is still served when ECR is silent.
        self.standin.hang("registry")
        reply = self.daemon.send("GET", self.path)
        self.pass_time(31)
        self.assertWhole(reply, self.image.manifest, "STALE")

    def test_when_there_is_no_token(self) -> None:
        """
        A daemon that started without AWS serves what it has, after the wait for a token.
        """
        never: Deferred[Token] = Deferred()
        self.start(fetch=lambda: never)
        reply = self.daemon.send("GET", self.path)
        self.pass_time(11)
        self.assertWhole(reply, self.image.manifest, "STALE")

    def test_is_not_served_where_ecr_names_another_manifest_that_is_refused(self) -> None:
        """
        ECR has answered: the tag has moved, to what can't be passed on. A client must not run the old image for ever.
        """
        body = json.dumps({**json.loads(self.image.manifest), "mediaType": OCI_INDEX}).encode()
        large = b" " * MANIFEST_LIMIT + self.image.manifest
        usual = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest_of(b"another")}
        self.standin.push_manifest("team/app", body, OCI_MANIFEST, "latest")
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE", "no manifest")
        self.standin.push_manifest("team/app", large, OCI_MANIFEST, "latest")
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")
        for headers in (usual, {**usual, "Content-Type": "application/zip"}):
            fault = self.standin.fail("registry", status=200, headers=headers, body=self.image.manifest)
            self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")
            fault.remove()

    def test_is_served_where_something_refused_names_no_other_manifest(self) -> None:
        """
        A gateway's page, or bytes damaged on the way, are not ECR's answer.
        """
        for headers in ({"Content-Type": "text/html"}, {"Docker-Content-Digest": self.image.digest}):
            fault = self.standin.fail("registry", status=200, headers=headers, body=b"<html>Sign in</html>")
            self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
            fault.remove()

    def test_needs_the_manifest(self) -> None:
        """
        Without the manifest in the cache there is nothing stale to serve: 502.
        """
        self.start()
        self.file_of(self.image.digest).unlink()
        self.standin.refuse("registry")
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")

    def test_ends_when_ecr_is_back(self) -> None:
        """
        As soon as ECR answers again, its answer counts.
        """
        self.standin.refuse("registry")
        self.get(self.path)
        self.standin.heal()
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_chooses_what_the_client_takes(self) -> None:
        """
        A client is served the last answer of a type that it accepts, and no other.
        """
        self.get(self.path, Accept=SCHEMA2)
        self.standin.refuse("registry")
        for accept, media_type in (
            (SCHEMA2, SCHEMA2),
            (f"{SCHEMA2};q=0.5, text/plain", SCHEMA2),
            (f"{OCI_MANIFEST}, text/plain", OCI_MANIFEST),
            ("*/*", OCI_MANIFEST),
        ):
            reply = self.get(self.path, Accept=accept)
            self.assertEqual((200, "STALE", media_type), (reply.code, reply.cache, reply.header("Content-Type")))
        self.assertRefused(self.get(self.path, Accept=SCHEMA2_LIST), 502, "UNAVAILABLE")


class NegotiationTests(DaemonTestCase):
    """
    ECR converts a tag's manifest for clients that don't accept the stored type.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"

    def test_each_type_has_its_own_answer(self) -> None:
        """
        One tag has an answer for each set of types that clients accept, each under its own digest.
        """
        for word in ("MISS", "REVALIDATED"):
            stored = self.get(self.path, Accept=EVERY_TYPE)
            converted = self.get(self.path, Accept=SCHEMA2)
            self.assertWhole(stored, self.image.manifest, word)
            self.assertEqual((200, word, SCHEMA2), (converted.code, converted.cache, converted.header("Content-Type")))
            self.assertNotEqual(stored.body, converted.body)
            self.assertEqual(digest_of(bytes(converted.body)), converted.header("Docker-Content-Digest"))
            self.assertTrue(self.has(digest_of(bytes(converted.body))))

    def test_clients_of_different_types_at_once(self) -> None:
        """
        Simultaneous requests for a tag by clients that accept different types each get their own.
        """
        self.standin.quirks.latency = 1
        for _ in range(2):
            stored = self.daemon.send("GET", self.path, Accept=EVERY_TYPE)
            converted = self.daemon.send("GET", self.path, Accept=SCHEMA2)
            self.pass_time(3)
            self.assertWhole(stored, self.image.manifest)
            self.assertEqual((200, SCHEMA2), (converted.code, converted.header("Content-Type")))

    def test_a_converted_manifest_is_there_by_its_own_digest(self) -> None:
        """
        A converted manifest is cached by its own digest, though ECR has none of that digest.
        """
        converted = self.get(self.path, Accept=SCHEMA2)
        digest = converted.header("Docker-Content-Digest")
        self.assertWhole(self.get(f"/v2/team/app/manifests/{digest}"), bytes(converted.body), "HIT")

    def test_types_in_another_order_are_the_same(self) -> None:
        """
        Order and weights don't count: clients that accept the same types share one answer.
        """
        self.start(tag_ttl=60)
        self.get(self.path, Accept=f"{SCHEMA2}, {OCI_MANIFEST}")
        reply = self.get(self.path, Accept=f"{OCI_MANIFEST.upper()};q=0.3 ,{SCHEMA2}")
        self.assertWhole(reply, self.image.manifest, "HIT")

    def test_no_header_takes_any(self) -> None:
        """
        A client without an Accept header gets the stored type, as it would from ECR.
        """
        self.assertWhole(self.get(self.path), self.image.manifest)

    def test_the_converted_also_vouches(self) -> None:
        """
        Layers that a converted manifest lists are the repository's as well.
        """
        self.standin.push_image("team/other", "latest")
        for digest in self.image.layers:
            self.get(f"/v2/team/app/blobs/{digest}")
        self.get("/v2/team/other/manifests/latest", Accept=SCHEMA2)
        self.standin.forget_asked()
        for digest in self.image.layers:
            self.assertEqual("HIT", self.get(f"/v2/team/other/blobs/{digest}").cache)
        self.assertEqual([], self.standin.asked)


class TokenTests(DaemonTestCase):
    """
    Tokens as a client sees them.
    """

    def setUp(self) -> None:
        super().setUp()
        self.asked = 0
        self.start(fetch=self.fetch)
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"

    def fetch(self) -> Deferred[Token]:
        self.asked += 1
        return deferLater(self.clock, 0, lambda: Token(self.standin.issue_token(), self.clock.seconds() + 12 * 3600))

    def test_refused_is_renewed_and_the_request_sent_again(self) -> None:
        """
        Expired (403), unknown (400) and unauthorised (401): one refresh, and the client notices nothing.
        """
        for number, spoil in enumerate(
            (
                self.standin.expire_tokens,
                self.standin.forget_tokens,
                lambda: self.standin.fail("registry", status=401, body=b"Not Authorized\n", times=1),
            )
        ):
            spoil()
            blob = self.standin.push_blob("team/app", noise(str(number), 100))
            self.assertWhole(self.get(f"/v2/team/app/blobs/{blob}"), noise(str(number), 100), "MISS")
            self.assertEqual(2 + number, self.asked)
            self.pass_time(60)

    def test_refused_is_renewed_once_for_all(self) -> None:
        """
        Ten requests that are rejected at once cost one refresh, and all are served.
        """
        blobs = [noise(f"blob{n}", 100) for n in range(10)]
        paths = [f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}" for data in blobs]
        self.standin.quirks.latency = 1
        self.standin.expire_tokens()
        replies = [self.daemon.send("GET", path) for path in paths]
        self.pass_time(5)
        for reply, data in zip(replies, blobs, strict=True):
            self.assertWhole(reply, data)
        self.assertEqual(2, self.asked)

    def test_refused_again_is_given_up(self) -> None:
        """
        If a fresh token is rejected too, the client gets 502 after one refresh, without ECR's challenge.
        """
        challenge = {"WWW-Authenticate": 'Basic realm="https://ecr/",service="ecr.amazonaws.com"'}
        self.standin.fail("registry", status=401, headers=challenge)
        reply = self.get(self.path)
        self.assertRefused(reply, 502, "UNAVAILABLE", "token")
        self.assertIsNone(reply.header("WWW-Authenticate"))
        self.assertEqual(2, self.asked)
        self.assertEqual(2, self.standin.count("registry"))

    def test_iam_refuses_without_a_refresh(self) -> None:
        """
        A 403 about IAM permission causes no refresh; the log names the identity, the answer does not.
        """
        self.standin.deny()
        reply = self.get(self.path)
        self.assertRefused(reply, 403, "DENIED", "team/app")
        self.assertNotIn(b"arn:", bytes(reply.body))
        self.assertIn("arn:aws:iam::123456789012:user/stand-in", self.logged())
        self.assertEqual((1, 1), (self.asked, self.standin.count("registry")))

    def test_requests_wait_for_the_first(self) -> None:
        """
        A request before the first token is served when the token arrives.
        """
        coming: Deferred[Token] = Deferred()
        self.start(fetch=lambda: coming)
        reply = self.daemon.send("GET", self.path)
        self.pass_time(9)
        self.assertEqual(0, reply.code)
        coming.callback(Token(self.standin.issue_token(), self.clock.seconds() + 3600))
        self.flush()
        self.assertWhole(reply, self.image.manifest, "MISS")

    def test_requests_do_not_wait_for_long(self) -> None:
        """
        After ten seconds without a first token a request gets 503, with Retry-After and the reason.
        """
        never: Deferred[Token] = Deferred()
        self.start(fetch=lambda: never)
        reply = self.daemon.send("GET", self.path)
        self.pass_time(9)
        self.assertEqual(0, reply.code)
        self.pass_time(2)
        self.assertRefused(reply, 503, "UNAVAILABLE", "AWS has not answered yet")
        self.assertEqual("5", reply.header("Retry-After"))
        self.assertEqual([], self.standin.asked)


class LargeManifestTests(DaemonTestCase):
    """
    A manifest of nearly 4 MiB, with more layers than any real one.
    """

    def setUp(self) -> None:
        super().setUp()
        self.layers = [layer("hello", b"%d" % number) for number in range(1500)]
        self.image = self.standin.push_image("team/app", "latest", layers=self.layers)
        self.assertGreater(len(self.image.manifest), 2**16)
        self.path = "/v2/team/app/manifests/latest"

    def test_gives_a_thousand_facts_and_ecr_confirms_the_rest(self) -> None:
        self.get(self.path)
        self.assertEqual(FACTS + 1, len(self.entries()))  # and the tag
        self.standin.forget_asked()
        self.assertWhole(self.get(f"/v2/team/app/blobs/{self.image.layers[-1]}"), self.layers[-1], "MISS")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{self.image.layers[-1]}"), self.layers[-1], "HIT")

    def test_is_parsed_in_a_thread_and_once(self) -> None:
        """
        It takes seconds of CPU: the event loop has others to serve, and the tag may be requested each second.
        """
        parsed: list[bool] = []
        inside: list[bool] = []
        loads = json.loads

        def in_thread(blocking: Any, *args: Any) -> Deferred[Any]:
            inside.append(True)
            try:
                return at_once(blocking, *args)
            finally:
                inside.pop()

        def spy(data: Any, **options: Any) -> Any:
            if data == self.image.manifest:
                parsed.append(bool(inside))
            return loads(data, **options)

        self.start(in_thread=in_thread)
        self.patch(json, "loads", spy)
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.assertEqual({True}, set(parsed))
        parsed.clear()
        for _ in range(3):
            self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")
            self.assertWhole(self.get(f"/v2/team/app/manifests/{self.image.digest}"), self.image.manifest, "HIT")
        self.assertEqual([], parsed)
        self.start(in_thread=in_thread)
        for _ in range(3):
            self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")
        self.assertEqual([True], parsed)

    def test_is_not_parsed_again_when_it_is_read_again(self) -> None:
        """
        More manifests than memory holds, requested in turn, cost only reads: parsing would block the event loop.
        """
        start, many = b'{"mediaType": "%s", "x": "' % OCI_MANIFEST.encode(), 9  # of nearly 4 MiB: memory has room for 8
        manifests = [start + b"%d" % number + b"x" * (4 * MIB - 100) + b'"}' for number in range(many)]
        paths = [
            f"/v2/team/app/manifests/{self.standin.push_manifest('team/app', manifest, OCI_MANIFEST)}"
            for manifest in manifests
        ]
        for path in paths:
            self.assertEqual(200, self.get(path).code)
        loads = json.loads

        def spy(data: Any, **options: Any) -> Any:
            self.assertNotIn(data, manifests)
            return loads(data, **options)

        self.patch(json, "loads", spy)
        for path in paths:
            self.assertEqual("HIT", self.head(path).header("X-Cache-Status"))


class OrderTests(DaemonTestCase):
    """
    ECR's answers about one tag take effect in the order of the requests.
    """

    def setUp(self) -> None:
        super().setUp()
        self.path = "/v2/team/app/manifests/latest"
        self.image = self.standin.push_image("team/app", "latest", media_type=OCI_MANIFEST)

    def test_two_accepts_at_once_lose_no_update(self) -> None:
        """
        Both answers are there when ECR can't be asked, after a restart too.
        """
        hands = Hands()
        self.start(in_thread=hands)
        hands.idle = False
        replies = [self.get(self.path, Accept=accept) for accept in (OCI_MANIFEST, SCHEMA2)]
        while hands.waiting:
            hands.work_off()
            self.flush()
        self.assertEqual([200, 200], [reply.code for reply in replies])
        hands.idle = True
        self.start()
        self.standin.refuse("registry")
        again = [self.get(self.path, Accept=accept) for accept in (OCI_MANIFEST, SCHEMA2)]
        self.assertEqual(["STALE", "STALE"], [reply.cache for reply in again])
        self.assertEqual([reply.body for reply in replies], [reply.body for reply in again])

    def test_a_late_write_brings_no_deleted_tag_back(self) -> None:
        self.get(self.path)
        hands = Hands()
        self.start(in_thread=hands)
        self.pass_time(61)
        hands.idle = False
        confirmed = self.get(self.path)
        while not confirmed.body:
            hands.work()
            self.flush()
        self.standin.delete_tag("team/app", "latest")
        gone = self.get(self.path)
        while hands.waiting:
            hands.work_off()
            self.flush()
        self.assertEqual(404, gone.code)
        hands.idle = True
        self.start()
        self.standin.refuse("registry")
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")

    def test_outdated_answers_change_nothing(self) -> None:
        """
        Answers to a request before the one that was answered last.
        """
        asked = [
            Asked(parse_route(self.path, self.daemon.registry), self.path, frozenset({each}))
            for each in (OCI_MANIFEST, SCHEMA2)
        ]
        old, new = (Descriptor(OCI_MANIFEST, Digest.of(data), 3) for data in (b"old", b"new"))
        cache = self.daemon.cache

        def known() -> list[Descriptor | None]:
            entry = self.successResultOf(Deferred.fromCoroutine(cache.tags.entry(asked[0])))
            return [entry.answers[each.accept].descriptor if each.accept in entry.answers else None for each in asked]

        def record(number: int, question: int, descriptor: Descriptor) -> None:
            work = cache.tags.record(asked[number], question, descriptor, None, 0)
            self.successResultOf(Deferred.fromCoroutine(work))

        def forget(number: int, question: int) -> None:
            self.successResultOf(Deferred.fromCoroutine(cache.tags.forget(asked[number], question)))

        record(0, 2, new)
        record(0, 1, old)
        self.assertEqual([new, None], known())
        record(1, 5, new)
        forget(0, 4)
        self.assertEqual([None, new], known())
        record(0, 3, old)
        self.assertEqual([None, new], known())
        forget(0, 7)
        record(1, 6, old)
        self.assertEqual([None, None], known())
        record(1, 8, new)
        self.assertEqual([None, new], known())


class ForgettingTests(BlobTestCase):
    def test_an_entry_is_written_seldom(self) -> None:
        """
        A tag that is requested often and does not change is not written to the disk each time.
        """
        self.standin.push_image("team/app", "latest")
        self.get("/v2/team/app/manifests/latest")
        before = self.entries()
        self.pass_time(1)
        self.get("/v2/team/app/manifests/latest")
        self.assertEqual(before, self.entries())
        self.pass_time(61)
        self.get("/v2/team/app/manifests/latest")
        after = self.entries()
        self.assertEqual(1, sum(before[key] != after[key] for key in before))

    def test_confirmed_twice_after_the_content_is_deleted(self) -> None:
        """
        Any file of the directory may be deleted: missing content is fetched or confirmed again.
        """
        self.get(self.path)
        self.lose_index()
        self.start()
        self.assertWhole(self.get(self.path), self.data, "REVALIDATED")
        self.file_of(self.digest).unlink()
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.assertEqual(Digest.parse(self.digest).hex, self.file_of(self.digest).name)


class NamedDigestTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = f"/v2/team/app/manifests/{self.image.digest}"
        self.assertEqual(self.image.digest, self.head("/v2/team/app/manifests/latest").header("Docker-Content-Digest"))
        said = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "Requested image not found"}]}'
        self.standin.fail("registry", status=404, body=said, path_contains="manifests/sha256")
        self.standin.forget_asked()

    def test_that_ecr_does_not_find_just_after_a_push_is_fetched_by_its_tag(self) -> None:
        self.assertWhole(self.get(self.path), self.image.manifest, "MISS")
        self.assertWhole(self.get(self.path), self.image.manifest, "HIT")
        self.assertEqual(2, self.standin.count("registry"))

    def test_a_head_is_answered_as_a_get_is(self) -> None:
        reply = self.head(self.path)
        told = (reply.header("Docker-Content-Digest"), reply.header("Content-Length"), reply.cache)
        self.assertEqual((200, (self.image.digest, str(len(self.image.manifest)), "MISS")), (reply.code, told))
        self.assertEqual(0, self.standin.count("registry", "GET", "latest"), "nothing is transferred for it")

    def test_that_another_repository_has_brought_in_meanwhile_is_confirmed_by_its_tag(self) -> None:
        self.standin.push_image("team/other", "latest")
        self.assertWhole(self.get("/v2/team/other/manifests/latest"), self.image.manifest, "MISS")
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_is_404_where_the_tag_has_moved(self) -> None:
        self.standin.push_image("team/app", "latest", layers=[layer("new", b"")])
        self.assertEqual(404, self.head(self.path).code)
        self.assertRefused(self.get(self.path), 404, "MANIFEST_UNKNOWN")

    def test_is_404_a_minute_later(self) -> None:
        self.pass_time(NAMED_SECONDS)
        self.assertEqual(404, self.head(self.path).code)
        self.assertRefused(self.get(self.path), 404, "MANIFEST_UNKNOWN")

    def test_is_404_for_any_other_and_in_any_other_repository(self) -> None:
        other = self.image.digest.replace(self.image.digest[-4:], "0000")
        for path in (f"/v2/team/app/manifests/{other}", self.path.replace("app", "other")):
            self.assertRefused(self.get(path), 404, "MANIFEST_UNKNOWN")
        self.assertEqual(2, self.standin.count("registry"))
