"""
Conditions that a client puts on the response, by the headers of its request: RFC 9110, 13. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e]*")|\*')


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
