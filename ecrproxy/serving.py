"""
Everything that serves clients in one process, wired from the settings, except the listening sockets.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from twisted.application.service import MultiService
from twisted.logger import Logger
from twisted.names.client import Resolver

from ecrproxy import __version__
from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.htpasswd import HtpasswdError, UnreadableError, read_users
from ecrproxy.access.limits import Crowd
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.access.passwords import AT_ONCE, Passwords
from ecrproxy.admin.readings import (
    of_cache,
    of_clients,
    of_disk,
    of_loop,
    of_registries,
    of_transfers,
)
from ecrproxy.admin.snapshot import Clients
from ecrproxy.admin.status import Asking, Process
from ecrproxy.cache.condition import Condition
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.kept_open import KeptOpen
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.scribe import Scribe
from ecrproxy.cache.scrub import Scrub
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import Kind
from ecrproxy.cached import VERIFICATIONS, Cache
from ecrproxy.catalog import Catalog
from ecrproxy.daemon.ending import Connections
from ecrproxy.daemon.process import clients_beside_spare, kept_files, set_aside_what_stays
from ecrproxy.daemon.renewal import Renewal
from ecrproxy.daemon.service import Daemon
from ecrproxy.files import Reading, unread
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.hot_path import HotPath
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId
from ecrproxy.metrics import Figures, LoopStall
from ecrproxy.otel import LAST_SECONDS, OtelTracing, exporter
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.reading_ahead import ReadingAhead, Transfers
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.authorization import Authorization, Basic, Tokens
from ecrproxy.registry.bearer import Bearer
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import UpstreamAgent
from ecrproxy.registry.ecr import Credentials, CredentialsError, Token, TokenService, fetch_token
from ecrproxy.registry.egress import Egress, OwnNames
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.login import Login
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.registry.quotas import PUBLIC_RATES, Quotas
from ecrproxy.registry.replicas import Replicated
from ecrproxy.registry.repositories import list_repositories
from ecrproxy.registry.resolver import ChosenServers, SharedLookups, hosts_names
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.trust import AUTHORITIES, Trust
from ecrproxy.registry.upstream import Upstream
from ecrproxy.registry.wire import Wire
from ecrproxy.settings.config import Config, ConfigError
from ecrproxy.settings.registries import Protocol, RegistryTable, replicas_of
from ecrproxy.shares import share
from ecrproxy.threads import Disk, InThread, Pools, Threads, call_unowned, in_time, patient
from ecrproxy.transfer.inflow import BUFFERED, Lanes
from ecrproxy.transfer.unattended import MOST
from ecrproxy.upstreams import Upstreams
from ecrproxy.world import World, Worlds

log = Logger()

WireOne = Callable[[TokenService | None, str, Known, Sequence[Upstream]], tuple[Upstream, Asking]]
"""Wires a registry from its token, its name in the log, what is known of it, and its replicas."""

READING: Final = 8, 5.0
WRITING: Final = 8, 8.0
COMMITTING: Final = 4, 60.0
HASHING: Final = VERIFICATIONS, 30.0
KEEPING: Final = 4, 8.0
SETTLING: Final = 1, 8.0
"""Threads for each kind of disk work, and the timeout of a disk call in seconds: the disk may hang.

On a hanging disk, a pull reads and then writes: its client waits 30 s at most."""
DIGESTING: Final = 4
START_SECONDS: Final = 8.0
"""Timeout for the disk at startup, in seconds."""


@dataclass(frozen=True, slots=True)
class Serving:
    """
    The parts that serve clients in this process, except the listening sockets.

    @ivar use: makes new requests use the registries of other settings; ignores the rest of these.
    """

    site: RegistrySite
    connections: Connections
    admission: Admission
    figures: Figures
    process: Process
    cache: Cache
    purges: Purges
    stall: LoopStall
    use: Callable[[Config], None]


def wire(
    config: Config,
    service: Daemon,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    egress: Egress,
    processes: int,
) -> Serving:
    """
    Wire everything that serves clients; each line makes one object from earlier ones.

    @param refused: called when AWS rejects the credentials; shuts down.
    @param processes: number of processes that share the limits.
    """
    disk, threads = _disk(service.pools), service.pools.threads
    store = _store(config, KeptOpen(kept_files(), reactor, disk.closing))
    keeping, settling = threads(KEEPING[0]).bounded(KEEPING[1]), threads(SETTLING[0]).bounded(SETTLING[1])
    janitor = Janitor(store, config.cache_limit, keeping, reactor)
    tokens = AwsTokens(reactor, partial(_ends, refused, warm=begin(store, processes)))
    figures, stall, trust = Figures(__version__), LoopStall(reactor, time.monotonic), _trust(egress, service, reactor)
    make = partial(_world, tokens, _wiring(config, figures, egress, trust, reactor), threads(1), reactor)
    worlds = Worlds(make(config))
    cache = Cache(store, janitor, disk, time.time, worlds.checks)
    scrub = Scrub(store, janitor.fit, threads(1).call, reactor)
    purges = Purges(store.index, cache.forget_purged, settling, reactor)
    connections, condition = Connections(), Condition(store, threads(1).call, reactor)
    pull_through = _pull_through(config, worlds, cache, disk, reactor, processes, connections)
    readiness = partial(_readiness, worlds.askings, condition, connections)
    limits, admission = config.limits(clients_beside_spare()), _admission(config, reactor, service, processes)
    crowd = Crowd(limits, processes)
    site = make_site(
        Registry(pull_through, worlds, config.cache_key, disk.reading),
        Ready(readiness),
        reactor,
        admission=admission,
        crowd=crowd,
        access_log=_access_log(config, service, reactor),
        served=figures.served,
        connections=connections,
        pages=_pages(config),
        hot_path=_hot_path(pull_through, worlds, admission, disk.reading) if _may_repeat(config) else None,
        tracing=_tracing(config, service, reactor),
    )
    figures.watch(
        *of_cache(store, janitor), *of_registries(worlds.askings), *of_transfers(pull_through), *of_loop(stall)
    )
    figures.watch(*of_clients(crowd, crowd.limits.connections or None), *of_disk(condition))
    service.add(Scribe(store.index, threads(1, yielding=False).post), purges, janitor, scrub, tokens, stall)
    clients = partial(_clients, crowd, stall)
    process = Process(store, janitor, worlds.askings, pull_through, worlds.called, readiness, disk.reading, clients)
    return Serving(site, connections, admission, figures, process, cache, purges, stall, partial(_use, worlds, make))


def _clients(crowd: Crowd, stall: LoopStall) -> Clients:
    return Clients(crowd.connected, crowd.limits.connections or None, crowd.transferring, stall.lately)


def _store(config: Config, kept: KeptOpen) -> Store:
    store = Store(Path(config.cache_dir), time.time)
    store.kept = kept
    return store


def _hot_path(pull_through: PullThrough, worlds: Worlds, admission: Admission | None, in_thread: InThread) -> HotPath:
    return HotPath(pull_through, worlds, admission, time.time, in_thread, secrets.token_bytes(32))


def _may_repeat(config: Config) -> bool:
    """
    Return True if equal requests may have equal answers, with nothing else to be noted of each.
    """
    return not config.cache_key.asks and config.otlp_endpoint is None


def _tracing(config: Config, service: Daemon, reactor: Any) -> OtelTracing | None:  # noqa: ANN401
    """
    Make what sends traces; None if no collector is configured.
    """
    if config.otlp_endpoint is None:
        return None
    in_thread = service.pools.threads(1).bounded(LAST_SECONDS)
    tracing = OtelTracing(partial(exporter, config.otlp_endpoint), in_thread, reactor)
    service.add(tracing)
    return tracing


def _disk(pools: Pools) -> Disk:
    return Disk(
        reading=pools.threads(READING[0]).bounded(READING[1]),
        writing=pools.threads(WRITING[0]).bounded(WRITING[1]),
        committing=patient(pools.threads(COMMITTING[0]).bounded(COMMITTING[1])),
        hashing=patient(pools.threads(HASHING[0]).bounded(HASHING[1])),
        digesting=pools.threads(DIGESTING).call,
        closing=pools.threads(1).call,
    )


def _access_log(config: Config, service: Daemon, reactor: Any) -> AccessLog | None:  # noqa: ANN401
    """
    Make the access log; None if the log level excludes it.
    """
    if config.log_level not in ("debug", "info"):
        return None
    access_log = AccessLog(reactor)
    access_log.setServiceParent(service)
    return access_log


class AwsTokens(MultiService):
    """
    Keeps one token for each pair of credentials and region.

    @param ends: called if AWS rejects the first credentials, the default registry's at startup; returns True if that
        shuts the daemon down.
    """

    def __init__(self, reactor: Any, ends: Callable[[CredentialsError], bool]) -> None:  # noqa: ANN401
        super().__init__()
        self._reactor, self._ends = reactor, ends
        self._kept: dict[tuple[Credentials, str], TokenService] = {}

    def keep(self, tables: Sequence[RegistryTable]) -> Mapping[tuple[Credentials, str], TokenService]:
        """
        Keep the tokens that the tables need, and stop all others. Existing ones are reused.
        """
        before, self._kept = self._kept, {}
        for each in tables:
            key = _credentials(each)
            if _takes_tokens(each) and key not in self._kept:
                whose = each.name if len(tables) > 1 else ""
                self._kept[key] = before.pop(key) if key in before else self._begin(*key, whose)
        for gone in before.values():
            gone.disownServiceParent()
        return self._kept

    def _begin(self, credentials: Credentials, region: str, whose: str) -> TokenService:
        ends = (lambda _: False) if self.services else self._ends
        fetch = partial(call_unowned, self._reactor, partial(_fetch, credentials, region))
        service = TokenService(fetch, self._reactor, time.time, ends, whose=whose)
        service.setServiceParent(self)
        return service


def _takes_tokens(table: RegistryTable) -> bool:
    """
    Return True if a registry uses AWS's tokens.
    """
    return table.protocol is not Protocol.OCI and not table.anonymous


def _credentials(table: RegistryTable) -> tuple[Credentials, str]:
    """
    Return the credentials for a registry, and the region where their token is valid.
    """
    public = table.protocol is Protocol.ECR_PUBLIC
    return Credentials(table.role, table.external_id, table.profile, table.instance_auth, public), table.region or ""


def _authorization(
    table: RegistryTable,
    url: str,
    wire: Wire,
    tokens: TokenService | None,
    reactor: Any,  # noqa: ANN401
) -> Authorization:
    """
    Make the source of a registry's Authorization headers.

    @param tokens: AWS's tokens, if the registry uses them.
    """
    if table.protocol is Protocol.ECR and tokens is not None:
        return Basic(tokens)
    login: Tokens | None = tokens
    if table.username is not None and table.password_file is not None:
        login = Login(table.username, Path(table.password_file), partial(call_unowned, reactor), reactor)
    return Bearer(url, wire, login, table.realms)


def quotas_of(config: Config, table: RegistryTable) -> Quotas:
    """
    Return the request quotas of a registry.
    """
    match table.protocol:
        case Protocol.ECR:
            return config.ecr_quotas
        case Protocol.ECR_PUBLIC:
            rate = PUBLIC_RATES[table.anonymous]
            return Quotas(rate, rate, rate, rate).share(config.worker_processes)
    return Quotas().share(config.worker_processes)


def _trust(egress: Egress, service: Daemon, reactor: Any) -> Trust:  # noqa: ANN401
    """
    Read the CAs for upstream, and reload them when their file changes.

    @raise ConfigError: if the file is unusable.
    """
    try:
        trust = Trust(egress.authorities)
    except OSError as problem:
        what = f"SSL_CERT_FILE={egress.authorities!r}"
        raise ConfigError(f"{what}: {unread(problem)}; give a PEM file of CAs") from problem
    reading = service.pools.threads(1).call
    again = Reading(AUTHORITIES, trust.load, trust.use, reading, reactor).again
    Renewal([trust], reading, again, reactor, what=AUTHORITIES).setServiceParent(service)
    return trust


def _wiring(
    config: Config,
    figures: Figures,
    egress: Egress,
    trust: Trust,
    reactor: Any,  # noqa: ANN401
) -> WireOne:
    """
    Return a function that wires everything for requests to one registry and its buckets.
    """
    outside = OwnNames(reactor)  # before the configured name servers are installed
    forget = _install_resolver(config, reactor)
    budget = Budget(config.upstream_tries, config.upstream_seconds)

    def make(
        tokens: TokenService | None, who: str, known: Known, replicas: Sequence[Upstream]
    ) -> tuple[Upstream, Asking]:
        table, url = known.table, known.table.endpoint or ""
        agent = UpstreamAgent(reactor, url, forget, trust, egress, outside, name=who)
        metered = MeteredAgent(agent, url, figures.upstream, reactor, known.label)
        wire = Wire(metered, reactor, budget, leave=agent.leave, name=who)
        governor = Governor(quotas_of(config, table), config.ecr_connections, reactor, who)
        circuit = Circuit(reactor.seconds, who)
        authorization = _authorization(table, url, wire, tokens, reactor)
        endpoint = Endpoint(url, wire, authorization, governor, circuit)
        upstream = Upstream(
            endpoint,
            wire,
            stall_seconds=config.stall_seconds,
            follows=table.protocol is Protocol.OCI,
            lists_referrers=table.protocol is Protocol.ECR,
        )
        if replicas:
            upstream = Replicated(endpoint, wire, replicas, stall_seconds=config.stall_seconds)
        asking = Asking(
            name=table.name,
            label=known.label,
            tokens=tokens,
            wire=wire,
            circuit=circuit,
            governor=governor,
            clock=reactor,
        )
        return upstream, asking

    return make


def _world(
    tokens: AwsTokens,
    wire_one: WireOne,
    judging: Threads,
    reactor: Any,  # noqa: ANN401
    config: Config,
    before: Upstreams | None = None,
) -> World:
    """
    Wire the registries of the settings; reuse those in C{before} whose tables are equal.
    """
    registries = Registries(config.registries, config.registry_aliases or (), config.unknown_registry_status)
    namespaces = _namespaces(config, judging, reactor)
    tables = [*config.registries, *(replica for each in config.registries for replica in replicas_of(each))]
    kept = tokens.keep(tables)

    def make(known: Known) -> tuple[Upstream, Asking]:
        copies = [Known(each, RegistryId.of_host(each.name), known.label) for each in replicas_of(known.table)]
        replicas = [make(each)[0] for each in copies]
        name = known.table.name if len(tables) > 1 else "ECR"
        return wire_one(kept.get(_credentials(known.table)), name, known, replicas)

    upstreams = Upstreams(registries, make, before)
    return World(registries, upstreams, namespaces, _catalog(registries, namespaces, reactor))


def _use(worlds: Worlds, make: Callable[[Config, Upstreams], World], config: Config) -> None:
    worlds.latest = make(config, worlds.latest.upstreams)


def _pull_through(
    config: Config,
    worlds: Worlds,
    cache: Cache,
    disk: Disk,
    reactor: Any,  # noqa: ANN401
    processes: int,
    connections: Connections,
) -> PullThrough:
    """
    Wire the handler of pulls: from the cache, or from upstream through the cache.
    """
    lanes = Lanes(config.blob_connections, config.bucket_connections, share(BUFFERED, processes))
    return PullThrough(
        worlds.upstream,
        cache,
        disk,
        time.time,
        tag_ttl=config.tag_ttl,
        lanes=lanes,
        ahead=_reading_ahead(config, cache, connections, reactor, processes),
        unattended=share(MOST, processes),
        call_later=reactor.callLater,
    )


def _reading_ahead(
    config: Config,
    cache: Cache,
    connections: Connections,
    reactor: Any,  # noqa: ANN401
    processes: int,
) -> Callable[[Transfers], ReadingAhead] | None:
    """
    Return a factory of the read-ahead; None if it is off.
    """
    if not config.read_ahead:
        return None

    def make(transfers: Transfers) -> ReadingAhead:
        may = lambda: not connections.draining  # noqa: E731 (short)
        return ReadingAhead(transfers, cache, time.time, reactor.callLater, may, processes)

    return make


def _namespaces(config: Config, judging: Threads, reactor: Any) -> Callable[[Known], Namespaces]:  # noqa: ANN401
    """
    Return a factory of a registry's namespaces.
    """
    patterns = {each.namespaces or config.namespace_pattern for each in config.registries}
    judges = {pattern: Namespaces(pattern, judging.call, reactor) for pattern in patterns}
    return lambda known: judges[known.table.namespaces or config.namespace_pattern]


def _catalog(registries: Registries, namespaces: Callable[[Known], Namespaces], reactor: Any) -> Catalog:  # noqa: ANN401
    """
    Wire the list of the default registry's repositories.
    """
    default = registries.default
    credentials, region = _credentials(default.table)
    account, _ = default.identity.account_and_region or (None, None)

    def ask() -> list[str]:
        names = registries.listed(list_repositories(region, credentials, account))
        set_aside_what_stays()
        return names

    return Catalog(partial(call_unowned, reactor, ask), namespaces(default).choose, reactor)


def _fetch(credentials: Credentials, region: str) -> Token:
    """
    Fetch a token. Blocks; call in a thread.
    """
    token = fetch_token(region, credentials)
    set_aside_what_stays()
    return token


async def _readiness(
    askings: Callable[[], Sequence[Asking]], condition: Condition, connections: Connections
) -> Readiness:
    """
    Return the readiness of this process.
    """
    found = await condition.latest()
    return judge(
        draining=connections.draining,
        sources=[each.source() for each in askings()],
        disk=found.reasons,
        filled=found.filled,
        index=found.index,
    )


def _ends(refused: Callable[[CredentialsError], None], problem: CredentialsError, *, warm: bool) -> bool:
    """
    Shut down if the daemon can serve nothing without AWS; return True if so.
    """
    if not warm:
        refused(problem)
    return not warm


def begin(store: Store, processes: int) -> bool:
    """
    Prepare the cache directory; return True if it is known to have content.

    A disk that is full, fails or hangs neither stops the daemon nor prevents a start: L{Troubles} reports it.

    @raise ConfigError: if the directory is unusable, or can't be shared by C{processes}.
    """

    def begin() -> tuple[bool, bool]:
        warm = store.begin()
        try:
            return warm, store.has_locks()
        except OSError:  # no file can be written at the moment
            return warm, True

    try:
        warm, has_locks = in_time(begin, START_SECONDS)
    except TimeoutError as problem:
        store.troubles.failed(Kind.WRITE, problem)
        return True
    except OSError as problem:
        what_to_do = "" if problem.errno == errno.EXDEV else "; give a directory that can"
        raise ConfigError(
            f"PROXY_CACHE_DIR={str(store.root)!r}: can't be written: {problem.strerror}{what_to_do}"
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


def check_passwords(config: Config) -> None:
    """
    Check that the password file is usable.

    @raise ConfigError: if not.
    """
    try:
        if config.htpasswd is not None:
            read_users(config.htpasswd)
    except HtpasswdError as problem:
        advice = "; give a file that it can read" if isinstance(problem, UnreadableError) else ""
        raise ConfigError(f"PROXY_HTPASSWD={config.htpasswd!r}: {problem}{advice}") from problem


def _admission(config: Config, reactor: Any, service: Daemon, processes: int) -> Admission:  # noqa: ANN401
    """
    Make the admission of clients; C{service} runs its background parts.

    @param processes: number of processes that share the limits.
    @raise ConfigError: if the password file is unusable.
    """
    passwords = None
    if config.htpasswd is not None:
        checking, reading = service.pools.threads(AT_ONCE), service.pools.threads(1)
        check_passwords(config)
        key = secrets.token_bytes(32)
        passwords = Passwords(config.htpasswd, checking.call, reactor, key, processes, reading=reading.call)
        passwords.setServiceParent(service)
    return Admission(config.allow_from, certificates=config.client_ca is not None, passwords=passwords)


def _install_resolver(config: Config, reactor: Any) -> Callable[[str], None]:  # noqa: ANN401
    """
    Resolve upstream names with the configured servers, or the host's resolver; concurrent lookups of a name are shared.

    @return: a function that drops the remembered addresses of a name.
    """
    if config.dns_resolver is None:
        shared = SharedLookups(reactor.nameResolver, reactor)
        reactor.installNameResolver(shared)
        return shared.forget
    try:
        local = hosts_names(Path("/etc/hosts").read_text("utf-8", "replace"))
    except OSError:
        local = []
    servers = Resolver(servers=list(config.dns_resolver), reactor=reactor)
    chosen = ChosenServers(servers, reactor.nameResolver, local, reactor)
    shared = SharedLookups(chosen, reactor)
    reactor.installNameResolver(shared)

    def forget(name: str) -> None:
        chosen.forget(name)
        shared.forget(name)

    return forget
