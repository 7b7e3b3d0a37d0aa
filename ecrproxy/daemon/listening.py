"""
What the daemon listens on: made from the settings, and bound before anything else begins.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import SSL4ServerEndpoint, TCP4ServerEndpoint, TCP6ServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IOpenSSLContextFactory
from twisted.internet.tcp import Port
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.balanced import WAITING, BalancedEndpoint
from ecrproxy.daemon.inherited import BACKLOG, Inherited
from ecrproxy.daemon.process import most_clients
from ecrproxy.daemon.renewal import Files
from ecrproxy.daemon.tls import Certificate, CertificateError, answer_plain_http
from ecrproxy.settings.config import ADMIN_LISTEN, FROM_SYSTEMD, Config, ConfigError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint

log = Logger()

_NAMED_FILE: Final = re.compile(r":(?:privateKey|certKey|extraCertChain)=((?:\\.|[^:\\])*)")

BEHIND_BALANCER: Final = "haproxy:"
"""How an endpoint string begins whose connections bring a PROXY header."""
_BACKLOG: Final = re.compile(r"(?<!\\):backlog=")


class Listening(StreamServerEndpointService):
    """
    Listens from the start, or there is no start.

    @param name: what the operator knows the endpoint by.
    @param accepts: whether this process accepts connections; if not, its workers do, with the same socket.
    @param needed: whether the daemon can't do without it.
    @param gate: pauses it while there is no descriptor for a connection.
    """

    _raiseSynchronously = True

    def __init__(
        self,
        name: str,
        endpoint: IStreamServerEndpoint,
        site: Any,  # noqa: ANN401
        *,
        accepts: bool = True,
        needed: bool = True,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(endpoint, site)
        self._name, self._accepts, self._needed, self._gate = name, accepts, needed, gate
        self._port: Any = None

    def fileno(self) -> int:
        """
        Hand out the socket.
        """
        number: int = self._port.fileno()
        return number

    def reread(self) -> bool:
        """
        Read key and certificate again, for new connections; what can't be used changes nothing.

        @return: whether there is something new.
        """
        if not isinstance(self.endpoint, SecureEndpoint | DescribedSecureEndpoint):
            return False
        try:
            self.endpoint.reread()
        except ConfigError as problem:
            log.error("{problem}; what was read before stays in use", problem=problem)
            return False
        log.info("{name}: key and certificate were read again", name=self._name)
        return True

    def seen(self) -> Sequence[object]:
        """
        Describe the files of key and certificate as they are now. Blocks.
        """
        return self.endpoint.files.seen() if isinstance(self.endpoint, SecureEndpoint | DescribedSecureEndpoint) else ()

    def changed(self) -> bool:
        """
        Return True if key or certificate have other files than were read. Blocks.
        """
        return isinstance(self.endpoint, SecureEndpoint | DescribedSecureEndpoint) and self.endpoint.files.changed()

    @property
    def expires(self) -> float | None:
        """
        Return when the certificate of C{PROXY_SSL_CERTIFICATE} ends, in seconds since the epoch.
        """
        return self.endpoint.expires if isinstance(self.endpoint, SecureEndpoint) else None

    def _bound(self, port: Any) -> Any:  # noqa: ANN401
        self._port = port
        answer_plain_http(getattr(port, "factory", None))
        if not self._accepts:
            port.stopReading()
        elif self._gate is not None and isinstance(port, Port):
            self._gate.guard(port)
        return port

    def privilegedStartService(self) -> None:  # noqa: D102
        try:
            super().privilegedStartService()
            cast("Deferred[Any]", self._waitingForPort).addCallback(self._bound)
        except CannotListenError as problem:
            self._refused(problem.socketError)
        except OSError as problem:  # two that bind at the same moment learn of each other when they listen
            self._refused(problem)
        except (ValueError, LookupError) as problem:
            raise ConfigError(f"{self._name}: can't listen there: {problem}") from problem

    def _refused(self, problem: object) -> None:
        why = getattr(problem, "strerror", None) or problem
        said = f"{self._name}: can't listen there: {why}; give another, or end what uses it"
        if self._needed:
            raise ConfigError(said)
        log.warn("{said}", said=said)


class SecureEndpoint:
    """
    TLS on top of another endpoint.
    """

    def __init__(self, endpoint: Any, key: str, certificate: str, authorities: str | None) -> None:  # noqa: ANN401
        self._endpoint, self._paths = endpoint, (key, certificate, authorities)
        self.files = Files(self._paths)
        with _as_settings(*self._paths):
            self._certificate = Certificate(*self._paths)

    def reread(self) -> None:
        """
        Read the files again.

        @raise ConfigError: if they can't be used.
        """
        self.files.note()
        with _as_settings(*self._paths):
            self._certificate.reload()

    @property
    def expires(self) -> float:
        """
        Return when the certificate ends, in seconds since the epoch.
        """
        return self._certificate.expires

    def listen(self, protocolFactory: Any) -> Deferred[IListeningPort]:  # noqa: ANN401
        """
        Listen, and speak TLS.
        """
        listening: Deferred[IListeningPort] = self._endpoint.listen(
            TLSMemoryBIOFactory(self._certificate, isClient=False, wrappedFactory=protocolFactory)
        )
        return listening


@implementer(IOpenSSLContextFactory)
class DescribedSecureEndpoint:
    """
    The endpoint of an C{ssl:} string. Twisted reads its files once; they are read again by describing it once more.
    """

    def __init__(self, describe: Callable[[], Any], paths: Iterable[str] = ()) -> None:
        self._describe = describe
        self.files = Files(paths)
        self._endpoint = describe()
        self._contexts = self._endpoint._sslContextFactory  # noqa: SLF001 (there is no public way)
        self._endpoint._sslContextFactory = self  # noqa: SLF001

    def getContext(self) -> Any:  # noqa: ANN401
        """
        Give what a new connection is to be made with.
        """
        return self._contexts.getContext()

    def listen(self, protocolFactory: Any) -> Deferred[IListeningPort]:  # noqa: ANN401
        """
        Listen, and speak TLS.
        """
        listening: Deferred[IListeningPort] = self._endpoint.listen(protocolFactory)
        return listening

    def reread(self) -> None:
        """
        Read the files again.

        @raise ConfigError: if they can't be used.
        """
        self.files.note()
        self._contexts = self._describe()._sslContextFactory  # noqa: SLF001


def endpoints(config: Config, reactor: Any) -> list[tuple[str, Any]]:  # noqa: ANN401
    """
    Make what the settings say to listen on, each with the name that the operator knows it by.

    @raise ConfigError: if one can't be.
    """
    if config.listen:
        return [(f"PROXY_LISTEN={text!r}", _chosen(text, config, reactor)) for text in config.listen]
    every = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 (a proxy for other machines)
    kind = TCP6ServerEndpoint if every == "::" else TCP4ServerEndpoint
    endpoint = _secured(kind(reactor, config.port, backlog=BACKLOG, interface=every), config)
    return [(f"PROXY_PORT={config.port}", endpoint)]


def _chosen(text: str, config: Config, reactor: Any) -> Any:  # noqa: ANN401
    """
    Make what a string says. Of a socket that systemd has bound it does not say whether TLS is spoken there.
    """
    endpoint = _described(text, reactor)
    return _secured(endpoint, config) if text.startswith(FROM_SYSTEMD) else endpoint


def _secured(endpoint: Any, config: Config) -> Any:  # noqa: ANN401
    if config.ssl_key is None or config.ssl_certificate is None:
        return endpoint
    return SecureEndpoint(endpoint, config.ssl_key, config.ssl_certificate, config.client_ca)


def admin_endpoint(config: Config, reactor: Any) -> tuple[str, Any] | None:  # noqa: ANN401
    """
    Make what the operator's pages are on, if they are to be had.

    @raise ConfigError: if it can't be.
    """
    text = config.admin_listen
    return (f"PROXY_ADMIN_LISTEN={text!r}", _described(text, reactor, "PROXY_ADMIN_LISTEN")) if text else None


def _described(text: str, reactor: Any, variable: str = "PROXY_LISTEN") -> Any:  # noqa: ANN401
    if isinstance(reactor, Inherited) and text.startswith(FROM_SYSTEMD):
        return reactor  # systemd handed its sockets to the parent alone
    describe = partial(_from_string, text, reactor, variable)
    return DescribedSecureEndpoint(describe, _files_of(text)) if text.startswith("ssl:") else describe()


def _files_of(text: str) -> list[str]:
    """
    List the files that an C{ssl:} string names.
    """
    return [re.sub(r"\\(.)", r"\1", path) for path in _NAMED_FILE.findall(text)]


def _from_string(text: str, reactor: Any, variable: str) -> Any:  # noqa: ANN401
    if text.startswith(BEHIND_BALANCER):
        inner = _from_string(text.removeprefix(BEHIND_BALANCER), reactor, variable)
        return BalancedEndpoint(inner, reactor, min(WAITING, max(1, most_clients() // 4)))
    try:
        endpoint: Any = serverFromString(reactor, _queued(text))
        if isinstance(endpoint, SSL4ServerEndpoint):
            endpoint._sslContextFactory.getContext()  # noqa: SLF001 (a pair that can't be used shows only here)
    except Exception as problem:
        why = str(problem) or type(problem).__name__
        example = ADMIN_LISTEN if variable == "PROXY_ADMIN_LISTEN" else "tcp:5000"
        raise ConfigError(f"{variable}={text!r}: {why}; give an endpoint string such as {example}") from problem
    return endpoint


def _queued(text: str) -> str:
    """
    Give an endpoint string that says nothing of its backlog the daemon's own: Twisted's holds 50 connections.
    """
    described = text.startswith(("tcp:", "tcp6:", "ssl:", "unix:")) and not _BACKLOG.search(text)
    return f"{text}:backlog={BACKLOG}" if described else text


@contextlib.contextmanager
def _as_settings(key: str, certificate: str, authorities: str | None) -> Iterator[None]:
    """
    Tell of a certificate that can't be used as of the settings that named it.
    """
    try:
        yield
    except CertificateError as problem:
        if problem.what == "authorities":
            what = f"PROXY_CLIENT_CA={authorities!r}"
            raise ConfigError(f"{what}: {problem.why}; give a PEM file of your clients' CAs") from problem
        blamed = {"key": f"PROXY_SSL_KEY={key!r}", "certificate": f"PROXY_SSL_CERTIFICATE={certificate!r}"}
        both = f"PROXY_SSL_KEY={key!r}, PROXY_SSL_CERTIFICATE={certificate!r}"
        raise ConfigError(
            f"{blamed.get(problem.what, both)}: {problem.why}; give PEM files that belong together"
        ) from problem
