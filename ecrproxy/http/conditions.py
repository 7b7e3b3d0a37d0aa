"""
What of content a client wants, by the headers of its request: RFC 9110, 13 and 14. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e]*")|\*')
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


def tags(values: Sequence[str]) -> list[str]:
    """
    Read If-None-Match fields, which form one list: its entity tags, without the mark of weak ones, or C{*}.

    What is no entity tag is left out: RFC 9110, 8.8.3.
    """
    listed = (each.strip() for each in ",".join(values).split(","))
    return [found[1] or "*" for found in map(_TAG.fullmatch, listed) if found is not None]


def matches(values: Sequence[str], etag: str) -> bool:
    """
    Tell whether If-None-Match fields name C{etag}: RFC 9110, 13.1.2.
    """
    found = tags(values)
    return "*" in found or etag in found
