"""
Requests that try to leave the grammar, or the namespace: each is rejected, and ECR never sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from fuzz.wires import ask, scene_of_all
from tests.daemon import DaemonTestCase

HEX = "a" * 64
HEALTH = (b"readyz", b"healthz", b"_health")

# targets that a client may send, by what they try
TARGETS: dict[str, tuple[bytes, ...]] = {
    "encoded slashes": (
        b"/v2/secret%2fapp/manifests/latest",
        b"/v2/open%2fapp%2f..%2fsecret/manifests/latest",
        b"/v2/open%2f%2fapp/manifests/latest",
        b"/v2/open%2fapp%2f/manifests/latest",
        b"/v2/open/..%2fsecret/app/manifests/latest",
        b"/v2/%73ecret/app/manifests/latest",
        b"/v2/open/app/manifests/latest%2F..%2F..%2Fsecret",
        b"/v2/open/app/tags%2Flist",
        b"/v2/open/app/%74ags/list",
        b"/v2%2fopen/app/manifests/latest",
        b"/v2/open/app%2Fmanifests%2Flatest",
        b"/%76%32/secret/app/manifests/latest",
    ),
    "encoded dots": (
        b"/v2/open/%2e%2e/secret/app/manifests/latest",
        b"/v2/open/%2E./secret/app/manifests/latest",
        b"/v2/open/app/manifests/%2e%2e",
        b"/v2/open/app/blobs/%2e%2e",
    ),
    "double and overlong encoding": (
        b"/v2/open%252fapp/manifests/latest",
        b"/v2/open/%252e%252e/secret/app/manifests/latest",
        b"/v2/open/%c0%ae%c0%ae/secret/app/manifests/latest",
        b"/v2/open/%c0%af/app/manifests/latest",
        b"/v2/open/%u002e%u002e/app/manifests/latest",
        b"/v2/open/app/blobs/sha256%253A" + HEX.encode(),
        b"/v2/open/app/manifests/late%2573t",
        b"/v2/open/app/manifests/latest%",
        b"/v2/open/app/manifests/latest%2",
        b"/v2/open/app/tags/list?last=%zz",
    ),
    "dot segments": (
        b"/v2/open/../secret/app/manifests/latest",
        b"/v2/open/./app/manifests/latest",
        b"/v2/../v2/open/app/manifests/latest",
        b"/../v2/open/app/manifests/latest",
        b"/v2/open/app/manifests/..",
        b"/v2/open/app/manifests/../../../secret/app/manifests/latest",
        b"/v2/open/app/blobs/../manifests/latest",
        b"/healthz/../v2/secret/app/manifests/latest",
        b"/readyz/../v2/secret/app/manifests/latest",
        b"/v2/open/..;/secret/app/manifests/latest",
    ),
    "backslashes": (
        b"\\v2\\open\\app\\manifests\\latest",
        b"/v2/open\\..\\secret/app/manifests/latest",
        b"/v2/open/app/manifests/la\\test",
        b"/v2/open/%5c..%5csecret/app/manifests/latest",
    ),
    "NUL and control bytes": (
        b"/v2/open/app/manifests/latest%00",
        b"/v2/open%00/app/manifests/latest",
        b"/v2/open/app/manifests/latest%0d%0aX: y",
        b"/v2/open/app/manifests/latest%0d%0aX:y",
        b"/v2/open/app/manifests/late%09st",
        b"/v2/open/app/manifests/latest\x00",
        b"/v2/open/app\x01/manifests/latest",
        b"/v2/open/app/manifests/late\x7fst",
        b"/v2/open/app/manifests/late\tst",
        b"/v2/open/app/tags/list?n=1\x00",
        b"/v2/open/app/tags/list?n=1\x0b",
    ),
    "bytes that are not ASCII": (
        "/v2/öpen/app/manifests/latest".encode(),
        "/v2/open\u2215app/manifests/latest".encode(),
        b"/v2/open/app/manifests/l\xe4test",
        b"/v2/open/%ef%bc%8fapp/manifests/latest",
        b"/v2/open/app/tags/list?last=\xff",
    ),
    "empty segments": (
        b"/v2/open/app/manifests/",
        b"/v2/open/app/manifests/latest/",
        b"/v2//manifests/latest",
        b"/v2/manifests/latest",
        b"//",
    ),
    "other forms of a target": (
        b"http://evil.example/v2/secret/app/manifests/latest",
        b"https://proxy.example/v2/secret/app/manifests/latest",
        b"HTTP://proxy.example/v2/secret/app/tags/list",
        b"http://proxy.example/../v2/open/app/manifests/latest",
        b"http://user@proxy.example/v2/open/app/manifests/latest",
        b"http:///v2/open/app/manifests/latest",
        b"http:/v2/open/app/manifests/latest",
        b"http:v2/open/app/manifests/latest",
        b"ftp://proxy.example/v2/open/app/manifests/latest",
        b"file:///etc/passwd",
        b"evil.example:443",
        b"evil.example",
        b"//evil.example/v2/open/app/manifests/latest",
        b"*",
        b"proxy.example:80/v2/open/app/manifests/latest",
        b"v2/open/app/manifests/latest",
        b"?x",
    ),
    "no slash": (
        *(
            mark + name + b"/v2/open/app/manifests/latest"
            for mark in (b"x", b":", b"@", b".", b"%", b"?", b"#", b"*")
            for name in HEALTH
        ),
        *(mark + b"readyz/used" for mark in (b"x", b":", b"@", b"", b"evil.example:80", b"a@b:1")),
        *(mark + b"v2/open/app/manifests/latest" for mark in (b"x", b":", b"@", b"first", b"first:80/", b"?")),
        b"/../used",
        b"/used",
        b"http://first/used",
    ),
    "fragments": (
        b"/v2/open/app/manifests/latest#x",
        b"/v2/open/app#/manifests/latest",
        b"/v2/#/open/app/manifests/latest",
        b"/v2/open/app/tags/list#?n=1",
        b"/v2/open/app/tags/list?n=1#x",
    ),
    "overlong names": (
        b"/v2/open/" + b"a" * 251 + b"/manifests/latest",
        b"/v2/open/" + b"a/" * 200 + b"a/manifests/latest",
        b"/v2/open/app/manifests/" + b"a" * 129,
        b"/v2/open/app/blobs/sha256:" + b"a" * 65,
        b"/v2/open/app/blobs/sha256:" + b"a" * 5000,
    ),
    "another grammar": (
        b"/v2/Open/app/manifests/latest",
        b"/V2/open/app/manifests/latest",
        b"/v1/open/app/manifests/latest",
        b"/v2/open/app;p/manifests/latest",
        b"/v2/open/app/Manifests/latest",
        b"/v2/open/app/manifests/latest;p",
        b"/v2/open/app/manifests/.hidden",
        b"/v2/open/app/manifests/-x",
        b"/v2/open/app/manifests/sha256:" + HEX.upper().encode(),
        b"/v2/open/app/manifests/sha256:abc",
        b"/v2/open/app/manifests/md5:" + b"a" * 32,
        b"/v2/open/app/manifests/sha256%3a",
        b"/v2/open/app/blobs/latest",
        b"/v2/open/app/blobs/uploads/",
        b"/v2/open/app/tags/list/",
        b"/v2/open/app/tags/other",
        b"/v2/open/app/referrers/latest",
        b"/v2/_catalog/",
        b"/v2/_catalog?n=1e3",
        b"/metrics",
        b"/",
    ),
    "another namespace": (
        b"/v2/secret/app/manifests/latest",
        b"/v2/secret/app/blobs/sha256:" + HEX.encode(),
        b"/v2/secret/app/tags/list",
        b"/v2/secret/app/referrers/sha256:" + HEX.encode(),
        b"/v2/open/app/manifests/x/manifests/latest",
        b"/v2/secret/open/app/manifests/latest",
        b"/v2/opena/app/manifests/latest",
        b"/v2/open/manifests/latest",
        b"/v2/secret/app/manifests/latest?ns=open",
        b"/v2/secret/app/manifests/latest?/v2/open/app/manifests/latest",
    ),
}
GAMES: tuple[bytes, ...] = (
    b"Host: open.example",
    b"X-Forwarded-Host: open.example\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 127.0.0.1",
    b"X-Forwarded-Prefix: /v2/open",
    b"Forwarded: for=127.0.0.1;host=open.example;proto=https",
    b"X-Original-URL: /v2/open/app/manifests/latest",
    b"X-Rewrite-URL: /v2/open/app/manifests/latest",
    b"X-Real-IP: 127.0.0.1",
    b'X-Ecrproxy-Key: "x"',
    b"X-HTTP-Method-Override: GET",
)
METHODS: tuple[bytes, ...] = (
    *(b"get", b"Get", b"gET", b"head", b"GETS", b"G", b"FOO"),
    *(b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"PROPFIND", b"PURGE"),
)
HOSTS: tuple[bytes, ...] = (
    *(b"evil.example/v2", b"user@evil.example", b"a b", b"a#b", b"a?b", b"a\\b", b"a\x0bb", b"\xe4.example", b"a\x7f"),
)


class HostileTests(DaemonTestCase):
    """
    The proxy serves only open/app.
    """

    def setUp(self) -> None:
        super().setUp()
        self.start(pattern="open/[a-z0-9]+")
        self.standin.push_blob("secret/app", b"secret")

    def tearDown(self) -> None:
        loud = [event for event in self.events if event["log_level"] >= LogLevel.error or "log_failure" in event]
        self.assertEqual([], loud, "a client's nonsense is no error of ours")
        self.assertEqual([], self.standin.asked, "ECR heard of it")
        super().tearDown()

    def status(self, target: bytes, method: bytes = b"GET", fields: bytes = b"Host: x") -> int:
        """
        Send a raw request, and return the status of its one answer.
        """
        before = len(self.standin.asked)
        got = self.daemon.raw(method + b" " + target + b" HTTP/1.1\r\n" + fields + b"\r\n\r\n")
        self.assertEqual((1, before), (got.count(b"HTTP/1.1 "), len(self.standin.asked)), (method, target, fields, got))
        return int(got[9:12])

    def assert_refused(self, found: Iterable[tuple[object, int]]) -> None:
        """
        Assert that each is some 4xx.
        """
        self.assertEqual([], [(what, status) for what, status in found if not 400 <= status < 500])

    def test_absolute_targets_of_the_proxy_itself(self) -> None:
        """
        The path counts, whatever host they name.
        """
        for host in (b"proxy.example", b"proxy.example:5000", b"evil.example", b"[::1]"):
            self.assertEqual(200, self.status(b"http://" + host + b"/v2/"), host)
            self.assertEqual(403, self.status(b"http://" + host + b"/v2/secret/app/manifests/latest"), host)

    def test_targets_outside_the_grammar_or_the_namespace(self) -> None:
        """
        However a path is spelled, it is either a valid one in canonical spelling or rejected; for HEAD as for GET.
        """
        for hope, targets in TARGETS.items():
            for method in (b"GET", b"HEAD"):
                self.assert_refused(((hope, each), self.status(each, method)) for each in targets)

    def test_methods(self) -> None:
        """
        All but GET and HEAD are rejected, other spellings of these among them, for all paths.
        """
        for target in (b"/v2/", b"/v2/open/app/manifests/latest", b"/healthz", b"/readyz", b"*", b"evil.example:443"):
            self.assert_refused((each, self.status(target, each)) for each in METHODS)

    def test_method_overrides(self) -> None:
        """
        A method in a header is ignored: a POST stays one.
        """
        for name in (b"X-HTTP-Method-Override", b"X-HTTP-Method", b"X-Method-Override"):
            fields = b"Host: x\r\n" + name + b": GET"
            self.assertEqual(405, self.status(b"/v2/open/app/manifests/latest", b"POST", fields))
            self.assertEqual(403, self.status(b"/v2/secret/app/manifests/latest", b"GET", fields))

    def test_headers_that_speak_of_another_place(self) -> None:
        """
        No header opens a closed namespace.
        """
        for game in GAMES:
            fields = game if game.startswith(b"Host:") else b"Host: x\r\n" + game
            self.assertEqual(403, self.status(b"/v2/secret/app/manifests/latest", b"GET", fields), game)

    def test_hosts_that_are_none(self) -> None:
        """
        An invalid Host is rejected: RFC 9112, 3.2.
        """
        self.assertEqual(
            dict.fromkeys(HOSTS, 400),
            {each: self.status(b"/v2/", b"GET", b"Host: " + each) for each in HOSTS},
        )
        for good in (b"", b"x", b"proxy.example:5000", b"[::1]:80", b"192.0.2.1"):
            self.assertEqual(200, self.status(b"/v2/", b"GET", b"Host: " + good), good)


class GamesTests(DaemonTestCase):
    """
    What a client says about itself changes nothing for others.
    """

    def test_are_not_passed_on(self) -> None:
        """
        A valid request with such headers is answered as without, and ECR sees none of them.
        """
        digest = self.standin.push_blob("open/app", b"data")
        for game in GAMES:
            fields = game if game.startswith(b"Host:") else b"Host: x\r\n" + game
            got = self.daemon.raw(f"GET /v2/open/app/blobs/{digest} HTTP/1.1\r\n".encode() + fields + b"\r\n\r\n")
            self.assertTrue(got.startswith(b"HTTP/1.1 200 OK\r\n") and got.endswith(b"\r\n\r\ndata"), game)
            self.assertNotIn(b"open.example", got)
        for asked in self.standin.asked:
            self.assertEqual(set(), {name for name in asked.headers if name.startswith(("x-", "forwarded"))})
            self.assertNotIn("open.example", asked.headers["host"])


class ExampleTests(SynchronousTestCase):
    def test_what_fuzzing_starts_from_holds(self) -> None:
        """
        The examples hold what must hold for any bytes of a client.
        """
        examples = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "front").iterdir())
        self.assertIn("slashless", [path.name for path in examples])
        for path in examples:
            ask(path.read_bytes())
        scene_of_all().close()
        scene_of_all.cache_clear()
