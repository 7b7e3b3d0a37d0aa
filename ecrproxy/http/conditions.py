"""
Conditions that a client puts on the response, by the headers of its request: RFC 9110, 13. Pure.
"""

from __future__ import annotations


def matches(header: str | None, etag: str) -> bool:
    """
    Tell whether an If-None-Match header names C{etag}: RFC 9110, 13.1.2.
    """
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag in tags
