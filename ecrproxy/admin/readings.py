"""
The figures of the daemon's parts.

With workers, each reports its own. The C{combine} of L{FIGURES} says how to merge them: most are added up; of several
views of the same thing, such as the cache directory or a registry, the most relevant one is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ecrproxy.access.limits import COUNTED
from ecrproxy.cache.condition import TROUBLES
from ecrproxy.metrics import Figure, Reading
from ecrproxy.registry.circuit import CircuitState
from ecrproxy.registry.quotas import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ecrproxy.access.limits import Crowd
    from ecrproxy.admin.status import Asking
    from ecrproxy.cache.condition import Condition
    from ecrproxy.cache.janitor import Janitor
    from ecrproxy.cache.store import Store
    from ecrproxy.metrics import LoopStall
    from ecrproxy.proxy import PullThrough
    from ecrproxy.readiness import Readiness

CACHE_FILES: Final = Figure("cache_files", "Files of content in the cache", combine=max)
CACHE_BYTES: Final = Figure("cache_bytes", "Bytes of disk used by content and index", combine=max)
CACHE_RESERVED: Final = Figure(
    "cache_reserved_bytes",
    "Bytes of disk reserved for running downloads, or used by interrupted ones",
    combine=max,
)
CACHE_LIMIT: Final = Figure("cache_limit_bytes", "Maximum size of the cache in bytes", combine=min)
EVICTIONS: Final = Figure("cache_evictions_total", "Files evicted to make room")
INDEX_BUSY: Final = Figure("cache_index_busy_total", "Changes of the index that waited for another process")
OLDEST_USE: Final = Figure(
    "cache_oldest_use_timestamp_seconds", "Last use of the least recently used file", combine=max
)
DISK_TROUBLE: Final = Figure(
    "disk_trouble",
    "1 while the cache directory can't be read or written, its disk is full or hangs, or files can't be opened",
    "kind",
    max,
)
TOKEN_EXPIRY: Final = Figure("token_expiry_timestamp_seconds", "When the token expires", "registry", min)
TOKEN_FAILURES: Final = Figure("token_refresh_failures_total", "Failed token refreshes", "registry")
QUEUE_FULL: Final = Figure(
    "upstream_queue_full_total", "Requests refused because too many are waiting", "registry,call"
)
WAITING: Final = Figure("upstream_waiting", "Requests that wait because of ECR's quotas", "registry,call")
RETRIES: Final = Figure("upstream_retries_total", "Requests retried after a failure", "registry")
CIRCUIT: Final = Figure(
    "circuit_state", "1 for the current state of a registry's circuit breaker", "registry,state", max
)
OPEN_REPOSITORIES: Final = Figure(
    "circuit_open_repositories", "Repositories whose own circuit is open", "registry", max
)
TRANSFERS: Final = Figure("transfers", "Blobs being downloaded from upstream")
AHEAD: Final = Figure("read_ahead_bytes_total", "Bytes of layers read ahead of client requests", combine=sum)
UNASKED: Final = Figure(
    "read_ahead_unasked_bytes_total", "Bytes read ahead that no client requested within ten minutes", combine=sum
)
CONNECTIONS: Final = Figure("client_connections", "Open client connections")
CONNECTIONS_LIMIT: Final = Figure("client_connections_limit", "Maximum number of client connections")
SENDING: Final = Figure("client_transfers", "Blobs, and other responses of more than 64 KiB, being sent to clients")
LIMITS: Final = Figure("client_limits_total", "Connections and requests that reached a limit", "limit")
LOOP_STALL: Final = Figure(
    "loop_stall_seconds",
    "Longest event-loop stall in the last 2.5 to 5 minutes, in seconds",
    combine=max,
)
CERTIFICATE_EXPIRY: Final = Figure(
    "certificate_expiry_timestamp_seconds",
    "Expiry of the served certificate, the earliest of several, in seconds since the epoch",
)
CAN_SERVE: Final = Figure("can_serve", "1 if the daemon can serve clients, as in /readyz")
CAN_FETCH: Final = Figure("can_fetch", "1 if the daemon can fetch from ECR, as in /readyz")
FIGURES: Final = (
    *(CACHE_FILES, CACHE_BYTES, CACHE_RESERVED, CACHE_LIMIT, EVICTIONS, INDEX_BUSY, OLDEST_USE, TOKEN_EXPIRY),
    *(TOKEN_FAILURES, QUEUE_FULL, WAITING, RETRIES, CIRCUIT, OPEN_REPOSITORIES, TRANSFERS, CONNECTIONS),
    *(CONNECTIONS_LIMIT, SENDING, LIMITS, LOOP_STALL, DISK_TROUBLE, AHEAD, UNASKED),
)
"""Figures that workers report; the parent reads the others itself."""


def of_cache(store: Store, janitor: Janitor) -> list[Reading]:
    """
    Return readings of the cache's size.
    """
    index = store.index
    return [
        Reading(CACHE_FILES, lambda: index.totals.files),
        Reading(CACHE_BYTES, lambda: index.taken),
        Reading(CACHE_RESERVED, lambda: index.totals.arriving),
        Reading(CACHE_LIMIT, lambda: janitor.limit),
        Reading(EVICTIONS, lambda: janitor.evicted),
        Reading(INDEX_BUSY, lambda: index.changes.busy),
        Reading(OLDEST_USE, lambda: index.totals.oldest_use),
    ]


def of_disk(condition: Condition) -> list[Reading]:
    """
    Return readings of the problems of the cache directory's disk.
    """

    def found() -> dict[str, float]:
        return {kind: condition.has(kind) for kind in TROUBLES}

    return [Reading(DISK_TROUBLE, found)]


def of_registries(askings: Callable[[], Iterable[Asking]]) -> list[Reading]:
    """
    Return readings of tokens and registries.

    @param askings: returns the registries used so far.
    """

    def of_each(
        figure: Figure,
        read: Callable[[Asking], Mapping[str, float]],
        combine: Callable[[Iterable[float]], float] | None = None,
    ) -> Reading:
        """
        Return the reading of a figure for each registry, by a further label; a wildcard's registries are merged.
        """

        def found() -> dict[str, float]:
            several: dict[str, list[float]] = {}
            for each in askings():
                for word, told in read(each).items():
                    several.setdefault(f"{each.label},{word}" if word else each.label, []).append(float(told))
            return {label: (combine or figure.combine)(numbers) for label, numbers in several.items()}

        return Reading(figure, found)

    return [
        of_each(TOKEN_EXPIRY, lambda each: _told(each.token().expires)),
        of_each(TOKEN_FAILURES, lambda each: _told(each.token().failures if each.tokens else None), max),
        of_each(QUEUE_FULL, lambda each: {call.value: each.governor.refused(call) for call in Call}),
        of_each(WAITING, lambda each: {call.value: each.governor.waiting(call) for call in Call}),
        of_each(RETRIES, lambda each: {"": each.wire.retried}),
        of_each(CIRCUIT, lambda each: {state.value: state is each.circuit.state for state in CircuitState}),
        of_each(OPEN_REPOSITORIES, lambda each: {"": each.circuit.open_repositories}),
    ]


def _told(figure: float | None) -> dict[str, float]:
    return {} if figure is None else {"": figure}


def of_readiness(latest: Callable[[], Readiness | None]) -> list[Reading]:
    """
    Return readings of C{/readyz}.

    @param latest: returns the last result.
    """

    def can(what: str) -> float | None:
        found = latest()
        return None if found is None else float(getattr(found, what))

    return [Reading(CAN_SERVE, lambda: can("can_serve")), Reading(CAN_FETCH, lambda: can("can_fetch"))]


def of_transfers(pull_through: PullThrough) -> list[Reading]:
    """
    Return readings of downloads from upstream.
    """
    ahead = pull_through.ahead
    return [
        Reading(TRANSFERS, lambda: len(pull_through.transfers())),
        Reading(AHEAD, lambda: ahead.brought if ahead is not None else 0),
        Reading(UNASKED, lambda: ahead.in_vain if ahead is not None else 0),
    ]


def of_clients(crowd: Crowd, most: int | None) -> list[Reading]:
    """
    Return readings of connections and refusals.

    @param most: maximum open connections, by the settings and the available descriptors; None if unlimited.
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
    Return readings of event-loop stalls.
    """
    return [Reading(LOOP_STALL, lambda: stall.lately)]


def of_certificates(expires: Callable[[], float | None]) -> list[Reading]:
    """
    Return readings of the expiry of the certificate for clients.
    """
    return [Reading(CERTIFICATE_EXPIRY, expires)]
