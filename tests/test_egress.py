"""
The registry and its buckets behind an egress proxy.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from botocore.utils import get_environ_proxies
from cryptography.hazmat.primitives.serialization import Encoding
from twisted.internet import ssl
from twisted.internet.address import IPv4Address
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.protocols import tls
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import BrowserLikePolicyForHTTPS
from twisted.web.iweb import IAgent

from ecrproxy.daemon.tls import Certificate
from ecrproxy.registry.circuit import CircuitState
from ecrproxy.registry.connections import UpstreamAgent
from ecrproxy.registry.egress import Egress, OwnNames, Proxy, is_plain_name
from ecrproxy.registry.proxy_variables import for_botocore
from tests.daemon import DaemonTestCase, Network, Reply, noise
from tests.registry import StandIn
from tests.store_contract import scratch
from tests.test_connections import METADATA, Wired
from tests.test_resolver import Receiver, System
from tests.test_tls import Files

PASSWORD = "p@ss:word"
SECONDS = 27
"""Seconds until a pull ends whatever the proxy does: 25 for headers from the server behind it."""


class VariablesTests(SynchronousTestCase):
    def proxied(self, no_proxy: str, *places: str) -> list[str]:
        """
        Return which of the URLs are reached through the proxy.
        """
        egress = Egress.read({"HTTPS_PROXY": "http://proxy.test:3128", "NO_PROXY": no_proxy})
        split = [(place, *place.rsplit(":", 1)) for place in places]
        return [place for place, host, port in split if egress.proxy_for(host.strip("[]"), int(port)) is not None]

    def test_without_a_proxy_all_hosts_are_reached_directly(self) -> None:
        for environ in ({}, {"HTTPS_PROXY": ""}, {"HTTP_PROXY": "http://proxy.test"}, {"NO_PROXY": "*"}):
            self.assertIsNone(Egress.read(environ).proxy_for("ecr.test", 443))

    def test_lower_case_wins_even_if_it_is_empty(self) -> None:
        both = {"HTTPS_PROXY": "http://upper.test:1", "https_proxy": "http://lower.test:2"}
        self.assertEqual("lower.test:2", str(Egress.read(both).proxy))
        self.assertIsNone(Egress.read({**both, "https_proxy": ""}).proxy)
        exempt = {"HTTPS_PROXY": "http://proxy.test", "NO_PROXY": "ecr.test", "no_proxy": "other.test"}
        self.assertIsNotNone(Egress.read(exempt).proxy_for("ecr.test", 443))
        self.assertIsNone(Egress.read(exempt).proxy_for("other.test", 443))

    def test_urls_of_proxies_are_read(self) -> None:
        for text, proxy in {
            "http://proxy.test:3128": Proxy("proxy.test", 3128),
            "http://proxy.test/": Proxy("proxy.test", 80),
            "https://proxy.test": Proxy("proxy.test", 443, secure=True),
            "proxy.test:8080": Proxy("proxy.test", 8080),
            "http://[::1]:3128": Proxy("::1", 3128),
        }.items():
            self.assertEqual(proxy, Proxy.parse(text), text)

    def test_what_is_no_url_of_a_proxy_is_refused_without_being_shown(self) -> None:
        for text in (
            "socks5://u:secret@proxy.test",
            "http://u:secret@",
            "http://u:se#secret@proxy.test",
            "http://u:secret@proxy.test:port",
            "http://u:secret@proxy.test/path",
            "http://u:secret@pro xy.test",
        ):
            problem = self.assertRaises(ValueError, Proxy.parse, text)
            self.assertNotIn("secret", str(problem))

    def test_a_password_is_sent_decoded_and_never_shown(self) -> None:
        proxy = Proxy.parse("http://ann:p%40ss%3Aword@proxy.test:3128")
        (line,) = (line for line in proxy.question("ecr.test", 443).decode().split("\r\n") if "Authorization" in line)
        sent = base64.b64decode(line.removeprefix("Proxy-Authorization: Basic "))
        self.assertEqual(f"ann:{PASSWORD}".encode(), sent)
        for shown in (repr(proxy), str(proxy), repr(Egress(proxy))):
            for secret in ("ann", "word", line.rpartition(" ")[2]):
                self.assertNotIn(secret, shown)

    def test_names_are_exempt_with_all_below_them(self) -> None:
        places = ("ecr.test:443", "a.ECR.test:443", "notecr.test:443", "test:443")
        for entry in ("ecr.test", ".ecr.test", "*.ecr.test", " other.example , ECR.test", "a.example ecr.test"):
            self.assertEqual(["notecr.test:443", "test:443"], self.proxied(entry, *places), entry)

    def test_ports_networks_and_addresses_are_exempt_where_they_match(self) -> None:
        self.assertEqual(["ecr.test:443"], self.proxied("ecr.test:8443", "ecr.test:443", "ecr.test:8443"))
        places = ("10.1.2.3:443", "11.1.2.3:443", "[fd00::1]:443", "10.test:443")
        self.assertEqual(["11.1.2.3:443", "10.test:443"], self.proxied("10.0.0.0/8,fd00::/8", *places))
        self.assertEqual(["10.1.2.3:443", "10.test:443"], self.proxied("11.1.2.3,[fd00::1]:443", *places))
        self.assertEqual([], self.proxied("x,*", *places))

    def test_this_machine_is_never_reached_through_a_proxy(self) -> None:
        self.assertEqual([], self.proxied("", "localhost:443", "a.localhost:443", "127.0.0.1:443", "[::1]:443"))

    def test_botocore_reaches_this_machine_and_its_metadata_itself(self) -> None:
        """
        botocore's own rules know no exemption except C{no_proxy}; existing exemptions stay.
        """
        theirs = {
            "HTTPS_PROXY": "http://proxy.test",
            "HTTP_PROXY": "http://proxy.test",
            "NO_PROXY": "ecr.test, .b.test",
        }
        environ = theirs | for_botocore(theirs)
        self.patch(os, "environ", environ)
        for url in (
            *("https://localhost:4566", "http://127.0.0.1:4566", "https://[::1]:4566", "https://ecr.test"),
            *("http://169.254.169.254/", "http://[fd00:ec2::254]/", "http://169.254.170.2/", "https://a.b.test"),
        ):
            self.assertEqual({}, get_environ_proxies(url), url)
        self.assertIn("https", get_environ_proxies("https://api.ecr.eu-west-1.amazonaws.com"))
        self.assertIn("https", get_environ_proxies("https://1127.0.0.1"))

    def test_botocore_is_told_nothing_without_a_proxy(self) -> None:
        for environ in ({}, {"NO_PROXY": "a"}, {"HTTPS_PROXY": "http://p.test", "NO_PROXY": "*"}, {"http_proxy": " "}):
            self.assertEqual({}, for_botocore(environ))

    def test_names_that_a_resolver_takes_for_addresses_are_none(self) -> None:
        for host in (
            "127.0.0.1",
            "::1",
            METADATA,
            "2130706433",
            "0x7f.1",
            "127.1",
            "a.0x7f",
            "localhost",
            "a.localhost.",
        ):
            self.assertFalse(is_plain_name(host), host)
        for host in ("bucket.s3.eu-west-1.amazonaws.com", "ecr.test.", "ecr", "1.test"):
            self.assertTrue(is_plain_name(host), host)


class ConnectProxy(Protocol):
    """
    An egress proxy in memory, as the other end of the wire.
    """

    def __init__(self, case: ProxyCase) -> None:
        self._case, self._asked = case, b""
        self._inner: Any = None

    def dataReceived(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        self._asked += data
        if b"\r\n\r\n" not in self._asked:
            return
        self._case.asked.append(self._asked.decode())
        answer = self._case.answers.pop(0) if self._case.answers else b"HTTP/1.1 200 Connection established\r\n\r\n"
        assert self.transport is not None
        if b" 200 " in answer:
            self._inner = self._case.behind.buildProtocol(None)
            self._inner.makeConnection(self.transport)
        if self._case.drip:
            self._case.drip_on(self.transport, answer)
            return
        for part in (answer[:5], answer[5:]):
            self.transport.write(part)
        if self._case.closing:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = Failure(Exception())) -> None:  # noqa: B008
        if self._inner is not None:
            self._inner.connectionLost(reason)


class ProxyCase(DaemonTestCase):
    """
    A registry and a bucket that can be reached only through a proxy.
    """

    REGISTRY = "https://cache.test"
    PROXY = "http://ann:p%40ss%3Aword@proxy.test:3128"
    NO_PROXY = ""

    def setUp(self) -> None:
        super().setUp()
        self.patch(tls, "_get_default_clock", lambda: self.clock)
        self.files_of = Files(scratch(self))
        self.asked: list[str] = []
        self.answers: list[bytes] = []
        self.closing = False
        self.drip = 0
        self.standin = StandIn(self.clock, registry=self.REGISTRY, bucket="https://cache.test:8443")
        self.start(agent=self.agent)
        self.data = noise("blob", 100_000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"

    def agent(self, back: Network) -> IAgent:
        """
        Build the daemon's own agent, which knows no host but the proxy.
        """
        self.reactor = Wired(self.clock, back)
        self.reactor.names.known.update({"proxy.test": ["10.9.9.9"], "cache.test": []})
        self.plain = back.site
        self.behind = self.speaking_tls(self.files_of.certificate)
        back.site = Factory.forProtocol(lambda: ConnectProxy(self))
        if self.PROXY.startswith("https"):
            certificate = Certificate(self.files_of.key, self.files_of.certificate)
            back.site = tls.TLSMemoryBIOFactory(certificate, False, back.site, clock=self.clock)
        root = ssl.Certificate.loadPEM(self.files_of.root.public_bytes(Encoding.PEM))
        policy = BrowserLikePolicyForHTTPS(ssl.trustRootFromCertificates([root]))
        egress = Egress.read({"HTTPS_PROXY": self.PROXY, "NO_PROXY": self.NO_PROXY})
        return UpstreamAgent(self.reactor, self.standin.registry, policy=policy, egress=egress)

    def speaking_tls(self, certificate: str) -> Any:
        return tls.TLSMemoryBIOFactory(Certificate(self.files_of.key, certificate), False, self.plain, clock=self.clock)

    def drip_on(self, transport: Any, answer: bytes) -> None:
        """
        Send a byte each C{drip} seconds.
        """
        transport.write(answer[:1])
        if answer[1:]:
            self.clock.callLater(self.drip, self.drip_on, transport, answer[1:])

    def pull(self) -> Reply:
        reply = self.daemon.send("GET", self.path)
        self.flush()
        self.pass_time(20)
        return reply

    def assertRefusedThere(self, words: str) -> None:
        """
        Assert that the client has a 502 that says so, and that no line contains the password.
        """
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", words)
        logged = self.logged()
        for secret in (PASSWORD, "p%40ss", base64.b64encode(f"ann:{PASSWORD}".encode()).decode()):
            self.assertNotIn(secret, logged)


class TunnelTests(ProxyCase):
    def test_registry_and_bucket_are_asked_through_it(self) -> None:
        self.assertWhole(self.pull(), self.data)
        targets = [asked.split(" ")[1] for asked in self.asked]
        self.assertEqual(["cache.test:443", "cache.test:8443"], targets)
        self.assertEqual({"10.9.9.9"}, set(self.reactor.connected))
        self.assertTrue(all("Host: cache.test:" in asked for asked in self.asked))

    def test_a_tunnel_is_used_again(self) -> None:
        self.assertWhole(self.pull(), self.data)
        other = noise("other", 1000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}"
        self.assertWhole(self.pull(), other)
        self.assertEqual(1, sum("CONNECT cache.test:443 " in asked for asked in self.asked))

    def test_the_certificate_is_that_of_the_host_behind_it(self) -> None:
        self.reactor.names.known["cache.test"] = ["10.0.0.1"]
        self.standin.fail("registry", status=307, headers={"Location": "https://other.test/x"})
        self.assertRefusedThere("other.test can't be reached")
        self.assertIn("other.test:443", self.asked[-1])
        self.assertEqual({"registry"}, {asked.service for asked in self.standin.asked})

    def test_a_wrong_password_is_told_as_that(self) -> None:
        self.answers = [b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"]
        self.assertRefusedThere("egress proxy proxy.test:3128 asks for another name or password (407)")
        self.assertEqual(1, len(self.asked))
        self.assertWhole(self.pull(), self.data)

    def test_a_host_that_it_forbids_is_told_and_not_asked_for_again(self) -> None:
        self.answers = [b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\n\r\n<html>"]
        self.assertRefusedThere("egress proxy proxy.test:3128 does not connect to cache.test:443: 403 Forbidden")
        self.assertEqual(1, len(self.asked))

    def test_what_may_pass_is_asked_again(self) -> None:
        self.answers = [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"HTTP/1.0 200 OK\r\nVia: x\r\n\r\n"]
        self.assertWhole(self.pull(), self.data)

    def test_an_answer_that_is_none_is_refused(self) -> None:
        for answer in (b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 \xff\r\n\r\n", b"x" * 20_000):
            self.answers = [answer]
            self.assertRefusedThere("HTTP")

    def test_one_that_closes_the_connection_is_told(self) -> None:
        self.answers, self.closing = [b""] * 9, True
        self.assertRefusedThere("egress proxy proxy.test:3128 closed the connection")

    def test_one_that_cannot_be_reached_is_told(self) -> None:
        self.reactor.dead.add("10.9.9.9")
        self.assertRefusedThere("egress proxy proxy.test:3128 can't be reached")

    def test_one_that_is_silent_is_given_up_in_time(self) -> None:
        self.answers = [b""] * 9
        reply = self.daemon.send("GET", self.path)
        self.pass_time(24)
        self.assertEqual(0, reply.code)
        self.pass_time(2)
        self.assertRefused(
            reply, 504, "UNAVAILABLE", "egress proxy proxy.test:3128 has not connected to cache.test:443"
        )
        self.answers.clear()
        self.pass_time(30)
        self.assertWhole(self.pull(), self.data)

    def test_one_that_loses_what_it_is_asked_for_some_seconds_is_asked_again(self) -> None:
        self.answers = [b""]
        reply = self.daemon.send("GET", self.path)
        self.pass_time(6)
        self.assertWhole(reply, self.data, "MISS")

    def test_one_that_was_silent_for_long_is_used_when_it_answers_again(self) -> None:
        """
        Whatever clients and the daemon itself requested meanwhile; requests that queued for long have their own error.
        """
        self.answers = [b""] * 99
        blobs = {f"{name}/app": noise(name, 1000) for name in "abcdef"}
        paths = {f"/v2/{name}/blobs/{self.standin.push_blob(name, data)}": data for name, data in blobs.items()}
        for _ in range(3):
            replies = [self.daemon.send("GET", path) for path in paths]
            self.pass_time(40)
            for reply in replies:
                self.assertIn(reply.code, (503, 504))
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.answers.clear()
        self.pass_time(30)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)
        for path, data in paths.items():
            self.assertWhole(self.get(path), data)

    def test_each_way_to_hang_ends_in_one_error_and_hits_notice_nothing(self) -> None:
        """
        An answer that drips or breaks off, and a tunnel that leads to silence.
        """
        broken = [b"HTTP/1.1 20"] * 9
        for answers, drip, closing, silent, words, status in (
            ([], 5, False, False, "has not connected to cache.test:443 for 15 s", 504),
            (broken, 0, True, False, "egress proxy proxy.test:3128 closed the connection", 502),
            ([], 0, False, True, "cache.test has not answered for 25 s", 504),
        ):
            self.start(agent=self.agent)
            warm = noise(words, 200_000)
            self.data = noise(f"not {words}", 100_000)
            path, self.path = (
                f"/v2/team/app/blobs/{self.standin.push_blob('team/app', each)}" for each in (self.data, warm)
            )
            self.assertWhole(self.pull(), warm)
            self.pass_time(600)  # unused tunnels are closed
            behind = self.behind
            self.answers, self.drip, self.closing = answers, drip, closing
            if silent:
                self.behind = Factory.forProtocol(Protocol)
            cold = self.daemon.send("GET", path)
            for _ in range(SECONDS):
                self.pass_time(1)
                self.assertEqual(200, self.get(self.path).code)
            self.assertRefused(cold, status, "UNAVAILABLE", words)
            self.answers, self.drip, self.closing, self.behind = [], 0, False, behind
            self.pass_time(60)
            self.path = path
            self.assertWhole(self.pull(), self.data)

    def test_no_redirect_leads_through_it_to_an_address(self) -> None:
        for host in (METADATA, "127.1:8443", "2130706433", "localhost.", "[::ffff:169.254.169.254]"):
            self.standin.heal()
            self.standin.fail("registry", status=307, headers={"Location": f"https://{host}/latest/meta-data/"})
            self.assertRefused(self.pull(), 502, "UNAVAILABLE")
        self.assertEqual(["cache.test:443"], [asked.split(" ")[1] for asked in self.asked])


class SecureProxyTests(ProxyCase):
    PROXY = "https://ann:p%40ss%3Aword@cache.test:3129"

    def test_tls_is_spoken_with_the_proxy_too(self) -> None:
        self.reactor.names.known["cache.test"] = ["10.9.9.9"]
        self.assertWhole(self.pull(), self.data)
        self.assertEqual({"10.9.9.9"}, set(self.reactor.connected))
        self.assertEqual(2, len(self.asked))

    def test_many_connections_lead_through_it_at_once(self) -> None:
        """
        To the registry and to the bucket, those of clients and of read-ahead.
        """
        self.reactor.names.known["cache.test"] = ["10.9.9.9"]
        self.start(agent=self.agent, read_ahead=True)
        self.reactor.names.known["cache.test"] = ["10.9.9.9"]
        layers = [noise(f"layer{number}", 300_000) for number in range(12)]
        image = self.standin.push_image("team/app", "many", layers=layers)
        self.assertWhole(self.get("/v2/team/app/manifests/many"), image.manifest)
        first = [self.daemon.send("GET", f"/v2/team/app/blobs/{digest}") for digest in image.layers[:3]]
        self.pass_time(5)
        self.assertEqual([True] * 12, [self.has(digest) for digest in image.layers])
        replies = [*first, *(self.get(f"/v2/team/app/blobs/{digest}") for digest in image.layers[3:])]
        for reply, data in zip(replies, layers, strict=True):
            self.assertWhole(reply, data)
        self.assertGreater(sum("cache.test:8443 " in asked for asked in self.asked), 2)

    def test_a_proxy_with_the_certificate_of_another_is_told_nothing(self) -> None:
        self.reactor.names.known["other.test"] = ["10.9.9.9"]
        self.PROXY = self.PROXY.replace("cache.test", "other.test")
        self.start(agent=self.agent)
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", "DNSMismatch")
        self.assertEqual([], self.asked)


class ExemptTests(ProxyCase):
    NO_PROXY = "cache.test:8443, other.test"

    def test_what_is_exempt_is_connected_to_itself(self) -> None:
        self.reactor.names.known["cache.test"] = ["10.0.0.2"]
        self.daemon.back.site = Factory.forProtocol(lambda: ConnectProxy(self))
        direct = self.speaking_tls(self.files_of.certificate)
        connect = self.daemon.back.connect

        def routed(protocol: Protocol, host: str, port: int, *, secure: bool) -> Any:
            self.daemon.back.site = direct if host == "10.0.0.2" else Factory.forProtocol(lambda: ConnectProxy(self))
            return connect(protocol, host, port, secure=secure)

        self.patch(self.daemon.back, "connect", routed)
        self.assertWhole(self.pull(), self.data)
        self.assertEqual(["10.9.9.9", "10.0.0.2"], self.reactor.connected)

    def test_a_redirect_that_is_exempt_is_guarded_as_without_a_proxy(self) -> None:
        self.reactor.names.known["other.test"] = [METADATA]
        self.standin.fail("registry", status=307, headers={"Location": "https://other.test/x"})
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", "does not go")
        self.assertNotIn(METADATA, self.reactor.connected)


class PlainTests(ProxyCase):
    REGISTRY = "http://cache.test"

    def test_plain_http_does_not_go_through_it(self) -> None:
        self.reactor.names.known["cache.test"] = ["10.0.0.2"]
        self.daemon.back.site = self.plain
        self.get("/v2/team/app/manifests/latest")
        self.assertEqual({"10.0.0.2"}, set(self.reactor.connected))
        self.assertEqual([], self.asked)


class OwnNamesTests(SynchronousTestCase):
    def test_the_resolver_is_the_one_that_was_there_first(self) -> None:
        """
        While it finds nothing, the proxy's last address is used.
        """
        reactor: Any = MemoryReactorClock()
        first = reactor.nameResolver = System()
        own = OwnNames(reactor)
        reactor.nameResolver = object()
        for first.knows in (True, False):
            receiver = Receiver()
            own.nameResolver.resolveHostName(receiver, "proxy.example", 3128)
            self.assertEqual([IPv4Address("TCP", "10.0.0.1", 3128)], receiver.found)
        self.assertEqual(["proxy.example"] * 2, first.asked)
        self.assertEqual(reactor.seconds(), own.seconds())
