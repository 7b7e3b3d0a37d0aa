"""
The variables of egress proxies, as botocore reads them. Pure, and small: the command imports it each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_NEVER_PROXIED: Final = (
    *("localhost", "127.0.0.1", "[::1]"),
    *("169.254.169.254", "[fd00:ec2::254]"),  # EC2's metadata
    *("169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"),  # roles of containers and pods
)
"""Hosts that must not be reached through a proxy, as written in URLs."""


def for_botocore(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the variables that make botocore, too, connect directly to this machine and its metadata services.

    botocore leaves that to urllib, which exempts nothing by itself: the role would be that of the proxy's machine.
    A C{credential_process} sees these variables as well.
    """
    if not any(proxy_variable(f"{scheme}_proxy", environ).strip() for scheme in ("http", "https")):
        return {}
    given = proxy_variable("no_proxy", environ).strip()
    return {} if given == "*" else {"no_proxy": ",".join(filter(None, (given, *_NEVER_PROXIED)))}


def proxy_variable(name: str, environ: Mapping[str, str]) -> str:
    """
    Return the value of a variable; the lower-case name wins, even if it is empty.
    """
    return environ[name] if name in environ else environ.get(name.upper(), "")
