"""
What ECR does not document, whichever way it is: see docs/ecr.rst.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ecrproxy.documents import SIGNATURES_LIMIT, VALUES_LIMIT
from tests.daemon import DaemonTestCase, Reply, noise
from tests.registry import digest_of
from tests.registry_content import OCI_INDEX, OCI_MANIFEST, SCHEMA2, SIGNED, signed_manifest


class ManifestTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.tag = "/v2/team/app/manifests/latest"
        self.digest = f"/v2/team/app/manifests/{self.image.digest}"

    def answered(self, path: str, headers: Mapping[str, str]) -> Reply:
        """
        Send a request while ECR returns the manifest with other headers.
        """
        fault = self.standin.fail("registry", status=200, headers=headers, body=self.image.manifest)
        reply = self.get(path, Accept=OCI_MANIFEST)
        fault.remove()
        return reply

    def test_vary_changes_nothing_that_clients_get(self) -> None:
        for vary in ("", "Accept", "accept, authorization", "*", "Authorization"):
            self.start()
            headers = {"Content-Type": OCI_MANIFEST, "Vary": vary} if vary else {"Content-Type": OCI_MANIFEST}
            self.assertWhole(self.answered(self.tag, headers), self.image.manifest)
            other = self.get(self.tag, Accept=SCHEMA2)
            self.assertEqual((200, SCHEMA2), (other.code, other.header("Content-Type")))
            self.assertWhole(self.get(self.tag, Accept=OCI_MANIFEST), self.image.manifest, "REVALIDATED")

    def test_a_type_may_have_parameters_or_capitals(self) -> None:
        for said in (OCI_MANIFEST, f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST.upper(), f"{OCI_MANIFEST} ;x=y"):
            for path in (self.tag, self.digest):
                reply = self.answered(path, {"Content-Type": said})
                self.assertWhole(reply, self.image.manifest)
                self.assertEqual(OCI_MANIFEST, reply.header("Content-Type"))

    def test_a_get_may_name_the_digest_or_not(self) -> None:
        for named in ({}, {"Docker-Content-Digest": self.image.digest}):
            reply = self.answered(self.tag, {"Content-Type": OCI_MANIFEST, **named})
            self.assertWhole(reply, self.image.manifest)
            self.assertEqual(self.image.digest, reply.header("Docker-Content-Digest"))

    def test_a_length_may_be_told_or_not(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: " + OCI_MANIFEST.encode() + b"\r\n"
        body = self.image.manifest
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        for rest in (b"Content-Length: %d\r\n\r\n%b" % (len(body), body), chunked, b"Connection: close\r\n\r\n" + body):
            self.start()
            reply = self.daemon.send("GET", self.tag)
            self.answer_with(head + rest)
            self.assertWhole(reply, body)


class SignedTests(DaemonTestCase):
    """
    Registries call a signed manifest of schema 1 by the digest of the signed bytes, which is not that of its bytes.
    """

    def setUp(self) -> None:
        super().setUp()
        self.manifest = self.standin.push_signed("team/app", "old")
        self.path = "/v2/team/app/manifests/"

    def test_a_signed_manifest_has_one_digest_by_tag(self) -> None:
        digest = digest_of(self.manifest.data)
        for _ in range(2):
            for reply in (self.head(self.path + "old"), self.get(self.path + "old")):
                self.assertEqual((200, digest), (reply.code, reply.header("Docker-Content-Digest")))
        self.assertWhole(self.get(self.path + digest), self.manifest.data, "HIT")

    def test_a_get_may_name_the_digest_of_what_is_signed(self) -> None:
        headers = {"Content-Type": SIGNED, "Docker-Content-Digest": self.manifest.digest}
        self.standin.fail("registry", status=200, headers=headers, body=self.manifest.data)
        self.assertWhole(self.get(self.path + "old"), self.manifest.data)

    def test_it_is_there_by_the_digest_of_what_is_signed(self) -> None:
        for _ in range(2):
            for reply in (self.head(self.path + self.manifest.digest), self.get(self.path + self.manifest.digest)):
                self.assertEqual((200, self.manifest.digest), (reply.code, reply.header("Docker-Content-Digest")))
            self.assertEqual(self.manifest.data, bytes(reply.body))
        self.assertFalse(self.has(self.manifest.digest))

    def test_what_is_signed_does_not_stand_for_it(self) -> None:
        """
        The signed bytes have the same digest. Another repository may have brought them into the cache.
        """
        for repository, asked_before in (("team/app", True), ("team/late", False)):
            pushed = self.standin.push_signed(repository)
            document = json.loads(pushed.data)
            del document["signatures"]
            signed = json.dumps(document, indent=3).encode()
            path = f"/v2/{repository}/manifests/{pushed.digest}"
            if asked_before:
                self.assertWhole(self.get(path), pushed.data, "MISS")
            self.assertEqual(pushed.digest, self.standin.push_blob("other/app", signed))
            self.assertWhole(self.get(f"/v2/other/app/blobs/{pushed.digest}"), signed)
            for _ in range(3):
                self.assertWhole(self.get(path), pushed.data)
                self.assertEqual(str(len(pushed.data)), self.head(path).header("Content-Length"))

    def test_a_signature_covers_nothing_else(self) -> None:
        """
        Members that are not signed, and signatures of something else, are wrong bytes.
        """
        data = self.manifest.data
        other = signed_manifest({"schemaVersion": 1, "name": "team/app", "fsLayers": []})
        for body in (
            data.replace(b'"schemaVersion": 1', b'"schemaVersion": 2'),
            data[:-2] + b',"fsLayers": []}',
            data[:-2] + b',"FsLayers": []}',
            other.data,
            b'{"schemaVersion": 1, "signatures": ' + data.partition(b'"signatures": ')[2],
            b'{"signatures": []}',
            b'{"signatures": [{"protected": 1}]}',
            data[:-2] + b', "signature\\u0073": []}',
            b'{"of": ' + data + b"}",
            b'{"signatures": [{"protected": "e30"}]}',
        ):
            headers = {"Content-Type": SIGNED, "Docker-Content-Digest": self.manifest.digest}
            fault = self.standin.fail("registry", status=200, headers=headers, body=body)
            for reference in ("old", self.manifest.digest):
                self.assertRefused(self.get(self.path + reference), 502, "UNAVAILABLE")
            fault.remove()

    def test_one_may_be_as_large_as_any_other(self) -> None:
        for more, status in (("x" * 2**21, 200), ([[]] * (VALUES_LIMIT // 4), 200), ([[]] * VALUES_LIMIT, 502)):
            self.assertEqual(status, self.pulled(more))

    def test_only_its_signatures_are_parsed_in_the_event_loop_and_they_are_short(self) -> None:
        self.assertEqual(200, self.pulled([], "x" * (SIGNATURES_LIMIT - 1000)))
        self.assertEqual(502, self.pulled([], "x" * SIGNATURES_LIMIT))

    def test_the_name_of_the_signatures_may_be_written_elsewhere_too(self) -> None:
        self.assertEqual(200, self.pulled({"signatures": ['"signatures"', ', "signatures": [']}))

    def test_a_signature_of_fewer_or_more_bytes_is_none(self) -> None:
        self.assertEqual(200, self.pulled([], formatTail="CiB9Cg"))  # a line, a space and a line more
        self.assertEqual(502, self.pulled([], formatTail="LCAiYSI6IDF9"))  # , "a": 1}
        self.assertEqual(502, self.pulled([], formatLength=1))

    def pulled(self, history: object, signature: str = "c2lnbmVk", **form: str | int) -> int:
        """
        Return the status for a signed manifest.
        """
        content = {"schemaVersion": 1, "name": "team/app", "history": history}
        manifest = signed_manifest(content, signature, **form)
        headers = {"Content-Type": SIGNED, "Docker-Content-Digest": manifest.digest}
        fault = self.standin.fail("registry", status=200, headers=headers, body=manifest.data)
        code = self.get(self.path + manifest.digest).code
        fault.remove()
        return code


class PageTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")

    def test_tags_may_come_under_any_type(self) -> None:
        body = json.dumps({"name": "team/app", "tags": ["latest"]}).encode()
        for said in ("text/plain; charset=utf-8", "application/json", ""):
            headers = {"Content-Type": said} if said else {}
            fault = self.standin.fail("registry", status=200, headers=headers, body=body)
            reply = self.get("/v2/team/app/tags/list")
            self.assertEqual((200, ["latest"]), (reply.code, json.loads(reply.body)["tags"]))
            fault.remove()

    def test_a_link_that_is_no_url_is_no_answer(self) -> None:
        body = json.dumps({"name": "team/app", "tags": ["latest"]}).encode()
        for link in ("<http://[::1?last=2>; rel=next", "<//[x/?last=2>; rel=next"):
            fault = self.standin.fail("registry", status=200, headers={"Link": link}, body=body)
            for query in ("", "?n=1"):
                self.assertRefused(self.get(f"/v2/team/app/tags/list{query}"), 502, "UNAVAILABLE")
            fault.remove()

    def test_referrers_may_come_whole_or_in_pages(self) -> None:
        path = f"/v2/team/app/referrers/{self.image.digest}"
        body = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
        for link, leads_on in (
            ("", False),
            ('</v2/team/app/referrers/x?nextToken=a%2Bb>; rel="next"', True),
            ("<https://ecr.example/v2/x?last=y>;rel=next", True),
            ('<https://ecr.example/v2/x?last=y>; rel="prev"', False),
        ):
            headers = {"Content-Type": OCI_INDEX, **({"Link": link} if link else {})}
            fault = self.standin.fail("registry", status=200, headers=headers, body=body)
            reply = self.get(path)
            self.assertEqual((200, leads_on), (reply.code, reply.header("Link") is not None), link)
            fault.remove()

    def test_referrers_that_ecr_does_not_know_are_404(self) -> None:
        missing = f"/v2/team/app/referrers/{digest_of(b'missing')}"
        body = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "Requested image not found"}]}'
        self.standin.fail("registry", status=404, body=body)
        self.assertRefused(self.get(missing), 404, "MANIFEST_UNKNOWN", "Requested image not found")


class BlobTests(DaemonTestCase):
    def test_a_head_may_have_any_type(self) -> None:
        data = noise("blob", 1000)
        for number, said in enumerate(("text/plain; charset=utf-8", "text/html", "application/json", "")):
            headers = {"Content-Type": said} if said else {}
            digest = self.standin.push_blob("team/app", data + bytes(number))
            self.standin.push_blob("team/other", data + bytes(number))
            size = len(data) + number
            self.standin.fail("registry", status=200, method="HEAD", headers=headers, body=bytes(size))
            # A HEAD, as prefetch sends; and a blob that another repository has fetched.
            head = self.head(f"/v2/team/app/blobs/{digest}")
            self.assertEqual((200, size), (head.code, head.length), said)
            self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), data + bytes(number), "MISS")
            other = self.get(f"/v2/team/other/blobs/{digest}")
            self.assertWhole(other, data + bytes(number), "REVALIDATED")
            self.standin.heal()
