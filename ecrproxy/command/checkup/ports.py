"""
Checks of the daemon's ports: used by the daemon, used by something else, or free.
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
"""The product in our Server header."""

Ask = Callable[[Place, str], Contact]
"""Requests a path there."""
Bind = Callable[[Place], int]
"""Tries to listen there, and returns the error number, or 0."""


def look_at_ports(endpoints: Sequence[tuple[str, EndpointString]], ask: Ask, bind: Bind) -> Iterator[Finding]:
    """
    Check what listens at each endpoint.

    @param endpoints: each with the variable that names it.
    """
    for variable, endpoint in endpoints:
        text = endpoint.text
        check = _CHECKS.get(variable, "port")
        place = place_at(endpoint)
        if place is None:
            yield skipped(check, f"{variable}: {text} is a kind of endpoint that can't be checked")
            continue
        contact = ask(place, "/readyz")
        if contact.status and contact.headers.get("server") == OURS:
            yield _daemon_there(check, text, contact)
        elif contact.status or contact.problem not in _NOBODY:
            said = f"something else is at {text}: {contact.problem or f'it answers {contact.status}'}"
            yield failed(check, said, f"stop it, or set {variable} to another")
        else:
            yield _free(check, variable, text, bind(place))


_CHECKS: Final = {"PROXY_ADMIN_LISTEN": "admin port", "PROXY_METRICS_LISTEN": "metrics port"}
_NOBODY: Final = frozenset({"Connection refused", "No such file or directory"})


def _daemon_there(check: str, text: str, contact: Contact) -> Finding:
    why, advice = _reasons(contact.body), "see the other lines, and the daemon's log"
    if contact.status != 200:  # noqa: PLR2004
        return warning(check, f"the daemon is at {text}, and not ready: {why}", advice)
    if why:
        return warning(check, f"the daemon is at {text}, and serves, but {why}", advice)
    return ok(check, f"the daemon is at {text}, and ready")


def _reasons(body: bytes) -> str:
    """
    Return the reasons in the response of /readyz.
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
    Listen briefly, unless that would leave traces.
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
