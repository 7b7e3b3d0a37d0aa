"""
What stands where the name of a host may stand. Pure.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Final

_MAPPED: Final = "::ffff:"


def is_address(host: str) -> bool:
    """
    Tell whether C{host} is an address, which needs no resolver; IPv6 without its brackets.
    """
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def unmapped(host: str) -> str:
    """
    Give the IPv4 address that C{host} stands for on a socket for both, in whichever notation; anything else unchanged.
    """
    tail = host.removeprefix(_MAPPED)
    if tail == host or ":" not in tail:
        return tail
    try:
        found = IPv6Address(host).ipv4_mapped
    except ValueError:
        return host
    return host if found is None else str(found)
