"""
One address connected to, its certificate looked at, one request made: what came of it, as plain values.

A certificate that is not trusted is looked at once more without trust, so that it can be said whose it is. Nothing is
sent over that second connection.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID

from ecrproxy.healthcheck import Place, connect
from ecrproxy.registry.egress import ANSWER_LIMIT, Proxy, refusal

SECONDS: Final = 5.0
"""How long a host may be silent."""
BODY_BYTES: Final = 64 * 2**10
"""How many bytes of an answer's body are read."""


@dataclass(frozen=True, slots=True)
class Shown:
    """
    The certificate that a server shows.

    @ivar until: seconds since the epoch.
    """

    issuer: str
    names: Sequence[str]
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Contact:
    """
    What came of connecting, and of asking.

    @ivar problem: why there is no answer.
    @ivar distrust: OpenSSL's number for why the certificate is not trusted.
    @ivar shown: the certificate, where TLS came so far.
    @ivar status: of the answer.
    @ivar headers: of the answer, by lower-case names.
    """

    address: str
    problem: str = ""
    distrust: int = 0
    shown: Shown | None = None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def split(url: str) -> tuple[str, int, bool]:
    """
    Give the host and the port of a URL, and whether TLS is spoken there.
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
    Connect to C{address} as to the host of C{url}, or have an egress proxy connect to that host, and ask for it.
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
    Ask the daemon beside us, whosever certificate it shows.
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
    shown: Shown | None,
    most: int = BODY_BYTES,
) -> Contact:
    parts = urlsplit(url)
    asking = HTTPConnection(parts.netloc)
    asking.sock = connected
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        asking.request(method, target, headers={**headers, "Accept-Encoding": "identity", "Connection": "close"})
        response = asking.getresponse()
        lowered = {name.lower(): value for name, value in response.getheaders()}
        return Contact(address, shown=shown, status=response.status, headers=lowered, body=response.read(most))
    finally:
        asking.close()


def _why(problem: Exception) -> str:
    """
    Say why, without what was sent.
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

    @raise OSError: if nobody answers, or the proxy does not connect.
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
    while not answer.endswith(b"\r\n\r\n"):  # (a byte at a time: what follows is not ours to read)
        byte = connected.recv(1)
        if not byte or len(answer) > ANSWER_LIMIT:
            raise OSError(0, f"the egress proxy {through} gives no answer")
        answer += byte
    if (problem := refusal(through, target, answer)) is not None:
        raise OSError(0, problem.message)


def _shown_anyway(host: str, port: int, address: str, through: Proxy | None, seconds: float) -> Shown | None:
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


def read_certificate(der: bytes | None) -> Shown | None:
    """
    Read what matters of a certificate.
    """
    if der is None:
        return None
    try:
        return describe(x509.load_der_x509_certificate(der))
    except ValueError:
        return None


def describe(certificate: x509.Certificate) -> Shown:
    """
    Tell who has signed a certificate, for which names, and for how long.

    @raise ValueError: if it can't be read.
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
    return Shown(named, names, _seconds(since), _seconds(until))


def _seconds(moment: dt.datetime) -> float:
    return moment.timestamp()
