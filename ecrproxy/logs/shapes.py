"""
Formats for log events: text for people, systemd's journal, JSON objects. Pure.

Rules:

- Control characters are escaped, except tabs, and line breaks in formats with several lines.
- An event with several lines, such as a traceback, is one JSON object. In text, its further lines start with a tab; in
  the journal, with the first line's priority. So text from clients or upstream can't imitate a log line.
- Each access line is written as one line, with the end time of its response, even if several are logged together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from twisted.logger import LogEvent, LogLevel, formatEvent, formatTime
from twisted.python.failure import Failure

from ecrproxy.http.access_log import AccessLine, AccessLines

Shape = Callable[[LogEvent, str], list[str]]
"""Formats an event as lines; the second argument is the id of the request that caused it, or empty."""

PRIORITIES: Final = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}
"""Syslog priorities of the levels, most severe first: sd-daemon(3)."""

_REFUSED: Final = 400
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_encode = json.JSONEncoder(separators=(",", ":")).encode


def priority_of(event: LogEvent) -> int:
    """
    Return the syslog priority of an event.
    """
    return PRIORITIES.get(event.get("log_level", LogLevel.info), 6)


def as_text(event: LogEvent, request: str) -> list[str]:
    """
    Format an event as text with its time.
    """
    mark, time = _mark(event), event.get("log_time", 0.0)
    if isinstance(lines := event.get("lines"), AccessLines):
        return [f"{_moment(int(time - (lines.now - each.ended)))} {mark} {_one_line(each)}" for each in lines.lines]
    told = _printable(event, request)
    return [f"{_moment(int(time))} {mark} " + told.replace("\n", "\n\t")] if told else []


def as_journal(event: LogEvent, request: str) -> list[str]:
    """
    Format an event for the journal, which adds the time and parses the level from each line: sd-daemon(3).
    """
    mark = f"<{priority_of(event)}>{_mark(event)} "
    if isinstance(lines := event.get("lines"), AccessLines):
        return [f"{mark}{_one_line(each)}" for each in lines.lines]
    told = _printable(event, request)
    return [mark + line for line in told.split("\n")] if told else []


def as_json(event: LogEvent, request: str) -> list[str]:
    """
    Format an event as JSON: docs/log.schema.json.
    """
    time = event.get("log_time", 0.0)
    if isinstance(lines := event.get("lines"), AccessLines):
        process = os.getpid()
        return [_access(each, time - (lines.now - each.ended), process) for each in lines.lines]
    message, traceback = _told(event)
    if not message:
        return []
    told: dict[str, Any] = _head(event, time) | {"message": message}
    if traceback:
        told["traceback"] = traceback
    if request:
        told["request"] = request
    if omitted := event.get("log_omitted"):
        told["omitted"] = omitted
    return [_encode(told)]


def _head(event: LogEvent, time: float) -> dict[str, Any]:
    level = event.get("log_level", LogLevel.info)
    return {"time": _iso(time), "level": level.name, "logger": _name(event), "process": os.getpid()}


def _access(line: AccessLine, time: float, process: int) -> str:
    """
    Format an access line as JSON. By hand, because the json module takes five times as long for thousands of lines.
    """
    _, client, method, path, status, size, seconds, cache, reason, upstream, request, aborted, registry, _ = line
    method, path = _encode(method)[1:-1], _encode(path)[1:-1]
    about = f"{method} {path}" if status < _REFUSED else method  # limits lines that cost a client nothing
    return (
        f'{{"time":"{_iso(time)}","level":"info","logger":"access","process":{process},'
        f'"message":"{about} {status or "-"}","request":"{request}","client":{_encode(client)},'
        f'"method":"{method}","path":"{path}","status":{status or "null"},"bytes":{size},'
        f'"seconds":{seconds:.6f},"upstream_seconds":{upstream:.6f},"cache":{_word(cache)},"reason":{_word(reason)},'
        f'"aborted":{"true" if aborted else "false"},"registry":{_word(registry)}}}'
    )


def _word(word: str) -> str:
    return "null" if word == "-" else f'"{word}"'


def _iso(time: float) -> str:
    second, thousandth = divmod(round(time * 1000), 1000)
    return f"{_utc(second)}.{thousandth:03d}Z"


@lru_cache(maxsize=16)
def _utc(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=16)
def _moment(second: int) -> str:
    return formatTime(second)


def _name(event: LogEvent) -> str:
    name = str(event.get("log_namespace") or "-")
    return "twisted" if name == "log_legacy" else name  # Twisted's legacy logging


def _mark(event: LogEvent) -> str:
    level = event.get("log_level", LogLevel.info)
    return f"[{_name(event)}#{level.name}]"


def _printable(event: LogEvent, request: str) -> str:
    message, traceback = _told(event)
    if not message:
        return ""
    story = f" (request {request})" if request else ""
    if omitted := event.get("log_omitted"):
        story += f" ({omitted} similar {'line' if omitted == 1 else 'lines'} omitted)"
    told = f"{message}{story}" + (f"\n{traceback}" if traceback else "")
    return _CONTROL.sub(_escaped, told.rstrip("\n"))


def _one_line(line: AccessLine) -> str:
    told = str(line)
    return told if told.isprintable() else _CONTROL.sub(_escaped, told).replace("\n", "\\n")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _told(event: LogEvent) -> tuple[str, str]:
    """
    Return an event's message and traceback; the latter is empty if there is none.
    """
    failure = event.get("log_failure") or event.get("failure")
    if not isinstance(failure, Failure):
        return formatEvent(event), ""
    # Legacy events have the traceback in their text.
    message = event.get("why") if "log_text" in event else formatEvent(event)
    return str(message or failure.getErrorMessage() or failure.type), failure.getTraceback()
