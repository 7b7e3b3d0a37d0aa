"""
Limits repeated log events: the first ones of a kind are written, further ones counted.

Rules:

- An event with the field C{once} has the kind (namespace, format, once), and gets one line a minute. Clients may choose
  the value of C{once}, so beyond C{DIFFERENT} values per namespace and format all others count as one kind.
- An event at level warning or higher has the kind (namespace, format), and gets a few lines a minute.
- Omitted events are counted. The count is added to the next line of the kind, or written after the minute.
- All other events pass.
- Memory is bounded: beyond C{MOST} kinds, those of one namespace and format are merged, then all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from twisted.logger import LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure

MINUTE: Final = 60.0
BURST: Final = 5
"""Lines a minute for one kind of warning or error."""
DIFFERENT: Final = 20
"""Lines a minute that differ only in C{once}."""
MOST: Final = 1000
"""Maximum number of kinds that are distinguished."""
LONGEST: Final = 1000
"""Maximum characters kept of an omitted event."""


_BARE: Final = re.compile(r"\{\w+\}")
"""A format that consists of one field."""


class EventKind(NamedTuple):
    """
    Events with equal kinds are repeats.

    @ivar told: namespace and format.
    @ivar once: the event's C{once} field; empty without one.
    """

    told: str
    once: str


def kind_of(event: LogEvent) -> EventKind:
    """
    Return the kind of an event.
    """
    told = event.get("log_format") or ""
    if "log_text" in event:  # Twisted's legacy logging: only the text is available, perhaps with a traceback
        told = str(event.get("why") or event["log_text"]).partition("\n")[0]
    elif _BARE.fullmatch(told):  # the field is the whole message
        told = formatEvent({**event, "log_failure": None})
    failure = event.get("log_failure") or event.get("failure")
    if isinstance(failure, Failure):
        told = f"{told} {_type_of(failure)}"
    once = event.get("once")
    return EventKind(f"{event.get('log_namespace')} {told}"[:LONGEST], "" if once is None else f"={once}"[:LONGEST])


def summary_of(event: LogEvent) -> str:
    """
    Format an event in one line. Of an exception, only the type: the log has the rest.
    """
    failure = event.get("log_failure") or event.get("failure")
    text = " ".join(formatEvent({**event, "log_failure": None}).split()) if event.get("log_format") else ""
    if isinstance(failure, Failure):
        text += f" ({_type_of(failure)})" if text else _type_of(failure)
    return text[:LONGEST]


@dataclass(slots=True)
class _Minute:
    """
    The current minute of one kind.

    @ivar last: the last omitted event, as it is written after the minute.
    """

    ends: float
    written: int = 0
    omitted: int = 0
    last: LogEvent | None = None


class Repeats:
    """
    Counts repeated events. Not thread-safe.

    @param seconds: a monotonic clock.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._minutes: dict[EventKind, _Minute] = {}  # in order of their ends
        self._different: Counter[str] = Counter()  # number of kinds in _minutes, by Kind.told

    def admit(self, event: LogEvent) -> LogEvent | None:
        """
        Return the event if it should be written, with C{log_omitted} if others were omitted before.
        """
        limit = _limit(event)
        if limit is None:
            return event
        kind, now = self._tracked(kind_of(event)), self._seconds()
        minute = self._minutes.get(kind)
        before = 0
        if minute is None or now >= minute.ends:
            before = minute.omitted if minute is not None else 0
            minute = self._begin(kind, now)
        if minute.written < limit:
            minute.written += 1
            return {**event, "log_omitted": before} if before else event
        if minute.last is None:
            minute.last = _short(event)
        minute.omitted += 1
        return None

    def due(self, *, at_once: bool = False) -> Iterator[LogEvent]:
        """
        Yield a summary event for each kind whose minute is over and had omitted events.

        @param at_once: do not wait for the end of the minute.
        """
        now = self._seconds()
        for kind, minute in list(self._minutes.items()):
            if now < minute.ends and not at_once:
                return
            self._end(kind)
            if minute.last is not None:
                self._begin(kind, now).written = 1
                yield {**minute.last, "log_omitted": minute.omitted - 1}

    def _begin(self, kind: EventKind, now: float) -> _Minute:
        self._end(kind)
        minute = self._minutes[kind] = _Minute(now + MINUTE)
        self._different[kind.told] += 1
        return minute

    def _end(self, kind: EventKind) -> None:
        if self._minutes.pop(kind, None) is not None:
            self._different[kind.told] -= 1
            if not self._different[kind.told]:
                del self._different[kind.told]

    def _tracked(self, kind: EventKind) -> EventKind:
        """
        Return the kind under which to count an event.
        """
        if kind in self._minutes or (len(self._minutes) < MOST and self._different[kind.told] < DIFFERENT):
            return kind
        wider = EventKind(kind.told, "")
        return wider if wider in self._minutes or len(self._minutes) < 2 * MOST else EventKind("", "")


def _limit(event: LogEvent) -> int | None:
    """
    Return how many lines a minute this kind of event gets; None for no limit.
    """
    if event.get("once") is not None:
        return 1
    level = event.get("log_level")
    return BURST if level is not None and level >= LogLevel.warn else None


def _type_of(failure: Failure) -> str:
    return getattr(failure.type, "__name__", "exception")


def _short(event: LogEvent) -> LogEvent:
    """
    Reduce an event to one short line: the event may reference large objects.
    """
    kept: LogEvent = {name: event[name] for name in ("log_level", "log_namespace") if name in event}
    return kept | {"log_format": "{summary}", "summary": summary_of(event)}
