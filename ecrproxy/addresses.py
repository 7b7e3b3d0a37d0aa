"""
Host names and IP addresses. Pure.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Final

_MAPPED: Final = "::ffff:"


def is_address(host: str) -> bool:
    """
    Return True if C{host} is an IP address, which needs no resolver. IPv6 addresses have no brackets.
    """
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def unmapped(host: str) -> str:
    """
    Return the IPv4 address of an IPv4-mapped IPv6 address in any notation; return anything else unchanged.
    """
    tail = host.removeprefix(_MAPPED)
    if tail == host or ":" not in tail:
        return tail
    try:
        found = IPv6Address(host).ipv4_mapped
    except ValueError:
        return host
    return host if found is None else str(found)
