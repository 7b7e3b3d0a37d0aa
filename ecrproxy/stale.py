"""
Stale answers: the last answer is served while ECR is not available.
"""

from __future__ import annotations

from typing import Final

from twisted.logger import Logger

from ecrproxy.flights import DeadlineExceededError
from ecrproxy.oci import Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError

log = Logger()

STALE_SECONDS: Final = 5.0
"""How long ECR may take to confirm a tag or a list whose last answer is cached. containerd gives up after 30 s."""


def why_stale(route: Route, registry: str, problem: DeadlineExceededError | UnavailableError) -> Reason:
    """
    Log and return why the last answer is served.

    @param registry: its name in the log.
    """
    if isinstance(problem, DeadlineExceededError):
        why, reason = f"{registry} has not answered for {STALE_SECONDS:g} s", Reason.UNREACHABLE
    else:
        why, reason = problem.message, problem.reason
    log.warn(
        "Serving {path} of {registry} as last known: {why}",
        path=route.path,
        registry=registry,
        why=why,
        once=(registry, route.path),
    )
    return reason
