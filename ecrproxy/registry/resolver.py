"""
Resolves the names of the registry and the buckets, with configured name servers.

Address literals and names in the hosts file are never sent to them. If the servers don't answer, the host's own
resolver is asked instead, and for a while no request waits for the servers again, unless that resolver does not know
the name: then only the servers may know it. While a name can't be resolved, or slowly, its last known addresses are
used.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import IHostnameResolver, IHostResolution, IResolutionReceiver
from twisted.logger import Logger
from twisted.names.dns import AAAA, A
from twisted.names.error import DNSNameError
from zope.interface import implementer

from ecrproxy.addresses import is_address
from ecrproxy.cache.memory import Memory

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime, IResolver
    from twisted.python.failure import Failure

    _Question = tuple[str, int, tuple[type[IAddress], ...], str]

log = Logger()

TIMEOUTS: Final = (1, 2)
"""Timeouts of the attempts at a server, in seconds."""
FRESH_SECONDS: Final = 30.0
"""Seconds for which an answer is reused, as in the nginx proxy (C{valid=30s})."""
NAMES: Final = 2000
"""Maximum number of names whose addresses are kept: clients can make up any number of a wildcard's accounts."""
SILENT_SECONDS: Final = 10.0
"""Seconds for which servers that did not answer are not asked, while the host's resolver answers."""

LATE_SECONDS: Final = 1.0
"""Maximum seconds to wait for a name whose last addresses are known: a resolver retries after five seconds."""
DOUBT_SECONDS: Final = 3.0
"""The same if these addresses could not be connected to."""


@implementer(IHostResolution)
class Resolution:
    """
    A name resolution.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """
        Do nothing.
        """


@implementer(IHostnameResolver)
class ChosenServers:
    """
    Resolves names with C{servers}, or else the C{system}'s resolver.

    @param servers: asks the configured servers.
    @param local: the names in the hosts file.
    """

    def __init__(
        self, servers: IResolver, system: IHostnameResolver, local: Sequence[str], clock: IReactorTime
    ) -> None:
        self._servers, self._system, self._clock = servers, system, clock
        self._local = frozenset(name.lower() for name in local)
        self._fresh: Memory[str, tuple[float, Sequence[str]]] = Memory(NAMES)
        self._silent_until = float("-inf")

    def resolveHostName(  # noqa: D102 (the interface)
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        now = self._clock.seconds()
        if is_address(hostName) or hostName.lower() in self._local:
            return self._system.resolveHostName(
                resolutionReceiver, hostName, portNumber, addressTypes, transportSemantics
            )
        resolution = Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        known = self._fresh.get(hostName)
        if known is not None and 0 <= now - known[0] < FRESH_SECONDS:
            _deliver(known[1], resolutionReceiver, portNumber)
        elif now < self._silent_until:
            self._ask_system(hostName, resolutionReceiver, portNumber)
        else:
            asked = Deferred.fromCoroutine(self._resolve(hostName, resolutionReceiver, portNumber))
            asked.addErrback(lambda failure: log.failure("Resolving {name}", failure, name=hostName))
        return resolution

    def forget(self, name: str) -> None:
        """
        Ask the servers again for C{name}: its addresses could not be connected to.
        """
        self._fresh.drop(name)
        self._silent_until = float("-inf")

    async def _resolve(self, name: str, receiver: IResolutionReceiver, port: int) -> None:
        answers = [
            _records(maybeDeferred(self._servers.lookupAddress, name, TIMEOUTS)),
            _records(maybeDeferred(self._servers.lookupIPV6Address, name, TIMEOUTS)),
        ]
        outcomes: list[Any] = await DeferredList(answers, consumeErrors=True)
        addresses = [address for succeeded, records in outcomes if succeeded for address in records]
        problems = [failure.value for succeeded, failure in outcomes if not succeeded]
        if problems and not addresses:
            self._silent_until = self._clock.seconds() + SILENT_SECONDS
            log.warn(
                "PROXY_DNS_RESOLVER does not answer for {name} ({problem}): the host's resolver is used",
                name=name,
                problem=str(problems[0]) or type(problems[0]).__name__,
                once=name,
            )
            self._ask_system(name, receiver, port)
            return
        self._fresh.put(name, (self._clock.seconds(), addresses), 1)
        _deliver(addresses, receiver, port)

    def _ask_system(self, name: str, receiver: IResolutionReceiver, port: int) -> None:
        self._system.resolveHostName(_Continued(receiver, partial(self._unknown, name, receiver, port)), name, port)

    def _unknown(self, name: str, receiver: IResolutionReceiver, port: int) -> None:
        self._silent_until = float("-inf")
        _deliver((self._fresh.get(name) or (0.0, ()))[1], receiver, port)


@implementer(IHostnameResolver)
class SharedLookups:
    """
    Shares one lookup of a name between its callers, and uses its last addresses while there is no answer.

    The host's resolver has ten threads, and occupies one for many seconds while no name server answers: a hundred
    lookups of one such name blocked all others for minutes. Addresses need no lookup, and don't wait for those threads.

    @param names: resolves a name.
    """

    def __init__(self, names: IHostnameResolver, clock: IReactorTime) -> None:
        self._names, self._clock = names, clock
        self._asked: dict[_Question, _Lookup] = {}
        self._last: Memory[_Question, _Last] = Memory(NAMES)

    def resolveHostName(  # noqa: D102 (the interface)
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[type[IAddress]] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        resolution = Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        if is_address(hostName) and "%" not in hostName:  # only the host knows the number of an interface
            _deliver([hostName], resolutionReceiver, portNumber)
            return resolution
        question = hostName, portNumber, tuple(addressTypes or ()), transportSemantics
        lookup = self._asked.get(question)
        if lookup is not None:
            lookup.waiting.append(resolutionReceiver)
            if not lookup.limit.active():
                self._be_late(question)
            return resolution
        last = self._last.get(question)
        limit = self._clock.callLater(last.seconds if last else LATE_SECONDS, self._be_late, question)
        self._asked[question] = _Lookup([resolutionReceiver], limit)
        collected = _Collected(partial(self._complete, question))
        self._names.resolveHostName(collected, hostName, portNumber, addressTypes, transportSemantics)
        return resolution

    def forget(self, name: str) -> None:
        """
        Wait longer for the next answer for C{name}: its addresses could not be connected to.
        """
        for question in [each for each in self._last if each[0] == name]:
            last, lookup = self._last.get(question), self._asked.get(question)
            if last is None or last.seconds == DOUBT_SECONDS:
                continue
            self._last.put(question, _Last(last.addresses, DOUBT_SECONDS), 1)
            if lookup is not None:
                lookup.cancel_limit()
                lookup.limit = self._clock.callLater(DOUBT_SECONDS, self._be_late, question)

    def _be_late(self, question: _Question) -> None:
        """
        Answer the callers with the last addresses, if there are any.
        """
        if addresses := self._last_of(question):
            lookup = self._asked[question]
            waiting, lookup.waiting = lookup.waiting, []
            _tell(waiting, addresses)

    def _complete(self, question: _Question, addresses: Sequence[IAddress]) -> None:
        lookup = self._asked.pop(question)
        lookup.cancel_limit()
        if addresses:
            self._last.put(question, _Last(addresses, LATE_SECONDS), 1)
        _tell(lookup.waiting, addresses or self._last_of(question))

    def _last_of(self, question: _Question) -> Sequence[IAddress]:
        last, name = self._last.get(question), question[0]
        if last is None:
            return ()
        log.warn("No name server answers for {name}: its last addresses are used", name=name, once=name)
        return last.addresses


@dataclass(frozen=True, slots=True)
class _Last:
    """
    The last known addresses of a name.

    @ivar seconds: how long to wait for its next answer.
    """

    addresses: Sequence[IAddress]
    seconds: float


@dataclass(slots=True)
class _Lookup:
    """
    A lookup in progress.

    @ivar waiting: the callers that have no answer yet.
    @ivar limit: when they get the last addresses, if there are any.
    """

    waiting: list[IResolutionReceiver]
    limit: IDelayedCall

    def cancel_limit(self) -> None:
        """
        Let the callers wait for the answer.
        """
        if self.limit.active():
            self.limit.cancel()


def _tell(receivers: Sequence[IResolutionReceiver], addresses: Sequence[IAddress]) -> None:
    for receiver in receivers:
        for address in addresses:
            receiver.addressResolved(address)
        receiver.resolutionComplete()


@implementer(IResolutionReceiver)
class _Collected:
    """
    Collects addresses, and calls C{complete} with all of them.
    """

    def __init__(self, complete: Callable[[Sequence[IAddress]], None]) -> None:
        self._complete = complete
        self._addresses: list[IAddress] = []

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """
        Do nothing.
        """

    def addressResolved(self, address: IAddress) -> None:
        """
        Collect an address.
        """
        self._addresses.append(address)

    def resolutionComplete(self) -> None:
        """
        Call C{complete}.
        """
        self._complete(self._addresses)


@implementer(IResolutionReceiver)
class _Continued:
    """
    A receiver whose resolution has already begun.

    @param unknown: completes the resolution if there are no addresses.
    """

    def __init__(self, receiver: IResolutionReceiver, unknown: Callable[[], None]) -> None:
        self._receiver, self._unknown = receiver, unknown
        self._found = False

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """
        Do nothing.
        """

    def addressResolved(self, address: IAddress) -> None:
        """
        Pass an address on.
        """
        self._found = True
        self._receiver.addressResolved(address)

    def resolutionComplete(self) -> None:
        """
        Complete the resolution, if there were addresses.
        """
        if self._found:
            self._receiver.resolutionComplete()
        else:
            self._unknown()


def _records(asked: Deferred[Any]) -> Deferred[list[str]]:
    """
    Return the addresses in an answer; none for a name that does not exist.
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
    Return the names in a hosts file: hosts(5).
    """
    lines = (line.partition("#")[0].split() for line in hosts.splitlines())
    return [name for words in lines for name in words[1:]]
