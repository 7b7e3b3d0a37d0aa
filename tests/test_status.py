"""
The daemon's status, over HTTP.
"""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.browsers import is_ours
from ecrproxy.access.limits import Limits
from ecrproxy.admin.snapshot import TRANSFERS
from ecrproxy.admin.status import NEXT
from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.failures import LIMIT
from tests.daemon import CLIENT, DaemonTestCase, Raw, noise

DEAD = "sha256:" + 64 * "0"


class StatusTestCase(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.data = noise("watched", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"

    def status(self, query: str = "") -> dict[str, Any]:
        """
        Return the document.
        """
        reply = self.daemon.ask_admin(f"/status.json{query}")
        self.assertEqual((200, "application/json"), (reply.code, reply.header("Content-Type")))
        document: dict[str, Any] = json.loads(reply.body)
        return document


class DocumentTests(StatusTestCase):
    """
    /status.json.
    """

    def test_tells_of_what_is_on_its_way_and_who_follows(self) -> None:
        """
        Two clients follow one transfer; when one disconnects, one follows; when it has ended, it is no longer listed.
        """
        self.standin.hold(self.digest)
        replies = [self.daemon.send("GET", self.blob) for _ in range(2)]
        self.flush()
        self.arrive(self.digest, 100_000)
        (transfer,) = self.status()["transfers"]
        self.assertEqual(100_000, transfer["received"])
        self.assertEqual(
            {"repository": "team/app", "digest": self.digest, "size": 300_000, "followers": 2, "kept": True},
            {name: value for name, value in transfer.items() if name != "received"},
        )
        replies[0].leave()
        self.flush()
        self.assertEqual(1, self.status()["transfers"][0]["followers"])
        self.standin.release(self.digest)
        self.flush()
        self.assertEqual([], self.status()["transfers"])

    def test_tells_how_full_the_cache_is_and_what_goes_next(self) -> None:
        """
        The least recently used first.
        """
        self.get(self.blob)
        self.pass_time(1)
        later = self.standin.push_blob("team/base", noise("later", 1000))
        self.get(f"/v2/team/base/blobs/{later}")
        cache = self.status()["cache"]
        self.assertEqual((self.used(), self.daemon.limit), (cache["bytes"], cache["limit"]))
        self.assertEqual(2, cache["files"])
        told = [(each["kind"], each["name"]) for each in cache["next"]]
        self.assertEqual([("content", self.digest), ("content", later)], told)
        self.assertEqual(self.daemon.now() - 1, cache["next"][0]["used"])

    def test_tells_for_which_repositories_bytes_were_saved(self) -> None:
        """
        A miss saves nothing; hits save the blob's bytes each time.
        """
        for _ in range(3):
            self.get(self.blob)
        self.get(f"/v2/team/app/blobs/{DEAD}")
        told = {"repository": "team/app", "bytes": 2 * len(self.data), "answers": 2}
        self.assertEqual([told], self.status()["repositories"])
        self.assertEqual(
            {"HIT": {"count": 2, "bytes": 600_000}, "MISS": {"count": 1, "bytes": 300_000}}, self.status()["answers"]
        )

    def test_tells_what_went_through(self) -> None:
        """
        Traffic is in the history once its sample is taken.
        """
        self.assertEqual([], self.status()["history"])
        for _ in range(4):
            self.get(self.blob)
        self.pass_time(10)
        told = {"asked": 4, "hits": 3, "sent": 1_200_000, "received": 300_000, "failed": 0, "took": [4, *[0] * 8]}
        quiet = {**dict.fromkeys(told, 0), "took": [0] * 9}
        self.assertEqual([{"seconds": 5, **told}, {"seconds": 5, **quiet}], self.status()["history"])
        longer = self.status("?range=6h")
        self.assertEqual(([{"seconds": 10, **told}], "6 h"), (longer["history"], longer["scale"]["words"]))

    def test_of_a_range_that_there_is_not_the_others_are_told(self) -> None:
        for path in ("/status.json?range=1y", "/?range="):
            reply = self.daemon.ask_admin(path)
            self.assertEqual((404, "there is no such range; these are: 15m, 6h, 3d"), (reply.code, reply.error[2]))

    def test_tells_how_much_clients_ask_of_it(self) -> None:
        self.standin.hold(self.digest)
        self.daemon.send("GET", self.blob)
        self.flush()
        self.arrive(self.digest, 1000)
        clients = {"connected": 1, "limit": 100, "sending": 1, "stall": 0.25, "processes": 1}
        self.assertEqual(clients, self.status()["clients"])

    def test_tells_what_failed_and_for_whom(self) -> None:
        """
        Each is counted; a 404 of the registry is no failure.
        """
        self.standin.fail("registry", status=500)
        began = self.daemon.now()
        for _ in range(2):
            self.daemon.send("GET", "/v2/team/app/manifests/absent?x=secret")
            self.pass_time(30)
        (first,) = self.status()["failed"]
        self.assertEqual(("/v2/team/app/manifests/absent", 502, 2), (first["path"], first["status"], first["times"]))
        self.assertIn(first["reason"], ("failing", "circuit-open"))
        self.assertEqual(CLIENT, first["client"])
        self.assertLess(first["since"], first["when"])
        self.assertGreaterEqual(first["since"], began)
        self.assertEqual(2, sum(each["failed"] for each in self.status()["history"]))

    def test_who_is_not_let_in_writes_nothing_there(self) -> None:
        """
        Any client that reaches the port could fill it: rejected clients are counted without details. No other row is
        displaced.
        """
        self.start(limits=Limits(connections=1))
        self.standin.fail("registry", status=500)
        self.get("/v2/team/app/manifests/absent")
        self.daemon.front.connect(Raw(), "proxy.example", 80, secure=False).write(b"GET /v2/")
        self.flush()
        for number in range(LIMIT + 1):
            asked = f"GET /v2/pay/to-evil.example/manifests/{number} HTTP/1.1\r\nHost: proxy\r\n\r\n"
            self.assertIn(b" 503 ", self.daemon.raw(asked.encode()))
        failed = [(each["path"], each["status"], each["reason"], each["times"]) for each in self.status()["failed"]]
        self.assertEqual(("-", 503, "busy", LIMIT + 1), failed[0])
        self.assertEqual(["/v2/team/app/manifests/absent"], [path for path, *_ in failed[1:]])

    def test_what_ecr_does_not_have_has_not_failed(self) -> None:
        self.get("/v2/team/app/manifests/absent")
        self.pass_time(10)
        status = self.status()
        self.assertEqual(([], 0), (status["failed"], status["lately"]["failed"]))

    def test_tells_how_good_the_token_is(self) -> None:
        """
        Its expiry, and the time of the next refresh; not the token itself.
        """
        token = self.status()["token"]
        self.assertIsNone(token["problem"])
        self.assertEqual(self.daemon.tokens.expires, token["expires"])
        self.assertAlmostEqual(6 * 3600, token["refresh_seconds"], delta=5)
        self.assertEqual(0, token["failures"])

    def test_tells_how_well_ecr_answers(self) -> None:
        """
        Circuit, last answer, queues and outcomes; errors are among the incidents.
        """
        self.assertIsNone(self.status()["upstream"]["answered_seconds"])
        self.get(self.blob)
        self.pass_time(7)
        upstream = self.status()["upstream"]
        self.assertEqual(("closed", 7.0), (upstream["circuit"], upstream["answered_seconds"]))
        self.assertEqual({"registry": {"307": 1}, "bucket": {"206": 1}}, upstream["outcomes"])
        self.assertEqual({"manifests": 0, "checks": 0, "blobs": 0, "lists": 0}, upstream["waiting"])
        self.standin.fail("registry", status=503)
        for name in range(5):
            self.daemon.send("GET", f"/v2/team/app{name}/manifests/latest")
        self.pass_time(30)
        status = self.status()
        self.assertEqual("open", status["upstream"]["circuit"])
        self.assertIn("ECR keeps failing", status["incidents"][0]["text"])
        self.assertEqual("warn", status["incidents"][0]["level"])

    def test_tells_why_the_daemon_is_not_ready(self) -> None:
        """
        With the reasons of /readyz.
        """
        self.assertEqual([], self.status()["reasons"])
        self.pass_time(FRESH_SECONDS)
        self.root.rename(self.root.with_suffix(".away"))
        self.addCleanup(self.root.with_suffix(".away").rename, self.root)
        self.root.write_text("no directory")
        self.addCleanup(self.root.unlink)
        status = self.status()
        self.assertIn("cache", status["reasons"][0])
        self.assertEqual((False, True), (status["can_serve"], status["can_fetch"]))

    def test_does_not_grow_with_what_clients_do(self) -> None:
        """
        The numbers of repositories, files and transfers are limited.
        """
        digests = [self.standin.push_blob(f"team/{number}", noise(f"{number}", 100)) for number in range(80)]
        for number, digest in enumerate(digests * 2):
            self.get(f"/v2/team/{number % 80}/blobs/{digest}")
        status = self.status()
        self.assertEqual((10, NEXT), (len(status["repositories"]), len(status["cache"]["next"])))
        self.assertLess(TRANSFERS, 1000)

    def test_has_no_paths_below(self) -> None:
        self.assertEqual(404, self.daemon.ask_admin("/status.json/more").code)


class PortTests(StatusTestCase):
    """
    Which browsers may send requests.
    """

    def test_no_other_site_may_read_it(self) -> None:
        """
        Nothing on this port has the header that allows other sites' scripts to read, nor can it be taken for another
        type.
        """
        for path in ("/status.json", "/metrics", "/readyz", "/healthz", "/nothing"):
            reply = self.daemon.ask_admin(path)
            self.assertIsNone(reply.header("Access-Control-Allow-Origin"), path)
            self.assertEqual("nosniff", reply.header("X-Content-Type-Options"), path)
            self.assertEqual("same-origin", reply.header("Cross-Origin-Resource-Policy"), path)

    def test_a_strangers_name_for_this_port_is_refused(self) -> None:
        """
        A site whose name was made to resolve to this machine gets nothing of the daemon; Prometheus may use any name.
        """
        self.assertEqual(403, self.daemon.ask_admin("/status.json", host="evil.example").code)
        self.assertEqual(200, self.daemon.ask_admin("/metrics", host="ecr-proxy.infra.example").code)
        self.assertEqual(200, self.daemon.ask_admin("/readyz", host="ecr-proxy.infra.example").code)

    def test_a_name_that_the_operator_gave_it_is_his(self) -> None:
        """
        With PROXY_ADMIN_HOSTS the port may have a name with dots.
        """
        self.start(admin_hosts=frozenset({"ecr-proxy.infra.example"}))
        self.assertEqual(200, self.daemon.ask_admin("/status.json", host="ecr-proxy.infra.example").code)
        self.assertEqual(403, self.daemon.ask_admin("/status.json", host="evil.example").code)

    def test_a_name_without_a_dot_is_for_programs(self) -> None:
        """
        Containers and Services have such names; a page in a browser may have one if the local name server is hostile.
        """
        for language, status in (({}, 200), ({"Accept-Language": "en"}, 403)):
            self.assertEqual(status, self.daemon.ask_admin("/status.json", headers=language, host="printer").code)
            self.assertEqual(200, self.daemon.ask_admin("/metrics", headers=language, host="printer").code)
        self.start(admin_hosts=frozenset({"buildhost"}))
        reply = self.daemon.ask_admin("/status.json", headers={"Accept-Language": "en"}, host="buildhost")
        self.assertEqual(200, reply.code)

    def test_who_names_no_host_is_answered(self) -> None:
        """
        HTTP/1.0 needs no Host, and no browser uses it; if the port is a socket, there is no address either.
        """
        self.daemon.admin.socket = "/run/ecrproxy/admin"
        for path, status in (("/", 200), ("/status.json", 200), ("/metrics", 200), ("/nothing", 404)):
            got = self.daemon.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode(), self.daemon.admin)
            self.assertEqual(f"HTTP/1.0 {status}".encode(), got[:12], path)

    def test_a_strangers_name_is_refused_at_a_socket_too(self) -> None:
        """
        If the port is a socket, a proxy before it may pass on browsers' requests.
        """
        self.daemon.admin.socket = "/run/ecrproxy/admin"
        for host, status in (("evil.example", 403), ("localhost", 200)):
            got = self.daemon.raw(f"GET /status.json HTTP/1.0\r\nHost: {host}\r\n\r\n".encode(), self.daemon.admin)
            self.assertEqual(f"HTTP/1.0 {status}".encode(), got[:12], host)

    def test_only_reads(self) -> None:
        """
        Other methods are rejected.
        """
        self.assertEqual(405, self.daemon.ask_admin("/status.json", method="POST").code)


class NameTests(SynchronousTestCase):
    def test_of_which_no_stranger_can_be_the_owner(self) -> None:
        """
        Addresses, localhost, and names below it.
        """
        for host in ("127.0.0.1", "[::1]", "10.0.0.7", "localhost", "LOCALHOST", "a.localhost"):
            self.assertTrue(is_ours(host), host)
        for host in (
            *(
                "printer",
                "evil.example",
                "localhost.evil.example",
                "evillocalhost.example",
                "www.evillocalhost",
                "localhost.example",
            ),
            *("127.0.0.1.evil.example", "1.2.3", "evil.", "a.b:1", "localhost..", ".localhost.x", "[evil.example]"),
        ):
            self.assertFalse(is_ours(host), host)

    def test_which_the_operator_says_is_his(self) -> None:
        """
        Those names, in any spelling, and none below them.
        """
        named = frozenset({"ecr-proxy.infra.svc"})
        self.assertTrue(is_ours("ECR-proxy.infra.svc", named))
        self.assertFalse(is_ours("evil.ecr-proxy.infra.svc", named))
