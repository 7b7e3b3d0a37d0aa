"""
What the daemon listens on: made from the settings, and bound before anything else begins.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from OpenSSL import SSL, crypto
from twisted.application.internet import StreamServerEndpointService
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.tcp import Port
from twisted.logger import Logger

from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.balanced import WAITING, BalancedFactory
from ecrproxy.daemon.inherited import BACKLOG, Inherited
from ecrproxy.daemon.process import most_clients
from ecrproxy.daemon.tls import CertificateError, Loaded, SecuredFactory, ServerTLS, server_context
from ecrproxy.endpoint_string import SYSTEMD, EndpointString
from ecrproxy.files import require_regular, unread
from ecrproxy.settings.config import ADMIN_LISTEN, Config, ConfigError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort

log = Logger()


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
        endpoint: Any,  # noqa: ANN401
        site: Any,  # noqa: ANN401
        *,
        accepts: bool = True,
        needed: bool = True,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(endpoint, site)
        self._name, self._accepts, self._needed, self._gate = name, accepts, needed, gate
        self._tls = endpoint.tls if isinstance(endpoint, LayeredEndpoint) else None
        self._port: Any = None

    def fileno(self) -> int:
        """
        Hand out the socket.
        """
        number: int = self._port.fileno()
        return number

    def load(self) -> Loaded | None:
        """
        Read key and certificate again; None without TLS. Blocks, and changes nothing.
        """
        return self._tls.load() if self._tls is not None else None

    def use(self, loaded: Loaded | None) -> bool:
        """
        Use what was read for new connections; what can't be used changes nothing.

        @return: whether there is something new.
        """
        if self._tls is None or loaded is None:
            return False
        try:
            self._tls.use(loaded)
        except ConfigError as problem:
            log.error("{problem}; what was read before stays in use", problem=problem)
            return False
        log.info("{name}: key and certificate were read again", name=self._name)
        return True

    def changed(self) -> bool:
        """
        Return True if key or certificate have other files than were read. Blocks.
        """
        return self._tls is not None and self._tls.files.changed()

    @property
    def expires(self) -> float | None:
        """
        Return when the certificate that is served ends, in seconds since the epoch; None without TLS.
        """
        return self._tls.expires if self._tls is not None else None

    def _bound(self, port: Any) -> Any:  # noqa: ANN401
        self._port = port
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
        except OverflowError as problem:
            raise ConfigError(f"{self._name}: can't listen there: give a port from 0 to 65535") from problem
        except (ValueError, LookupError) as problem:
            raise ConfigError(f"{self._name}: can't listen there: it is no address") from problem

    def _refused(self, problem: object) -> None:
        why = getattr(problem, "strerror", None) or problem
        said = f"{self._name}: can't listen there: {why}; give another, or end what uses it"
        if self._needed:
            raise ConfigError(said)
        log.warn("{said}", said=said)


class LayeredEndpoint:
    """
    A socket with what is spoken on its connections before HTTP.

    A balancer sends its PROXY header before all else: TLS is between the client and this server, the balancer may only
    pass it on (proxy-protocol.txt, section 2; AWS's NLB, HAProxy and nginx alike).

    @param header: wraps a factory in one that takes PROXY headers.
    @ivar tls: None for plain connections.
    """

    def __init__(self, bound: Any, tls: ServerTLS | None, header: Callable[[Any], Any] | None = None) -> None:  # noqa: ANN401
        self._bound, self.tls, self._header = bound, tls, header

    def listen(self, protocolFactory: Any) -> Deferred[IListeningPort]:  # noqa: ANN401
        """
        Listen.
        """
        factory = SecuredFactory(self.tls, protocolFactory) if self.tls is not None else protocolFactory
        listening: Deferred[IListeningPort] = self._bound.listen(self._header(factory) if self._header else factory)
        return listening


def endpoints(config: Config, reactor: Any) -> list[tuple[str, LayeredEndpoint]]:  # noqa: ANN401
    """
    Make what the settings say to listen on, each with the name that the operator knows it by.

    @raise ConfigError: if one can't be.
    """
    if config.listen:
        return [
            (f"PROXY_LISTEN={each.text!r}", _described(each, "PROXY_LISTEN", config, reactor)) for each in config.listen
        ]
    every = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 (a proxy for other machines)
    kind = TCP6ServerEndpoint if every == "::" else TCP4ServerEndpoint
    bound = kind(reactor, config.port, backlog=BACKLOG, interface=every)
    return [(f"PROXY_PORT={config.port}", LayeredEndpoint(bound, _own_tls(config)))]


def operators_endpoint(
    variable: str,
    described: EndpointString | None,
    reactor: Any,  # noqa: ANN401
) -> tuple[str, LayeredEndpoint] | None:
    """
    Make what the operator's pages, or the metrics, are on, if they are to be had.

    @param variable: the setting that says where.
    @raise ConfigError: if it can't be.
    """
    if described is None:
        return None
    return f"{variable}={described.text!r}", _described(described, variable, None, reactor)


def _described(described: EndpointString, variable: str, config: Config | None, reactor: Any) -> LayeredEndpoint:  # noqa: ANN401
    """
    Make what a string says.

    @param config: has the TLS of systemd's sockets, whose strings do not say whether it is spoken there.
    """
    tls = None
    if described.secure:
        tls = ServerTLS(described.files(), partial(_context_of, described, variable, reactor))
    elif described.kind == SYSTEMD and config is not None:
        tls = _own_tls(config)
    if described.kind == SYSTEMD and isinstance(reactor, Inherited):
        bound: Any = reactor  # systemd handed its sockets to the parent alone
    else:
        with _as_setting(described, variable):
            bound = serverFromString(reactor, described.socket().to_twisted(backlog=str(BACKLOG)))
    return LayeredEndpoint(bound, tls, partial(_taking_headers, reactor) if described.balanced else None)


def _taking_headers(reactor: Any, wrapped: Any) -> BalancedFactory:  # noqa: ANN401
    return BalancedFactory(wrapped, reactor, min(WAITING, max(1, most_clients() // 4)))


def _context_of(described: EndpointString, variable: str, reactor: Any) -> SSL.Context:  # noqa: ANN401
    """
    Read the files that an C{ssl:} or C{tls:} string names, as Twisted does.
    """
    with _as_setting(described, variable):
        for path in described.files():
            for each in _pems(path):
                require_regular(each)  # Twisted opens whatever it is
        endpoint: Any = serverFromString(reactor, described.to_twisted())
        if described.kind == "tls":
            made = endpoint.connectionCreator.defaultContext
        else:
            made = endpoint._sslContextFactory.getContext()  # noqa: SLF001 (there is no public way)
        return cast("SSL.Context", made)


def _pems(path: str) -> list[str]:
    """
    List the files that Twisted reads for a path, which may be a directory's.
    """
    if not Path(path).is_dir():
        return [path]
    return [str(each) for each in Path(path).iterdir() if each.name.lower().endswith(".pem")]


@contextlib.contextmanager
def _as_setting(described: EndpointString, variable: str) -> Iterator[None]:
    """
    Tell of a string that Twisted can't make anything of, or of files that it can't use, as of the setting.
    """
    try:
        yield
    except Exception as problem:
        why = _what_is_wrong(problem)
        example = ADMIN_LISTEN if variable == "PROXY_ADMIN_LISTEN" else "tcp:5000"
        raise ConfigError(
            f"{variable}={described.text!r}: {why}; give an endpoint string such as {example}"
        ) from problem


def _what_is_wrong(problem: Exception) -> str:
    """
    Say why Twisted takes no endpoint of a string: its own words, and Python's, are about its code.
    """
    match problem:
        case OSError():
            return f"{problem.filename or 'its certificate'} {unread(problem)}"
        case SSL.Error() | crypto.Error():
            return "its key and certificate can't be used"
        case LookupError():
            return "systemd has handed over no such socket"
    return "a part of it is missing, unknown or no number"


def _own_tls(config: Config) -> ServerTLS | None:
    """
    Make the TLS of C{PROXY_SSL_KEY} and C{PROXY_SSL_CERTIFICATE}, if they are set.
    """
    key, certificate, authorities = config.ssl_key, config.ssl_certificate, config.client_ca
    if key is None or certificate is None:
        return None

    def make() -> SSL.Context:
        with _as_settings(key, certificate, authorities):
            return server_context(key, certificate, authorities)

    return ServerTLS((key, certificate, authorities), make)


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
