"""
The last warnings and errors in the log, for the status page. Bounded, and without secrets, like the log.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import ILogObserver, LogLevel, globalLogPublisher
from zope.interface import implementer

from ecrproxy.logs.repeats import BURST, EventKind, kind_of, summary_of

if TYPE_CHECKING:
    from twisted.logger import LogEvent

KEPT: Final = 20
LONGEST: Final = 300
"""Maximum characters of a text that are kept."""


Row = tuple[float, str, str, int, str, str]
"""An incident and its kind, as processes exchange them."""


@dataclass(frozen=True, slots=True)
class Incident:
    """
    A warning or error.

    @ivar when: the last time, in seconds since the epoch.
    @ivar level: as in the log: warn, error or critical.
    @ivar times: number of equal or similar events.
    """

    when: float
    level: str
    text: str
    times: int = 1


@implementer(ILogObserver)
class Incidents(Service):
    """
    Keeps the last incidents while it runs. Thread-safe.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._kept: deque[tuple[EventKind, Incident]] = deque(maxlen=KEPT)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        globalLogPublisher.addObserver(self)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        globalLogPublisher.removeObserver(self)

    def __call__(self, event: LogEvent) -> None:
        """
        Process a log event.
        """
        level = event.get("log_level")
        if level is None or level < LogLevel.warn:
            return
        told, once = kind_of(event)
        self._keep(
            EventKind(told[:LONGEST], once[:LONGEST]), Incident(self._now(), level.name, summary_of(event)[:LONGEST])
        )

    def _keep(self, kind: EventKind, incident: Incident) -> None:
        """
        Keep an incident as the newest, replacing a similar one.
        """
        incident = replace(incident, text=_encodable(incident.text))
        with self._lock:
            at = _similar([(other, each.text) for other, each in self._kept], kind, incident.text)
            if at is not None:
                incident = replace(incident, times=self._kept[at][1].times + incident.times)
                del self._kept[at]
            self._kept.append((kind, incident))

    def latest(self) -> tuple[Incident, ...]:
        """
        Return the incidents, newest first.
        """
        with self._lock:
            return tuple(incident for _, incident in reversed(self._kept))

    def take(self) -> list[Row]:
        """
        Return the incidents since the last call, oldest first.
        """
        with self._lock:
            rows = [(each.when, each.level, each.text, each.times, *kind) for kind, each in self._kept]
            self._kept.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add the incidents of another process.
        """
        for when, level, text, times, told, once in rows:
            self._keep(EventKind(told, once), Incident(when, level, text, times))


def _encodable(text: str) -> str:
    """
    Escape surrogates, which JSON and file names may have, but the page's UTF-8 may not.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _similar(kept: Sequence[tuple[EventKind, str]], kind: EventKind, text: str) -> int | None:
    """
    Find the incident to merge another one into: one with the same text, or one with its format if there are too many.

    The C{once} of an event may be chosen by a client.

    @param kept: kind and text of each incident, newest last.
    """
    alike = [at for at, (other, _) in enumerate(kept) if other.told == kind.told]
    same = [at for at in alike if kept[at][0] == kind and (kind.once or kept[at][1] == text)]
    if same or len(alike) >= BURST:
        return (same or alike)[-1]
    return None
