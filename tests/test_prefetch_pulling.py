"""
Images pulled through the daemon to fill the cache: what is transferred, retried, and verified.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from threading import Barrier, Lock
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.prefetching.crew import Crew
from ecrproxy.command.prefetching.door import Reply
from ecrproxy.command.prefetching.images import WantedImage, parse_image
from ecrproxy.command.prefetching.pulling import BLOBS, INDEXES, OFFERED, Hands, Puller, PullError
from ecrproxy.oci import Digest
from ecrproxy.platforms import Platform

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
AMD64 = Platform.parse("linux/amd64")
LINUX = {"os": "linux", "architecture": "amd64"}
LAYER = random.Random(1).randbytes(5 * 2**20)


def descriptor(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
    """
    Return a descriptor for content.
    """
    return {"mediaType": kind, "digest": str(Digest.of(data)), "size": len(data), **more}


@dataclass
class Proxy:
    """
    A daemon in memory, as its clients see it.

    @ivar faults: what happens instead of an answer, or to it, once each, by method and path.
    """

    content: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    faults: dict[tuple[str, str], list[Callable[[Reply], Reply]]] = field(default_factory=dict)

    def blob(self, repository: str, data: bytes) -> dict[str, Any]:
        """
        Add a blob.
        """
        self.content[f"/v2/{repository}/blobs/{Digest.of(data)}"] = ("application/octet-stream", data)
        return descriptor("application/vnd.oci.image.layer.v1.tar", data)

    def manifest(self, repository: str, *layers: bytes) -> bytes:
        """
        Add a manifest and what it lists.
        """
        config, *rest = [self.blob(repository, each) for each in (b"{}", *layers)]
        body = json.dumps({"mediaType": MANIFEST, "config": config, "layers": rest}).encode()
        self.content[f"/v2/{repository}/manifests/{Digest.of(body)}"] = (MANIFEST, body)
        return body

    def tag(self, repository: str, tag: str, kind: str, body: bytes) -> WantedImage:
        """
        Add a tag.
        """
        self.content[f"/v2/{repository}/manifests/{tag}"] = (kind, body)
        return parse_image(f"{repository}:{tag}", ())

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        """
        Answer a request.
        """
        self.asked.append((method, path, headers.get("Range", "")))
        reply = self._reply(method, path, headers.get("Range", ""))
        faults = self.faults.get((method, path))
        return faults.pop(0)(reply) if faults else reply

    def _reply(self, method: str, path: str, wanted: str) -> Reply:
        kind, data = self.content.get(path, ("", b""))
        if not kind:
            return refusal(404, "MANIFEST_UNKNOWN", "no such image")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        told = {"content-type": kind, "content-length": str(len(data) - start)}
        told["x-cache-status"] = "HIT" if path in self.cached else "MISS"
        if wanted:
            told["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if method == "HEAD":
            return Reply(200, told, lambda _: b"")
        if "/blobs/" in path:
            self.cached.add(path)
        return Reply(206 if wanted else 200, told, BytesIO(data[start:]).read)


def refusal(status: int, code: str, message: str, **headers: str) -> Reply:
    """
    Reject a request as registries do.
    """
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, BytesIO(body).read)


def broken_after(size: int) -> Callable[[Reply], Reply]:
    """
    Send only so many bytes of an answer.
    """

    def fault(reply: Reply) -> Reply:
        return Reply(reply.status, reply.headers, BytesIO(reply.read(size)).read)

    return fault


def instead(reply: Reply, _: Reply) -> Reply:
    """
    Send another answer.
    """
    return reply


def away(_: Reply) -> Reply:
    """
    Send no answer.
    """
    raise ConnectionRefusedError(111, "Connection refused")


class PullerTests(SynchronousTestCase):
    """
    One image, pulled.
    """

    def setUp(self) -> None:
        """
        Create a daemon, and a clock without real waiting.
        """
        self.proxy = Proxy()
        self.slept: list[float] = []
        self.moved: list[int] = []
        self.said: list[str] = []
        hands = Hands(self.proxy.ask, lambda: sum(self.slept), self.slept.append, lambda: 1.0, self.said.append)
        self.puller = Puller(hands, [AMD64], self.moved.append)

    def pull(self, image: WantedImage) -> list[bool]:
        """
        Pull the image, and return for each blob whether it was transferred.
        """
        return [self.puller.bring(route, size) for route, size in self.puller.plan(image).blobs.items()]

    def refused(self, image: WantedImage) -> str:
        """
        Return why an image can't be pulled.
        """
        with self.assertRaises(PullError) as raised:
            self.pull(image)
        return str(raised.exception)

    def image(self, *layers: bytes) -> WantedImage:
        """
        Add an image.
        """
        return self.proxy.tag("app", "1", MANIFEST, self.proxy.manifest("app", *layers))

    def layer_path(self) -> str:
        """
        Return the path of the layer.
        """
        return f"/v2/app/blobs/{Digest.of(LAYER)}"

    def test_manifest_config_and_layers_are_pulled(self) -> None:
        """
        Everything that a client would request has been requested once.
        """
        self.assertEqual([True, True], self.pull(self.image(LAYER)))
        self.assertEqual(len(LAYER) + 2, sum(self.moved))
        gets = [path for method, path, _ in self.proxy.asked if method == "GET"]
        self.assertEqual(["/v2/app/manifests/1", self.layer_path(), f"/v2/app/blobs/{Digest.of(b'{}')}"], gets)

    def test_what_is_in_the_cache_is_not_moved(self) -> None:
        """
        The second run transfers nothing.
        """
        image = self.image(LAYER)
        self.pull(image)
        self.moved.clear()
        self.assertEqual([False, False], self.pull(image))
        self.assertEqual([], self.moved)

    def test_of_an_index_the_platforms_manifest_is_pulled(self) -> None:
        """
        No other platform's manifests or layers are requested.
        """
        ours, other = (self.proxy.manifest("app", each) for each in (b"ours", b"other"))
        kinds = [(other, "arm64"), (ours, "amd64")]
        listed = [descriptor(MANIFEST, body, platform={"os": "linux", "architecture": each}) for body, each in kinds]
        index = json.dumps({"mediaType": INDEX, "manifests": listed}).encode()
        image = self.proxy.tag("app", "2", INDEX, index)
        plan = self.puller.plan(image)
        self.assertEqual(2, plan.manifests)
        self.assertEqual({Digest.of(b"{}"), Digest.of(b"ours")}, {route.digest for route in plan.blobs})
        everything = Puller(Hands(self.proxy.ask, lambda: 0, self.slept.append, lambda: 0), [], self.moved.append)
        self.assertEqual((3, 3), (everything.plan(image).manifests, len(everything.plan(image).blobs)))

    def test_an_index_that_lists_itself_ends(self) -> None:
        """
        Each manifest is visited once, whatever lists it.
        """
        inner = json.dumps({"mediaType": INDEX, "manifests": []}).encode()
        self.proxy.content[f"/v2/app/manifests/{Digest.of(inner)}"] = (INDEX, inner)
        twice = [descriptor(INDEX, inner, platform={"os": "linux", "architecture": "amd64"})] * 2
        image = self.proxy.tag("app", "3", INDEX, json.dumps({"mediaType": INDEX, "manifests": twice}).encode())
        everything = Puller(Hands(self.proxy.ask, lambda: 0, self.slept.append, lambda: 0), [], self.moved.append)
        self.assertEqual(2, everything.plan(image).manifests)
        self.assertIn("not for linux/amd64", self.refused(image))

    def index(self, *listed: dict[str, Any]) -> dict[str, Any]:
        """
        Add an index, and return its descriptor.
        """
        body = json.dumps({"mediaType": INDEX, "manifests": listed}).encode()
        self.proxy.content[f"/v2/app/manifests/{Digest.of(body)}"] = (INDEX, body)
        return descriptor(INDEX, body)

    def nested(self, *listed: dict[str, Any]) -> WantedImage:
        """
        Tag an index.
        """
        return self.proxy.tag("app", "4", INDEX, json.dumps({"mediaType": INDEX, "manifests": listed}).encode())

    def test_what_goes_with_a_platforms_image_is_pulled_with_it_and_never_instead(self) -> None:
        """
        SOCI's index of version 2 has the platform of its image, and nodes ask for both.
        """
        image, soci, other = (self.proxy.manifest("a", each) for each in (LAYER, b"ztoc", b"another's ztoc"))
        kind = "application/vnd.amazon.soci.index.v2+json"
        entries = [
            descriptor(MANIFEST, soci, artifactType=kind, platform=LINUX),
            descriptor(MANIFEST, other, artifactType=kind, platform={**LINUX, "architecture": "arm64"}),
            descriptor(MANIFEST, image, artifactType="application/vnd.oci.image.config.v1+json", platform=LINUX),
        ]
        body = json.dumps({"mediaType": INDEX, "manifests": entries}).encode()
        self.pull(self.proxy.tag("a", "latest", INDEX, body))
        asked = {path for _, path, _ in self.proxy.asked}
        for data in (LAYER, b"ztoc"):
            self.assertIn(f"/v2/a/blobs/{Digest.of(data)}", asked)
        self.assertNotIn(f"/v2/a/manifests/{Digest.of(other)}", asked)

    def test_a_platform_is_found_in_an_index_of_indexes(self) -> None:
        ours, other = (self.proxy.manifest("app", each) for each in (b"ours", b"other"))
        linux = {"os": "linux", "architecture": "amd64"}
        inner = self.index(
            descriptor(MANIFEST, other, platform={"os": "linux", "architecture": "arm64"}),
            descriptor(MANIFEST, ours, platform=linux),
        )
        for image in (self.nested(inner), self.nested(self.index(inner)), self.nested({**inner, "platform": linux})):
            plan = self.puller.plan(image)
            self.assertEqual({Digest.of(b"{}"), Digest.of(b"ours")}, {route.digest for route in plan.blobs})

    def test_what_an_inner_index_lists_without_a_platform_is_for_that_of_the_index(self) -> None:
        ours, other = (self.proxy.manifest("app", each) for each in (b"ours", b"other"))
        kinds = [(other, "arm64"), (ours, "amd64")]
        listed = [
            {**self.index(descriptor(MANIFEST, body)), "platform": {"os": "linux", "architecture": each}}
            for body, each in kinds
        ]
        plan = self.puller.plan(self.nested(*listed))
        self.assertEqual({Digest.of(b"{}"), Digest.of(b"ours")}, {route.digest for route in plan.blobs})
        self.assertEqual([], [path for _, path, _ in self.proxy.asked if path.endswith(listed[0]["digest"])])

    def test_what_is_listed_without_a_platform_is_pulled_where_nothing_is_for_the_platform(self) -> None:
        """
        An index may omit it. Docker, containerd and podman use such an image; C{unknown} marks an attestation.
        """
        plain, other, noted = (descriptor(MANIFEST, self.proxy.manifest("app", each)) for each in (b"1", b"2", b"3"))
        arm = {**other, "platform": {"os": "linux", "architecture": "arm64"}}
        attestation = {**noted, "platform": {"os": "unknown", "architecture": "unknown"}}
        for listed in ([plain], [arm, plain, attestation], [self.index(plain), attestation]):
            plan = self.puller.plan(self.nested(*listed))
            self.assertEqual({Digest.of(b"{}"), Digest.of(b"1")}, {route.digest for route in plan.blobs})
        ours = {**other, "platform": LINUX}
        plan = self.puller.plan(self.nested(plain, ours))
        self.assertEqual({Digest.of(b"{}"), Digest.of(b"2")}, {route.digest for route in plan.blobs})
        self.assertIn("not for linux/amd64; its platforms: none", self.refused(self.nested(attestation)))

    def test_an_index_that_is_listed_many_times_is_asked_for_once(self) -> None:
        """
        A hostile image of a few hundred kilobytes kept the command busy for ever.
        """
        image = descriptor(MANIFEST, self.proxy.manifest("app", b"ours"), platform=LINUX)
        inner = self.index(*[{**image, "annotations": {"n": str(number)}} for number in range(400)])
        plan = self.puller.plan(self.nested(*[inner] * 400))
        self.assertEqual((3, 2), (plan.manifests, len(plan.blobs)))
        self.assertEqual(3, len(self.proxy.asked))

    def test_an_index_is_looked_at_for_each_platform_that_it_is_listed_for(self) -> None:
        inner = self.index(descriptor(MANIFEST, self.proxy.manifest("app", b"ours")))
        arm = {"os": "linux", "architecture": "arm64"}
        image = self.nested({**inner, "platform": arm}, {**inner, "platform": LINUX})
        everything = Puller(Hands(self.proxy.ask, lambda: 0, self.slept.append, lambda: 0), [], self.moved.append)
        self.assertEqual((2, 3), (len(self.puller.plan(image).blobs), everything.plan(image).manifests))

    def test_an_image_that_lists_more_than_anybody_pulls_is_refused(self) -> None:
        """
        There are maximum numbers of indexes, manifests and blobs.
        """
        many = [{**self.index(), "digest": str(Digest.of(b"%d" % number))} for number in range(BLOBS + 1)]
        self.assertEqual("lists more than 100 indexes", self.refused(self.nested(*many[: INDEXES + 1])))
        images = [{**each, "mediaType": MANIFEST} for each in many[: OFFERED + 1]]
        self.assertEqual("lists more than 1000 manifests", self.refused(self.nested(*images)))
        layers = [{**each, "mediaType": "application/vnd.oci.image.layer.v1.tar"} for each in many]
        inner = [self.index(*layers[at : at + 10_000]) for at in range(0, len(layers), 10_000)]
        self.assertEqual("lists more than 100000 blobs", self.refused(self.nested(*inner)))

    def test_of_many_platforms_a_few_are_named(self) -> None:
        image = descriptor(MANIFEST, self.proxy.manifest("app", b"ours"))
        kinds = [{"os": "linux", "architecture": f"{'x' * 999}{number}"} for number in range(500)]
        said = self.refused(self.nested(*[{**image, "platform": kind} for kind in kinds]))
        self.assertLess(len(said), 2000)
        self.assertTrue(said.endswith("and 480 more"), said)

    def test_what_is_no_manifest_is_not_asked_for_again(self) -> None:
        """
        Its digest names these bytes: a retry returns the same.
        """
        image = self.image()
        odd = refusal(502, "UNAVAILABLE", "what ECR gave is no manifest", x_cache_reason="no-manifest")
        self.proxy.faults["GET", "/v2/app/manifests/1"] = [lambda _: odd]
        self.assertEqual("UNAVAILABLE: what ECR gave is no manifest", self.refused(image))
        self.assertEqual([], self.slept)

    def test_a_platform_that_is_in_no_inner_index_is_told_with_those_that_are(self) -> None:
        arm = {"os": "linux", "architecture": "arm64"}
        inner = self.index(descriptor(MANIFEST, self.proxy.manifest("app", b"other"), platform=arm))
        self.assertEqual("not for linux/amd64; its platforms: linux/arm64", self.refused(self.nested(inner)))

    def test_a_cache_of_buildkit_is_pulled_as_the_blobs_that_it_lists(self) -> None:
        layers = [self.proxy.blob("app", each) for each in (b"one", b"two")]
        config = self.proxy.blob("app", b"{}") | {"mediaType": "application/vnd.buildkit.cacheconfig.v0"}
        image = self.nested(*layers, config)
        self.assertEqual([True, True, True], self.pull(image))
        self.assertEqual([False, False, False], self.pull(image))

    def test_a_broken_download_goes_on_where_it_was(self) -> None:
        """
        Nothing is transferred twice, and the whole is verified.
        """
        image = self.image(LAYER)
        self.proxy.faults["GET", self.layer_path()] = [broken_after(3 * 2**20), away]
        self.assertEqual([True, True], self.pull(image))
        ranges = [wanted for method, path, wanted in self.proxy.asked if method == "GET" and path == self.layer_path()]
        self.assertEqual(["", "bytes=3145728-", "bytes=3145728-"], ranges)
        self.assertEqual(len(LAYER) + 2, sum(self.moved))

    def test_tries_count_anew_when_bytes_have_come(self) -> None:
        """
        A connection that breaks often is not dead.
        """
        image = self.image(LAYER)
        self.proxy.faults["GET", self.layer_path()] = [broken_after(2**18) for _ in range(15)]
        self.assertEqual([True, True], self.pull(image))
        self.assertEqual([1.0] * 15, self.slept)

    def test_a_proxy_that_sends_all_again_is_followed(self) -> None:
        """
        Bytes that come twice are hashed once, and counted once.
        """
        image = self.image(LAYER)
        whole = Reply(200, {}, BytesIO(LAYER).read)
        self.proxy.faults["GET", self.layer_path()] = [broken_after(2**20), lambda _: whole]
        self.assertEqual([True, True], self.pull(image))
        self.assertEqual(len(LAYER) + 2, sum(self.moved))

    def test_waits_are_as_long_as_the_proxy_says(self) -> None:
        """
        Retry-After is honoured, and the reason is shown.
        """
        image = self.image()
        busy = refusal(429, "TOOMANYREQUESTS", "ECR throttles the proxy", retry_after="7")
        self.proxy.faults["GET", "/v2/app/manifests/1"] = [lambda _: busy]
        self.pull(image)
        self.assertEqual([8.0], self.slept)
        self.assertEqual(["app:1: TOOMANYREQUESTS: ECR throttles the proxy; again in 8 s"], self.said)

    def test_tries_have_an_end(self) -> None:
        """
        A proxy that stays down fails the image, after growing waits.
        """
        image = self.image()
        self.proxy.faults["GET", "/v2/app/manifests/1"] = [away] * 10
        self.assertIn("Connection refused", self.refused(image))
        self.assertEqual([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], self.slept)

    def test_a_daemon_that_is_restarted_has_a_minute(self) -> None:
        """
        Whatever the jitter.
        """
        image = self.image()
        self.proxy.faults["GET", "/v2/app/manifests/1"] = [away] * 10
        unlucky = Hands(self.proxy.ask, lambda: sum(self.slept), self.slept.append, lambda: 0.0)
        with self.assertRaises(PullError):
            Puller(unlucky, [], self.moved.append).plan(image)
        self.assertGreater(sum(self.slept), 60)

    def test_what_the_proxy_refuses_is_told_at_once(self) -> None:
        """
        In the proxy's own words, without a retry.
        """
        self.assertEqual("MANIFEST_UNKNOWN: no such image", self.refused(parse_image("app:none", ())))
        self.assertEqual([], self.slept)

    def test_wrong_bytes_are_no_success(self) -> None:
        """
        Neither those of a blob, nor too many of them, nor those of a manifest.
        """
        image = self.image(LAYER)
        for wrong in (LAYER[:-1] + b"!", LAYER + b"!"):
            reply = Reply(200, {}, BytesIO(wrong).read)
            self.proxy.faults["GET", self.layer_path()] = [partial(instead, reply)]
            self.assertIn("the content does not match sha256:", self.refused(image))
            self.proxy.cached.clear()
        digest = Digest.of(self.proxy.content["/v2/app/manifests/1"][1])
        self.proxy.content[f"/v2/app/manifests/{digest}"] = (MANIFEST, b"{}")
        self.assertIn("the manifest does not match", self.refused(parse_image(f"app@{digest}", ())))

    def test_another_part_than_was_asked_for_is_refused(self) -> None:
        """
        Other bytes would not fit together.
        """
        image = self.image(LAYER)
        odd = Reply(206, {"content-range": "bytes 0-9/10"}, BytesIO(b"0123456789").read)
        self.proxy.faults["GET", self.layer_path()] = [broken_after(2**20), lambda _: odd]
        self.assertIn("another range", self.refused(image))

    def test_a_manifest_that_breaks_off_is_asked_for_again(self) -> None:
        """
        An incomplete manifest is useless.
        """
        image = self.image()
        self.proxy.faults["GET", "/v2/app/manifests/1"] = [broken_after(10)]
        self.assertEqual([True], self.pull(image))


class CrewTests(SynchronousTestCase):
    """
    Several at a time.
    """

    def test_each_is_done_once_and_failures_are_results(self) -> None:
        """
        A failure does not affect the others.
        """

        def do(number: int) -> int:
            if number == 3:
                raise PullError("three")
            return number * 2

        found = dict(Crew(4).each(range(10), do))
        self.assertIsInstance(found.pop(3), PullError)
        self.assertEqual({number: number * 2 for number in range(10) if number != 3}, found)

    def test_news_are_told_in_the_callers_thread_before_the_result(self) -> None:
        """
        Progress of a task is reported before its result, in order.
        """
        crew, told = Crew(1), list[int]()

        def do(number: int) -> None:
            crew.tell(lambda: told.append(number))

        for number, _ in crew.each([1, 2, 3], do):
            self.assertIn(number, told)
        self.assertEqual([1, 2, 3], told)

    def test_as_many_are_done_at_a_time_as_was_said(self) -> None:
        """
        No more, and no fewer: each waits here for two others.
        """
        meeting, lock, at_work, most = Barrier(3), Lock(), set[int](), [0]

        def do(number: int) -> None:
            with lock:
                at_work.add(number)
                most.append(len(at_work))
            meeting.wait(60)
            with lock:
                at_work.remove(number)

        outcomes = [outcome for _, outcome in Crew(3).each(range(6), do)]
        self.assertEqual([None] * 6, outcomes)
        self.assertEqual(3, max(most))
        self.assertEqual([], list(Crew(3).each([], do)))
