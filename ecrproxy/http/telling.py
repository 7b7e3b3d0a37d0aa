"""
What workers tell the first process each second: what clients got, who is there, what went wrong.

Nothing that is told is taken on trust: L{ROWS} says what a row of each kind may be, and a note with any other row is
refused as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web.http import OK
from twisted.web.http_headers import Headers

from ecrproxy.access.limits import COUNTED
from ecrproxy.http.answering import Answering, send_small
from ecrproxy.http.relay import FIRST, is_encodable
from ecrproxy.metrics import BUCKETS
from ecrproxy.oci import RegistryError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime
    from twisted.web.client import Agent

    from ecrproxy.http.request import RegistryRequest
    from ecrproxy.metrics import Served

log = Logger()

TELL: Final = "/told"
TOLD: Final = "X-Ecrproxy-"
"""Begins the headers that things are told in."""
TELL_SECONDS: Final = 1.0
TOGETHER: Final = 50
"""Notes that are told in one request: they are a header."""
TEXT: Final = 1000
"""The most characters of any text that is told."""


class Hearer(Protocol):
    """
    Keeps what workers tell of one thing.
    """

    def add(self, rows: Any, /) -> None:  # noqa: ANN401 (as JSON has them)
        """
        Take in what another has noted.
        """


class Noter(Protocol):
    """
    Notes one thing until it is told.
    """

    def take(self) -> Sequence[object]:
        """
        Give what was noted, once, as JSON can have it.
        """


def told(served: Served, incidents: Any, clients: Any) -> dict[str, Any]:  # noqa: ANN401
    """
    Name what is told, on either side: L{Noter}s for workers, L{Hearer}s for the first process.
    """
    return {
        "Requests": served.requests,
        "Saved": served.saved,
        "Incidents": incidents,
        "Clients": clients,
    }


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= TEXT


def _is_label(value: object) -> bool:
    return _is_text(value) and is_encodable(str(value))


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**40  # type: ignore[operator]


def _is_tally(row: object) -> bool:
    match row:
        case [[_, _, _, _] as labels, count, size, seconds, [*buckets]]:
            counts = [count, size, *buckets]
            told = all(map(_is_label, labels)) and all(map(_is_count, counts))
            return told and _is_time(seconds) and len(buckets) == len(BUCKETS) + 1
    return False


def _is_saving(row: object) -> bool:
    match row:
        case [name, size, count]:
            return _is_label(name) and _is_count(size) and _is_count(count)
    return False


def _is_incident(row: object) -> bool:
    match row:
        case [when, "warn" | "error" | "critical", text, times, told, once]:
            return _is_time(when) and all(map(_is_text, [text, told, once])) and _is_count(times)
    return False


def _is_word(row: object) -> bool:
    match row:
        case [worker, connected, transferring, {**met}]:
            return all(map(_is_count, [worker, connected, transferring, *met.values()])) and met.keys() <= set(COUNTED)
    return False


ROWS: Final[Mapping[str, Callable[[object], bool]]] = {
    "Requests": _is_tally,
    "Saved": _is_saving,
    "Incidents": _is_incident,
    "Clients": _is_word,
}
"""What a row of each kind may be."""


def read_rows(name: str, text: str) -> list[Any]:
    """
    Read the rows that a worker tells of one thing.

    @raise ValueError: if they are not what a worker can have noted.
    """
    try:
        rows = json.loads(text)
    except RecursionError:
        rows = None
    if not isinstance(rows, list) or len(rows) > TOGETHER or not all(map(ROWS[name], rows)):
        raise ValueError(f"not what a worker tells in {TOLD}{name}: {text[:100]!r}")
    return rows


class Told(Answering):
    """
    Where workers tell what there is to be told of them.

    @param hearers: keep it, by the name of what is told.
    """

    def __init__(self, hearers: Mapping[str, Hearer]) -> None:
        super().__init__()
        self._hearers = hearers

    async def respond(self, request: RegistryRequest) -> None:
        """
        Take note.

        @raise RegistryError: if something is told that no worker can have noted.
        """
        try:
            told = {name: read_rows(name, request.getHeader(TOLD + name) or "[]") for name in self._hearers}
        except ValueError as problem:
            log.error("Refused a worker's note: {problem}", problem=problem)
            raise RegistryError(400, "UNSUPPORTED", "no worker tells this") from None
        for name, hearer in self._hearers.items():
            hearer.add(told[name])
        send_small(request, OK, "text/plain", b"")


class Teller(Service):
    """
    Tells the first process now and then what this worker has noted.

    @param noters: what it is told, by the names that L{Told} knows.
    """

    def __init__(self, agent: Agent, noters: Mapping[str, Noter], clock: IReactorTime) -> None:
        self._agent, self._noters = agent, noters
        self._loop = LoopingCall(self._tell)
        self._loop.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(TELL_SECONDS, now=False).addErrback(lambda problem: log.failure("Telling", problem))

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _tell(self) -> None:
        for name, noter in self._noters.items():
            notes = noter.take()
            for at in range(0, len(notes), TOGETHER):
                headers = Headers({TOLD + name: [json.dumps(notes[at : at + TOGETHER])]})
                told = self._agent.request(b"GET", FIRST + TELL.encode("ascii"), headers)
                told.addErrback(lambda problem: log.debug("Not told: {problem}", problem=problem.value))
