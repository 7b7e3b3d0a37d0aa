"""
Wire the processes of the daemon: a single one, the parent of workers, and a worker.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.error import ReactorNotRunning
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from ecrproxy import __version__
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.readings import (
    FIGURES,
    of_certificates,
)
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.store import Store
from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.ending import Drain, Signals
from ecrproxy.daemon.inherited import CHANNEL_FD, VARIABLE, Inherited
from ecrproxy.daemon.listening import Listening, endpoints
from ecrproxy.daemon.process import most_clients
from ecrproxy.daemon.reloading import Reloading, Settings
from ecrproxy.daemon.renewal import PAIRS, Renewal
from ecrproxy.daemon.service import Daemon
from ecrproxy.daemon.supervision import Supervised, Supervisor, summary
from ecrproxy.files import FileReader
from ecrproxy.http.site import RegistrySite
from ecrproxy.metrics import Figures, Gathered
from ecrproxy.operator_wiring import Operator
from ecrproxy.readiness import Readiness
from ecrproxy.registry.aws import CredentialsError
from ecrproxy.registry.egress import Egress
from ecrproxy.reload_wiring import (
    configuration,
    expiry,
    hang_up_handler,
    load_all,
    load_as_told,
    reload_workers,
    renew_in_workers,
    reread,
    reread_as_told,
    use_all,
    use_as_told,
    use_settings,
)
from ecrproxy.serving import begin, check_passwords, wire
from ecrproxy.settings.config import Config, Filed
from ecrproxy.settings.file import read_handed
from ecrproxy.settings.table import ConfigError
from ecrproxy.workers.channel import Channel, adopt
from ecrproxy.workers.messages import FromParent, Refused, Reread
from ecrproxy.workers.processes import Workers, add_up
from ecrproxy.workers.worker import Reports

log = Logger()


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
    service = Daemon(reactor)

    # Upstream, cache and serving.
    serving = wire(config, service, reactor, refused, egress, 1)
    process, store, stall = serving.process, serving.cache.store, serving.stall

    # The operator.
    operator = Operator(config, service, serving.figures, Incidents(time.time), process, reactor)
    supervised = Supervised(supervisor, partial(_summary, process.readiness, process.janitor), reactor)
    service.add(operator.announcing(store, lambda: stall.longest), supervised)

    # Ports.
    listening = [
        *_listening(config, serving.site, reactor),
        *operator.ports(store, serving.purges.look, serving.prefetch),
    ]
    serving.figures.watch(*of_certificates(partial(expiry, listening)))

    # Reloading.
    reading, configuring = service.pools.threads(1).call, service.pools.threads(1).call
    certificates = FileReader(PAIRS, partial(load_all, listening), partial(use_all, listening), reading, reactor)
    renew = partial(reread, certificates, serving.admission.reread)
    service.add(Renewal(listening, reading, partial(supervised.rereading, renew), reactor))
    reload = None
    if reloading is not None:
        reload = configuration(reloading(partial(use_settings, serving, operator.status)), configuring, reactor)
    hang_up = hang_up_handler(supervised, renew, reload)

    # What is added last stops first: clients are served until then.
    drain = Drain(serving.connections, config.drain_seconds, reactor)
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
    process, incidents = serving.process, Incidents(time.time)

    listening = _listening(shared, serving.site, Inherited(reactor, sockets))
    reading = service.pools.threads(1).call
    certificates = FileReader(
        PAIRS, partial(load_as_told, listening), partial(use_as_told, listening), reading, reactor
    )
    reports = Reports(
        channel,
        serving.figures,
        incidents,
        readiness=process.readiness,
        standing=process.standing,
        reread=partial(reread_as_told, certificates, serving.admission),
        reload=lambda text: serving.use(load(read_handed(text))),
        prefetch=serving.prefetch,
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
    purges = Purges(store.index, lambda _: None, settling, reactor)  # workers notice purges by themselves
    clients = [Listening(*named, Nobody(), accepts=False) for named in endpoints(config, reactor)]
    gathered = Gathered(FIGURES)
    figures, incidents = Figures(__version__, gathered.workers), Incidents(time.time)
    workers = Workers(
        config.worker_processes,
        clients,
        arguments,
        variables,
        gathered,
        partial(add_up, figures, incidents),
        lambda problem: refused(CredentialsError(problem)),
        reactor,
        drain=config.drain_seconds,
    )

    operator = Operator(config, service, figures, incidents, workers, reactor)
    supervised = Supervised(supervisor, partial(_summary_of_all, workers), reactor, workers.listen)
    admin = operator.ports(store, purges.look, workers.prefetch, workers.gather)
    listening = [*clients, *admin]
    figures.watch(*gathered.readings(), *of_certificates(partial(expiry, listening)))

    renewed = partial(renew_in_workers, clients, admin, workers)
    certificates = FileReader(PAIRS, partial(load_all, listening), renewed, renewing, reactor)
    renew = partial(reread, certificates, lambda: workers.tell(Reread("")))
    renewal = Renewal(listening, renewing, partial(supervised.rereading, renew), reactor)
    service.add(operator.announcing(store), purges, supervised, renewal, workers)
    reload = configuration(reloading(partial(reload_workers, workers, operator.status)), configuring, reactor)
    hang_up = hang_up_handler(supervised, renew, reload)
    _face_clients(None, listening, hang_up, partial(_leave_with, workers, service.leave), service, reactor)
    return service


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
