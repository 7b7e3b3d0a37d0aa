"""
What serves clients in one process, wired from the settings: all but the sockets that they come to.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger
from twisted.names.client import Resolver

from ecrproxy import __version__
from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.htpasswd import HtpasswdError, read_users
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
from ecrproxy.admin.status import Asking, Process
from ecrproxy.cache.condition import Condition
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.scribe import Scribe
from ecrproxy.cache.scrub import Scrub
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import Kind
from ecrproxy.cached import VERIFICATIONS, Cache
from ecrproxy.daemon.ending import Connections
from ecrproxy.daemon.process import clients_beside_spare, set_aside_what_stays
from ecrproxy.daemon.service import Daemon
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.http.web import Registry
from ecrproxy.metrics import Figures, LoopStall
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import UpstreamAgent
from ecrproxy.registry.ecr import Credentials, CredentialsError, Token, TokenService, fetch_token
from ecrproxy.registry.egress import Egress, OwnNames
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.registry.resolver import ChosenServers, hosts_names
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.upstream import Upstream
from ecrproxy.registry.wire import Wire
from ecrproxy.settings.config import Config, ConfigError
from ecrproxy.settings.registries import RegistryTable
from ecrproxy.shares import share
from ecrproxy.threads import Disk, Pools, Threads, call_unowned, in_time
from ecrproxy.transfer.inflow import BUFFERED, Lanes
from ecrproxy.transfer.unattended import MOST
from ecrproxy.upstreams import Upstreams

log = Logger()

READING: Final = 8, 5.0
WRITING: Final = 8, 8.0
COMMITTING: Final = 4, 60.0
HASHING: Final = VERIFICATIONS, 30.0
KEEPING: Final = 4, 8.0
SETTLING: Final = 1, 8.0
"""Threads for the disk, by the kind of work; and for how many seconds a call is waited for: the disk may hang.

A pull that meets a disk which hangs reads, and then writes: its client waits 30 s at the most."""
DIGESTING: Final = 4
START_SECONDS: Final = 8.0
"""How long the start waits for the disk."""


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


def wire(
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
    keeping, settling = threads(KEEPING[0]).bounded(KEEPING[1]), threads(SETTLING[0]).bounded(SETTLING[1])
    janitor = Janitor(store, config.cache_limit, keeping, reactor)
    tokens = _tokens(config, reactor, partial(_ends, refused, warm=begin(store, processes)))
    figures, stall = Figures(__version__), LoopStall(reactor, time.monotonic)
    registries = Registries(config.registries, config.registry_aliases or ())
    upstreams = _upstreams(config, registries, tokens, figures, egress, reactor)
    cache = Cache(store, janitor, disk, time.time)
    scrub = Scrub(store, janitor.fit, scrubbing.call, reactor)
    purges = Purges(store.index, cache.forget_purged, settling, reactor)
    pull_through = _pull_through(config, upstreams, cache, disk, reactor, processes)
    connections, condition = Connections(), Condition(store, probing.call, reactor)
    readiness = partial(_readiness, upstreams, condition, connections)
    crowd = Crowd(config.limits(clients_beside_spare()), processes)
    admission = _admission(config, reactor, service, processes)
    namespaces = _namespaces(config, judging, reactor)
    registry = Registry(pull_through, registries, namespaces, config.cache_key, disk.reading)
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
    figures.watch(
        *of_cache(store, janitor), *of_registries(upstreams.askings), *of_transfers(pull_through), *of_loop(stall)
    )
    figures.watch(*of_clients(crowd, crowd.limits.connections or None), *of_disk(condition))
    service.add(Scribe(store.index, threads(1, yielding=False).post), purges, janitor, scrub, *tokens.values(), stall)
    process = Process(store, janitor, upstreams.askings, pull_through, registries.called, readiness, disk.reading)
    return Serving(site, connections, admission, figures, process, cache, purges, judging)


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
    Make the log of requests; None if lines of its level are not written.
    """
    if config.log_level not in ("debug", "info"):
        return None
    access_log = AccessLog(reactor)
    access_log.setServiceParent(service)
    return access_log


def _tokens(
    config: Config,
    reactor: Any,  # noqa: ANN401
    ends: Callable[[CredentialsError], bool],
) -> Mapping[tuple[Credentials, str], TokenService]:
    """
    Make what keeps a token for each of the credentials in each region, the default registry's first.

    @param ends: told of credentials of the default registry that AWS refuses; returns whether that ends the daemon.
    """
    tokens: dict[tuple[Credentials, str], TokenService] = {}
    for table in config.registries:
        key = credentials, region = _credentials(table)
        if key not in tokens:
            fetch = partial(call_unowned, reactor, partial(_fetch, credentials, region))
            whose = table.name if len(config.registries) > 1 else ""
            tokens[key] = TokenService(fetch, reactor, time.time, (lambda _: False) if tokens else ends, whose=whose)
    return tokens


def _credentials(table: RegistryTable) -> tuple[Credentials, str]:
    """
    Return the credentials for a registry, and the region in which their token is good.
    """
    return Credentials(table.role, table.external_id, table.profile, table.instance_auth), table.region or ""


def _upstreams(
    config: Config,
    registries: Registries,
    tokens: Mapping[tuple[Credentials, str], TokenService],
    figures: Figures,
    egress: Egress,
    reactor: Any,  # noqa: ANN401
) -> Upstreams:
    """
    Wire what asks registries and their buckets.
    """
    outside = OwnNames(reactor)  # before the chosen servers are installed
    forget = _install_resolver(config, reactor)
    budget = Budget(config.upstream_tries, config.upstream_seconds)

    def make(known: Known) -> tuple[Upstream, Asking]:
        who = known.table.name if len(config.registries) > 1 else "ECR"
        url, its_tokens = known.table.endpoint or "", tokens[_credentials(known.table)]
        agent = UpstreamAgent(reactor, url, forget, egress=egress, outside=outside)
        wire = Wire(MeteredAgent(agent, url, figures.upstream, reactor, known.label), reactor, budget)
        governor, circuit = Governor(config.ecr_quotas, config.ecr_connections, reactor), Circuit(reactor.seconds, who)
        upstream = Upstream(
            Endpoint(url, wire, its_tokens, governor, circuit), wire, stall_seconds=config.stall_seconds
        )
        asking = Asking(
            name=known.table.name,
            label=known.label,
            tokens=its_tokens,
            wire=wire,
            circuit=circuit,
            governor=governor,
            clock=reactor,
        )
        return upstream, asking

    return Upstreams(registries, make)


def _pull_through(
    config: Config,
    upstreams: Upstreams,
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
        upstreams,
        cache,
        disk,
        time.time,
        tag_ttl=config.tag_ttl,
        lanes=lanes,
        read_ahead=config.read_ahead,
        unattended=share(MOST, processes),
        call_later=reactor.callLater,
    )


def _namespaces(config: Config, judging: Threads, reactor: Any) -> Callable[[Known], Namespaces]:  # noqa: ANN401
    """
    Give the namespaces of a registry.
    """
    patterns = {each.namespaces or config.namespace_pattern for each in config.registries}
    judges = {pattern: Namespaces(pattern, judging.call, reactor) for pattern in patterns}
    return lambda known: judges[known.table.namespaces or config.namespace_pattern]


def _fetch(credentials: Credentials, region: str) -> Token:
    """
    Fetch a token, in a thread.
    """
    token = fetch_token(region, credentials)
    set_aside_what_stays()
    return token


async def _readiness(upstreams: Upstreams, condition: Condition, connections: Connections) -> Readiness:
    """
    Return what this process can do at the moment.
    """
    found = await condition.latest()
    return judge(
        draining=connections.draining,
        sources=[each.source() for each in upstreams.askings()],
        disk=found.reasons,
        filled=found.filled,
    )


def _ends(refused: Callable[[CredentialsError], None], problem: CredentialsError, *, warm: bool) -> bool:
    """
    End the daemon if it can serve nothing without AWS; tell whether it ends.
    """
    if not warm:
        refused(problem)
    return not warm


def begin(store: Store, processes: int) -> bool:
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


def check_passwords(config: Config) -> None:
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
        checking, reading = service.pools.threads(AT_ONCE), service.pools.threads(1)
        check_passwords(config)
        key = secrets.token_bytes(32)
        passwords = Passwords(config.htpasswd, checking.call, reactor, key, processes, reading=reading.call)
        passwords.setServiceParent(service)
    return Admission(config.allow_from, certificates=config.client_ca is not None, passwords=passwords)


def _install_resolver(config: Config, reactor: Any) -> Callable[[str], None]:  # noqa: ANN401
    """
    Resolve upstream names with the chosen servers.

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
