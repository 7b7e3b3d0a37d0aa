"""
What workers tell the first process each second: which files they used, what clients got, who is there, what went wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource

from ecrproxy.http.relay import FIRST

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime
    from twisted.web.client import Agent
    from twisted.web.server import Request

    from ecrproxy.metrics import Served

log = Logger()

USED: Final = b"used"
TOLD: Final = "X-Ecrproxy-"
"""Begins the headers that things are told in."""
TELL_SECONDS: Final = 1.0
TOGETHER: Final = 50
"""Notes that are told in one request: they are a header."""


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


def told(used: Any, served: Served, incidents: Any, clients: Any) -> dict[str, Any]:  # noqa: ANN401
    """
    Name what is told, on either side: L{Noter}s for workers, L{Hearer}s for the first process.
    """
    return {
        "Used": used,
        "Requests": served.requests,
        "Saved": served.saved,
        "Incidents": incidents,
        "Clients": clients,
    }


class Used(Resource):
    """
    Where workers tell which files they used, so that the janitor knows, and what else there is to be told of them.

    @param hearers: keep it, by the name of what is told.
    """

    isLeaf = True

    def __init__(self, hearers: Mapping[str, Hearer]) -> None:
        super().__init__()
        self._hearers = hearers

    def render(self, request: Request) -> bytes:
        """
        Take note.
        """
        for name, hearer in self._hearers.items():
            hearer.add(json.loads(request.getHeader(TOLD + name) or "[]"))
        return b""


class Teller(Service):
    """
    Tells the first process now and then what this worker has noted.

    @param noters: what it is told, by the names that L{Used} knows.
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
                told = self._agent.request(b"GET", FIRST + b"/" + USED, headers)
                told.addErrback(lambda problem: log.debug("Not told: {problem}", problem=problem.value))
