"""
The last warnings and errors of the log, for the operator to look at. Bounded, and as free of secrets as the log.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import ILogObserver, LogLevel, formatEvent, globalLogPublisher
from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.logger import LogEvent

KEPT: Final = 20
LONGEST: Final = 300
"""Characters that are kept of a text."""


Row = tuple[float, str, str, int]
"""An incident, as processes tell it."""


@dataclass(frozen=True, slots=True)
class Incident:
    """
    Something that went wrong.

    @ivar when: the last time, in seconds since the epoch.
    @ivar level: as the log has it: warn, error or critical.
    @ivar times: how often in a row.
    """

    when: float
    level: str
    text: str
    times: int = 1


@implementer(ILogObserver)
class Incidents(Service):
    """
    Keeps the last of them, while it runs; called from any thread.

    @param now: seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._kept: deque[Incident] = deque(maxlen=KEPT)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        globalLogPublisher.addObserver(self)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        globalLogPublisher.removeObserver(self)

    def __call__(self, event: LogEvent) -> None:
        """
        Look at what is logged.
        """
        level = event.get("log_level")
        if level is None or level < LogLevel.warn:
            return
        self._keep(Incident(self._now(), level.name, _text(event)))

    def _keep(self, incident: Incident) -> None:
        with self._lock:
            last = self._kept[-1] if self._kept else None
            if last is not None and (last.level, last.text) == (incident.level, incident.text):
                self._kept[-1] = replace(incident, times=last.times + incident.times)
            else:
                self._kept.append(incident)

    def latest(self) -> tuple[Incident, ...]:
        """
        Give them, the newest first.
        """
        with self._lock:
            return tuple(reversed(self._kept))

    def take(self) -> list[Row]:
        """
        Give them, once, the oldest first: for who adds them to his own.
        """
        with self._lock:
            rows = [(each.when, each.level, each.text, each.times) for each in self._kept]
            self._kept.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Take in what another process has kept.
        """
        for row in rows:
            self._keep(Incident(*row))


def _text(event: LogEvent) -> str:
    """
    Write an event in one line. Of an exception, its kind: the log has the rest.
    """
    failure = event.get("log_failure")
    text = " ".join(formatEvent(event).split())
    if failure is not None:
        text += f" ({failure.type.__name__})" if text else failure.type.__name__
    return text[:LONGEST]
