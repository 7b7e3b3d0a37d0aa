"""
What the parts of the daemon know about themselves, as figures.

With workers each of them knows its own parts. L{FIGURES} says how theirs become the daemon's: most add up; of what each
finds out about the same thing, the cache directory or the registry, the one that matters is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ecrproxy.access.limits import COUNTED
from ecrproxy.cache.condition import TROUBLES
from ecrproxy.metrics import Figure, Reading
from ecrproxy.registry.circuit import CircuitState
from ecrproxy.registry.quotas import Call

if TYPE_CHECKING:
    from collections.abc import Callable

    from ecrproxy.access.limits import Crowd
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

CACHE_FILES: Final = Figure("cache_files", "Files of content in the cache", combine=max)
CACHE_BYTES: Final = Figure("cache_bytes", "Bytes of disk that content and the index take", combine=max)
CACHE_RESERVED: Final = Figure(
    "cache_reserved_bytes",
    "Bytes of disk promised to what is arriving, or taken by what transfers have left",
    combine=max,
)
CACHE_LIMIT: Final = Figure("cache_limit_bytes", "The most bytes that the cache may hold", combine=min)
EVICTIONS: Final = Figure("cache_evictions_total", "Files evicted to make room")
INDEX_BUSY: Final = Figure("cache_index_busy_total", "Changes of the index that waited for another process")
OLDEST_USE: Final = Figure(
    "cache_oldest_use_timestamp_seconds", "When the least recently used file was used last", combine=max
)
DISK_TROUBLE: Final = Figure(
    "disk_trouble",
    "1 while the cache directory can't be read or written, its disk is full or hangs, or files can't be opened",
    "kind",
    max,
)
TOKEN_EXPIRY: Final = Figure("token_expiry_timestamp_seconds", "When the token for ECR expires", combine=min)
TOKEN_FAILURES: Final = Figure("token_refresh_failures_total", "Refreshes of the token that failed")
QUEUE_FULL: Final = Figure("upstream_queue_full_total", "Questions refused because too many wait already", "call")
WAITING: Final = Figure("upstream_waiting", "Questions that wait for their turn within ECR's quotas", "call")
RETRIES: Final = Figure("upstream_retries_total", "Questions asked again after a failure")
CIRCUIT: Final = Figure("circuit_state", "1 for the state of the circuit for all questions to ECR", "state", max)
OPEN_REPOSITORIES: Final = Figure(
    "circuit_open_repositories", "Repositories that are left alone, each by itself", combine=max
)
TRANSFERS: Final = Figure("transfers", "Blobs on their way from upstream")
CONNECTIONS: Final = Figure("client_connections", "Connections of clients")
CONNECTIONS_LIMIT: Final = Figure("client_connections_limit", "Maximum number of connections of clients")
SENDING: Final = Figure("client_transfers", "Blobs and answers of more than 64 KiB on their way to clients")
LIMITS: Final = Figure("client_limits_total", "Connections and requests that met a limit, by which", "limit")
LOOP_STALL: Final = Figure(
    "loop_stall_seconds",
    "The longest time for which the event loop stood still within the last minutes, five at most",
    combine=max,
)
CERTIFICATE_EXPIRY: Final = Figure(
    "certificate_expiry_timestamp_seconds",
    "When the certificate that is served ends, the first if there are several, in seconds since the epoch",
)
CAN_SERVE: Final = Figure("can_serve", "1 if the daemon can serve clients, as /readyz tells")
CAN_FETCH: Final = Figure("can_fetch", "1 if the daemon can fetch from ECR, as /readyz tells")
FIGURES: Final = (
    *(CACHE_FILES, CACHE_BYTES, CACHE_RESERVED, CACHE_LIMIT, EVICTIONS, INDEX_BUSY, OLDEST_USE, TOKEN_EXPIRY),
    *(TOKEN_FAILURES, QUEUE_FULL, WAITING, RETRIES, CIRCUIT, OPEN_REPOSITORIES, TRANSFERS, CONNECTIONS),
    *(CONNECTIONS_LIMIT, SENDING, LIMITS, LOOP_STALL, DISK_TROUBLE),
)
"""Those that workers know; of the others the parent knows by itself."""


def of_cache(store: Store, janitor: Janitor) -> list[Reading]:
    """
    Tell how full the cache is.
    """
    index = store.index
    return [
        Reading(CACHE_FILES, lambda: index.totals.files),
        Reading(CACHE_BYTES, lambda: index.totals.blocks + index.size),
        Reading(CACHE_RESERVED, lambda: index.totals.arriving),
        Reading(CACHE_LIMIT, lambda: janitor.limit),
        Reading(EVICTIONS, lambda: janitor.evicted),
        Reading(INDEX_BUSY, lambda: index.busy),
        Reading(OLDEST_USE, lambda: index.totals.oldest_use),
    ]


def of_disk(condition: Condition) -> list[Reading]:
    """
    Tell what is wrong with the cache directory's disk.
    """

    def found() -> dict[str, float]:
        return {kind: condition.has(kind) for kind in TROUBLES}

    return [Reading(DISK_TROUBLE, found)]


def of_token(tokens: TokenService) -> list[Reading]:
    """
    Tell how good the token is.
    """
    return [Reading(TOKEN_EXPIRY, lambda: tokens.expires), Reading(TOKEN_FAILURES, lambda: tokens.failed)]


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
        Reading(QUEUE_FULL, refused),
        Reading(WAITING, waiting),
        Reading(RETRIES, lambda: wire.retried),
        Reading(CIRCUIT, states),
        Reading(OPEN_REPOSITORIES, lambda: circuit.open_repositories),
    ]


def of_readiness(latest: Callable[[], Readiness | None]) -> list[Reading]:
    """
    Tell what C{/readyz} tells.

    @param latest: what was found last.
    """

    def can(what: str) -> float | None:
        found = latest()
        return None if found is None else float(getattr(found, what))

    return [Reading(CAN_SERVE, lambda: can("can_serve")), Reading(CAN_FETCH, lambda: can("can_fetch"))]


def of_transfers(pull_through: PullThrough) -> list[Reading]:
    """
    Tell what is on its way from upstream.
    """
    return [Reading(TRANSFERS, lambda: len(pull_through.transfers()))]


def of_clients(crowd: Crowd, most: int | None) -> list[Reading]:
    """
    Tell who is connected, and who was refused or let go.

    @param most: connections that may be open at once, by the settings and by the descriptors that there are; none if
        nothing limits them.
    """

    def met() -> dict[str, float]:
        return {limit: crowd.met(limit) for limit in COUNTED}

    return [
        Reading(CONNECTIONS, lambda: crowd.connected),
        Reading(CONNECTIONS_LIMIT, lambda: most),
        Reading(SENDING, lambda: crowd.transferring),
        Reading(LIMITS, met),
    ]


def of_loop(stall: LoopStall) -> list[Reading]:
    """
    Tell how long the event loop stood still.
    """
    return [Reading(LOOP_STALL, lambda: stall.lately)]


def of_certificates(expires: Callable[[], float | None]) -> list[Reading]:
    """
    Tell when the certificate ends that clients are shown.
    """
    return [Reading(CERTIFICATE_EXPIRY, expires)]
