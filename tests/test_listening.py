"""
Certificates and keys of the daemon's sockets are reloaded when told.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from twisted.internet.address import IPv4Address
from twisted.internet.protocol import ServerFactory
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogLevel, capturedLogs
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.daemon.balanced import BalancedFactory
from ecrproxy.daemon.inherited import BACKLOG, Inherited
from ecrproxy.daemon.listening import Listening, endpoints
from ecrproxy.http.site import RegistrySite
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import ConfigError
from tests.store_contract import scratch
from tests.test_tls import Files, Tcp, client, shake_with

ADDRESS = IPv4Address("TCP", "192.0.2.1", 40000)


def reread(listening: Listening) -> bool:
    """
    Read in a thread, and use in the reactor.
    """
    return listening.use(listening.load())


class RereadTests(SynchronousTestCase):
    """
    Key and certificate, named by their settings or in an endpoint string.
    """

    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        folder = scratch(self)
        folder.mkdir()
        self.files, self.others = Files(folder / "files"), Files(folder / "others")
        key, certificate = self.files.key, self.files.certificate
        escaped = str(folder / "files").replace("/", "\\/")
        self.ways = (
            {"PROXY_SSL_KEY": key, "PROXY_SSL_CERTIFICATE": certificate},
            {"PROXY_LISTEN": f"ssl:5443:privateKey={key}:certKey={certificate}:extraCertChain={certificate}"},
            {"PROXY_LISTEN": f"ssl:5443:{key}:{certificate}:extraCertChain={certificate}:sslmethod=TLS_METHOD"},
            {"PROXY_LISTEN": f"haproxy:ssl:5443:{escaped}/key.pem:{certificate}:extraCertChain={certificate}"},
        )
        self.begun: list[Any] = []

    def listen(self, environ: dict[str, str]) -> Listening:
        """
        Listen as the settings say.
        """
        config = Config.load({}, {"PROXY_ECR_ENDPOINT": "http://ecr.test", "AWS_REGION": "eu-west-1", **environ})
        ((name, endpoint),) = endpoints(config, self.reactor)
        listening = Listening(name, endpoint, RegistrySite(Resource(), self.reactor, Crowd(Limits())))
        listening.privilegedStartService()
        return listening

    def renew(self, *, key: bool = True) -> None:
        """
        Replace the files in use by others.
        """
        if key:
            Path(self.files.key).write_bytes(Path(self.others.key).read_bytes())
        Path(self.files.certificate).write_bytes(Path(self.others.certificate).read_bytes())

    def connect(self, trusted: Files) -> None:
        """
        Shake hands, as a client that trusts only C{trusted}.
        """
        _, factory, *_ = self.reactor.tcpServers[-1]
        if isinstance(factory, BalancedFactory):
            factory = factory.wrappedFactory
        transport = Tcp()
        protocol: Any = factory.buildProtocol(ADDRESS)
        shake_with(protocol, transport, client(trusted=trusted.root))
        self.begun.append(protocol)
        self.addCleanup(protocol.connectionLost, None)

    def test_new_connections_have_the_new(self) -> None:
        """
        Once the daemon is told, and not before.
        """
        for way in range(len(self.ways)):
            self.setUp()
            environ = self.ways[way]
            listening = self.listen(environ)
            self.renew()
            self.connect(self.files)
            with capturedLogs() as events:
                self.assertTrue(reread(listening))
            self.connect(self.others)
            self.assertEqual([LogLevel.info], [event["log_level"] for event in events])

    def test_changed_files_are_noticed_until_they_are_read(self) -> None:
        """
        Also unusable ones: they are reported once, and tried again after the next change.
        """
        for way in range(len(self.ways)):
            self.setUp()
            listening = self.listen(self.ways[way])
            self.assertFalse(listening.changed())
            for key in (False, True):
                self.renew(key=key)
                self.assertTrue(listening.changed())
                self.assertEqual(key, reread(listening))
                self.assertFalse(listening.changed())
            self.connect(self.others)
        self.assertFalse(self.listen({"PROXY_LISTEN": "tcp:5000"}).changed())

    def test_tells_when_the_certificate_ends(self) -> None:
        listening = self.listen(self.ways[0])
        self.assertEqual(self.files.leaf.not_valid_after_utc.timestamp(), listening.expires)
        self.renew()
        reread(listening)
        self.assertEqual(self.others.leaf.not_valid_after_utc.timestamp(), listening.expires)
        self.assertIsNone(self.listen({"PROXY_LISTEN": "tcp:5000"}).expires)

    def test_what_cannot_be_used_changes_nothing(self) -> None:
        """
        One line of the log says what is wrong, with the setting's name.
        """
        for way in range(len(self.ways)):
            self.setUp()
            environ = self.ways[way]
            listening = self.listen(environ)
            self.renew(key=False)
            with capturedLogs() as events:
                self.assertFalse(reread(listening))
            self.connect(self.files)
            (event,) = events
            self.assertEqual(LogLevel.error, event["log_level"])
            self.assertTrue(any(name in str(event["problem"]) for name in environ), event)
            self.assertFalse(listening.changed())

    def test_files_without_a_name_in_the_string_are_watched_too(self) -> None:
        """
        Twisted's own default, key and certificate in one file, and a directory of such files.
        """
        folder = Path(scratch(self))
        folder.mkdir()
        files = [folder / "server.pem", folder / "pems" / "a.pem"]
        files[1].parent.mkdir()
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(folder)
        for text, file in zip(("ssl:5443", f"tls:{folder}/pems:5443"), files, strict=True):
            for each in (self.files, self.others):
                file.write_bytes(Path(each.key).read_bytes() + each.leaf.public_bytes(Encoding.PEM))
                if each is self.files:
                    listening = self.listen({"PROXY_LISTEN": text})
            self.assertTrue(listening.changed(), text)
            self.assertTrue(reread(listening))
            self.assertEqual(self.others.leaf.not_valid_after_utc.timestamp(), listening.expires)
            _, factory, *_ = self.reactor.tcpServers[-1]
            asker = client()
            protocol: Any = factory.buildProtocol(ADDRESS)
            shake_with(protocol, Tcp(), asker)
            self.assertEqual(self.others.leaf, asker.get_peer_certificate(as_cryptography=True))
            protocol.connectionLost(None)

    def test_files_that_are_being_written_are_told_once_and_taken_when_both_are_there(self) -> None:
        """
        A renewer writes one after the other, perhaps in pieces; the previous pair serves until then.
        """
        for way in range(len(self.ways)):
            self.setUp()
            listening = self.listen(self.ways[way])
            steps = ((self.files.certificate, self.others.certificate), (self.files.key, self.others.key))
            told = []
            for place, source in steps:
                whole = Path(source).read_bytes()
                for part in (whole[: len(whole) // 2], whole):
                    Path(place).write_bytes(part)
                    with capturedLogs() as events:
                        for _ in range(3):  # minutes
                            if listening.changed():
                                reread(listening)
                    told.append([event["log_level"] for event in events])
                    self.connect(self.others if len(told) == 4 else self.files)
            self.assertEqual([[LogLevel.error]] * 3 + [[LogLevel.info]], told)

    def test_what_is_no_file_is_told_at_once_and_changes_nothing(self) -> None:
        """
        Opening a FIFO would wait until a process writes to it.
        """
        for way in range(len(self.ways)):
            for name in ("key.pem", "certificate.pem"):
                self.setUp()
                listening = self.listen(self.ways[way])
                path = self.files.folder / name
                path.unlink()
                os.mkfifo(path)
                with capturedLogs() as events:
                    self.assertFalse(reread(listening))
                (event,) = events
                self.assertIn("can't be read: it is a FIFO, not a regular file", str(event["problem"]))
                self.connect(self.files)

    def test_without_tls_there_is_nothing_to_read(self) -> None:
        for environ in ({}, {"PROXY_LISTEN": "tcp:5000"}):
            with capturedLogs() as events:
                self.assertFalse(reread(self.listen(environ)))
            self.assertEqual([], events)


class BehindBalancerTests(SynchronousTestCase):
    def listened_on(self, text: str) -> Any:
        """
        Listen on an endpoint string, and return the factory for each connection.
        """
        reactor = MemoryReactorClock()
        settings = {"PROXY_ECR_ENDPOINT": "http://ecr.test", "AWS_REGION": "eu-west-1", "PROXY_LISTEN": text}
        ((_, endpoint),) = endpoints(Config.load({}, settings), reactor)
        endpoint.listen(self)
        _, factory, *_ = reactor.tcpServers[-1]
        return factory

    def test_headers_are_parsed_beneath_the_site(self) -> None:
        factory = self.listened_on("haproxy:tcp:5000:interface=127.0.0.1")
        self.assertIsInstance(factory, BalancedFactory)
        self.assertIs(self, factory.wrappedFactory)

    def test_a_string_that_makes_no_sense_is_a_setting_that_does_not(self) -> None:
        for text in ("haproxy:", "haproxy:nothing:5000"):
            self.assertRaises(ConfigError, self.listened_on, text)


class FromSystemdTests(SynchronousTestCase):
    """
    A socket that systemd has bound; in a worker, an inherited one.
    """

    def listened_on(self, **environ: str) -> Any:
        """
        Listen there, and return the factory for each connection.
        """
        settings = {"PROXY_ECR_ENDPOINT": "http://ecr.test", "AWS_REGION": "eu-west-1"}
        config = Config.load({}, {**settings, "PROXY_LISTEN": "systemd:domain=INET6:name=ecr-proxy", **environ})
        reactor = Inherited(MemoryReactorClock(), 0)
        adopted: list[Any] = []
        self.patch(reactor, "_adopt", adopted.append)
        ((_, endpoint),) = endpoints(config, reactor)
        endpoint.listen(self)
        return adopted[0]

    def test_speaks_http_where_there_is_no_key(self) -> None:
        """
        Like a port.
        """
        self.assertIs(self, self.listened_on())

    def test_speaks_tls_where_there_is_one(self) -> None:
        """
        The string can't say so, the settings of key and certificate do.
        """
        files = Files(scratch(self))
        spoken = self.listened_on(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate)
        self.assertIsInstance(spoken, TLSMemoryBIOFactory)
        self.assertIs(self, spoken.wrappedFactory)


class BacklogTests(SynchronousTestCase):
    def backlogs(self, text: str) -> list[int]:
        """
        Listen on C{text}, and return the backlogs of the ports.
        """
        reactor = MemoryReactorClock()
        config = Config.load(
            {}, {"PROXY_ECR_ENDPOINT": "http://ecr.test", "AWS_REGION": "eu-west-1", "PROXY_LISTEN": text}
        )
        for _, endpoint in endpoints(config, reactor):
            self.successResultOf(endpoint.listen(ServerFactory()))
        return [backlog for _, _, backlog, *_ in reactor.tcpServers] + [each[2] for each in reactor.unixServers]

    def test_holds_a_crowd_wherever_clients_come_in(self) -> None:
        texts = ("tcp:5000", "tcp6:5000", "tcp:5000:interface=127.0.0.1", "unix:/run/ecr-proxy", "haproxy:tcp:5000")
        self.assertEqual([[BACKLOG]] * len(texts), list(map(self.backlogs, texts)))

    def test_is_the_operators_where_one_is_given(self) -> None:
        self.assertEqual([[9], [9]], list(map(self.backlogs, ("tcp:5000:backlog=9", "haproxy:unix:/run/e:backlog=9"))))
