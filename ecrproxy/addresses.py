"""
What stands where the name of a host may stand. Pure.
"""

from __future__ import annotations

from ipaddress import ip_address


def is_address(host: str) -> bool:
    """
    Tell whether C{host} is an address, which needs no resolver; IPv6 without its brackets.
    """
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
