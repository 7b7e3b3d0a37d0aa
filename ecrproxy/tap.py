"""
The composition root: C{twistd ecr-proxy}. Alone meets the environment, the global reactor and sockets.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.names.client import Resolver
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python import usage
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.client import Agent, HTTPConnectionPool, _HTTP11ClientFactory

from ecrproxy import __version__
from ecrproxy.config import SETTINGS, Config, ConfigError
from ecrproxy.ecr import CredentialsError, TokenService, fetch_token
from ecrproxy.janitor import Janitor
from ecrproxy.proxy import PullThrough
from ecrproxy.resolver import ChosenServers, hosts_names
from ecrproxy.store import Store
from ecrproxy.tls import Certificate, CertificateError
from ecrproxy.upstream import Upstream
from ecrproxy.web import Registry, make_site

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint

log = Logger()
T = TypeVar("T")

DISK_THREADS: Final = 8
IDLE_CONNECTIONS: Final = 32
"""Idle upstream connections kept for each host."""
IDLE_SECONDS: Final = 90
CONNECT_SECONDS: Final = 10
BACKLOG: Final = 1024


class Options(usage.Options):
    """
    The flags, made from the table of settings.
    """

    synopsis = "[options]"
    longdesc = (
        "A caching pull-through proxy for Amazon ECR. Each flag has a variable; the flag wins. AWS credentials are"
        " found as AWS's own tools find them (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE,"
        " roles); they are no flags, for every process could read those."
    )
    optParameters = [  # noqa: RUF012 (Twisted's way)
        [each.name, None, None, f"{each.help} [{each.variable}, default: {each.default}]"]
        for each in SETTINGS
        if each.name not in ("instance-auth", "listen")
    ]
    optFlags = [  # noqa: RUF012
        [
            "instance-auth",
            None,
            "use the role of the instance, container or pod only [AWS_INSTANCE_AUTH, default: false]",
        ],
        ["no-instance-auth", None, "look for AWS credentials everywhere, whatever AWS_INSTANCE_AUTH says"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def opt_listen(self, endpoint: str) -> None:
        """
        Twisted endpoint string, repeatable [PROXY_LISTEN, default: made from port and TLS files].
        """
        self.listen.append(endpoint)

    def opt_version(self) -> None:
        """
        Show the version and exit.
        """
        print(f"ecrproxy {__version__}")  # noqa: T201
        sys.exit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """
        Read the command line; what is wrong with it is one line.
        """
        try:
            super().parseOptions(options)
        except usage.UsageError as problem:
            _die(f"{problem}; see twistd ecr-proxy --help")

    def flags(self) -> dict[str, str]:
        """
        Give the flags that were given, by setting name.
        """
        given = {each.name: self[each.name] for each in SETTINGS if self.get(each.name) is not None}
        for flag, value in (("instance-auth", "true"), ("no-instance-auth", "false")):
            if self[flag]:
                given["instance-auth"] = value
        if not self["instance-auth"] and not self["no-instance-auth"]:
            del given["instance-auth"]
        if self.listen:
            given["listen"] = " ".join(self.listen)
        return given


def makeService(options: Options) -> MultiService:
    """
    Build the daemon.
    """
    try:
        config = Config.load(options.flags(), os.environ)
    except ConfigError as problem:
        _die(str(problem))
    from twisted.internet import reactor  # noqa: PLC0415 (twistd may have chosen another before)

    return build(config, reactor, _abandon)


def build(config: Config, reactor: Any, refused: Callable[[CredentialsError], None]) -> MultiService:  # noqa: ANN401
    """
    Wire the parts; each line makes one object from earlier ones.

    @param refused: told of credentials that AWS refuses for good.
    """
    service = MultiService()
    disk = Threads(DISK_THREADS, reactor)
    store = _prepared(Store(Path(config.cache_dir), time.time))
    janitor = Janitor(store, config.cache_limit, disk.call)
    tokens = TokenService(
        lambda: call_unowned(reactor, lambda: fetch_token(config.region, instance_auth=config.instance_auth)),
        reactor,
        refused,
    )
    upstream = Upstream(config.ecr_endpoint, _agent(reactor), tokens, reactor)
    pull_through = PullThrough(upstream, store, janitor, disk.call, time.time, config.tag_ttl)
    registry = Registry(pull_through, config.namespace_pattern, config.cache_key, disk.call)

    async def reasons() -> list[str]:
        found = [f"no token: {problem}"] if (problem := tokens.problem()) else []
        try:
            await disk.call(store.check)
        except OSError as problem:
            found.append(f"the cache directory can't be written: {problem.strerror}")
        return found

    site = make_site(registry, reasons, reactor)
    _install_resolver(config, reactor)
    for part in (disk, janitor, tokens):
        part.setServiceParent(service)
    for name, endpoint in _endpoints(config, reactor):
        Listening(name, endpoint, site).setServiceParent(service)
    return service


class Threads(Service):
    """
    A pool of threads for the disk, whose waiting never holds up the pool that resolves names.
    """

    def __init__(self, size: int, reactor: Any) -> None:  # noqa: ANN401
        self._pool, self._reactor = ThreadPool(0, size, "ecrproxy-disk"), reactor

    def call(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)} in one of them.
        """
        return deferToThreadPool(self._reactor, self._pool, blocking, *args)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._pool.start()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._pool.stop()


def call_unowned(reactor: Any, blocking: Callable[[], T]) -> Deferred[T]:  # noqa: ANN401
    """
    Call C{blocking()} in a thread that the end of the daemon does not wait for: AWS may keep it for long.
    """
    result: Deferred[T] = Deferred()

    def call() -> None:
        try:
            outcome: T | Failure = blocking()
        except Exception:  # noqa: BLE001 (told to who waits)
            outcome = Failure()
        reactor.callFromThread(result.callback, outcome)

    threading.Thread(target=call, name="ecrproxy-aws", daemon=True).start()
    return result


class Listening(StreamServerEndpointService):
    """
    Listens from the start, or there is no start.

    @param name: what the operator knows the endpoint by.
    """

    _raiseSynchronously = True

    def __init__(self, name: str, endpoint: IStreamServerEndpoint, site: Any) -> None:  # noqa: ANN401
        super().__init__(endpoint, site)
        self._name = name

    def privilegedStartService(self) -> None:  # noqa: D102
        try:
            super().privilegedStartService()
        except CannotListenError as problem:
            why = getattr(problem.socketError, "strerror", None) or problem.socketError
            self._give_up(f"can't listen there: {why}; give another, or end what uses it")
        except (OSError, ValueError, LookupError) as problem:
            self._give_up(f"can't listen there: {problem}")

    def _give_up(self, why: str) -> NoReturn:
        log.critical("{name}: {why}", name=self._name, why=why)
        _die(f"{self._name}: {why}")


def _prepared(store: Store) -> Store:
    try:
        store.prepare()
        store.sweep()
    except OSError as problem:
        _die(f"PROXY_CACHE_DIR={str(store.root)!r}: can't be written: {problem.strerror}; give a directory that can")
    return store


def _agent(reactor: Any) -> Agent:  # noqa: ANN401
    pool = HTTPConnectionPool(reactor)
    pool._factory = _QuietFactory  # noqa: SLF001 (there is no public way, and two lines a connection drown all others)
    pool.maxPersistentPerHost, pool.cachedConnectionTimeout = IDLE_CONNECTIONS, IDLE_SECONDS
    return Agent(reactor, connectTimeout=CONNECT_SECONDS, pool=pool)


class _QuietFactory(_HTTP11ClientFactory):
    """
    Connections that are not announced in the log.
    """

    noisy = False


def _install_resolver(config: Config, reactor: Any) -> None:  # noqa: ANN401
    if config.dns_resolver is None:
        return
    try:
        local = hosts_names(Path("/etc/hosts").read_text("utf-8", "replace"))
    except OSError:
        local = []
    servers = Resolver(servers=list(config.dns_resolver), reactor=reactor)
    reactor.installNameResolver(ChosenServers(servers, reactor.nameResolver, local, reactor))


def _endpoints(config: Config, reactor: Any) -> list[tuple[str, Any]]:  # noqa: ANN401
    if config.listen:
        return [(f"PROXY_LISTEN={text!r}", _described(text, reactor)) for text in config.listen]
    every = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 (a proxy for other machines)
    kind = TCP6ServerEndpoint if every == "::" else TCP4ServerEndpoint
    endpoint: Any = kind(reactor, config.port, backlog=BACKLOG, interface=every)
    if config.ssl_key is not None and config.ssl_certificate is not None:
        endpoint = SecureEndpoint(endpoint, _certificate(config.ssl_key, config.ssl_certificate))
    return [(f"PROXY_PORT={config.port}", endpoint)]


def _described(text: str, reactor: Any) -> Any:  # noqa: ANN401
    try:
        return serverFromString(reactor, text)
    except Exception as problem:  # noqa: BLE001 (each kind of endpoint has errors of its own)
        _die(
            f"PROXY_LISTEN={text!r}: {str(problem) or type(problem).__name__}; give an endpoint string such as tcp:5000"
        )


def _certificate(key: str, certificate: str) -> Certificate:
    try:
        return Certificate(key, certificate)
    except CertificateError as problem:
        blamed = {"key": f"PROXY_SSL_KEY={key!r}", "certificate": f"PROXY_SSL_CERTIFICATE={certificate!r}"}
        both = f"PROXY_SSL_KEY={key!r}, PROXY_SSL_CERTIFICATE={certificate!r}"
        _die(f"{blamed.get(problem.what, both)}: {problem.why}; give PEM files that belong together")


class SecureEndpoint:
    """
    TLS on top of another endpoint.
    """

    def __init__(self, endpoint: Any, certificate: Certificate) -> None:  # noqa: ANN401
        self._endpoint, self._certificate = endpoint, certificate

    def listen(self, protocolFactory: Any) -> Deferred[IListeningPort]:  # noqa: ANN401
        """
        Listen, and speak TLS.
        """
        listening: Deferred[IListeningPort] = self._endpoint.listen(
            TLSMemoryBIOFactory(self._certificate, isClient=False, wrappedFactory=protocolFactory)
        )
        return listening


def _abandon(problem: CredentialsError) -> None:
    """
    Stop the daemon: it can do nothing with these credentials.
    """
    from twisted.internet import reactor  # noqa: PLC0415

    log.critical("{problem}", problem=problem)
    _say(str(problem))
    # twistd ends with status 0 once its reactor has stopped, whyever it did.
    atexit.register(os._exit, 1)
    reactor.stop()


def _say(line: str) -> None:
    stderr = sys.__stderr__  # twistd makes a log of sys.stderr
    if stderr is not None:
        stderr.write(f"ecr-proxy: {' '.join(line.split())}\n")
        stderr.flush()


def _die(line: str) -> NoReturn:
    _say(line)
    sys.exit(1)
