"""
One connection, its certificate, and one request, with the results as plain values.

An untrusted certificate is fetched again without verification, to report its issuer. Nothing is sent over that second
connection.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID

from ecrproxy.healthcheck import Place, connect
from ecrproxy.registry.egress import ANSWER_LIMIT, Proxy, refusal

SECONDS: Final = 5.0
"""Timeout for a host, in seconds."""
BODY_BYTES: Final = 64 * 2**10
"""Maximum bytes of a response's body to read."""


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """
    A server's certificate.

    @ivar until: expiry, in seconds since the epoch.
    """

    issuer: str
    names: Sequence[str]
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Contact:
    """
    The result of a connection and a request.

    @ivar problem: why there is no response.
    @ivar distrust: OpenSSL's error number if the certificate is not trusted.
    @ivar shown: the certificate, if the TLS handshake got that far.
    @ivar status: of the response.
    @ivar headers: of the response, by lower-case names.
    """

    address: str
    problem: str = ""
    distrust: int = 0
    shown: ShownCertificate | None = None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def split(url: str) -> tuple[str, int, bool]:
    """
    Return the host and the port of a URL, and True for TLS.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    return parts.hostname or "", parts.port or (443 if secure else 80), secure


def touch(
    url: str,
    address: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    through: Proxy | None = None,
    context: ssl.SSLContext | None = None,
    seconds: float = SECONDS,
    most: int = BODY_BYTES,
) -> Contact:
    """
    Request C{url} from its host at C{address}, or through an egress proxy.
    """
    host, port, secure = split(url)
    shown = None
    try:
        with _connected(address, host, port, through, seconds) as plain:
            if not secure:
                return _ask(url, address, headers, method, plain, None, most)
            with (context or ssl.create_default_context()).wrap_socket(plain, server_hostname=host) as wrapped:
                shown = read_certificate(wrapped.getpeercert(binary_form=True))
                return _ask(url, address, headers, method, wrapped, shown, most)
    except ssl.SSLCertVerificationError as problem:
        shown = _shown_anyway(host, port, address, through, seconds)
        return Contact(address, problem.verify_message, problem.verify_code, shown)
    except (OSError, HTTPException) as problem:
        return Contact(address, _why(problem), shown=shown)


def touch_place(place: Place, path: str) -> Contact:
    """
    Request a path from the local daemon, with any certificate.
    """
    address = place.address if isinstance(place.address, str) else ":".join(map(str, place.address))
    try:
        with connect(place) as connected:
            return _ask(f"http://localhost{path}", address, {}, "GET", connected, None)
    except (OSError, HTTPException) as problem:
        return Contact(address, _why(problem))


def _ask(
    url: str,
    address: str,
    headers: Mapping[str, str],
    method: str,
    connected: socket.socket,
    shown: ShownCertificate | None,
    most: int = BODY_BYTES,
) -> Contact:
    parts = urlsplit(url)
    asking = HTTPConnection(parts.netloc)
    asking.sock = connected
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        asking.request(method, target, headers={**headers, "Accept-Encoding": "identity", "Connection": "close"})
        response = asking.getresponse()
        heard = by_name(response.getheaders())
        return Contact(address, shown=shown, status=response.status, headers=heard, body=response.read(most))
    finally:
        asking.close()


def by_name(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """
    Return headers by lower-case names. Challenges may be in several, which mean the same as one: RFC 9110, 5.2.
    """
    heard: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        heard[key] = f"{heard[key]}, {value}" if key == "www-authenticate" and key in heard else value
    return heard


def _why(problem: Exception) -> str:
    """
    Return the reason, without what was sent.
    """
    if isinstance(problem, TimeoutError):
        return "it does not answer"
    if isinstance(problem, ssl.SSLError):
        return f"no TLS: {problem.reason or type(problem).__name__}"
    if isinstance(problem, OSError):
        return problem.strerror or type(problem).__name__
    return f"no HTTP: {type(problem).__name__}"


def _connected(address: str, host: str, port: int, through: Proxy | None, seconds: float) -> socket.socket:
    """
    Connect.

    @raise OSError: if the connection fails, or the egress proxy refuses it.
    """
    if through is None:
        return socket.create_connection((address, port), seconds)
    connected = socket.create_connection((through.host, through.port), seconds)
    try:
        if through.secure:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=through.host)
        connected.sendall(through.question(host, port))
        _await_tunnel(connected, through, (host, port))
    except BaseException:
        connected.close()
        raise
    return connected


def _await_tunnel(connected: socket.socket, through: Proxy, target: tuple[str, int]) -> None:
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):  # (byte by byte, because what follows is for TLS)
        byte = connected.recv(1)
        if not byte or len(answer) > ANSWER_LIMIT:
            raise OSError(0, f"the egress proxy {through} gives no answer")
        answer += byte
    if (problem := refusal(through, target, answer)) is not None:
        raise OSError(0, problem.message)


def _shown_anyway(host: str, port: int, address: str, through: Proxy | None, seconds: float) -> ShownCertificate | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        contextlib.suppress(OSError),
        _connected(address, host, port, through, seconds) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return read_certificate(secure.getpeercert(binary_form=True))
    return None


def read_certificate(der: bytes | None) -> ShownCertificate | None:
    """
    Parse a certificate; None if it is missing or invalid.
    """
    if der is None:
        return None
    try:
        return describe(x509.load_der_x509_certificate(der))
    except ValueError:
        return None


def describe(certificate: x509.Certificate) -> ShownCertificate:
    """
    Return issuer, names and expiry of a certificate.

    @raise ValueError: if it is invalid.
    """
    issuer = certificate.issuer
    for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        if found := issuer.get_attributes_for_oid(kind):
            named = str(found[0].value)
            break
    else:
        named = issuer.rfc4514_string()
    names: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        value = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(each.value) for each in value]
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return ShownCertificate(named, names, _seconds(since), _seconds(until))


def _seconds(moment: dt.datetime) -> float:
    return moment.timestamp()
