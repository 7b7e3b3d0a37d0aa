"""
The variables that name egress proxies, as botocore reads them. Pure, and light: the command imports it each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_NEVER_PROXIED: Final = (
    *("localhost", "127.0.0.1", "[::1]"),
    *("169.254.169.254", "[fd00:ec2::254]"),  # EC2's metadata
    *("169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"),  # roles of containers and pods
)
"""Hosts that a proxy can't reach for this machine, as they stand in a URL."""


def for_botocore(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the variables with which botocore, too, connects to this machine and its metadata services itself.

    botocore leaves it to urllib, which exempts nothing by itself: a role would be asked of the proxy's own machine,
    which has another one. A process that botocore starts for credentials sees them as well.
    """
    if not any(proxy_variable(f"{scheme}_proxy", environ).strip() for scheme in ("http", "https")):
        return {}
    given = proxy_variable("no_proxy", environ).strip()
    return {} if given == "*" else {"no_proxy": ",".join(filter(None, (given, *_NEVER_PROXIED)))}


def proxy_variable(name: str, environ: Mapping[str, str]) -> str:
    """
    Return what a variable says; the one in lower case wins, even if it is empty.
    """
    return environ[name] if name in environ else environ.get(name.upper(), "")
