"""
Limits for clients: connections, transfers, sizes and timeouts, with counters of the refusals.

IPv6 addresses are counted by their /64 network, which usually belongs to one owner.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.logger import Logger

from ecrproxy.access.bodies import BODIES_BYTES, Bodies
from ecrproxy.addresses import unmapped
from ecrproxy.shares import share

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """
    The limits for clients; 0 for no limit.

    @ivar header_seconds: to receive the request line and headers.
    @ivar idle_seconds: between two requests.
    @ivar send_seconds: without progress while sending a response.
    @ivar header_bytes: of the request line and headers together.
    @ivar header_count: of a request's headers.
    @ivar connections: of all clients.
    @ivar connections_per_address: from one address.
    @ivar transfers: concurrent responses with a blob of any size, or of more than 64 KiB.
    """

    header_seconds: float = 10
    idle_seconds: float = 65
    send_seconds: float = 300
    header_bytes: int = 2**14
    header_count: int = 100
    connections: int = 10_000
    connections_per_address: int = 1000
    transfers: int = 4096

    def share(self, processes: int, room: int = 0, *, chosen: bool = False) -> Limits:
        """
        Return the limits of one of several processes.

        By default, one address may use half of the process's connections. A limit that the operator chose applies
        unchanged, because the address may be a cluster behind NAT.

        @param room: connections for which the process has descriptors; 0 for no limit.
        @param chosen: True if the operator chose the limit per address.
        """
        connections, address, transfers = (
            share(limit, processes) for limit in (self.connections, self.connections_per_address, self.transfers)
        )
        if room:
            connections = min(connections or room, room)
        half = max(1, connections // 2) if connections else self.connections_per_address
        address = min(self.connections_per_address, max(address, half) if chosen else half)
        return replace(self, connections=connections, connections_per_address=address, transfers=transfers)


COUNTED: Final = {
    "connections": "refused_connections",
    "transfers": "refused_transfers",
    "bad_request": "bad_requests",
    "slow_head": "slow_heads",
    "idle": "idle",
    "slow_reader": "slow_readers",
}
"""The limits' names in metrics, and the attributes of L{Crowd} that count refusals."""


SPARE: Final = 16
"""Connections beyond the limit, so that a daemon full of slow clients still answers a kubelet's probes."""
FULL: Final = "PROXY_CONNECTIONS or RLIMIT_NOFILE is reached, and no connection is idle"


class Closable(Protocol):
    """
    A connection.
    """

    @property
    def settled(self) -> bool:
        """Whether the connection has been idle so long that a request is unlikely to be on its way."""

    @property
    def unanswered(self) -> bool:
        """Whether a client waits for a response, and nothing of it has been sent."""

    def abort(self) -> None:
        """Close at once; unsent data is lost."""

    def yield_place(self) -> None:
        """Close an idle or unanswered connection; the kernel still sends the rest of an earlier response."""


class Crowd:
    """
    Counts connections, transfers and refusals of one process.

    @param processes: number of processes, each with its share of the limits.
    @param full: logged when all connections are taken.
    @ivar connected: open connections.
    @ivar transferring: current transfers.
    @ivar bodies: response bodies sent from memory.
    @ivar refused_connections: connections refused because of a limit.
    @ivar refused_transfers: transfers refused because of a limit.
    @ivar bad_requests: requests that the connection rejected.
    @ivar slow_heads: connections closed because the request's head was incomplete in time.
    @ivar idle: connections closed between requests.
    @ivar slow_readers: connections closed because the client stopped reading.
    @ivar idle_ones: idle connections with their addresses, longest idle first.
    @ivar half_closed: connections whose client sends nothing more, and waits for a response or has left, with their
        addresses, oldest first. TCP does not distinguish them until something is sent.
    @ivar spare: connections beyond the limit, oldest first; they only get health responses.
    """

    def __init__(self, limits: Limits, processes: int = 1, full: str = FULL) -> None:
        self.limits, self._processes, self._full = limits, processes, full
        self.connected = self.transferring = 0
        self.bodies = Bodies(share(BODIES_BYTES, processes))
        self.refused_connections = self.refused_transfers = self.bad_requests = 0
        self.slow_heads = self.idle = self.slow_readers = 0
        self._by_address: Counter[str] = Counter()
        self.idle_ones: dict[Closable, str] = {}
        self.half_closed: dict[Closable, str] = {}
        self.spare: dict[Closable, None] = {}

    @property
    def transferring_everywhere(self) -> int:
        """
        Return the number of transfers in all processes, assuming that the others have as many as this one.
        """
        return self.transferring * self._processes

    def met(self, limit: str) -> int:
        """
        Return how often a limit was reached.

        @param limit: a name in L{COUNTED}.
        """
        return int(getattr(self, COUNTED[limit]))

    def enter(self, address: str) -> bool:
        """
        Admit a connection and return True, or return False if it exceeds a limit. Call C{leave} at its end.

        At a limit, the connection that has been idle longest is closed to make room: nodes keep unused connections
        open, and a whole cluster behind NAT has one address. If none is idle, it is the oldest half-closed one
        without a response: most such clients have left. The new one is refused only if there is none of these either.

        @param address: as L{counted} returns it; empty for connections without one.
        """
        too_many = self.is_too_many(address)
        full = 0 < self.limits.connections <= self.connected
        if (too_many or full) and not self._make_room(address if too_many else None):
            if too_many:
                self.refuse_connection("an address has reached PROXY_CONNECTIONS_PER_ADDRESS", address)
            return False
        self.connected += 1
        self._by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """
        Remove a connection.
        """
        self.connected -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def is_too_many(self, address: str) -> bool:
        """
        Return True if an address has reached its limit of connections.
        """
        return bool(address) and 0 < self.limits.connections_per_address <= self._by_address[address]

    def refuse_connection(self, why: str, address: str = "") -> None:
        """
        Count and log a connection that is closed because of a limit.
        """
        self.refused_connections += 1
        log.warn("Connections are refused: {why}; {address}", why=why, address=address or "all", once=why)

    def enter_spare(self, connection: Closable) -> None:
        """
        Keep a connection beyond the limit until C{SPARE} newer ones have come.
        """
        if len(self.spare) >= SPARE:
            oldest = next(iter(self.spare))
            del self.spare[oldest]
            self.refuse_connection(self._full)
            oldest.abort()
        self.spare[connection] = None

    def _make_room(self, address: str | None) -> bool:
        """
        Close a connection that does without; return True if there was one.

        @param address: close only its connections; None for any.
        """
        for each, whose in self.idle_ones.items():
            if not each.settled:
                break
            if address in (None, whose):
                del self.idle_ones[each]
                self.refuse_connection("the maximum is reached, and idle connections are closed first", address or "")
                each.yield_place()
                return True
        for each, whose in self.half_closed.items():
            if address in (None, whose) and each.unanswered:
                del self.half_closed[each]
                self.refuse_connection("the maximum is reached, and half-closed connections are closed", address or "")
                each.yield_place()
                return True
        return False

    @property
    def is_full_of_transfers(self) -> bool:
        """
        Return True if the limit of transfers is reached.
        """
        return 0 < self.limits.transfers <= self.transferring

    def begin_transfer(self) -> bool:
        """
        Start a transfer and return True, or return False if the limit is reached. Call C{end_transfer} at its end.
        """
        if self.is_full_of_transfers:
            self.refused_transfers += 1
            return False
        self.transferring += 1
        return True

    def end_transfer(self) -> None:
        """
        End a transfer.
        """
        self.transferring -= 1


class Patience:
    """
    A restartable timeout.

    @param seconds: 0 for no timeout.
    @param over: called when the timeout expires.
    """

    def __init__(self, call_later: Callable[..., Any], seconds: float, over: Callable[[], None]) -> None:
        self._call_later, self._seconds, self._over = call_later, seconds, over
        self._call: IDelayedCall | None = None

    @property
    def waiting(self) -> bool:
        """
        Whether the timeout is running.
        """
        return self._call is not None and self._call.active()

    def begin(self) -> None:
        """
        Start or restart the timeout.
        """
        if self._call is not None and self._call.active():
            self._call.reset(self._seconds)
        elif self._seconds:
            self._call = self._call_later(self._seconds, self._over)

    def end(self) -> None:
        """
        Stop the timeout.
        """
        if self._call is not None and self._call.active():
            self._call.cancel()
        self._call = None


def counted(address: str) -> str:
    """
    Return the name under which an address is counted: IPv4 as it is, IPv6 by its /64.
    """
    plain = unmapped(address)
    if ":" not in plain:
        return plain
    try:
        return str(ipaddress.IPv6Network((plain.partition("%")[0], 64), strict=False))
    except ValueError:
        return plain
