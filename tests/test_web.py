"""
What clients see: paths, methods, headers, ranges, errors.
"""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs, quote, urlsplit

from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.browsers import Pages
from ecrproxy.byte_ranges import MOST, QUESTIONS, SMALL_GAP, Ranges, joined, questions
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.cached.bodies import SMALL_BLOB
from ecrproxy.http import web
from ecrproxy.http.answering import Missing, Ready
from ecrproxy.http.conditions import matches
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.identity import RegistryId
from ecrproxy.readiness import Readiness
from ecrproxy.registry import tag_lists
from ecrproxy.registry.tag_lists import JOINS, LIST_SECONDS
from tests.daemon import MIB, DaemonTestCase, Raw, Reply, noise
from tests.registry import digest_of, layer
from tests.registry_content import OCI_INDEX, OCI_MANIFEST, SCHEMA2
from tests.store_contract import being_read

HEX = "a" * 64

OURS = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


def chosen_of(header: str | None, size: int) -> list[tuple[int, int]] | None:
    """
    Return what a Range header selects of a blob; None if the header is ignored.
    """
    ranges = Ranges.parse(header)
    return ranges.of(size) if ranges is not None else None


class RangeHeaderTests(SynchronousTestCase):
    def test_reads_one_range(self) -> None:
        """
        First and last byte, from a byte on, and the last bytes: each is the bytes that it names, cut at the end.
        """
        for header, chosen in {
            "bytes=0-0": (0, 1),
            "bytes=2-4": (2, 5),
            "bytes=9-": (9, 10),
            "bytes=0-99": (0, 10),
            "bytes=2-" + "9" * 5000: (2, 10),
            "bytes=-" + "9" * 5000: (0, 10),
            "bytes=" + "0" * 5000 + "2-4": (2, 5),
            "bytes=-3": (7, 10),
            "bytes=-99": (0, 10),
            " bytes=2-4 ": (2, 5),
            "Bytes=2-4": (2, 5),
        }.items():
            self.assertEqual([chosen], chosen_of(header, 10), header)

    def test_reads_several_in_the_order_of_the_request(self) -> None:
        for header, chosen in {
            "bytes=0-1,3-4": [(0, 2), (3, 5)],
            "bytes=8-, 0-0": [(8, 10), (0, 1)],
            "bytes=0-1,-2": [(0, 2), (8, 10)],
            "bytes=,0-1,,2-3,": [(0, 2), (2, 4)],
            "bytes=0-1,10-": [(0, 2)],
            "bytes=0-1,1-2": [(0, 2), (1, 3)],
        }.items():
            self.assertEqual(chosen, chosen_of(header, 10), header)

    def test_more_bytes_than_the_blob_has_ask_for_the_whole(self) -> None:
        self.assertEqual([(0, 5), (5, 10)], chosen_of("bytes=0-4,5-9", 10))
        for header in ("bytes=0-4,4-9", "bytes=0-,0-", "bytes=" + ",".join(["0-0"] * 11)):
            self.assertEqual([], chosen_of(header, 10), header)

    def test_more_ranges_than_podman_sends_ask_for_the_whole(self) -> None:
        header = "bytes=" + ",".join(f"{at}-{at}" for at in range(0, 2 * MOST, 2))
        self.assertEqual(MOST, len(chosen_of(header, 10_000) or ()))
        self.assertIsNone(chosen_of(header + ",9000-9000", 10_000))

    def test_neighbours_are_joined_across_small_gaps(self) -> None:
        gap = SMALL_GAP
        for spans, expected in (
            ([], []),
            ([(5, 9)], [(5, 9)]),
            ([(0, 1), (1, 2), (gap, gap + 1)], [(0, gap + 1)]),
            ([(0, 1), (gap + 1, gap + 2)], [(0, 1), (gap + 1, gap + 2)]),
            ([(5, 9), (0, 1)], [(5, 9), (0, 1)]),
            ([(0, 9), (5, 12), (12, 13)], [(0, 9), (5, 13)]),
        ):
            self.assertEqual(expected, joined(spans), spans)

    def test_the_smallest_gaps_are_closed_where_there_are_too_many(self) -> None:
        a, b, c = 2 * SMALL_GAP, 5 * SMALL_GAP, 9 * SMALL_GAP  # gaps of 2, 3 and 4
        self.assertEqual([(0, a + 1), (b, b + 1), (c, c + 1)], joined([(0, 1), (a, a + 1), (b, b + 1), (c, c + 1)], 3))
        self.assertEqual([(0, b + 1), (c, c + 1)], joined([(0, 1), (a, a + 1), (b, b + 1), (c, c + 1)], 2))
        self.assertEqual([(0, c + 1)], joined([(0, 1), (a, a + 1), (b, b + 1), (c, c + 1)], 1))
        self.assertEqual([(9, 10), (1, 9)], joined([(9, 10), (1, 2), (8, 9)], 2))
        self.assertEqual([], joined([(9, 10), (1, 2)], 1))

    def test_no_more_is_read_in_vain_than_is_wanted(self) -> None:
        """
        Or than many small gaps have. Beyond, the whole is sent: its client has to accept it.
        """
        spans = [(at, at + 10) for at in range(0, 2**30, 2**24)]
        self.assertEqual([], questions(spans, ranged=True))
        self.assertEqual([(0, spans[-1][1])], questions(spans, ranged=False))
        half = [(at, at + 2**23) for at in range(0, 2**30, 2**24)]
        self.assertEqual(QUESTIONS, len(questions(half, ranged=True)))

    def test_leaves_aside_what_is_none(self) -> None:
        """
        No header, other units and nonsense select the whole.
        """
        for header in (
            None,
            "",
            "bytes=-",
            "bytes=4-2",
            "bytes=0-1,4-2",
            "bytes=0-1,x",
            "bytes=,",
            "bytes=a-b",
            "lines=0-1",
            "0-1",
            "bytes=\u0661-\u0662x",
        ):
            self.assertIsNone(chosen_of(header, 10), header)

    def test_refuses_what_has_no_byte(self) -> None:
        """
        A range behind the end, or of the last 0 bytes, is unsatisfiable; so is any of an empty blob.
        """
        for header, size in (
            ("bytes=10-", 10),
            ("bytes=10-12", 10),
            ("bytes=" + "9" * 5000 + "-", 10),
            ("bytes=" + "9" * 19 + "-" + "9" * 5000, 10**18 - 1),
            ("bytes=-0", 10),
            ("bytes=0-0", 0),
            ("bytes=-5", 0),
            ("bytes=10-,12-13", 10),
        ):
            with self.assertRaises(LookupError, msg=header):
                chosen_of(header, size)


class IfNoneMatchTests(SynchronousTestCase):
    def test_names_the_etag(self) -> None:
        """
        The tag alone, weak, in a list, or any at all.
        """
        for header in ('"x"', 'W/"x"', '"a", "x"', '"a",W/"x"', "*"):
            self.assertTrue(matches([header], '"x"'), header)

    def test_names_others(self) -> None:
        """
        No header, another tag, and the tag without its quotes.
        """
        for headers in ([], [""], ['"y"'], ["x"], ['"xx"'], ["W/*"]):
            self.assertFalse(matches(headers, '"x"'), headers)

    def test_several_fields_are_one_list(self) -> None:
        self.assertTrue(matches(['"a"', 'W/"x"', '"b"'], '"x"'))


class PathTests(DaemonTestCase):
    def test_base(self) -> None:
        """
        The proxy itself answers /v2 and /v2/: 200 and an empty JSON object.
        """
        for path in ("/v2", "/v2/", "/v2/?x=y"):
            self.assertWhole(self.get(path), b"{}\n")
            self.assertEqual((200, 3), (self.head(path).code, self.head(path).length))
        self.assertEqual([], self.standin.asked)

    def test_health(self) -> None:
        """
        /_health and /healthz are 200 without a body, whatever state ECR is in.
        """
        self.standin.refuse("registry")
        for path in ("/_health", "/healthz"):
            reply = self.get(path)
            self.assertWhole(reply, b"")
            self.assertIsNone(reply.header("Docker-Distribution-Api-Version"))

    def test_ready(self) -> None:
        """
        /readyz is 200 once there is a token.
        """
        reply = self.get("/readyz")
        said = {"ready": True, "alive": True, "can_serve": True, "can_fetch": True, "reasons": []}
        self.assertEqual(said, json.loads(reply.body))
        self.assertEqual((200, "application/json"), (reply.code, reply.header("Content-Type")))

    def test_not_ready(self) -> None:
        """
        /readyz is 503 with the reasons as JSON while the daemon is not ready.
        """

        async def readiness() -> Readiness:
            return Readiness(can_serve=False, can_fetch=False, reasons=("no token: AWS is away", 'the "disk" is full'))

        self.daemon.front.site = make_site(Missing(), Ready(readiness), self.clock)
        reply = self.get("/readyz")
        found = json.loads(reply.body)
        self.assertEqual(["no token: AWS is away", 'the "disk" is full'], found["reasons"])
        self.assertEqual((False, True, False), (found["ready"], found["alive"], found["can_fetch"]))
        self.assertEqual((503, "application/json"), (reply.code, reply.header("Content-Type")))

    def test_others_are_not_there(self) -> None:
        """
        Other paths are 404 in the registry's JSON, without a request to ECR.
        """
        for path in (
            "/",
            "/v1/",
            "/v2x",
            "/metrics",
            "/v2/_catalog/",
            "/v2/team/app",
            "/v2/team/app/tags",
            "/v2/team/app/tags/other",
            "/v2/team/app/blobs/uploads/",
            "/v2/team/app/manifests/",
            f"/v2/manifests/sha256:{HEX}",
            "//v1/",
            "/V2/",
            "/%762/",
        ):
            reply = self.get(path)
            self.assertIn(reply.code, (400, 404), path)
            self.assertIn(reply.error[1], ("UNSUPPORTED", "NAME_INVALID", "TAG_INVALID", "DIGEST_INVALID"), path)
        self.assertEqual([], self.standin.asked)

    def test_escaped_names_and_tags_are_decoded_once(self) -> None:
        """
        The cache, ECR and the counts of repositories see the one spelling.
        """
        image = self.standin.push_image("team/app", "v1.0")
        digest = image.digest.replace(":", "%3a")
        self.assertWhole(self.get(f"/v2/team%2Fapp/manifests/{digest}"), image.manifest, "MISS")
        self.assertWhole(self.get(f"/v2/team/app/manifests/{image.digest}"), image.manifest, "HIT")
        self.assertWhole(self.get("/v2/%74eam%2fapp/manifests/v1%2E0"), image.manifest)
        self.assertEqual({"/v2/team/app/manifests"}, {asked.path.rpartition("/")[0] for asked in self.standin.asked})
        ((name, _, _),) = self.daemon.figures.served.saved.top(5)
        self.assertEqual("team/app", name)

    def test_malformed_names_are_refused(self) -> None:
        """
        Names, tags and digests outside the grammar are 400 with the code that says which; ECR never sees them.
        """
        for path, code in {
            "/v2/Team/app/manifests/latest": "NAME_INVALID",
            "/v2/team/../secret/manifests/latest": "NAME_INVALID",
            "/v2/team/./app/manifests/latest": "NAME_INVALID",
            "/v2/team%2F%2Fapp/manifests/latest": "NAME_INVALID",
            "/v2/team%2f..%2fapp/manifests/latest": "NAME_INVALID",
            "/v2/team%00/manifests/latest": "NAME_INVALID",
            f"/v2/{'a' * 256}/manifests/latest": "NAME_INVALID",
            "/v2/team/app/manifests/.latest": "TAG_INVALID",
            "/v2/team/app/manifests/la%2574est": "TAG_INVALID",
            f"/v2/team/app/manifests/{'a' * 129}": "TAG_INVALID",
            f"/v2/team/app/manifests/md5:{'a' * 32}": "DIGEST_INVALID",
            "/v2/team/app/blobs/latest": "DIGEST_INVALID",
            f"/v2/team/app/blobs/sha256:{HEX[1:]}": "DIGEST_INVALID",
            f"/v2/team/app/blobs/sha256:{HEX.upper()}": "DIGEST_INVALID",
            f"/v2/team/app/blobs/sha512:{HEX}": "DIGEST_INVALID",
            "/v2/team/app/referrers/latest": "DIGEST_INVALID",
        }.items():
            reply = self.get(path)
            self.assertEqual((400, code), reply.error[:2], path)
        self.assertEqual([], self.standin.asked)

    def test_an_escaped_colon_is_a_colon(self) -> None:
        """
        A digest with its colon escaped is the same blob, and the same entry.
        """
        data = noise("x", 100)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        self.assertWhole(self.get(path), data, "MISS")
        self.assertWhole(self.get(path.replace(":", "%3A")), data, "HIT")
        self.assertWhole(self.get(path.replace(":", "%3a")), data, "HIT")

    def test_a_name_may_hold_the_protocols_words(self) -> None:
        """
        The last word counts: a repository may be called a/manifests/b.
        """
        image = self.standin.push_image("a/manifests/b", "latest")
        self.assertWhole(self.get("/v2/a/manifests/b/manifests/latest"), image.manifest)

    def test_an_absolute_target_is_answered_as_its_path(self) -> None:
        digest = self.standin.push_blob("team/app", b"data")
        ask = f"GET http://proxy.example/v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: other.example\r\n\r\n"
        got = self.daemon.raw(ask.encode())
        self.assertTrue(got.startswith(b"HTTP/1.1 200 OK\r\n") and got.endswith(b"\r\n\r\ndata"), got)


class MethodTests(DaemonTestCase):
    PATHS = (
        "/v2/",
        "/v2/team/app/manifests/latest",
        "/v2/team/app/blobs/uploads/",
        "/_health",
        "/readyz",
        "/",
        "/nothing",
    )

    def test_others_are_refused(self) -> None:
        """
        Any method other than GET or HEAD is 405 UNSUPPORTED with Allow, without a request.
        """
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"):
            for path in self.PATHS:
                reply = self.daemon.ask(method, path)
                self.assertRefused(reply, 405, "UNSUPPORTED")
                self.assertEqual("GET, HEAD", reply.header("Allow"))
        self.assertEqual([], self.standin.asked)

    def test_are_spelled_as_they_are(self) -> None:
        """
        A method in lower case is another method.
        """
        got = self.daemon.raw(b"get /v2/ HTTP/1.1\r\nHost: proxy\r\n\r\n")
        self.assertTrue(got.startswith(b"HTTP/1.1 405 "))

    def test_headers_do_not_change_them(self) -> None:
        """
        X-HTTP-Method-Override is ignored.
        """
        reply = self.get("/v2/", X_HTTP_Method_Override="DELETE")
        self.assertEqual(200, reply.code)

    def test_an_uploads_bytes_go_nowhere(self) -> None:
        """
        A push is rejected with 405, its body read or not.
        """
        got = self.daemon.raw(b"POST /v2/team/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
        self.assertTrue(got.startswith(b"HTTP/1.1 405 "), got)
        self.assertIn(b"\r\nAllow: GET, HEAD\r\n", got)
        self.assertIn(b"UNSUPPORTED", got)
        self.assertEqual(1, got.count(b"HTTP/1.1"))
        self.assertEqual([], self.standin.asked)


class NamespaceTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        for repository in ("image1", "image2", "image3", "team/image1"):
            self.standin.push_image(repository, "latest")
        self.start(pattern="image1|image3")

    def test_lets_in_exactly_what_it_matches(self) -> None:
        """
        The pattern must match the whole name: image1|image3 matches these two and nothing else.
        """
        for name, status in {
            "image1": 200,
            "image3": 200,
            "image2": 403,
            "team/image1": 403,
            "image1-secret": 403,
            "image1/x": 403,
            "image1/manifests/x": 403,
        }.items():
            self.assertEqual(status, self.get(f"/v2/{name}/manifests/latest").code, name)

    def test_outside_is_denied_without_asking(self) -> None:
        """
        A repository outside is DENIED for each kind of request; neither ECR nor the cache is used.
        """
        self.start()
        image = self.standin.push_image("image2", "latest")
        for path in (f"manifests/{image.digest}", f"blobs/{image.config}"):
            self.assertEqual(200, self.get(f"/v2/image2/{path}").code)
        self.start(pattern="image1|image3")
        self.standin.forget_asked()
        for path in (
            "manifests/latest",
            f"manifests/{image.digest}",
            f"blobs/{image.config}",
            "tags/list",
            f"referrers/{image.digest}",
        ):
            self.assertRefused(self.get(f"/v2/image2/{path}"), 403, "DENIED", "image2")
            self.assertEqual(403, self.head(f"/v2/image2/{path}").code)
        self.assertEqual([], self.standin.asked)

    def test_may_look_ahead(self) -> None:
        """
        A pattern may use look-ahead: everything except names that begin with secret.
        """
        self.standin.push_image("secret/app", "latest")
        self.start(pattern="(?!secret).*")
        self.assertEqual(200, self.get("/v2/image2/manifests/latest").code)
        self.assertRefused(self.get("/v2/secret/app/manifests/latest"), 403, "DENIED")


class HeaderTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.manifest = "/v2/team/app/manifests/latest"
        self.data = noise("x", 1000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"

    def test_may_be_any_bytes(self) -> None:
        """
        Headers that are not UTF-8 are read as they are, and cause no error.
        """
        for name in (b"Accept", b"If-None-Match", b"If-Range", b"Range", b"Authorization", b"User-Agent"):
            for path in (self.manifest, self.blob):
                line = b"GET %b HTTP/1.1\r\nHost: x\r\n%b: \xff\x99\r\n\r\n" % (path.encode(), name)
                got = self.daemon.raw(line)
                self.assertTrue(got.startswith(b"HTTP/1.1 200 "), (name, got[:300]))
        self.assertFalse([event for event in self.events if "log_failure" in event])

    def test_version_is_on_every_answer_once(self) -> None:
        """
        Docker-Distribution-Api-Version is on each answer under /v2/ exactly once, errors and refusals too.
        """
        denied = "/v2/team/app/blobs/" + digest_of(b"nothing")
        for method, path, headers in (
            ("GET", "/v2/", {}),
            ("GET", "/v2", {}),
            ("HEAD", self.manifest, {}),
            ("GET", self.manifest, {}),
            ("GET", self.blob, {}),
            ("GET", self.blob, {"Range": "bytes=0-1"}),
            ("GET", self.blob, {"Range": "bytes=5000-"}),
            ("GET", self.blob, {"If_None_Match": "*"}),
            ("GET", denied, {}),
            ("GET", "/v2/team/app/tags/list", {}),
            ("GET", f"/v2/team/app/referrers/{self.image.digest}", {}),
            ("GET", "/v2/Bad/manifests/x", {}),
            ("GET", "/v2/nothing", {}),
            ("PUT", self.manifest, {}),
        ):
            reply = self.daemon.ask(method, path, **headers)
            self.assertEqual(
                ["registry/2.0"], reply.headers.getRawHeaders("Docker-Distribution-Api-Version"), (method, path)
            )

    def test_manifest_has_digest_and_etag(self) -> None:
        """
        A manifest's GET and HEAD have its digest, which ECR leaves out of GET, an ETag, its type and length.
        """
        for ask in (self.get, self.head):
            reply = ask(self.manifest)
            self.assertEqual(
                (self.image.digest, f'"{self.image.digest}"', OCI_MANIFEST, len(self.image.manifest)),
                (
                    reply.header("Docker-Content-Digest"),
                    reply.header("ETag"),
                    reply.header("Content-Type"),
                    reply.length,
                ),
            )

    def test_blob_has_digest_and_etag(self) -> None:
        """
        A blob's GET and HEAD, cold or cached, have its digest, an ETag, its length, and Accept-Ranges.
        """
        for ask in (self.head, self.get, self.get, self.head):
            reply = ask(self.blob)
            self.assertEqual(
                (self.digest, f'"{self.digest}"', "application/octet-stream", 1000, "bytes"),
                (
                    reply.header("Docker-Content-Digest"),
                    reply.header("ETag"),
                    reply.header("Content-Type"),
                    reply.length,
                    reply.header("Accept-Ranges"),
                ),
            )

    def test_length_is_told(self) -> None:
        """
        Answers of known length have Content-Length, so the connection stays open: two requests on one are both
        answered.
        """
        line = f"GET {self.blob} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode()
        got = self.daemon.raw(line + line)
        self.assertEqual(2, got.count(b"HTTP/1.1 200 OK\r\n"))
        self.assertEqual(2, got.count(b"\r\nContent-Length: 1000\r\n"))
        self.assertEqual(2, got.count(self.data))
        self.assertNotIn(b"chunked", got)

    def test_caches_in_front_may_keep_what_is_named_by_its_digest_alone(self) -> None:
        by_digest = f"/v2/team/app/manifests/{self.image.digest}"
        for path, headers in (
            (self.blob, {}),
            (self.blob, {"Range": "bytes=0-1"}),
            (self.blob, {"If_None_Match": "*"}),
            (by_digest, {}),
        ):
            for reply in (self.get(path, **headers), self.head(path, **headers)):
                self.assertEqual("max-age=31536000, immutable", reply.header("Cache-Control"), (path, headers))
        lists = ("/v2/team/app/tags/list", f"/v2/team/app/referrers/{self.image.digest}")
        refused = (f"/v2/team/app/blobs/{digest_of(b'nothing')}", "/v2/team/app/manifests/nothing", "/v2/Bad/tags/list")
        for path in (self.manifest, *lists, *refused, "/v2/", "/healthz", "/nothing"):
            self.assertEqual("no-cache", self.get(path).header("Cache-Control"), path)
        self.assertEqual("no-cache", self.get(self.blob, Range="bytes=5000-").header("Cache-Control"))
        self.assertEqual("no-cache", self.get(self.manifest, If_None_Match="*").header("Cache-Control"))

    def test_server_names_no_software(self) -> None:
        """
        No answer reveals the version of Twisted.
        """
        for path in ("/v2/", self.blob, "/nothing", "/_health"):
            self.assertEqual("ecrproxy", self.get(path).header("Server"))
        self.assertEqual("ecrproxy", self.head(self.blob).header("Server"))
        self.assertNotIn(b"Twisted", self.daemon.raw(b"nonsense\r\n\r\n"))

    def test_the_cache_status_is_where_nginx_adds_it(self) -> None:
        """
        X-Cache-Status is on 200, 206 and 304, and on no error.
        """
        for headers, status in (
            ({}, 200),
            ({"Range": "bytes=0-1"}, 206),
            ({"If_None_Match": f'"{self.digest}"'}, 304),
        ):
            reply = self.get(self.blob, **headers)
            self.assertEqual(status, reply.code)
            self.assertIn(reply.cache, ("HIT", "MISS"))
        for reply in self._errors():
            self.assertIsNone(reply.cache)

    def _errors(self) -> list[Reply]:
        errors = [
            self.get(self.blob, Range="bytes=5000-"),
            self.get("/v2/team/app/manifests/nothing"),
            self.get("/v2/Bad/manifests/x"),
            self.daemon.ask("PUT", self.manifest),
        ]
        self.standin.refuse("registry")
        errors.append(self.get("/v2/team/app/manifests/other"))
        self.assertEqual([416, 404, 400, 405, 502], [reply.code for reply in errors])
        return errors

    def test_no_web_page_of_another_site_may_read_an_answer(self) -> None:
        """
        No answer allows other sites' scripts, nor can it be embedded or taken for another type.
        """
        replies = [
            self.get(self.blob),
            self.get(self.manifest),
            self.get("/v2/team/app/tags/list"),
            self.get("/healthz"),
        ]
        for reply in (*replies, *self._errors()):
            self.assertIsNone(reply.header("Access-Control-Allow-Origin"))
            self.assertEqual("nosniff", reply.header("X-Content-Type-Options"))
            self.assertEqual("same-origin", reply.header("Cross-Origin-Resource-Policy"))
        self.assertIn(b"Cross-Origin-Resource-Policy: same-origin\r\n", self.daemon.raw(b"nonsense\r\n\r\n"))

    def test_a_web_page_that_may_not_ask_is_refused(self) -> None:
        """
        Of another site, or of one whose name was made to resolve to this machine; nothing is requested from ECR for it.
        """
        asked = len(self.standin.asked)
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
            {"Accept_Language": "en", "Host": "evil.example:5000"},
            {"Accept_Language": "", "Host": "evil.example"},
            # An image or a frame of another site, over plain HTTP: Chromium sends no other sign.
            {"Accept_Language": "en", "Host": "192.0.2.1:5000"},
            {"Accept_Language": "en", "Host": "ecr-proxy:5000"},
            {"Accept_Language": "*", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Site": "cross-site"},
        ):
            reply = self.get("/v2/team/app/tags/list", **headers)
            self.assertEqual((403, "web-page"), (reply.code, reply.header("X-Cache-Reason")), headers)
            self.assertEqual(200, self.get("/healthz", **headers).code)
        self.assertEqual(asked, len(self.standin.asked))

    def test_programs_and_who_looks_for_himself_are_answered(self) -> None:
        """
        Whatever name programs use, Node's fetch among them; a person in a browser if it reports a user's navigation.
        """
        for headers in (
            {"Host": "registry.example:5000"},
            {"Accept_Language": "*", "Sec_Fetch_Mode": "cors", "Host": "registry.example:5000"},
            {"Accept_Language": "en", "Host": "[::1]:5000", "Sec_Fetch_Site": "none"},
            {"Accept_Language": "en", "Host": "localhost:5000", "Sec_Fetch_Site": "same-origin"},
            {"Accept_Language": "en", "Host": "registry.example", "Sec_Fetch_Site": "none"},  # TLS ends before here
        ):
            self.assertEqual(200, self.get(self.manifest, **headers).code, headers)

    def test_the_origin_that_the_operator_names_may_ask(self) -> None:
        """
        Its pages may read every answer, and people may use its name; those of other sites get none.
        """
        self.start(pages=Pages("http://ui.example:8080"))
        reply = self.get(self.manifest, Origin="http://ui.example:8080")
        self.assertEqual((200, "http://ui.example:8080"), (reply.code, reply.header("Access-Control-Allow-Origin")))
        self.assertIsNone(reply.header("Cross-Origin-Resource-Policy"))
        self.assertEqual(200, self.get(self.manifest, Accept_Language="en", Host="ui.example").code)
        self.assertEqual(403, self.get(self.manifest, Origin="http://evil.example").code)
        self.start(pages=Pages("*"))
        reply = self.get(self.manifest, Origin="http://any.example", Accept_Language="en", Host="any.example")
        self.assertEqual((200, "*"), (reply.code, reply.header("Access-Control-Allow-Origin")))

    def test_a_page_that_can_not_know_the_password_need_not_be_told_apart(self) -> None:
        """
        If clients authenticate, or over TLS, people may use any name.
        """
        named = {"Accept_Language": "en", "Host": "registry.example"}
        self.start(pages=Pages(proved=True))
        self.assertEqual(200, self.get(self.manifest, **named).code)
        self.assertEqual(403, self.get(self.manifest, Origin="http://evil.example", **named).code)
        self.start()
        self.daemon.scheme = "https"
        self.assertEqual(200, self.get(self.manifest, **named).code)

    def test_hsts_is_for_tls(self) -> None:
        """
        Strict-Transport-Security is on answers over TLS, as nginx adds it, and never without.
        """
        for path, status, told in (
            (self.blob, 200, "max-age=31536000"),
            ("/v2/", 200, "max-age=31536000"),
            ("/v2/team/app/manifests/nothing", 404, None),
        ):
            self.daemon.scheme = "https"
            reply = self.get(path)
            self.assertEqual((status, told), (reply.code, reply.header("Strict-Transport-Security")))
            self.daemon.scheme = "http"
            self.assertIsNone(self.get(path).header("Strict-Transport-Security"))

    def test_several_if_none_match_fields_are_one_list(self) -> None:
        image = self.standin.push_image("team/app", "latest")
        for tags, status in (((f'"{image.digest}"', '"b"'), b"304"), (('"a"', '"b"'), b"200")):
            fields = "".join(f"If-None-Match: {each}\r\n" for each in tags)
            got = self.daemon.raw(f"GET /v2/team/app/manifests/latest HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
            self.assertEqual(status, got[9:12], tags)

    def test_what_a_tag_leads_to_varies_with_what_the_client_accepts(self) -> None:
        image = self.standin.push_image("team/app", "latest")
        by_tag, by_digest = (f"/v2/team/app/manifests/{each}" for each in ("latest", image.digest))
        for method, headers in (("GET", {}), ("HEAD", {}), ("GET", {"If_None_Match": f'"{image.digest}"'})):
            self.assertEqual("Accept", self.daemon.ask(method, by_tag, **headers).header("Vary"))
            self.assertIsNone(self.daemon.ask(method, by_digest, **headers).header("Vary"))
        self.assertIsNone(self.get(f"/v2/team/app/blobs/{image.config}").header("Vary"))

    def test_if_none_match(self) -> None:
        """
        A client that has the manifest or blob already gets 304 without a body, warm or cold; with another tag all of
        it.
        """
        for path, digest, body in (
            (self.manifest, self.image.digest, self.image.manifest),
            (self.blob, self.digest, self.data),
        ):
            for _ in range(2):
                reply = self.get(path, If_None_Match=f'"{digest}"')
                self.assertEqual((304, b"", "whole"), (reply.code, bytes(reply.body), reply.ended))
                self.assertEqual(f'"{digest}"', reply.header("ETag"))
                self.assertWhole(self.get(path, If_None_Match='"other"'), body)
            self.assertEqual(304, self.head(path, If_None_Match=f'W/"{digest}"').code)
        self.assertEqual(set(), being_read(self.daemon.store))

    def test_a_client_credential_goes_nowhere(self) -> None:
        """
        A client's headers, above all its Authorization, reach neither ECR nor the bucket.
        """
        for path in (self.manifest, self.blob, "/v2/team/app/tags/list"):
            reply = self.get(
                path,
                Authorization="Basic Y2xpZW50OmNsaWVudA==",
                Cookie="a=b",
                X_Forwarded_For="192.0.2.9",
                Accept_Language="de",
                Sec_Fetch_Site="none",
                Host="localhost",
            )
            self.assertEqual(200, reply.code)
        for asked in self.standin.asked:
            self.assertNotIn("Y2xpZW50OmNsaWVudA==", repr(asked.headers))
            self.assertEqual(set(), {"cookie", "x-forwarded-for", "accept-language"} & set(asked.headers))
        self.assertNotIn("Y2xpZW50", self.logged())

    def test_no_location(self) -> None:
        """
        A client is never redirected to the bucket.
        """
        for reply in (self.get(self.blob), self.head(self.blob)):
            self.assertEqual((200, None), (reply.code, reply.header("Location")))

    def test_old_clients(self) -> None:
        """
        HTTP/1.0 is answered whole, and the connection closed.
        """
        got = self.daemon.raw(f"GET {self.blob} HTTP/1.0\r\n\r\n".encode())
        self.assertTrue(got.endswith(b"\r\n\r\n" + self.data))


class BlobRangeTests(DaemonTestCase):
    """
    Ranges of a blob that is cold, in flight, and cached.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("ranged", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def cold(self, **headers: str) -> Reply:
        for path in self.files():
            path.unlink()
        return self.get(self.path, **headers)

    def joined(self, **headers: str) -> Reply:
        for path in self.files():
            path.unlink()
        self.standin.hold(self.digest)
        first = self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        reply = self.get(self.path, **headers)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(first, self.data, "MISS")
        return reply

    def warm(self, **headers: str) -> Reply:
        return self.get(self.path, **headers)

    def each(self, **headers: str) -> list[tuple[str, Reply]]:
        return [
            ("MISS", self.cold(**headers)),
            ("JOINED", self.joined(**headers)),
            ("HIT", self.warm(**headers)),
        ]

    def test_single(self) -> None:
        """
        One range is answered 206 with exactly its bytes and Content-Range.
        """
        for header, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=0-999", 0, 1000),
            ("bytes=250000-", 250_000, 300_000),
            ("bytes=150000-160000", 150_000, 160_001),
            ("bytes=299999-299999", 299_999, 300_000),
            ("bytes=100-999999999", 100, 300_000),
            ("bytes=-10", 299_990, 300_000),
            ("bytes=-999999", 0, 300_000),
        ):
            for word, reply in self.each(Range=header):
                self.assertWhole(reply, self.data[start:stop], word, 206)
                self.assertEqual(f"bytes {start}-{stop - 1}/300000", reply.header("Content-Range"))
                self.assertEqual(stop - start, reply.length)

    def test_not_satisfiable(self) -> None:
        """
        A range behind the end is 416 with the length.
        """
        for header in ("bytes=300000-", "bytes=300000-300001", "bytes=-0"):
            for _, reply in self.each(Range=header):
                self.assertRefused(reply, 416, "RANGE_INVALID", "300000")
                self.assertEqual("bytes */300000", reply.header("Content-Range"))

    def test_whole(self) -> None:
        """
        Too many bytes in several ranges, other units and nonsense get the whole blob with 200.
        """
        for header in ("bytes=0-,5-6", "bytes=5-2", "lines=1-2", "bytes=x-y", "bytes=-"):
            for word, reply in self.each(Range=header):
                self.assertWhole(reply, self.data, word)
                self.assertIsNone(reply.header("Content-Range"))

    def test_if_range(self) -> None:
        """
        A range counts if If-Range names this blob; else the whole is sent.
        """
        for _, reply in self.each(Range="bytes=5-9", If_Range=f'"{self.digest}"'):
            self.assertWhole(reply, self.data[5:10], code=206)
        for other in ('"other"', f'W/"{self.digest}"', "Thu, 01 Jan 2026 00:00:00 GMT"):
            for _, reply in self.each(Range="bytes=5-9", If_Range=other):
                self.assertWhole(reply, self.data)

    def test_head_has_none(self) -> None:
        """
        HEAD returns the whole length, whatever range it names.
        """
        for reply in (
            self.head(self.path, Range="bytes=0-1"),
            self.get(self.path),
            self.head(self.path, Range="bytes=0-1"),
        ):
            self.assertEqual((200, 300_000, None), (reply.code, reply.length, reply.header("Content-Range")))

    def test_of_a_manifest_are_sent_too(self) -> None:
        """
        Containerd 2.1.0 to 2.1.4 requests manifests in ranges, and fails if it gets the whole.
        """
        small = self.standin.push_image("team/app", "small").manifest
        large = self.standin.push_image("team/app", "large", layers=[layer(f"{n}", b"") for n in range(900)]).manifest
        self.assertGreater(len(large), 2 * SMALL_BLOB)
        for tag, manifest in (("small", small), ("large", large), ("small", small), ("large", large)):
            path = f"/v2/team/app/manifests/{tag}"
            middle = len(manifest) // 2
            for header, part in {
                f"bytes={middle}-": manifest[middle:],
                f"bytes=0-{middle - 1}": manifest[:middle],
                "bytes=-2": manifest[-2:],
            }.items():
                reply = self.get(path, Range=header)
                self.assertEqual((206, part), (reply.code, bytes(reply.body)), (tag, header))
            self.assertEqual(206, self.get(path, Range="bytes=0-1,4-5").code)
            self.assertEqual(416, self.get(path, Range=f"bytes={len(manifest)}-").code)
            self.assertEqual(manifest, self.get(path, Range="bytes=0-1", If_Range='"another"').body)

    def test_of_nothing(self) -> None:
        """
        The empty blob has no satisfiable range.
        """
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', b'')}"
        for _ in range(2):
            self.assertEqual(416, self.get(path, Range="bytes=0-").code)

    def test_of_an_uncached_blob(self) -> None:
        """
        A range of a blob that can't be cached is answered as well.
        """
        self.start(limit=1000)
        self.assertWhole(self.get(self.path, Range="bytes=1000-1999"), self.data[1000:2000], "BYPASS", 206)

    def test_of_a_large_uncached_blob(self) -> None:
        """
        So it is if the blob is far larger than what is held of it in memory, with another reader of the whole.
        """
        self.start(limit=1000)
        data = noise("large", 12 * MIB)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        part, whole = self.daemon.send("GET", path, Range="bytes=1000-1999"), self.daemon.send("GET", path)
        self.flush()
        self.assertWhole(whole, data)
        self.assertWhole(part, data[1000:2000], code=206)

    def test_many_of_a_cold_blob_cost_one_transfer(self) -> None:
        """
        A client that fetches a cold blob in parallel ranges, as containerd does, costs one transfer.
        """
        replies = [self.daemon.send("GET", self.path, Range=f"bytes={n}-{n + 99_999}") for n in (0, 100_000, 200_000)]
        self.flush()
        self.assertEqual(self.data, b"".join(bytes(reply.body) for reply in replies))
        self.assertEqual(300_000, self.standin.bytes_sent)


class WrongBytesTests(DaemonTestCase):
    """
    Content with another digest never completes an answer, and is never cached.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("right", 200_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def assertNextSucceeds(self) -> None:
        self.assertEqual(([], []), (self.files(), self.arriving()))
        self.assertEqual(0, self.promised())
        self.standin.heal()
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def assertIncomplete(self, reply: Reply) -> None:
        """
        Assert that the client has fewer bytes than announced, and sees the break.
        """
        self.assertEqual("broken", reply.ended)
        if reply.length is not None:
            self.assertLess(len(reply.body), reply.length)

    def test_are_one_line_of_log_however_many_clients_they_cost(self) -> None:
        self.standin.corrupt(self.digest, bytes(200_000))
        self.standin.hold(self.digest)
        replies = [self.get(self.path) for _ in range(3)]
        self.standin.release(self.digest)
        self.flush()
        for reply in replies:
            self.assertIncomplete(reply)
        told = [each for each in self.logged().splitlines() if " /v2/" not in each and "client" in each.lower()]
        self.assertEqual([], told)
        self.assertEqual(1, self.logged().count("what arrived is not"))

    def test_other_bytes_of_the_same_length(self) -> None:
        """
        Right length, wrong bytes: the last byte is held back and the connection aborted.
        """
        wrong = bytes(200_000)
        self.standin.corrupt(self.digest, wrong)
        reply = self.get(self.path)
        self.assertIncomplete(reply)
        self.assertNextSucceeds()

    def test_one_wrong_bit(self) -> None:
        """
        A single flipped bit, in the first byte or the last, is enough.
        """
        for place in (0, -1):
            wrong = bytearray(self.data)
            wrong[place] ^= 1
            self.standin.corrupt(self.digest, bytes(wrong))
            self.assertIncomplete(self.get(self.path))
            self.assertNextSucceeds()
            for path in self.files():
                path.unlink()

    def test_short(self) -> None:
        """
        A shorter blob with a clean end is not taken for the whole.
        """
        self.standin.corrupt(self.digest, self.data[:-1])
        self.assertIncomplete(self.get(self.path))
        self.assertNextSucceeds()

    def test_long(self) -> None:
        """
        A blob with a byte too many is not taken for the right one.
        """
        self.standin.corrupt(self.digest, self.data + b"x")
        self.assertIncomplete(self.get(self.path))
        self.assertNextSucceeds()

    def test_broken_off(self) -> None:
        """
        A transfer that breaks off, and can't be resumed, breaks the answer off.
        """
        self.standin.refuse("bucket")
        self.standin.break_off(100_000)
        reply = self.get(self.path)
        self.assertBroken(reply, self.data)
        self.assertNextSucceeds()

    def test_nothing_instead(self) -> None:
        """
        An empty 200 in a blob's place is an upstream error: 502, not an empty blob.
        """
        self.standin.corrupt(self.digest, b"")
        reply = self.get(self.path)
        self.assertEqual((502, "UNAVAILABLE"), (reply.code, reply.error[1]))
        self.assertNextSucceeds()

    def test_something_instead_of_nothing(self) -> None:
        """
        Bytes in the place of the empty blob are not sent.
        """
        digest = self.standin.push_blob("team/app", b"")
        self.standin.corrupt(digest, b"something")
        self.assertIncomplete(self.get(f"/v2/team/app/blobs/{digest}"))
        self.assertFalse(self.has(digest))

    def test_a_page_instead(self) -> None:
        """
        A login page with status 200 is not a blob.
        """
        self.standin.fail("bucket", status=200, body=b"<html>Log in</html>", headers={"Content-Type": "text/html"})
        self.assertIncomplete(self.get(self.path))
        self.assertNextSucceeds()

    def test_packed(self) -> None:
        """
        An answer with an unrequested gzip coding is rejected with 502: it is neither unpacked nor passed on.
        """
        import gzip

        self.standin.fail("bucket", status=200, body=gzip.compress(self.data), headers={"Content-Encoding": "gzip"})
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE", "gzip")
        for asked in self.standin.asked:
            self.assertEqual("identity", asked.headers["accept-encoding"])
        self.assertNextSucceeds()

    def test_with_a_coding_that_changes_no_byte(self) -> None:
        """
        S3 kept an empty coding for uploads in chunks until 2024, and other stores keep C{aws-chunked}.
        """
        for number, coding in enumerate(("", "Identity", "aws-chunked", "identity, AWS-Chunked", ", ")):
            data = noise(f"coding {number}", 100_000)
            digest = self.standin.push_blob("team/app", data)
            self.standin.fail("bucket", status=200, body=data, headers={"Content-Encoding": coding}, times=1)
            self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), data)

    def test_a_manifest_with_a_coding_that_changes_no_byte(self) -> None:
        """
        The same holds for manifests.
        """
        image = self.standin.push_image("team/app", "coded")
        headers = {"Content-Type": image.media_type, "Content-Encoding": ""}
        self.standin.fail("registry", status=200, body=image.manifest, headers=headers, path_contains="coded")
        self.assertWhole(self.get("/v2/team/app/manifests/coded"), image.manifest)

    def test_a_packed_manifest(self) -> None:
        """
        The same holds for manifests.
        """
        self.standin.fail("registry", status=200, body=b"x", headers={"Content-Encoding": "gzip"})
        self.assertRefused(self.get("/v2/team/app/manifests/latest"), 502, "UNAVAILABLE", "gzip")

    def test_for_range_readers_of_the_whole(self) -> None:
        self.standin.corrupt(self.digest, bytes(200_000))
        for header in ("bytes=0-", "bytes=0-199999", "bytes=-200000", "bytes=-999999"):
            self.assertIncomplete(self.get(self.path, Range=header))
        self.assertNextSucceeds()

    def test_after_a_part_was_sent_are_dropped_and_logged(self) -> None:
        """
        A client verifies the range that it requested; the cache keeps nothing with another digest.
        """
        self.standin.corrupt(self.digest, bytes(200_000))
        with capturedLogs() as events:
            for header in ("bytes=0-0", "bytes=1000-50000", "bytes=-1", "bytes=1-"):
                self.get(self.path, Range=header)
                self.assertFalse(self.has(self.digest))
        logged = [formatEvent(event) for event in events]
        self.assertEqual(4, sum("1 partial responses had bytes of" in line for line in logged), logged)
        self.assertEqual([], self.arriving())
        self.assertNextSucceeds()

    def test_of_another_size_are_not_sent_as_a_part(self) -> None:
        """
        A page in place of the blob is rejected: nothing else would show it, for ranges are not verified.
        """
        image = self.standin.push_image("team/app", "latest", layers=[self.data])
        self.standin.corrupt(image.layers[0], b"<html>Sign in to continue</html>" * 100)
        for limit in (2**30, 100_000):
            self.start(limit=limit)
            self.get("/v2/team/app/manifests/latest")
            self.assertEqual(502, self.get(f"/v2/team/app/blobs/{image.layers[0]}", Range="bytes=0-9").code)

    def mislead(self, wrong: bytes) -> None:
        """
        Have the bucket send C{wrong} once in place of the blob; there is no cached file then.
        """
        self.standin.corrupt(self.digest, wrong)
        self.get(self.path)
        self.standin.heal()
        self.remove_files()

    def remove_files(self) -> None:
        for path in self.files():
            path.unlink()

    def test_of_another_size_mislead_no_reader_of_a_part_afterwards(self) -> None:
        """
        A bucket's earlier answer is checked with ECR before a range is rejected for it.
        """
        for wrong in (self.data[:-1], self.data + b"more", b""):
            self.start()
            self.mislead(wrong)
            self.assertWhole(self.get(self.path, Range="bytes=10-19"), self.data[10:20], "MISS", 206)
            self.remove_files()

    def test_of_another_size_mislead_none_of_several_at_once_afterwards(self) -> None:
        """
        A request that waits for another's is not rejected for what that one got.
        """
        headers = [{"Range": "bytes=10-19"}, {"Range": "bytes=150-159"}, {}]
        for wrong in (self.data[:100], self.data + b"more"):
            for limit in (2**30, 1000):
                self.start(limit=limit)
                self.mislead(wrong)
                replies = [self.daemon.send("GET", self.path, **each) for each in headers]
                self.flush()
                self.assertWhole(replies[0], self.data[10:20], code=206)
                self.assertWhole(replies[1], self.data[150:160], code=206)
                self.assertWhole(replies[2], self.data)
                self.remove_files()

    def test_of_another_size_under_way_have_no_part_refused(self) -> None:
        """
        A range beyond the size that a bucket reports is requested separately, if ECR confirms the size.
        """
        for limit in (2**30, 1000):
            self.start(limit=limit)
            self.standin.corrupt(self.digest, self.data[:100])
            self.standin.hold(self.digest)
            whole = self.daemon.send("GET", self.path)
            self.flush()
            self.standin.heal()
            replies = [self.daemon.send("GET", self.path, Range=each) for each in ("bytes=150-159", "bytes=200000-")]
            self.flush()
            self.standin.release(self.digest)
            self.flush()
            self.assertWhole(replies[0], self.data[150:160], "BYPASS", 206)
            self.assertEqual((416, "bytes */200000"), (replies[1].code, replies[1].header("Content-Range")))
            self.assertIncomplete(whole)

    def test_of_another_size_mislead_nobody_who_asks_at_the_same_time(self) -> None:
        """
        Nor clients that wait for the same answer of the bucket.
        """
        for wrong in (self.data[:-1], self.data + b"more", b""):
            self.start()
            self.mislead(wrong)
            self.standin.quirks.latency = 1
            replies = [self.get(self.path, Range="bytes=10-19") for _ in range(4)]
            whole = self.get(self.path)
            self.standin.quirks.latency = 0
            self.pass_time(10)
            for reply in replies:
                self.assertWhole(reply, self.data[10:20], None, 206)
            self.assertWhole(whole, self.data)
            self.remove_files()

    def test_a_part_does_not_wait_for_the_whole(self) -> None:
        self.standin.hold(self.digest)
        whole, part = self.get(self.path), self.get(self.path, Range="bytes=10-19")
        self.standin.deliver(self.digest, 199_999)
        self.flush()
        self.assertEqual((199_999, ""), (len(whole.body), whole.ended))
        self.assertWhole(part, self.data[10:20], "JOINED", 206)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(whole, self.data)

    def test_for_all_who_joined(self) -> None:
        """
        All followers of a transfer of wrong bytes are cut off, uncached ones as well.
        """
        self.standin.corrupt(self.digest, bytes(200_000))
        for limit in (2**30, 1000):
            self.start(limit=limit)
            replies = [self.daemon.send("GET", self.path) for _ in range(3)]
            self.flush()
            for reply in replies:
                self.assertIncomplete(reply)
        self.start()
        self.assertNextSucceeds()

    def test_on_a_connection_that_is_kept(self) -> None:
        """
        A connection on which an answer broke ends there: the next answer is not taken for the missing bytes.
        """
        line = f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        self.standin.refuse("bucket")
        self.standin.break_off(100_000)
        client = Raw()
        self.daemon.front.connect(client, "proxy.example", 80, secure=False).write(line + line)
        self.flush()
        self.assertTrue(client.closed)
        self.assertEqual(1, client.got.count(b"HTTP/1.1"))
        self.assertLess(len(client.got), 101_000)

    def test_old_clients_see_it_too(self) -> None:
        """
        Over HTTP/1.0 as well there are fewer bytes than announced.
        """
        self.standin.corrupt(self.digest, bytes(200_000))
        got = self.daemon.raw(f"GET {self.path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = got.partition(b"\r\n\r\n")
        self.assertIn(b"Content-Length: 200000", head)
        self.assertLess(len(body), 200_000)


class UpstreamTroubleTests(DaemonTestCase):
    """
    How ECR's and the bucket's failures look to a client.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", 1000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"
        self.manifest = "/v2/team/app/manifests/latest"

    def test_throttled(self) -> None:
        """
        ECR's 429 is passed on as TOOMANYREQUESTS with Retry-After, ECR's own if it sent one.
        """
        for given, told in (
            (None, "1"),
            ("17", "17"),
            ("soon\r\nX-Evil: 1", "1"),
            ("Wed, 21 Oct 2026 07:28:00 GMT", "1"),
        ):
            self.start()
            fault = self.standin.throttle("registry", retry_after=given)
            for path in (self.blob, self.manifest, "/v2/team/app/tags/list"):
                reply = self.get(path)
                self.assertRefused(reply, 429, "TOOMANYREQUESTS")
                self.assertEqual(told, reply.header("Retry-After"))
            fault.remove()

    def test_failing(self) -> None:
        """
        ECR's 5xx are 502, 503 or 504, with ECR's name and its answer.
        """
        for status, told in {500: 502, 501: 502, 502: 502, 503: 503, 504: 504, 418: 502}.items():
            self.start()
            fault = self.standin.fail("registry", status=status, body=b"<html>secret</html>")
            for path in (self.blob, self.manifest, "/v2/team/app/tags/list"):
                reply = self.get(path)
                self.assertRefused(reply, told, "UNAVAILABLE", f" answers {status}")
                self.assertNotIn(b"secret", reply.body)
            fault.remove()
        self.assertWhole(self.get(self.blob), self.data, "MISS")

    def test_unreachable(self) -> None:
        """
        If ECR can't be reached, 502 names its host.
        """
        from twisted.internet.error import ConnectionRefusedError

        self.daemon.back.down = ConnectionRefusedError()
        reply = self.get(self.blob)
        self.assertRefused(reply, 502, "UNAVAILABLE", "123456789012.dkr.ecr.eu-west-1.amazonaws.com can't be reached")

    def test_silent(self) -> None:
        """
        If ECR or the bucket does not answer within 25 seconds, 504 names which.
        """
        for service, host in (("registry", "123456789012.dkr.ecr"), ("bucket", "starport-layer-bucket")):
            fault = self.standin.hang(service)  # type: ignore[arg-type]
            reply = self.daemon.send("GET", self.blob)
            self.pass_time(24)
            self.assertEqual(0, reply.code)
            self.pass_time(2)
            self.assertRefused(reply, 504, "UNAVAILABLE", host)
            fault.remove()

    def test_silent_for_ten_seconds(self) -> None:
        """
        What ECR or the bucket has lost is sent again, so that no client has an error.
        """
        for service in ("registry", "bucket"):
            data = noise(service, 100_000)
            digest = self.standin.push_blob("team/app", data)
            self.standin.hang(service)
            replies = [self.daemon.send("GET", f"/v2/team/app/blobs/{digest}") for _ in range(3)]
            self.pass_time(10)
            self.standin.heal()
            self.pass_time(6)
            for reply in replies:
                self.assertWhole(reply, data)

    def test_a_refusal_of_the_second_request_does_not_outweigh_the_first(self) -> None:
        """
        A server with too much to do is slow with the first, and refuses the second: the first is still answered.
        """
        for status in (429, 503):
            digest = self.standin.push_blob("team/app", noise(str(status), 100))
            self.standin.quirks.latency = 12
            reply = self.daemon.send("HEAD", f"/v2/team/app/blobs/{digest}")
            self.flush()
            self.standin.quirks.latency = 0
            fault = self.standin.fail("registry", status=status, path_contains=str(digest))
            self.pass_time(11)
            fault.remove()
            self.pass_time(2)
            self.assertEqual(200, reply.code)

    def test_a_refusal_of_the_first_request_is_not_waited_with(self) -> None:
        """
        The second one is given up: the server answers, so it is asked again at once.
        """
        digest = self.standin.push_blob("team/app", noise("refused", 100))
        self.standin.quirks.latency = 6
        reply = self.daemon.send("HEAD", f"/v2/team/app/blobs/{digest}")
        self.flush()
        self.standin.quirks.latency = 0
        hanging = self.standin.hang("registry", times=1)
        self.pass_time(5)
        fault = self.standin.fail("registry", status=503, times=1)
        self.pass_time(3)
        self.assertEqual((0, 0, 200), (hanging.times, fault.times, reply.code))

    def test_a_bucket_that_refuses(self) -> None:
        """
        A bucket's answer other than a blob is 502, its 503 is 503; the bucket is named, without its words or URL.
        """
        self.standin.push_image("team/app", "latest")
        for status in (403, 404, 500, 503, 206):
            fault = self.standin.fail("bucket", status=status, body=b"<Error>X-Amz-Signature</Error>")
            reply = self.get(self.blob)
            told = 503 if status == 503 else 502
            self.assertRefused(reply, told, "UNAVAILABLE", f"s3.eu-west-1.amazonaws.com answers {status}")
            self.assertNotIn(b"X-Amz", reply.body)
            fault.remove()
        self.assertWhole(self.get(self.blob), self.data, "MISS")

    def test_a_bucket_that_closes(self) -> None:
        """
        A bucket that closes without an answer is 502.
        """
        self.standin.refuse("bucket")
        self.assertRefused(self.get(self.blob), 502, "UNAVAILABLE", "can't be reached")

    def test_refused_requests(self) -> None:
        """
        ECR's 400 about the request itself is the client's, in ECR's words, and costs no new token.
        """
        body = b'{"errors": [{"code": "TAG_INVALID", "message": "no such tag can be"}]}'
        self.standin.fail("registry", status=400, body=body)
        self.assertRefused(self.get(self.manifest), 400, "TAG_INVALID", "no such tag can be")
        self.assertEqual(1, self.standin.count("registry"))

    def test_a_page_of_something_else_is_no_refusal_of_ecrs(self) -> None:
        for status in (403, 404):
            self.standin.fail("registry", status=status, body=b"404 page not found\n")
            for path in (
                self.blob,
                self.manifest,
                "/v2/team/app/tags/list",
                f"/v2/team/app/referrers/{self.digest}",
            ):
                reply = self.get(path)
                self.assertRefused(reply, 502, "UNAVAILABLE", f"something other than ECR answers {status}")
                self.assertNotIn(b"page not found", reply.body)

    def test_a_bug_of_ours_tells_nothing(self) -> None:
        """
        An unexpected exception is 500 in the registry's JSON, with the details only in the log.
        """

        def failing(*args: object) -> object:
            raise ZeroDivisionError("a secret detail")

        self.patch(self.daemon.pull_through, "blob", failing)
        reply = self.get(self.blob)
        self.assertRefused(reply, 500, "UNKNOWN")
        self.assertNotIn(b"secret", reply.body)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_a_bug_while_an_answer_goes_out_aborts_it(self) -> None:
        """
        An exception after the headers have left ends the connection: a cut answer never looks whole.
        """
        data = noise("blob", 200_000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"

        def failing(*args: object) -> object:
            raise ZeroDivisionError

        self.patch(web, "_source", failing)
        self.assertBroken(self.get(path), data)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))


class TagListTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", *(f"v{number}" for number in range(250)))
        self.path = "/v2/team/app/tags/list"

    def link(self, reply: Reply) -> str:
        found = re.fullmatch(r'<([^>]*)>; rel="next"', reply.header("Link") or "")
        assert found is not None, reply.header("Link")
        return found[1]

    def test_is_passed_through(self) -> None:
        """
        A page of tags is ECR's, as JSON, and never cached.
        """
        reply = self.get(f"{self.path}?n=100")
        self.assertEqual((200, "BYPASS", "application/json"), (reply.code, reply.cache, reply.header("Content-Type")))
        page = json.loads(reply.body)
        self.assertEqual(("team/app", 100), (page["name"], len(page["tags"])))
        self.assertEqual([], self.files("."))

    def test_pages_lead_on_to_the_last(self) -> None:
        """
        Following Link from page to page returns each tag once; links are relative, ECR's token in them is unchanged.
        """
        path, tags = f"{self.path}?n=100", list[str]()
        for pages in range(3):
            reply = self.get(path)
            tags += json.loads(reply.body)["tags"]
            if pages == 2:
                self.assertIsNone(reply.header("Link"))
                break
            path = self.link(reply)
            self.assertTrue(path.startswith(f"{self.path}?"), path)
            self.assertEqual("100", parse_qs(urlsplit(path).query)["n"][0])
        self.assertEqual(sorted(f"v{number}" for number in range(250)), sorted(tags))
        asked = [asked.query for asked in self.standin.requests("registry", path_contains="tags/list")]
        self.assertEqual("n=100", asked[0])
        given = self.daemon.ask("GET", f"{self.path}?n=100")
        ecr = re.search(r"last=([^&>]*)", self.link(given))
        assert ecr is not None
        self.assertIn("%2B", ecr[1])  # what would break if it were decoded on its way
        self.assertIn(f"last={ecr[1]}", asked[1])

    def test_a_link_may_be_any_bytes(self) -> None:
        """
        A Link of ECR's that is not UTF-8 is used if possible, and does not fail the page.
        """
        on = f'<{self.path}?last=a>; rel="next"'
        for link, expected in ((b"<\xff\x99", None), (b'</v2/x?last=a>; rel="next", \xff', on)):
            reply = self.daemon.send("GET", f"{self.path}?n=5")
            self.answer_with(b"HTTP/1.1 200 OK\r\nLink: %b\r\nContent-Length: 2\r\n\r\n{}" % link)
            self.assertEqual((200, expected), (reply.code, reply.header("Link")))

    def all_tags(self, count: int) -> list[str]:
        """
        Push so many tags, and return them in ECR's order.
        """
        tags = [f"v{number}" for number in range(count)]
        self.image = self.standin.push_image("team/app", *tags)
        return self.standin.repositories["team/app"].tag_names()

    def test_without_n_all_tags_come_as_one_list(self) -> None:
        """
        Joined from ECR's pages, with the largest page size; from C{last} on, if the client says so.
        """
        tags = self.all_tags(2500)
        reply = self.get(self.path)
        self.assertEqual((200, None, "BYPASS"), (reply.code, reply.header("Link"), reply.cache))
        self.assertEqual({"name": "team/app", "tags": tags}, json.loads(reply.body))
        self.assertEqual(["1000"] * 3, [parse_qs(asked.query)["n"][0] for asked in self.standin.asked])
        last = parse_qs(urlsplit(self.link(self.get(f"{self.path}?n=1"))).query)["last"][0]
        rest = self.get(f"{self.path}?last={quote(last, safe='')}")
        self.assertEqual(tags[1:], json.loads(rest.body)["tags"])
        self.assertEqual(len(reply.body), self.head(self.path).length)

    def test_a_page_without_tags_does_not_end_the_list(self) -> None:
        on = [{"Link": f'<{self.path}?nextToken={token}>; rel="next"'} for token in "ab"]
        pages: list[tuple[list[str] | None, dict[str, str]]] = [([], on[0]), (["one"], on[1]), (None, {})]
        for tags, headers in reversed(pages):  # the fault that was added last comes first
            self.standin.fail(
                "registry", status=200, body=json.dumps({"tags": tags}).encode(), headers=headers, times=1
            )
        self.assertEqual({"name": "team/app", "tags": ["one"]}, json.loads(self.get(self.path).body))
        self.assertEqual(
            ["", "a", "b"], [parse_qs(each.query).get("nextToken", [""])[0] for each in self.standin.asked]
        )

    def test_what_is_more_than_all_tags_is_led_on_to(self) -> None:
        """
        A list ends at a hundred thousand; its link leads to the rest, as one list again.
        """
        self.patch(tag_lists, "ALL_TAGS", 2000)
        tags, found, path = self.all_tags(4500), list[str](), self.path
        for count in (2000, 2000, 500):
            reply = self.get(path)
            page = json.loads(reply.body)["tags"]
            self.assertEqual(count, len(page))
            found += page
            if count == 2000:
                path = self.link(reply)
                self.assertNotIn("n", parse_qs(urlsplit(path).query))
        self.assertEqual((tags, None), (found, reply.header("Link")))

    def test_tags_longer_than_the_specification_has_are_listed_among_the_others(self) -> None:
        """
        ECR's may have 300 characters: one of them must not fail the whole list.
        """
        for length in (129, 300):
            tags = sorted(["t" * length, *self.all_tags(1001)])
            self.standin.push_image("team/app", "t" * length)
            self.assertEqual(tags, sorted(json.loads(self.get(self.path).body)["tags"]))
            self.standin.delete_tag("team/app", "t" * length)

    def test_a_list_of_too_many_bytes_is_led_on_from(self) -> None:
        self.patch(tag_lists, "ALL_BYTES", 10_000)
        tags = self.all_tags(2500)
        reply = self.get(self.path)
        found = json.loads(reply.body)["tags"]
        self.assertEqual(tags[:2000], found)
        self.assertEqual(tags[2000:], json.loads(self.get(self.link(reply)).body)["tags"])

    def test_parameters_that_ecr_does_not_know_make_no_other_list(self) -> None:
        """
        Made-up ones share the one list; those of a link of ECR's lead on by pages.
        """
        self.all_tags(2500)
        replies = [self.daemon.send("GET", f"{self.path}?x={number}") for number in range(20)]
        self.flush()
        self.assertEqual({200}, {reply.code for reply in replies})
        self.assertEqual(3, len(self.standin.asked))
        self.patch(tag_lists, "ALL_TAGS", 1)
        on = {"Link": f'<{self.path}?cursor=c&n=1000>; rel="next"'}
        for _ in range(2):
            self.standin.fail("registry", status=200, body=b'{"tags": ["a"]}', headers=on, times=1)
        self.assertEqual(["cursor=c", "n=1000"], sorted(self.link(self.get(self.path)).partition("?")[2].split("&")))

    def test_lists_of_one_repository_are_made_one_at_a_time(self) -> None:
        """
        However many begin somewhere else: other repositories need not wait for them, and a wait that is too long is
        rejected.
        """
        self.standin.push_image("team/other", "v1")
        self.standin.hang("registry", "/team/app/")
        replies = [self.daemon.send("GET", f"{self.path}?last={number}") for number in range(20)]
        self.flush()
        self.assertEqual(1, len(self.standin.asked))
        self.assertEqual(200, self.get("/v2/team/other/tags/list").code)
        replies[0].leave()
        self.flush()
        self.assertEqual(3, len(self.standin.asked))
        self.clock.advance(LIST_SECONDS)
        self.flush()
        self.assertEqual({503}, {reply.code for reply in replies[2:]})
        self.assertRefused(replies[-1], 503, "UNAVAILABLE", "n=1000")

    def test_a_list_from_the_beginning_waits_for_none_that_begin_elsewhere(self) -> None:
        """
        Clients can make up as many of those as they like.
        """
        tags = self.all_tags(1002)
        self.standin.hang("registry", "/team/app/", times=1)
        replies = [self.daemon.send("GET", f"{self.path}?last={number}") for number in range(20)]
        self.flush()
        self.assertEqual(tags, json.loads(self.get(self.path).body)["tags"])
        for reply in replies:
            reply.leave()
        self.flush()

    def test_a_list_from_the_beginning_waits_for_none_of_others_that_begin_elsewhere(self) -> None:
        tags = self.all_tags(1002)
        paths = [f"/v2/other/{number}/tags/list" for number in range(JOINS)]
        for number in range(JOINS):
            self.standin.push_image(f"other/{number}", *tags)
        queries = [parse_qs(urlsplit(self.link(self.get(f"{path}?n=1"))).query)["last"][0] for path in paths]
        self.standin.quirks.latency = 1
        replies = [
            self.daemon.send("GET", f"{path}?last={quote(last)}") for path, last in zip(paths, queries, strict=True)
        ]
        self.flush()
        self.pass_time(1)
        self.standin.quirks.latency = 0
        self.assertEqual(tags, json.loads(self.get(self.path).body)["tags"])
        for reply in replies:
            reply.leave()
        self.flush()

    def test_a_page_that_fails_gives_no_list(self) -> None:
        """
        An incomplete list is worse than none; nor are pages that form a circle, or hold no tags, joined.
        """
        around = {"Link": f'<{self.path}?last=a>; rel="next"'}
        for body in (b'{"tags": ["a"]}', b'{"tags": null}', b"{}", b'{"tags": {}}', b'{"tags": [1]}', b"["):
            self.standin.fail("registry", status=200, body=body, headers=around)
            self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")
            self.standin.heal()
            self.pass_time(1)  # for the quota of lists
        self.standin.deny()
        self.standin.fail("registry", status=200, body=b'{"tags": ["a"]}', headers=around, times=1)
        self.assertRefused(self.get(self.path), 403, "DENIED")

    def test_n_above_a_thousand_is_clamped(self) -> None:
        """
        ECR rejects more than 1000 a page: the proxy asks for 1000 instead of failing.
        """
        for given, asked in {"1000": "n=1000", "1001": "n=1000", "999999": "n=1000", "0007": "n=7", "5": "n=5"}.items():
            self.standin.forget_asked()
            reply = self.get(f"{self.path}?n={given}")
            self.assertEqual(200, reply.code)
            self.assertEqual(asked, self.standin.asked[0].query)

    def test_n_that_is_no_number_is_refused(self) -> None:
        """
        An invalid number is 400 without asking ECR.
        """
        for given in ("x", "-1", "1.5", "", "%2531", "1e3", "%C2%B2", "+1", "9" * 4000):
            self.assertRefused(self.get(f"{self.path}?n={given}"), 400, "PAGINATION_NUMBER_INVALID")
        self.assertEqual([], self.standin.asked)

    def test_an_escaped_n_is_decoded(self) -> None:
        self.assertEqual(20, len(json.loads(self.get(f"{self.path}?n=2%30").body)["tags"]))
        self.assertEqual("n=20", self.standin.asked[0].query)

    def test_no_tags_at_all_are_asked_for_as_they_are(self) -> None:
        """
        ECR decides what n=0 means, whether it rejects it or returns an empty list.
        """
        self.assertRefused(self.get(f"{self.path}?n=0"), 400, "UNSUPPORTED", "maxResults")
        self.assertEqual("n=0", self.standin.asked[0].query)
        # Reported of n=10000, and so perhaps of this.
        body = json.dumps({"errors": [{"code": "UNSUPPORTED", "message": "Invalid parameter at 'maxResults'"}]})
        fault = self.standin.fail("registry", status=405, body=body.encode())
        self.assertRefused(self.get(f"{self.path}?n=0"), 405, "UNSUPPORTED", "maxResults")
        fault.remove()
        self.standin.fail("registry", status=200, body=b'{"name": "team/app", "tags": []}')
        self.assertWhole(self.get(f"{self.path}?n=0"), b'{"name": "team/app", "tags": []}')

    def test_what_neither_signs_nor_moves_is_passed_on(self) -> None:
        """
        A client may have a parameter from a Link of ECR's. What only another escape could write is none of those.
        """
        self.get(f"{self.path}?ns={OURS}&n=5&nextToken=a%2Bb&X-Amz-Signature=z&_method=DELETE&a%26b=c&d%3D=e")
        self.assertEqual("n=5&nextToken=a%2Bb", self.standin.asked[0].query)

    def test_a_link_of_elsewhere_stays_here(self) -> None:
        """
        Only the query of ECR's Link is used: the link always leads to the proxy.
        """
        self.standin.fail(
            "registry",
            status=200,
            body=b'{"name": "team/app", "tags": []}',
            headers={"Link": '<https://evil.example/steal?last=a%2Bb&n=3&token=x&a%26b=c#y>; rel="next"'},
        )
        path, _, query = self.link(self.get(f"{self.path}?n=3")).partition("?")
        self.assertEqual((self.path, ["last=a%2Bb", "n=3", "token=x"]), (path, sorted(query.split("&"))))
        self.get(f"{path}?{query}")
        self.assertEqual(["last=a%2Bb", "n=3", "token=x"], sorted(self.standin.asked[-1].query.split("&")))

    def test_a_last_of_nonsense_is_ecrs_to_refuse(self) -> None:
        """
        ECR's answer to an unknown last is passed on.
        """
        self.assertRefused(self.get(f"{self.path}?last=nonsense"), 400, "UNSUPPORTED", "nextToken")

    def test_of_an_unknown_repository(self) -> None:
        """
        NAME_UNKNOWN.
        """
        self.assertRefused(self.get("/v2/nobody/tags/list"), 404, "NAME_UNKNOWN")

    def test_head(self) -> None:
        """
        HEAD of a page has its headers and no body.
        """
        reply = self.head(self.path)
        self.assertEqual((200, b"", "whole"), (reply.code, bytes(reply.body), reply.ended))
        self.assertEqual(len(self.get(self.path).body), reply.length)


class ReferrersTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        subject = {"mediaType": OCI_MANIFEST, "digest": self.image.digest, "size": len(self.image.manifest)}
        for kind in ("application/spdx+json", "application/vnd.example.sig"):
            manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind, "subject": subject}
            self.standin.push_manifest("team/app", manifest, OCI_MANIFEST)
        self.path = f"/v2/team/app/referrers/{self.image.digest}"

    def test_are_passed_through(self) -> None:
        """
        The referrers of a digest are listed as an OCI index, as ECR lists them.
        """
        reply = self.get(self.path)
        self.assertEqual((200, "BYPASS", OCI_INDEX), (reply.code, reply.cache, reply.header("Content-Type")))
        self.assertEqual(2, len(json.loads(reply.body)["manifests"]))
        self.assertIsNone(reply.header("OCI-Filters-Applied"))

    def test_are_filtered_by_type(self) -> None:
        """
        The client's artifactType, escaped as it was, filters; and the answer says so.
        """
        reply = self.get(f"{self.path}?artifactType=application%2Fspdx%2Bjson&ns={OURS}")
        (found,) = json.loads(reply.body)["manifests"]
        self.assertEqual("application/spdx+json", found["artifactType"])
        self.assertEqual("artifactType", reply.header("OCI-Filters-Applied"))
        self.assertEqual("artifactType=application%2Fspdx%2Bjson", self.standin.asked[0].query)

    def test_have_the_media_type_of_an_index_whatever_ecr_says(self) -> None:
        page = bytes(self.get(self.path).body)
        for sent in (
            "text/html",
            "application/json",
            "text/plain; charset=utf-8",
            OCI_MANIFEST,
            f"{OCI_INDEX}; charset=x",
        ):
            fault = self.standin.fail("registry", status=200, headers={"Content-Type": sent}, body=page)
            reply = self.get(self.path)
            self.assertEqual((200, OCI_INDEX, page), (reply.code, reply.header("Content-Type"), reply.body))
            fault.remove()

    def test_that_are_no_index_are_not_passed_on(self) -> None:
        for body in (b"<html>", b"", b"{}", b'{"manifests": {}}', b"[]"):
            fault = self.standin.fail("registry", status=200, headers={"Content-Type": "text/html"}, body=body)
            self.assertRefused(self.get(self.path), 502, "UNAVAILABLE")
            fault.remove()

    def test_a_page_in_place_of_a_refusal_is_not_ecrs(self) -> None:
        """
        ECR supports referrers: an error page must not become an empty list.
        """
        for status in (403, 404):
            fault = self.standin.fail("registry", status=status, body=b"404 page not found\n")
            self.assertRefused(self.get(self.path), 502, "UNAVAILABLE", "something other than ECR")
            fault.remove()

    def test_a_refusal_is_ecrs(self) -> None:
        """
        Some clients take it for a registry without referrers, and fall back to tags.
        """
        for status, code in (
            (400, "UNSUPPORTED"),
            (405, "UNSUPPORTED"),
            (406, "MANIFEST_INVALID"),
            (405, ""),
            (406, ""),
        ):
            body = json.dumps({"errors": [{"code": code, "message": "ECR says no"}]}).encode() if code else b""
            self.standin.fail("registry", status=status, body=body)
            reply = self.get(self.path)
            self.assertRefused(reply, status, code or "UNSUPPORTED", "ECR")
            self.assertEqual(1, len(self.standin.asked))
            self.standin.forget_asked()

    def test_lead_on(self) -> None:
        """
        If ECR sends a page of them, the link to the next leads to the proxy with ECR's query.
        """
        self.standin.fail(
            "registry",
            status=200,
            body=b'{"manifests": []}',
            headers={"Link": '<https://ecr.example/v2/x?nextToken=a%2Bb%3D&artifactType=y>; rel="next"'},
        )
        found = re.fullmatch(r'<([^?]*)[?]([^>]*)>; rel="next"', self.get(self.path).header("Link") or "")
        assert found is not None
        pairs = ["artifactType=y", "nextToken=a%2Bb%3D"]
        self.assertEqual((self.path, pairs), (found[1], sorted(found[2].split("&"))))
        self.get(f"{found[1]}?{found[2]}")
        self.assertEqual(pairs, sorted(self.standin.asked[-1].query.split("&")))

    def test_are_never_more_than_4_mib(self) -> None:
        """
        A page that does not end is rejected.
        """
        self.standin.fail("registry", status=200, body=bytes(4 * 2**20 + 1))
        self.assertRefused(self.get(self.path), 502, "UNAVAILABLE", "4194304")


class QueryTests(DaemonTestCase):
    def test_does_not_reach_ecr_for_content(self) -> None:
        """
        A query on a blob or manifest, above all containerd's ns, neither reaches ECR nor makes another entry.
        """
        image = self.standin.push_image("team/app", "latest")
        for kind, digest in (("manifests", image.digest), ("blobs", image.config)):
            path = f"/v2/team/app/{kind}/{digest}"
            self.assertEqual("MISS", self.get(f"{path}?ns=123456789012.dkr.ecr.eu-west-1.amazonaws.com").cache)
            self.assertEqual("HIT", self.get(f"{path}?X-Amz-Signature=1").cache)
        self.assertEqual([""], sorted({asked.query for asked in self.standin.requests("registry")}))

    def test_of_another_registry_is_refused(self) -> None:
        """
        A client that uses the proxy as the mirror of another registry does not get this one's images.
        """
        image = self.standin.push_image("team/app", "latest")
        for kind, digest in (("manifests", image.digest), ("blobs", image.config), ("manifests", "latest")):
            for query in ("ns=docker%2Eio", "n%73=docker.io", "ns=docker.io:443", "ns="):
                reply = self.get(f"/v2/team/app/{kind}/{digest}?a=b&{query}")
                self.assertEqual((404, "unknown-registry"), (reply.code, reply.header("X-Cache-Reason")))
        self.assertEqual([], self.standin.requests("registry"))

    def test_of_an_alias_is_answered(self) -> None:
        image = self.standin.push_image("team/app", "latest")
        self.start(aliases={RegistryId.of_host("mirror.test:5000")})
        for name in ("mirror.test:5000", "123456789012.dkr-ecr.eu-west-1.on.aws"):
            self.assertEqual(200, self.get(f"/v2/team/app/manifests/{image.digest}?ns={name}").code)

    def test_of_strange_characters_is_refused(self) -> None:
        """
        Characters that are invalid in URLs are rejected at once.
        """
        for query in ("a=b{c}", 'a="b"', "a=<b>", "a=b^"):
            got = self.daemon.raw(f"GET /v2/team/app/tags/list?{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            self.assertTrue(got.startswith(b"HTTP/1.1 400 "), query)
        self.assertEqual([], self.standin.asked)


class CacheKeyTests(DaemonTestCase):
    def test_variables_are_the_requests(self) -> None:
        """
        The variables of PROXY_CACHE_KEY have the values of the request that came.
        """
        expanded: list[str] = []
        expand = CacheKey.expand

        def spy(key: CacheKey, *args: object) -> str:
            expanded.append(expand(key, *args))  # type: ignore[arg-type]
            return expanded[-1]

        self.patch(CacheKey, "expand", spy)
        self.start(
            cache_key="$uri|$request_uri|$args|$arg_x|$host|$scheme|$request_method|$remote_addr|$http_x_a"
            "|$repository|$reference|$digest"
        )
        self.standin.push_image("team/app", "v1")
        self.daemon.scheme = "https"
        self.head("/v2/team/app/manifests/v1?x=1&y=2", X_A="b")
        target = "/v2/team/app/manifests/v1"
        self.assertEqual(
            [
                f"{target}|{target}?x=1&y=2|x=1&y=2|1|proxy.example|https|HEAD|192.0.2.7|b|team/app|v1|",
            ],
            expanded,
        )

    def test_a_request_without_a_host_has_none(self) -> None:
        """
        HTTP/1.0 need not name a host, and a Unix socket has no address to use instead.
        """
        self.start(cache_key="$host|$uri")
        self.standin.push_image("team/app", "v1")
        for socket in ("/run/ecrproxy/clients", ""):
            self.daemon.front.socket = socket
            for path in ("/v2/", "/v2/team/app/manifests/v1"):
                self.assertEqual(b"HTTP/1.0 200", self.daemon.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode())[:12])


class LogTests(DaemonTestCase):
    def test_a_line_for_a_request(self) -> None:
        """
        Each request has a line with client, method, path, status, bytes and cache status; no query.
        """
        data = noise("x", 1000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        self.get(f"{path}?token=secret")
        self.assertIn(f"192.0.2.7 GET {path} 200 1000 bytes 0.000 s MISS", self.logged())
        self.assertNotIn("secret", self.logged())

    def test_the_time_that_it_took(self) -> None:
        """
        The line has the seconds that the answer took.
        """
        self.standin.quirks.latency = 2
        self.daemon.send("GET", "/v2/team/app/manifests/x")
        self.pass_time(3)
        self.assertRegex(self.logged(), r"manifests/x 404 \d+ bytes 2\.000 s -")

    def test_what_is_no_text_does_not_break_it(self) -> None:
        """
        A path of any bytes and any length is logged in a line.
        """
        self.daemon.raw(b"GET /\xff\x00" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertLess(max(map(len, self.logged().splitlines())), 1200)

    def test_who_leaves_is_no_error(self) -> None:
        """
        A client that disconnects in the middle of an answer leaves no traceback in the log.
        """
        data = noise("x", 300_000)
        digest = self.standin.push_blob("team/app", data)
        self.standin.hold(digest)
        reply = self.get(f"/v2/team/app/blobs/{digest}")
        self.standin.deliver(digest, 1000)
        self.flush()
        reply.leave()
        self.flush()
        self.standin.release(digest)
        self.flush()
        self.assertEqual([], [event for event in self.events if event.get("log_failure")])


class SiteTests(DaemonTestCase):
    def test_offers_no_http2(self) -> None:
        """
        Over TLS only HTTP/1.1 is offered.
        """
        self.assertIsInstance(self.daemon.site, RegistrySite)
        self.assertEqual([b"http/1.1"], self.daemon.site.acceptableProtocols())

    def test_two_registries_share_nothing(self) -> None:
        """
        Two daemons in one process share only what they are given.
        """
        digest = self.standin.push_blob("team/app", b"x")
        path = f"/v2/team/app/blobs/{digest}"
        first = self.daemon
        second = self.start(pattern="other")
        self.assertEqual(200, first.ask("GET", path).code)
        self.assertEqual(403, second.ask("GET", path).code)


class AcceptTests(DaemonTestCase):
    def test_headers_are_joined(self) -> None:
        """
        Types in several Accept headers count as if they were in one.
        """
        image = self.standin.push_image("team/app", "latest")
        accept = f"Accept: {SCHEMA2}\r\nAccept: {OCI_MANIFEST}\r\n"
        got = self.daemon.raw(f"GET /v2/team/app/manifests/latest HTTP/1.1\r\nHost: x\r\n{accept}\r\n".encode())
        self.assertTrue(got.endswith(image.manifest))
        self.assertEqual(f"{SCHEMA2}, {OCI_MANIFEST}", self.standin.asked[0].headers["accept"])
