"""
Ask chosen name servers for the registry's and the buckets' names.

Address literals and names of the hosts file never go there. When the servers don't answer, the host's own
resolver is asked instead, and for a while nobody waits for them again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IHostnameResolver, IHostResolution, IResolutionReceiver
from twisted.logger import Logger
from twisted.names.dns import AAAA, A
from twisted.names.error import DNSNameError
from zope.interface import implementer

from ecrproxy.addresses import is_address

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress, IReactorTime, IResolver
    from twisted.python.failure import Failure

log = Logger()

TIMEOUTS: Final = (1, 2)
"""Seconds that each try at a server may take."""
FRESH_SECONDS: Final = 30.0
"""How long an answer is used again, as the nginx proxy does (C{valid=30s})."""
SILENT_SECONDS: Final = 60.0
"""How long servers that did not answer are left alone."""


@implementer(IHostResolution)
class Resolution:
    """
    A name that is being resolved.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """
        Nothing waits for it to be cancelled.
        """


@implementer(IHostnameResolver)
class ChosenServers:
    """
    Resolve names by C{servers}, else by the C{system}'s resolver.

    @param servers: asks the chosen servers.
    @param local: the names of the hosts file.
    """

    def __init__(
        self, servers: IResolver, system: IHostnameResolver, local: Sequence[str], clock: IReactorTime
    ) -> None:
        self._servers, self._system, self._clock = servers, system, clock
        self._local = frozenset(name.lower() for name in local)
        self._fresh: dict[str, tuple[float, Sequence[str]]] = {}
        self._silent_until = float("-inf")
        self._warned = False

    def resolveHostName(  # noqa: D102 (the interface)
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        now = self._clock.seconds()
        if is_address(hostName) or hostName.lower() in self._local or now < self._silent_until:
            return self._system.resolveHostName(
                resolutionReceiver, hostName, portNumber, addressTypes, transportSemantics
            )
        resolution = Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        known = self._fresh.get(hostName)
        if known is not None and 0 <= now - known[0] < FRESH_SECONDS:
            _deliver(known[1], resolutionReceiver, portNumber)
        else:
            asked = Deferred.fromCoroutine(self._resolve(hostName, resolutionReceiver, portNumber))
            asked.addErrback(lambda failure: log.failure("Resolving {name}", failure, name=hostName))
        return resolution

    def forget(self, name: str) -> None:
        """
        Ask the servers at the next question for C{name}: it couldn't be connected to where it was.
        """
        self._fresh.pop(name, None)

    async def _resolve(self, name: str, receiver: IResolutionReceiver, port: int) -> None:
        try:
            answers = await gatherResults(
                [
                    _records(self._servers.lookupAddress(name, TIMEOUTS)),
                    _records(self._servers.lookupIPV6Address(name, TIMEOUTS)),
                ],
                consumeErrors=True,
            )
        except Exception as problem:  # noqa: BLE001 (a server has many ways of not answering)
            self._fall_back(name, problem)
            self._system.resolveHostName(_Continued(receiver), name, port)
            return
        addresses = [address for records in answers for address in records]
        self._fresh[name] = (self._clock.seconds(), addresses)
        _deliver(addresses, receiver, port)

    def _fall_back(self, name: str, problem: Exception) -> None:
        self._silent_until = self._clock.seconds() + SILENT_SECONDS
        if not self._warned:
            self._warned = True
            log.warn(
                "PROXY_DNS_RESOLVER does not answer for {name} ({problem}): the host's resolver is used",
                name=name,
                problem=str(problem) or type(problem).__name__,
            )


@implementer(IResolutionReceiver)
class _Continued:
    """
    A receiver that has been told already that its resolution began.
    """

    def __init__(self, receiver: IResolutionReceiver) -> None:
        self.addressResolved, self.resolutionComplete = receiver.addressResolved, receiver.resolutionComplete

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """
        It did.
        """


def _records(asked: Deferred[Any]) -> Deferred[list[str]]:
    """
    Read the addresses of an answer; a name that does not exist has none.
    """

    def read(result: Sequence[Sequence[Any]]) -> list[str]:
        # The answers come first; a CNAME on the way has no address.
        found = (record for record in result[0] if record.type in (A, AAAA))
        return [str(ipaddress.ip_address(record.payload.address)) for record in found]

    def absent(failure: Failure) -> list[str]:
        failure.trap(DNSNameError)
        return []

    return asked.addCallbacks(read, absent)


def _deliver(addresses: Sequence[str], receiver: IResolutionReceiver, port: int) -> None:
    for address in addresses:
        kind = IPv6Address if ":" in address else IPv4Address
        receiver.addressResolved(kind("TCP", address, port))
    receiver.resolutionComplete()


def hosts_names(hosts: str) -> list[str]:
    """
    Read the names of a hosts file: hosts(5).
    """
    lines = (line.partition("#")[0].split() for line in hosts.splitlines())
    return [name for words in lines for name in words[1:]]
