"""
Egress proxies, for machines that must not connect to the registry and its buckets themselves.

Rules:

- C{HTTPS_PROXY} and C{NO_PROXY} are read as botocore reads them for AWS's API; C{NO_PROXY} may also have networks,
  ports and C{*}, as for Go's programs. Only https goes through a proxy, by CONNECT: RFC 9110, 9.3.6.
- TLS is with the host behind the proxy, and its certificate is verified for that host's name.
- The proxy resolves that name. So a redirect must lead to a name that no resolver interprets as an address.
- The host's own resolver resolves the proxy's name, not the configured servers; no message contains its password.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IReactorPluggableNameResolver, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from ecrproxy.addresses import is_address
from ecrproxy.registry.proxy_variables import proxy_variable
from ecrproxy.registry.resolver import SharedLookups
from ecrproxy.registry.retries import TransientError
from ecrproxy.registry.unavailable import UnavailableError, describe

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol, IProtocolFactory, IReactorTime
    from twisted.web.client import URI
    from twisted.web.iweb import IPolicyForHTTPS

log = Logger()

CONNECT_SECONDS: Final = 10
"""Seconds for the proxy to accept a connection."""
TUNNEL_SECONDS: Final = 15.0
"""Seconds for it to then reach the host behind it."""
ANSWER_LIMIT: Final = 16 * 2**10
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: ([ -~]*))?\r?\n")
_END = re.compile(rb"\r?\n\r?\n")
_HTTPS: Final = 443
_CAS: Final = ssl.get_default_verify_paths()


@dataclass(frozen=True, slots=True)
class Proxy:
    """
    An egress proxy.

    @ivar secure: whether the connection to the proxy itself uses TLS.
    @ivar authorization: the value of Proxy-Authorization, if any.
    """

    host: str
    port: int
    secure: bool = False
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """
        Parse a proxy's URL, or its host and port.

        @raise ValueError: if it is invalid. The error does not repeat it: it may contain a password.
        """
        url = text.strip() if "://" in text else f"http://{text.strip()}"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("not the URL of a proxy; give one such as http://proxy.example:3128") from None
        if parts.scheme not in ("http", "https"):
            raise ValueError(f"a proxy of the kind {parts.scheme}: is not known; give http://HOST:PORT")
        if not host or re.search(r"[^\w.:-]", host) or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError(
                "not the URL of a proxy; give one such as http://proxy.example:3128, and escape special characters"
                " of a password, as %23 for #"
            )
        secure = parts.scheme == "https"
        return cls(host, port or (_HTTPS if secure else 80), secure, _authorization(parts.username, parts.password))

    def __str__(self) -> str:
        return _named(self.host, self.port)

    def question(self, host: str, port: int) -> bytes:
        """
        Return the request for a tunnel to a host.
        """
        target = _named(host, port)
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.authorization is not None:
            lines.append(f"Proxy-Authorization: {self.authorization}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _authorization(name: str | None, password: str | None) -> str | None:
    if name is None:
        return None
    return "Basic " + base64.b64encode(f"{unquote(name)}:{unquote(password or '')}".encode()).decode()


def _named(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class _Exempt:
    """
    An entry of C{NO_PROXY}.

    @ivar domain: matches itself and all names below it; empty to match everything.
    @ivar port: None for all.
    """

    domain: str = ""
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None

    def covers(self, host: str, port: int) -> bool:
        if self.port not in (None, port):
            return False
        if self.network is not None:
            return is_address(host) and ip_address(host) in self.network
        return not self.domain or host == self.domain or host.endswith(f".{self.domain}")


def _exempt(word: str) -> _Exempt | None:
    """
    Parse an entry: an address, a network or a name, optionally with C{.} or C{*.} before it and a port after it.
    """
    found = re.fullmatch(r"\[(?P<six>[^]]+)\](?::(?P<p>\d{1,5}))?|(?P<name>[^:]+):(?P<q>\d{1,5})", word)
    host = (found["six"] or found["name"]) if found else word
    port = int(found["p"] or found["q"] or 0) or None if found else None
    if host == "*":
        return _Exempt(port=port)
    try:
        return _Exempt(network=ip_network(host, strict=False), port=port)
    except ValueError:
        pass
    domain = host.removeprefix("*").lstrip(".")
    return _Exempt(domain, port=port) if domain else None


@dataclass(frozen=True, slots=True)
class Egress:
    """
    Which hosts are reached through which proxy, and the CAs for their certificates.

    @ivar proxy: None if there is none.
    @ivar authorities: OpenSSL's file of CAs.
    """

    proxy: Proxy | None = None
    exempt: Sequence[_Exempt] = ()
    authorities: str = _CAS.openssl_cafile

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Egress:
        """
        Read C{HTTPS_PROXY}, C{NO_PROXY} and C{SSL_CERT_FILE}. Lower-case names of proxy variables win, even if empty.

        @raise ValueError: if the proxy's URL is invalid.
        """
        text, authorities = (
            proxy_variable("https_proxy", environ),
            environ.get(_CAS.openssl_cafile_env, _CAS.openssl_cafile),
        )
        if not text.strip():
            return cls(authorities=authorities)
        words = proxy_variable("no_proxy", environ).lower().replace(",", " ").split()
        return cls(Proxy.parse(text), tuple(each for each in map(_exempt, words) if each is not None), authorities)

    def proxy_for(self, host: str, port: int) -> Proxy | None:
        """
        Return the proxy for https to a host; None to connect directly.
        """
        host = host.lower()
        if host == "localhost" or host.endswith(".localhost") or (is_address(host) and ip_address(host).is_loopback):
            return None
        return None if any(each.covers(host, port) for each in self.exempt) else self.proxy


def is_plain_name(host: str) -> bool:
    """
    Return True if no resolver interprets a host as an address, or as the machine that it runs on.

    The proxy decides about the addresses of other names. C{0x7f.1} and C{2130706433} are 127.0.0.1 to
    getaddrinfo(3); the last label of a name is never a number (URL standard, "ends in a number").
    """
    last = host.rstrip(".").rpartition(".")[2].lower()
    return bool(last) and last != "localhost" and not is_address(host) and not re.match(r"\d|0x", last)


@implementer(IReactorPluggableNameResolver)
class OwnNames:
    """
    A reactor that keeps its present name resolver, and the addresses that it has found.
    """

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        self._reactor, self.nameResolver = reactor, SharedLookups(reactor.nameResolver, reactor)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)


@implementer(IAgentEndpointFactory)
class Tunnels:
    """
    Connects through a proxy: for an agent that is used for https URLs only.

    @param reactor: resolves the proxy's own name.
    """

    def __init__(self, reactor: Any, proxy: Proxy, policy: IPolicyForHTTPS) -> None:  # noqa: ANN401
        self._reactor, self._proxy, self._policy = reactor, proxy, policy

    def endpointForURI(self, uri: URI) -> Any:  # noqa: ANN401
        """
        Create an endpoint for the host of a URL.
        """
        proxy = self._proxy
        through: Any = HostnameEndpoint(self._reactor, proxy.host, proxy.port, timeout=CONNECT_SECONDS)
        if proxy.secure:
            through = wrapClientTLS(self._policy.creatorForNetloc(proxy.host.encode(), proxy.port), through)
        tunnel = _Tunnel(through, proxy, (uri.host.decode("ascii"), uri.port), self._reactor)
        return wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), tunnel)


@implementer(IStreamClientEndpoint)
class _Tunnel:
    """
    An endpoint behind a proxy.

    @param through: connects to the proxy.
    """

    def __init__(self, through: Any, proxy: Proxy, target: tuple[str, int], clock: IReactorTime) -> None:  # noqa: ANN401
        self._through, self._proxy, self._target, self._clock = through, proxy, target, clock

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        Connect to the proxy, and have it connect to the target.

        Fails with L{UnavailableError}, or with L{TransientError} for a temporary failure.
        """
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        opening = _Opening(self._proxy, self._target, factory)
        try:
            await self._through.connect(Factory.forProtocol(lambda: opening))
        except Exception as problem:
            raise _down(f"egress proxy {self._proxy} can't be reached: {describe(problem)}") from problem
        limit = self._clock.callLater(TUNNEL_SECONDS, opening.late)
        try:
            return await opening.opened
        finally:
            if limit.active():
                limit.cancel()


class _Opening(Protocol):
    """
    A connection to a proxy that requests a tunnel, and then carries another protocol.

    @ivar opened: fires with that protocol.
    """

    def __init__(self, proxy: Proxy, target: tuple[str, int], factory: IProtocolFactory) -> None:
        self._proxy, self._target, self._factory = proxy, target, factory
        self.opened: Deferred[IProtocol] = Deferred(lambda _: self._transport.abortConnection())
        self._inner: Any = None
        self._answer = b""

    @property
    def _transport(self) -> Any:  # noqa: ANN401
        return self.transport

    def connectionMade(self) -> None:
        self._transport.write(self._proxy.question(*self._target))

    def dataReceived(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        self._answer += data
        end = _END.search(self._answer)
        if end is not None:
            self._judge(self._answer[: end.end()], self._answer[end.end() :])
        elif len(self._answer) > ANSWER_LIMIT:
            self._fail(UnavailableError(502, "UNAVAILABLE", f"egress proxy {self._proxy} speaks no HTTP"))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._inner is not None:
            self._inner.connectionLost(reason)
        else:
            self._fail(_down(f"egress proxy {self._proxy} closed the connection: {describe(reason.value)}"))

    def late(self) -> None:
        """
        End the connection: the proxy has not answered.
        """
        said = f"egress proxy {self._proxy} has not connected to {_named(*self._target)} for {TUNNEL_SECONDS:g} s"
        self._fail(_down(said, 504))

    def _judge(self, head: bytes, rest: bytes) -> None:
        problem = refusal(self._proxy, self._target, head)
        if problem is not None:
            log.error("{problem}", problem=problem.message, once=problem.message)
            self._fail(problem)
            return
        inner: Any = self._factory.buildProtocol(self._transport.getPeer())
        self._inner, self._answer = inner, b""
        inner.makeConnection(self._transport)
        self.opened.callback(inner)
        if rest:
            inner.dataReceived(rest)

    def _fail(self, problem: UnavailableError) -> None:
        if not self.opened.called:
            self._transport.abortConnection()
            self.opened.errback(problem)


def _down(said: str, status: int = 502) -> TransientError:
    return TransientError(status, "UNAVAILABLE", said)


def refusal(proxy: Proxy, target: tuple[str, int], head: bytes) -> UnavailableError | None:
    """
    Return why a proxy opens no tunnel; None if it does.

    @param head: its answer, without a body.
    @return: L{TransientError} for a temporary failure.
    """
    found = _STATUS.match(head)
    status = int(found[1]) if found else 0
    if 200 <= status < 300:  # noqa: PLR2004
        return None
    if status == 407:  # noqa: PLR2004
        wanted = "another name or password" if proxy.authorization else "a name and a password"
        said = f"egress proxy {proxy} asks for {wanted} (407): set them in HTTPS_PROXY"
        return UnavailableError(502, "UNAVAILABLE", said)
    words = f"{status} {(found[2] or b'').decode('ascii')[:100]}".rstrip() if found else "its answer is no HTTP"
    passes = status in (429, *range(500, 600))
    said = f"egress proxy {proxy} does not connect to {_named(*target)}: {words}"
    return (TransientError if passes else UnavailableError)(502, "UNAVAILABLE", said)
