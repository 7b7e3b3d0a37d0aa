"""
A name server under the test's control: it knows every name, and all of them are this machine.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import DatagramProtocol
from twisted.names import dns

from tests.registry_server import LOCAL

SLOW_SECONDS = 1.5


class NameServer(DatagramProtocol):
    """
    Answers every query for an address with this machine's.

    @ivar mood: C{well}, C{failing} (SERVFAIL), C{slow} or C{hung} (no answer).
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock, self.mood = clock, "well"

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        if self.mood == "hung":
            return
        message = dns.Message()
        message.fromStr(datagram)
        message.answer, message.recAv = 1, 1
        if self.mood == "failing":
            message.rCode = dns.ESERVER
        else:
            addresses = (each.name.name for each in message.queries if each.type == dns.A)
            message.answers = [dns.RRHeader(name, dns.A, payload=dns.Record_A(LOCAL), ttl=0) for name in addresses]
        wait = SLOW_SECONDS if self.mood == "slow" else 0
        self._clock.callLater(wait, self._send, message.toStr(), addr)

    def _send(self, data: bytes, addr: Any) -> None:
        if self.transport is not None:
            self.transport.write(data, addr)
