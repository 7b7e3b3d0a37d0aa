"""
The stand-in for ECR behaves as ECR does, or no other test proves anything.
"""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from treq.testing import RequestTraversalAgent
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone, ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from tests.registry import StandIn, digest_of
from tests.registry_bucket import byte_range
from tests.registry_content import (
    OCI_INDEX,
    OCI_MANIFEST,
    SCHEMA2,
    SCHEMA2_CONFIG,
    SCHEMA2_GZIP,
    Manifest,
    accepted,
    negotiated,
)

START = 1_767_225_600.0
"""A time in January 2026: dates in or before 1970 hide mistakes."""
TRAVERSAL: Any = RequestTraversalAgent  # treq.testing is not annotated
BLOB = bytes(range(256)) * 400


class StandInTests(SynchronousTestCase):
    """
    A client and a server without a socket between them.
    """

    def setUp(self) -> None:
        """
        Create a stand-in, an agent that reaches it, and a token that it accepts.
        """
        self.clock = Clock()
        self.clock.advance(START)
        self.standin = StandIn(self.clock)
        self.agent = TRAVERSAL(self.standin.resource)
        self.token = self.standin.issue_token()

    def ask(self, url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Deferred[IResponse]:
        """
        Send one request; underscores in header names stand for hyphens.
        """
        fields = Headers({name.replace("_", "-"): [value] for name, value in headers.items()})
        producer = None if body is None else Whole(body)
        asking: Deferred[IResponse] = self.agent.request(method.encode(), url.encode(), fields, producer)
        return asking

    def answer(self, url: str, method: str = "GET", **headers: str) -> IResponse:
        """
        Send one request whose headers are answered at once.
        """
        return self.successResultOf(self.ask(url, method, None, **headers))

    def registry(self, path: str, method: str = "GET", **headers: str) -> IResponse:
        """
        Send a request to the registry with a valid token.
        """
        headers.setdefault("authorization", f"Basic {self.token}")
        return self.answer(f"{self.standin.registry}{path}", method, **headers)

    def body(self, response: IResponse) -> bytes:
        """
        Return the whole body of a response that has already arrived.
        """
        return self.successResultOf(Body(response).done)

    def signed_url(self, digest: str, repository: str = "app") -> str:
        """
        Return the URL to which the registry redirects for a blob.
        """
        response = self.registry(f"/v2/{repository}/blobs/{digest}")
        self.assertEqual(307, response.code)
        return header(response, "location") or ""

    def refused(self, response: IResponse) -> tuple[int, str, str]:
        """
        Return status, code and message of the registry's refusal.
        """
        (error,) = json.loads(self.body(response))["errors"]
        return response.code, error["code"], error["message"]


@implementer(IBodyProducer)
class Whole:
    """
    A request body that is sent at once, so that no reactor is needed.
    """

    def __init__(self, data: bytes) -> None:
        self.length = len(data)
        self._data = data

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._data)
        return succeed(None)

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        pass


class Body(Protocol):
    """
    A response body as it arrives, and how it ended.
    """

    def __init__(self, response: IResponse) -> None:
        self.data = b""
        self.done: Deferred[bytes] = Deferred()
        response.deliverBody(self)

    def dataReceived(self, data: bytes) -> None:
        """
        Keep the received bytes.
        """
        self.data += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """
        Record whether it was complete.
        """
        if reason.check(ResponseDone):
            self.done.callback(self.data)
        else:
            self.done.errback(reason)

    def leave(self) -> None:
        """
        Close the connection.
        """
        self.transport.loseConnection()  # type: ignore[union-attr]


def header(response: IResponse, name: str) -> str | None:
    """
    Return the only value of a response header.
    """
    values = response.headers.getRawHeaders(name.encode())
    return values[0].decode() if values else None


class TokenTests(StandInTests):
    """
    Authorization at the registry, and its refusals.
    """

    def test_challenges_who_shows_nothing(self) -> None:
        """
        Without a token the answer is 401 with a Basic challenge in plain text.
        """
        response = self.answer(f"{self.standin.registry}/v2/")
        self.assertEqual(401, response.code)
        self.assertEqual(
            f'Basic realm="{self.standin.registry}/",service="ecr.amazonaws.com"',
            header(response, "www-authenticate"),
        )
        self.assertIn(b"Not Authorized", self.body(response))

    def test_a_strange_token_is_a_bad_request(self) -> None:
        """
        A token that was never issued gets 400, without a challenge.
        """
        response = self.registry("/v2/", authorization="Basic bm90OmlzdWVk")
        self.assertEqual((400, None), (response.code, header(response, "www-authenticate")))

    def test_a_token_lasts_twelve_hours(self) -> None:
        """
        After twelve hours by the clock a token is rejected as expired.
        """
        self.clock.advance(12 * 3600 - 1)
        self.assertEqual(200, self.registry("/v2/").code)
        self.clock.advance(1)
        status, code, message = self.refused(self.registry("/v2/"))
        self.assertEqual((403, "DENIED"), (status, code))
        self.assertIn("Your authorization token has expired", message)

    def test_tokens_end_on_demand(self) -> None:
        """
        Expired tokens get 403, forgotten ones 400, and a new one is valid.
        """
        self.standin.expire_tokens()
        self.assertEqual(403, self.registry("/v2/").code)
        self.standin.forget_tokens()
        self.assertEqual(400, self.registry("/v2/").code)
        self.token = self.standin.issue_token()
        self.assertEqual(200, self.registry("/v2/").code)

    def test_a_token_names_its_user(self) -> None:
        """
        A token is base64 of AWS, a colon and a password.
        """
        self.assertTrue(base64.b64decode(self.token).startswith(b"AWS:"))


class ApiTests(StandInTests):
    """
    The AWS calls, on any host that is neither registry nor bucket.
    """

    def call(self, body: bytes, **headers: str) -> IResponse:
        """
        Make one AWS call.
        """
        url = "https://api.ecr.eu-west-1.amazonaws.com/"
        return self.successResultOf(self.ask(url, "POST", body, **headers))

    def test_gives_tokens_the_registry_takes(self) -> None:
        """
        GetAuthorizationToken returns a usable token, its expiry, and where to use it.
        """
        target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
        signed = "AWS4-HMAC-SHA256 Credential=x"
        response = self.call(b"{}", x_amz_target=target, authorization=signed)
        (data,) = json.loads(self.body(response))["authorizationData"]
        self.assertEqual(START + 12 * 3600, data["expiresAt"])
        self.assertEqual(self.standin.registry, data["proxyEndpoint"])
        basic = f"Basic {data['authorizationToken']}"
        self.assertEqual(200, self.registry("/v2/", authorization=basic).code)
        self.assertEqual(1, self.standin.count("api", "POST"))

    def test_wants_calls_signed(self) -> None:
        """
        A call without a signature is rejected.
        """
        target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
        self.assertEqual(400, self.call(b"{}", x_amz_target=target).code)

    def test_says_who_one_is(self) -> None:
        """
        STS returns the caller's identity in XML.
        """
        signed = "AWS4-HMAC-SHA256 Credential=x"
        body = b"Action=GetCallerIdentity&Version=2011-06-15"
        self.assertIn(b"<Account>123456789012<", self.body(self.call(body, authorization=signed)))

    def test_shows_what_was_asked(self) -> None:
        """
        The list of requests can be read over HTTP, and reading it is not recorded.
        """
        self.registry("/v2/")
        shown = json.loads(self.body(self.answer("http://localhost:1/_asked")))
        self.assertEqual(["/v2/"], [asked["target"] for asked in shown["asked"]])
        self.assertEqual(1, self.standin.count())


class ManifestTests(StandInTests):
    def test_get_says_no_digest_and_head_does(self) -> None:
        """
        ECR leaves Docker-Content-Digest out of a GET, of all methods.
        """
        image = self.standin.push_image("team/app", "v1")
        for reference in ("v1", image.digest):
            got = self.registry(f"/v2/team/app/manifests/{reference}")
            head = self.registry(f"/v2/team/app/manifests/{reference}", "HEAD")
            self.assertEqual(image.manifest, self.body(got))
            self.assertIsNone(header(got, "docker-content-digest"))
            self.assertEqual(image.digest, header(head, "docker-content-digest"))
            self.assertEqual(str(len(image.manifest)), header(head, "content-length"))
            self.assertEqual(OCI_MANIFEST, header(head, "content-type"))
            self.assertEqual("registry/2.0", header(got, "docker-distribution-api-version"))

    def test_a_tag_is_converted_for_who_wants_the_other_kind(self) -> None:
        """
        By tag an OCI image becomes a schema2 one, with another digest that leads nowhere.
        """
        image = self.standin.push_image("app", "v1")
        response = self.registry("/v2/app/manifests/v1", accept=SCHEMA2)
        data = self.body(response)
        self.assertEqual(SCHEMA2, header(response, "content-type"))
        self.assertEqual(SCHEMA2_CONFIG, json.loads(data)["config"]["mediaType"])
        self.assertEqual(SCHEMA2_GZIP, json.loads(data)["layers"][0]["mediaType"])
        self.assertNotEqual(image.digest, digest_of(data))
        head = self.registry("/v2/app/manifests/v1", "HEAD", accept=SCHEMA2)
        self.assertEqual(digest_of(data), header(head, "docker-content-digest"))
        gone = self.registry(f"/v2/app/manifests/{digest_of(data)}")
        self.assertEqual((404, "MANIFEST_UNKNOWN"), self.refused(gone)[:2])

    def test_a_digest_is_never_converted(self) -> None:
        """
        By digest the bytes are the stored ones, whatever the client accepts.
        """
        image = self.standin.push_image("app", "v1", media_type=SCHEMA2)
        response = self.registry(f"/v2/app/manifests/{image.digest}", accept=OCI_MANIFEST)
        self.assertEqual(image.manifest, self.body(response))

    def test_an_index_leads_to_its_images(self) -> None:
        """
        An index names each image with its platform, and is never converted.
        """
        images = [self.standin.push_image("m", platform=f"linux/{cpu}") for cpu in ("amd64", "arm64")]
        self.standin.push_index("m", "latest", images)
        response = self.registry("/v2/m/manifests/latest", accept=f"{OCI_INDEX}, {SCHEMA2}")
        entries = json.loads(self.body(response))["manifests"]
        self.assertEqual([image.digest for image in images], [entry["digest"] for entry in entries])
        self.assertEqual(OCI_INDEX, header(response, "content-type"))

    def test_unknown_names_and_images(self) -> None:
        """
        ECR says in its own words which of the two is unknown.
        """
        self.standin.push_image("app", "v1")
        name = self.refused(self.registry("/v2/nope/manifests/v1"))
        text = "The repository with name 'nope' does not exist in the registry with id '123456789012'"
        self.assertEqual((404, "NAME_UNKNOWN", text), name)
        image = self.refused(self.registry("/v2/app/manifests/v2"))
        self.assertEqual((404, "MANIFEST_UNKNOWN", "Requested image not found"), image)

    def test_deleting(self) -> None:
        """
        A deleted tag leaves the manifest; a deleted manifest removes its tags.
        """
        image = self.standin.push_image("app", "v1", "v2")
        self.standin.delete_tag("app", "v1")
        self.assertEqual(404, self.registry("/v2/app/manifests/v1").code)
        self.assertEqual(200, self.registry(f"/v2/app/manifests/{image.digest}").code)
        self.standin.delete_manifest("app", image.digest)
        self.assertEqual(404, self.registry("/v2/app/manifests/v2").code)

    def test_nothing_can_be_changed(self) -> None:
        """
        Methods other than GET and HEAD are recorded and rejected.
        """
        self.standin.push_image("app", "v1")
        self.assertEqual(405, self.registry("/v2/app/manifests/v1", "DELETE").code)
        self.assertEqual(1, self.standin.count("registry", "DELETE", "manifests/v1"))


class NegotiationTests(SynchronousTestCase):
    """
    Which kind of manifest is sent.
    """

    def test_reads_accept(self) -> None:
        """
        Parameters are dropped, and types of weight 0 are left out.
        """
        self.assertEqual({"a/b", "c/d"}, accepted("A/b;q=0.5, c/d , e/f;q=0"))

    def test_anything_means_the_stored_kind(self) -> None:
        """
        Without an Accept header, or with a wildcard or the stored kind in it, nothing changes.
        """
        stored = Manifest(b"{}", OCI_MANIFEST)
        for accept in (None, "", "*/*", f"{SCHEMA2}, {OCI_MANIFEST}", "application/*"):
            self.assertIs(stored, negotiated(stored, accept))

    def test_what_has_no_twin_goes_out_as_it_is(self) -> None:
        """
        A layer without an equivalent in Docker's types keeps the whole manifest unchanged.
        """
        zstd = b'{"config": {"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd"}}'
        stored = Manifest(zstd, OCI_MANIFEST)
        self.assertIs(stored, negotiated(stored, SCHEMA2))

    def test_there_and_back(self) -> None:
        """
        Converting to schema2 and back restores the types.
        """
        image = StandIn(Clock()).push_image("app")
        there = negotiated(Manifest(image.manifest, OCI_MANIFEST), SCHEMA2)
        self.assertEqual(json.loads(image.manifest), negotiated(there, OCI_MANIFEST).parsed())


class BlobTests(StandInTests):
    """
    The registry's redirect and the bucket behind it.
    """

    def setUp(self) -> None:
        """
        Push a blob into one repository.
        """
        super().setUp()
        self.digest = self.standin.push_blob("app", BLOB)

    def test_comes_from_the_bucket(self) -> None:
        """
        The redirect leads to all the bytes, and the bucket counts them.
        """
        response = self.answer(self.signed_url(self.digest))
        self.assertEqual(BLOB, self.body(response))
        self.assertEqual((200, len(BLOB)), (response.code, response.length))
        self.assertEqual("bytes", header(response, "accept-ranges"))
        self.assertEqual(len(BLOB), self.standin.bytes_sent)
        self.assertEqual(1, self.standin.count("bucket", "GET", self.digest))

    def test_the_url_looks_like_s3(self) -> None:
        """
        The URL has date, lifetime and credential, escaped as S3 does it.
        """
        url = self.signed_url(self.digest)
        query = parse_qs(urlsplit(url).query)
        self.assertTrue(url.startswith(f"{self.standin.bucket}/"))
        self.assertEqual(["20260101T000000Z"], query["X-Amz-Date"])
        self.assertEqual(["3600"], query["X-Amz-Expires"])
        self.assertEqual(["host"], query["X-Amz-SignedHeaders"])
        self.assertIn("%2F20260101%2Feu-west-1%2Fs3%2Faws4_request", url)
        self.assertNotIn(self.digest.partition(":")[2], url)

    def test_the_bucket_wants_its_url_untouched(self) -> None:
        """
        A changed query, a HEAD, and a URL without its query are all rejected.
        """
        url = self.signed_url(self.digest)
        for method, changed in (
            ("GET", url.replace("3600", "7200")),
            ("GET", url.replace("%2F", "/")),
            ("HEAD", url),
            ("GET", url.partition("?")[0]),
        ):
            self.assertEqual(403, self.answer(changed, method).code)

    def test_the_bucket_wants_one_credential(self) -> None:
        """
        An Authorization header beside the signed URL is one too many.
        """
        response = self.answer(self.signed_url(self.digest), authorization=f"Basic {self.token}")
        self.assertEqual(400, response.code)
        self.assertIn(b"Only one auth mechanism allowed", self.body(response))

    def test_a_url_lasts_an_hour(self) -> None:
        """
        After an hour, or when told to, the bucket rejects what the registry signed.
        """
        url = self.signed_url(self.digest)
        self.clock.advance(3599)
        self.assertEqual(200, self.answer(url).code)
        self.clock.advance(1)
        self.assertIn(b"Request has expired", self.body(self.answer(url)))
        url = self.signed_url(self.digest)
        self.standin.expire_urls()
        self.assertEqual(403, self.answer(url).code)
        self.assertEqual(200, self.answer(self.signed_url(self.digest)).code)

    def test_ranges(self) -> None:
        """
        One range is honoured, several mean everything, and an unsatisfiable one is 416.
        """
        url = self.signed_url(self.digest)
        part = self.answer(url, range="bytes=10-19")
        self.assertEqual((206, BLOB[10:20]), (part.code, self.body(part)))
        self.assertEqual(f"bytes 10-19/{len(BLOB)}", header(part, "content-range"))
        self.assertEqual(BLOB[-5:], self.body(self.answer(url, range="bytes=-5")))
        self.assertEqual(200, self.answer(url, range="bytes=0-1,5-6").code)
        beyond = self.answer(url, range=f"bytes={len(BLOB)}-")
        self.assertEqual((416, f"bytes */{len(BLOB)}"), (beyond.code, header(beyond, "content-range")))
        self.standin.quirks.ignore_range = True
        self.assertEqual(BLOB, self.body(self.answer(url, range="bytes=10-19")))

    def test_conditions(self) -> None:
        """
        Another ETag makes If-Match fail and If-Range mean everything.
        """
        url = self.signed_url(self.digest)
        etag = header(self.answer(url), "etag") or ""
        self.assertEqual(206, self.answer(url, range="bytes=1-2", if_range=etag).code)
        self.assertEqual(200, self.answer(url, range="bytes=1-2", if_range='"no"').code)
        self.assertEqual(412, self.answer(url, if_match='"no"').code)

    def test_head_at_the_registry(self) -> None:
        """
        HEAD returns length and digest, or redirects or is rejected if a test wants that.
        """
        path = f"/v2/app/blobs/{self.digest}"
        head = self.registry(path, "HEAD")
        self.assertEqual(str(len(BLOB)), header(head, "content-length"))
        self.assertEqual(self.digest, header(head, "docker-content-digest"))
        for code in (307, 401):
            self.standin.quirks.blob_head = code
            self.assertEqual(code, self.registry(path, "HEAD").code)

    def test_belongs_to_its_repository(self) -> None:
        """
        Another repository does not have the blob, and a deleted one is gone from the bucket too.
        """
        self.standin.push_blob("other", b"something else")
        unknown = self.refused(self.registry(f"/v2/other/blobs/{self.digest}"))
        self.assertEqual((404, "BLOB_UNKNOWN"), unknown[:2])
        url = self.signed_url(self.digest)
        self.standin.delete_blob("app", self.digest)
        self.assertEqual(404, self.answer(url).code)

    def test_other_algorithms(self) -> None:
        """
        A blob can have a sha512 digest.
        """
        digest = self.standin.push_blob("app", b"x", "sha512")
        self.assertEqual(b"x", self.body(self.answer(self.signed_url(digest))))


class RangeTests(SynchronousTestCase):
    """
    Range headers, as S3 reads them.
    """

    def test_byte_range(self) -> None:
        """
        A range is clipped to the size; nonsense means everything.
        """
        for value, expected in {
            "bytes=0-": (0, 10),
            "bytes=2-5": (2, 6),
            "bytes=8-99": (8, 10),
            "bytes=-3": (7, 10),
            "bytes=-99": (0, 10),
            "bytes=10-": (10, 10),
            "bytes=5-2": None,
            "bytes=-": None,
            "lines=1-2": None,
            "": None,
        }.items():
            self.assertEqual(expected, byte_range(value, 10), value)


class ListTests(StandInTests):
    """
    Tags, repositories, referrers.
    """

    def pages(self, path: str) -> list[list[str]]:
        """
        Follow the links from page to page.
        """
        found, link = [], f"{self.standin.registry}{path}"
        while link:
            response = self.answer(link, authorization=f"Basic {self.token}")
            found.append(json.loads(self.body(response))["tags"])
            link = (header(response, "link") or "").partition(">")[0].removeprefix("<")
        return found

    def test_tags_come_in_pages(self) -> None:
        """
        A page holds 100 tags unless n says otherwise, and all pages together hold all.
        """
        tags = [f"v{number}" for number in range(250)]
        self.standin.push_image("team/app", *tags)
        pages = self.pages("/v2/team/app/tags/list")
        self.assertEqual([100, 100, 50], [len(page) for page in pages])
        self.assertEqual(set(tags), {tag for page in pages for tag in page})
        self.assertEqual(3, len(self.pages("/v2/team/app/tags/list?n=120")))
        self.assertEqual(1, len(self.pages("/v2/team/app/tags/list?n=1000")))

    def test_a_link_is_absolute_and_opaque(self) -> None:
        """
        The link names the registry itself; its token is long and breaks when decoded twice.
        """
        self.standin.push_image("app", *(f"v{number}" for number in range(3)))
        response = self.registry("/v2/app/tags/list?n=2")
        link = header(response, "link") or ""
        self.assertTrue(link.startswith(f"<{self.standin.registry}/v2/app/tags/list?last="), link)
        self.assertTrue(link.endswith('>; rel="next"'))
        self.assertIn("%2B", link)
        self.assertIn("%3D", link)
        self.assertEqual("text/plain; charset=utf-8", header(response, "content-type"))
        spoiled = urlsplit(link[1:].partition(">")[0]).query.replace("%2B", "+")
        self.assertEqual(400, self.registry(f"/v2/app/tags/list?{spoiled}").code)

    def test_pages_have_a_limit(self) -> None:
        """
        More than a thousand at once is rejected, not clamped.
        """
        self.standin.push_image("app", "v1")
        for path in ("/v2/app/tags/list?n=1001", "/v2/_catalog?n=1001"):
            status, code, message = self.refused(self.registry(path))
            self.assertEqual((400, "UNSUPPORTED"), (status, code))
            self.assertIn("Invalid parameter at 'maxResults'", message)

    def test_the_catalog_cannot_be_continued(self) -> None:
        """
        The catalog lists repositories, and rejects a continuation.
        """
        self.standin.push_image("app", "v1")
        listed = json.loads(self.body(self.registry("/v2/_catalog")))
        self.assertEqual({"repositories": ["app"]}, listed)
        self.assertEqual(405, self.registry("/v2/_catalog?last=app").code)

    def test_referrers(self) -> None:
        """
        Manifests that name an image as their subject are listed, filtered by type on request.
        """
        image = self.standin.push_image("app", "v1")
        for kind in ("application/x.sig", "application/x.sbom"):
            manifest = {"artifactType": kind, "subject": {"digest": image.digest}}
            self.standin.push_manifest("app", manifest, OCI_MANIFEST)
        path = f"/v2/app/referrers/{image.digest}"
        self.assertEqual(2, len(json.loads(self.body(self.registry(path)))["manifests"]))
        filtered = self.registry(f"{path}?artifactType=application/x.sig")
        (only,) = json.loads(self.body(filtered))["manifests"]
        self.assertEqual("application/x.sig", only["artifactType"])
        self.assertEqual("artifactType", header(filtered, "oci-filters-applied"))
        none = self.registry(f"/v2/app/referrers/{digest_of(b'nobody')}")
        self.assertEqual((200, OCI_INDEX), (none.code, header(none, "content-type")))


class FaultTests(StandInTests):
    """
    Faults that start and stop on demand.
    """

    def setUp(self) -> None:
        """
        Push a blob, and get its URL.
        """
        super().setUp()
        self.digest = self.standin.push_blob("app", BLOB)
        self.url = self.signed_url(self.digest)

    def test_fails_as_often_as_told(self) -> None:
        """
        A failure applies to the matching requests, so many times, or until it is removed.
        """
        self.standin.fail("registry", status=503, body=b"busy", times=2, path_contains="/blobs/")
        path = f"/v2/app/blobs/{self.digest}"
        self.assertEqual(200, self.registry("/v2/").code)
        self.assertEqual([503, 503, 307], [self.registry(path).code for _ in range(3)])
        fault = self.standin.fail("registry", status=500)
        self.assertEqual([500, 500], [self.registry(path).code for _ in range(2)])
        fault.remove()
        self.assertEqual(307, self.registry(path).code)

    def test_speaks_each_service_s_words(self) -> None:
        """
        Throttling and denial look as they do at AWS.
        """
        self.standin.throttle("registry", times=1, retry_after="7")
        slow = self.registry("/v2/")
        self.assertEqual("7", header(slow, "retry-after"))
        self.assertEqual((429, "TOOMANYREQUESTS", "Rate exceeded"), self.refused(slow))
        self.standin.throttle("bucket", times=1)
        self.assertIn(b"SlowDown", self.body(self.answer(self.url)))
        self.standin.deny(times=1)
        denied = self.refused(self.registry("/v2/app/manifests/v1"))
        self.assertEqual((403, "DENIED"), denied[:2])
        self.assertIn("not authorized to perform: ecr:BatchGetImage", denied[2])

    def test_breaks_off(self) -> None:
        """
        The body ends early, once, and the client can tell.
        """
        self.standin.break_off(1000, path_contains=self.digest)
        broken = Body(self.answer(self.url))
        self.failureResultOf(broken.done, ResponseFailed)
        self.assertEqual(BLOB[:1000], broken.data)
        self.assertEqual(1000, self.standin.bytes_sent)
        self.assertEqual(BLOB, self.body(self.answer(self.url)))

    def test_corrupts(self) -> None:
        """
        Other bytes come for a blob or a manifest, until the fault is removed.
        """
        image = self.standin.push_image("app", "v1")
        self.standin.corrupt(self.digest, b"wrong")
        self.standin.corrupt(image.digest, b"{}")
        self.assertEqual(b"wrong", self.body(self.answer(self.url)))
        self.assertEqual(b"{}", self.body(self.registry("/v2/app/manifests/v1")))
        self.standin.heal()
        self.assertEqual(BLOB, self.body(self.answer(self.url)))

    def test_hangs(self) -> None:
        """
        A request that hangs is recorded and gets no answer.
        """
        self.standin.hang("bucket", self.digest, times=1)
        self.assertNoResult(self.ask(self.url))
        self.assertEqual(1, self.standin.count("bucket"))
        self.assertEqual(200, self.answer(self.url).code)

    def test_refuses(self) -> None:
        """
        A connection can end before the answer begins.
        """
        self.standin.refuse("bucket", times=1)
        self.failureResultOf(self.ask(self.url), ResponseFailed)

    def test_latency(self) -> None:
        """
        With latency an answer begins only after that time; a client that disconnects earlier gets none.
        """
        self.standin.quirks.latency = 2
        kept, left = self.ask(self.url), self.ask(self.url)
        left.cancel()
        self.failureResultOf(left)
        self.agent.flush()
        self.clock.advance(1.9)
        self.agent.flush()
        self.assertNoResult(kept)
        self.clock.advance(0.1)
        self.agent.flush()
        self.assertEqual(BLOB, self.body(self.successResultOf(kept)))

    def test_rate(self) -> None:
        """
        With a rate the bytes are spread over time.
        """
        self.standin.quirks.rate = len(BLOB) / 10
        got = Body(self.answer(self.url)).done
        self.clock.pump([0.5] * 10)
        self.assertTrue(0.5 <= self.standin.bytes_sent / len(BLOB) <= 0.6)
        self.clock.pump([0.5] * 11)
        self.agent.flush()
        self.assertEqual(BLOB, self.successResultOf(got))


class HoldTests(StandInTests):
    """
    Bodies that a test sends by hand.
    """

    def setUp(self) -> None:
        """
        Hold a blob.
        """
        super().setUp()
        self.digest = self.standin.push_blob("app", BLOB)
        self.url = self.signed_url(self.digest)
        self.standin.hold(self.digest)

    def test_headers_come_and_the_body_waits(self) -> None:
        """
        The length is known at once, the bytes come as they are delivered.
        """
        response = self.answer(self.url)
        self.assertEqual(len(BLOB), response.length)
        got = Body(response).done
        self.assertEqual((1, 0), (self.standin.held(self.digest), self.standin.bytes_sent))
        self.standin.deliver(self.digest, 300)
        self.agent.flush()
        self.assertNoResult(got)
        self.assertEqual(300, self.standin.bytes_sent)
        self.standin.release(self.digest)
        self.agent.flush()
        self.assertEqual(BLOB, self.successResultOf(got))
        self.assertEqual(0, self.standin.held(self.digest))
        self.assertEqual(BLOB, self.body(self.answer(self.url)))

    def test_every_held_request_gets_its_own_bytes(self) -> None:
        """
        Delivery counts for each request from where it began, ranges too.
        """
        whole = Body(self.answer(self.url)).done
        self.standin.deliver(self.digest, 100)
        part = Body(self.answer(self.url, range="bytes=50-99")).done
        self.standin.deliver(self.digest, 50)
        self.agent.flush()
        self.assertEqual(BLOB[50:100], self.successResultOf(part))
        self.assertEqual(200, self.standin.bytes_sent)
        self.standin.release(self.digest)
        self.agent.flush()
        self.assertEqual(BLOB, self.successResultOf(whole))

    def test_a_held_transfer_can_be_cut(self) -> None:
        """
        What was delivered arrives, then the connection is gone; the next request is held again.
        """
        got = Body(self.answer(self.url))
        self.standin.deliver(self.digest, 10)
        self.standin.cut(self.digest)
        self.agent.flush()
        self.failureResultOf(got.done, ResponseFailed)
        self.assertEqual(BLOB[:10], got.data)
        self.assertNoResult(Body(self.answer(self.url)).done)

    def test_who_leaves_is_no_longer_held(self) -> None:
        """
        A client that disconnects gets no further bytes.
        """
        got = Body(self.answer(self.url))
        got.leave()
        self.agent.flush()
        self.failureResultOf(got.done, ResponseFailed)
        self.standin.deliver(self.digest, 10)
        self.assertEqual((0, 0), (self.standin.held(self.digest), self.standin.bytes_sent))


class AskedTests(StandInTests):
    """
    The record of requests.
    """

    def test_notes_everything_in_order(self) -> None:
        """
        Service, method, path, query, headers, repository and digest are kept as they came.
        """
        digest = self.standin.push_blob("team/app", b"x")
        url = self.signed_url(digest, "team/app")
        self.answer(url, x_trace="1")
        first, second = self.standin.asked
        self.assertEqual(("registry", "GET"), (first.service, first.method))
        self.assertEqual(f"/v2/team/app/blobs/{digest}", first.path)
        self.assertEqual(("team/app", digest), (first.repository, first.digest))
        self.assertEqual(("bucket", "1"), (second.service, second.headers["x-trace"]))
        self.assertEqual(("team/app", digest), (second.repository, second.digest))
        self.assertTrue(url.endswith(second.target))
        self.standin.forget_asked()
        self.assertEqual(0, self.standin.count())

    def test_ports_count(self) -> None:
        """
        Registry and bucket may be one machine with two ports.
        """
        standin = StandIn(self.clock, registry="http://127.0.0.1:5001", bucket="http://127.0.0.1:5002")
        agent: IAgent = TRAVERSAL(standin.resource)
        for port in (5001, 5002, 5003):
            self.successResultOf(agent.request(b"GET", f"http://127.0.0.1:{port}/".encode()))
        self.assertEqual(["registry", "bucket", "api"], [asked.service for asked in standin.asked])
