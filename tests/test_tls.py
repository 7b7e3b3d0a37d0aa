"""
Clients get TLS 1.2 or 1.3 with the whole chain, and errors name the wrong file.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase
from twisted.web import http
from twisted.web.resource import Resource
from zope.interface.verify import verifyObject

from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.daemon.tls import OWN_BYTES, Certificate, CertificateError, SecuredFactory
from ecrproxy.http.site import RegistrySite
from tests.store_contract import scratch

Key = Any


def key_pem(key: Key, encryption: KeySerializationEncryption | None = None) -> bytes:
    """
    Return a private key in PEM.
    """
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return data


def signed(
    name: str,
    key: Key,
    issuer: str,
    issuer_key: Key,
    *,
    authority: bool = False,
    days: int = 1,
    host: str = "cache.test",
) -> x509.Certificate:
    """
    Sign a certificate, valid for some days from yesterday on, or one that expired yesterday.
    """
    now = dt.datetime.now(dt.UTC) - dt.timedelta(days=1 if days < 0 else 0)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=max(days, 0)))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


class Files:
    """
    A root, an intermediate CA that it signed, and a server certificate of that, as files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        root_key, middle_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.root = signed("root", root_key, "root", root_key, authority=True)
        self.middle = signed("middle", middle_key, "root", root_key, authority=True)
        self.leaf = signed("cache.test", key, "middle", middle_key)
        self.private, self.middle_key = key, middle_key
        self.key = self.write("key.pem", key_pem(key))
        chain = self.leaf.public_bytes(Encoding.PEM) + self.middle.public_bytes(Encoding.PEM)
        self.certificate = self.write("certificate.pem", chain)

    def write(self, name: str, data: bytes) -> str:
        """
        Write a file and return its path.
        """
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


def client(
    minimum: int | None = None,
    maximum: int | None = None,
    *,
    ciphers: bytes = b"ALL",
    offer: tuple[bytes, ...] = (),
    trusted: x509.Certificate | None = None,
    shows: tuple[Key, x509.Certificate] | None = None,
) -> SSL.Connection:
    """
    Return a client with these versions and ciphers, however weak, which trusts only this root, if there is one.

    It sends a certificate, if it has one and is asked.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_cipher_list(ciphers + b":@SECLEVEL=0")
    if trusted:
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(X509.from_cryptography(trusted))
        context.set_verify(SSL.VERIFY_PEER, lambda *args: bool(args[-1]))
    if shows:
        context.use_privatekey(shows[0])
        context.use_certificate(shows[1])
    if minimum:
        context.set_min_proto_version(minimum)
    if maximum:
        context.set_max_proto_version(maximum)
    if offer:
        context.set_alpn_protos(list(offer))
    connection = SSL.Connection(context, None)
    connection.set_tlsext_host_name(b"cache.test")
    connection.set_connect_state()
    return connection


def pump(source: SSL.Connection, sink: SSL.Connection) -> None:
    """
    Carry data from one side to the other.
    """
    try:
        while True:
            sink.bio_write(source.bio_read(65536))
    except SSL.WantReadError:
        pass


def shake(server: SSL.Connection, asker: SSL.Connection) -> None:
    """
    Do the handshake between the two; raise what either side objects to.
    """
    server.set_accept_state()
    done: set[SSL.Connection] = set()
    for _ in range(10):
        for one, other in ((asker, server), (server, asker)):
            try:
                one.do_handshake()
                done.add(one)
            except SSL.WantReadError:
                pass
            pump(one, other)
    assert len(done) == 2


class Tcp(StringTransport):
    """
    A transport in memory that passes for one of TCP.
    """

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass

    def setTcpKeepAlive(self, enabled: bool) -> None:
        pass


def shake_with(protocol: Any, transport: Tcp, asker: SSL.Connection) -> None:
    """
    Let a client do the handshake with a server's protocol over a transport in memory.
    """
    protocol.makeConnection(transport)
    for _ in range(10):
        try:
            asker.do_handshake()
        except SSL.WantReadError:
            protocol.dataReceived(asker.bio_read(65536))
            if transport.value():
                asker.bio_write(transport.value())
                transport.clear()
        else:
            return
    raise AssertionError("no handshake")


def subject_of(asker: SSL.Connection) -> str:
    """
    Return the subject of the certificate that a client sees.
    """
    certificate = asker.get_peer_certificate(as_cryptography=True)
    return certificate.subject.rfc4514_string() if certificate else ""


class CertificateTests(SynchronousTestCase):
    """
    Key and certificate are two PEM files.
    """

    def setUp(self) -> None:
        self.files = Files(scratch(self))

    def serve(self) -> SSL.Connection:
        """
        Begin a connection on the server's side.
        """
        protocol: Any = None
        return Certificate(self.files.key, self.files.certificate).serverConnectionForTLS(protocol)

    def test_it_is_what_twisted_asks(self) -> None:
        """
        Twisted's TLS accepts it.
        """
        self.assertTrue(
            verifyObject(IOpenSSLServerConnectionCreator, Certificate(self.files.key, self.files.certificate))
        )

    def test_tls_1_2_and_1_3_are_spoken(self) -> None:
        """
        The newest that both sides support is used.
        """
        for versions, name in (
            ((SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION), "TLSv1.2"),
            ((SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION), "TLSv1.3"),
        ):
            asker = client(*versions)
            shake(self.serve(), asker)
            self.assertEqual(name, asker.get_protocol_version_name())

    def test_older_versions_are_refused(self) -> None:
        """
        Broken versions are not offered.
        """
        for version in (SSL.TLS1_VERSION, SSL.TLS1_1_VERSION):
            problem = self.assertRaises(SSL.Error, shake, self.serve(), client(version, version))
            self.assertIn("unsupported protocol", str(problem.args))

    def test_weak_ciphers_are_refused(self) -> None:
        """
        TLS 1.2 requires forward secrecy and authenticated encryption.
        """
        for ciphers in (b"ECDHE-ECDSA-AES128-SHA", b"ECDHE-ECDSA-AES256-SHA384"):
            asker = client(SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION, ciphers=ciphers)
            problem = self.assertRaises(SSL.Error, shake, self.serve(), asker)
            self.assertIn("no shared cipher", str(problem.args))
        shake(self.serve(), client(SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION, ciphers=b"ECDHE-ECDSA-AES128-GCM-SHA256"))

    def test_the_chain_in_the_file_is_sent(self) -> None:
        """
        A client that knows only the root can verify the server.
        """
        asker = client(trusted=self.files.root)
        shake(self.serve(), asker)
        names = [each.to_cryptography().subject.rfc4514_string() for each in asker.get_peer_cert_chain() or []]
        self.assertEqual(["CN=cache.test", "CN=middle"], names)

    def test_files_are_read_again(self) -> None:
        """
        On reload, for new connections; unusable files change nothing.
        """
        certificate = Certificate(self.files.key, self.files.certificate)
        protocol: Any = None
        before = certificate.serverConnectionForTLS(protocol)
        others = Files(self.files.folder / "others")
        for path, other in ((self.files.key, others.key), (self.files.certificate, others.certificate)):
            Path(path).write_bytes(Path(other).read_bytes())
        certificate.use(certificate.load())
        shake(before, client(trusted=self.files.root))
        shake(certificate.serverConnectionForTLS(protocol), client(trusted=others.root))
        Path(self.files.key).write_bytes(b"nonsense")
        self.assertRaises(CertificateError, certificate.use, certificate.load())
        shake(certificate.serverConnectionForTLS(protocol), client(trusted=others.root))

    def test_many_connections_share_one_certificate(self) -> None:
        """
        A failed one does not affect the others.
        """
        certificate = Certificate(self.files.key, self.files.certificate)
        protocol: Any = None
        one, other = (certificate.serverConnectionForTLS(protocol) for _ in range(2))
        self.assertRaises(SSL.Error, shake, one, client(SSL.TLS1_VERSION, SSL.TLS1_VERSION))
        shake(other, client())


class ClientCertificateTests(SynchronousTestCase):
    """
    Clients may be asked for a certificate.
    """

    def setUp(self) -> None:
        self.files = Files(scratch(self))
        self.authority_key, self.key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        authority = signed("clients", self.authority_key, "clients", self.authority_key, authority=True)
        self.authorities = self.files.write("ca.pem", authority.public_bytes(Encoding.PEM))
        self.own = signed("node-1", self.key, "clients", self.authority_key)
        self.certificate = Certificate(self.files.key, self.files.certificate, self.authorities)

    def serve(self) -> SSL.Connection:
        """
        Begin a connection on the server's side.
        """
        protocol: Any = None
        return self.certificate.serverConnectionForTLS(protocol)

    def shown(self, asker: SSL.Connection) -> str:
        """
        Do the handshake with a client; return whose certificate the server has seen.
        """
        server = self.serve()
        shake(server, asker)
        return subject_of(server)

    def test_a_certificate_of_the_ca_is_seen(self) -> None:
        """
        With both versions of TLS.
        """
        for version in (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
            self.assertEqual("CN=node-1", self.shown(client(version, version, shows=(self.key, self.own))))

    def test_a_client_without_one_is_spoken_to(self) -> None:
        """
        It may request the daemon's health.
        """
        self.assertEqual("", self.shown(client()))

    def test_foreign_and_expired_certificates_are_refused(self) -> None:
        """
        Those of another CA, even of the same name, of the server's own CA, self-signed ones, and expired ones.
        """
        other = ec.generate_private_key(ec.SECP256R1())
        for certificate, why in (
            (signed("node-1", self.key, "clients", other), "verify failed"),
            (signed("node-1", self.key, "others", other), "verify failed"),
            (signed("node-1", self.key, "node-1", self.key), "verify failed"),
            (signed("node-1", self.key, "clients", self.authority_key, days=-1), "verify failed"),
        ):
            problem = self.assertRaises(SSL.Error, shake, self.serve(), client(shows=(self.key, certificate)))
            self.assertIn(why, str(problem.args))
        self.assertRaises(SSL.Error, shake, self.serve(), client(shows=(self.files.private, self.files.leaf)))

    def test_sessions_are_not_taken_up_again(self) -> None:
        """
        Each connection sends its certificate again: an expired one is no longer accepted.
        """
        ended = signed("node-1", self.key, "clients", self.authority_key, days=-1)
        for version in (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
            asker = client(version, version, shows=(self.key, self.own))
            shake(self.serve(), asker)
            self.assertRaises(SSL.WantReadError, asker.recv, 1)  # TLS 1.3 sends the session late
            session = asker.get_session()
            assert session is not None
            for certificate in (self.own, ended):
                again = SSL.Connection(asker.get_context(), None)
                again.use_certificate(certificate)
                again.set_connect_state()
                again.set_session(session)
                if certificate is self.own:
                    self.assertEqual("CN=node-1", self.shown(again))
                else:
                    self.assertRaises(SSL.Error, shake, self.serve(), again)

    def test_files_of_cas_that_cannot_be_used_are_named(self) -> None:
        """
        As those of the server's own pair are.
        """
        for path, why in (
            ("/nowhere", "can't be read: No such file or directory"),
            (self.files.write("wrong.pem", b"garbage"), "holds no PEM certificate"),
            (self.files.write("empty.pem", b""), "holds no PEM certificate"),
        ):
            problem = self.assertRaises(CertificateError, Certificate, self.files.key, self.files.certificate, path)
            self.assertEqual(("authorities", why), (problem.what, problem.why))


class WrongFilesTests(SynchronousTestCase):
    """
    Errors name the wrong file.
    """

    def setUp(self) -> None:
        self.files = Files(scratch(self))

    def problem(self, key: str | None = None, certificate: str | None = None) -> tuple[str, str]:
        """
        Return which file is blamed, and for what.
        """
        problem = self.assertRaises(
            CertificateError, Certificate, key or self.files.key, certificate or self.files.certificate
        )
        return problem.what, str(problem)

    def test_files_that_are_not_there_are_named(self) -> None:
        """
        With the system's own words.
        """
        self.assertEqual(("key", "can't be read: No such file or directory"), self.problem(key="/nowhere"))
        self.assertEqual(
            ("certificate", "can't be read: No such file or directory"), self.problem(certificate="/nowhere")
        )

    def test_directories_are_no_files(self) -> None:
        """
        A mount without its file is reported.
        """
        folder = str(self.files.folder)
        self.assertEqual(("key", "can't be read: Is a directory"), self.problem(key=folder))
        self.assertEqual(("certificate", "can't be read: Is a directory"), self.problem(certificate=folder))

    def test_files_that_hold_something_else_are_named(self) -> None:
        """
        Garbage, nothing at all, and each in the other's place.
        """
        for data in (
            b"",
            b"garbage",
            b"\0" * 1000,
            b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
        ):
            path = self.files.write("wrong.pem", data)
            self.assertEqual(("key", "holds no PEM key"), self.problem(key=path))
            self.assertEqual(("certificate", "holds no PEM certificate"), self.problem(certificate=path))
        self.assertEqual(("key", "holds no PEM key"), self.problem(key=self.files.certificate))
        self.assertEqual(("certificate", "holds no PEM certificate"), self.problem(certificate=self.files.key))

    def test_a_key_of_another_certificate_is_refused(self) -> None:
        """
        Of the same kind or of another, the error names both files.
        """
        same = ec.generate_private_key(ec.SECP256R1())
        other = generate_private_key(65537, 2048)
        for key in (same, other):
            path = self.files.write("other.pem", key_pem(key))
            self.assertEqual(("pair", "the key is not the certificate's"), self.problem(key=path))

    def test_a_key_behind_a_passphrase_is_refused(self) -> None:
        """
        A daemon has nobody to ask for it.
        """
        path = self.files.write("locked.pem", key_pem(self.files.private, BestAvailableEncryption(b"passphrase")))
        self.assertEqual("key", self.problem(key=path)[0])


class Records:
    """
    What a client writes after the handshake, with records that no library would write: only AES-128-GCM.

    @param asker: the client.
    @param secret: of TLS 1.3, from which its keys are derived; None for TLS 1.2.
    """

    def __init__(self, asker: SSL.Connection, secret: bytes | None) -> None:
        self._secret = secret
        if secret is None:
            master, server, asking = asker.master_key(), asker.server_random(), asker.client_random()
            assert master is not None
            block = _expanded(master, b"key expansion" + (server or b"") + (asking or b""), 40)
            self._key, self._nonce, self._sent = block[:16], block[32:36], 1  # the first was Finished
        else:
            self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret, self._sent = secret, 0
        self._key, self._nonce = _labelled(secret, b"key", 16), _labelled(secret, b"iv", 12)

    def record(self, kind: int, data: bytes) -> bytes:
        """
        Encrypt a record.
        """
        number, self._sent = self._sent.to_bytes(8, "big"), self._sent + 1
        if self._secret is None:
            head = bytes([kind, 3, 3])
            about = number + head + len(data).to_bytes(2, "big")
            sealed = number + AESGCM(self._key).encrypt(self._nonce + number, data, about)
            return head + len(sealed).to_bytes(2, "big") + sealed
        head = bytes([23, 3, 3]) + (len(data) + 17).to_bytes(2, "big")
        nonce = bytes(one ^ other for one, other in zip(self._nonce, bytes(4) + number, strict=True))
        return head + AESGCM(self._key).encrypt(nonce, data + bytes([kind]), head)

    def renegotiation(self) -> bytes:
        """
        Request another handshake: the head of a ClientHello is enough to be refused one.
        """
        return self.record(22, b"\x01\0\0\0")

    def key_update(self) -> bytes:
        """
        Change the keys of TLS 1.3, and request the same of the server.
        """
        assert self._secret is not None
        sealed = self.record(22, b"\x18\0\0\x01\x01")
        self._use(_labelled(self._secret, b"traffic upd", 32))
        return sealed


def _expanded(secret: bytes, context: bytes, length: int) -> bytes:
    """
    Return TLS 1.2's pseudorandom function with SHA-256: RFC 5246, 5.
    """
    found, each = b"", context
    while len(found) < length:
        each = hmac.digest(secret, each, "sha256")
        found += hmac.digest(secret, each + context, "sha256")
    return found[:length]


def _labelled(secret: bytes, label: bytes, length: int) -> bytes:
    """
    Return TLS 1.3's HKDF-Expand-Label with SHA-256: RFC 8446, 7.1.
    """
    name = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(hashes.SHA256(), length, info).derive(secret)


class OwnBytesTests(SynchronousTestCase):
    """
    What TLS answers without the channel, to clients that don't read it.
    """

    def connect(self, version: int) -> None:
        """
        Do the handshake.
        """
        files = Files(scratch(self))
        self.clock, told = MemoryReactorClock(), list[bytes]()
        site: Any = RegistrySite(Resource(), self.clock, Crowd(Limits()))
        address: Any = None
        tls = Certificate(files.key, files.certificate)
        self.protocol: Any = SecuredFactory(tls, site, self.clock).buildProtocol(address)
        self.transport = Tcp()
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(version)
        context.set_max_proto_version(version)
        context.set_cipher_list(b"ECDHE-ECDSA-AES128-GCM-SHA256")
        context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
        context.set_keylog_callback(lambda _, line: told.append(line))
        asker = SSL.Connection(context, None)
        asker.set_connect_state()
        shake_with(self.protocol, self.transport, asker)
        with contextlib.suppress(SSL.WantReadError):  # TLS 1.3's client has yet to send the last of its handshake
            self.protocol.dataReceived(asker.bio_read(65536))
        secrets = [line.split()[2] for line in told if line.startswith(b"CLIENT_TRAFFIC_SECRET_0")]
        self.client = Records(asker, bytes.fromhex(secrets[0].decode()) if secrets else None)

    def send(self, make: Callable[[], bytes], records: int) -> int:
        """
        Send records, and read nothing; return how many bytes wait for the client.
        """
        self.transport.clear()
        for _ in range(records // 100):
            if not self.transport.disconnected:
                self.protocol.dataReceived(b"".join(make() for _ in range(100)))
        self.clock.advance(0)
        return len(self.transport.value())

    def test_renegotiation_that_is_asked_for_again_and_again_ends_the_connection(self) -> None:
        self.connect(SSL.TLS1_2_VERSION)
        self.assertLess(self.send(self.client.renegotiation, 10_000), OWN_BYTES)
        self.assertTrue(self.transport.disconnected)

    def test_keys_that_are_changed_again_and_again_end_the_connection(self) -> None:
        self.connect(SSL.TLS1_3_VERSION)
        self.assertLess(self.send(self.client.key_update, 10_000), OWN_BYTES)
        self.assertTrue(self.transport.disconnected)

    def test_keys_may_be_changed_now_and_then(self) -> None:
        self.connect(SSL.TLS1_3_VERSION)
        self.assertGreater(self.send(self.client.key_update, 300), 300 * 20)
        waiting = self.send(lambda: self.client.record(23, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), 100)
        self.assertFalse(self.transport.disconnected)
        self.assertGreater(waiting, 100 * 200)


class ProtocolTests(SynchronousTestCase):
    """
    The site speaks only HTTP/1.1.
    """

    def setUp(self) -> None:
        """
        Set up a Twisted that could speak HTTP/2, and a server's files.
        """
        self.patch(http, "H2_ENABLED", True)
        self.files = Files(scratch(self))

    def negotiated(self, certificate: Any, *offer: bytes) -> bytes:
        """
        Return which protocol a client gets that offers these.
        """
        site: Any = RegistrySite(Resource(), MemoryReactorClock(), Crowd(Limits()))
        address: Any = None
        protocol = TLSMemoryBIOFactory(certificate, False, site, MemoryReactorClock()).buildProtocol(address)
        asker = client(offer=offer)
        shake_with(protocol, Tcp(), asker)
        return asker.get_alpn_proto_negotiated()

    def test_http_2_is_not_offered(self) -> None:
        """
        A client that prefers HTTP/2, or speaks nothing else, does not get it: blobs would be slower.
        """
        ours = Certificate(self.files.key, self.files.certificate)
        self.assertNotEqual(b"h2", self.negotiated(ours, b"h2", b"http/1.1"))
        self.assertEqual(b"", self.negotiated(ours, b"h2"))

    def test_http_2_is_not_offered_on_endpoints_of_ones_own(self) -> None:
        """
        With Twisted's own TLS, as for ssl: in PROXY_LISTEN, there is only HTTP/1.1, too.
        """
        pem = Path(self.files.key).read_bytes() + Path(self.files.certificate).read_bytes()
        twisteds = PrivateCertificate.loadPEM(pem).options()
        self.assertEqual(b"http/1.1", self.negotiated(twisteds, b"h2", b"http/1.1"))
