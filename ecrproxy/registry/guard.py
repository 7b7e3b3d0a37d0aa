"""
Where a redirect may lead: not to this machine, its link or its metadata service, under any name.

Rules:

- The decision is about the address to connect to, after all names have been resolved: a name that resolves differently
  next time, or an odd spelling of an address, changes nothing.
- An address that contains an IPv4 address counts as that one, too.
- This machine's own address is detected when connected, before anything is sent: both ends are the same.
- The registry's own host may be anywhere: the operator chose it. If it is on loopback itself, as in tests and
  behind a tunnel, redirects may lead to loopback too, but to no other forbidden address.
- Private networks are allowed, because VPC endpoints have private addresses.
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

from ecrproxy.registry.unavailable import UnavailableError

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
        "fd00:ec2::/32",  # the metadata service and its neighbours, in IPv6
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
"""For prefixes that a network chooses: RFC 8215."""
_NAT64_BYTES: Final = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15))
"""Where the IPv4 address is, by the length of such a prefix, /48 to /96: RFC 6052, 2.2."""


class ForbiddenAddressError(UnavailableError):
    """
    ECR redirects to a forbidden address.
    """


def is_forbidden(address: str, *, tunnel: bool = False) -> bool:
    """
    Return True if redirects may not lead to C{address}: loopback, link-local, metadata, unspecified, multicast.

    Invalid addresses are forbidden, too.

    @param tunnel: whether the registry is on loopback itself.
    """
    return _is_in(address, _ELSEWHERE if tunnel else (*_LOOPBACK, *_ELSEWHERE))


def is_loopback(address: str) -> bool:
    """
    Return True if C{address} is a loopback address, or invalid.
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
    Return an address, and the IPv4 address that it contains, if any.
    """
    meant = [address]
    if isinstance(address, IPv6Address):
        if any(address in network for network in _EMBEDDING):
            meant.append(IPv4Address(address.packed[-4:]))
        if address in _LOCAL_NAT64:
            read = [IPv4Address(bytes(address.packed[at] for at in places)) for places in _NAT64_BYTES]
            meant += [each for each in read if each.packed[0]]  # zeros mean that the position is wrong
        meant += [address.sixtofour] if address.sixtofour is not None else []
        meant += address.teredo or ()
    return meant


class Guard:
    """
    Decides about each address before it is connected to, and about each connection before it is used.

    @param name: the registry's name in the log and for clients.
    """

    def __init__(self, name: str = "ECR") -> None:
        self._name = name
        self._is_tunnel = self._is_here = False

    def pass_registry(self, address: str) -> None:
        """
        Permit the registry's host, and note whether redirects may lead to loopback.
        """
        self._is_tunnel = is_loopback(address)

    def pass_target(self, address: str) -> None:
        """
        Permit the target of a redirect.

        @raise ForbiddenAddressError: if it is forbidden.
        """
        if is_forbidden(address, tunnel=self._is_tunnel):
            raise self._forbidden(address)

    def met_registry(self, here: str, there: str) -> None:
        """
        Note whether the registry's host is this machine, under an address that is not loopback.

        Redirects may lead there, too.
        """
        self._is_here = here == there and not is_loopback(there)

    def met_target(self, here: str, there: str) -> None:
        """
        Permit a connection to the target of a redirect.

        @param here: this machine's address on the connection.
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
    Judges a connection by its two ends before it has a protocol, and so before anything is sent.

    @param met: called with both addresses; raises if the connection must not be used.
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
        Create the protocol; return None, which closes the connection, if it must not be used.
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
    A reactor that asks before connecting: for an agent's endpoints.

    @param ask: called with the address; raises if it must not be connected to.
    @param met: called with the addresses of both ends; raises if the connection must not be used.
    """

    def __init__(self, reactor: Any, ask: Callable[[str], None], met: Callable[[str, str], None]) -> None:  # noqa: ANN401
        self._reactor, self._ask, self._met = reactor, ask, met

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)

    def connectTCP(self, host: str, port: int, factory: Any, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        """
        Connect to an address, if permitted.
        """
        self._ask(host)
        return self._reactor.connectTCP(host, port, _Meeting(factory, self._met), *rest, **named)
