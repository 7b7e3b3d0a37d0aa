"""
The last warnings and errors of the log, for the operator to look at. Bounded, and as free of secrets as the log.
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

from ecrproxy.logs.repeats import BURST, Kind, kind_of, summary_of

if TYPE_CHECKING:
    from twisted.logger import LogEvent

KEPT: Final = 20
LONGEST: Final = 300
"""Characters that are kept of a text."""


Row = tuple[float, str, str, int, str, str]
"""An incident and its kind, as processes tell it."""


@dataclass(frozen=True, slots=True)
class Incident:
    """
    Something that went wrong.

    @ivar when: the last time, in seconds since the epoch.
    @ivar level: as the log has it: warn, error or critical.
    @ivar times: how often it, or what is similar to it, went wrong.
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
        self._kept: deque[tuple[Kind, Incident]] = deque(maxlen=KEPT)

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
        told, once = kind_of(event)
        self._keep(Kind(told[:LONGEST], once[:LONGEST]), Incident(self._now(), level.name, summary_of(event)[:LONGEST]))

    def _keep(self, kind: Kind, incident: Incident) -> None:
        """
        Keep an incident as the newest, in the place of a similar one.
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
        Give them, the newest first.
        """
        with self._lock:
            return tuple(incident for _, incident in reversed(self._kept))

    def take(self) -> list[Row]:
        """
        Return those since the last call, the oldest first.
        """
        with self._lock:
            rows = [(each.when, each.level, each.text, each.times, *kind) for kind, each in self._kept]
            self._kept.clear()
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """
        Add what another process has kept.
        """
        for when, level, text, times, told, once in rows:
            self._keep(Kind(told, once), Incident(when, level, text, times))


def _encodable(text: str) -> str:
    """
    Escape the surrogates that JSON and the names of files can have, and UTF-8, which the page is written in, can't.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _similar(kept: Sequence[tuple[Kind, str]], kind: Kind, text: str) -> int | None:
    """
    Find the incident to which another one is added: one that says the same, or one of its format if there are too many.

    What an event is said once for may be a client's choice.

    @param kept: kind and text of each, the newest last.
    """
    alike = [at for at, (other, _) in enumerate(kept) if other.told == kind.told]
    same = [at for at in alike if kept[at][0] == kind and (kind.once or kept[at][1] == text)]
    if same or len(alike) >= BURST:
        return (same or alike)[-1]
    return None
