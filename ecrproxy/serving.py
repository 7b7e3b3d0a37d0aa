"""
Everything that serves clients in one process, wired from the settings, except the listening sockets.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from ecrproxy import __version__
from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.htpasswd import HtpasswdError, UnreadableError, read_users
from ecrproxy.access.limits import Crowd
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
from ecrproxy.cache.troubles import TroubleKind
from ecrproxy.cached.cache import Cache
from ecrproxy.cached.verifications import VERIFICATIONS
from ecrproxy.daemon.ending import Connections
from ecrproxy.daemon.process import clients_beside_spare, kept_files
from ecrproxy.daemon.service import Daemon
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.hot_path import HotPath
from ecrproxy.http.site import RegistrySite, make_site
from ecrproxy.http.web import Registry
from ecrproxy.identity import Repository
from ecrproxy.metrics import Figures, LoopStall
from ecrproxy.otel import OtelTracing, spans_to
from ecrproxy.prefetch_progress import RunningPrefetch
from ecrproxy.prefetching import Prefetching
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.reading_ahead import ReadingAhead, Transfers
from ecrproxy.registry.aws import CredentialsError
from ecrproxy.registry.egress import Egress
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import ConfigError
from ecrproxy.shares import share
from ecrproxy.thread_pools import Pools, call_unowned, in_time
from ecrproxy.threads import Disk, InThread, patient
from ecrproxy.transfer.inflow import BUFFERED, Lanes
from ecrproxy.transfer.unattended import MOST
from ecrproxy.upstream_wiring import AwsTokens, make_world, trust_of, use, wiring
from ecrproxy.world import Worlds

log = Logger()


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

    @ivar prefetch: begins a prefetch: see L{Prefetching.begin}.
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
    prefetch: Callable[[Repository, str, Sequence[str]], RunningPrefetch]
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
    figures, stall, trust = Figures(__version__), LoopStall(reactor, time.monotonic), trust_of(egress, service, reactor)
    make = partial(make_world, tokens, wiring(config, figures, egress, trust, reactor), threads(1), reactor)
    worlds = Worlds(make(config))
    cache = Cache(store, janitor, disk, time.time, worlds.checks)
    scrub = Scrub(store, janitor.fit, threads(1).call, reactor)
    purges, again = Purges(store.index, cache.forget_purged, settling, reactor), partial(use, worlds, make)
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
        hot_path=None if config.cache_key.asks else _hot_path(pull_through, worlds, admission, disk.reading),
        tracing=_tracing(config, service, reactor),
    )
    figures.watch(
        *of_cache(store, janitor), *of_registries(worlds.askings), *of_transfers(pull_through), *of_loop(stall)
    )
    figures.watch(*of_clients(crowd, crowd.limits.connections or None), *of_disk(condition))
    service.add(Scribe(store.index.changes, threads(1, yielding=False).post), purges, janitor, scrub, tokens, stall)
    clients, prefetch = partial(_clients, crowd, stall), Prefetching(pull_through, worlds, config.cache_key).begin
    process = Process(store, janitor, worlds.askings, pull_through, worlds.called, readiness, disk.reading, clients)
    return Serving(site, connections, admission, figures, process, cache, purges, stall, prefetch, again)


def _clients(crowd: Crowd, stall: LoopStall) -> Clients:
    return Clients(crowd.connected, crowd.limits.connections or None, crowd.transferring, stall.lately)


def _store(config: Config, kept: KeptOpen) -> Store:
    store = Store(Path(config.cache_dir), time.time)
    store.files.kept = kept
    return store


def _hot_path(pull_through: PullThrough, worlds: Worlds, admission: Admission | None, in_thread: InThread) -> HotPath:
    return HotPath(pull_through, worlds, admission, time.time, in_thread, secrets.token_bytes(32))


def _tracing(config: Config, service: Daemon, reactor: Any) -> OtelTracing | None:  # noqa: ANN401
    """
    Make what sends traces; None if no collector is configured.
    """
    if config.otlp_endpoint is None:
        return None
    tracing = OtelTracing(partial(spans_to, config.otlp_endpoint), partial(call_unowned, reactor), reactor)
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
            return warm, store.checks.has_locks()
        except OSError:  # no file can be written at the moment
            return warm, True

    try:
        warm, has_locks = in_time(begin, START_SECONDS)
    except TimeoutError as problem:
        store.troubles.failed(TroubleKind.WRITE, problem)
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
    if processes > 1 and store.index.database.unfit:
        raise ConfigError(
            f"PROXY_CACHE_DIR={str(store.root)!r}: {store.index.database.problem};"
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
