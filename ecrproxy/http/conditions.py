"""
Conditional requests: RFC 9110, 13. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e]*")|\*')


def tags(values: Sequence[str]) -> list[str]:
    """
    Parse If-None-Match fields, which form one list. Return the entity tags, without the C{W/} of weak ones, and C{*}.

    Anything else is ignored: RFC 9110, 8.8.3.
    """
    listed = (each.strip() for each in ",".join(values).split(","))
    return [found[1] or "*" for found in map(_TAG.fullmatch, listed) if found is not None]


def matches(values: Sequence[str], etag: str) -> bool:
    """
    Return True if If-None-Match fields match C{etag}: RFC 9110, 13.1.2.
    """
    found = tags(values)
    return "*" in found or etag in found
