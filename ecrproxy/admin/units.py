"""
How figures read for people. Pure.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from ecrproxy.admin.history import Point
from ecrproxy.metrics import BUCKETS

NONE: Final = "\N{EN DASH}"
_DIGEST: Final = re.compile(r"(sha\d+:[0-9a-f]{10})[0-9a-f]{20,}")
_MANY: Final = 10
"""From so many of a unit on, what is behind the point is noise."""


def clean(text: str) -> str:
    """
    Put a mark for what can't be shown, among it what would turn the direction of writing round.
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def size(count: float) -> str:
    """
    Write bytes.
    """
    unit = 0
    while count >= 1023.5 and unit < 4:  # noqa: PLR2004 (what would be rounded to 1024)
        count, unit = count / 1024, unit + 1
    name = ("B", "KiB", "MiB", "GiB", "TiB")[unit]
    return f"{count:.1f} {name}" if unit and count < _MANY else f"{count:,.0f} {name}"


def rate(count: int, seconds: int) -> str:
    """
    Write bytes in a time as bytes a second.
    """
    return f"{size(count / seconds if seconds else 0)}/s"


def share(part: int, whole: int) -> str:
    """
    Write a part in percent; only all is 100, only nothing is 0.
    """
    if not whole:
        return NONE
    if 0 < part < whole:
        return f"{min(99.9, max(0.1, 100 * part / whole)):.1f} %"
    return f"{100 * part / whole:.0f} %"


def span(seconds: float) -> str:
    """
    Write how long something takes.
    """
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def ago(seconds: float) -> str:
    """
    Write how long ago something was, in one unit.
    """
    whole = int(seconds)
    if whole < 1:
        return "just now"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} ago"
    return f"{whole} s ago"


def moment(when: float) -> str:
    """
    Write a time of today, or of any other day.
    """
    return f"{_at(when):%H:%M:%S} UTC"


def stamp(when: float) -> str:
    """
    Write a time for programs.
    """
    return f"{_at(when):%Y-%m-%dT%H:%M:%SZ}"


def _at(when: float) -> datetime:
    try:
        return datetime.fromtimestamp(when, UTC)
    except (ValueError, OverflowError, OSError):  # a file of the cache may have any time
        return datetime.fromtimestamp(0, UTC)


def short(digest: str) -> str:
    """
    Write as much of a digest as tells it from the others at hand.
    """
    return _DIGEST.sub(r"\1…", digest)


def within(point: Point, part: float) -> str:
    """
    Write in how many seconds so large a part of requests was answered: the first bound that so many kept.
    """
    if not point.asked:
        return NONE
    upto = 0
    for bound, count in zip(BUCKETS, point.took, strict=False):
        upto += count
        if upto >= part * point.asked:
            return f"{bound * 1000:,.0f} ms" if bound < 1 else f"{bound:g} s" if bound < 60 else span(bound)  # noqa: PLR2004
    return f"over {span(BUCKETS[-1])}"


def hit_ratio(point: Point) -> str:
    """
    Write how many requests for content were hits.
    """
    return share(point.hits, point.asked)
