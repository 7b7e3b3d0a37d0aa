"""
A first process and a worker in memory, on one cache directory; clients come to the worker.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from twisted.internet.task import Clock
from twisted.web.server import Request, Site

from ecrproxy.access.clients import Admission
from ecrproxy.access.crowds import Word
from ecrproxy.access.limits import Crowd, for_workers
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.admin.incidents import Incidents
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.cache.ledger import Notes
from ecrproxy.cache.store import Store
from ecrproxy.cached import Cache
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.relay import InnerRegistry, NoRoom, Relay, RelayedReady, WorkerRegistry
from ecrproxy.http.request import RegistryRequest
from ecrproxy.http.site import make_site
from ecrproxy.http.telling import USED, Teller, Used, told
from ecrproxy.identity import RegistryId
from ecrproxy.metrics import Served
from ecrproxy.settings.values import parse_pattern
from ecrproxy.threads import Disk
from tests.daemon import Daemon, Network, at_once


class Between(Network):
    """
    The socket between a worker and the first process.
    """

    def __init__(self, site: Site, clock: Clock) -> None:
        super().__init__(site, clock)
        self.socket = "first"


class Seen(InnerRegistry):
    """
    The first process's /v2/, and what came to it.
    """

    seen: list[Request]

    async def respond(self, request: RegistryRequest) -> None:
        """
        Take note, and answer.
        """
        self.seen.append(request)
        await super().respond(request)


class Together(Daemon):
    """
    A first process and a worker on one cache directory; the clients come to the worker.

    @param room: the connections that the first process may have from workers; 0 for no limit.
    @param share: the requests of an address that a worker hands on at the same time; 0 for no limit.
    @ivar between: the network from the worker to the first process.
    @ivar seen: the requests that came to the first process.
    """

    def __init__(
        self,
        *args: Any,
        pattern: str = ".*",
        cache_key: str = "$uri",
        tag_ttl: float = 0,
        admission: Admission | None = None,
        room: int = 0,
        share: int = 0,
        **options: Any,
    ) -> None:
        self.between: Between | None = None
        super().__init__(*args, pattern=pattern, cache_key=cache_key, tag_ttl=tag_ttl, **options)
        shape = (
            Namespaces(parse_pattern(pattern), at_once, self.clock, {RegistryId.of_url(self.standin.registry)}),
            CacheKey.parse(cache_key),
            at_once,
        )
        inner, self.seen = Seen(self.pull_through, *shape), list[Request]()
        inner.seen, ready = self.seen, Ready(self.readiness)
        hearers = told(self.store.ledger, self.figures.served, self.status.incidents, self.crowds)
        others = {USED: Used(hearers)}
        site = make_site(inner, ready, self.clock, crowd=Crowd(for_workers(room)), others=others)
        self.between = Between(site, self.clock)
        agent = self.between.agent(persistent=True)
        self.notes, relay = Notes(), Relay(agent)
        self.worker_cache = Cache(
            Store(self.store.root, self.clock.seconds, self.notes),
            NoRoom(),
            Disk.of(at_once),
            self.clock.seconds,
            RegistryId.of_url(self.standin.registry),
        )
        self.counted, self.incidents = Served(), Incidents(self.clock.seconds)
        self.crowd = Crowd(self.crowd.limits)
        noters = told(self.notes, self.counted, self.incidents, Word(self.crowd, 1))
        self.teller = Teller(agent, noters, self.clock)
        self.teller.startService()
        registry = WorkerRegistry(self.worker_cache, tag_ttl, relay, *shape, share)
        told_of = partial(make_site, crowd=self.crowd, served=self.counted, access_log=AccessLog(self.clock))
        site = told_of(registry, RelayedReady(relay), self.clock, admission=admission)
        self.front = Network(site, self.clock)
        self._asking = self.front.agent(persistent=False)

    def flush(self) -> None:
        """
        Let everything happen that can happen now, between the two as well.
        """
        super().flush()
        while self.between is not None and self.between.move():
            super().flush()
