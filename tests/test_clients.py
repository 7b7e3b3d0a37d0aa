"""
Clients are authorized in one place, and nothing behind it sees their credentials.
"""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.clients import Admission, Caller, is_in
from ecrproxy.access.passwords import FAILURES, Passwords
from tests.daemon import DaemonTestCase, at_once
from tests.test_htpasswd import line
from tests.test_passwords import basic

NETWORKS = [ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("192.0.2.7/32")]
ANN = basic("ann", "client canary")


class NetworksTests(SynchronousTestCase):
    """
    Networks and the client's own address.
    """

    def test_addresses_of_both_kinds_are_in_networks(self) -> None:
        """
        An IPv4 client of a dual-stack socket counts as IPv4; a zone does not matter.
        """
        for address in (
            "10.1.2.3",
            "fd00::1",
            "192.0.2.7",
            "::ffff:10.1.2.3",
            "0:0:0:0:0:ffff:a01:203",
            "fd00::1%eth0",
        ):
            self.assertTrue(is_in(address, NETWORKS), address)

    def test_all_others_are_outside(self) -> None:
        """
        So are clients without an address, as on a Unix socket.
        """
        for address in ("192.0.2.8", "fe80::1", "::ffff:192.0.2.8", "", "localhost", "10.1.2", "10.1.2.3/8"):
            self.assertFalse(is_in(address, NETWORKS), address)

    def test_what_a_caller_showed_is_not_printed(self) -> None:
        """
        It may be a password.
        """
        self.assertNotIn(ANN, repr(Caller("192.0.2.7", authorization=ANN)))


class AdmissionTests(DaemonTestCase):
    """
    Clients are authorized by network, certificate and password.
    """

    def setUp(self) -> None:
        """
        Create an image in ECR, and a password file with one user.
        """
        super().setUp()
        self.standin.push_image("team/app", "latest")
        self.by_tag = "/v2/team/app/manifests/latest"

    def protect(self, networks: Any = None, *, certificates: bool = False, passwords: bool = False) -> None:
        """
        Start a daemon with these restrictions.
        """
        asking = None
        if passwords:
            path = Path(self.root.parent, f"{self.root.name}.htpasswd")
            path.write_bytes(line("ann", "client canary"))
            self.addCleanup(path.unlink)
            asking = Passwords(str(path), at_once, self.clock, b"key")
        self.admission = Admission(networks, certificates=certificates, passwords=asking)
        self.start(admission=self.admission).shown = ""

    def test_a_password_is_asked_for_everywhere_but_for_health(self) -> None:
        """
        Also at /v2/, which docker login requests, and for paths that no registry has.
        """
        self.protect(passwords=True)
        registrys = ("/v2/", "/v2", self.by_tag, "/v2/team/app/tags/list", "/v2/_catalog", "/v2/../x", "/v2/?x")
        others = ("/", "//v1/", "/%762/", "/used", "/metrics", "/%72eadyz", "/readyz/x", "/healthz/", "/x/../readyz")
        for path in registrys + others:
            for method in ("GET", "HEAD"):
                reply = self.daemon.ask(method, path)
                self.assertEqual(401, reply.code, path)
                self.assertEqual('Basic realm="ecrproxy"', reply.header("WWW-Authenticate"))
                version = "registry/2.0" if path in registrys else None
                self.assertEqual(version, reply.header("Docker-Distribution-Api-Version"))
        self.assertRefused(self.get("/v2/"), 401, "UNAUTHORIZED", "docker login")
        self.assertEqual([], self.standin.asked)

    def test_a_right_password_pulls(self) -> None:
        """
        It gives access as without one, and goes no further: neither to ECR nor to the log.
        """
        self.protect(passwords=True)
        self.assertWhole(self.get("/v2/", Authorization=ANN), b"{}\n")
        self.assertEqual(200, self.get(self.by_tag, Authorization=ANN).code)
        self.assertEqual(401, self.get(self.by_tag).code)
        self.assertEqual(401, self.get(self.by_tag, Authorization=basic("ann", "other")).code)
        self.assertNotIn(ANN, self.logged())

    def test_two_authorizations_are_none(self) -> None:
        """
        Two servers could choose different ones.
        """
        self.protect(passwords=True)
        head = f"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN}\r\n"
        self.assertIn(b" 200 ", self.daemon.raw(f"{head}\r\n".encode()).partition(b"\r\n")[0])
        twice = self.daemon.raw(f"{head}Authorization: {ANN}\r\n\r\n".encode())
        self.assertIn(b" 401 ", twice.partition(b"\r\n")[0])

    def test_guesses_are_answered_with_429(self) -> None:
        """
        In the spec's JSON, with the time to wait, whatever address a header claims.
        """
        self.protect(passwords=True)
        for number in range(FAILURES):
            guess = basic("ann", f"client {number}")
            self.assertEqual(401, self.get("/v2/", Authorization=guess, X_Forwarded_For=f"10.0.0.{number}").code)
        reply = self.get("/v2/", Authorization=ANN, X_Forwarded_For="10.0.0.99")
        self.assertRefused(reply, 429, "TOOMANYREQUESTS")
        self.assertEqual("60", reply.header("Retry-After"))
        asked = f"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN}\r\n\r\n"
        self.assertTrue(self.daemon.raw(asked.encode()).startswith(b"HTTP/1.1 429 Too Many Requests\r\n"))
        self.daemon.front.client = "192.0.2.8"
        self.assertEqual(200, self.get("/v2/", Authorization=ANN).code)

    def test_health_stays_open(self) -> None:
        """
        Monitoring needs no password, certificate or address.
        """
        self.protect([ip_network("10.0.0.0/8")], certificates=True, passwords=True)
        for path in ("/_health", "/healthz", "/readyz"):
            self.assertEqual(200, self.get(path).code, path)

    def test_no_target_leads_past_the_rules(self) -> None:
        """
        Whatever its form: by networks, certificates and passwords, each by itself.
        """
        good = f"http://proxy.example{self.by_tag}"
        past = [f"{mark}{name}{self.by_tag}" for mark in "x:@.%" for name in ("readyz", "healthz", "_health", "v2")]
        targets = [*past, *(each[1:] for each in past), self.by_tag[1:], self.by_tag, good, f"/readyz/..{self.by_tag}"]
        for rules in ({"networks": [ip_network("10.0.0.0/8")]}, {"certificates": True}, {"passwords": True}):
            self.protect(**rules)
            for target in (*targets, "*", "proxy.example:443", "xreadyz/used", "/used"):
                for method in ("GET", "HEAD"):
                    got = self.daemon.raw(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    refused = b"401" if "passwords" in rules else b"403"
                    expected = refused if target.startswith(("/", "http:")) else b"400"
                    self.assertEqual(expected, got[9:12], (rules, target))
        self.assertEqual([], self.standin.asked)

    def test_addresses_outside_the_networks_are_denied(self) -> None:
        """
        By the connection's own address, whatever headers claim; there is no challenge for a password.
        """
        self.protect([ip_network("10.0.0.0/8")], passwords=True)
        for address in ("192.0.2.7", "2001:db8::7"):
            self.daemon.front.client = address
            claims = {"X_Forwarded_For": "10.0.0.1", "X_Real_IP": "10.0.0.1", "Forwarded": "for=10.0.0.1"}
            reply = self.get(self.by_tag, Authorization=ANN, **claims)
            self.assertRefused(reply, 403, "DENIED", "address")
            self.assertIsNone(reply.header("WWW-Authenticate"))
        for address in ("10.0.0.1", "::ffff:10.0.0.1"):
            self.daemon.front.client = address
            self.assertEqual(200, self.get(self.by_tag, Authorization=ANN).code)

    def test_a_certificate_is_asked_for(self) -> None:
        """
        A client without one is told what to do; one with a certificate that TLS has verified is allowed.
        """
        self.protect(certificates=True)
        self.daemon.scheme = "https"
        self.assertRefused(self.get(self.by_tag), 403, "DENIED", "client certificate")
        self.daemon.front.certificate = object()
        self.assertEqual(200, self.get(self.by_tag).code)

    def test_without_tls_there_is_no_certificate(self) -> None:
        """
        Whatever certificate a plain connection seems to have.
        """
        self.protect(certificates=True)
        self.daemon.front.certificate = object()
        self.assertRefused(self.get(self.by_tag), 403, "DENIED")

    def test_all_that_is_set_must_hold(self) -> None:
        """
        A password does not replace a certificate, nor the other way round.
        """
        self.protect([ip_network("192.0.2.0/24")], certificates=True, passwords=True)
        self.daemon.scheme = "https"
        self.assertEqual(403, self.get(self.by_tag, Authorization=ANN).code)
        self.daemon.front.certificate = object()
        self.assertEqual(401, self.get(self.by_tag).code)
        self.assertEqual(200, self.get(self.by_tag, Authorization=ANN).code)

    def test_passwords_are_read_again_when_told(self) -> None:
        """
        At once, as on SIGHUP; without a file there is nothing to read.
        """
        self.protect(passwords=True)
        self.assertEqual(200, self.get("/v2/", Authorization=ANN).code)
        Path(self.root.parent, f"{self.root.name}.htpasswd").write_bytes(line("bob", "client canary"))
        self.assertTrue(self.admission.reread())
        self.assertEqual(401, self.get("/v2/", Authorization=ANN).code)
        self.assertFalse(Admission().reread())
