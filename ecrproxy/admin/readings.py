"""
What the parts of the daemon know about themselves, as figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecrproxy.access.limits import COUNTED
from ecrproxy.cache.condition import TROUBLES
from ecrproxy.metrics import Reading
from ecrproxy.registry.circuit import CircuitState
from ecrproxy.registry.quotas import Call

if TYPE_CHECKING:
    from collections.abc import Callable

    from ecrproxy.access.crowds import Crowds
    from ecrproxy.cache.condition import Condition
    from ecrproxy.cache.janitor import Janitor
    from ecrproxy.cache.store import Store
    from ecrproxy.metrics import LoopStall
    from ecrproxy.proxy import PullThrough
    from ecrproxy.readiness import Readiness
    from ecrproxy.registry.circuit import Circuit
    from ecrproxy.registry.ecr import TokenService
    from ecrproxy.registry.governor import Governor
    from ecrproxy.registry.wire import Wire


def of_cache(store: Store, janitor: Janitor) -> list[Reading]:
    """
    Tell how full the cache is.
    """
    ledger = store.ledger
    return [
        Reading("cache_files", "Files of content and entries in the cache", lambda: len(ledger)),
        Reading("cache_bytes", "Bytes of the files in the cache", lambda: ledger.total),
        Reading("cache_reserved_bytes", "Bytes promised to what is arriving", lambda: ledger.reserved),
        Reading("cache_limit_bytes", "The most bytes that the cache may hold", lambda: janitor.limit),
        Reading("cache_evictions_total", "Files evicted to make room", lambda: janitor.evicted),
        Reading(
            "cache_oldest_use_timestamp_seconds",
            "When the least recently used file was used last",
            lambda: _oldest_use(store),
        ),
    ]


def _oldest_use(store: Store) -> float | None:
    with store.ledger.lock:
        path = next((path for path, _, _ in store.ledger.oldest()), None)
    try:
        return (store.root / path).stat().st_mtime if path is not None else None
    except OSError:  # it has just gone
        return None


def of_disk(condition: Condition) -> list[Reading]:
    """
    Tell what is wrong with the cache directory's disk.
    """

    def found() -> dict[str, float]:
        return {kind: condition.has(kind) for kind in TROUBLES}

    told = "1 while the cache directory can't be read or written, its disk is full or hangs, or files can't be opened"
    return [Reading("disk_trouble", told, found, "kind")]


def of_token(tokens: TokenService) -> list[Reading]:
    """
    Tell how good the token is.
    """
    return [
        Reading("token_expiry_timestamp_seconds", "When the token for ECR expires", lambda: tokens.expires),
        Reading("token_refresh_failures_total", "Refreshes of the token that failed", lambda: tokens.failed),
    ]


def of_upstream(wire: Wire, circuit: Circuit, governor: Governor) -> list[Reading]:
    """
    Tell how well ECR answers.
    """

    def states() -> dict[str, float]:
        return {each.value: float(each is circuit.state) for each in CircuitState}

    def waiting() -> dict[str, float]:
        return {each.value: governor.waiting(each) for each in Call}

    def refused() -> dict[str, float]:
        return {each.value: governor.refused(each) for each in Call}

    return [
        Reading("upstream_queue_full_total", "Questions refused because too many wait already", refused, "call"),
        Reading("upstream_waiting", "Questions that wait for their turn within ECR's quotas", waiting, "call"),
        Reading("upstream_retries_total", "Questions asked again after a failure", lambda: wire.retried),
        Reading("circuit_state", "1 for the state of the circuit for all questions to ECR", states, "state"),
        Reading(
            "circuit_open_repositories",
            "Repositories that are left alone, each by itself",
            lambda: circuit.open_repositories,
        ),
    ]


def of_readiness(latest: Callable[[], Readiness | None]) -> list[Reading]:
    """
    Tell what C{/readyz} tells.

    @param latest: what was found last.
    """

    def can(what: str) -> float | None:
        found = latest()
        return None if found is None else float(getattr(found, what))

    return [
        Reading("can_serve", "1 if the daemon can serve clients, as /readyz tells", lambda: can("can_serve")),
        Reading("can_fetch", "1 if the daemon can fetch from ECR, as /readyz tells", lambda: can("can_fetch")),
    ]


def of_transfers(pull_through: PullThrough) -> list[Reading]:
    """
    Tell what is on its way from upstream.
    """
    return [Reading("transfers", "Blobs on their way from upstream", lambda: len(pull_through.transfers()))]


def of_clients(crowds: Crowds, most: int | None) -> list[Reading]:
    """
    Tell who is connected, and who was refused or let go.

    @param most: connections that may be open at once, by the settings and by the descriptors that there are; none if
        nothing limits them.
    """

    def met() -> dict[str, float]:
        return {limit: crowds.met(limit) for limit in COUNTED}

    return [
        Reading("client_connections", "Connections of clients", lambda: crowds.connected),
        Reading("client_connections_limit", "Maximum number of connections of clients", lambda: most),
        Reading(
            "client_transfers",
            "Blobs and answers of more than 64 KiB on their way to clients",
            lambda: crowds.transferring,
        ),
        Reading("client_limits_total", "Connections and requests that met a limit, by which", met, "limit"),
    ]


def of_loop(stall: LoopStall) -> list[Reading]:
    """
    Tell how long the event loop stood still.
    """
    told = "The longest time for which the event loop stood still within the last minutes, five at most"
    return [Reading("loop_stall_seconds", told, lambda: stall.lately)]


def of_certificates(expires: Callable[[], float | None]) -> list[Reading]:
    """
    Tell when the certificate ends that clients are shown.
    """
    told = "When the certificate that is served ends, the first if there are several, in seconds since the epoch"
    return [Reading("certificate_expiry_timestamp_seconds", told, expires)]
