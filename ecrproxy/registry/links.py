"""
The Link header of a page: RFC 8288, section 3. Pure.

The header is read once from left to right, so the time is linear in its length, whatever its content.
"""

from __future__ import annotations

import re
from typing import Final

# Each alternative consumes what it began with, or fails for good: none scans the same bytes again at the next position.
_TOKEN: Final = re.compile(
    r'<(?P<target>[^<>]*)>|"(?P<quoted>(?:[^"\\]|\\.)*)"?|(?P<mark>[,;=])|(?P<word>[^<>",;=\s]+)', re.DOTALL
)


def next_target(header: str) -> str | None:
    """
    Return the target of the first link whose relation is C{next}, unparsed.
    """
    target: str | None = None
    name, is_value, is_related = "", False, False
    for token in _TOKEN.finditer(header):
        if token["target"] is not None:
            target, is_related = token["target"], False
        elif token["mark"] == ",":
            target = None
        elif token["mark"] == ";":
            name, is_value = "", False
        elif token["mark"] == "=":
            is_value = True
        elif not is_value:
            name = (token["word"] or "").lower()
        elif name == "rel" and not is_related:  # only the first rel counts
            is_related = True
            if target is not None and "next" in _text(token).lower().split():
                return target
    return None


def _text(token: re.Match[str]) -> str:
    return token["word"] or re.sub(r"\\(.)", r"\1", token["quoted"] or "", flags=re.DOTALL)
