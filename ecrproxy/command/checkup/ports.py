"""
Where the daemon listens: whether it does so already, somebody else does, or nobody.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ecrproxy.command.checkup.findings import Finding, failed, ok, skipped, warning
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.endpoint_string import EndpointString
from ecrproxy.healthcheck import Place, place_at

OURS: Final = "ecrproxy"
"""What our Server header says."""

Ask = Callable[[Place, str], Contact]
"""Asks for a path there."""
Bind = Callable[[Place], int]
"""Tries to listen there, and gives the number of the error, or 0."""


def look_at_ports(endpoints: Sequence[tuple[str, EndpointString]], ask: Ask, bind: Bind) -> Iterator[Finding]:
    """
    See who is at each of the endpoints.

    @param endpoints: each with the variable that named it.
    """
    for variable, endpoint in endpoints:
        text = endpoint.text
        check = _CHECKS.get(variable, "port")
        place = place_at(endpoint)
        if place is None:
            yield skipped(check, f"{variable}: {text} is of a kind that can't be looked at from here")
            continue
        contact = ask(place, "/readyz")
        if contact.status and contact.headers.get("server") == OURS:
            yield _daemon_there(check, text, contact)
        elif contact.status or contact.problem not in _NOBODY:
            said = f"something else is at {text}: {contact.problem or f'it answers {contact.status}'}"
            yield failed(check, said, f"end it, or set {variable} to another")
        else:
            yield _free(check, variable, text, bind(place))


_CHECKS: Final = {"PROXY_ADMIN_LISTEN": "admin port", "PROXY_METRICS_LISTEN": "metrics port"}
_NOBODY: Final = frozenset({"Connection refused", "No such file or directory"})


def _daemon_there(check: str, text: str, contact: Contact) -> Finding:
    why, advice = _reasons(contact.body), "see the other lines, and its log"
    if contact.status != 200:  # noqa: PLR2004
        return warning(check, f"the daemon is at {text}, and not ready: {why}", advice)
    if why:
        return warning(check, f"the daemon is at {text}, and serves, but {why}", advice)
    return ok(check, f"the daemon is at {text}, and ready")


def _reasons(body: bytes) -> str:
    """
    Read what /readyz says is wrong.
    """
    text = body.decode("utf-8", "replace")[:2000].strip()
    try:
        return "; ".join(map(str, json.loads(text)["reasons"]))[:300]
    except (ValueError, LookupError, TypeError):
        return text[:300]


def _free(check: str, variable: str, text: str, problem: int) -> Finding:
    if not problem:
        return ok(check, f"{text} is free")
    if problem in (errno.EACCES, errno.EPERM):
        advice = f"set {variable} to a port from 1024 on, or give the daemon CAP_NET_BIND_SERVICE"
        return failed(check, f"this user may not listen at {text}", advice)
    if problem == errno.EADDRNOTAVAIL:
        return failed(check, f"{text} is not an address of this machine", f"set {variable} to one that is")
    return failed(
        check, f"can't listen at {text}: {errno.errorcode.get(problem, problem)}", f"set {variable} to another"
    )


def try_to_bind(place: Place) -> int:
    """
    Listen for a moment, where that leaves nothing behind.
    """
    if isinstance(place.address, str):
        return 0
    family = socket.AF_INET6 if ":" in place.address[0] else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place.address)
    except OSError as problem:
        return problem.errno or errno.EIO
    return 0
