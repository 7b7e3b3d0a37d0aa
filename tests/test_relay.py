"""
A worker in front of the first process, both in memory: who answers what, and how it passes.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectError, ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.crowds import SILENT_SECONDS
from ecrproxy.access.turns import QueueTimeoutError
from ecrproxy.cache.entries import entry_name
from ecrproxy.cache.store import entry_path
from ecrproxy.http.channel import SETTLED_SECONDS
from ecrproxy.http.relay import AGAIN_SECONDS, CONNECT_SECONDS, CONNECTING, KEY, Queued
from ecrproxy.http.telling import TELL_SECONDS
from ecrproxy.identity import RegistryId
from ecrproxy.oci import parse_route
from tests.daemon import BUFFER, MIB, Daemon, DaemonTestCase, End, Reply, noise
from tests.registry_content import OCI_INDEX, SCHEMA2
from tests.together import Together

LARGE = 8 * MIB
ENTRY, ANOTHER = entry_path("ab" * 32), entry_path("cd" * 32)


class RelayTestCase(DaemonTestCase):
    """
    Crowd of a worker.
    """

    daemon: Together
    kind = Together

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.data = noise("relayed", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"
        self.by_digest = f"/v2/team/app/manifests/{self.image.digest}"
        self.by_tag = "/v2/team/app/manifests/latest"

    def start(self, **options: Any) -> Together:
        """
        Start both, over the test's cache directory.
        """
        super().start(**options)
        return self.daemon

    @property
    def handed_on(self) -> list[str]:
        """
        What the worker has handed on.
        """
        return [f"{each.method.decode()} {each.uri.decode()}" for each in self.daemon.seen]

    def wire(self) -> tuple[End, End]:
        """
        The worker's and the first process's end of the connection that was made last.
        """
        assert self.daemon.between is not None
        return self.daemon.between.ends[-1]

    def large(self) -> tuple[str, bytes]:
        """
        Push a large blob; give its path and its bytes.
        """
        data = noise("large", LARGE)
        return f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}", data


class AlteredTests(RelayTestCase):
    def test_a_worker_drops_what_was_altered(self) -> None:
        """
        A worker proves a file at its first use, as the first process does, and asks it for what it had to drop.
        """
        self.get(self.blob)
        path = self.file_of(self.digest)
        path.write_bytes(self.data[::-1])
        self.assertBroken(self.get(self.blob), b"")
        self.assertFalse(path.exists())
        self.assertWhole(self.get(self.blob), self.data, "MISS")
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        self.pass_time(TELL_SECONDS)
        self.assertEqual(self.used(), self.daemon.store.ledger.total)


class HitTests(RelayTestCase):
    """
    What a worker answers by itself.
    """

    def test_of_content_need_no_other_process(self) -> None:
        """
        What one request brought in, the worker gives by itself from then on: manifest, config, blob, and parts of it.
        """
        config = f"/v2/team/app/blobs/{self.image.config}"
        for path in (self.by_digest, config, self.blob):
            first = self.get(path)
            self.assertEqual((200, "MISS"), (first.code, first.cache))
            self.daemon.seen.clear()
            for _ in range(2):
                self.assertWhole(self.get(path), bytes(first.body), "HIT")
            head = self.head(path)
            self.assertEqual((200, "HIT", len(first.body)), (head.code, head.cache, head.length))
            self.assertEqual([], self.handed_on)
        part = self.get(self.blob, Range="bytes=1000-1999")
        self.assertWhole(part, self.data[1000:2000], "HIT", code=206)
        self.assertEqual(304, self.get(self.blob, If_None_Match=f'"{self.digest}"').code)
        self.assertEqual([], self.handed_on)

    def test_need_no_ecr(self) -> None:
        """
        Such hits are given while ECR and even the first process are away.
        """
        self.get(self.by_digest)
        self.get(self.blob)
        self.away()
        self.standin.refuse("registry")
        self.assertWhole(self.get(self.by_digest), self.image.manifest, "HIT")
        self.assertWhole(self.get(self.blob), self.data, "HIT")

    def away(self) -> None:
        """
        Have the first process gone.
        """
        assert self.daemon.between is not None
        self.daemon.between.down = ConnectionRefusedError()
        for _, server in self.daemon.between.ends:
            server.abortConnection()
        self.flush()

    def test_of_other_repositories_are_none(self) -> None:
        """
        A repository that was not asked about is not given another's content by a worker either.
        """
        self.get(self.blob)
        self.standin.push_blob("team/other", self.data)
        other = f"/v2/team/other/blobs/{self.digest}"
        self.daemon.seen.clear()
        self.assertWhole(self.get(other), self.data, "REVALIDATED")
        self.assertEqual([f"GET {other}"], self.handed_on)
        self.assertWhole(self.get(other), self.data, "HIT")
        self.assertEqual([f"GET {other}"], self.handed_on)
        self.assertEqual(404, self.get(f"/v2/team/none/blobs/{self.digest}").code)

    def test_of_tags_are_none(self) -> None:
        """
        Where a tag leads is asked of the first process each time.
        """
        for status in ("MISS", "REVALIDATED", "REVALIDATED"):
            self.assertWhole(self.get(self.by_tag), self.image.manifest, status)
        self.assertEqual([f"GET {self.by_tag}"] * 3, self.handed_on)

    def test_of_tags_that_are_taken_on_trust(self) -> None:
        """
        For the time of PROXY_TAG_TTL a worker gives what a tag led to by itself, no longer.
        """
        self.start(tag_ttl=60)
        accept = self.image.media_type
        self.get(self.by_tag, Accept=accept)
        self.daemon.seen.clear()
        for _ in range(2):
            self.assertWhole(self.get(self.by_tag, Accept=accept), self.image.manifest, "HIT")
        self.assertEqual([], self.handed_on)
        self.pass_time(61)
        self.assertWhole(self.get(self.by_tag, Accept=accept), self.image.manifest, "REVALIDATED")
        self.assertEqual([f"GET {self.by_tag}"], self.handed_on)

    def test_of_the_base_and_of_health(self) -> None:
        """
        /v2/ and /healthz are answered by the worker; whether all is ready, the first process knows.
        """
        for path in ("/v2/", "/healthz", "/_health"):
            self.assertEqual(200, self.get(path).code)
        ready = self.get("/readyz")
        self.assertEqual((200, True), (ready.code, json.loads(ready.body)["ready"]))
        self.away()
        for path, status in (("/v2/", 200), ("/healthz", 200), ("/_health", 200), ("/readyz", 503)):
            self.assertEqual(status, self.get(path).code, path)


class AnswerTests(RelayTestCase):
    """
    What passes from the first process to a client.
    """

    def setUp(self) -> None:
        super().setUp()
        self.together = self.daemon
        self.alone = Daemon(self.standin, self.clock, self.root / "alone")
        self.daemons.append(self.alone)
        self.alone.flush()

    def compare(self, method: str, path: str, status: int, **headers: str) -> Reply:
        """
        Ask a daemon of one process and one with workers, and find no difference.
        """
        for daemon in (self.alone, self.together):
            daemon.scheme = self.alone.scheme
        replies = [daemon.ask(method, path, **headers) for daemon in (self.alone, self.together)]
        one, passed = replies
        self.assertEqual((status, "whole"), (one.code, one.ended), path)
        self.assertEqual((one.code, one.ended, one.length), (passed.code, passed.ended, passed.length), path)
        self.assertEqual(one.body, passed.body)
        own = {b"Date", b"X-Request-Id"}
        without = [
            {name: values for name, values in each.headers.getAllRawHeaders() if name not in own} for each in replies
        ]
        self.assertEqual(without[0], without[1], f"{method} {path}")
        return passed

    def test_of_each_kind_are_the_same(self) -> None:
        """
        With workers each answer has the status, the headers and the body that it has from one process.
        """
        for number in range(3):
            self.standin.push_manifest("team/app", self.image.manifest, self.image.media_type, f"tag{number}")
        none = "/v2/team/app/blobs/sha256:" + "0" * 64
        for scheme in ("http", "https"):
            self.alone.scheme = scheme
            for method in ("HEAD", "GET"):
                self.compare(method, self.by_tag, 200)
                self.compare(method, self.by_digest, 200)
                self.compare(method, self.blob, 200)
                self.compare(method, "/v2/team/app/tags/list?n=2", 200)
                self.compare(method, none, 404)
                self.compare(method, "/v2/team/app/manifests/none", 404)
                self.compare(method, f"/v2/team/app/referrers/{self.image.digest}", 200)
                self.compare(method, "/v2/", 200)
                self.compare(method, "/readyz", 200)
                self.compare(method, "/nothing", 404)
                self.compare(method, "/v2/team/app/what", 404)
        self.assertIn('rel="next"', self.compare("GET", "/v2/team/app/tags/list?n=2", 200).header("Link") or "")
        self.assertEqual(self.image.digest, self.compare("GET", self.by_tag, 200).header("Docker-Content-Digest"))

    def test_of_parts_are_the_same(self) -> None:
        """
        Ranges, and those that can't be, pass with their headers.
        """
        passed = self.compare("GET", self.blob, 206, Range="bytes=1000-1999")
        self.assertEqual("bytes 1000-1999/300000", passed.header("Content-Range"))
        self.assertEqual([f"GET {self.blob}"], self.handed_on)
        path, _ = self.large()
        refused = self.compare("GET", path, 416, Range=f"bytes={LARGE}-")
        self.assertEqual(f"bytes */{LARGE}", refused.header("Content-Range"))

    def test_that_a_client_has_already_are_the_same(self) -> None:
        """
        304 passes, without a body and without a length.
        """
        self.compare("GET", self.by_tag, 200)
        passed = self.compare("GET", self.by_tag, 304, If_None_Match=f'"{self.image.digest}"')
        self.assertEqual((b"", None), (bytes(passed.body), passed.header("Content-Length")))
        self.assertEqual([f"GET {self.by_tag}"] * 2, self.handed_on)

    def test_304_has_no_length_on_the_wire(self) -> None:
        """
        RFC 9110, 8.6: a length in a 304 is that of the 200. Twisted's client hides the header, so bytes are compared.
        """
        self.compare("GET", self.by_tag, 200)
        asked = f'GET {self.by_tag} HTTP/1.1\r\nHost: x\r\nIf-None-Match: "{self.image.digest}"\r\n\r\n'.encode()
        for daemon in (self.alone, self.together):
            answer = daemon.raw(asked)
            self.assertTrue(answer.startswith(b"HTTP/1.1 304 "), answer)
            self.assertNotIn(b"content-length", answer.lower())
            self.assertNotIn(b"transfer-encoding", answer.lower())

    def test_that_are_refusals_are_the_same(self) -> None:
        """
        What ECR refuses passes with its status, its words and Retry-After; so does a method that is none.
        """
        for fault, status, wait in (
            (self.standin.throttle("registry", retry_after="17", times=2), 429, "17"),
            (self.standin.fail("registry", status=503, times=6), 503, "5"),
            (self.standin.fail("registry", status=500, times=6), 502, None),
            (self.standin.deny(times=2), 403, None),
        )[::-1]:
            self.assertEqual(wait, self.compare("GET", self.by_tag, status).header("Retry-After"))
            self.assertEqual(0, fault.times)
        self.assertEqual("GET, HEAD", self.compare("POST", "/v2/team/app/blobs/uploads/", 405).header("Allow"))

    def test_without_a_length(self) -> None:
        """
        A blob whose size ECR does not tell passes whole, and one that breaks off does not look whole.
        """
        for whole in (True, False):
            digest = self.standin.push_blob("team/app", b"abc" if whole else b"abcdef")
            reply = self.together.send("GET", f"/v2/team/app/blobs/{digest}")
            self.standin.hang("registry", times=1)
            self.flush()
            _, server = self.together.back.ends[-1]
            server.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
            server.loseConnection()
            self.flush()
            self.assertEqual("whole" if whole else "broken", reply.ended)
            self.assertEqual(None, reply.header("Content-Length"))
            if whole:
                self.assertEqual(b"abc", bytes(reply.body))


class RequestTests(RelayTestCase):
    """
    What passes from a client to the first process.
    """

    def headers(self) -> dict[str, str]:
        """
        The headers that came to the first process last.
        """
        raw = self.daemon.seen[-1].requestHeaders.getAllRawHeaders()
        found = {name.decode().lower(): b"|".join(values).decode() for name, values in raw}
        self.assertEqual("first", found.pop("host"))
        return {name: value for name, value in found.items() if name != "connection"}

    def test_is_what_was_understood_of_it(self) -> None:
        """
        Method, path and query arrive, with the headers that decide about the answer, and no others of the client's.
        """
        for method, path in (
            ("GET", "/v2/team/app/tags/list?n=2&last=a%2Bb%3D"),
            ("HEAD", self.by_tag),
            ("GET", f"{self.blob}?ns={urlsplit(self.standin.registry).netloc}"),
        ):
            self.daemon.ask(method, path)
            self.assertEqual(f"{method} {path}", self.handed_on[-1])
        for tag, sent, passed in (
            ("one", {"Range": "bytes=1-2"}, {"range": "bytes=1-2"}),
            ("two", {"Range": "bytes=1-2,-5", "If_Range": f'"{self.digest}"'}, {"range": "bytes=1-2,-5"}),
            ("three", {"Range": "bytes=1-2", "If_Range": '"y"'}, {}),
            ("four", {"Range": "lines=1-2"}, {}),
            (
                "five",
                {"Accept": f"{SCHEMA2};q=0.5, text/html, {OCI_INDEX}", "If_None_Match": 'W/"x", y'},
                {"if-none-match": '"x"'},
            ),
        ):
            blob = f"/v2/team/app{tag}/blobs/{self.digest}"
            self.get(blob, User_Agent="me", X_Ecrproxy_Used="[]", X_Team="a", X_Request_Id=tag, **sent)
            found = self.headers()
            accept = {"accept": f"{SCHEMA2}, {OCI_INDEX}"} if "Accept" in sent else {}
            self.assertEqual({**passed, **accept, "x-request-id": tag, KEY.lower(): json.dumps(blob)}, found)

    def test_of_a_tag_has_no_range_that_depends_on_a_made_up_digest(self) -> None:
        """
        Before its answer a tag has no digest: no If-Range can be seen to match, so the whole is asked for.
        """
        for held in ('"None"', f'"{self.image.digest}"'):
            reply = self.get(self.by_tag, Range="bytes=1-2", If_Range=held)
            self.assertWhole(reply, self.image.manifest)
            self.assertNotIn("range", self.headers())

    def test_has_no_credentials(self) -> None:
        """
        A client's Authorization stays with the worker.
        """
        self.get(self.by_tag, Authorization="Basic Y2xpZW50OnNlY3JldA==")
        self.assertEqual([f"GET {self.by_tag}"], self.handed_on)
        self.assertNotIn("authorization", self.headers())
        self.assertNotIn("Y2xpZW50", str(self.headers()))

    def test_has_no_body(self) -> None:
        """
        What announces a body comes no further than the worker; an announcement of none is not passed.
        """
        head = f"GET {self.by_tag} HTTP/1.1\r\nHost: x\r\nConnection: close, Keep-Alive\r\n"
        for framing in ("Content-Length: 3\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"):
            self.assertEqual(b"HTTP/1.1 400 Bad Request", self.daemon.raw((head + framing).encode()).splitlines()[0])
        self.assertEqual([], self.handed_on)
        got = self.daemon.raw(f"{head}Content-Length: 0\r\nTE: trailers\r\nUpgrade: h2c\r\n\r\n".encode())
        self.assertEqual(b"HTTP/1.1 200 OK", got.splitlines()[0])
        self.assertEqual(set(), self.headers().keys() & {"content-length", "transfer-encoding", "te", "upgrade"})
        self.assertNotEqual("close, Keep-Alive", self.headers().get("connection"))

    def test_tells_the_cache_key(self) -> None:
        """
        The first process is told the key of the client's request; what a client says in its place is dropped.
        """
        self.start(cache_key="$remote_addr|$scheme|$host$uri")
        for scheme in ("http", "https"):
            self.daemon.scheme = scheme
            for forged in ({}, {KEY: '"another"'}, {KEY.lower(): "x"}):
                self.get(self.by_tag, Host="mirror.example:5000", **{k.replace("-", "_"): v for k, v in forged.items()})
                told = json.loads(self.headers()[KEY.lower()])
                self.assertEqual(f"192.0.2.7|{scheme}|mirror.example{self.by_tag}", told)

    def test_names_the_same_entry_in_both_processes(self) -> None:
        """
        A cache key of the client's address, host, scheme and headers is the client's own at the first process, so that
        the worker finds what that one noted.
        """
        template = "$remote_addr|$host|$scheme|$http_x_team|$request_method|$request_uri"
        self.start(cache_key=template)
        self.assertWhole(self.get(self.blob, X_Team="a"), self.data, "MISS")
        key = f"192.0.2.7|proxy.example|http|a|GET|{self.blob}"
        route = parse_route(self.blob)
        registry = RegistryId.of_url(self.standin.registry)
        self.assertIsNotNone(self.daemon.store.entry(entry_name(registry, key, route), registry, route))
        self.daemon.seen.clear()
        self.assertWhole(self.get(self.blob, X_Team="a"), self.data, "HIT")
        self.assertEqual([], self.handed_on)
        for headers in ({"X_Team": "b"}, {"X_Team": "a", "Host": "other.example"}):
            self.assertWhole(self.get(self.blob, **headers), self.data, "REVALIDATED")
        self.assertEqual(2, len(self.handed_on))

    def test_keeps_apart_whom_the_cache_key_keeps_apart(self) -> None:
        """
        A cache key made of a header keeps clients apart with workers as without.
        """
        for kind in (Daemon, Together):
            daemon = kind(self.standin, self.clock, self.root / kind.__name__, cache_key="$http_x_team$uri")
            daemon.flush()
            found = [daemon.ask("GET", self.blob, X_Team=team).cache for team in ("one", "one", "two", "two")]
            self.assertEqual(["MISS", "HIT", "REVALIDATED", "HIT"], found, kind.__name__)

    def test_that_is_denied_is_not_passed(self) -> None:
        """
        What the namespace pattern leaves out, or what is no path of a registry, comes no further than the worker.
        """
        self.start(pattern="team/.*")
        for path in (
            "/v2/secret/app/manifests/latest",
            f"/v2/secret/app/blobs/{self.digest}",
            "/v2/secret/app/tags/list",
            "/v2/teams/app/tags/list",
            "/v2/team/../secret/tags/list",
            "/v2/_catalog",
        ):
            for method in ("GET", "HEAD"):
                self.assertIn(self.daemon.ask(method, path).code, (400, 403, 404), path)
        self.assertRefused(self.get("/v2/secret/app/tags/list"), 403, "DENIED")
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            self.assertEqual(405, self.daemon.ask(method, self.by_tag).code)
        self.assertEqual([], self.handed_on)
        self.assertEqual([], self.standin.asked)


class FlowTests(RelayTestCase):
    """
    A body on its way.
    """

    def test_goes_at_the_clients_pace(self) -> None:
        """
        While a client does not read, hardly anything of a large blob waits in the worker; read on, it comes whole.
        """
        path, data = self.large()
        digest = path.rpartition("/")[2]
        self.standin.hold(digest)
        reply = self.daemon.ask("GET", path)
        self.assertEqual((200, b""), (reply.code, bytes(reply.body)))
        reply.stop_reading()
        self.standin.release(digest)
        self.flush()
        _, server = self.daemon.front.ends[-1]
        worker, first = self.wire()
        self.assertEqual(b"", bytes(reply.body))
        self.assertLessEqual(server.waiting, 3 * BUFFER)
        self.assertLess(server.written, 4 * BUFFER)
        self.assertLess(first.written, 3 * MIB)
        self.assertFalse(worker.reading)
        reply.read_on()
        self.flush()
        self.assertWhole(reply, data)

    def test_comes_as_it_is_there(self) -> None:
        """
        A client gets what has arrived while the rest is still on its way.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.blob)
        got = 0
        for count in (1, 1000, 100_000):
            self.standin.deliver(self.digest, count)
            self.flush()
            got += count
            self.assertEqual(self.data[:got], bytes(reply.body))
        self.assertEqual("", reply.ended)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data)

    def test_that_breaks_off(self) -> None:
        """
        When the first process goes in the middle of a body, the client's connection is aborted.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.blob)
        self.standin.deliver(self.digest, 1000)
        self.flush()
        self.wire()[1].abortConnection()
        self.flush()
        self.assertBroken(reply, self.data)
        self.assertEqual(1000, len(reply.body))

    def test_of_wrong_bytes(self) -> None:
        """
        What turns out to be something else than its digest is aborted for the worker's client too.
        """
        self.standin.corrupt(self.digest, noise("other", 300_000))
        reply = self.get(self.blob)
        self.assertEqual("broken", reply.ended)
        self.assertLess(len(reply.body), len(self.data))

    def test_ends_with_its_client(self) -> None:
        """
        When the client leaves, before the headers or in the middle of the body, the first process is told so.
        """
        for begun in (False, True):
            self.standin.hold(self.digest)
            fault = None if begun else self.standin.hang("registry")
            reply = self.get(self.blob)
            if begun:
                self.standin.deliver(self.digest, 1000)
                self.flush()
                self.assertEqual(1000, len(reply.body))
            worker, first = self.wire()
            reply.leave()
            self.flush()
            self.assertEqual((False, False), (worker.connected, first.connected))
            self.assertIsNone(self.daemon.seen[-1].channel)
            if fault is not None:
                fault.remove()
                self.pass_time(60)
        self.standin.release(self.digest)
        self.flush()
        self.assertTrue(self.has(self.digest), "the transfer went on without the client")

    def test_ends_with_a_client_that_did_not_read(self) -> None:
        """
        A client that leaves while its body is held back ends it as well.
        """
        path, _ = self.large()
        reply = self.daemon.send("GET", path)
        reply.stop_reading()
        self.flush()
        worker, first = self.wire()
        reply.leave()
        self.flush()
        self.assertEqual((False, False), (worker.connected, first.connected))

    def test_of_many_clients_is_one_transfer(self) -> None:
        """
        A cold blob that many clients of a worker ask for comes once.
        """
        self.standin.hold(self.digest)
        replies = [self.daemon.send("GET", self.blob) for _ in range(10)]
        self.flush()
        self.standin.release(self.digest)
        self.flush()
        for reply in replies:
            self.assertWhole(reply, self.data)
        self.assertEqual(["JOINED"] * 9 + ["MISS"], sorted(str(reply.cache) for reply in replies))
        self.assertEqual(1, self.standin.count("bucket"))


class GoneTests(RelayTestCase):
    """
    A first process that is not there.
    """

    def test_is_told_with_when_to_ask_again(self) -> None:
        """
        Without the first process the answer is 503 in the registry's words, with Retry-After.
        """
        assert self.daemon.between is not None
        self.daemon.between.down = ConnectionRefusedError()
        for path in (self.by_tag, self.by_digest, self.blob, "/v2/team/app/tags/list", "/readyz"):
            reply = self.get(path)
            self.assertRefused(reply, 503, "UNAVAILABLE", "ask once more")
            self.assertEqual("1", reply.header("Retry-After"))
        head = self.head(self.by_tag)
        self.assertEqual((503, "1"), (head.code, head.header("Retry-After")))
        self.daemon.between.down = None
        self.assertWhole(self.get(self.blob), self.data, "MISS")

    def test_is_told_apart_from_one_that_is_busy(self) -> None:
        assert self.daemon.between is not None
        self.daemon.between.down = QueueTimeoutError()
        reply = self.get(self.by_tag)
        self.assertRefused(reply, 503, "UNAVAILABLE", "too busy")
        self.assertEqual(("1", "busy"), (reply.header("Retry-After"), reply.header("X-Cache-Reason")))

    def test_while_it_answers(self) -> None:
        """
        When it goes before its answer's headers, that is the same.
        """
        self.standin.hang("registry")
        reply = self.get(self.by_tag)
        self.wire()[1].abortConnection()
        self.flush()
        self.assertRefused(reply, 503, "UNAVAILABLE")
        self.assertEqual("1", reply.header("Retry-After"))

    def test_between_two_requests(self) -> None:
        """
        A connection that was kept and has gone since costs no answer.
        """
        self.get(self.by_tag)
        self.wire()[1].abortConnection()
        self.flush()
        self.assertWhole(self.get(self.by_tag), self.image.manifest, "REVALIDATED")


class RoomTests(RelayTestCase):
    """
    The first process has descriptors for fewer connections than its workers have clients.
    """

    def setUp(self) -> None:
        super().setUp()
        self.get(self.blob)
        self.start(room=2)

    def test_what_is_beyond_is_told_to_ask_again(self) -> None:
        """
        Hits, health and what workers tell go on, and so does the rest once there is room again.
        """
        for _ in range(2):
            self.daemon.send("GET", self.by_tag)
        self.standin.hang("registry")
        self.flush()
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        beyond = self.get("/v2/team/app/manifests/other")
        self.assertRefused(beyond, 503, "UNAVAILABLE", "ask again")
        self.assertEqual("5", beyond.header("Retry-After"))
        self.assertEqual(200, self.get("/readyz").code)
        served = self.daemon.figures.served.requests
        before = sum(row[1] for row in served.rows())
        self.pass_time(TELL_SECONDS)
        self.assertLess(before, sum(row[1] for row in served.rows()), "what workers tell is heard")
        self.standin.heal()
        self.pass_time(60)
        self.assertWhole(self.get(self.by_tag), self.image.manifest)

    def test_idle_connections_of_a_worker_are_closed_for_anothers(self) -> None:
        first = [self.daemon.send("GET", path) for path in (self.by_tag, self.by_digest)]
        self.flush()
        self.assertEqual([200, 200], [reply.code for reply in first])
        self.clock.advance(SETTLED_SECONDS)
        for _ in range(3):
            answer = self.daemon.raw(b"GET /v2/ HTTP/1.1\r\nHost: first\r\n\r\n", self.daemon.between)
            self.assertTrue(answer.startswith(b"HTTP/1.1 200 "), answer)
            self.clock.advance(SETTLED_SECONDS)
        self.assertWhole(self.get(self.by_tag), self.image.manifest)

    def test_one_address_leaves_some_of_it_to_others(self) -> None:
        self.start(room=4, share=2)
        self.standin.hang("registry")
        for _ in range(2):
            self.daemon.send("GET", "/v2/team/app/manifests/other")
        self.flush()
        beyond = self.get(self.by_tag)
        self.assertRefused(beyond, 503, "UNAVAILABLE", "your requests")
        self.assertEqual("5", beyond.header("Retry-After"))
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        self.assertEqual(2, len(self.handed_on))
        self.standin.heal()
        self.pass_time(60)
        self.assertWhole(self.get(self.by_tag), self.image.manifest)


class Listener:
    """
    An endpoint whose listening side takes C{room} connections, and then fails as a UNIX socket does.
    """

    def __init__(self) -> None:
        self.room, self.asked = 0, 0
        self.problem = ConnectError(string="the queue is full")

    def connect(self, factory: str) -> Deferred[str]:
        self.asked += 1
        if not self.room:
            return fail(self.problem)
        self.room -= 1
        return succeed(factory)


class QueuedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.listener = Clock(), Listener()
        self.queued = Queued(self.listener, self.clock)

    def test_a_connection_waits_while_the_queue_is_full(self) -> None:
        connecting = self.queued.connect("one")
        self.clock.pump([AGAIN_SECONDS] * 3)
        self.assertNoResult(connecting)
        self.listener.room = 1
        self.clock.advance(AGAIN_SECONDS)
        self.assertEqual("one", self.successResultOf(connecting))

    def test_a_crowd_is_connected_by_a_few_attempts_at_a_time(self) -> None:
        crowd = [self.queued.connect(str(number)) for number in range(10 * CONNECTING)]
        self.assertEqual(CONNECTING, self.listener.asked)
        self.listener.room = 5 * CONNECTING
        self.clock.advance(AGAIN_SECONDS)
        self.assertEqual(5 * CONNECTING, sum(each.called for each in crowd))
        self.listener.room = 5 * CONNECTING
        self.clock.advance(AGAIN_SECONDS)
        self.assertEqual(list(map(str, range(10 * CONNECTING))), list(map(self.successResultOf, crowd)))

    def test_a_queue_that_stays_full_is_an_error_in_the_end(self) -> None:
        crowd = [self.queued.connect(str(number)) for number in range(2 * CONNECTING)]
        self.clock.pump([AGAIN_SECONDS] * int(CONNECT_SECONDS / AGAIN_SECONDS + 1))
        for each in crowd:
            self.failureResultOf(each, QueueTimeoutError)

    def test_a_socket_that_nobody_listens_on_is_an_error_at_once(self) -> None:
        self.listener.problem = ConnectionRefusedError(111)
        self.failureResultOf(self.queued.connect("one"), ConnectionRefusedError)
        self.assertEqual(1, self.listener.asked)

    def test_a_client_that_leaves_gives_up_its_place(self) -> None:
        crowd = [self.queued.connect(str(number)) for number in range(2 * CONNECTING)]
        for each in crowd[:CONNECTING]:
            each.cancel()
        self.listener.room = CONNECTING
        self.clock.advance(AGAIN_SECONDS)
        self.assertEqual(CONNECTING, len([self.successResultOf(each) for each in crowd[CONNECTING:]]))
        for each in crowd[:CONNECTING]:
            self.failureResultOf(each)


class UsedTests(RelayTestCase):
    """
    What the workers use, the first process's ledger hears of.
    """

    def order(self) -> list[str]:
        """
        The files of content, the least recently used first.
        """
        with self.daemon.store.ledger.lock:
            paths = [path for path, _, _ in self.daemon.store.ledger.oldest()]
        return [path.rpartition("/")[2] for path in paths if path.startswith("content")]

    def test_is_told_each_second(self) -> None:
        """
        What only a worker's clients use is the most recently used a second later.
        """
        others = [self.standin.push_blob("team/app", noise(f"other{number}", 100_000)) for number in range(3)]
        for digest in (self.digest, *others):
            self.get(f"/v2/team/app/blobs/{digest}")
        self.pass_time(2 * TELL_SECONDS)
        total = self.daemon.store.ledger.total
        mine = self.digest.removeprefix("sha256:")
        self.assertNotEqual(mine, self.order()[-1])
        self.assertEqual("HIT", self.get(self.blob).cache)
        self.assertNotEqual(mine, self.order()[-1])
        self.pass_time(TELL_SECONDS)
        self.assertEqual(mine, self.order()[-1])
        self.assertEqual(total, self.daemon.store.ledger.total)

    def test_what_clients_got_is_told_too(self) -> None:
        """
        Requests, and the bytes that were saved by repository, add up in the first process.
        """
        for _ in range(3):
            self.get(self.blob)
        self.pass_time(2 * TELL_SECONDS)
        status = json.loads(self.daemon.ask_admin("/status.json").body)
        size = len(self.data)
        self.assertEqual({"count": 2, "bytes": 2 * size}, status["answers"]["HIT"])
        self.assertEqual([{"repository": "team/app", "bytes": 2 * size, "answers": 2}], status["repositories"])

    def test_what_went_wrong_in_a_worker_is_told_too(self) -> None:
        """
        Once, with its time; the same from several workers is one incident.
        """
        for _ in range(2):
            self.daemon.incidents({"log_level": LogLevel.warn, "log_format": "the {thing} is slow", "thing": "disk"})
            self.pass_time(2 * TELL_SECONDS)
        (incident,) = json.loads(self.daemon.ask_admin("/status.json").body)["incidents"]
        self.assertEqual(("warn", "the disk is slow", 2), (incident["level"], incident["text"], incident["times"]))
        self.assertEqual((), self.daemon.incidents.latest())

    def there(self) -> tuple[float, float]:
        """
        Who is connected, and the transfers to them, as the first process has them.
        """
        connections, transfers = (f"ecr_proxy_client_{each}" for each in ("connections", "transfers"))
        return self.daemon.figure(connections), self.daemon.figure(transfers)

    def test_who_is_there_is_told_too(self) -> None:
        """
        Connections and transfers as they are each second, and limits that were met, are figures of the first process.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.blob)
        self.assertEqual((0.0, 0.0), self.there())
        for _ in range(3):
            self.pass_time(TELL_SECONDS)
            self.assertEqual((1.0, 1.0), self.there())
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data)
        for _ in range(2):
            self.daemon.raw(b"nonsense\r\n\r\n")
            self.pass_time(TELL_SECONDS)
        self.assertEqual((0.0, 0.0), self.there())
        self.assertEqual(2.0, self.daemon.figure('ecr_proxy_client_limits_total{limit="bad_request"}'))

    def test_who_was_there_is_forgotten_with_the_worker(self) -> None:
        """
        The clients of a worker that says nothing more are no longer counted; what it refused still is.
        """
        self.standin.hold(self.digest)
        self.get(self.blob)
        self.daemon.raw(b"nonsense\r\n\r\n")
        self.pass_time(TELL_SECONDS)
        self.daemon.teller.stopService()
        self.assertEqual((1.0, 1.0), self.there())
        self.pass_time(SILENT_SECONDS)
        self.assertEqual((0.0, 0.0), self.there())
        self.assertEqual(1.0, self.daemon.figure('ecr_proxy_client_limits_total{limit="bad_request"}'))

    def test_is_told_once(self) -> None:
        """
        A use is told once, in requests of fifty files; without any there is no request, and one connection does.
        """
        told: list[int] = []
        ledger = self.daemon.store.ledger
        self.patch(ledger, "used", lambda path, size: told.append(size))
        for number in range(120):
            self.daemon.notes.used(entry_path(f"{number:064x}"), number)
        self.pass_time(TELL_SECONDS)
        self.assertEqual(list(range(120)), sorted(told))
        self.pass_time(10 * TELL_SECONDS)
        self.assertEqual(120, len(told))
        for number in range(10):
            self.daemon.notes.used(entry_path(f"{number:064x}"), number)
            self.pass_time(TELL_SECONDS)
        assert self.daemon.between is not None
        self.assertLessEqual(len(self.daemon.between.ends), 3)
        self.assertEqual(130, len(told))

    def test_is_not_missed_while_the_first_process_is_away(self) -> None:
        """
        When it can't be told that is no failure, and later uses are told.
        """
        assert self.daemon.between is not None
        self.daemon.between.down = ConnectionRefusedError()
        self.daemon.notes.used(ENTRY, 1)
        self.pass_time(3 * TELL_SECONDS)
        self.daemon.between.down = None
        self.daemon.notes.used(ANOTHER, 2)
        self.pass_time(TELL_SECONDS)
        self.assertEqual(2, self.daemon.store.ledger.gone(ANOTHER))
        self.assertEqual([], self.flushLoggedErrors())

    def test_is_told_no_more_by_a_worker_that_has_stopped(self) -> None:
        """
        A worker that was stopped asks nobody.
        """
        self.daemon.teller.stopService()
        self.daemon.notes.used(ENTRY, 1)
        self.pass_time(3 * TELL_SECONDS)
        self.assertEqual(0, self.daemon.store.ledger.gone(ENTRY))
        self.daemon.teller.stopService()

    def test_that_no_worker_can_have_noted_is_refused(self) -> None:
        """
        Whoever speaks on the workers' socket can have no file deleted, and no figure falsified.
        """
        assert self.daemon.between is not None
        ledger, before = self.daemon.store.ledger, len(self.daemon.store.ledger)
        for name, rows in {
            "Used": (["/any/file", 10**15], ["../any/file", 1], [ENTRY, -1], [ENTRY, 10**15], [ENTRY], [1, 1], ENTRY),
            "Requests": (
                [["a", "b", "c"], 1, 1, 1.0, [0] * 9],
                [["a", "b", "c", "d"], 1, 1, 1.0, [0]],
                [{}, 1, 1, 1, 1],
                [["\ud800", "b", "c", "d"], 1, 1, 1.0, [0] * 9],
            ),
            "Saved": (["a", -1, 1], ["\udfff", 1, 1], ["a" * 2000, 1, 1], [None, 1, 1], ["a", 1.5, 1]),
            "Incidents": (
                [0, "info", "text", 1, "kind", ""],
                [-1, "warn", "text", 1, "kind", ""],
                [0, "warn", "text", "1", "kind", ""],
                [0, "warn", 1, 1, "kind", ""],
                [0, "warn", "text", 1, 1, ""],
                [0, "warn", "text", 1],
            ),
            "Clients": ([1, 1, 1, {"none": 1}], [1, 1, -1, {}], [1, 1, 1, []], [1, 1, {}]),
        }.items():
            for told in (*([json.dumps([row])] for row in rows), ["{}"], ["null"], ["["], ["[" * 6000]):
                head = f"GET /used HTTP/1.1\r\nHost: first\r\nX-Ecrproxy-{name}: {told[0]}\r\n\r\n"
                got = self.daemon.raw(head.encode(), self.daemon.between)
                self.assertEqual(b"HTTP/1.1 400 Bad Request", got.partition(b"\r\n")[0], (name, told))
        self.assertEqual(before, len(ledger))
        good = f"GET /used HTTP/1.1\r\nHost: first\r\nX-Ecrproxy-Used: {json.dumps([[ENTRY, 7]])}\r\n\r\n"
        self.assertIn(b" 200 ", self.daemon.raw(good.encode(), self.daemon.between).partition(b"\r\n")[0])
        self.assertEqual(7, ledger.gone(ENTRY))

    def test_a_question_without_a_cache_key_is_refused(self) -> None:
        assert self.daemon.between is not None
        for key in ("", *(f"{KEY}: {each}\r\n" for each in ("1", "null", '"', '["a"]', "\x7f", r'"\ud800"'))):
            head = f"GET {self.by_tag} HTTP/1.1\r\nHost: first\r\n{key}\r\n"
            got = self.daemon.raw(head.encode(), self.daemon.between)
            self.assertEqual(b"HTTP/1.1 400 Bad Request", got.partition(b"\r\n")[0], key)
        self.assertEqual([], self.standin.asked)

    def test_is_told_by_workers_alone(self) -> None:
        """
        A client can tell nothing, of a worker or of a daemon of one process: there is no such path.
        """
        alone = Daemon(self.standin, self.clock, self.root / "alone")
        alone.flush()
        told = {"X_Ecrproxy_Used": json.dumps([[ENTRY, 1000]])}
        for daemon in (self.daemon, alone):
            for path in ("/used", "/used/", "//used", "/v2/../used", "/%75sed"):
                reply = daemon.ask("GET", path, **told)
                self.assertIn(reply.code, (400, 404), path)
            for target in (b"xreadyz/used", b":readyz/used", b"@readyz/used", b"xused", b"http://a/used", b"used"):
                head = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nX-Ecrproxy-Used: "
                got = daemon.raw(head + told["X_Ecrproxy_Used"].encode() + b"\r\n\r\n")
                self.assertIn(got[9:12], (b"400", b"404"), target)
            self.assertEqual(0, daemon.store.ledger.gone(ENTRY))
