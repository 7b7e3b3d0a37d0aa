"""
The composition root: C{twistd ecr-proxy}. Alone meets the environment and the global reactor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from twisted.application.service import MultiService, Service
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.error import ReactorNotRunning
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.names.client import Resolver
from twisted.web.client import Agent

from ecrproxy import __version__
from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.crowds import Crowds, Word
from ecrproxy.access.htpasswd import HtpasswdError
from ecrproxy.access.limits import Crowd, for_workers, handed_on
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.access.passwords import AT_ONCE, Passwords
from ecrproxy.admin.api import Api
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.port import make_admin_site
from ecrproxy.admin.readings import (
    of_cache,
    of_certificates,
    of_clients,
    of_disk,
    of_loop,
    of_token,
    of_transfers,
    of_upstream,
)
from ecrproxy.admin.status import Asking, Status
from ecrproxy.cache.condition import Condition
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.ledger import Notes
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import Kind
from ecrproxy.cached import VERIFICATIONS, Cache
from ecrproxy.cores import usable_cores
from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.ending import Connections, Drain, InOrder, Signals
from ecrproxy.daemon.exhaustion import Exhaustion
from ecrproxy.daemon.listening import Listening, admin_endpoint, endpoints
from ecrproxy.daemon.process import clients_beside_spare, most_clients, set_aside_what_stays, set_up
from ecrproxy.daemon.renewal import Renewal
from ecrproxy.daemon.supervision import Supervised, Supervisor, summary
from ecrproxy.daemon.workers import BACKLOG, HandedDown, Post, StandardInput, Workers
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.relay import FirstProcess, InnerRegistry, NoRoom, Relay, RelayedReady, WorkerRegistry
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.http.telling import USED, Teller, Used, told
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId
from ecrproxy.logs.shapes import PRIORITIES, as_json
from ecrproxy.logs.writing import LineWriter, choose_writer, leads_to_journal
from ecrproxy.metrics import Figures, LoopStall, Served
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import UpstreamAgent, connection_pool
from ecrproxy.registry.ecr import CredentialsError, Token, TokenService, fetch_token
from ecrproxy.registry.egress import Egress, OwnNames
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.registry.proxy_variables import for_botocore
from ecrproxy.registry.resolver import ChosenServers, hosts_names
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.upstream import Upstream
from ecrproxy.registry.wire import Wire
from ecrproxy.settings.complaints import Complaint, say, write
from ecrproxy.settings.config import ADMIN_LISTEN, Config, ConfigError
from ecrproxy.settings.contradictions import Machine, load, look_at_settings, refusal
from ecrproxy.settings.options import Options
from ecrproxy.threads import Disk, InThread, Pools, Threads, call_unowned, in_time
from ecrproxy.transfer.inflow import Lanes

log = Logger()
T = TypeVar("T")

READING: Final = 8, 5.0
WRITING: Final = 8, 8.0
COMMITTING: Final = 4, 60.0
HASHING: Final = VERIFICATIONS, 30.0
"""Threads for the disk, by the kind of work; and for how many seconds a call is waited for: the disk may hang.

A pull that meets a disk which hangs reads, and then writes: its client waits 30 s at the most."""
DIGESTING: Final = 4
START_SECONDS: Final = 8.0
SIZE_SECONDS: Final = 2.0
"""How long the start waits for the disk, and for its size, which only warnings need."""
LAST_LINES_SECONDS: Final = 2.0
"""How long the end waits for the last lines of the log to be written."""


def makeService(options: Options) -> Daemon:
    """
    Build the daemon.
    """
    from twisted.internet import reactor  # noqa: PLC0415 (twistd may have chosen another before)

    set_up(reactor)
    complain = _complaining(options)
    warnings: list[Complaint] = []
    try:
        config = load(options.flags(), os.environ)
        post = Post.from_environ(os.environ)
        if post is not None:
            service = build_worker(config, post, reactor)
        else:
            warnings = _warnings(config, options)
            for each in warnings:
                log.warn("{complaint}", complaint=each)
            os.environ.update(for_botocore(os.environ))
            supervisor = Supervisor.from_environ(os.environ, os.getpid())
            refused: list[CredentialsError] = []
            atexit.register(_fail_after, refused)  # the first comes last: others clean up
            leave = partial(_abandon, complain, refused)
            service = build(config, reactor, leave, options.arguments(), supervisor, _egress(os.environ))
    except ConfigError as problem:
        for line in (*problem.warnings, *map(str, warnings)):
            _complaining(options, LogLevel.warn)(f"warning: {line}")
        for line in problem.errors:
            complain(line)
        sys.exit(1)
    service.complain, service.writer = complain, _log_writer(config, options, reactor)
    Exhaustion(service.give_up).setServiceParent(service)
    if service.writer is not None:
        atexit.register(service.writer.end, LAST_LINES_SECONDS)
    return service


def _warnings(config: Config, options: Options) -> list[Complaint]:
    """
    Judge the settings together.

    @raise ConfigError: if the daemon must not start with them.
    """
    machine = Machine(usable_cores(), _disk_size(Path(config.cache_dir)))
    found = look_at_settings(config, options.flags(), os.environ, machine)
    if any(each.grave for each in found):
        raise refusal(found)
    return found


def _egress(environ: Mapping[str, str]) -> Egress:
    """
    Read how the registry is reached.

    @raise ConfigError: if the proxy's URL is none.
    """
    try:
        egress = Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None
    if egress.proxy is not None:
        log.info(
            "Registry and buckets are asked through the egress proxy {proxy}, except for what NO_PROXY names",
            proxy=egress.proxy,
        )
    return egress


def _disk_size(directory: Path) -> int | None:
    """
    Return the size of the file system that a directory is on, or would be.
    """

    def look() -> int | None:
        for each in (directory, *directory.absolute().parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(each).total
        return None

    with contextlib.suppress(TimeoutError):
        return in_time(look, SIZE_SECONDS)
    return None


def _complaining(options: Options, level: Any = LogLevel.critical) -> Callable[[str], None]:  # noqa: ANN401
    """
    Have what keeps the daemon from starting said in the shape of the log, whatever else is wrong with the settings.
    """
    chosen = options.flags().get("log-format") or os.environ.get("PROXY_LOG_FORMAT")
    if chosen != "json":
        marked = leads_to_journal(os.environ.get("JOURNAL_STREAM"), sys.__stderr__)
        return partial(say, mark=f"<{PRIORITIES[level]}>" if marked else "")

    def say_as_json(line: str) -> None:
        event = {"log_time": time.time(), "log_level": level, "log_namespace": "ecrproxy"}
        write("".join(as_json({**event, "log_format": "{line}", "line": line}, "")))

    return say_as_json


def _log_writer(config: Config, options: Options, reactor: Any) -> LineWriter | None:  # noqa: ANN401
    """
    Make what writes the log.
    """
    if options.parent is None:  # nobody has said where the log goes
        return None
    return choose_writer(
        options.parent,
        json=config.log_format == "json",
        limit=PRIORITIES[LogLevel.levelWithName(config.log_level)],
        journal=os.environ.get("JOURNAL_STREAM"),
        later=reactor.callFromThread,
    )


class Daemon(InOrder):
    """
    All parts of the daemon. What keeps it from listening is one line.

    @ivar complain: says it.
    @ivar writer: writes the log; none for twistd's own.
    @ivar pools: the first part, for what responses stand on needs threads to its end.
    """

    complain: Callable[[str], None] = staticmethod(say)
    writer: LineWriter | None = None

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.pools = Pools(reactor)
        self.pools.setServiceParent(self)

    def add(self, *parts: Service) -> None:
        """
        Add parts; each stops once those after it have.
        """
        for part in parts:
            part.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:  # noqa: ANN401
        """
        Become the application's, whose log begins next: twistd looks there for an observer.
        """
        if self.writer is not None:
            parent.setComponent(ILogObserver, self.writer)
        super().setServiceParent(parent)

    def privilegedStartService(self) -> None:  # noqa: D102
        if self.writer is not None:
            self.writer.start()
        try:
            super().privilegedStartService()
        except ConfigError as problem:
            log.critical("{problem}", problem=problem)
            self.complain(str(problem))
            sys.exit(1)

    def leave(self, number: int) -> NoReturn:
        """
        End now, with the status that shells give to an end by a signal: a container's first process can't kill itself.
        """
        if self.writer is not None:
            self.writer.end(LAST_LINES_SECONDS)
        os._exit(128 + number)

    def give_up(self, problem: str) -> None:
        """
        End now, with one line that says why. Called in a thread, of a process that may fail at anything.
        """
        try:
            log.critical("{problem}", problem=problem)
            if self.writer is not None:
                self.writer.end(LAST_LINES_SECONDS)
            else:
                self.complain(problem)
        finally:
            os._exit(1)


def build(
    config: Config,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    arguments: Sequence[str] = (),
    supervisor: Supervisor | None = None,
    egress: Egress = Egress(),  # noqa: B008 (it is frozen)
) -> Daemon:
    """
    Wire the parts; each line makes one object from earlier ones.

    @param refused: ends the daemon, for AWS refuses its credentials.
    @param arguments: the flags that workers are to be started with.
    @param supervisor: the service manager, if it wants to be told.
    """
    service = Daemon(reactor)
    disk, threads = _disk(service.pools), service.pools.threads
    store = Store(Path(config.cache_dir), time.time)
    counting, judging, probing = threads(1, yielding=False), threads(1), threads(1)
    janitor = Janitor(store, config.cache_limit, disk.writing, reactor, counting.call)
    tokens = _tokens(config, reactor, partial(_ends, refused, warm=_begin(store)))
    figures, stall = Figures(__version__), LoopStall(reactor)
    upstream, asking = _upstream(config, tokens, figures, egress, reactor)
    cache = Cache(store, janitor, disk, time.time, RegistryId.of_url(config.ecr_endpoint))
    pull_through = _pull_through(config, upstream, cache, disk, reactor)
    connections, condition = Connections(), Condition(store, probing.call, reactor)
    readiness = partial(_readiness, tokens, asking.circuit, condition, connections)
    crowds, ready = Crowds(Crowd(config.limits(clients_beside_spare())), reactor.seconds), Ready(readiness)
    status = Status(
        config.ecr_endpoint, figures, store, janitor, asking, pull_through, readiness, disk.reading, time.time, reactor
    )
    supervised = Supervised(supervisor, partial(_summary, readiness, store, janitor), reactor)
    shape = (_namespaces(config, judging, reactor), config.cache_key, disk.reading)
    admission, pages = _admission(config, reactor, service), _pages(config)
    registry = Registry(pull_through, *shape)
    counted = partial(make_site, access_log=_access_log(config, service, reactor), served=figures.served, pages=pages)
    site = counted(registry, ready, reactor, admission=admission, crowd=crowds.own, connections=connections)
    figures.watch(*of_cache(store, janitor), *of_token(tokens), *of_transfers(pull_through), *of_loop(stall))
    figures.watch(*of_clients(crowds, _most_connections(config)), *of_disk(condition))
    service.add(*status.services, supervised, janitor, tokens, stall)
    workers, alone = None, config.worker_processes == 1
    listening = _listening(config, site, reactor, accepts=alone)
    if not alone:
        inner = partial(make_site, InnerRegistry(pull_through, *shape), ready, pages=pages)
        hearers = told(store.ledger, figures.served, status.incidents, crowds)
        workers = _share_work(config, inner, hearers, listening, arguments, service, reactor)
    make_admin = partial(make_admin_site, figures, ready, status)
    listening = [*listening, *_admin(config, make_admin, cache, disk.reading, service, reactor)]  # not the workers'
    reread = partial(supervised.rereading, partial(_reread, [*listening, admission], workers))
    _renewal(listening, figures, judging.call, reread, reactor).setServiceParent(service)
    _face_clients(Drain(connections, config.drain_seconds, reactor), listening, reread, service.leave, service, reactor)
    return service


def _disk(pools: Pools) -> Disk:
    """
    Make the threads for the disk.
    """
    return Disk(
        reading=pools.threads(READING[0]).bounded(READING[1]),
        writing=pools.threads(WRITING[0]).bounded(WRITING[1]),
        committing=pools.threads(COMMITTING[0]).bounded(COMMITTING[1]),
        hashing=pools.threads(HASHING[0]).bounded(HASHING[1]),
        digesting=pools.threads(DIGESTING).call,
        closing=pools.threads(1).call,
    )


def _access_log(config: Config, service: MultiService, reactor: Any) -> AccessLog | None:  # noqa: ANN401
    """
    Have a line logged for each request, if lines of its level are written.
    """
    if config.log_level not in ("debug", "info"):
        return None
    access_log = AccessLog(reactor)
    access_log.setServiceParent(service)
    return access_log


def _listening(config: Config, site: RegistrySite, reactor: Any, *, accepts: bool = True) -> list[Listening]:  # noqa: ANN401
    """
    Make what listens for clients, all of it with one limit on descriptors.
    """
    most, wanted = most_clients(), config.limits().connections
    if wanted > most:
        log.warn(
            "RLIMIT_NOFILE leaves room for {most} connections, fewer than PROXY_CONNECTIONS={wanted}: for more than"
            " those, idle ones are closed, or they are refused; raise LimitNOFILE= or ulimit -n,"
            " or lower PROXY_CONNECTIONS",
            most=most,
            wanted=wanted,
        )
    gate = Gate(reactor, most)
    return [Listening(*named, site, accepts=accepts, gate=gate) for named in endpoints(config, reactor)]


def _most_connections(config: Config) -> int | None:
    """
    Tell how many connections of clients all processes may have together, by the settings and by their descriptors.
    """
    most = config.limits(clients_beside_spare()).connections
    return most * config.worker_processes or None


def _tokens(config: Config, reactor: Any, ends: Callable[[CredentialsError], bool]) -> TokenService:  # noqa: ANN401
    return TokenService(lambda: call_unowned(reactor, lambda: _fetch(config)), reactor, time.time, ends)


def _upstream(
    config: Config,
    tokens: TokenService,
    figures: Figures,
    egress: Egress,
    reactor: Any,  # noqa: ANN401
) -> tuple[Upstream, Asking]:
    """
    Wire what asks ECR and its buckets.
    """
    outside = OwnNames(reactor)  # before the chosen servers are installed
    forget = _install_resolver(config, reactor)
    agent = UpstreamAgent(reactor, config.ecr_endpoint, forget, egress=egress, outside=outside)
    metered = MeteredAgent(agent, config.ecr_endpoint, figures.upstream, reactor)
    wire = Wire(metered, reactor, Budget(config.upstream_tries, config.upstream_seconds))
    governor = Governor(config.ecr_quotas, config.ecr_connections, reactor)
    circuit = Circuit(reactor.seconds)
    figures.watch(*of_upstream(wire, circuit, governor))
    endpoint = Endpoint(config.ecr_endpoint, wire, tokens, governor, circuit)
    upstream = Upstream(endpoint, wire, stall_seconds=config.stall_seconds)
    return upstream, Asking(tokens=tokens, wire=wire, circuit=circuit, governor=governor)


def _pull_through(config: Config, upstream: Upstream, cache: Cache, disk: Disk, reactor: Any) -> PullThrough:  # noqa: ANN401
    """
    Wire what answers from the cache, or through it.
    """
    lanes = Lanes(config.blob_connections, config.bucket_connections)
    return PullThrough(
        upstream,
        cache,
        disk,
        time.time,
        tag_ttl=config.tag_ttl,
        lanes=lanes,
        read_ahead=config.read_ahead,
        call_later=reactor.callLater,
    )


def _namespaces(config: Config, judging: Threads, reactor: Any) -> Namespaces:  # noqa: ANN401
    registries = {RegistryId.of_url(config.ecr_endpoint), *(config.registry_aliases or ())}
    return Namespaces(config.namespace_pattern, judging.call, reactor, registries)


def _share_work(
    config: Config,
    make_inner: Callable[..., RegistrySite],
    hearers: Mapping[str, Any],
    listening: Sequence[Listening],
    arguments: Sequence[str],
    service: MultiService,
    reactor: Any,  # noqa: ANN401
) -> Workers:
    """
    Have workers serve the clients, and this process the workers.
    """
    folder = tempfile.mkdtemp(prefix="ecrproxy-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "first")
    inner = make_inner(reactor=reactor, crowd=Crowd(for_workers(clients_beside_spare())), others={USED: Used(hearers)})
    endpoint = UNIXServerEndpoint(reactor, path, BACKLOG, mode=0o600)
    Listening(path, endpoint, inner, gate=Gate(reactor, most_clients())).setServiceParent(service)
    workers = Workers(config.worker_processes, listening, path, arguments, reactor, drain=config.drain_seconds)
    workers.setServiceParent(service)
    return workers


def _face_clients(
    drain: Drain,
    listening: Sequence[Listening],
    reread: Callable[[], None],
    at_once: Callable[[int], object],
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> None:
    """
    Let clients in, and signals. Whatever responses need comes before this, for the last are the first to stop.
    """
    service.add(drain, *listening, Signals(reactor, partial(_stop, reactor), at_once, reread))


def _admin(
    config: Config,
    make_site: Callable[[Api, Any, frozenset[str]], RegistrySite],
    cache: Cache,
    in_thread: InThread,
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> list[Listening]:
    """
    Make what listens for the operator, if there is such a port.

    Where nobody chose it, its being taken keeps the daemon from nothing. What the operator or somebody else purges
    is forgotten. This work has threads of its own.
    """
    purges = Purges(cache.store, cache.forget_all, in_thread, reactor)
    purges.setServiceParent(service)
    named = admin_endpoint(config, reactor)
    if named is None:
        return []
    listing, hashing = service.pools.threads(1, yielding=False), service.pools.threads(1)
    api = Api(Inventory(cache.store), purges.look, listing.call, hashing.call, reactor)
    hosts = {socket.gethostname().lower(), *(config.admin_hosts or ())}
    site = make_site(api, reactor, frozenset(hosts))
    needed = str(config.admin_listen) != ADMIN_LISTEN
    return [Listening(*named, site, needed=needed, gate=Gate(reactor))]


def _renewal(
    listening: Sequence[Listening],
    figures: Figures,
    in_thread: InThread,
    reread: Callable[[], None],
    reactor: Any,  # noqa: ANN401
) -> Renewal:
    """
    Make what looks for renewed certificates. Workers are told, and need not look.
    """
    figures.watch(*of_certificates(lambda: min((each.expires for each in listening if each.expires), default=None)))
    return Renewal(listening, in_thread, reread, reactor)


def _reread(parts: Sequence[Listening | Admission], workers: Workers | None) -> None:
    """
    Read certificates and passwords again, here and in the workers.
    """
    news = [each.reread() for each in parts]
    if workers is not None and any(news):
        workers.reread()


def _fetch(config: Config) -> Token:
    """
    Fetch a token, in a thread.
    """
    token = fetch_token(config.region, instance_auth=config.instance_auth)
    set_aside_what_stays()
    return token


def build_worker(config: Config, post: Post, reactor: Any) -> Daemon:  # noqa: ANN401
    """
    Wire a worker's parts.
    """
    service = Daemon(reactor)
    disk = _disk(service.pools)
    notes = Notes()
    store = Store(Path(config.cache_dir), time.time, notes)
    cache = Cache(store, NoRoom(), disk, time.time, RegistryId.of_url(config.ecr_endpoint))
    purges = Purges(store, cache.forget_all, disk.reading, reactor)
    first = Agent.usingEndpointFactory(reactor, FirstProcess(reactor, post.path), connection_pool(reactor))
    relay = Relay(first)
    judging = service.pools.threads(1)
    shape = (_namespaces(config, judging, reactor), config.cache_key, disk.reading)
    admission = _admission(config, reactor, service)
    room = clients_beside_spare()
    share = handed_on(room, config.worker_processes, config.connections_per_address)
    registry, ready = WorkerRegistry(cache, config.tag_ttl, relay, *shape, share), RelayedReady(relay)
    served, connections, crowd = Served(), Connections(), Crowd(config.limits(room))
    lines = _access_log(config, service, reactor)
    counted = partial(make_site, access_log=lines, served=served, pages=_pages(config))
    site = counted(registry, ready, reactor, admission=admission, crowd=crowd, connections=connections)
    incidents = Incidents(time.time)
    teller = Teller(first, told(notes, served, incidents, Word(crowd, os.getpid())), reactor)
    service.add(incidents, purges, teller)
    listening = _listening(config, site, HandedDown(reactor, post.sockets))
    drain = Drain(connections, config.drain_seconds, reactor)
    # A service manager may tell all processes to end, and the first process each worker once more.
    _face_clients(drain, listening, partial(_reread, [*listening, admission], None), lambda _: None, service, reactor)
    reactor.addReader(StandardInput(partial(_orphaned, connections, service.leave, reactor)))
    return service


def _orphaned(connections: Connections, leave: Callable[[int], object], reactor: Any) -> None:  # noqa: ANN401
    """
    End a worker whose first process has gone.
    """
    if connections.draining:
        leave(signal.SIGTERM)
    _stop(reactor)


def _stop(reactor: Any) -> None:  # noqa: ANN401
    with contextlib.suppress(ReactorNotRunning):  # it may be about to end anyway
        reactor.stop()


async def _readiness(
    tokens: TokenService, circuit: Circuit, condition: Condition, connections: Connections
) -> Readiness:
    """
    Tell what the daemon can do.
    """
    found = await condition.latest()
    return judge(
        draining=connections.draining,
        token=tokens.problem(),
        ecr=circuit.problem(),
        disk=found.reasons,
        filled=found.filled,
    )


async def _summary(readiness: Callable[[], Awaitable[Readiness]], store: Store, janitor: Janitor) -> str:
    return summary(await readiness(), store.ledger.total, janitor.limit)


def _ends(refused: Callable[[CredentialsError], None], problem: CredentialsError, *, warm: bool) -> bool:
    """
    End the daemon if it can serve nothing without AWS; tell whether it ends.
    """
    if not warm:
        refused(problem)
    return not warm


def _begin(store: Store) -> bool:
    """
    Prepare the cache directory; tell whether it has content, as far as is known.

    A disk that is full, fails or hangs ends no daemon that runs, and keeps none from starting: L{Troubles} tells of it.

    @raise ConfigError: if it can't be the cache directory.
    """
    try:
        return in_time(store.begin, START_SECONDS)
    except TimeoutError as problem:
        store.troubles.failed(Kind.WRITE, problem)
        return True
    except OSError as problem:
        raise ConfigError(
            f"PROXY_CACHE_DIR={str(store.root)!r}: can't be written: {problem.strerror}; give a directory that can"
        ) from problem


def _pages(config: Config) -> Pages:
    return Pages(config.allow_origin, proved=config.htpasswd is not None or config.client_ca is not None)


def _admission(config: Config, reactor: Any, service: Daemon) -> Admission:  # noqa: ANN401
    """
    Make what lets clients in; C{service} runs what of it runs by itself.

    @raise ConfigError: if the passwords can't be used.
    """
    passwords = None
    if config.htpasswd is not None:
        checking = service.pools.threads(AT_ONCE)
        try:
            passwords = Passwords(config.htpasswd, checking.call, reactor, secrets.token_bytes(32))
        except HtpasswdError as problem:
            raise ConfigError(f"PROXY_HTPASSWD={config.htpasswd!r}: {problem}") from problem
        passwords.setServiceParent(service)
    return Admission(config.allow_from, certificates=config.client_ca is not None, passwords=passwords)


def _install_resolver(config: Config, reactor: Any) -> Callable[[str], None]:  # noqa: ANN401
    """
    Have the chosen servers asked.

    @return: makes them forget a name.
    """
    if config.dns_resolver is None:
        return lambda _: None  # the host's own resolver keeps nothing here
    try:
        local = hosts_names(Path("/etc/hosts").read_text("utf-8", "replace"))
    except OSError:
        local = []
    servers = Resolver(servers=list(config.dns_resolver), reactor=reactor)
    chosen = ChosenServers(servers, reactor.nameResolver, local, reactor)
    reactor.installNameResolver(chosen)
    return chosen.forget


def _abandon(complain: Callable[[str], None], refused: list[CredentialsError], problem: CredentialsError) -> None:
    """
    Stop the daemon: it can do nothing with these credentials.
    """
    from twisted.internet import reactor  # noqa: PLC0415

    log.critical("{problem}", problem=problem)
    complain(str(problem))
    refused.append(problem)
    reactor.stop()


def _fail_after(refused: Sequence[CredentialsError]) -> None:
    """
    End with status 1 if credentials were refused: twistd ends with 0 once its reactor has stopped, whyever it did.
    """
    if refused:
        os._exit(1)
