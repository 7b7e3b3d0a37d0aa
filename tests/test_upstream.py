"""
Requests to ECR and its buckets, and how their answers are handled.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from OpenSSL import SSL
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError, DNSLookupError
from twisted.internet.error import TimeoutError as NotConnectedError
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseFailed

from ecrproxy.oci import Digest, RegistryError, Route
from ecrproxy.registry.ecr import RENEW_SECONDS
from ecrproxy.registry.tag_lists import upstream_query
from ecrproxy.registry.unavailable import UnavailableError, describe
from ecrproxy.registry.wire import PlainAgent
from tests.daemon import MIB, Daemon, DaemonTestCase, noise
from tests.registry import StandIn, digest_of
from tests.registry_content import OCI_MANIFEST
from tests.routes import route_to

T = TypeVar("T")
NO_LENGTHS = b"-5", b"+5", b"5_0", b"0x5", b"5.0", b"1e3", b"5, 6", b"\xb2", b"9" * 19, b"9" * 5000
"""Invalid numbers of bytes."""
DENIED = b'{"errors": [{"code": "DENIED", "message": "%s"}]}'


class UpstreamTestCase(DaemonTestCase):
    """
    A caller of the registry, without a client.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.data = noise("blob", 1000)
        self.digest = self.standin.push_blob("team/app", self.data)

    @property
    def blob(self) -> Route:
        return route_to(f"/v2/team/app/blobs/{self.digest}")

    @property
    def tag(self) -> Route:
        return route_to("/v2/team/app/manifests/latest")

    def asking(self, question: Coroutine[Any, Any, T]) -> Deferred[T]:
        """
        Send a request, and flush.
        """
        answer = Deferred.fromCoroutine(question)
        self.flush()
        return answer

    def close(self) -> None:
        """
        Have upstream close its connections.
        """
        for _, server in self.daemon.back.ends:
            server.loseConnection()
        self.flush()

    def size(self) -> int:
        """
        Request the size of the blob.
        """
        return self.successResultOf(self.asking(self.daemon.upstream.blob_size(self.blob)))

    def fetched(self) -> bytes:
        """
        Fetch the blob.
        """
        sink = Sink()
        self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        self.flush()
        self.assertEqual([None], sink.ends)
        return bytes(sink.got)

    def refused(self, question: Coroutine[Any, Any, object]) -> RegistryError:
        """
        Send a request, and return how it was rejected.
        """
        problem: RegistryError = self.failureResultOf(self.asking(question), RegistryError).value
        return problem

    def assertUnavailable(self, status: int, saying: str, question: Coroutine[Any, Any, object]) -> None:
        problem = self.refused(question)
        self.assertIsInstance(problem, UnavailableError)
        self.assertEqual(status, problem.status)
        self.assertIn(saying, problem.message)


class Sink:
    """
    Where a blob's bytes go in a test.
    """

    def __init__(self) -> None:
        self.got = bytearray()
        self.ends: list[Failure | None] = []

    def arrived(self, data: bytes) -> None:
        self.got += data

    def ended(self, problem: Failure | None) -> None:
        self.ends.append(problem)


class RequestTests(UpstreamTestCase):
    def test_carries_what_is_listed_alone(self) -> None:
        """
        ECR gets its own host name, the token and no unlisted header; the bucket no token.
        """
        self.fetched()
        registry, bucket = self.standin.asked
        self.assertEqual("123456789012.dkr.ecr.eu-west-1.amazonaws.com", registry.headers["host"])
        self.assertTrue(registry.headers["authorization"].startswith("Basic "))
        self.assertNotIn("authorization", bucket.headers)
        for asked in (registry, bucket):
            self.assertEqual(("identity", "ecrproxy"), (asked.headers["accept-encoding"], asked.headers["user-agent"]))

    def test_the_token_stays_with_its_origin(self) -> None:
        """
        A bucket on another port of the registry's host gets no token: an origin has a port.
        """
        standin = StandIn(self.clock, registry="http://localhost:5000", bucket="http://localhost:9000")
        self.standin = standin
        self.start()
        self.digest = standin.push_blob("team/app", self.data)
        self.assertEqual(self.data, self.fetched())
        self.assertEqual(["registry", "bucket"], [asked.service for asked in standin.asked])
        self.assertIn("authorization", standin.asked[0].headers)

    def test_a_signed_url_is_passed_byte_for_byte(self) -> None:
        """
        Path and query of a redirect are sent exactly as they were received, however they are escaped.
        """
        for target in (
            "/a%2Fb/c%20d?X-Amz-Security-Token=%2F%2b%3D&X-Amz-Signature=0af",
            "/x?a=+%20~%7E&b=%e4%b8%ad&&c",
            "/x?a=1&a=2&empty=&flag&=nameless",
            "/x?sub=a:b@c/d?e;f,g!h$i'j(k)*l",
            "/%7Euser/./../x?a=%2e%2E",
            "/x?",
        ):
            self.standin.fail("registry", status=307, headers={"Location": f"https://other.example{target}"}, times=1)
            self.standin.fail("api", status=200, body=self.data, times=1)
            self.assertEqual(self.data, self.fetched(), target)
            self.assertEqual(target.removesuffix("?"), self.standin.asked[-1].target)

    def test_no_cookie_passes(self) -> None:
        """
        A cookie that ECR or a bucket sets is never sent.
        """
        for service in ("registry", "bucket"):
            self.standin.fail(
                service,
                status=500,
                headers={"Set-Cookie": "stick=1; Path=/"},
                times=3,
            )
            self.refused(self.daemon.upstream.blob(self.blob))
        self.fetched()
        self.assertEqual(set(), {name for asked in self.standin.asked for name in asked.headers if name == "cookie"})

    def test_no_cookie_is_kept(self) -> None:
        self.standin.fail("api", status=200, headers={"Set-Cookie": "stick=1", "X-Other": "y"})
        agent = PlainAgent(self.daemon.back.agent(persistent=False), self.clock)
        asking = agent.request(b"GET", b"https://other.example/x")
        self.flush()
        headers = self.successResultOf(asking).headers
        self.assertEqual((False, True), (headers.hasHeader("Set-Cookie"), headers.hasHeader("X-Other")))

    def test_headers_of_the_caller_stay_as_they_are(self) -> None:
        """
        The agent that sets the encoding leaves its caller's headers alone, and needs none.
        """
        from twisted.web.http_headers import Headers

        agent = PlainAgent(self.daemon.back.agent(persistent=False), self.clock)
        given = Headers({"Cookie": ["a=b"], "Accept-Encoding": ["gzip"]})
        agent.request(b"GET", b"https://other.example/x", given)
        agent.request(b"GET", b"https://other.example/x")
        self.flush()
        self.assertEqual(["a=b"], given.getRawHeaders("Cookie"))
        for asked in self.standin.asked:
            self.assertEqual((None, "identity"), (asked.headers.get("cookie"), asked.headers["accept-encoding"]))


class RedirectTests(UpstreamTestCase):
    def redirect(self, *locations: str, status: int = 307) -> None:
        """
        Have the registry redirect to the first location, that one to the next; the last serves the blob.
        """
        self.standin.heal()
        self.standin.forget_asked()
        first, *rest = locations
        self.standin.fail("registry", status=status, headers={"Location": first})
        replies = [(302, b"", {"Location": location}) for location in rest] + [(200, self.data, {})]
        for code, body, headers in reversed(replies):
            self.standin.fail("api", status=code, body=body, headers=headers, times=1)

    def test_of_each_kind_are_followed(self) -> None:
        """
        301, 302, 303, 307 and 308 are followed.
        """
        for status in (301, 302, 303, 307, 308):
            self.redirect("https://other.example/x", status=status)
            self.assertEqual(self.data, self.fetched())

    def test_five_are_followed_and_not_six(self) -> None:
        """
        Five redirects lead to the blob; a sixth, or a loop, ends in 502.
        """
        hops = [f"https://hop{number}.example/x" for number in range(6)]
        self.redirect(*hops[:5])
        self.assertEqual(self.data, self.fetched())
        self.assertEqual(6, len(self.standin.asked))
        self.redirect(*hops)
        self.assertUnavailable(502, "more than 5 times", self.daemon.upstream.blob(self.blob))
        self.assertEqual(6, len(self.standin.asked))

    def test_no_other_host_or_port_sees_the_token(self) -> None:
        """
        Wherever a redirect leads, the token does not go there: another host, another port, a similar name.
        """
        host = self.standin.registry
        for location in (
            "https://other.example/x",
            f"{host}:8443/x",
            f"{host}.evil.example/x",
            "//other.example/x",
            "https://OTHER.example:443/x",
        ):
            self.redirect(location)
            self.assertEqual(self.data, self.fetched())
            self.assertEqual("api", self.standin.asked[-1].service, location)
            self.assertNotIn("authorization", self.standin.asked[-1].headers)

    def test_relative_ones_are_followed(self) -> None:
        """
        A relative redirect stays on the host that sent it.
        """
        self.redirect("https://other.example/a/b?c", "../d?e", "/f")
        self.assertEqual(self.data, self.fetched())
        hops = [(asked.headers["host"], asked.target) for asked in self.standin.asked[1:]]
        self.assertEqual([("other.example", "/a/b?c"), ("other.example", "/d?e"), ("other.example", "/f")], hops)

    def test_none_leads_from_https_to_http(self) -> None:
        """
        A redirect from https to http is rejected, at the first hop and later; nothing is sent there.
        """
        for locations in (["http://other.example/x"], ["https://other.example/x", "http://other.example/x"]):
            self.redirect(*locations)
            self.assertUnavailable(502, "does not go", self.daemon.upstream.blob(self.blob))
            self.assertEqual(len(locations), len(self.standin.asked))

    def test_from_http_to_https_is_fine(self) -> None:
        """
        The bucket of a registry on plain http may use either.
        """
        for bucket in ("http://bucket.example", "https://bucket.example"):
            self.standin = StandIn(self.clock, registry="http://ecr.example", bucket=bucket)
            self.start()
            self.digest = self.standin.push_blob("team/app", self.data)
            self.assertEqual(self.data, self.fetched())

    def test_to_a_port_that_can_not_be_are_refused(self) -> None:
        """
        A redirect to a port above 65535 ends in 502 without a connection attempt.
        """
        self.redirect("https://other.example:99999999/x")
        answer = self.asking(self.daemon.upstream.blob(self.blob))
        self.assertEqual(1, len(self.standin.asked))
        self.assertEqual(502, self.failureResultOf(answer, UnavailableError).value.status)

    def test_to_nowhere_are_refused(self) -> None:
        """
        Redirects without a host, to other schemes, with userinfo, or with an invalid URL end in 502.
        """
        for location in (
            "",
            "ftp://other.example/x",
            "file:///etc/passwd",
            "https://user@other.example/x",
            "https://user:password@other.example/x",
            "javascript:alert(1)",
            "https://[broken/x",
            "https://other.example:port/x",
            "https://other.example:99999999/x",
            "https://oth er.example/x",
        ):
            self.redirect(location)
            answer = self.asking(self.daemon.upstream.blob(self.blob))
            self.assertEqual(1, len(self.standin.asked), location)
            self.assertEqual(502, self.failureResultOf(answer, UnavailableError).value.status)

    def test_of_bytes_that_are_no_text_are_refused(self) -> None:
        """
        A Location that is not text ends in 502.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob(self.blob))
        self.answer_with(b"HTTP/1.1 307 X\r\nLocation: https://other.example/\xff\r\nContent-Length: 0\r\n\r\n")
        self.failureResultOf(asking, UnavailableError)

    def test_without_a_location(self) -> None:
        """
        A redirect without a Location ends in 502.
        """
        self.standin.fail("registry", status=307)
        self.assertUnavailable(502, "does not go", self.daemon.upstream.blob(self.blob))

    def test_of_a_manifest_are_no_answer(self) -> None:
        """
        Manifests aren't redirected: such an answer counts as invalid.
        """
        self.standin.fail("registry", status=307, headers={"Location": "https://other.example/x"})
        reply = self.get("/v2/team/app/manifests/latest")
        self.assertRefused(reply, 502, "UNAVAILABLE")
        self.assertEqual({"registry"}, {asked.service for asked in self.standin.asked})

    def test_their_long_bodies_are_not_read(self) -> None:
        """
        A redirect with a long body does not delay anything.
        """
        self.standin.fail("registry", status=307, headers={"Location": "https://other.example/x"}, body=bytes(4 * MIB))
        self.standin.fail("api", status=200, body=self.data)
        self.assertEqual(self.data, self.fetched())


class BlobSizeTests(UpstreamTestCase):
    def test_of_a_head(self) -> None:
        """
        The length of ECR's HEAD is the blob's size.
        """
        self.assertEqual(1000, self.size())
        self.assertEqual([("registry", "HEAD")], [(asked.service, asked.method) for asked in self.standin.asked])

    def test_of_a_head_that_says_nothing_is_there_is_told_by_one_byte(self) -> None:
        """
        What is between may answer each HEAD with a length of 0: a digest tells whether that can be.
        """
        self.standin.fail("registry", status=200, method="HEAD", body=b"")
        self.assertEqual(1000, self.size())
        self.digest = self.standin.push_blob("team/app", b"")
        self.standin.forget_asked()
        self.assertEqual(0, self.size())
        self.assertEqual(["HEAD"], [asked.method for asked in self.standin.asked])

    def test_of_a_redirected_head(self) -> None:
        """
        If HEAD is redirected, a range of one byte from the bucket gives the size.
        """
        self.standin.quirks.blob_head = 307
        self.assertEqual(1000, self.size())
        self.assertEqual(("GET", "bytes=0-0"), (self.standin.asked[1].method, self.standin.asked[1].headers["range"]))

    def test_of_a_bucket_without_ranges(self) -> None:
        """
        A bucket that sends everything gives the size as well, and is stopped.
        """
        self.digest = self.standin.push_blob("team/app", noise("large", 8 * MIB))
        self.standin.quirks.blob_head, self.standin.quirks.ignore_range = 307, True
        self.assertEqual(8 * MIB, self.size())
        self.assertLess(self.standin.bytes_sent, 2 * MIB)

    def test_of_the_empty_blob_behind_a_redirect(self) -> None:
        """
        The empty blob, of which no byte can be requested, has size 0.
        """
        self.digest = self.standin.push_blob("team/app", b"")
        self.standin.quirks.blob_head = 307
        self.assertEqual(0, self.size())

    def test_of_a_bucket_that_fails(self) -> None:
        """
        A bucket's error page is no blob, and its length not the blob's.
        """
        self.standin.quirks.blob_head = 307
        for status in (403, 404, 500, 503):
            fault = self.standin.fail("bucket", status=status, body=b"<Error/>")
            told = 503 if status == 503 else 502
            self.assertUnavailable(told, "", self.daemon.upstream.blob_size(self.blob))
            fault.remove()

    def test_where_head_is_not_known(self) -> None:
        """
        A registry that rejects HEAD gets GET.
        """
        self.standin.quirks.blob_head = 401
        self.assertEqual(1000, self.size())
        self.standin.quirks.blob_head = 200
        self.standin.fail("registry", status=405, method="HEAD")
        self.assertEqual(1000, self.size())

    def test_where_head_is_not_known_and_nothing_redirected(self) -> None:
        """
        A registry that rejects HEAD and serves blobs itself gets GET, which is not read to its end.
        """
        self.standin.fail("registry", status=405, method="HEAD")
        self.standin.fail("registry", status=200, method="GET", body=noise("large", 4 * MIB))
        self.assertEqual(4 * MIB, self.size())

    def test_of_a_head_of_whatever_type(self) -> None:
        for content_type in ("text/plain; charset=utf-8", "text/plain", "application/json", "", "nonsense"):
            headers = {"Content-Type": content_type} if content_type else {}
            self.standin.forget_asked()
            fault = self.standin.fail("registry", status=200, method="HEAD", headers=headers, body=self.data)
            self.assertEqual((1000, 1), (self.size(), len(self.standin.asked)), content_type)
            fault.remove()

    def test_of_a_head_that_looks_like_a_page_is_told_by_one_byte(self) -> None:
        for headers in ({"Content-Type": "text/html"}, {"Content-Type": "Text/HTML; charset=utf-8"}):
            self.standin.forget_asked()
            fault = self.standin.fail("registry", status=200, method="HEAD", headers=headers, body=b"x" * 50)
            self.assertEqual(1000, self.size())
            self.assertEqual(["HEAD", "GET", "GET"], [asked.method for asked in self.standin.asked])
            fault.remove()
        named = {"Content-Type": "text/html", "Docker-Content-Digest": self.digest}
        self.standin.fail("registry", status=200, method="HEAD", headers=named, body=self.data)
        self.assertEqual(1000, self.size())

    def test_of_a_head_without_a_length_is_told_by_one_byte(self) -> None:
        for length in (b"", *(b"Content-Length: %b\r\n" % length for length in NO_LENGTHS)):
            self.standin.forget_asked()
            asking = Deferred.fromCoroutine(self.daemon.upstream.blob_size(self.blob))
            self.answer_with(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n%b\r\n" % length)
            self.assertEqual(1000, self.successResultOf(asking), length)
            self.assertEqual("bytes=0-0", self.standin.asked[-1].headers["range"])
            self.close()

    def test_that_nobody_tells_is_502(self) -> None:
        self.standin.hang("registry", method="GET", times=1)
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob_size(self.blob))
        self.answer_with(b"HTTP/1.1 200 OK\r\n\r\n", close=False)
        _, server = self.daemon.back.ends[-1]
        server.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        self.flush()
        self.assertEqual(502, self.failureResultOf(asking, UnavailableError).value.status)

    def test_behind_a_redirect_whose_url_is_refused_is_asked_for_with_another(self) -> None:
        self.standin.quirks.blob_head = 307
        self.standin.fail("bucket", status=403, body=b"<Error/>", times=1)
        self.assertEqual(1000, self.size())
        self.assertEqual((2, 2), (self.standin.count("registry"), self.standin.count("bucket")))

    def test_of_what_is_not_there(self) -> None:
        """
        The GET's 404 has ECR's code, which HEAD alone would not.
        """
        self.standin.delete_blob("team/app", self.digest)
        problem = self.refused(self.daemon.upstream.blob_size(self.blob))
        self.assertEqual((404, "BLOB_UNKNOWN"), (problem.status, problem.code))
        self.assertEqual(["HEAD", "GET"], [asked.method for asked in self.standin.asked])


class BlobTests(UpstreamTestCase):
    def test_may_come_from_the_registry_itself(self) -> None:
        """
        A registry may serve blobs itself, without a redirect.
        """
        self.standin.fail("registry", status=200, body=self.data)
        self.assertEqual(self.data, self.fetched())

    def test_tells_its_size(self) -> None:
        """
        The announced length is there before the bytes.
        """
        self.standin.hold(self.digest)
        blob = self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob)))
        self.assertEqual(1000, blob.size)

    def test_answers_that_are_none(self) -> None:
        """
        Only 200 is a blob.
        """
        for status in (201, 204, 206, 300, 304):
            fault = self.standin.fail("registry", status=status)
            self.assertUnavailable(502, f"answers {status}", self.daemon.upstream.blob(self.blob))
            fault.remove()

    def test_that_breaks_off(self) -> None:
        """
        A transfer that breaks off reports so, and which side did it.
        """
        self.standin.break_off(500)
        sink = Sink()
        self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        self.flush()
        (problem,) = sink.ends
        assert problem is not None
        self.assertIsInstance(problem.value, UnavailableError)
        self.assertIn("starport-layer-bucket.s3.eu-west-1.amazonaws.com broke off", str(problem.value))
        self.assertEqual(self.data[:500], bytes(sink.got))

    def test_that_stalls(self) -> None:
        """
        Thirty seconds without a kilobyte end a transfer; each kilobyte restarts them.
        """
        self.digest = self.standin.push_blob("team/app", noise("large", MIB))
        self.standin.hold(self.digest)
        sink = Sink()
        self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        for _ in range(3):
            self.pass_time(29)
            self.standin.deliver(self.digest, 1024)
            self.flush()
        self.assertEqual((3 * 1024, []), (len(sink.got), sink.ends))
        self.pass_time(31)
        (problem,) = sink.ends
        assert problem is not None
        assert isinstance(problem.value, UnavailableError)
        self.assertEqual(504, problem.value.status)
        self.assertIn("has sent nothing for 30 s", str(problem.value))
        self.assertEqual(0, self.standin.held(self.digest))

    def test_that_was_paused_is_not_taken_for_stalled(self) -> None:
        """
        While we pause, no stall is counted; after resuming it is again.
        """
        self.standin.hold(self.digest)
        sink = Sink()
        transfer = self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        self.flush()
        transfer.pause()
        self.standin.deliver(self.digest, 100)
        self.pass_time(300)
        self.assertEqual((0, []), (len(sink.got), sink.ends))
        transfer.resume()
        self.pass_time(20)
        self.assertEqual((100, []), (len(sink.got), sink.ends))
        self.pass_time(31)
        self.assertEqual(1, len(sink.ends))

    def test_that_is_aborted(self) -> None:
        """
        An aborted transfer's connection is closed, and no stall is counted any longer.
        """
        self.standin.hold(self.digest)
        sink = Sink()
        transfer = self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        transfer.abort()
        self.flush()
        self.assertEqual(0, self.standin.held(self.digest))
        self.assertEqual(1, len(sink.ends))
        self.pass_time(60)
        self.assertEqual(1, len(sink.ends))

    def test_pausing_and_resuming_after_the_end(self) -> None:
        """
        Resuming after the end does nothing: there is one end.
        """
        sink = Sink()
        transfer = self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob))).first.deliver(sink)
        self.flush()
        self.assertEqual([None], sink.ends)
        transfer.pause()
        transfer.resume()
        self.pass_time(60)
        self.assertEqual([None], sink.ends)

    def test_what_follows_a_body_is_not_part_of_it(self) -> None:
        """
        Bytes behind the announced length are ignored: the blob is right, and so is the next answer.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob(self.blob))
        self.answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\nx", close=False)
        sink = Sink()
        self.successResultOf(asking).first.deliver(sink)
        self.flush()
        self.assertEqual((b"abc", [None]), (bytes(sink.got), sink.ends))
        self.assertEqual(self.data, self.fetched())

    def test_two_lengths_are_none(self) -> None:
        """
        An answer with two lengths is rejected.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob(self.blob))
        self.answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd")
        self.failureResultOf(asking, UnavailableError)

    def test_what_is_no_http_is_refused(self) -> None:
        """
        An upstream that does not speak HTTP is 502, with the host's name.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob(self.blob))
        self.answer_with(b"SSH-2.0-OpenSSH\r\n\r\n")
        self.assertIn("amazonaws.com can't be reached", self.failureResultOf(asking, UnavailableError).value.message)


class ManifestTests(UpstreamTestCase):
    def test_asks_with_what_the_client_accepts(self) -> None:
        """
        ECR is asked for the types that the client accepts.
        """
        manifest = self.successResultOf(self.asking(self.daemon.upstream.manifest(self.tag, OCI_MANIFEST)))
        self.assertEqual((OCI_MANIFEST, self.image.manifest), (manifest.content_type, manifest.body))
        self.assertEqual(OCI_MANIFEST, self.standin.asked[0].headers["accept"])

    def test_that_breaks_off(self) -> None:
        """
        A manifest that breaks off is 502.
        """
        self.standin.break_off(10, service="registry", times=3)
        self.assertUnavailable(502, "broke off", self.daemon.upstream.manifest(self.tag, ""))

    def test_that_does_not_end(self) -> None:
        """
        A manifest whose last byte does not arrive within 25 seconds is 504.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.manifest(self.tag, ""))
        self.answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", close=False)
        asked = self.daemon.back.ends[-1][0]
        self.pass_time(24)
        self.assertNoResult(asking)
        self.pass_time(2)
        self.assertEqual(504, self.failureResultOf(asking, UnavailableError).value.status)
        self.assertFalse(asked.connected)

    def test_that_is_too_long_is_not_read_on(self) -> None:
        """
        Only as much of an oversized manifest is read as needed to notice.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.manifest(self.tag, ""))
        self.standin.hang("registry", times=1)
        self.flush()
        _, server = self.daemon.back.ends[-1]
        server.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(64 * MIB))
        self.flush()
        self.failureResultOf(asking, UnavailableError)
        self.assertGreater(server.waiting, 50 * MIB)

    def test_whom_nobody_waits_for(self) -> None:
        """
        Cancelling ends the request, before the headers and after.
        """
        for answered in (False, True):
            asking = Deferred.fromCoroutine(self.daemon.upstream.manifest(self.tag, ""))
            self.standin.hang("registry", times=1)
            self.flush()
            client, server = self.daemon.back.ends[-1]
            if answered:
                server.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
                self.flush()
            asking.cancel()
            self.flush()
            self.assertFalse(client.connected)
            self.failureResultOf(asking, CancelledError)
            self.pass_time(60)
            self.assertEqual(1, self.standin.count("registry"), "somebody asked again")
            self.standin.forget_asked()

    def test_head(self) -> None:
        """
        HEAD returns type, digest and size without the manifest.
        """
        head = self.successResultOf(self.asking(self.daemon.upstream.head_manifest(self.tag, "")))
        self.assertEqual(
            (OCI_MANIFEST, self.image.digest, len(self.image.manifest)), (head.media_type, str(head.digest), head.size)
        )

    def test_head_where_it_is_not_known(self) -> None:
        """
        If HEAD is rejected, GET returns the same: the digest is computed.
        """
        for status in (403, 404, 405):
            fault = self.standin.fail("registry", status=status, method="HEAD")
            head = self.successResultOf(self.asking(self.daemon.upstream.head_manifest(self.tag, "")))
            self.assertEqual((self.image.digest, len(self.image.manifest)), (str(head.digest), head.size))
            fault.remove()

    def test_head_that_says_nothing_usable_is_told_by_a_get(self) -> None:
        types = b"application/octet-stream", b"text/plain", b"application/json", b"text/html", b""
        lengths = (
            b"",
            b"Content-Length: 0",
            b"Content-Length: 99999999999",
            *(b"Content-Length: " + no for no in NO_LENGTHS),
        )
        heads = [b"Content-Type: " + each + b"\r\nContent-Length: 50" for each in types]
        heads += [b"Content-Type: " + OCI_MANIFEST.encode() + b"\r\n" + each for each in lengths]
        for each in heads:
            self.standin.forget_asked()
            asking = Deferred.fromCoroutine(self.daemon.upstream.head_manifest(self.tag, ""))
            self.answer_with(b"HTTP/1.1 200 OK\r\n" + each + b"\r\n\r\n")
            head = self.successResultOf(asking)
            told = head.media_type, str(head.digest), head.size
            self.assertEqual((OCI_MANIFEST, self.image.digest, len(self.image.manifest)), told, each)
            self.assertEqual(["HEAD", "GET"], [asked.method for asked in self.standin.asked])

    def test_head_that_makes_no_sense(self) -> None:
        """
        An invalid digest or length is 502.
        """
        for headers in ({"Docker-Content-Digest": "md5:abc"}, {"Docker-Content-Digest": digest_of(b"x") + "0"}):
            fault = self.standin.fail("registry", status=200, method="HEAD", headers=headers)
            self.assertUnavailable(502, "no sense", self.daemon.upstream.head_manifest(self.tag, ""))
            fault.remove()


class RefusalTests(UpstreamTestCase):
    """
    Which refusals a new token may fix, and what happens to the others.
    """

    def renewals(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> int:
        """
        Have ECR reject one request; return how many more tokens that costs.
        """
        before = len(self.standin.tokens._until)  # noqa: SLF001
        fault = self.standin.fail("registry", status=status, body=body, headers=headers, times=1)
        self.asking(self.daemon.upstream.manifest(self.tag, "")).addErrback(lambda failure: failure.trap(RegistryError))
        self.pass_time(1)
        fault.remove()
        return len(self.standin.tokens._until) - before  # noqa: SLF001

    def test_about_the_token(self) -> None:
        """
        401, a 400 that is not about the request, and a 403 that mentions the token cost a new one.
        """
        unreadable = b'{"errors": [{"code": "UNKNOWN", "message": "Cannot read the authorization token"}]}'
        for status, body in (
            (401, b"Not Authorized\n"),
            (400, b"Bad Request\n"),
            (400, b""),
            (400, unreadable),
            (400, DENIED % b"no"),
            (403, DENIED % b"Your authorization token has expired. Reauthenticate and try again."),
            (403, b"Your Authorization Token is invalid."),
        ):
            self.assertEqual(1, self.renewals(status, body), (status, body))
            self.pass_time(RENEW_SECONDS)

    def test_about_something_else(self) -> None:
        """
        IAM's 403, a 400 with a challenge or about the request, and all others cost none.
        """
        challenge = {"WWW-Authenticate": "Basic"}
        for status, body, headers in (
            (403, DENIED % b"User: arn:aws:iam::1:user/x is not authorized to perform: ecr:BatchGetImage", None),
            (403, DENIED % b"User: x is not authorized to perform: ecr:GetAuthorizationToken on token y", None),
            (403, DENIED % b"tokens are not what this is about", None),
            (403, b"", None),
            (400, b"Bad Request", challenge),
            *(
                (400, json.dumps({"errors": [{"code": code}]}).encode(), None)
                for code in ("UNKNOWN", "UNSUPPORTED", "NAME_INVALID", "TAG_INVALID", "DIGEST_INVALID", "NEW")
            ),
            (404, DENIED % b"token", None),
            (429, DENIED % b"token", None),
            (500, DENIED % b"token", None),
        ):
            self.assertEqual(0, self.renewals(status, body, headers), (status, body))

    def test_of_an_unknown_code_are_passed_on(self) -> None:
        body = b'{"errors": [{"code": "SOMETHING_NEW", "message": "why not"}]}'
        for method in ("GET", "HEAD"):
            self.standin.fail("registry", status=400, body=body)
            ask = self.daemon.upstream.manifest if method == "GET" else self.daemon.upstream.head_manifest
            problem = self.refused(ask(self.tag, ""))
            self.assertEqual((400, "SOMETHING_NEW", "why not"), (problem.status, problem.code, problem.message))

    def test_that_may_be_about_the_token_cost_one_token_a_minute(self) -> None:
        """
        And ECR's answer is not hidden.
        """
        for status, body in ((400, b"Bad Request\n"), (401, b"Not Authorized\n")):
            before = len(self.standin.tokens._until)  # noqa: SLF001
            fault = self.standin.fail("registry", status=status, body=body)
            for _ in range(10):
                asked = Deferred.fromCoroutine(self.daemon.upstream.manifest(self.tag, ""))
                self.pass_time(1)
                problem = self.failureResultOf(asked, UnavailableError).value
                self.assertIn(body.decode().strip() if status == 400 else "does not accept", problem.message)
            self.assertEqual(1, len(self.standin.tokens._until) - before)  # noqa: SLF001
            fault.remove()
            self.pass_time(2 * RENEW_SECONDS)  # a rejected token is replaced after a minute, with or without requests

    def test_of_head_alone_leave_the_token_alone(self) -> None:
        """
        Some registries answer each HEAD with 401.
        """
        fault = self.standin.fail("registry", status=401, method="HEAD")
        head = self.successResultOf(self.asking_with_time(self.daemon.upstream.head_manifest(self.tag, "")))
        self.assertEqual(self.image.digest, str(head.digest))
        self.assertEqual(1, len(self.standin.tokens._until))  # noqa: SLF001
        fault.remove()

    def test_in_a_line_of_text_are_told_in_a_line(self) -> None:
        for body in (b"Bad Request\n", b'{"errors": [{"code": "UNKNOWN", "message": "Bad Request\\r\\n"}]}'):
            self.standin.fail("registry", status=400, body=body)
            problem = self.refused(self.daemon.upstream.manifest(self.tag, ""))
            self.assertIn("Bad Request", problem.message)
            self.assertEqual(1, len(problem.message.splitlines()))
            self.assertNotIn("\n", problem.message)
            self.standin.heal()

    def test_in_strange_words(self) -> None:
        """
        A 403 or 404 without a registry's JSON is no answer of ECR's.
        """
        for body in (
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"errors": null}',
            b'{"errors": []}',
            b'{"errors": {}}',
            b'{"errors": [3]}',
            b'{"errors": [{"code": null, "message": ["x"]}]}',
            b'{"errors": [{"code": "", "message": "not found"}]}',
            b'{"message": "not found"}',
            b"[" * 50_000,
            b"\xff\xfe",
            b"404 page not found\n",
            b"<html><body>Access denied by your gateway: token required</body></html>",
        ):
            for status in (403, 404):
                fault = self.standin.fail("registry", status=status, body=body)
                problem = self.refused(self.daemon.upstream.manifest(self.tag, ""))
                self.assertIsInstance(problem, UnavailableError, body[:20])
                self.assertEqual((502, "UNAVAILABLE"), (problem.status, problem.code), body[:20])
                json.loads(problem.body())
                fault.remove()
        self.assertEqual(1, len(self.standin.tokens.issued()))

    def test_of_great_length(self) -> None:
        """
        A page instead of a refusal is 502, however long it is; no more than its beginning is read.
        """
        self.standin.fail("registry", status=404, body=bytes(MIB))
        self.assertUnavailable(502, "something other than ECR answers 404", self.daemon.upstream.manifest(self.tag, ""))

    def test_of_a_head_is_told_by_a_get(self) -> None:
        """
        A HEAD rejected for its token is repeated as GET to learn why, and is answered with a fresh token.
        """
        self.standin.expire_tokens()
        head = self.successResultOf(self.asking_with_time(self.daemon.upstream.head_manifest(self.tag, "")))
        self.assertEqual(self.image.digest, str(head.digest))

    def asking_with_time(self, question: Coroutine[Any, Any, T]) -> Deferred[T]:
        answer = self.asking(question)
        self.pass_time(1)
        return answer


class QueryTests(SynchronousTestCase):
    """
    Which query parameters of a client are passed to ECR.
    """

    def ask(self, path: str) -> str:
        return upstream_query(route_to(path))

    def test_of_tags(self) -> None:
        """
        n, at most 1000, and decoded; last and others unchanged; neither containerd's ns, nor signature parameters.
        Without n only where the list begins.
        """
        for query, kept in {
            "": "",
            "n=5": "n=5",
            "n=5000&last=a%2Bb%3D": "n=1000&last=a%2Bb%3D",
            "last=x&n=5&n=6&ns=y&token=z&X-Amz-Date=0": "last=x&n=5&token=z",
            "n=2%30&last=%32": "n=20&last=%32",
            "%6e=5": "n=5",
            "x=1": "",
            "x=1&last=a": "last=a",
            "nextToken=a&artifactType=b": "nextToken=a",
        }.items():
            self.assertEqual(kept, self.ask(f"/v2/a/tags/list?{query}"))

    def test_of_referrers(self) -> None:
        """
        All plain parameters except ns.
        """
        digest = Digest.of(b"x")
        found = self.ask(f"/v2/a/referrers/{digest}?artifactType=a%2Fb&ns=c&X-Amz-Y=d&n=3&a%26b=c")
        self.assertEqual(["artifactType=a%2Fb", "n=3"], sorted(found.split("&")))


class DescribeTests(SynchronousTestCase):
    """
    A network error in one line.
    """

    def test_first_cause(self) -> None:
        """
        The innermost of nested failures is named.
        """
        inner = Failure(ResponseFailed([Failure(ConnectionLost("reset by peer"))]))
        self.assertIn("reset by peer", describe(ResponseFailed([inner])))

    def test_in_words_that_are_not_about_code(self) -> None:
        errors = [("SSL routines", "", "certificate verify failed")]
        for problem, words in {
            ConnectionRefusedError(111, "Connection refused"): "Connection refused",
            ConnectionLost(): "the connection was lost",
            ConnectionDone(): "the connection was closed",
            NotConnectedError(): "the connection is not accepted",
            SSL.Error(errors): "TLS failed: certificate verify failed",
            SSL.Error(): "Error",
        }.items():
            self.assertEqual(words, describe(problem))

    def test_always_a_short_line(self) -> None:
        """
        Long texts are cut, further lines dropped, and errors without text are named by type.
        """
        self.assertEqual("a", describe(ValueError("a\nb\nc")))
        self.assertEqual(200, len(describe(ValueError("x" * 5000))))
        self.assertEqual("ValueError", describe(ValueError()))
        self.assertEqual("DNS lookup failed: no such name", describe(DNSLookupError("no such name.")))
        self.assertNotEqual("", describe(ResponseFailed([])))


class ConnectionTests(UpstreamTestCase):
    def test_are_kept_for_the_next_request(self) -> None:
        """
        Consecutive requests to one host use one connection.
        """
        for _ in range(3):
            self.fetched()
        self.assertEqual(2, len(self.daemon.back.ends))

    def test_are_closed_when_who_asked_leaves(self) -> None:
        """
        A client that disconnects while ECR builds a page of tags ends that request.
        """
        self.standin.hang("registry")
        reply = self.daemon.send("GET", "/v2/team/app/tags/list")
        self.flush()
        client, _ = self.daemon.back.ends[-1]
        self.assertTrue(client.connected)
        reply.leave()
        self.flush()
        self.assertFalse(client.connected)

    def test_of_a_second_daemon_are_its_own(self) -> None:
        """
        Two upstreams in one process share no state.
        """
        first = self.daemon
        other = StandIn(self.clock, registry="https://999999999999.dkr.ecr.eu-west-1.amazonaws.com")
        second = Daemon(other, self.clock, self.root / "second")
        second.flush()
        other.push_image("team/app", "other")
        self.assertEqual(200, second.ask("GET", "/v2/team/app/manifests/other").code)
        self.assertEqual(404, first.ask("GET", "/v2/team/app/manifests/other").code)
