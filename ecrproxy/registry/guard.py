"""
Where a redirect may lead: not to this machine, its link or its metadata service, by whatever name.

Rules:

- What counts is the address that is about to be connected to, after every name has been resolved: a name that
  resolves to something else at the next question, or an odd spelling of an address, changes nothing.
- The registry's own host goes anywhere: it is what the operator chose. While it is on loopback itself, as in tests and
  behind a tunnel, redirects may lead to loopback too, and to no other forbidden address.
- Private networks are allowed: VPC endpoints live there.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.interfaces import IReactorPluggableNameResolver
from twisted.logger import Logger
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
    )
)
# Networks whose addresses end with an IPv4 address: compatible (with the unspecified one), mapped, NAT64 (RFC 6052).
_EMBEDDING: Final = tuple(ip_network(network) for network in ("::/96", "::ffff:0:0/96", "64:ff9b::/96"))


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
        if address.sixtofour is not None:
            meant.append(address.sixtofour)
    return meant


class Guard:
    """
    Decides about each address before it is connected to.
    """

    def __init__(self) -> None:
        self._is_tunnel = False

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
            log.error("ECR redirects to {address}, where the proxy does not go", address=address)
            raise ForbiddenAddressError(502, "UNAVAILABLE", "ECR redirects to an address where the proxy does not go")


@implementer(IReactorPluggableNameResolver)
class GuardedReactor:
    """
    A reactor whose connections are asked for permission: for an agent's endpoints.

    @param ask: is told the address, and raises if there is to be no connection.
    """

    def __init__(self, reactor: Any, ask: Callable[[str], None]) -> None:  # noqa: ANN401
        self._reactor, self._ask = reactor, ask

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)

    def connectTCP(self, host: str, port: int, factory: Any, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        """
        Connect to an address, if it may be.
        """
        self._ask(host)
        return self._reactor.connectTCP(host, port, factory, *rest, **named)
