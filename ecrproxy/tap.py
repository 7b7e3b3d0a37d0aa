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
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from twisted.application.service import Service
from twisted.internet.error import ReactorNotRunning
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.names.client import Resolver

from ecrproxy import __version__
from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.htpasswd import HtpasswdError, read_users
from ecrproxy.access.limits import Crowd
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.access.passwords import AT_ONCE, Passwords
from ecrproxy.admin.api import Api
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.port import make_admin_site
from ecrproxy.admin.readings import (
    FIGURES,
    of_cache,
    of_certificates,
    of_clients,
    of_disk,
    of_loop,
    of_token,
    of_transfers,
    of_upstream,
)
from ecrproxy.admin.status import Asking, Process, Status
from ecrproxy.cache.condition import Condition
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.scrub import Scrub
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import Kind
from ecrproxy.cached import VERIFICATIONS, Cache
from ecrproxy.cores import usable_cores
from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.ending import Connections, Drain, InOrder, Signals
from ecrproxy.daemon.exhaustion import Exhaustion
from ecrproxy.daemon.inherited import CHANNEL_FD, VARIABLE, Inherited, inherited_sockets
from ecrproxy.daemon.listening import Listening, admin_endpoint, endpoints
from ecrproxy.daemon.process import clients_beside_spare, most_clients, set_aside_what_stays, set_up
from ecrproxy.daemon.renewal import Renewal, generation
from ecrproxy.daemon.supervision import Supervised, Supervisor, summary
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId
from ecrproxy.logs.shapes import PRIORITIES, as_json
from ecrproxy.logs.writing import LineWriter, choose_writer, leads_to_journal
from ecrproxy.metrics import Figures, Gathered, LoopStall
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import UpstreamAgent
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
from ecrproxy.shares import share
from ecrproxy.threads import Disk, Pools, Threads, call_unowned, in_time
from ecrproxy.transfer.inflow import BUFFERED, Lanes
from ecrproxy.transfer.unattended import MOST
from ecrproxy.workers.channel import Channel, adopt
from ecrproxy.workers.messages import Counted, FromParent, Refused, Reread
from ecrproxy.workers.processes import Workers
from ecrproxy.workers.worker import Reports

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
    Build the daemon, its parent, or one of its workers.
    """
    from twisted.internet import reactor  # noqa: PLC0415 (twistd may have chosen another before)

    set_up(reactor)
    complain = _complaining(options)
    warnings: list[Complaint] = []
    try:
        config = load(options.flags(), os.environ)
        sockets = inherited_sockets(os.environ)
        if sockets is not None:
            service = build_worker(config, sockets, reactor, _egress(os.environ))
        else:
            warnings = _warnings(config, options)
            for each in warnings:
                log.warn("{complaint}", complaint=each)
            os.environ.update(for_botocore(os.environ))
            supervisor = Supervisor.from_environ(os.environ, os.getpid())
            refused: list[CredentialsError] = []
            atexit.register(_fail_after, refused)  # the first comes last: others clean up
            leave = partial(_abandon, complain, refused)
            egress = _told(_egress(os.environ))
            if config.worker_processes == 1:
                service = build(config, reactor, leave, supervisor, egress)
            else:
                service = build_parent(config, reactor, leave, supervisor, options.arguments())
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
        return Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None


def _told(egress: Egress) -> Egress:
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


@dataclass(frozen=True, slots=True)
class Serving:
    """
    What serves clients in this process, but for the sockets that they come to.
    """

    site: RegistrySite
    connections: Connections
    admission: Admission
    figures: Figures
    process: Process
    cache: Cache
    purges: Purges
    judging: Threads


def _serving(
    config: Config,
    service: Daemon,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    egress: Egress,
    processes: int,
) -> Serving:
    """
    Wire all that serves clients; each line makes one object from earlier ones.

    @param refused: ends the daemon, for AWS refuses its credentials.
    @param processes: how many there are that do the same, each its part.
    """
    disk, threads = _disk(service.pools), service.pools.threads
    store = Store(Path(config.cache_dir), time.time)
    scrubbing, judging, probing = threads(1), threads(1), threads(1)
    janitor = Janitor(store, config.cache_limit, disk.writing, reactor)
    tokens = _tokens(config, reactor, partial(_ends, refused, warm=_begin(store, processes)))
    figures, stall = Figures(__version__), LoopStall(reactor)
    upstream, asking = _upstream(config, tokens, figures, egress, reactor)
    cache = Cache(store, janitor, disk, time.time, RegistryId.of_url(config.ecr_endpoint))
    scrub = Scrub(store, janitor.fit, scrubbing.call, reactor)
    purges = Purges(store.index, cache.forget_purged, disk.writing, reactor)
    pull_through = _pull_through(config, upstream, cache, disk, reactor, processes)
    connections, condition = Connections(), Condition(store, probing.call, reactor)
    readiness = partial(_readiness, tokens, asking.circuit, condition, connections)
    crowd = Crowd(config.limits(clients_beside_spare()), processes)
    admission = _admission(config, reactor, service, processes)
    registry = Registry(pull_through, _namespaces(config, judging, reactor), config.cache_key, disk.reading)
    site = make_site(
        registry,
        Ready(readiness),
        reactor,
        admission=admission,
        crowd=crowd,
        access_log=_access_log(config, service, reactor),
        served=figures.served,
        connections=connections,
        pages=_pages(config),
    )
    figures.watch(*of_cache(store, janitor), *of_token(tokens), *of_transfers(pull_through), *of_loop(stall))
    figures.watch(*of_clients(crowd, crowd.limits.connections or None), *of_disk(condition))
    service.add(purges, janitor, scrub, tokens, stall)
    process = Process(store, janitor, asking, pull_through, readiness, disk.reading)
    return Serving(site, connections, admission, figures, process, cache, purges, judging)


def build(
    config: Config,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    supervisor: Supervisor | None = None,
    egress: Egress = Egress(),  # noqa: B008 (it is frozen)
) -> Daemon:
    """
    Wire a daemon of one process.

    @param refused: ends the daemon, for AWS refuses its credentials.
    @param supervisor: the service manager, if it wants to be told.
    """
    serving = _serving(config, service := Daemon(reactor), reactor, refused, egress, 1)
    process, store = serving.process, serving.cache.store
    incidents = Incidents(time.time)
    registry, now = config.ecr_endpoint, time.time
    status = Status(registry, serving.figures, process.readiness, process.standing, incidents, now, reactor)
    describe = partial(_summary, process.readiness, process.janitor)
    supervised = Supervised(supervisor, describe, reactor)
    service.add(*status.services, supervised)
    make = partial(make_admin_site, serving.figures, Ready(process.readiness), status)
    listening = _listening(config, serving.site, reactor)
    listening += _admin(config, make, store, serving.purges.look, service, reactor)
    serving.figures.watch(*of_certificates(partial(_expires, listening)))
    reread = partial(supervised.rereading, partial(_reread, [*listening, serving.admission]))
    Renewal(listening, serving.judging.call, reread, reactor).setServiceParent(service)
    drain = Drain(serving.connections, config.drain_seconds, reactor)
    _face_clients(drain, listening, reread, service.leave, service, reactor)
    return service


def build_worker(config: Config, sockets: int, reactor: Any, egress: Egress) -> Daemon:  # noqa: ANN401
    """
    Wire a worker: what serves clients, on the sockets and with the channel that it has inherited.

    @raise ConfigError: if it has not.
    """
    channel, service, shared = Channel(FromParent), Daemon(reactor), config.share()
    refused: Callable[[CredentialsError], None] = lambda problem: channel.tell(Refused(str(problem)))  # noqa: E731
    serving = _serving(shared, service, reactor, refused, egress, config.worker_processes)
    process, figures, connections = serving.process, serving.figures, serving.connections
    listening = _listening(shared, serving.site, Inherited(reactor, sockets))
    incidents = Incidents(time.time)
    reports = Reports(
        channel,
        figures,
        incidents,
        readiness=process.readiness,
        standing=process.standing,
        reread=partial(_reread_as_told, listening, serving.admission),
        orphaned=partial(_orphaned, connections, service.leave, reactor),
        reactor=reactor,
    )
    service.add(incidents, reports)
    # A service manager may tell all processes to end, and the parent each worker once more. A terminal that hangs up
    # tells all of them: the parent says what is to be read again.
    drain = Drain(connections, config.drain_seconds, reactor)
    _face_clients(drain, listening, lambda: None, lambda _: None, service, reactor)
    try:
        adopt(socket.socket(fileno=CHANNEL_FD), channel, reactor)
    except OSError as problem:
        raise ConfigError(f"{VARIABLE} is for the daemon's own workers: unset it") from problem
    return service


def build_parent(
    config: Config,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    supervisor: Supervisor | None,
    arguments: Sequence[str],
) -> Daemon:
    """
    Wire the parent of workers: sockets that it binds and does not accept from, workers, the operator's port.

    What would keep workers from starting is found here, once.

    @param arguments: the flags that workers are to be started with.
    """
    service = Daemon(reactor)
    renewing, settling = service.pools.threads(1), service.pools.threads(1)
    store = Store(Path(config.cache_dir), time.time)
    _begin(store, config.worker_processes)
    _check_passwords(config)
    listening = [Listening(*named, Nobody(), accepts=False) for named in endpoints(config, reactor)]
    gathered = Gathered(FIGURES)
    figures, incidents = Figures(__version__, gathered.workers), Incidents(time.time)
    workers = Workers(
        config.worker_processes,
        listening,
        arguments,
        gathered,
        partial(_add_up, figures, incidents),
        lambda problem: refused(CredentialsError(problem)),
        reactor,
        drain=config.drain_seconds,
    )
    registry, now = config.ecr_endpoint, time.time
    status = Status(registry, figures, workers.readiness, workers.standing, incidents, now, reactor)
    supervised = Supervised(supervisor, partial(_summary_of_all, workers), reactor, workers.listen)
    make = partial(make_admin_site, figures, Ready(workers.readiness), status, gather=workers.gather)
    purges = Purges(store.index, lambda _: None, settling.call, reactor)  # workers see for themselves
    admin = _admin(config, make, store, purges.look, service, reactor)
    figures.watch(*gathered.readings(), *of_certificates(partial(_expires, [*listening, *admin])))
    reread = partial(supervised.rereading, partial(_have_reread, listening, admin, workers))
    renewal = Renewal([*listening, *admin], renewing.call, reread, reactor)
    service.add(purges, *status.services, supervised, renewal, workers)
    _face_clients(None, [*listening, *admin], reread, service.leave, service, reactor)
    return service


class Nobody(Factory):
    """
    What is behind a socket that is bound here and accepted from by workers.
    """

    noisy = False


def _add_up(figures: Figures, incidents: Incidents, counted: Counted) -> None:
    """
    Add what a worker has counted.
    """
    figures.served.requests.add(counted.requests)
    figures.served.saved.add(counted.saved)
    figures.upstream.add(counted.upstream)
    incidents.add(counted.incidents)


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


def _access_log(config: Config, service: Daemon, reactor: Any) -> AccessLog | None:  # noqa: ANN401
    """
    Have a line logged for each request, if lines of its level are written.
    """
    if config.log_level not in ("debug", "info"):
        return None
    access_log = AccessLog(reactor)
    access_log.setServiceParent(service)
    return access_log


def _listening(config: Config, site: RegistrySite, reactor: Any) -> list[Listening]:  # noqa: ANN401
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
    return [Listening(*named, site, gate=gate) for named in endpoints(config, reactor)]


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
    return upstream, Asking(tokens=tokens, wire=wire, circuit=circuit, governor=governor, clock=reactor)


def _pull_through(
    config: Config,
    upstream: Upstream,
    cache: Cache,
    disk: Disk,
    reactor: Any,  # noqa: ANN401
    processes: int,
) -> PullThrough:
    """
    Wire what answers from the cache, or through it.
    """
    lanes = Lanes(config.blob_connections, config.bucket_connections, share(BUFFERED, processes))
    return PullThrough(
        upstream,
        cache,
        disk,
        time.time,
        tag_ttl=config.tag_ttl,
        lanes=lanes,
        read_ahead=config.read_ahead,
        unattended=share(MOST, processes),
        call_later=reactor.callLater,
    )


def _namespaces(config: Config, judging: Threads, reactor: Any) -> Namespaces:  # noqa: ANN401
    registries = {RegistryId.of_url(config.ecr_endpoint), *(config.registry_aliases or ())}
    return Namespaces(config.namespace_pattern, judging.call, reactor, registries)


def _face_clients(
    drain: Drain | None,
    listening: Sequence[Listening],
    reread: Callable[[], None],
    at_once: Callable[[int], object],
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> None:
    """
    Let clients in, and signals. Whatever responses need comes before this, for the last are the first to stop.

    @param drain: none where nobody is let in.
    """
    if drain is not None:
        service.add(drain)
    service.add(*listening, Signals(reactor, partial(_stop, reactor), at_once, reread))


def _admin(
    config: Config,
    make_site: Callable[..., RegistrySite],
    store: Store,
    purged: Callable[[], Awaitable[None]],
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> list[Listening]:
    """
    Make what listens for the operator, if there is such a port.

    Where nobody chose it, its being taken keeps the daemon from nothing. The work on the cache has threads of its own.

    @param purged: has what this process holds in memory forgotten.
    """
    named = admin_endpoint(config, reactor)
    if named is None:
        return []
    listing, hashing = service.pools.threads(1, yielding=False), service.pools.threads(1)
    api = Api(Inventory(store), purged, listing.call, hashing.call, reactor)
    hosts = {socket.gethostname().lower(), *(config.admin_hosts or ())}
    site = make_site(api, reactor, frozenset(hosts))
    needed = str(config.admin_listen) != ADMIN_LISTEN
    return [Listening(*named, site, needed=needed, gate=Gate(reactor))]


def _expires(listening: Sequence[Listening]) -> float | None:
    """
    Tell when the certificate that clients are shown ends, the first if there are several.
    """
    return min((each.expires for each in listening if each.expires), default=None)


def _reread(parts: Sequence[Listening | Admission]) -> None:
    """
    Read certificates and passwords again.
    """
    for each in parts:
        each.reread()


def _have_reread(listening: Sequence[Listening], admin: Sequence[Listening], workers: Workers) -> None:
    """
    See whether the certificates can be used, and have workers read those for clients, and passwords, again.
    """
    _reread(admin)
    found = generation(listening)  # before they are read: what changes in between is none that was found good
    news = [each.reread() for each in listening]
    workers.tell(Reread(found if any(news) else ""))


def _reread_as_told(listening: Sequence[Listening], admission: Admission, certificates: str) -> None:
    """
    Read passwords again, and the certificates that the parent has found good, if they are still those.
    """
    if certificates == generation(listening):
        _reread(listening)
    admission.reread()


def _fetch(config: Config) -> Token:
    """
    Fetch a token, in a thread.
    """
    token = fetch_token(config.region, instance_auth=config.instance_auth)
    set_aside_what_stays()
    return token


def _orphaned(connections: Connections, leave: Callable[[int], object], reactor: Any) -> None:  # noqa: ANN401
    """
    End a worker whose parent has gone.
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


async def _summary(readiness: Callable[[], Awaitable[Readiness]], janitor: Janitor) -> str:
    return summary(await readiness(), janitor.held, janitor.limit)


async def _summary_of_all(workers: Workers) -> str:
    standing = await workers.standing()
    return summary(standing.readiness, standing.cache.bytes, standing.cache.limit)


def _ends(refused: Callable[[CredentialsError], None], problem: CredentialsError, *, warm: bool) -> bool:
    """
    End the daemon if it can serve nothing without AWS; tell whether it ends.
    """
    if not warm:
        refused(problem)
    return not warm


def _begin(store: Store, processes: int) -> bool:
    """
    Prepare the cache directory; tell whether it has content, as far as is known.

    A disk that is full, fails or hangs ends no daemon that runs, and keeps none from starting: L{Troubles} tells of it.

    @raise ConfigError: if it can't be the cache directory, or not be shared by C{processes}.
    """

    def begin() -> tuple[bool, bool]:
        warm = store.begin()
        try:
            return warm, store.has_locks()
        except OSError:  # it takes no file at the moment
            return warm, True

    try:
        warm, has_locks = in_time(begin, START_SECONDS)
    except TimeoutError as problem:
        store.troubles.failed(Kind.WRITE, problem)
        return True
    except OSError as problem:
        raise ConfigError(
            f"PROXY_CACHE_DIR={str(store.root)!r}: can't be written: {problem.strerror}; give a directory that can"
        ) from problem
    if not has_locks:
        no_locks = (
            f"PROXY_CACHE_DIR={str(store.root)!r}: the file system has no working flock(2), so only one process may"
            " use the directory; use a local file system, or PROXY_WORKER_PROCESSES=1 and no second daemon"
        )
        if processes > 1:
            raise ConfigError(no_locks)
        log.warn("{problem}", problem=no_locks)
    if processes > 1 and store.index.unfit:
        raise ConfigError(
            f"PROXY_CACHE_DIR={str(store.root)!r}: {store.index.problem};"
            " several processes need that, PROXY_WORKER_PROCESSES=1 does not"
        )
    return warm


def _pages(config: Config) -> Pages:
    return Pages(config.allow_origin, proved=config.htpasswd is not None or config.client_ca is not None)


def _check_passwords(config: Config) -> None:
    """
    See that the passwords can be used.

    @raise ConfigError: if not.
    """
    try:
        if config.htpasswd is not None:
            read_users(config.htpasswd)
    except HtpasswdError as problem:
        raise ConfigError(f"PROXY_HTPASSWD={config.htpasswd!r}: {problem}") from problem


def _admission(config: Config, reactor: Any, service: Daemon, processes: int) -> Admission:  # noqa: ANN401
    """
    Make what lets clients in; C{service} runs what of it runs by itself.

    @param processes: how many there are that do the same, each its part.
    @raise ConfigError: if the passwords can't be used.
    """
    passwords = None
    if config.htpasswd is not None:
        checking = service.pools.threads(AT_ONCE)
        _check_passwords(config)
        passwords = Passwords(config.htpasswd, checking.call, reactor, secrets.token_bytes(32), processes)
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

    if refused:  # by another worker
        return
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
