"""
Which events become lines: the first of a kind, and after that a count.

Rules:

- An event with the field C{once} is of the kind (namespace, format, once), and has one line a minute. What it is said
  once for may be a client's to choose: beyond C{DIFFERENT} kinds of one namespace and format, the others are one.
- A trouble, which is a warning or graver, is of the kind (namespace, format), and has a few lines a minute.
- What is left out is counted. The count goes with the next line of that kind, or has a line after the minute.
- Everything else passes.
- Memory is bounded: beyond C{MOST} kinds, those of one namespace and format are taken together, then all of them.
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
"""Lines a minute of a kind of trouble."""
DIFFERENT: Final = 20
"""Lines a minute that differ in C{once} alone."""
MOST: Final = 1000
"""Kinds that are told apart."""
LONGEST: Final = 1000
"""Characters that are kept of an event that is left out."""


_BARE: Final = re.compile(r"\{\w+\}")
"""A format that says nothing by itself."""


class Kind(NamedTuple):
    """
    What makes two events similar.

    @ivar told: namespace and format.
    @ivar once: what the event is said once for; empty if it does not say.
    """

    told: str
    once: str


def kind_of(event: LogEvent) -> Kind:
    """
    Tell of which kind an event is.
    """
    told = event.get("log_format") or ""
    if "log_text" in event:  # logged in Twisted's old way: the text is all there is, and may hold a traceback
        told = str(event.get("why") or event["log_text"]).partition("\n")[0]
    elif _BARE.fullmatch(told):  # all that is said is in the field
        told = formatEvent({**event, "log_failure": None})
    failure = event.get("log_failure") or event.get("failure")
    if isinstance(failure, Failure):
        told = f"{told} {_type_of(failure)}"
    once = event.get("once")
    return Kind(f"{event.get('log_namespace')} {told}"[:LONGEST], "" if once is None else f"={once}"[:LONGEST])


def summary_of(event: LogEvent) -> str:
    """
    Write an event in one line. Of an exception, its type: the log has the rest.
    """
    failure = event.get("log_failure") or event.get("failure")
    text = " ".join(formatEvent({**event, "log_failure": None}).split()) if event.get("log_format") else ""
    if isinstance(failure, Failure):
        text += f" ({_type_of(failure)})" if text else _type_of(failure)
    return text[:LONGEST]


@dataclass(slots=True)
class _Minute:
    """
    A minute of one kind.

    @ivar last: the first event that was left out, as it is written when the minute is over.
    """

    ends: float
    written: int = 0
    omitted: int = 0
    last: LogEvent | None = None


class Repeats:
    """
    Counts events of a kind. Not for several threads at the same time.

    @param seconds: the time, on a clock that nobody sets.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._minutes: dict[Kind, _Minute] = {}  # in the order in which they end
        self._different: Counter[str] = Counter()  # kinds among them, by what is told

    def admit(self, event: LogEvent) -> LogEvent | None:
        """
        Give the event if it is to be written, with C{log_omitted} if others before it were not.
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
        Yield an event for each kind whose minute is over and had more than was written.

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

    def _begin(self, kind: Kind, now: float) -> _Minute:
        self._end(kind)
        minute = self._minutes[kind] = _Minute(now + MINUTE)
        self._different[kind.told] += 1
        return minute

    def _end(self, kind: Kind) -> None:
        if self._minutes.pop(kind, None) is not None:
            self._different[kind.told] -= 1
            if not self._different[kind.told]:
                del self._different[kind.told]

    def _tracked(self, kind: Kind) -> Kind:
        """
        Choose under which kind an event is counted.
        """
        if kind in self._minutes or (len(self._minutes) < MOST and self._different[kind.told] < DIFFERENT):
            return kind
        wider = Kind(kind.told, "")
        return wider if wider in self._minutes or len(self._minutes) < 2 * MOST else Kind("", "")


def _limit(event: LogEvent) -> int | None:
    """
    Tell how many lines a minute events of this kind have; none for any number.
    """
    if event.get("once") is not None:
        return 1
    level = event.get("log_level")
    return BURST if level is not None and level >= LogLevel.warn else None


def _type_of(failure: Failure) -> str:
    return getattr(failure.type, "__name__", "exception")


def _short(event: LogEvent) -> LogEvent:
    """
    Keep of an event what fits into a line: it may hold on to much.
    """
    kept: LogEvent = {name: event[name] for name in ("log_level", "log_namespace") if name in event}
    return kept | {"log_format": "{summary}", "summary": summary_of(event)}
