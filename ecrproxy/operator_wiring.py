"""
Wire what the operator sees: status page, metrics, incidents, the log's announcements, and the ports for them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ecrproxy import __version__
from ecrproxy.admin.announcing import Announcing, settings_lines
from ecrproxy.admin.api import Api
from ecrproxy.admin.contents import ContentsView
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.kept_history import KeptHistory, read
from ecrproxy.admin.port import Metrics, make_admin_site, make_metrics_site
from ecrproxy.admin.snapshot import Standing
from ecrproxy.admin.status import Status
from ecrproxy.cache.contents import Contents
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.store import Store
from ecrproxy.cache.upkeep import Upkeep
from ecrproxy.daemon.accepting import Gate
from ecrproxy.daemon.listening import Listening, operators_endpoint
from ecrproxy.daemon.service import Daemon
from ecrproxy.http.answering import Ready
from ecrproxy.identity import Repository
from ecrproxy.metrics import Figures, Row
from ecrproxy.prefetch_progress import RunningPrefetch
from ecrproxy.readiness import Readiness
from ecrproxy.reload_wiring import called
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import ADMIN_LISTEN


class Reporting(Protocol):
    """
    The source of the daemon's state: this process, or all workers.
    """

    @property
    def readiness(self) -> Callable[[], Coroutine[Any, Any, Readiness]]:
        """Return what tells whether the daemon can serve and fetch."""

    @property
    def standing(self) -> Callable[[], Awaitable[Standing]]:
        """Return what tells the state of the daemon."""


class Operator:
    """
    The operator's view of the daemon, with the traffic from before its start.

    @ivar status: the source of the status page.
    """

    def __init__(
        self,
        config: Config,
        service: Daemon,
        figures: Figures,
        incidents: Incidents,
        reporting: Reporting,
        reactor: Any,  # noqa: ANN401
    ) -> None:
        self._config, self._service, self._figures, self._reactor = config, service, figures, reactor
        self._readiness = reporting.readiness
        root, now, writing = Path(config.cache_dir), time.time, service.pools.threads(1)
        history, standing = read(root, now()), reporting.standing
        registry, ask, named = config.ecr_endpoint, (self._readiness, standing), called(config)
        self.status = Status(registry, figures, *ask, incidents, now, reactor, named, history=history)
        service.add(*self.status.services, KeptHistory(root, history, now, writing.call, reactor))

    def announcing(self, store: Store, stall: Callable[[], float | None] = lambda: None) -> Announcing:
        """
        Make the writer of the log's startup and shutdown messages.

        @param stall: returns the longest stall of the event loop, in seconds; None if it is not measured here.
        """

        def held() -> int:
            return store.index.taken

        def rows() -> list[Row]:
            return list(self._figures.served.requests.rows())

        lines = partial(settings_lines, self._config, __version__, held)
        return Announcing(lines, self._readiness, rows, stall, self._reactor)

    def ports(
        self,
        store: Store,
        purged: Callable[[], Awaitable[None]],
        prefetch: Callable[[Repository, str, Sequence[str]], RunningPrefetch],
        gather: Callable[[], Awaitable[object]] | None = None,
    ) -> list[Listening]:
        """
        Make the admin and metrics ports, unless they are off.

        If the default admin port is in use, the daemon starts without it. Operations on the cache have their own
        threads.

        @param purged: drops purged content from this process's memory.
        @param prefetch: begins a prefetch: see L{Prefetching.begin}.
        @param gather: fetches the workers' figures.
        """
        config, reactor = self._config, self._reactor
        metrics = Metrics(self._figures, self._readiness, gather)
        ready, found = Ready(self._readiness), []
        if (named := operators_endpoint("PROXY_METRICS_LISTEN", config.metrics_listen, reactor)) is not None:
            found.append(Listening(*named, make_metrics_site(metrics, ready, reactor), gate=Gate(reactor)))
        named = operators_endpoint("PROXY_ADMIN_LISTEN", config.admin_listen, reactor)
        if named is None:
            return found
        threads = self._service.pools.threads
        listing, hashing = threads(1, yielding=False), threads(1)
        inventory = Inventory(store)
        contents = Contents(store, inventory)
        upkeep = Upkeep(store, inventory, contents, time.time)
        api = Api(inventory, upkeep, purged, prefetch, listing.call, hashing.call, reactor)
        view = ContentsView(contents, self.status, listing.call)
        hosts = {socket.gethostname().lower(), *(config.admin_hosts or ())}
        site = make_admin_site(metrics, ready, self.status, view, api, reactor, frozenset(hosts))
        needed = str(config.admin_listen) != ADMIN_LISTEN
        return [*found, Listening(*named, site, needed=needed, gate=Gate(reactor))]
