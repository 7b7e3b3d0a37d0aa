"""
The whole daemon in memory: real parts over the stand-in ECR, driven over HTTP.

Rules of the kit:

- All our own parts are real: cache directory, janitor, token service, treq, Resource tree.
- The two networks, before and behind the daemon, are L{Network}s: wires between real twisted.web
  clients and servers, with the back-pressure of sockets. Data moves only in C{flush}.
- Time is a C{Clock}. Calls in threads run at once, or by hand with L{Hands}.
- After each test, L{DaemonTestCase} checks its invariants.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import Deferred, execute, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IHalfCloseableProtocol, IPushProducer, ISSLTransport, ITransport
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock, deferLater
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import URI, Agent, ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IResponse
from twisted.web.server import Site
from zope.interface import alsoProvides, implementer

from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.admin.api import Api
from ecrproxy.admin.contents import ContentsView
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.port import Metrics, make_admin_site, make_metrics_site
from ecrproxy.admin.readings import of_cache, of_clients, of_disk, of_registries, of_transfers
from ecrproxy.admin.snapshot import Clients
from ecrproxy.admin.status import Asking, Process, Status
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.condition import Condition
from ecrproxy.cache.contents import Contents
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.kept_open import KeptOpen
from ecrproxy.cache.purges import Purges
from ecrproxy.cache.scrub import Scrub
from ecrproxy.cache.store import Store
from ecrproxy.cache.upkeep import Upkeep
from ecrproxy.cached.cache import Cache
from ecrproxy.catalog import Catalog
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.answering import Ready
from ecrproxy.http.hot_path import HotPath
from ecrproxy.http.site import make_site
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId
from ecrproxy.metrics import Figures, Tally
from ecrproxy.oci import Digest
from ecrproxy.prefetching import Prefetching
from ecrproxy.proxy import PullThrough
from ecrproxy.readiness import Readiness, judge
from ecrproxy.reading_ahead import ReadingAhead, Transfers
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.authorization import Authorization, Basic
from ecrproxy.registry.bearer import Bearer
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import connection_pool
from ecrproxy.registry.ecr import Token, TokenService
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.registry.quotas import Quotas
from ecrproxy.registry.replicas import Replicated
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.upstream import Upstream
from ecrproxy.registry.wire import Wire
from ecrproxy.settings.registries import table_of_settings
from ecrproxy.settings.registry_table import Protocol as TableProtocol
from ecrproxy.settings.registry_table import RegistryTable
from ecrproxy.settings.values import parse_pattern
from ecrproxy.threads import Disk, InThread
from ecrproxy.tracing import Tracing
from ecrproxy.transfer.file_backed import FileBacked
from ecrproxy.transfer.inflow import GATHER_SECONDS, Lanes
from ecrproxy.transfer.peer_backed import PeerBacked
from ecrproxy.upstreams import Upstreams
from ecrproxy.world import World, Worlds
from tests.registry import StandIn
from tests.registry_server import QuietSite, noise

__all__ = ["Daemon", "DaemonTestCase", "Hands", "Network", "Reply", "at_once", "noise"]

T = TypeVar("T")
Address = IPv4Address | UNIXAddress
START: Final = 4_000_000_000.0
"""A time in 2096, so that use times by this clock are later than those of files by the system clock."""
MIB: Final = 2**20
KEPT: Final = 4
"""Maximum number of open files kept."""
BUFFER: Final = 2**16
"""Bytes buffered before a producer is paused, and maximum bytes of one read: Twisted's own."""
CLIENT: Final = "192.0.2.7"
PASSWORD: Final = "canary-of-a-client"
SHOWN: Final = f"Basic {base64.b64encode(f'client:{PASSWORD}'.encode()).decode()}"
"""The credentials that each client sends; they must not appear anywhere."""
ERRORS: Final = 400
NAMED: Final = 'registry="123456789012.dkr.ecr.eu-west-1.amazonaws.com"'
"""The metric label that identifies the stand-in among registries."""


def at_once(blocking: Callable[..., T], *args: Any) -> Deferred[T]:
    """
    Run calls for threads at once, in the calling thread.
    """
    return execute(blocking, *args)


class Hands:
    """
    Threads that run their calls when told to: C{in_thread} for a slow disk.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Deferred[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self.untold: deque[tuple[Deferred[Any], Deferred[Any]]] = deque()
        self.idle = True
        """Whether calls run at once."""

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        if self.idle:
            return at_once(blocking, *args)
        done: Deferred[T] = Deferred()
        self.waiting.append((done, blocking, args))
        return done

    def work(self, count: int = 1) -> None:
        """
        Run the next calls.
        """
        for _ in range(count):
            self.do()
            self.tell(-1)

    def do(self, which: int = 0) -> None:
        """
        Run one of the calls. As with a thread, the event loop gets the result later: see L{tell}.
        """
        done, blocking, args = self.waiting[which]
        del self.waiting[which]
        self.untold.append((done, execute(blocking, *args)))

    def tell(self, which: int = 0) -> None:
        """
        Pass on the result of one finished call.
        """
        done, outcome = self.untold[which]
        del self.untold[which]
        outcome.addBoth(done.callback)

    def work_off(self) -> None:
        """
        Run all calls, and those that they lead to.
        """
        while self.untold:
            self.tell()
        while self.waiting:
            self.work()


@implementer(ITransport, IConsumer, IPushProducer)
class End:
    """
    One end of a wire: the transport that a protocol sees.

    As with a socket, a protocol that writes faster than the other end reads is told to pause; one that is told to pause
    and
    stops reading doesn't see the end of the connection either; and data written before an abort may all have arrived.
    """

    peer: End
    certificate: object = None

    def __init__(self, protocol: Protocol, host: Address, peer_address: Address) -> None:
        self.protocol, self._host, self._peer_address = protocol, host, peer_address
        self.disconnecting, self.connected, self.reading = False, True, True
        self._out: deque[bytes] = deque()
        self._producer: Any = None
        self._producer_paused = False
        self._aborted, self._fin, self._half_closed, self._reset = False, False, False, False
        self._half_closing = False
        self.written = 0

    @property
    def waiting(self) -> int:
        """
        Return how many bytes wait to be read at the other end.
        """
        return sum(map(len, self._out))

    def write(self, data: bytes) -> None:
        if not self.connected or not data:
            return
        self._out.append(data)
        self.written += len(data)
        if self._producer is not None and not self._producer_paused and self.waiting > BUFFER:
            self._producer_paused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.write(b"".join(data))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self._producer is not None:
            raise RuntimeError("there is a producer already")
        assert streaming, "this wire has no use for pull producers"
        self._producer, self._producer_paused = producer, False
        if not self.connected:
            producer.stopProducing()

    def unregisterProducer(self) -> None:
        self._producer, self._producer_paused = None, False

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        self.reading = not self.disconnecting

    def stopProducing(self) -> None:
        self.loseConnection()

    def loseConnection(self) -> None:
        self.disconnecting, self.reading = True, False

    def loseWriteConnection(self) -> None:
        self._half_closing = True

    def abortConnection(self) -> None:
        self.disconnecting = self._aborted = True

    def getHost(self) -> Address:
        return self._host

    def getPeer(self) -> Address:
        return self._peer_address

    def getPeerCertificate(self) -> object:
        return self.certificate

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass

    def setTcpKeepAlive(self, enabled: bool) -> None:
        pass

    def move(self) -> bool:
        """
        Do one thing that a reactor would; return True if there was any.
        """
        if not self.connected:
            return False
        if self._aborted:
            self._over(ConnectionAborted())
            self.peer._reset = True  # noqa: SLF001
            return True
        if self.reading and self.peer._out:  # noqa: SLF001
            self.protocol.dataReceived(self.peer._take())  # noqa: SLF001
            return True
        lost = self._reset or (self._half_closed and self._out and not self.peer.connected)
        if lost or (self.disconnecting and not self._out and not self._producer_paused):
            self._over(ConnectionLost() if lost else ConnectionDone())
            self.peer._fin = True  # noqa: SLF001
            return True
        if self._fin and self.reading and not self._half_closed:
            return self._read_end()
        return self._send_end() or self._wake_producer()

    def _send_end(self) -> bool:
        if not self._half_closing or self._out:
            return False
        self._half_closing, self.peer._fin = False, True  # noqa: SLF001
        return True

    def _read_end(self) -> bool:
        """
        Tell the protocol that nothing more comes; for most, that ends the connection.
        """
        half = IHalfCloseableProtocol(self.protocol, None)
        if half is None:
            self._over(ConnectionDone())
            self.peer._fin = True  # noqa: SLF001
        else:
            self._half_closed = True
            half.readConnectionLost()
        return True

    def half_close(self) -> None:
        """
        Stop sending, but go on reading.
        """
        self.peer._fin = True  # noqa: SLF001

    def _take(self) -> bytes:
        data = self._out.popleft()
        if len(data) > BUFFER:
            self._out.appendleft(data[BUFFER:])
        return data[:BUFFER]

    def _wake_producer(self) -> bool:
        if self._producer is None or not self._producer_paused or self._out:
            return False
        self._producer_paused = False
        self._producer.resumeProducing()
        return True

    def _over(self, reason: Exception) -> None:
        self.connected = False
        producer, self._producer = self._producer, None
        if producer is not None:  # the same order as abstract.FileDescriptor.connectionLost
            producer.stopProducing()
        self.protocol.connectionLost(Failure(reason))


@implementer(IAgentEndpointFactory)
class Network:
    """
    Wires from any client to one server.

    @ivar site: builds the server's side of each.
    """

    site: Any

    def __init__(self, site: Site, clock: Clock) -> None:
        self.site, self._clock = site, clock
        self.ends: list[tuple[End, End]] = []
        """Client and server of each wire."""
        self.down: Exception | None = None
        """The error with which connections fail, if they do."""
        self.client = CLIENT
        """The clients' address."""
        self.socket = ""
        """The path of the Unix socket that clients use, if any."""
        self.certificate: object = None
        """The clients' TLS certificate."""

    def agent(self, *, persistent: bool) -> Agent:
        """
        Return the daemon's kind of client agent, whose connections all end here.
        """
        pool = connection_pool(self._clock, persistent=persistent)
        agent: Agent = Agent.usingEndpointFactory(self._clock, self, pool)
        return agent

    def endpointForURI(self, uri: URI) -> _Endpoint:
        return _Endpoint(self, uri.host.decode(), uri.port, secure=uri.scheme == b"https")

    def connect(self, protocol: Protocol, host: str, port: int, *, secure: bool) -> End:
        """
        Connect a client by a new wire.
        """
        there: Address = IPv4Address("TCP", host, port)
        here: Address = IPv4Address("TCP", self.client, 31337)
        if self.socket:
            there, here = UNIXAddress(self.socket), UNIXAddress("")
        server = End(self.site.buildProtocol(here), there, here)
        client = End(protocol, here, there)
        server.peer, client.peer = client, server
        server.certificate = self.certificate
        if secure:
            for end in (server, client):
                alsoProvides(end, ISSLTransport)
        self.ends.append((client, server))
        server.protocol.makeConnection(server)
        client.protocol.makeConnection(client)
        return client

    def move(self) -> bool:
        """
        Do one thing on each wire; return True if there was any.
        """
        self.ends = [wire for wire in self.ends if any(end.connected for end in wire)]
        moved = [end.move() for wire in self.ends for end in wire]  # each of them, not only the first
        return any(moved)


class _Endpoint:
    def __init__(self, network: Network, host: str, port: int, *, secure: bool) -> None:
        self._network, self._host, self._port, self._secure = network, host, port, secure

    def connect(self, factory: Any) -> Deferred[Any]:
        if self._network.down is not None:
            from twisted.internet.defer import fail

            return fail(self._network.down)
        protocol = factory.buildProtocol(None)
        self._network.connect(protocol, self._host, self._port, secure=self._secure)
        return succeed(protocol)


class Reply(Protocol):
    """
    What a client has received so far.

    @ivar code: the status; 0 before the headers came.
    @ivar ended: how it ended: "whole", "broken", or not yet.
    """

    def __init__(self) -> None:
        self.code = 0
        self.headers = Headers()
        self.length: int | None = None
        self.body = bytearray()
        self.ended = ""
        self.wire: End

    def begin(self, response: IResponse) -> None:
        self.code, self.headers = response.code, response.headers
        told = self.header("Content-Length")  # Twisted leaves it among the headers only in answers to HEAD
        self.length = int(told) if told else response.length if isinstance(response.length, int) else None
        response.deliverBody(self)

    def fail(self, failure: Failure) -> None:
        self.ended = "broken"

    def dataReceived(self, data: bytes) -> None:
        self.body += data

    def connectionLost(self, reason: Failure = Failure(ConnectionDone())) -> None:  # noqa: B008
        # A body that only the connection's end delimits looks whole if that end is a clean one.
        self.ended = "whole" if reason.check(ResponseDone, PotentialDataLoss) else "broken"

    def header(self, name: str) -> str | None:
        """
        Return the only value of a header.
        """
        values = self.headers.getRawHeaders(name, [])
        assert len(values) < 2, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def cache(self) -> str | None:
        """
        Return the value of X-Cache-Status.
        """
        return self.header("X-Cache-Status")

    @property
    def error(self) -> tuple[int, str, str]:
        """
        Return status, code and message of a registry error.
        """
        (error,) = json.loads(self.body)["errors"]
        return self.code, error["code"], error["message"]

    def stop_reading(self) -> None:
        self.wire.reading = False

    def read_on(self) -> None:
        self.wire.reading = True

    def leave(self) -> None:
        """
        Close the connection without waiting for the rest.
        """
        self.wire.abortConnection()


@implementer(IBodyProducer)
class _Body:
    """
    A request body, sent all at once.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.length = data, len(data)

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self._data)
        return succeed(None)

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        pass


class Raw(Protocol):
    """
    A client that writes raw bytes and keeps every byte that comes back.
    """

    def __init__(self) -> None:
        self.got = bytearray()
        self.closed = False
        self.lost: Failure
        """How the connection was lost."""

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Failure = Failure(ConnectionDone())) -> None:  # noqa: B008
        self.closed, self.lost = True, reason


class Administered:
    """
    A daemon with an admin port.

    @ivar admin: the network to it.
    """

    admin: Network

    def flush(self) -> None:
        """
        Let everything happen that can happen now.
        """
        raise NotImplementedError

    def ask_admin(
        self,
        path: str,
        method: str = "GET",
        host: str = "localhost",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        port: Network | None = None,
    ) -> Reply:
        """
        Send a request to the admin port, or to another.
        """
        reply, url = Reply(), f"http://{host}:5001{path}"
        fields = Headers({name: [value] for name, value in (headers or {}).items()})
        producer = None if body is None else _Body(body)
        agent = (port or self.admin).agent(persistent=False)
        asked: Deferred[IResponse] = agent.request(method.encode(), url.encode(), fields, producer)
        asked.addCallbacks(reply.begin, reply.fail)
        self.flush()
        return reply

    def figure(self, line: str) -> float:
        """
        Return the value of a metric, named with its labels as in /metrics, but without the registry, of which there is
        only one.
        """
        page = re.sub(r"\{registry=\"[^\"]*\"\}", "", self.ask_admin("/metrics").body.decode())
        page = re.sub(r"\{registry=\"[^\"]*\",", "{", page)
        (value,) = [each.rpartition(" ")[2] for each in page.splitlines() if each.rpartition(" ")[0] == line]
        return float(value)


class Other:
    """
    The client of a registry other than the default one.
    """

    def __init__(self, known: Known, standin: StandIn, clock: Clock, tally: Tally) -> None:
        table = known.table
        self.standin, self.back = standin, Network(QuietSite(standin.resource, reactor=clock), clock)

        def issue() -> Deferred[Token]:
            return deferLater(clock, 0, lambda: Token(standin.issue_token(), clock.seconds() + 12 * 3600))

        self.tokens = TokenService(issue, clock, clock.seconds, chance=lambda: 0.5)
        agent = self.back.agent(persistent=True)
        pool: Any = agent._pool  # noqa: SLF001
        wire = Wire(
            MeteredAgent(agent, standin.registry, tally, clock, known.label),
            clock,
            chance=lambda: 0.0,
            leave=pool.leave,
            name=table.name,
        )
        governor, circuit = Governor(Quotas(), 128, clock, table.name), Circuit(clock.seconds, table.name)
        self.authorization: Authorization = Basic(self.tokens)
        if table.protocol is not TableProtocol.ECR:
            login = None if table.anonymous else self.tokens
            self.authorization = Bearer(standin.registry, wire, login, table.realms)
        endpoint = Endpoint(standin.registry, wire, self.authorization, governor, circuit)
        self.upstream = Upstream(
            endpoint,
            wire,
            follows=table.protocol is TableProtocol.OCI,
            lists_referrers=table.protocol is TableProtocol.ECR,
        )
        self.asking = Asking(
            name=table.name,
            label=known.label,
            tokens=self.tokens,
            wire=wire,
            circuit=circuit,
            governor=governor,
            clock=clock,
        )


class Daemon(Administered):
    """
    The daemon over a stand-in ECR.

    @ivar back: the network to ECR and its buckets.
    @ivar front: the network to the clients.
    @ivar scheme: http or https, for the clients.
    @ivar set_by: how many seconds the wall clock was set forward; the clock of timers is never set.
    """

    def __init__(  # noqa: PLR0913, PLR0915 (what a test may want otherwise)
        self,
        standin: StandIn,
        clock: Clock,
        root: Path,
        *,
        limit: int = 2**30,
        pattern: str = ".*",
        aliases: Collection[RegistryId] = (),
        unknown_status: int = 404,
        cache_key: str = "$uri",
        tag_ttl: float = 0,
        in_thread: InThread = at_once,
        disk: Disk | None = None,
        fetch: Callable[[], Deferred[Token]] | None = None,
        lanes: Lanes | None = None,
        read_ahead: bool = False,
        agent: Callable[[Network], IAgent] = lambda back: back.agent(persistent=True),
        admission: Admission | None = None,
        budget: Budget = Budget(),  # noqa: B008 (it is frozen)
        chance: float = 0.0,
        quotas: Quotas = Quotas(),  # noqa: B008
        together: int = 128,
        limits: Limits | None = None,
        admin_hosts: frozenset[str] = frozenset(),
        pages: Pages | None = None,
        index: Index | None = None,
        others: Mapping[RegistryTable, StandIn] | None = None,
        replica: StandIn | None = None,
        list_repositories: Callable[[], Deferred[Sequence[str]]] | None = None,
        hot_path: bool = True,
        tracing: Tracing | None = None,
    ) -> None:
        self.standin, self.clock, self.limit, self.scheme = standin, clock, limit, "http"
        self.draining = False
        self.set_by = 0.0
        self.back = Network(QuietSite(standin.resource, reactor=clock), clock)
        self.store = Store(root, self.now, index)
        self.store.prepare()
        if hot_path:  # without it, each request opens its file
            self.store.files.kept = KeptOpen(KEPT, clock, at_once)
        disk = disk or Disk.of(in_thread)
        self.janitor = Janitor(self.store, limit, disk.writing, clock)
        self.scrub = Scrub(self.store, self.janitor.tidy, at_once, clock)
        self.condition = Condition(self.store, at_once, clock)
        self.tokens = TokenService(fetch or self._issue, clock, self.now, chance=lambda: 0.5)
        self.governor = Governor(quotas, together, clock)
        self.circuit = Circuit(clock.seconds)
        # Without jitter the next attempt comes at once, unless upstream asks for more time.
        self.figures = Figures("0", now=self.now)
        name = RegistryId.of_url(standin.registry).host
        metered = MeteredAgent(agent(self.back), standin.registry, self.figures.upstream, clock, name)
        wire = Wire(metered, clock, budget, chance=lambda: chance)
        endpoint = Endpoint(standin.registry, wire, Basic(self.tokens), self.governor, self.circuit)
        self.upstream = Upstream(endpoint, wire)
        self._backs = list[Network]()
        if replica is not None:
            copy = table_of_settings(replica.registry, "us-east-1", instance_auth=False)
            known = Known(copy, RegistryId.of_url(replica.registry), name)
            second = Other(known, replica, clock, self.figures.upstream)
            self._backs.append(second.back)
            second.tokens.startService()
            self.upstream = Replicated(endpoint, wire, [second.upstream])
        self.lanes = lanes or Lanes()
        self.registry = RegistryId.of_url(standin.registry)
        table, others = table_of_settings(standin.registry, "eu-west-1", instance_auth=False), others or {}
        self.table, self.aliases, self.unknown_status = table, aliases, unknown_status
        self.others = dict[str, Other]()
        self.asking = Asking(
            name=table.name,
            label=table.name,
            tokens=self.tokens,
            wire=wire,
            circuit=self.circuit,
            governor=self.governor,
            clock=clock,
        )
        self.namespaces = Namespaces(parse_pattern(pattern), at_once, clock)
        self.listings = 0
        self.catalog = Catalog(list_repositories or self._list, self.namespaces.choose, clock)
        self.worlds = Worlds(self._world(others))
        self.cache = Cache(self.store, self.janitor, disk, self.now, self.worlds.checks)
        self.askings = self.worlds.askings
        self.pull_through = PullThrough(
            self.worlds.upstream,
            self.cache,
            disk,
            self.now,
            tag_ttl=tag_ttl,
            lanes=self.lanes,
            ahead=self._ahead if read_ahead else None,
            call_later=clock.callLater,
        )
        key = CacheKey.parse(cache_key)
        registry = Registry(self.pull_through, self.worlds, key, disk.reading)
        ready, self.crowd = Ready(self.readiness), Crowd(limits or Limits())
        self.access_log = AccessLog(clock)
        self.hot_path = None
        if hot_path and not key.asks:
            self.hot_path = HotPath(self.pull_through, self.worlds, admission, self.now, disk.reading, b"key")
        self.site = make_site(
            registry,
            ready,
            clock,
            admission=admission,
            crowd=self.crowd,
            served=self.figures.served,
            access_log=self.access_log,
            pages=pages,
            hot_path=self.hot_path,
            tracing=tracing,
        )
        self.figures.watch(*of_cache(self.store, self.janitor), *of_transfers(self.pull_through))
        self.figures.watch(*of_clients(self.crowd, 100), *of_registries(self.askings))
        self.figures.watch(*of_disk(self.condition))
        self.process = Process(
            self.store,
            self.janitor,
            self.askings,
            self.pull_through,
            self.worlds.called,
            self.readiness,
            in_thread,
            lambda: Clients(self.crowd.connected, 100, self.crowd.transferring, 0.25),
        )
        incidents = Incidents(self.now)
        self.status = Status(
            *(standin.registry, self.figures, self.readiness, self.process.standing, incidents, self.now, clock),
            self.worlds.called,
        )
        # Separate, so that tests which count or hold calls in threads see only their own.
        # At once: tests that count or hold calls in threads mean other calls.
        self.purges = Purges(self.store.index, self.cache.forget_purged, at_once, clock)
        inventory = Inventory(self.store)
        contents = Contents(self.store, inventory)
        self.prefetching = Prefetching(self.pull_through, self.worlds, CacheKey.parse(cache_key))
        upkeep = Upkeep(self.store, inventory, contents, self.now)
        api = Api(inventory, upkeep, self.purges.look, self.prefetching.begin, in_thread, in_thread, clock)
        view = ContentsView(contents, self.status, in_thread)
        metrics = Metrics(self.figures, self.readiness)
        self.scraped = Network(make_metrics_site(metrics, ready, clock), clock)
        self.admin = Network(make_admin_site(metrics, ready, self.status, view, api, clock, admin_hosts), clock)
        self.front = Network(self.site, clock)
        self._asking = self.front.agent(persistent=False)
        self.replies: list[Reply | Raw] = []
        """The responses to clients."""
        self.shown = SHOWN
        """The clients' Authorization header, unless a test changes it."""
        self.janitor.startService()
        self.scrub.startService()
        self.purges.startService()
        self.tokens.startService()
        _, sampler = self.status.services  # the other one gets the log, which outlives this daemon: see DaemonTestCase
        sampler.startService()

    def _ahead(self, transfers: Transfers) -> ReadingAhead:
        return ReadingAhead(transfers, self.cache, self.now, self.clock.callLater, lambda: not self.draining)

    def now(self) -> float:
        """
        Return the wall-clock time.
        """
        return self.clock.seconds() + self.set_by

    def _issue(self) -> Deferred[Token]:
        # Not at once: AWS is asked in a thread.
        return deferLater(self.clock, 0, lambda: Token(self.standin.issue_token(), self.clock.seconds() + 12 * 3600))

    def _list(self) -> Deferred[Sequence[str]]:
        self.listings += 1
        return deferLater(self.clock, 0, lambda: self._listed(list(self.standin.repositories)))

    def reload(self, others: Mapping[RegistryTable, StandIn]) -> None:
        """
        Reload with other registries beside the default one.
        """
        self.worlds.latest = self._world(others, self.worlds.latest.upstreams)

    def _world(self, others: Mapping[RegistryTable, StandIn], before: Upstreams | None = None) -> World:
        standins = {each.name: standin for each, standin in others.items()}

        def make(known: Known) -> tuple[Upstream, Asking]:
            name = known.label
            if name not in standins:
                return self.upstream, self.asking
            other = self.others[name] = Other(known, standins[name], self.clock, self.figures.upstream)
            self._backs.append(other.back)
            other.tokens.startService()
            return other.upstream, other.asking

        registries = Registries([self.table, *others], self.aliases, self.unknown_status)
        self._listed, namespaces = registries.listed, self.namespaces
        return World(registries, Upstreams(registries, make, before), lambda _: namespaces, self.catalog)

    async def readiness(self) -> Readiness:
        """
        Return the readiness that tap would report.
        """
        found = await self.condition.latest()
        sources = [each.source() for each in self.askings()]
        return judge(draining=False, sources=sources, disk=found.reasons, filled=found.filled, index=found.index)

    def kill(self) -> None:
        """
        End as by SIGKILL: the kernel closes files and connections, and nothing is cleaned up.
        """
        for download in self.pull_through.transfers():
            for backing in (download._backing, *download._earlier):  # noqa: SLF001
                if isinstance(backing, FileBacked | PeerBacked) and backing._file is not None:  # noqa: SLF001
                    backing._file.close()  # noqa: SLF001
        for _, server in self.back.ends:
            if server.connected:
                server._over(ConnectionLost())  # noqa: SLF001

    def flush(self) -> None:
        """
        Let everything happen that can happen now.
        """
        for _ in range(100_000):
            self.clock.advance(0)
            networks = self.back, self.front, self.admin, self.scraped, *self._backs
            if not sum(each.move() for each in networks):
                return
        raise AssertionError("it never comes to rest")

    def ask(self, method: str, path: str, **headers: str) -> Reply:
        """
        Send a request and flush. Underscores in header names stand for hyphens.
        """
        reply = self.send(method, path, **headers)
        self.flush()
        return reply

    def send(self, method: str, path: str, **headers: str) -> Reply:
        """
        Send a request; it moves with the next flush.
        """
        reply = Reply()
        self.replies.append(reply)
        shown = {"Authorization": self.shown, **headers} if self.shown else headers
        fields = Headers({name.replace("_", "-"): [value] for name, value in shown.items()})
        url = f"{self.scheme}://proxy.example{path}"
        asked: Deferred[IResponse] = self._asking.request(method.encode(), url.encode(), fields)
        asked.addCallbacks(reply.begin, reply.fail)
        reply.wire = self.front.ends[-1][0]
        return reply

    def raw(self, data: bytes, network: Network | None = None) -> bytes:
        """
        Send bytes on a connection of their own, and return what came back.

        @param network: the network to use; by default that of the clients.
        """
        client = Raw()
        self.replies.append(client)
        (network or self.front).connect(client, "proxy.example", 80, secure=False).write(data)
        self.flush()
        return bytes(client.got)


class DaemonTestCase(SynchronousTestCase):
    """
    A daemon, a stand-in ECR, a clock, and invariants that are checked after each test:

    - content matches its digest;
    - the files of the cache are within the limit;
    - the token went only to the registry, and no header of a client went anywhere;
    - no token, presigned query or password of a client is in any log event, in any answer to a client,
      in the metrics, in other requests to upstream, or in the representations of the daemon's own objects.

    @cvar kind: the class to start: L{Daemon}, or a subclass.
    """

    kind: Callable[..., Any] = Daemon
    hot_path = True
    """Whether the hot path is enabled."""
    more_headers: frozenset[str] = frozenset()
    """Headers that requests to upstream may have besides the usual ones."""
    index_in_memory = True
    """Whether the index is in memory, as no other process needs it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.standin = StandIn(self.clock)
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.events: list[LogEvent] = []
        self.daemons: list[Daemon] = []
        self.index = self.make_index()
        observer = cast(ILogObserver, self.note)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.addCleanup(self.check_all)  # not tearDown: trial calls that after all cleanups, when the files are gone
        self.daemon = self.start()

    def make_index(self) -> Index:
        """
        Open the index as a process does; one in memory starts empty.
        """
        now = self.clock.seconds
        index = Index(self.root, lambda: self.daemon.now() if self.daemons else now(), memory=self.index_in_memory)
        self.addCleanup(index.close)
        return index

    def note(self, event: LogEvent) -> None:
        """
        Keep a log event.
        """
        self.events.append(event)
        for daemon in self.daemons:
            daemon.status.incidents(event)

    def start(self, **options: Any) -> Daemon:
        """
        Start a daemon over the test's cache directory; the test's other helpers use this one from now on.
        """
        if self.daemons and not self.index_in_memory:
            self.index = self.make_index()
        self.daemon = self.kind(
            self.standin, self.clock, self.root, **{"index": self.index, "hot_path": self.hot_path, **options}
        )
        self.daemons.append(self.daemon)
        self.daemon.flush()
        return self.daemon

    def get(self, path: str, **headers: str) -> Reply:
        return self.daemon.ask("GET", path, **headers)

    def head(self, path: str, **headers: str) -> Reply:
        return self.daemon.ask("HEAD", path, **headers)

    def flush(self) -> None:
        self.daemon.flush()

    def pass_time(self, seconds: float) -> None:
        """
        Advance the clock, a second at a time.
        """
        whole = int(seconds)
        for step in [1.0] * whole + [seconds - whole]:
            self.clock.advance(step)
            self.flush()

    def arrive(self, digest: str, count: int) -> None:
        """
        Have a bucket send so many bytes more, and let them reach the client.
        """
        self.standin.deliver(digest, count)
        self.flush()
        self.clock.advance(GATHER_SECONDS)
        self.flush()

    def answer_with(self, data: bytes, *, close: bool = True) -> None:
        """
        Have ECR answer the next request with C{data}, verbatim; then flush.
        """
        self.standin.hang("registry", times=1)
        self.flush()
        _, server = self.daemon.back.ends[-1]
        server.write(data)
        if close:
            server.loseConnection()
        self.flush()

    # Assertions about answers.

    def assertWhole(self, reply: Reply, body: bytes, cache: str | None = None, code: int = 200) -> None:
        """
        Assert that the client has received C{body}, and that it was complete.
        """
        self.assertEqual((code, "whole", len(body)), (reply.code, reply.ended, len(reply.body)))
        self.assertTrue(body == reply.body, "other bytes came")
        if cache is not None:
            self.assertEqual(cache, reply.cache)

    def assertRefused(self, reply: Reply, status: int, code: str, saying: str = "") -> None:
        """
        Assert that the client got an error in the distribution spec's JSON.
        """
        self.assertEqual("whole", reply.ended)
        found = reply.error
        self.assertEqual((status, code), found[:2], found[2])
        self.assertIn(saying, found[2])
        self.assertEqual("application/json", reply.header("Content-Type"))

    def assertBroken(self, reply: Reply, body: bytes) -> None:
        """
        Assert that the client has received at most a part of C{body}, and can tell that it is not complete.
        """
        self.assertEqual("broken", reply.ended)
        self.assertLess(len(reply.body), max(1, len(body)))
        self.assertTrue(body.startswith(bytes(reply.body)), "other bytes came")

    # Assertions about the cache.

    def files(self, top: str = "content") -> list[Path]:
        return [path for path in sorted((self.root / top).rglob("*")) if path.is_file()]

    def arriving(self) -> list[Path]:
        """
        List the data files of downloads, active or interrupted, without the claims beside them.
        """
        files = self.files("arriving")
        return [path for path in files if path.suffix != ".claim" or path.with_suffix("") not in files]

    def has(self, digest: str) -> bool:
        """
        Return True if C{digest} is in the cache.
        """
        return self.file_of(digest).is_file()

    def file_of(self, digest: str) -> Path:
        """
        Return the path of the file of C{digest}.
        """
        return self.root / self.daemon.store.content_path(Digest.parse(digest))

    def used(self) -> int:
        """
        Return how many bytes of disk all files of the cache use, incomplete ones included.
        """
        return sum(on_disk(path.stat().st_size) for path in [*self.files("content"), *self.arriving()])

    def entries(self) -> dict[EntryKey, Entry]:
        """
        Return what the index contains about repositories.
        """
        return {key: entry for key, entry, _ in self.index.entries()}

    def lose_index(self) -> None:
        """
        Have the next daemon find no index.
        """
        self.index = self.make_index()

    def promised(self) -> int:
        """
        Return how many bytes of disk are reserved for downloads or used by what interrupted ones have left.
        """
        return self.index.totals.arriving

    def logged(self) -> str:
        return "\n".join(f"{formatEvent(event)} {event.get('log_failure', '')}" for event in self.events)

    # Invariants after every test.

    def check_all(self) -> None:
        self.check_content()
        self.assertLessEqual(self.used(), max(daemon.limit for daemon in self.daemons))
        self.check_credentials()
        self.check_secrets()

    def check_content(self) -> None:
        for path in self.files():
            if not path.is_symlink():
                found = hashlib.new(path.parent.parent.name, path.read_bytes()).hexdigest()
                self.assertEqual(path.name, found, "content that is not what its name says")

    def check_credentials(self) -> None:
        for asked in self.standin.asked:
            shown = asked.headers.get("authorization", "")
            if asked.service != "registry":
                self.assertEqual("", shown, f"{asked.path} was shown a credential")
            self.assertNotIn("client", shown)
            sent = set(asked.headers)
            known = {"host", "user-agent", "accept", "accept-encoding", "authorization", "range", "connection"}
            self.assertEqual(set(), sent - known - self.more_headers, "headers that nobody listed")

    def secrets(self) -> list[str]:
        """
        Return everything that must stay secret.
        """
        signed = ("X-Amz-Signature", "X-Amz-Security-Token", "X-Amz-Credential", *self.standin.urls.signatures())
        return [*signed, "QVdTOg", *self.standin.tokens.issued(), PASSWORD, SHOWN.split()[1]]

    def check_secrets(self) -> None:
        """
        Assert that no secret is visible anywhere.
        """
        told = [*map(all_of, self.events), *(all_of_reply(each) for each in self.replies())]
        told += [repr(each) for daemon in self.daemons for each in ours(daemon)]
        told += [daemon.figures.page().decode() for daemon in self.daemons]
        # The page shows the same snapshot.
        told += [daemon.ask_admin("/status.json").body.decode() for daemon in self.daemons]
        told += [f"{asked.path} {asked.query}" for asked in self.standin.asked if asked.service == "registry"]
        for asked in self.standin.asked:
            told.append(repr({name: value for name, value in asked.headers.items() if name != "authorization"}))
        text = "\n".join(told)
        for secret in self.secrets():
            if secret in text:
                at = text.index(secret)
                self.fail(f"{secret[:60]} is told in: {text[max(0, at - 300) : at + 60]}")

    def replies(self) -> list[Reply | Raw]:
        return [each for daemon in self.daemons for each in daemon.replies]


def all_of(event: LogEvent) -> str:
    """
    Return everything that a log might show of an event.
    """
    text = f"{formatEvent(event)} {event!r} {event.get('log_failure', '')!r}"
    failure = event.get("log_failure")
    return text if failure is None else text + failure.getTraceback()


def all_of_reply(reply: Reply | Raw) -> str:
    """
    Return the headers that a client got, and the body unless it is content.
    """
    if isinstance(reply, Raw):
        return reply.got.decode("latin-1")
    body = reply.body.decode("latin-1") if reply.code >= ERRORS or len(reply.body) < BUFFER else ""
    return f"{list(reply.headers.getAllRawHeaders())!r} {body}"


def ours(daemon: Daemon) -> list[object]:
    """
    Find the objects of the daemon's own classes that can be reached from its parts, attribute by attribute.
    """
    found: dict[int, object] = {}
    waiting: list[object] = list(vars(daemon).values())
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset | deque):
            waiting += each
        elif type(each).__module__.startswith("ecrproxy."):
            found[id(each)] = each
            waiting += [getattr(each, name) for name in attributes_of(each)]
    return list(found.values())


def attributes_of(thing: object) -> list[str]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [name for name in (*getattr(thing, "__dict__", ()), *slots) if hasattr(thing, name)]
