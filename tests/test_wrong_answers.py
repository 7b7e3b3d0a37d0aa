"""
Wrong answers of ECR and its buckets: never cached, never a complete answer to a client.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping

from tests.daemon import MIB, DaemonTestCase, Reply, noise
from tests.registry import digest_of, layer
from tests.registry_content import OCI_MANIFEST, SCHEMA2

PAGE = b"<html><body>Sign in to continue</body></html>"
HTML = {"Content-Type": "text/html; charset=utf-8"}
BINARY = {"Content-Type": "application/octet-stream"}

Answers = Mapping[str, tuple[int, Mapping[str, str], bytes]]


def wrong(body: bytes, usual: Mapping[str, str]) -> Answers:
    """
    Return ways to answer wrongly to a request for C{body}; C{usual} are the headers of a right answer.
    """
    half = len(body) // 2
    return {
        "wrong bytes": (200, usual, body[:-1] + bytes([body[-1] ^ 1])),
        "short bytes": (200, usual, body[:half]),
        "long bytes": (200, usual, body + b" "),
        "no bytes": (200, usual, b""),
        "an error page": (200, HTML, PAGE),
        "an error page of the right type": (200, usual, PAGE),
        "gzip, said": (200, {**usual, "Content-Encoding": "gzip"}, gzip.compress(body)),
        "gzip, unsaid": (200, usual, gzip.compress(body)),
        "an unknown encoding": (200, {**usual, "Content-Encoding": "br"}, body),
        "an encoding among others": (200, {**usual, "Content-Encoding": "identity, gzip"}, body),
        "a part": (206, {**usual, "Content-Range": f"bytes 0-{half - 1}/{half}"}, body[:half]),
        "a part without its range": (206, usual, body[:half]),
        "another part": (206, {**usual, "Content-Range": f"bytes 1-{half}/{len(body)}"}, body[1 : half + 1]),
        "several parts": (206, {"Content-Type": "multipart/byteranges; boundary=x"}, b"--x\r\n\r\n" + body),
        "nothing there": (204, {}, b""),
        "accepted": (202, usual, b""),
        "not modified": (304, {}, b""),
        "no status that there is": (299, usual, body),
    }


class WrongAnswerTestCase(DaemonTestCase):
    """
    Content that was not requested yet.
    """

    count = 0

    def check(self, answers: Answers, push: Callable[[], tuple[str, bytes]], strike: Callable[..., object]) -> None:
        """
        Send each wrong answer for content of its own, and the right one afterwards.

        @param push: pushes the content; returns its path and its bytes.
        @param strike: has upstream answer so.
        """
        for name, (status, headers, body) in answers.items():
            path, right = push()
            before = self.files()
            strike(status=status, headers=headers, body=body)
            reply = self.daemon.send("GET", path)
            self.pass_time(60)  # all retries are over
            self.assertNoAnswer(name, reply, right)
            self.assertEqual(before, self.files(), name)
            self.standin.heal()
            self.assertWhole(self.get(path), right)
            self.assertEqual(1, len(self.files()) - len(before), name)

    def assertNoAnswer(self, name: str, reply: Reply, right: bytes) -> None:
        """
        Assert that the client has an error, or an answer that it can't take for a complete one.
        """
        if reply.ended == "whole":
            self.assertEqual((502, "UNAVAILABLE"), reply.error[:2], name)
        else:
            self.assertEqual("broken", reply.ended, name)
            self.assertLess(len(reply.body), reply.length or len(right), name)


class HeadTests(DaemonTestCase):
    """
    A HEAD, whose answer no bytes will verify.
    """

    def test_a_page_in_place_of_a_blob_or_a_manifest_does_not_pass(self) -> None:
        """
        Its size and type are those of something else; once upstream works, the right ones are returned.
        """
        image = self.standin.push_image("team/app", "latest")
        blob = noise("blob", 2000)
        digest = self.standin.push_blob("team/app", blob)
        for path, size in (
            (f"/v2/team/app/blobs/{digest}", len(blob)),
            (f"/v2/team/app/manifests/{image.digest}", len(image.manifest)),
            ("/v2/team/app/manifests/latest", len(image.manifest)),
        ):
            self.standin.fail("registry", status=200, headers=HTML, body=PAGE)
            self.assertEqual(502, self.head(path).code, path)
            self.standin.heal()
            well = self.head(path)
            self.assertEqual((200, size), (well.code, well.length), path)


class BlobTests(WrongAnswerTestCase):
    def push(self) -> tuple[str, bytes]:
        """
        Push a blob.
        """
        self.count += 1
        data = noise(f"blob {self.count}", 2000)
        return f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}", data

    def test_from_a_bucket(self) -> None:
        """
        Whatever a bucket sends instead of a blob is rejected and not cached; the next request has the blob.
        """
        answers = wrong(noise("blob", 2000), BINARY)
        self.check(answers, self.push, lambda **answer: self.standin.fail("bucket", **answer))

    def test_from_the_registry_itself(self) -> None:
        """
        The same holds if ECR sends the blob itself.
        """
        answers = wrong(noise("blob", 2000), BINARY)
        self.check(
            answers, self.push, lambda **answer: self.standin.fail("registry", path_contains="/blobs/", **answer)
        )

    def test_larger_than_a_part(self) -> None:
        """
        The same holds for a blob over several connections, and for its parts.
        """
        data = noise("large", 20 * 2**20)
        digest = self.standin.push_blob("team/app", data)
        path = f"/v2/team/app/blobs/{digest}"
        for other in (data[:-1] + b"?", data[:-1], data + b"?", b"?" + data[1:], PAGE, b""):
            self.standin.corrupt(digest, other)
            reply = self.daemon.send("GET", path)
            self.flush()
            self.pass_time(60)
            self.assertNoAnswer(str(len(other)), reply, data)
            self.assertEqual([], self.files())
            self.assertEqual([], self.arriving())
            self.standin.heal()
        self.assertWhole(self.get(path), data)


class ReversedPartTests(DaemonTestCase):
    """
    A bucket that breaks a transfer, and answers the next one with a range that ends before it starts.
    """

    def test_changes_no_byte_that_is_there(self) -> None:
        start, size = MIB + MIB // 2, 2 * MIB
        for said in (f"bytes {start}-64/{size}", f"bytes {start}-0/{size}", f"bytes {start}-{start - 1}/{size}"):
            data = noise(said, size)
            digest = self.standin.push_blob("team/app", data)
            path = f"/v2/team/app/blobs/{digest}"
            self.standin.fail("bucket", status=501)
            self.standin.break_off(start)
            self.get(path)
            self.pass_time(60)
            self.assertEqual(1, len(self.arriving()))
            self.standin.heal()
            # Every byte except those already there is right: only the range can cause them to be written again.
            self.standin.corrupt(digest, bytes(start) + data[start:])
            self.standin.fail("bucket", status=206, headers={"Content-Range": said}, body=b"x" * 65, times=1)
            for _ in range(2):
                reply = self.get(path)
                self.pass_time(60)
                self.assertTrue(reply.code != 200 or reply.ended == "broken" or reply.body == data, said)
            self.standin.heal()
            self.assertWhole(self.get(path), data)


class ManifestTests(WrongAnswerTestCase):
    def push_by(self, name: Callable[[str], str]) -> Callable[[], tuple[str, bytes]]:
        """
        Push manifests, to be requested by C{name} of their digests; each has a tag.
        """

        def push() -> tuple[str, bytes]:
            self.count += 1
            image = self.standin.push_image(
                "team/app", f"v{self.count}", layers=[layer("a", noise(str(self.count), 9))]
            )
            return f"/v2/team/app/manifests/{name(image.digest)}", image.manifest

        return push

    def strike(self, **answer: object) -> None:
        """
        Have ECR answer all requests for manifests so.
        """
        self.standin.fail("registry", path_contains="/manifests/", **answer)  # type: ignore[arg-type]

    def test_by_digest(self) -> None:
        """
        Whatever ECR sends instead of a manifest is rejected and not cached; the next request has the manifest.
        """
        image = self.standin.push_image("team/app", "other")
        answers = dict(wrong(image.manifest, {"Content-Type": OCI_MANIFEST}))
        answers["another manifest"] = (200, {"Content-Type": OCI_MANIFEST}, image.manifest)
        self.check(answers, self.push_by(lambda digest: digest), self.strike)

    def test_by_tag(self) -> None:
        """
        The same holds by tag, where the bytes can be compared only with what ECR says of them.
        """
        image = self.standin.push_image("team/app", "other")
        answers = dict(wrong(image.manifest, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": image.digest}))
        self.check(answers, self.push_by(lambda _: f"v{self.count}"), self.strike)

    def test_of_wrong_type(self) -> None:
        """
        Right bytes under a wrong type, or under none, are no manifest.
        """
        image = self.standin.push_image("team/app", "other")
        for content_type in (SCHEMA2, "application/octet-stream", "text/plain", "application/json", "", "nonsense"):
            headers = {"Content-Type": content_type} if content_type else {}
            reply = self.wrongly(image.digest, headers, image.manifest)
            self.assertRefused(reply, 502, "UNAVAILABLE", "no manifest")
            self.assertEqual([], self.files())
        self.assertWhole(self.get(f"/v2/team/app/manifests/{image.digest}"), image.manifest)

    def test_of_a_digest_that_lies(self) -> None:
        """
        Bytes that don't match ECR's digest are rejected, whichever of the two is wrong.
        """
        image = self.standin.push_image("team/app", "other")
        for named in (digest_of(b"another"), digest_of(b"another", "sha512"), "sha256:x", "md5:1234", "nonsense"):
            headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": named}
            for reference in (image.digest, "other"):
                self.assertRefused(self.wrongly(reference, headers, image.manifest), 502, "UNAVAILABLE")
                self.assertEqual([], self.files())
        self.assertWhole(self.get("/v2/team/app/manifests/other"), image.manifest)

    def test_of_the_truth(self) -> None:
        """
        A right digest of either algorithm is accepted.
        """
        image = self.standin.push_image("team/app", "other")
        for named in (image.digest, digest_of(image.manifest, "sha512")):
            headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": named}
            self.assertWhole(self.wrongly("other", headers, image.manifest), image.manifest)

    def wrongly(self, reference: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """
        Send one request, and have ECR answer so.
        """
        fault = self.standin.fail("registry", status=200, headers=headers, body=body)
        reply = self.get(f"/v2/team/app/manifests/{reference}")
        fault.remove()
        return reply


class PageTests(WrongAnswerTestCase):
    def test_of_tags(self) -> None:
        """
        A list that is incomplete, a redirect or empty is no list.
        """
        self.standin.push_image("team/app", "latest")
        body = json.dumps({"name": "team/app", "tags": ["latest"]}).encode()
        for status in (204, 206, 302, 304):
            fault = self.standin.fail("registry", status=status, body=body)
            self.assertRefused(self.get("/v2/team/app/tags/list"), 502, "UNAVAILABLE")
            fault.remove()
        self.assertEqual(200, self.get("/v2/team/app/tags/list").code)
