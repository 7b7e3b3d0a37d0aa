"""
Numbers and times formatted for people. Pure.
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
"""From this value on, numbers are shown without decimals."""


def clean(text: str) -> str:
    """
    Replace characters that can't be shown, including those that change the writing direction.
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def size(count: float) -> str:
    """
    Format a number of bytes.
    """
    unit = 0
    while count >= 1023.5 and unit < 4:  # noqa: PLR2004 (would be rounded to 1024)
        count, unit = count / 1024, unit + 1
    name = ("B", "KiB", "MiB", "GiB", "TiB")[unit]
    return f"{count:.1f} {name}" if unit and count < _MANY else f"{count:,.0f} {name}"


def rate(count: int, seconds: int) -> str:
    """
    Format bytes within a time as bytes per second.
    """
    return f"{size(count / seconds if seconds else 0)}/s"


def share(part: int, whole: int) -> str:
    """
    Format a share in percent; only the whole is shown as 100, only nothing as 0.
    """
    if not whole:
        return NONE
    if 0 < part < whole:
        return f"{min(99.9, max(0.1, 100 * part / whole)):.1f} %"
    return f"{100 * part / whole:.0f} %"


def span(seconds: float) -> str:
    """
    Format a duration.
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
    Format how long ago something was, in one unit.
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
    Format a time of day, with the date if it is not today.
    """
    return f"{_at(when):%H:%M:%S} UTC"


def stamp(when: float) -> str:
    """
    Format a time for programs.
    """
    return f"{_at(when):%Y-%m-%dT%H:%M:%SZ}"


def _at(when: float) -> datetime:
    try:
        return datetime.fromtimestamp(when, UTC)
    except (ValueError, OverflowError, OSError):  # files of the cache may have any timestamp
        return datetime.fromtimestamp(0, UTC)


def short(digest: str) -> str:
    """
    Shorten a digest to what usually distinguishes it.
    """
    return _DIGEST.sub(r"\1…", digest)


def within(point: Point, part: float) -> str:
    """
    Format the time within which this share of requests was answered: the first bucket bound that covers the share.
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
    Format the share of content requests that were hits.
    """
    return share(point.hits, point.asked)
