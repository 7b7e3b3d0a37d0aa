"""
The composition root of C{twistd ecr-proxy}: the only module that uses the environment and the global reactor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.error import ReactorNotRunning
from twisted.internet.protocol import Factory
from twisted.logger import Logger, LogLevel

from ecrproxy import __version__
from ecrproxy.access.clients import Admission
from ecrproxy.admin.announcing import Announcing, settings_lines
from ecrproxy.admin.api import Api
from ecrproxy.admin.contents import ContentsView
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.kept_history import KeptHistory, read
from ecrproxy.admin.port import Metrics, make_admin_site, make_metrics_site
from ecrproxy.admin.readings import (
    FIGURES,
    of_certificates,
)
from ecrproxy.admin.snapshot import Standing
from ecrproxy.admin.status import Status
from ecrproxy.cache.contents import Contents
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.store import Store
from ecrproxy.cache.upkeep import Upkeep
from ecrproxy.cores import usable_cores
from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.ending import Drain, Signals
from ecrproxy.daemon.exhaustion import Exhaustion, Orphaned, look
from ecrproxy.daemon.inherited import CHANNEL_FD, VARIABLE, Inherited, inherited_sockets
from ecrproxy.daemon.listening import Listening, endpoints, operators_endpoint
from ecrproxy.daemon.process import most_clients, set_up
from ecrproxy.daemon.reloading import Reloading, Settings
from ecrproxy.daemon.renewal import PAIRS, Renewal, generation
from ecrproxy.daemon.service import LAST_LINES_SECONDS, Daemon
from ecrproxy.daemon.supervision import Supervised, Supervisor, summary
from ecrproxy.daemon.tls import Loaded
from ecrproxy.files import FileReader
from ecrproxy.http.answering import Ready
from ecrproxy.http.site import RegistrySite
from ecrproxy.identity import Repository
from ecrproxy.logs.shapes import PRIORITIES, as_json
from ecrproxy.logs.writing import LineWriter, choose_writer, leads_to_journal
from ecrproxy.metrics import Figures, Gathered, Row
from ecrproxy.otel import complaint
from ecrproxy.readiness import Readiness
from ecrproxy.registries import Registries
from ecrproxy.registry.aws import CredentialsError
from ecrproxy.registry.egress import Egress
from ecrproxy.registry.proxy_variables import for_botocore
from ecrproxy.serving import Serving, begin, check_passwords, wire
from ecrproxy.settings.complaints import Complaint, say, write
from ecrproxy.settings.config import NO_FILE, Config, Filed, Given, given, texts_of
from ecrproxy.settings.contradictions import Machine, load, look_at_log, look_at_settings, refusal
from ecrproxy.settings.file import about_registries, for_worker, read_file, read_handed
from ecrproxy.settings.options import Options
from ecrproxy.settings.table import ADMIN_LISTEN, RELOADED, ConfigError
from ecrproxy.thread_pools import in_time
from ecrproxy.threads import InThread
from ecrproxy.workers.channel import Channel, adopt
from ecrproxy.workers.child import END_SECONDS
from ecrproxy.workers.messages import FromParent, Refused, Reload, Reread
from ecrproxy.workers.processes import Workers, add_up
from ecrproxy.workers.worker import Reports

log = Logger()
T = TypeVar("T")

SIZE_SECONDS: Final = 2.0
"""Timeout at startup for reading the size of the disk, which only warnings need."""


def makeService(options: Options) -> Daemon:
    """
    Build the daemon: a single process, the parent of workers, or a worker.
    """
    from twisted.internet import reactor  # noqa: PLC0415 (after twistd may have installed another)

    set_up(reactor)
    file, warnings = NO_FILE, list[Complaint]()
    try:
        file = read_file(options.flags(), os.environ)
        complain = _complaining(options, file)
        read = partial(_load, options)
        config = read(file)
        _check_tracing(config)
        sockets = inherited_sockets(os.environ)
        if sockets is not None:
            service = build_worker(config, sockets, reactor, _egress(os.environ), read)
        else:
            settings = given(options.flags(), os.environ, file)
            warnings = _warnings(config, settings, options, _disk_size(Path(config.cache_dir)))
            for each in warnings:
                log.warn("{complaint}", complaint=each)
            os.environ.update(for_botocore(os.environ))
            supervisor = Supervisor.from_environ(os.environ, os.getpid())
            refused: list[CredentialsError] = []
            atexit.register(_fail_after, refused)  # registered first, runs last: after others have cleaned up
            leave = partial(_abandon, complain, refused)
            egress = _told(_egress(os.environ))
            reloading = partial(Reloading, _settings(options, file, config), partial(_read_again, options))
            if config.worker_processes == 1:
                service = build(config, reactor, leave, supervisor, egress, reloading)
            else:
                # Workers started later must use the same settings, even if the file has changed.
                filed = {name: each[0] for name, each in settings.items() if each is file.settings.get(name)}
                arguments = options.arguments({name: filed[name] for name in filed.keys() - RELOADED})
                service = build_parent(config, reactor, leave, supervisor, arguments, for_worker(file), reloading)
    except ConfigError as problem:
        for line in (*problem.warnings, *map(str, warnings)):
            _complaining(options, file, LogLevel.warn)(f"warning: {line}")
        for line in problem.errors:
            _complaining(options, file)(line)
        sys.exit(1)
    service.complain, service.writer = complain, _log_writer(config, options, reactor)
    looks = look if sockets is None else Orphaned(config.drain_seconds + END_SECONDS)
    Exhaustion(service.give_up, service.relieve, looks).setServiceParent(service)
    if service.writer is not None:
        atexit.register(service.writer.end, LAST_LINES_SECONDS)
    return service


def _check_tracing(config: Config) -> None:
    """
    @raise ConfigError: if there should be traces, and nothing can send them.
    """
    why = None if config.otlp_endpoint is None else complaint(config.otlp_endpoint, os.environ)
    if why is not None:
        raise ConfigError(why)


def _load(options: Options, file: Filed) -> Config:
    """
    Load the settings, including the configuration file's.

    @raise ConfigError: if they are invalid.
    """
    return load(options.flags(), os.environ, file)


def _settings(options: Options, file: Filed, config: Config) -> Settings:
    return Settings(file, config, texts_of(options.flags(), os.environ, file))


def _read_again(options: Options) -> Settings:
    """
    Read the configuration file again, with the same flags and variables.

    @raise ConfigError: if the daemon would not start with it.
    """
    file = read_file(options.flags(), os.environ)
    config = _load(options, file)
    _warnings(config, given(options.flags(), os.environ, file), options, None)
    return _settings(options, file, config)


def _warnings(config: Config, settings: Given, options: Options, disk: int | None) -> list[Complaint]:
    """
    Check the settings together, and return the warnings.

    @param settings: the texts that C{config} was loaded from.
    @param disk: size of the cache's file system; None if unknown. No error depends on it.
    @raise ConfigError: if the daemon must not start with them.
    """
    found = look_at_settings(config, settings, os.environ, Machine(usable_cores(), disk))
    found += look_at_log(config, options.parent or {})
    if any(each.grave for each in found):
        raise refusal(found)
    return found


def _egress(environ: Mapping[str, str]) -> Egress:
    """
    Read the egress settings of the environment.

    @raise ConfigError: if the proxy's URL is invalid.
    """
    try:
        return Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None


def _told(egress: Egress) -> Egress:
    if egress.proxy is not None:
        log.info(
            "Registry and buckets are reached through the egress proxy {proxy}, except for hosts in NO_PROXY",
            proxy=egress.proxy,
        )
    return egress


def _disk_size(directory: Path) -> int | None:
    """
    Return the size of the file system of a directory, which need not exist.
    """

    def look() -> int | None:
        for each in (directory, *directory.absolute().parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(each).total
        return None

    with contextlib.suppress(TimeoutError):
        return in_time(look, SIZE_SECONDS)
    return None


def _complaining(
    options: Options,
    file: Filed,
    level: Any = LogLevel.critical,  # noqa: ANN401
) -> Callable[[str], None]:
    """
    Return a function that logs why the daemon can't start, in the log's format even if other settings are invalid.
    """
    chosen, _ = given(options.flags(), os.environ, file).get("log-format", ("text", ""))
    if chosen != "json":
        marked = leads_to_journal(os.environ.get("JOURNAL_STREAM"), sys.__stderr__)
        return partial(say, mark=f"<{PRIORITIES[level]}>" if marked else "")

    def say_as_json(line: str) -> None:
        event = {"log_time": time.time(), "log_level": level, "log_namespace": "ecrproxy"}
        write("".join(as_json({**event, "log_format": "{line}", "line": line}, "")))

    return say_as_json


def _log_writer(config: Config, options: Options, reactor: Any) -> LineWriter | None:  # noqa: ANN401
    if options.parent is None:  # twistd's log options are unknown
        return None
    return choose_writer(
        options.parent,
        json=config.log_format == "json",
        limit=PRIORITIES[LogLevel.levelWithName(config.log_level)],
        journal=os.environ.get("JOURNAL_STREAM"),
        later=reactor.callFromThread,
    )


def build(
    config: Config,
    reactor: Any,  # noqa: ANN401
    refused: Callable[[CredentialsError], None],
    supervisor: Supervisor | None = None,
    egress: Egress = Egress(),  # noqa: B008 (it is frozen)
    reloading: Callable[[Callable[[Settings], None]], Reloading] | None = None,
) -> Daemon:
    """
    Wire a daemon of one process.

    @param refused: called when AWS rejects the credentials; shuts down.
    @param supervisor: the service manager, if it expects notifications.
    @param reloading: makes the reader of the configuration file from a function that applies settings; None if there is
        no file.
    """
    serving = wire(config, service := Daemon(reactor), reactor, refused, egress, 1)
    process, store = serving.process, serving.cache.store
    incidents = Incidents(time.time)
    status = _status(config, serving.figures, process.readiness, process.standing, incidents, service, reactor)
    describe = partial(_summary, process.readiness, process.janitor)
    supervised = Supervised(supervisor, describe, reactor)
    stall = serving.stall
    announcing = _announcing(config, store, serving.figures, process.readiness, lambda: stall.longest, reactor)
    service.add(announcing, supervised)
    metrics = Metrics(serving.figures, process.readiness)
    listening = _listening(config, serving.site, reactor)
    listening += _operators(config, metrics, status, store, serving.purges.look, service, reactor)
    serving.figures.watch(*of_certificates(partial(_expires, listening)))
    reading, configuring = service.pools.threads(1).call, service.pools.threads(1).call
    certificates = FileReader(PAIRS, partial(_load_all, listening), partial(_use_all, listening), reading, reactor)
    reread = partial(_reread, certificates, serving.admission.reread)
    Renewal(listening, reading, partial(supervised.rereading, reread), reactor).setServiceParent(service)
    drain = Drain(serving.connections, config.drain_seconds, reactor)
    reload = None
    if reloading is not None:
        reload = _configuration(reloading(partial(_use, serving, status)), configuring, reactor)
    hang_up = _on_hang_up(supervised, reread, reload)
    _face_clients(drain, listening, hang_up, service.leave, service, reactor)
    return service


def build_worker(
    config: Config,
    sockets: int,
    reactor: Any,  # noqa: ANN401
    egress: Egress,
    load: Callable[[Filed], Config],
) -> Daemon:
    """
    Wire a worker: it serves clients on inherited sockets, and reports on an inherited channel.

    @param load: loads the settings, given the configuration file's contents.
    @raise ConfigError: if this process has inherited none.
    """
    channel, service, shared = Channel(FromParent), Daemon(reactor), config.share()
    refused: Callable[[CredentialsError], None] = lambda problem: channel.tell(Refused(str(problem)))  # noqa: E731
    serving = wire(shared, service, reactor, refused, egress, config.worker_processes)
    process, figures = serving.process, serving.figures
    listening = _listening(shared, serving.site, Inherited(reactor, sockets))
    incidents, reading = Incidents(time.time), service.pools.threads(1).call
    certificates = FileReader(
        PAIRS, partial(_load_as_told, listening), partial(_use_as_told, listening), reading, reactor
    )
    reports = Reports(
        channel,
        figures,
        incidents,
        readiness=process.readiness,
        standing=process.standing,
        reread=partial(_reread_as_told, certificates, serving.admission),
        reload=lambda text: serving.use(load(read_handed(text))),
        orphaned=partial(_stop, reactor),
        reactor=reactor,
    )
    service.add(incidents, reports)
    # A service manager may send SIGTERM to all processes, and the parent sends it to each worker again. A terminal that
    # hangs up sends SIGHUP to all; workers reload only when the parent tells them to.
    drain = Drain(serving.connections, config.drain_seconds, reactor)
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
    variables: Mapping[str, str],
    reloading: Callable[[Callable[[Settings], None]], Reloading],
) -> Daemon:
    """
    Wire the parent of workers: sockets that it binds but does not accept from, the workers, and the admin port.

    Problems that would prevent workers from starting are reported here, once.

    @param arguments: flags for the workers.
    @param variables: additional environment variables for the workers.
    @param reloading: makes the reader of the configuration file from a function that applies settings.
    """
    service = Daemon(reactor)
    renewing, configuring, settling = (service.pools.threads(1).call for _ in range(3))
    store = Store(Path(config.cache_dir), time.time)
    begin(store, config.worker_processes)
    check_passwords(config)
    listening = [Listening(*named, Nobody(), accepts=False) for named in endpoints(config, reactor)]
    gathered = Gathered(FIGURES)
    figures, incidents = Figures(__version__, gathered.workers), Incidents(time.time)
    workers = Workers(
        config.worker_processes,
        listening,
        arguments,
        variables,
        gathered,
        partial(add_up, figures, incidents),
        lambda problem: refused(CredentialsError(problem)),
        reactor,
        drain=config.drain_seconds,
    )
    status = _status(config, figures, workers.readiness, workers.standing, incidents, service, reactor)
    supervised = Supervised(supervisor, partial(_summary_of_all, workers), reactor, workers.listen)
    metrics = Metrics(figures, workers.readiness, workers.gather)
    purges = Purges(store.index, lambda _: None, settling, reactor)  # workers notice purges by themselves
    admin = _operators(config, metrics, status, store, purges.look, service, reactor)
    every = [*listening, *admin]
    figures.watch(*gathered.readings(), *of_certificates(partial(_expires, every)))
    use = partial(_have_workers_use, listening, admin, workers)
    certificates = FileReader(PAIRS, partial(_load_all, every), use, renewing, reactor)
    reread = partial(_reread, certificates, lambda: workers.tell(Reread("")))
    renewal = Renewal(every, renewing, partial(supervised.rereading, reread), reactor)
    announcing = _announcing(config, store, figures, workers.readiness, lambda: None, reactor)
    service.add(announcing, purges, supervised, renewal, workers)
    reload = _configuration(reloading(partial(_have_used, workers, status)), configuring, reactor)
    hang_up = _on_hang_up(supervised, reread, reload)
    _face_clients(None, every, hang_up, partial(_leave_with, workers, service.leave), service, reactor)
    return service


def _status(
    config: Config,
    figures: Figures,
    readiness: Callable[[], Coroutine[Any, Any, Readiness]],
    standing: Callable[[], Awaitable[Standing]],
    incidents: Incidents,
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> Status:
    """
    Make the source of the status page, with the history from before the start.
    """
    root, now, writing = Path(config.cache_dir), time.time, service.pools.threads(1)
    history = read(root, now())
    ask, called = (readiness, standing), _called(config)
    status = Status(config.ecr_endpoint, figures, *ask, incidents, now, reactor, called, history=history)
    service.add(*status.services, KeptHistory(root, history, now, writing.call, reactor))
    return status


def _announcing(
    config: Config,
    store: Store,
    figures: Figures,
    readiness: Callable[[], Awaitable[Readiness]],
    stall: Callable[[], float | None],
    reactor: Any,  # noqa: ANN401
) -> Announcing:
    """
    Make the writer of the log's startup and shutdown messages.
    """

    def held() -> int:
        return store.index.taken

    def rows() -> list[Row]:
        return list(figures.served.requests.rows())

    return Announcing(partial(settings_lines, config, __version__, held), readiness, rows, stall, reactor)


class Nobody(Factory):
    """
    A factory for sockets that are bound here while workers accept from them.
    """

    noisy = False

    def logPrefix(self) -> str:
        """
        Return the name in Twisted's log messages.
        """
        return RegistrySite.NAME


def _listening(config: Config, site: RegistrySite, reactor: Any) -> list[Listening]:  # noqa: ANN401
    """
    Make the client ports, with one common limit on descriptors.
    """
    most, wanted = most_clients(), config.limits().connections
    if wanted > most:
        log.warn(
            "RLIMIT_NOFILE allows {most} connections, fewer than PROXY_CONNECTIONS={wanted}: beyond"
            " that, idle ones are closed or new ones refused; raise LimitNOFILE= or ulimit -n,"
            " or lower PROXY_CONNECTIONS",
            most=most,
            wanted=wanted,
        )
    gate = Gate(reactor, most)
    return [Listening(*named, site, gate=gate) for named in endpoints(config, reactor)]


def _face_clients(
    drain: Drain | None,
    listening: Sequence[Listening],
    reread: Callable[[], object],
    at_once: Callable[[int], object],
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> None:
    """
    Add client ports and signal handlers. Add everything that responses need before: the last part stops first.

    @param drain: None for processes that accept no clients.
    """
    if drain is not None:
        service.add(drain)
    service.add(*listening, Signals(reactor, partial(_stop, reactor), at_once, reread))


def _operators(
    config: Config,
    metrics: Metrics,
    status: Status,
    store: Store,
    purged: Callable[[], Awaitable[None]],
    service: Daemon,
    reactor: Any,  # noqa: ANN401
) -> list[Listening]:
    """
    Make the admin and metrics ports, unless they are off.

    If the default admin port is in use, the daemon starts without it. Operations on the cache have their own threads.

    @param purged: drops purged content from this process's memory.
    """
    ready, found = Ready(status.readiness), []
    if (named := operators_endpoint("PROXY_METRICS_LISTEN", config.metrics_listen, reactor)) is not None:
        found.append(Listening(*named, make_metrics_site(metrics, ready, reactor), gate=Gate(reactor)))
    named = operators_endpoint("PROXY_ADMIN_LISTEN", config.admin_listen, reactor)
    if named is None:
        return found
    listing, hashing = service.pools.threads(1, yielding=False), service.pools.threads(1)
    inventory = Inventory(store)
    contents = Contents(store, inventory)
    upkeep = Upkeep(store, inventory, contents, time.time)
    api = Api(inventory, upkeep, purged, listing.call, hashing.call, reactor)
    view = ContentsView(contents, status, listing.call)
    hosts = {socket.gethostname().lower(), *(config.admin_hosts or ())}
    site = make_admin_site(metrics, ready, status, view, api, reactor, frozenset(hosts))
    needed = str(config.admin_listen) != ADMIN_LISTEN
    return [*found, Listening(*named, site, needed=needed, gate=Gate(reactor))]


def _expires(listening: Sequence[Listening]) -> float | None:
    """
    Return when the certificate for clients expires, the earliest of several; None without TLS.
    """
    return min((each.expires for each in listening if each.expires), default=None)


def _use(serving: Serving, status: Status, settings: Settings) -> None:
    """
    Use the registries of new settings for new requests.
    """
    serving.use(settings.config)
    status.registry, status.called = settings.config.ecr_endpoint, _called(settings.config)


def _have_used(workers: Workers, status: Status, settings: Settings) -> None:
    """
    Use the registries of new settings in all workers, running and future ones.
    """
    workers.variables = for_worker(settings.file)
    workers.tell(Reload.of(about_registries(settings.file)))
    status.registry, status.called = settings.config.ecr_endpoint, _called(settings.config)


def _called(config: Config) -> Callable[[Repository], str]:
    """
    Return a function that returns the display names of repositories.
    """
    return Registries(config.registries, config.registry_aliases or ()).called


def _configuration(reloading: Reloading, in_thread: InThread, reactor: Any) -> FileReader:  # noqa: ANN401
    return FileReader("The configuration file", reloading.read, reloading.use, in_thread, reactor)


def _on_hang_up(
    supervised: Supervised, reread: Callable[[], Deferred[None]], configuration: FileReader | None
) -> Callable[[], Deferred[None]]:
    """
    Return the handler of SIGHUP: reloads the configuration file, and everything that reloads by itself on changes.

    The configuration file never reloads by itself: it may be half edited.
    """

    def hang_up() -> Deferred[Any]:
        configured = [configuration.again()] if configuration is not None else []
        return gatherResults([*configured, reread()])

    return partial(supervised.rereading, hang_up)


def _reread(certificates: FileReader, passwords: Callable[[], object]) -> Deferred[None]:
    """
    Reload certificates and passwords, independently.

    @return: fires when the certificates have been read, or time out.
    """
    passwords()
    return certificates.again()


def _load_all(listening: Sequence[Listening]) -> list[Loaded | None]:
    """
    Read the certificates. Blocks.
    """
    return [each.load() for each in listening]


def _use_all(listening: Sequence[Listening], loaded: Sequence[Loaded | None]) -> bool:
    """
    Use certificates; return True if any has changed.
    """
    news = [each.use(what) for each, what in zip(listening, loaded, strict=True)]
    return any(news)


def _have_workers_use(
    listening: Sequence[Listening], admin: Sequence[Listening], workers: Workers, loaded: Sequence[Loaded | None]
) -> None:
    """
    Check that certificates are usable, then tell workers to reload those for clients.
    """
    theirs = loaded[: len(listening)]
    _use_all(admin, loaded[len(listening) :])
    if _use_all(listening, theirs):
        workers.tell(Reread(_name(theirs)))


def _name(loaded: Sequence[Loaded | None]) -> str:
    return generation(each.seen if each is not None else () for each in loaded)


def _reread_as_told(certificates: FileReader, admission: Admission, found: str) -> None:
    """
    Reload passwords, or the certificates that the parent has checked.
    """
    if found:
        certificates.again(found)
    else:
        admission.reread()


def _load_as_told(listening: Sequence[Listening], found: str) -> list[Loaded | None] | None:
    """
    Read the certificates; None unless they are those that the parent has checked. Blocks.
    """
    loaded = _load_all(listening)
    return loaded if _name(loaded) == found else None


def _use_as_told(listening: Sequence[Listening], loaded: Sequence[Loaded | None] | None) -> None:
    if loaded is not None:
        _use_all(listening, loaded)


def _leave_with(workers: Workers, leave: Callable[[int], object], number: int) -> None:
    """
    Kill the workers, then exit: without their parent, workers would finish their responses first.
    """
    workers.kill()
    leave(number)


def _stop(reactor: Any) -> None:  # noqa: ANN401
    with contextlib.suppress(ReactorNotRunning):  # already stopping
        reactor.stop()


async def _summary(readiness: Callable[[], Awaitable[Readiness]], janitor: Janitor) -> str:
    return summary(await readiness(), janitor.held, janitor.limit)


async def _summary_of_all(workers: Workers) -> str:
    standing = await workers.standing()
    return summary(standing.readiness, standing.cache.bytes, standing.cache.limit)


def _abandon(complain: Callable[[str], None], refused: list[CredentialsError], problem: CredentialsError) -> None:
    """
    Shut down: the daemon can do nothing with these credentials.
    """
    from twisted.internet import reactor  # noqa: PLC0415

    if refused:  # already reported by another worker
        return
    log.critical("{problem}", problem=problem)
    complain(str(problem))
    refused.append(problem)
    reactor.stop()


def _fail_after(refused: Sequence[CredentialsError]) -> None:
    """
    Exit with status 1 if credentials were refused: twistd exits with 0 after its reactor has stopped for any reason.
    """
    if refused:
        os._exit(1)
