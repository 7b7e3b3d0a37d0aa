"""
What clients may have of the daemon: how much of each thing, for how long, and the figures of who wanted more.

An address is counted as a whole network where its owner has one: IPv6 addresses by their /64.
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
    The most that clients may have; 0 for no limit.

    @ivar header_seconds: for the line and the headers of a request.
    @ivar idle_seconds: between two requests.
    @ivar send_seconds: for which a client may take nothing of its answer.
    @ivar header_bytes: of a request's line and headers together.
    @ivar header_count: of a request's headers.
    @ivar connections: in all.
    @ivar connections_per_address: from one address.
    @ivar transfers: answers of more than 64 KiB, and with a blob of any size, that are under way.
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

        An address may have half of the process's connections; the rest is for others. A limit for an address that the
        operator chose counts, for the address may be that of a whole cluster behind NAT.

        @param room: connections for which the process has descriptors; 0 for no limit.
        @param chosen: whether the operator chose the limit of an address.
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
"""How figures name the limits, and where a L{Crowd} counts those who met them."""


SPARE: Final = 16
"""Connections beyond the limit, so that a kubelet's probe is answered by a daemon that is full of slow clients."""
FULL: Final = "as many are open as PROXY_CONNECTIONS or RLIMIT_NOFILE allow, and none is idle"


class Closable(Protocol):
    """
    A connection.
    """

    @property
    def settled(self) -> bool:
        """Whether it has been idle for long enough not to be about to ask."""

    def abort(self) -> None:
        """Close at once, whatever was written."""

    def yield_place(self) -> None:
        """Close an idle one: what the kernel has of the last answer is still sent."""


class Crowd:
    """
    Who is connected, how many transfers are under way, and what was refused.

    @param processes: how many such crowds there are, each with its part of the limits.
    @param full: what is logged where all connections are taken.
    @ivar connected: connections now.
    @ivar transferring: transfers now.
    @ivar bodies: what they are sent from memory.
    @ivar refused_connections: that were one too many.
    @ivar refused_transfers: likewise.
    @ivar bad_requests: that were refused at the connection.
    @ivar slow_heads: connections that were closed in the middle of a request's head.
    @ivar idle: connections that were closed between requests.
    @ivar slow_readers: connections that were closed because nothing of an answer was taken.
    @ivar idle_ones: connections that wait for a request, with their addresses; the one that has waited longest first.
    @ivar spare: connections beyond the limit, the oldest first: these get an answer about the daemon's health alone.
    """

    def __init__(self, limits: Limits, processes: int = 1, full: str = FULL) -> None:
        self.limits, self._processes, self._full = limits, processes, full
        self.connected = self.transferring = 0
        self.bodies = Bodies(share(BODIES_BYTES, processes))
        self.refused_connections = self.refused_transfers = self.bad_requests = 0
        self.slow_heads = self.idle = self.slow_readers = 0
        self._by_address: Counter[str] = Counter()
        self.idle_ones: dict[Closable, str] = {}
        self.spare: dict[Closable, None] = {}

    @property
    def transferring_everywhere(self) -> int:
        """
        Return how many transfers there are now, if the other processes have as many.
        """
        return self.transferring * self._processes

    def met(self, limit: str) -> int:
        """
        Tell how often a limit was met.

        @param limit: its name in L{COUNTED}.
        """
        return int(getattr(self, COUNTED[limit]))

    def enter(self, address: str) -> bool:
        """
        Take a connection in, unless it is one too many; who is let in leaves by C{leave}.

        Where all there may be are open, or all that the address may have, the one of them that has been idle longest is
        closed for it: nodes keep connections that they do not use, and behind NAT a whole cluster has one address.

        @param address: as L{counted} gives it; empty for who has none.
        """
        too_many = self.is_too_many(address)
        full = 0 < self.limits.connections <= self.connected
        if (too_many or full) and not self._close_an_idle_one(address if too_many else None):
            if too_many:
                self.refuse_connection("an address has as many as PROXY_CONNECTIONS_PER_ADDRESS allows", address)
            return False
        self.connected += 1
        self._by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """
        Let a connection go.
        """
        self.connected -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def is_too_many(self, address: str) -> bool:
        """
        Return True if an address has as many connections as it may.
        """
        return bool(address) and 0 < self.limits.connections_per_address <= self._by_address[address]

    def refuse_connection(self, why: str, address: str = "") -> None:
        """
        Count and log a connection that is closed for being one too many.
        """
        self.refused_connections += 1
        log.warn("Connections are refused: {why}; {address}", why=why, address=address or "all", once=why)

    def enter_spare(self, connection: Closable) -> None:
        """
        Let a connection stay beyond the limit, for as long as no more than C{SPARE} have come after it.
        """
        if len(self.spare) >= SPARE:
            oldest = next(iter(self.spare))
            del self.spare[oldest]
            self.refuse_connection(self._full)
            oldest.abort()
        self.spare[connection] = None

    def _close_an_idle_one(self, address: str | None) -> bool:
        """
        Close the connection that has been idle longest; return True if there was one.

        @param address: whose connections may be closed; everybody's if none.
        """
        for each, whose in self.idle_ones.items():
            if not each.settled:
                break
            if address in (None, whose):
                del self.idle_ones[each]
                self.refuse_connection("as many are open as may be, idle ones are closed first", address or "")
                each.yield_place()
                return True
        return False

    @property
    def is_full_of_transfers(self) -> bool:
        """
        Return True if there are as many transfers as may be.
        """
        return 0 < self.limits.transfers <= self.transferring

    def begin_transfer(self) -> bool:
        """
        Begin a transfer, unless it is one too many; what was begun ends by C{end_transfer}.
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
    How long something may be waited for.

    @param seconds: 0 for ever.
    @param over: called when it is at its end.
    """

    def __init__(self, call_later: Callable[..., Any], seconds: float, over: Callable[[], None]) -> None:
        self._call_later, self._seconds, self._over = call_later, seconds, over
        self._call: IDelayedCall | None = None

    @property
    def waiting(self) -> bool:
        """
        Whether there is something to wait for.
        """
        return self._call is not None and self._call.active()

    def begin(self) -> None:
        """
        Wait, from now on.
        """
        if self._call is not None and self._call.active():
            self._call.reset(self._seconds)
        elif self._seconds:
            self._call = self._call_later(self._seconds, self._over)

    def end(self) -> None:
        """
        Wait no longer.
        """
        if self._call is not None and self._call.active():
            self._call.cancel()
        self._call = None


def counted(address: str) -> str:
    """
    Tell under which name an address is counted: an IPv4 address by itself, one of IPv6 by its /64.
    """
    plain = unmapped(address)
    if ":" not in plain:
        return plain
    try:
        return str(ipaddress.IPv6Network((plain.partition("%")[0], 64), strict=False))
    except ValueError:
        return plain
