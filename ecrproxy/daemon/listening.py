"""
Listening sockets: created from the settings, and bound before anything else starts.
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
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import ADMIN_LISTEN, ConfigError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort

log = Logger()


class Listening(StreamServerEndpointService):
    """
    Binds its endpoint at startup; startup fails if that fails.

    @param name: the endpoint's name for the operator.
    @param accepts: True if this process accepts connections; otherwise its workers do, with the same socket.
    @param needed: True if the daemon can't run without the endpoint.
    @param gate: pauses the endpoint while there are no descriptors.
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
        Return the socket's descriptor.
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
        Use loaded files for new connections. If they are invalid, nothing changes.

        @return: True if they are used.
        """
        if self._tls is None or loaded is None:
            return False
        try:
            self._tls.use(loaded)
        except ConfigError as problem:
            log.error("{problem}; the previous key and certificate stay in use", problem=problem)
            return False
        log.info("{name}: key and certificate were read again", name=self._name)
        return True

    def changed(self) -> bool:
        """
        Return True if the files of key or certificate have changed since they were read. Blocks.
        """
        return self._tls is not None and self._tls.files.changed()

    @property
    def expires(self) -> float | None:
        """
        Return when the served certificate expires, in seconds since the epoch; None without TLS.
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
        except OSError as problem:  # if two processes bind at the same moment, listen(2) fails
            self._refused(problem)
        except OverflowError as problem:
            raise ConfigError(f"{self._name}: can't listen there: give a port from 0 to 65535") from problem
        except (ValueError, LookupError) as problem:
            raise ConfigError(f"{self._name}: can't listen there: not an address") from problem

    def _refused(self, problem: object) -> None:
        why = getattr(problem, "strerror", None) or problem
        said = f"{self._name}: can't listen there: {why}; give another, or stop what uses it"
        if self._needed:
            raise ConfigError(said)
        log.warn("{said}", said=said)


class LayeredEndpoint:
    """
    A socket with the protocols below HTTP.

    A balancer's PROXY header comes before everything else: TLS is between the client and this server, and the balancer
    may only pass it on (proxy-protocol.txt, section 2; likewise AWS's NLB, HAProxy and nginx).

    @param header: wraps a factory in one that parses PROXY headers.
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
    Make the endpoints that the settings describe, each with its name for the operator.

    @raise ConfigError: if one is invalid.
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
    Make the endpoint of the admin or metrics port; None if it is off.

    @param variable: the setting that describes the endpoint.
    @raise ConfigError: if it is invalid.
    """
    if described is None:
        return None
    return f"{variable}={described.text!r}", _described(described, variable, None, reactor)


def _described(described: EndpointString, variable: str, config: Config | None, reactor: Any) -> LayeredEndpoint:  # noqa: ANN401
    """
    Make the endpoint that a string describes.

    @param config: provides TLS for systemd's sockets, whose strings do not say whether to use it.
    """
    tls = None
    if described.secure:
        tls = ServerTLS(described.files(), partial(_context_of, described, variable, reactor))
    elif described.kind == SYSTEMD and config is not None:
        tls = _own_tls(config)
    if described.kind == SYSTEMD and isinstance(reactor, Inherited):
        bound: Any = reactor  # systemd passed its sockets to the parent only
    else:
        with _as_setting(described, variable):
            bound = serverFromString(reactor, described.socket().to_twisted(backlog=str(BACKLOG)))
    return LayeredEndpoint(bound, tls, partial(_taking_headers, reactor) if described.balanced else None)


def _taking_headers(reactor: Any, wrapped: Any) -> BalancedFactory:  # noqa: ANN401
    return BalancedFactory(wrapped, reactor, min(WAITING, max(1, most_clients() // 4)))


def _context_of(described: EndpointString, variable: str, reactor: Any) -> SSL.Context:  # noqa: ANN401
    """
    Read the files of an C{ssl:} or C{tls:} string, as Twisted does.
    """
    with _as_setting(described, variable):
        for path in described.files():
            for each in _pems(path):
                require_regular(each)  # Twisted would also open a FIFO or a device
        endpoint: Any = serverFromString(reactor, described.to_twisted())
        if described.kind == "tls":
            made = endpoint.connectionCreator.defaultContext
        else:
            made = endpoint._sslContextFactory.getContext()  # noqa: SLF001 (there is no public way)
        return cast("SSL.Context", made)


def _pems(path: str) -> list[str]:
    """
    List the files that Twisted reads for a path, which may be a directory.
    """
    if not Path(path).is_dir():
        return [path]
    return [str(each) for each in Path(path).iterdir() if each.name.lower().endswith(".pem")]


@contextlib.contextmanager
def _as_setting(described: EndpointString, variable: str) -> Iterator[None]:
    """
    Convert Twisted's errors about an endpoint string or its files to errors of the setting.
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
    Return why Twisted rejects an endpoint string. The messages of Twisted and Python are about their code.
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
    Make the TLS of C{PROXY_SSL_KEY} and C{PROXY_SSL_CERTIFICATE}; None if they are not set.
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
    Convert errors about a certificate to errors of the setting that names it.
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
