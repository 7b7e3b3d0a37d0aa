"""
The access log: one line per request, at little cost.

A single line is logged immediately. Under load, the lines of C{GATHER_SECONDS} are logged as one event, because the
cost is per event, not per line: one event per line would be a sixth of all work on cached manifests. The single lines
are in the event's C{lines}.

Refused requests cost a client nothing, so they must not fill the log: beyond C{REFUSED} per C{GATHER_SECONDS}, those
of a client's network are counted in one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.access.limits import counted

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger(namespace="access")
log_of_others = Logger()

GATHER_SECONDS: Final = 0.1
REFUSED: Final = 10
"""Maximum lines for refused requests, per client network and C{GATHER_SECONDS}."""
_REFUSALS: Final = range(400, 600)


class AccessLine(NamedTuple):
    """
    One request, as logged.

    @ivar ended: end of the response, on the reactor's clock.
    @ivar path: without the query, which may contain secrets.
    @ivar status: 0 if no response was started.
    @ivar cache: the value of X-Cache-Status, or C{-}.
    @ivar reason: the value of X-Cache-Reason, or C{-}.
    @ivar upstream: seconds spent waiting for upstream.
    @ivar aborted: whether the response is incomplete.
    @ivar registry: the registry's name in the configuration, or C{-}.
    @ivar several: whether more than one registry is configured.
    """

    ended: float
    client: str
    method: str
    path: str
    status: int
    size: int
    seconds: float
    cache: str
    reason: str
    upstream: float
    request: str
    aborted: bool
    registry: str = "-"
    several: bool = False

    def __str__(self) -> str:
        """
        Return the line as text.
        """
        _, client, method, path, status, size, seconds, cache, reason, upstream, request, aborted, registry, several = (
            self
        )
        return (
            f"{client or '-'} {method} {path} {status or '-'} {size} bytes {seconds:.3f} s {cache} {reason}"
            f" upstream {upstream:.3f} s id {request}{' aborted' if aborted else ''}"
            f"{f' registry {registry}' if several else ''}"
        )


class AccessLines:
    """
    Lines that are logged as one event.

    @ivar now: the time of logging, on the same clock as C{AccessLine.ended}.
    """

    def __init__(self, lines: Sequence[AccessLine], now: float) -> None:
        self.lines, self.now = lines, now

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))

    __repr__ = __str__


class AccessLog(Service):
    """
    Gather and log lines. Stopping the service logs those that wait; later ones are logged immediately.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._gathered: list[AccessLine] = []
        self._timer: IDelayedCall | None = None
        self._refused: Counter[str] = Counter()
        self._over = False

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._flush()

    def write(self, line: AccessLine) -> None:
        """
        Log C{line}.
        """
        if line.status in _REFUSALS and not self._over:
            network = counted(line.client)
            self._refused[network] += 1
            if self._refused[network] > REFUSED:
                return
        if self._timer is not None:
            self._gathered.append(line)
            return
        self._log([line])
        self._wait()

    def _wait(self) -> None:
        self._timer = None if self._over else self._clock.callLater(GATHER_SECONDS, self._flush)

    def _flush(self) -> None:
        self._timer = None
        gathered, self._gathered = self._gathered, []
        refused, self._refused = self._refused, Counter()
        for network, count in refused.items():
            if count > REFUSED:
                said = "{count} more requests of {network} were refused, and have no line"
                log_of_others.info(said, count=count - REFUSED, network=network or "a socket")
        if gathered:
            self._log(gathered)
            self._wait()

    def _log(self, lines: Sequence[AccessLine]) -> None:
        log.info("{lines}", lines=AccessLines(lines, self._clock.seconds()))
