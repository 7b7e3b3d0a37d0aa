"""
TLS for servers: one certificate with its chain, TLS 1.2 and 1.3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.logger import Logger
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOFactory
from zope.interface import implementer

from ecrproxy.addresses import unmapped
from ecrproxy.files import Files, open_file, unread

if TYPE_CHECKING:
    from twisted.protocols.tls import TLSMemoryBIOProtocol

log = Logger()

OWN_BYTES: Final = 2**14
"""
Maximum bytes that TLS itself may send on a connection after the handshake: enough for hundreds of key updates. Clients
update keys after gigabytes.
"""

_MODE_ENABLE_PARTIAL_WRITE: Final = 1
"""OpenSSL's ssl.h."""

# Mozilla's "intermediate" set for TLS 1.2; all cipher suites of TLS 1.3 are good.
_CIPHERS = (
    b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    b"ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)


class CertificateError(Exception):
    """
    A key and certificate can't be used; says which file, and why.

    @ivar what: C{key}, C{certificate}, C{pair} or C{authorities}.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(why)
        self.what, self.why = what, why


@dataclass(frozen=True, slots=True)
class Loaded:
    """
    The result of reading files.

    @ivar seen: the files' signatures before they were read, so that changes during the read are noticed.
    @ivar outcome: the context for new connections, or the error.
    """

    seen: Sequence[tuple[int, ...]]
    outcome: SSL.Context | Exception


@implementer(IOpenSSLServerConnectionCreator)
class ServerTLS:
    """
    A TLS server whose files can be reloaded: L{load} reads them and blocks, L{use} applies them.

    @param paths: the files.
    @param make: makes an OpenSSL context from them; its exceptions are passed on.
    @ivar files: tracks changes of the files since they were read.
    @ivar expires: when the certificate expires, in seconds since the epoch.
    """

    def __init__(self, paths: Iterable[str | None], make: Callable[[], SSL.Context]) -> None:
        self.files, self._make = Files(paths), make
        self.use(self.load())

    def load(self) -> Loaded:
        """
        Read the files. Blocks, and changes nothing.
        """
        seen = self.files.seen()
        try:
            return Loaded(seen, self._make())
        except Exception as problem:  # noqa: BLE001 (raised by use())
            return Loaded(seen, problem)

    def use(self, loaded: Loaded) -> None:
        """
        Use loaded files for new connections. Raises and changes nothing if they are invalid.
        """
        self.files.note(loaded.seen)
        if isinstance(loaded.outcome, Exception):
            raise loaded.outcome
        self._context, self.expires = loaded.outcome, _expires(loaded.outcome)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:  # noqa: ARG002
        """
        Return the OpenSSL connection for a new client.
        """
        return SSL.Connection(self._context, None)


class Certificate(ServerTLS):
    """
    TLS with the key and certificate in two PEM files.

    @param authorities_path: PEM file of CAs to verify client certificates against. Connections without a certificate
        are accepted; the site that answers requests decides.
    @raise CertificateError: if the files can't be read, or don't belong together.
    """

    def __init__(self, key_path: str, certificate_path: str, authorities_path: str | None = None) -> None:
        paths = key_path, certificate_path, authorities_path
        super().__init__(paths, partial(server_context, *paths))


def server_context(key_path: str, certificate_path: str, authorities_path: str | None = None) -> SSL.Context:
    """
    Make an OpenSSL context from PEM files, as for L{Certificate}.

    @raise CertificateError: if the files can't be read, or don't belong together.
    """
    context = _context(key_path, certificate_path)
    if authorities_path is not None:
        _ask_for_certificates(context, authorities_path)
    return context


def _context(key_path: str, certificate_path: str) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(_CIPHERS)
    context.set_options(SSL.OP_NO_COMPRESSION)
    # Idle connections hold no buffers.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    # Encrypt a whole piece with one call. (pyOpenSSL otherwise makes one for each record.)
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)
    try:
        open_file(certificate_path).close()  # OpenSSL's error does not say why a file can't be read
        context.use_certificate_chain_file(certificate_path)
    except OSError as problem:
        raise CertificateError("certificate", unread(problem)) from None
    except SSL.Error:
        raise CertificateError("certificate", "holds no PEM certificate") from None
    try:
        context.use_privatekey(_key(key_path))
        context.check_privatekey()
    except SSL.Error:
        raise CertificateError("pair", "the key is not the certificate's") from None
    return context


def _expires(context: SSL.Context) -> float:
    """
    Return when the certificate of C{context} expires.
    """
    served = SSL.Connection(context, None).get_certificate()
    return served.to_cryptography().not_valid_after_utc.timestamp() if served is not None else 0.0


def _ask_for_certificates(context: SSL.Context, path: str) -> None:
    try:
        open_file(path).close()
        context.load_verify_locations(path)
        context.load_client_ca(os.fsencode(path))
    except OSError as problem:
        raise CertificateError("authorities", unread(problem)) from None
    except SSL.Error:
        raise CertificateError("authorities", "holds no PEM certificate") from None
    context.set_verify(SSL.VERIFY_PEER)
    # A resumed session would skip the check of the certificate's dates.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)


def _key(path: str) -> Any:  # noqa: ANN401 (one of several kinds)
    try:
        with open_file(path) as file:
            return load_pem_private_key(file.read(), None)
    except OSError as problem:
        raise CertificateError("key", unread(problem)) from None
    except TypeError:
        raise CertificateError("key", "is behind a passphrase; give it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError("key", "holds no PEM key") from None


class Secured(BufferingTLSTransport):
    """
    TLS on one connection. A plain HTTP client is passed to the channel, which sends an error.

    OpenSSL responds to every renegotiation and key update, even if the client reads none of the responses. The channel
    can't see or stop that, so each connection may send at most L{OWN_BYTES} of them.
    """

    transport: Any
    _fresh, _plain = True, False
    _sends = False
    _own = 0

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        fresh, self._fresh = self._fresh, False
        if fresh and data[:1].isalpha():  # TLS records begin with a byte below 32, HTTP requests with the method
            refuse_plain = getattr(self.wrappedProtocol, "refuse_plain", None)
            if refuse_plain is not None:
                self._plain = True
                refuse_plain(self.transport)
        if not self._plain:
            super().dataReceived(data)  # type: ignore[no-untyped-call]

    def _write(self, octets: bytes) -> None:
        self._sends = True
        try:
            super()._write(octets)  # type: ignore[no-untyped-call]
        finally:
            self._sends = False

    def _flushSendBIO(self) -> None:
        """
        Send OpenSSL's output; count it if it is neither of the handshake nor application data.
        """
        if self._sends or not self._handshakeDone:
            super()._flushSendBIO()  # type: ignore[no-untyped-call]
            return
        try:
            said = self._tlsConnection.bio_read(OWN_BYTES)
        except SSL.WantReadError:
            return
        self._own += len(said)
        if self._own < OWN_BYTES:
            self.transport.write(said)
        elif not self._aborted:
            client = unmapped(str(getattr(self.getPeer(), "host", "")))  # type: ignore[no-untyped-call]
            log.info("{client} was disconnected: too many TLS key changes", client=client, once=client)
            self.abortConnection()  # type: ignore[no-untyped-call]


class SecuredFactory(TLSMemoryBIOFactory):
    """
    Wraps a factory in TLS.
    """

    protocol = Secured

    def __init__(self, tls: ServerTLS, wrapped: Any, clock: Any = None) -> None:  # noqa: ANN401
        super().__init__(tls, isClient=False, wrappedFactory=wrapped, clock=clock)
