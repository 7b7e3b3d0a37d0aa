"""
What of content a client wants, by the headers of its request: RFC 9110, 13 and 14. Pure.
"""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """
    Read a Range header: RFC 9110, 14.2.

    @return: first byte and the one behind the last; none where all is to be sent: without a header, for several
        ranges, and for what isn't understood.
    @raise LookupError: if no byte of C{size} is in it.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= stop:
        raise LookupError(header)
    return start, stop


def matches(header: str | None, etag: str) -> bool:
    """
    Tell whether an If-None-Match header names C{etag}: RFC 9110, 13.1.2.
    """
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag in tags
