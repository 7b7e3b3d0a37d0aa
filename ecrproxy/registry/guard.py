"""
Where a redirect may lead: not to this machine, its link or its metadata service, by whatever name.

Rules:

- What counts is the address that is about to be connected to, after every name has been resolved: a name that
  resolves to something else at the next question, or an odd spelling of an address, changes nothing.
- An address within which an IPv4 address is written counts as that one, too.
- That an address is this machine's own shows when it is connected to, before anything is sent: both ends are the same.
- The registry's own host goes anywhere: it is what the operator chose. While it is on loopback itself, as in tests and
  behind a tunnel, redirects may lead to loopback too, and to no other forbidden address.
- Private networks are allowed: VPC endpoints live there.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.interfaces import IReactorPluggableNameResolver
from twisted.internet.protocol import ClientFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.registry.bucket import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

log = Logger()

_LOOPBACK: Final = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host: Linux connects 0.0.0.0 to itself
        "127.0.0.0/8",
        "::1/128",
    )
)
_ELSEWHERE: Final = tuple(
    ip_network(network)
    for network in (
        "169.254.0.0/16",  # the metadata service, a task's credentials, the VPC's name server
        "224.0.0.0/4",
        "255.255.255.255/32",
        "fe80::/10",
        "ff00::/8",
        "fd00:ec2::/32",  # the metadata service and its like, in IPv6
        "100.100.100.200/32",  # metadata services of other clouds: Alibaba, Azure, Oracle, Google
        "168.63.129.16/32",
        "192.0.0.192/32",
        "fd20:ce::254/128",
    )
)
# Networks whose addresses end with an IPv4 address: compatible (with the unspecified one), mapped (RFC 4291, 2.5.5),
# translated (RFC 7915), NAT64 (RFC 6052).
_EMBEDDING: Final = tuple(
    ip_network(network) for network in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
)
_LOCAL_NAT64: Final = ip_network("64:ff9b:1::/48")
"""For prefixes that a network chooses itself: RFC 8215."""
_NAT64_BYTES: Final = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15))
"""Where the IPv4 address is, by the length of such a prefix, /48 to /96: RFC 6052, 2.2."""


class ForbiddenAddressError(UnavailableError):
    """
    ECR redirects to an address that nothing good can come from.
    """


def is_forbidden(address: str, *, tunnel: bool = False) -> bool:
    """
    Tell whether C{address} is one that no redirect leads to: loopback, link-local, metadata, unspecified, multicast.

    What is no address is forbidden too.

    @param tunnel: whether the registry is on loopback itself.
    """
    return _is_in(address, _ELSEWHERE if tunnel else (*_LOOPBACK, *_ELSEWHERE))


def is_loopback(address: str) -> bool:
    """
    Tell whether C{address} is this machine's own; what is no address is.
    """
    return _is_in(address, _LOOPBACK)


def _is_in(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return True
    return any(each in network for network in networks for each in _meant(found))


def _meant(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """
    Give an address, and the IPv4 address that it leads to if it is made from one.
    """
    meant = [address]
    if isinstance(address, IPv6Address):
        if any(address in network for network in _EMBEDDING):
            meant.append(IPv4Address(address.packed[-4:]))
        if address in _LOCAL_NAT64:
            read = [IPv4Address(bytes(address.packed[at] for at in places)) for places in _NAT64_BYTES]
            meant += [each for each in read if each.packed[0]]  # zeros are what is read at a wrong place
        meant += [address.sixtofour] if address.sixtofour is not None else []
        meant += address.teredo or ()
    return meant


class Guard:
    """
    Decides about each address before it is connected to, and about each connection before it is used.

    @param name: what the log and clients are told that the registry is.
    """

    def __init__(self, name: str = "ECR") -> None:
        self._name = name
        self._is_tunnel = self._is_here = False

    def pass_registry(self, address: str) -> None:
        """
        Let the registry's host be connected to, and note whether others may be on loopback.
        """
        self._is_tunnel = is_loopback(address)

    def pass_target(self, address: str) -> None:
        """
        Let a redirect's target be connected to.

        @raise ForbiddenAddressError: if it is not to be.
        """
        if is_forbidden(address, tunnel=self._is_tunnel):
            raise self._forbidden(address)

    def met_registry(self, here: str, there: str) -> None:
        """
        Note whether the registry's host is this machine, by an address that is not loopback: others may be so, too.
        """
        self._is_here = here == there and not is_loopback(there)

    def met_target(self, here: str, there: str) -> None:
        """
        Let a connection to a redirect's target be used.

        @param here: the address that this machine has on it.
        @raise ForbiddenAddressError: if it leads back to this machine.
        """
        if here == there and not self._is_here and not is_loopback(there):
            raise self._forbidden(there)

    def _forbidden(self, address: str) -> ForbiddenAddressError:
        log.error("{name} redirects to {address}, where the proxy does not go", name=self._name, address=address)
        said = f"{self._name} redirects to an address where the proxy does not go"
        return ForbiddenAddressError(502, "UNAVAILABLE", said)


class _Meeting(ClientFactory):
    """
    Has a connection judged by its two ends before there is a protocol for it, and so before anything is sent.

    @param met: is told the address here and the one there, and raises if the connection is not to be used.
    """

    noisy = False

    def __init__(self, factory: Any, met: Callable[[str, str], None]) -> None:  # noqa: ANN401
        self._factory, self._met, self._connector = factory, met, None
        self.doStart, self.doStop = factory.doStart, factory.doStop  # type: ignore[method-assign]
        self.clientConnectionFailed = factory.clientConnectionFailed  # type: ignore[method-assign]

    def startedConnecting(self, connector: Any) -> None:  # noqa: ANN401
        self._connector = connector
        self._factory.startedConnecting(connector)

    def buildProtocol(self, addr: Any) -> Any:  # noqa: ANN401
        """
        Make the protocol; none, which closes the connection, if it is not to be used.
        """
        connector: Any = self._connector
        try:
            self._met(connector.transport.getHost().host, connector.transport.getPeer().host)
        except ForbiddenAddressError:
            self._factory.clientConnectionFailed(connector, Failure())
            return None
        return self._factory.buildProtocol(addr)


@implementer(IReactorPluggableNameResolver)
class GuardedReactor:
    """
    A reactor whose connections are asked for permission: for an agent's endpoints.

    @param ask: is told the address, and raises if there is to be no connection.
    @param met: is told the addresses of a connection's ends, and raises if it is not to be used.
    """

    def __init__(self, reactor: Any, ask: Callable[[str], None], met: Callable[[str, str], None]) -> None:  # noqa: ANN401
        self._reactor, self._ask, self._met = reactor, ask, met

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)

    def connectTCP(self, host: str, port: int, factory: Any, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        """
        Connect to an address, if it may be.
        """
        self._ask(host)
        return self._reactor.connectTCP(host, port, _Meeting(factory, self._met), *rest, **named)
