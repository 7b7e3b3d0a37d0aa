"""
Which hosts the daemon connects to, and what it accepts as an answer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionRefusedError as RefusedError
from twisted.internet.error import TCPTimedOutError
from twisted.internet.interfaces import IAddress, IHostnameResolver, IHostResolution, IResolutionReceiver
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import capturedLogs, formatEvent
from twisted.protocols import tls
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web._newclient import Request, ResponseFailed
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from ecrproxy.daemon.tls import Certificate
from ecrproxy.registry.connections import (
    IDLE_SECONDS,
    INTERIM_LIMIT,
    SILENT_SECONDS,
    OddAnswerError,
    StrictClient,
    UpstreamAgent,
)
from ecrproxy.registry.resolver import Resolution
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.trust import Trust
from tests.daemon import DaemonTestCase, Network, Reply, noise
from tests.registry import StandIn, layer
from tests.store_contract import scratch
from tests.test_tls import Files, key_pem, signed
from tests.test_upstream import NO_LENGTHS

METADATA = "169.254.169.254"


@implementer(IHostnameResolver)
class Names:
    """
    Addresses by name; a literal is its own.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}
        self.silent: set[str] = set()

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        resolution = Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        if hostName in self.silent:
            return resolution
        for address in self.known.get(hostName, [hostName]):
            kind = IPv6Address if ":" in address else IPv4Address
            resolutionReceiver.addressResolved(kind("TCP", address, portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


class Wired(MemoryReactorClock):
    """
    A reactor in memory whose connections all lead to one network.
    """

    def __init__(self, clock: Clock, network: Network) -> None:
        super().__init__()
        self.rightNow, self.callLater = clock.rightNow, clock.callLater  # type: ignore[method-assign]
        self.nameResolver = self.names = Names()
        self.network = network
        self.connected: list[str] = []
        self.dead: set[str] = set()

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None) -> Any:
        connector = super().connectTCP(host, port, factory, timeout, bindAddress)
        here = IPv4Address("TCP", self.network.client, 31337)
        connector.transport = StringTransport(here, connector.getDestination())
        self.connected.append(host)
        if host in self.dead:
            factory.clientConnectionFailed(connector, Failure(RefusedError()))
        elif (protocol := factory.buildProtocol(None)) is not None:
            self.network.connect(protocol, host, port, secure=False)
        return connector


class AgentTests(DaemonTestCase):
    """
    A daemon whose names are resolved, over plain HTTP.
    """

    def setUp(self) -> None:
        super().setUp()
        self.standin = StandIn(self.clock, registry="http://ecr.example", bucket="http://bucket.example")
        self.forgotten: list[str] = []
        self.start(agent=self.agent)
        self.names = self.reactor.names.known
        self.names.update({"ecr.example": ["10.0.0.1"], "bucket.example": ["10.0.0.2"]})
        self.data = noise("blob", 1000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"

    def agent(self, back: Network) -> IAgent:
        """
        Build the daemon's own agent over a reactor in memory.
        """
        self.reactor = Wired(self.clock, back)
        self.made = UpstreamAgent(self.reactor, self.standin.registry, self.forgotten.append)
        return self.made

    def pull(self, path: str = "") -> Reply:
        """
        Request a blob, and wait until all of a host's addresses have been tried.
        """
        reply = self.daemon.send("GET", path or self.path)
        self.flush()
        self.pass_time(3)
        return reply

    def assertUnreached(self, reply: Reply, addresses: Sequence[str]) -> None:
        """
        Assert that the client has a clear 502, and that only C{addresses} were connected to.
        """
        self.assertRefused(reply, 502, "UNAVAILABLE", "does not go")
        self.assertEqual(list(addresses), self.reactor.connected)
        self.assertIn("where the proxy does not go", self.logged())
        self.assertEqual([], self.files())

    def test_private_addresses_are_fine(self) -> None:
        """
        VPC endpoints have private addresses: the blob comes from there.
        """
        self.assertWhole(self.pull(), self.data)
        self.assertEqual(["10.0.0.1", "10.0.0.2"], self.reactor.connected)

    def test_a_bucket_may_have_addresses_of_either_kind(self) -> None:
        for addresses, dead, used in (
            (["10.0.0.2"], "", "10.0.0.2"),
            (["2600:1f18::2"], "", "2600:1f18::2"),
            (["2600:1f18::2", "10.0.0.2"], "2600:1f18::2", "10.0.0.2"),
            (["10.0.0.2", "2600:1f18::2"], "10.0.0.2", "2600:1f18::2"),
        ):
            self.start(agent=self.agent)
            self.reactor.names.known.update({"ecr.example": ["10.0.0.1"], "bucket.example": addresses})
            self.reactor.dead.add(dead)
            data = noise(f"{addresses}{dead}", 1000)
            self.assertWhole(self.pull(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"), data)
            self.assertEqual(used, self.reactor.connected[-1])

    def test_names_of_forbidden_addresses_are_refused(self) -> None:
        """
        A redirect to a name that resolves to this machine or its metadata service is 502, without a retry.
        """
        for address in (METADATA, "127.0.0.1", "::1", "fe80::1", "fd00:ec2::254", "0.0.0.0", "64:ff9b::a9fe:a9fe"):
            self.names["bucket.example"] = [address]
            reply = self.pull()
            self.assertRefused(reply, 502, "UNAVAILABLE", "does not go")
            self.assertNotIn(address, self.reactor.connected)
        self.names["bucket.example"] = ["10.0.0.2"]
        self.assertWhole(self.pull(), self.data)

    def test_literal_addresses_are_refused(self) -> None:
        """
        A redirect to a forbidden address is 502, whatever its port and spelling.
        """
        self.names["2852039166"] = self.names["0x7f.1"] = ["127.0.0.1"]  # as getaddrinfo(3) reads them
        for host in (METADATA, "127.0.0.1:8080", "2852039166", "0x7f.1"):
            self.standin.heal()
            self.standin.fail("registry", status=307, headers={"Location": f"http://{host}/latest/meta-data/"})
            self.assertUnreached(self.pull(), ["10.0.0.1"])
        for host in ("[::1]", "[::ffff:169.254.169.254]:80", "[fe80::1%25eth0]"):
            self.standin.heal()
            self.standin.fail("registry", status=307, headers={"Location": f"http://{host}/latest/meta-data/"})
            self.assertRefused(self.pull(), 502, "UNAVAILABLE")
            self.assertEqual(["10.0.0.1"], self.reactor.connected)

    def test_an_own_address_is_refused_before_anything_is_sent(self) -> None:
        """
        This machine's addresses are known only once a connection exists: its own services get no request.
        """
        self.names["bucket.example"] = [self.daemon.back.client]
        before = len(self.daemon.back.ends)
        self.assertUnreached(self.pull(), ["10.0.0.1", self.daemon.back.client])
        self.assertEqual(before + 1, len(self.daemon.back.ends), "the registry's alone")
        self.assertEqual(0, self.standin.count("bucket"))

    def test_later_redirects_are_refused_too(self) -> None:
        """
        A bucket that redirects to the metadata service is rejected like the registry.
        """
        self.standin.fail("bucket", status=302, headers={"Location": f"http://{METADATA}/"})
        self.assertUnreached(self.pull(), ["10.0.0.1", "10.0.0.2"])

    def test_a_name_that_changes_is_judged_each_time(self) -> None:
        """
        An earlier resolution allows nothing: each connection's address counts.
        """
        self.assertWhole(self.pull(), self.data)
        other = noise("other", 1000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}"
        for _, server in self.daemon.back.ends:
            server.loseConnection()
        self.flush()
        self.names["bucket.example"] = [METADATA]
        self.assertRefused(self.pull(path), 502, "UNAVAILABLE", "does not go")
        self.assertNotIn(METADATA, self.reactor.connected)

    def test_of_several_addresses_the_allowed_are_used(self) -> None:
        """
        A name that resolves to both kinds of address is connected to at the allowed ones.
        """
        self.names["bucket.example"] = [METADATA, "10.0.0.2"]
        self.assertWhole(self.pull(), self.data)
        self.assertEqual(["10.0.0.1", "10.0.0.2"], self.reactor.connected)

    def test_a_registry_at_such_an_address_may_redirect_to_others(self) -> None:
        """
        If the endpoint itself is on this machine, as in tests, the bucket may be too.
        """
        self.names.update({"ecr.example": ["127.0.0.1"], "bucket.example": ["127.0.0.2"]})
        self.assertWhole(self.pull(), self.data)

    def test_a_host_that_cannot_be_connected_to_is_looked_up_anew(self) -> None:
        """
        The cached addresses are dropped, so that a new address is found with the next request.
        """
        self.reactor.dead.add("10.0.0.2")
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", "bucket.example can't be reached")
        self.assertEqual({"bucket.example"}, set(self.forgotten))
        self.names["bucket.example"] = ["10.0.0.3"]
        self.assertWhole(self.pull(), self.data)

    def test_who_leaves_while_a_name_is_looked_up_says_nothing_of_its_addresses(self) -> None:
        """
        Name servers that are slow would be waited for longer then, and silent ones again.
        """
        self.reactor.names.silent.add("bucket.example")
        asked = self.made.request(b"GET", b"http://bucket.example/blob")
        asked.cancel()
        self.failureResultOf(asked)
        self.assertEqual([], self.forgotten)

    def test_connections_that_were_forgotten_on_the_way_are_left(self) -> None:
        """
        As by a NAT that restarts: the request on such a connection is sent again, and no later one waits, nor does the
        daemon itself.
        """
        images = [self.standin.push_image(f"team/app-{number}", layers=[layer("a", b"a")]) for number in range(8)]
        paths = [f"/v2/team/app-{number}/manifests/{image.digest}" for number, image in enumerate(images)]
        early = [self.daemon.send("GET", path) for path in paths[:4]]
        self.flush()
        self.assertEqual({200}, {reply.code for reply in early})
        self.daemon.back.ends.clear()  # nothing moves there any longer, and neither side notices
        unlucky = self.daemon.send("GET", paths[4])
        self.flush()
        self.pass_time(SILENT_SECONDS)
        for path, image in zip(paths[5:7], images[5:7], strict=True):
            self.assertWhole(self.get(path), image.manifest)
        self.assertEqual(0, unlucky.code)
        self.pass_time(1)
        self.assertWhole(unlucky, images[4].manifest)
        self.assertWhole(self.get(paths[7]), images[7].manifest)

    def test_a_request_that_nobody_acknowledges_is_given_up_by_the_kernel(self) -> None:
        """
        And repeated over a new connection, if it went over an idle one: its client notices little.
        """
        with socket.socket() as own:
            transport = StringTransport()
            transport.socket = own  # type: ignore[attr-defined]
            StrictClient(lambda _: None).makeConnection(transport)
            limit = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        self.assertEqual(SILENT_SECONDS * 1000, limit)
        images = [self.standin.push_image(f"team/app-{number}", layers=[layer("a", b"a")]) for number in range(2)]
        paths = [f"/v2/team/app-{number}/manifests/{image.digest}" for number, image in enumerate(images)]
        self.assertWhole(self.get(paths[0]), images[0].manifest)
        ((idle, _),) = self.daemon.back.ends
        self.daemon.back.ends.clear()
        reply = self.daemon.send("GET", paths[1])
        self.flush()
        idle.protocol.connectionLost(Failure(TCPTimedOutError()))
        self.flush()
        self.assertWhole(reply, images[1].manifest)

    def test_connections_that_answer_are_kept_while_another_request_waits(self) -> None:
        """
        ECR takes its time for one image: connections with other answers are used again.
        """
        images = [self.standin.push_image(f"team/app-{number}", layers=[layer("a", b"a")]) for number in range(4)]
        paths = [f"/v2/team/app-{number}/manifests/{image.digest}" for number, image in enumerate(images)]
        self.assertWhole(self.get(paths[0]), images[0].manifest)
        slow = self.daemon.back.ends.pop()
        waiting = self.daemon.send("GET", paths[1])
        self.flush()
        self.pass_time(1)
        self.assertWhole(self.get(paths[2]), images[2].manifest)
        self.pass_time(SILENT_SECONDS)
        made = len(self.reactor.connected)
        self.assertWhole(self.get(paths[3]), images[3].manifest)
        self.assertEqual(made, len(self.reactor.connected))
        self.daemon.back.ends.append(slow)
        self.flush()
        self.assertWhole(waiting, images[1].manifest)

    def test_none_is_kept_to_a_registry_that_is_left(self) -> None:
        """
        Requests in flight end, and then their connections are closed too.
        """
        self.assertWhole(self.pull(), self.data)
        digest = self.standin.push_blob("team/app", noise("large", 100_000))
        self.standin.hold(digest)
        reply = self.pull(f"/v2/team/app/blobs/{digest}")
        self.made.leave()
        self.flush()
        self.assertEqual(1, len(self.daemon.back.ends))
        self.standin.release(digest)
        self.flush()
        self.assertWhole(reply, noise("large", 100_000))
        self.assertEqual([], self.daemon.back.ends)

    def test_a_name_that_resolves_to_nothing(self) -> None:
        """
        An unknown name is 502, until it is known.
        """
        for name, path in (("ecr.example", self.path), ("bucket.example", self.path)):
            known, self.names[name] = self.names[name], []
            self.assertRefused(self.pull(path), 502, "UNAVAILABLE", f"{name} can't be reached")
            self.names[name] = known
        self.assertWhole(self.pull(), self.data)

    def test_a_name_that_does_not_resolve(self) -> None:
        """
        Silent name servers lead to 504 after 25 seconds.
        """
        self.reactor.names.silent.add("bucket.example")
        reply = self.daemon.send("GET", self.path)
        self.pass_time(24)
        self.assertEqual(0, reply.code)
        self.pass_time(60)
        self.assertRefused(reply, 504, "UNAVAILABLE", "bucket.example has not answered")
        self.reactor.names.silent.clear()
        self.assertWhole(self.pull(), self.data)


class TlsTests(DaemonTestCase):
    """
    A registry and a bucket that speak TLS, or should.
    """

    def setUp(self) -> None:
        super().setUp()
        self.patch(tls, "_get_default_clock", lambda: self.clock)
        self.files_of = Files(scratch(self))
        self.standin = StandIn(self.clock, registry="https://cache.test", bucket="https://cache.test:8443")
        self.start(agent=self.agent)
        self.data = noise("blob", 1000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"

    def agent(self, back: Network) -> IAgent:
        """
        Build the daemon's own agent, which trusts the test's root, and have the registry show its certificate.
        """
        self.reactor = Wired(self.clock, back)
        self.reactor.names.known.update({"cache.test": ["10.0.0.1"], "other.test": ["10.0.0.1"]})
        self.plain, back.site = back.site, back.site
        self.show(self.files_of.key, self.files_of.certificate, back)
        path = self.files_of.write("root.pem", self.files_of.root.public_bytes(Encoding.PEM))
        before = os.environ.get("SSL_CERT_FILE")
        self.addCleanup(lambda: os.environ.update({"SSL_CERT_FILE": before} if before else {}))
        self.addCleanup(os.environ.pop, "SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = path  # OpenSSL looks there
        self.trust = Trust(path)
        self.forgotten: list[str] = []
        return UpstreamAgent(self.reactor, self.standin.registry, self.forgotten.append, policy=self.trust)

    def show(self, key: str, certificate: str, back: Network) -> None:
        """
        Have the registry, and its bucket, show a certificate.
        """
        back.site = tls.TLSMemoryBIOFactory(Certificate(key, certificate), False, self.plain, clock=self.clock)

    def pull(self) -> Reply:
        """
        Request the blob, and let retries happen.
        """
        reply = self.daemon.send("GET", self.path)
        self.flush()
        self.pass_time(20)
        return reply

    def assertNeverPlain(self) -> None:
        """
        Assert that the client has 502, and that nothing but TLS was sent.
        """
        self.standin.forget_asked()
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", "cache.test can't be reached")
        self.assertEqual([], self.standin.asked)

    def wrong(self, name: str, *, root: bool = True, days: int = 1) -> tuple[str, str]:
        """
        Return a certificate.
        """
        key, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        issuer = "middle" if root else "nobody"
        made = signed(name, key, issuer, self.files_of.middle_key if root else own, days=days, host=name)
        chain = made.public_bytes(Encoding.PEM) + self.files_of.middle.public_bytes(Encoding.PEM)
        return self.files_of.write("wrong.key", key_pem(key)), self.files_of.write("wrong.pem", chain)

    def test_a_certificate_that_is_right(self) -> None:
        """
        A certificate that names the host and is signed by a trusted authority is accepted.
        """
        self.assertWhole(self.pull(), self.data)

    def test_a_file_without_cas_takes_none_away(self) -> None:
        """
        The file may be half written, or its disk full: the previous CAs stay in use, and the log says so.
        """
        path = self.files_of.folder / "root.pem"
        whole = path.read_bytes()
        for written in (b"", whole[: len(whole) // 2]):
            path.write_bytes(written)
            with capturedLogs() as events:
                self.trust.use(self.trust.load())
            self.assertIn(
                "root.pem can't be read: it holds no PEM certificate", " ".join(map(str, map(formatEvent, events)))
            )
            self.assertWhole(self.pull(), self.data)

    def test_the_file_of_cas_is_read_when_it_is_asked_for_alone(self) -> None:
        """
        Not for each connection: it may be on a file system that hangs or is slow.
        """
        path, others = self.files_of.folder / "root.pem", Files(self.files_of.folder / "others")
        self.assertFalse(self.trust.changed())
        path.unlink()
        os.mkfifo(path)
        self.assertWhole(self.pull(), self.data)
        self.assertTrue(self.trust.changed())
        with capturedLogs() as events:
            self.trust.use(self.trust.load())
        (event,) = events
        self.assertIn("root.pem can't be read: it is a FIFO, not a regular file", formatEvent(event) or "")
        self.assertFalse(self.trust.changed())
        path.unlink()
        path.write_bytes(others.root.public_bytes(Encoding.PEM))
        self.trust.use(self.trust.load())
        self.pass_time(IDLE_SECONDS + 70)
        self.show(others.key, others.certificate, self.daemon.back)
        other = noise("other", 1000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}"
        self.assertWhole(self.pull(), other)

    def test_connections_that_the_registry_has_closed_are_forgotten(self) -> None:
        """
        After a while, without an error; the next pull succeeds.
        """
        self.assertWhole(self.pull(), self.data)
        self.pass_time(IDLE_SECONDS + 70)  # the registry closes idle connections after 60 s
        self.assertEqual([], self.flushLoggedErrors())
        other = noise("other", 1000)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}"
        self.assertWhole(self.pull(), other)

    def test_certificates_that_are_not(self) -> None:
        """
        For another host, self-signed, or expired: 502 and no byte of the request, until a valid one is shown.
        """
        for wrong in (
            self.wrong("other.test"),
            self.wrong("cache.test", root=False),
            self.wrong("cache.test", days=-1),
        ):
            self.show(*wrong, self.daemon.back)
            self.assertNeverPlain()
        self.show(self.files_of.key, self.files_of.certificate, self.daemon.back)
        self.assertWhole(self.pull(), self.data)

    def test_a_host_that_is_not_who_it_should_be_is_looked_up_anew(self) -> None:
        """
        A name server may have lied, or another machine may have the address by now.
        """
        self.assertWhole(self.pull(), self.data)
        self.assertEqual([], self.forgotten)
        self.pass_time(IDLE_SECONDS + 70)
        self.show(*self.wrong("other.test"), self.daemon.back)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('other', 1000))}"
        self.assertNeverPlain()
        self.assertEqual({"cache.test"}, set(self.forgotten))

    def test_a_host_that_does_not_speak_tls_is_looked_up_anew(self) -> None:
        class Plain(Protocol):
            def dataReceived(self, data: bytes) -> None:
                assert self.transport is not None
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        self.daemon.back.site = Factory.forProtocol(Plain)
        self.assertNeverPlain()
        self.assertEqual({"cache.test"}, set(self.forgotten))

    def test_a_server_that_does_not_speak_tls(self) -> None:
        """
        Plain HTTP instead of TLS is 502: the daemon does not downgrade.
        """
        heard: list[bytes] = []

        class Plain(Protocol):
            def dataReceived(self, data: bytes) -> None:
                heard.append(data)
                assert self.transport is not None
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        self.daemon.back.site = Factory.forProtocol(Plain)
        self.assertNeverPlain()
        self.assertTrue(heard)
        self.assertNotIn(b"HTTP", b"".join(heard))

    def test_a_peer_that_never_ends_its_handshake_is_left(self) -> None:
        self.start(agent=self.agent, budget=Budget(tries=1))
        self.daemon.back.site = Factory.forProtocol(Protocol)
        reply = self.daemon.send("GET", self.path)
        self.flush()
        (connection,) = self.daemon.back.ends
        self.pass_time(24)
        self.assertEqual(0, reply.code)
        self.assertIn(connection, self.daemon.back.ends)
        self.pass_time(5)
        self.assertRefused(reply, 504, "UNAVAILABLE", "has not answered for 25 s")
        self.assertNotIn(connection, self.daemon.back.ends)

    def test_a_peer_that_is_silent_after_its_headers_is_left(self) -> None:
        class Mute(Protocol):
            def dataReceived(self, data: bytes) -> None:
                assert self.transport is not None
                self.transport.write(b"HTTP/1.1 404 X\r\nContent-Length: 9\r\n\r\n")
                wire = cast("Any", self.transport).transport
                wire.pauseProducing()  # a machine that hangs: it sends nothing more, and acknowledges nothing

        self.start(agent=self.agent, budget=Budget(tries=1))
        self.plain = Factory.forProtocol(Mute)
        self.show(self.files_of.key, self.files_of.certificate, self.daemon.back)
        reply = self.daemon.send("GET", self.path)
        self.flush()
        ((client, _),) = self.daemon.back.ends
        self.pass_time(20)
        self.assertTrue(client.connected)
        self.pass_time(20)
        self.assertEqual(504, reply.code)
        self.assertFalse(client.connected)

    def test_a_bucket_with_a_wrong_certificate(self) -> None:
        """
        The rules for the registry hold for its redirects.
        """
        self.standin.fail("registry", status=307, headers={"Location": "https://other.test/x"})
        self.assertRefused(self.pull(), 502, "UNAVAILABLE", "other.test can't be reached")
        self.assertEqual({"registry"}, {asked.service for asked in self.standin.asked})


class Body(Protocol):
    """
    Keeps what it is given, piece by piece, and how it ends.
    """

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.end: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.given.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.end = reason


class Aborted(StringTransport):
    """
    A transport that may be aborted.
    """

    def abortConnection(self) -> None:
        self.disconnecting = True


class ChunkTests(SynchronousTestCase):
    """
    A body in chunks.
    """

    def setUp(self) -> None:
        self.client = StrictClient()
        self.client.makeConnection(Aborted())
        request = Request(b"GET", b"/", Headers({"Host": ["x"]}), None)
        asked = self.client.request(request)
        self.client.dataReceived(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.body = Body()
        self.successResultOf(asked).deliverBody(self.body)

    def test_those_of_one_read_are_delivered_together(self) -> None:
        self.client.dataReceived(b"3\r\none\r\n3\r\ntwo\r\n3\r\nth")
        self.assertEqual([b"onetwoth"], self.body.given)
        self.client.dataReceived(b"r\r\n2\r\nee\r\n0\r\n\r\n")
        self.assertEqual([b"onetwoth", b"ree"], self.body.given)
        assert self.body.end is not None
        self.body.end.trap(ResponseDone)

    def test_bytes_after_the_last_one_end_the_connection(self) -> None:
        """
        However many: the first 16 KiB are decoded with the body, the rest after it.
        """
        self.client.dataReceived(b"3\r\none\r\n0\r\n\r\n" + b"x" * 40_000)
        self.assertEqual([b"one"], self.body.given)
        assert self.body.end is not None
        self.body.end.trap(ResponseDone)
        self.assertTrue(cast(Any, self.client.transport).disconnecting)

    def test_what_came_before_wrong_framing_is_no_whole_body(self) -> None:
        self.client.dataReceived(b"3\r\none\r\nx\r\n")
        assert self.body.end is not None
        self.body.end.trap(ResponseFailed)

    def test_a_body_of_tiny_ones_is_refused(self) -> None:
        """
        Each costs time: bodies of them would stop the event loop for seconds.
        """
        for size in (1, 2, 10):
            self.setUp()
            self.client.dataReceived(b"%x\r\n%b\r\n" % (size, b" " * size) * 4000)
            assert self.body.end is not None
            self.body.end.trap(ResponseFailed)
            self.assertIsInstance(cast(Any, self.body.end.value).reasons[0].value, OddAnswerError)
            self.assertTrue(cast(Any, self.client.transport).disconnecting)

    def test_large_ones_are_not_refused_however_they_are_read(self) -> None:
        chunk = b"%x\r\n%b\r\n" % (1000, b"x" * 1000)
        data = chunk * 1000 + b"0\r\n\r\n"
        for start in range(0, len(data), 190_000):
            self.client.dataReceived(data[start : start + 190_000])
        self.assertEqual(1_000_000, sum(map(len, self.body.given)))
        self.assertEqual(6, len(self.body.given))


class OddAnswerTests(DaemonTestCase):
    """
    A registry that violates the protocol.
    """

    def setUp(self) -> None:
        super().setUp()
        self.begin()

    def begin(self) -> None:
        """
        Start with a manifest that is not cached, and no connection.
        """
        self.images = getattr(self, "images", 0) + 1
        self.image = self.standin.push_image("team/app", layers=[layer("a", noise(str(self.images), 100))])
        self.path = f"/v2/team/app/manifests/{self.image.digest}"
        self.close()

    def close(self) -> None:
        """
        Have the registry close its connections.
        """
        for _, server in self.daemon.back.ends:
            server.loseConnection()
        self.flush()

    def answered(self, data: bytes, *, close: bool = False) -> Reply:
        """
        Request a manifest, and have the registry answer with C{data}.
        """
        reply = self.daemon.send("GET", self.path)
        self.answer_with(data, close=close)
        return reply

    def assertRefusedAndClean(self, data: bytes) -> None:
        """
        Assert that the answer is rejected without a retry, its connection closed, and nothing kept; the next one is
        good.
        """
        self.begin()
        before = self.files()
        self.standin.forget_asked()
        reply = self.answered(data)
        self.assertRefused(reply, 502, "UNAVAILABLE")
        self.assertEqual(1, len(self.standin.asked))
        self.assertEqual([], self.daemon.back.ends)
        self.assertEqual(before, self.files())
        self.assertWhole(self.get(self.path), self.image.manifest)

    def with_headers(self, *headers: bytes) -> bytes:
        """
        Build the manifest's answer with these headers.
        """
        head = [b"HTTP/1.1 200 OK", b"Content-Type: application/vnd.oci.image.manifest.v1+json", *headers]
        return b"\r\n".join([*head, b"", self.image.manifest])

    def test_endless_headers(self) -> None:
        """
        At most 16 KiB of headers are read, however they come; they don't block the loop.
        """
        for line in (b"a:\r\n", b"X-Long: " + b"x" * 1000 + b"\r\n", b"a: b\r\n\tfolded\r\n"):
            self.assertRefusedAndClean(b"HTTP/1.1 200 OK\r\n" + line * 200_000)

    def test_an_endless_status_line(self) -> None:
        """
        A line that does not end is rejected.
        """
        self.assertRefusedAndClean(b"HTTP/1.1 200 " + b"x" * 10**6)

    def test_endless_interim_answers(self) -> None:
        """
        Interim answers count as headers: a server can't send them for ever.
        """
        self.assertRefusedAndClean(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 10_000)

    def test_many_interim_answers(self) -> None:
        """
        Twisted's client logs a line for each of them.
        """
        length = b"Content-Length: %d" % len(self.image.manifest)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n" * (INTERIM_LIMIT + 1)
        self.assertRefusedAndClean(interim + self.with_headers(length))

    def test_two_ways_to_tell_a_length(self) -> None:
        """
        An answer with a length and a transfer coding, two lengths, or codings that were not requested, is rejected.
        """
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.image.manifest), self.image.manifest)
        for headers in (
            b"Content-Length: 3\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: chunked\r\nContent-Length: %d" % len(self.image.manifest),
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: identity",
            b"Content-Length: 3\r\nContent-Length: 4",
            b"Content-Length: 3, 4",
            b"Content-Length: -3",
            b"Content-Length: +3",
            b"Content-Length: 0x3",
        ):
            self.assertRefusedAndClean(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body)

    def test_lengths_that_are_no_numbers_of_bytes(self) -> None:
        for length in NO_LENGTHS:
            self.assertRefusedAndClean(self.with_headers(b"Content-Length: " + length))

    def test_statuses_that_are_none(self) -> None:
        for status in (b"-200", b"099", b"600", b"9999", b"2" * 4000, b"2" * 5000, b"x"):
            self.assertRefusedAndClean(b"HTTP/1.1 %b OK\r\nContent-Length: 2\r\n\r\n{}" % status)

    def test_bad_chunks(self) -> None:
        """
        Chunks with missing or invalid lengths, without their line ends or with endless trailers are rejected.
        """
        for body in (
            b"-1\r\n{}\r\n0\r\n\r\n",
            b"+2\r\n{}\r\n0\r\n\r\n",
            b"0x2\r\n{}\r\n0\r\n\r\n",
            b"\r\n{}\r\n0\r\n\r\n",
            b"2\n{}\n0\n\n" + b"x" * 2000,
            b"2\r\n{}}\r\n0\r\n\r\n",
            b"2;" + b"x" * 2000 + b"\r\n{}\r\n0\r\n\r\n",
            b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 20_000,
        ):
            self.assertRefusedAndClean(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)

    def test_a_short_body_may_have_tiny_chunks(self) -> None:
        for size in (1, 7, 300, 10_000):
            self.begin()
            parts = [self.image.manifest[at : at + size] for at in range(0, len(self.image.manifest), size)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            kind = b"Content-Type: application/vnd.oci.image.manifest.v1+json\r\nTransfer-Encoding: chunked"
            self.assertWhole(self.answered(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n\r\n" + body), self.image.manifest)

    def test_chunks_that_end_too_early(self) -> None:
        """
        Chunks without the last one are incomplete, whatever their bytes.
        """
        self.start(budget=Budget(tries=1))
        self.begin()
        body = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
        self.assertRefused(
            self.answered(body % (len(self.image.manifest), self.image.manifest), close=True), 502, "UNAVAILABLE"
        )
        self.assertEqual([], self.files())
        self.assertWhole(self.get(self.path), self.image.manifest)

    def test_bytes_after_the_body(self) -> None:
        """
        Bytes after a body, even a second answer, belong to nothing: the connection is not used again.
        """
        forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
        for rest in (b"x", forged, b"\r\n"):
            self.begin()
            length = b"Content-Length: %d" % len(self.image.manifest)
            reply = self.answered(self.with_headers(length) + rest)
            self.assertWhole(reply, self.image.manifest)
            self.assertEqual([], self.daemon.back.ends)
            self.begin()
            self.assertWhole(self.get(self.path), self.image.manifest)

    def test_bytes_before_a_request(self) -> None:
        """
        Data before a request closes the connection; the next request has its own answer.
        """
        self.assertWhole(self.get(self.path), self.image.manifest)
        for _, server in self.daemon.back.ends:
            server.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
        self.flush()
        self.assertEqual([], self.daemon.back.ends)
        self.begin()
        self.assertWhole(self.get(self.path), self.image.manifest)

    def test_bodies_where_there_are_none(self) -> None:
        """
        A 204 or a 304 is no manifest, and a body behind it is ignored.
        """
        for status in (b"204 No Content", b"304 Not Modified"):
            self.assertRefusedAndClean(b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\n{}" % status)

    def test_an_interim_answer(self) -> None:
        """
        An interim answer is not the answer.
        """
        for interim in (b"100 Continue", b"103 Early Hints\r\nLink: </x>", b"199 X\r\nContent-Length: 100"):
            self.begin()
            length = b"Content-Length: %d" % len(self.image.manifest)
            reply = self.answered(b"HTTP/1.1 %s\r\n\r\n" % interim + self.with_headers(length))
            self.assertWhole(reply, self.image.manifest)

    def test_ends_of_line_in_headers(self) -> None:
        """
        No header of upstream creates another one for the client, whatever ends its lines.
        """
        for end in (b"\r", b"\n", b"\n\r", b"\r\n\t"):
            self.begin()
            tag = self.standin.push_image("team/app", f"odd{self.images}", layers=[layer("a", noise("odd", 100))])
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json" + end
            head += b"X-Injected: 1\r\nContent-Length: %d\r\n\r\n" % len(tag.manifest)
            self.path = f"/v2/team/app/manifests/odd{self.images}"
            reply = self.answered(head + tag.manifest)
            self.assertEqual("whole", reply.ended)
            self.assertIsNone(reply.header("X-Injected"))
            self.assertNotIn("X-Injected", reply.header("Content-Type") or "")
            self.close()
            self.assertWhole(self.get(self.path), tag.manifest)
