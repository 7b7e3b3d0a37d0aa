"""
ECR and its buckets while they fail, are slow, or hang: clients that need them have an answer in time, others notice
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ecrproxy.registry.bodies import SECONDS
from ecrproxy.registry.connections import IDLE_SECONDS
from tests.daemon import MIB, Daemon, DaemonTestCase, Reply, noise
from tests.registry import Fault, layer
from tests.registry_bucket import bucket_error
from tests.registry_http import Service
from tests.registry_replies import registry_error

MINUTELY = 1 / 60
"""Bytes per second."""
PATIENCE = 150
"""Seconds until a client is answered or cut off, whatever upstream does: three attempts with waits."""

Adversities = Mapping[str, Callable[[], Fault]]


class DependencyTestCase(DaemonTestCase):
    """
    A daemon that has an image, and gets requests for another.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.known = f"/v2/team/app/blobs/{self.image.layers[0]}"
        self.tag = "/v2/team/app/manifests/latest"
        self.manifest = f"/v2/team/app/manifests/{self.image.digest}"
        for path in (self.tag, self.known):
            self.assertEqual(200, self.get(path).code)

    def start(self, **options: Any) -> Daemon:
        """
        Start a daemon whose bucket may be silent for ten seconds.
        """
        daemon = super().start(**options)
        daemon.upstream.stall_seconds = 10
        return daemon

    def adversities(self, service: Service, error: Any) -> Adversities:
        """
        Return the faults of a service, by name.
        """
        standin = self.standin
        return {
            "fails": lambda: standin.fail(service, status=500),
            "refuses connections": lambda: standin.refuse(service),
            "accepts and never answers": lambda: standin.hang(service),
            "answers headers and stalls": lambda: standin.slow(service, 0),
            "trickles": lambda: standin.slow(service, MINUTELY),
            "refuses and stalls": lambda: standin.slow(service, 0, reply=error),
            "refuses and trickles": lambda: standin.slow(service, MINUTELY, reply=error),
            "fails and stalls": lambda: standin.slow(service, 0, reply=bucket_error(500, "InternalError", "x")),
        }

    def assertOver(self, reply: Reply, what: str) -> None:
        """
        Assert that the client has an error, or was cut off.
        """
        self.assertTrue(reply.code >= 500 or reply.ended == "broken", (what, reply.code, reply.ended))

    def assertNothingHeld(self, what: str) -> None:
        """
        Assert that no connection outlives its request.
        """
        self.pass_time(IDLE_SECONDS + SECONDS)
        self.assertEqual([], self.daemon.back.ends, what)

    def assertHits(self, what: str) -> None:
        """
        Assert that cached content is served at once.
        """
        for path in (self.known, self.manifest):
            reply = self.get(path)
            self.assertEqual((200, "whole", "HIT"), (reply.code, reply.ended, reply.cache), what)


class BucketTests(DependencyTestCase):
    def test_that_is_ill_in_any_way_costs_only_those_who_need_it(self) -> None:
        blobs = 0
        for size in (2000, 2 * MIB):
            for what, strike in self.adversities("bucket", bucket_error(403, "AccessDenied", "no")).items():
                blobs += 1
                data = noise(f"blob {blobs}", size)
                path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
                fault = strike()
                reply = self.daemon.send("GET", path)
                self.flush()
                self.assertHits(what)
                self.assertEqual("REVALIDATED", self.get(self.tag).cache, what)
                self.pass_time(PATIENCE)
                if what == "trickles":  # it goes on, over one new connection after the other
                    self.assertGreater(self.standin.count("bucket", "GET", path.rpartition("/")[2]), 10)
                else:
                    self.assertOver(reply, what)
                fault.remove()
                reply.leave()
                self.pass_time(30)
                self.assertWhole(self.get(path), data)
                self.assertNothingHeld(what)


class RegistryTests(DependencyTestCase):
    def test_that_is_ill_in_any_way_costs_only_those_who_need_it(self) -> None:
        for number, (what, strike) in enumerate(
            self.adversities("registry", registry_error(404, "MANIFEST_UNKNOWN", "no")).items()
        ):
            self.start()
            other = self.standin.push_image("team/app", f"other{number}", layers=[layer("other", noise(what, 99))])
            path = f"/v2/team/app/manifests/{other.digest}"
            fault = strike()
            asked = self.daemon.send("GET", path)
            known = self.daemon.send("GET", self.tag)
            tags = self.daemon.send("GET", "/v2/team/app/tags/list")
            self.flush()
            self.assertHits(what)
            self.pass_time(PATIENCE)
            for reply in (asked, tags):
                self.assertOver(reply, what)
            # A HEAD has no body that could stall: then the tag is confirmed.
            self.assertIn(known.cache, ("STALE", "REVALIDATED"), what)
            self.assertWhole(known, self.image.manifest)
            fault.remove()
            self.pass_time(60)  # the circuit sends a probe in that time
            self.assertWhole(self.get(path), other.manifest)
            self.assertNothingHeld(what)

    def test_headers_that_trickle_have_as_long_as_any(self) -> None:
        for service in ("registry", "bucket"):
            self.start()
            blob = self.standin.push_blob("team/app", noise(service, 100))
            fault = self.standin.fault(Fault(service, None, blob if service == "registry" else ""))
            reply = self.daemon.send("GET", f"/v2/team/app/blobs/{blob}")
            self.flush()
            _, server = self.daemon.back.ends[-1]
            for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100:
                server.write(bytes([letter]))
                self.pass_time(1)
            self.assertRefused(reply, 504, "UNAVAILABLE", "has not answered for 25 s")
            fault.remove()
            self.assertNothingHeld(service)
