"""
Log messages at startup, when ready, and at exit, which show whether the daemon does what was intended.

The first lines list settings as the daemon understands them, without secrets. I{Ready} is logged once, as soon as
clients can be served. The last line summarizes the run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.admin.units import size, span
from ecrproxy.endpoint_string import EndpointString
from ecrproxy.metrics import Row
from ecrproxy.periodic import Periodic
from ecrproxy.ranking import SAVING
from ecrproxy.readiness import Readiness
from ecrproxy.settings.config import Config
from ecrproxy.settings.registry_table import Protocol, RegistryTable

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

LOOK_SECONDS: Final = 1.0
"""Interval for checking whether the daemon is ready."""
PATIENCE: Final = 10.0
"""Seconds after which the daemon logs that it is ready, with the remaining problems."""
REGISTRIES: Final = 10
"""Maximum number of registries with their own lines."""
_FAILED: Final = "5"
"""First digit of the status of a failure."""


def settings_lines(config: Config, version: str, held: Callable[[], int]) -> Iterator[str]:
    """
    Yield lines that describe the settings.

    @param held: returns the size of the cache in bytes.
    """
    processes = config.worker_processes
    yield f"ecrproxy {version}" + (f" with {processes} worker processes" if processes > 1 else "")
    for each in config.registries[:REGISTRIES]:
        yield _registry_line(each)
    if (more := len(config.registries) - REGISTRIES) > 0:
        yield f"… and {more} more registries: ecr-proxy config lists them"
    yield f"Cache: {config.cache_dir}, {size(held())} of {size(config.cache_limit)}"
    access = _access(config)
    if config.listen:
        for endpoint in config.listen:
            yield f"Clients: {endpoint.text}, {_speaks(config, endpoint)}; {access}"
    else:
        yield f"Clients: port {config.port} of all addresses, {_speaks(config)}; {access}"
    admin = config.admin_listen
    yield "Admin port: none" if admin is None else f"Admin port: {admin.text}"
    if config.metrics_listen is not None:
        yield f"Metrics: {config.metrics_listen.text}"


def _registry_line(table: RegistryTable) -> str:
    words = [f"Registry: {table.name}"]
    if table.region is not None:
        words.append(table.region)
    if table.role is not None:
        words.append(f"as {table.role}")
    if table.profile is not None:
        words.append(f"profile {table.profile}")
    if table.instance_auth:
        words.append("with the role of this instance, container or pod alone")
    if table.anonymous:
        words.append("without an account")
    elif table.protocol is Protocol.OCI and table.username is not None:
        words.append(f"as {table.username}")
    if table.default:
        words.append("the default")
    return ", ".join(words)


def _speaks(config: Config, endpoint: EndpointString | None = None) -> str:
    own = config.ssl_certificate is not None
    secure = own if endpoint is None else endpoint.secure or (own and endpoint.kind == "systemd")
    return "TLS" if secure else "plain HTTP"


def _access(config: Config) -> str:
    """
    Describe which clients may pull.
    """
    rules = []
    if config.allow_from is not None:
        networks = ", ".join(map(str, config.allow_from[:5]))
        rules.append(f"from {networks}{', …' if len(config.allow_from) > 5 else ''}")  # noqa: PLR2004 (as shown)
    if config.client_ca is not None:
        rules.append("with a client certificate")
    if config.htpasswd is not None:
        rules.append("with a password")
    if not rules:
        return "all clients that can connect may pull"
    return f"clients may pull {' and '.join(rules)}"


def summary_line(rows: Sequence[Row], seconds: float, stall: float | None) -> str:
    """
    Summarize the run.

    @param rows: the requests of clients.
    @param seconds: duration of the run.
    @param stall: the longest event-loop stall; None if this process served no clients.
    """
    count = sum(row[1] for row in rows)
    sent = sum(row[2] for row in rows)
    saved = sum(row[2] for row in rows if row[0][3] in SAVING)
    failed = sum(row[1] for row in rows if row[0][2].startswith(_FAILED))
    words = [f"{count} requests", f"{failed} of them failed", f"{size(sent)} sent"]
    if sent:
        words.append(f"{100 * saved // sent} % of that from the cache")
    if stall is not None:
        words.append(f"longest event-loop stall {stall:.3f} s")
    return f"Ended after {span(seconds)}: {', '.join(words)}"


class Announcing(Service):
    """
    Logs these messages.

    @param lines: returns the first lines.
    @param readiness: returns what the daemon can do.
    @param rows: returns the requests of clients.
    @param stall: returns the longest event-loop stall, if known.
    """

    def __init__(
        self,
        lines: Callable[[], Iterable[str]],
        readiness: Callable[[], Awaitable[Readiness]],
        rows: Callable[[], Sequence[Row]],
        stall: Callable[[], float | None],
        clock: IReactorTime,
    ) -> None:
        self._lines, self._readiness, self._rows, self._stall = lines, readiness, rows, stall
        self._clock, self._began = clock, 0.0
        self._looks = Periodic("Looking whether the daemon is ready", self._look, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._began = self._clock.seconds()
        for line in self._lines():
            log.info("{line}", line=line)
        self._looks.start(LOOK_SECONDS)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._looks.stop()
        log.info("{line}", line=summary_line(self._rows(), self._clock.seconds() - self._began, self._stall()))

    async def _look(self) -> None:
        readiness = await self._readiness()
        patient = self._clock.seconds() < self._began + PATIENCE
        if not self.running or not readiness.can_serve or (readiness.reasons and patient):
            return
        self._looks.stop()
        if readiness.reasons:
            log.warn("Ready, but {reasons}", reasons="; ".join(readiness.reasons))
        else:
            log.info("Ready: clients are served")
