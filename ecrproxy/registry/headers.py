"""
What the status and headers of a response upstream say. Pure.
"""

from __future__ import annotations

import re
from typing import Final

from twisted.web.iweb import IResponse

_COUNT = re.compile(r"[0-9]{1,18}")
_SPAN = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)


def told_part(content_range: str | None, start: int, stop: int | None) -> tuple[int, int] | None:
    """
    Parse a Content-Range: the end of the range from C{start}, and the size of the whole: RFC 9110, 14.4.

    @param stop: the end of the requested range; None for everything from C{start} on.
    @return: None for another range, one longer than requested, reversed, or outside the whole.
    """
    found = _SPAN.fullmatch(content_range or "")
    if found is None:
        return None
    first, last, size = map(int, found.groups())
    if first != start or not first <= last < size or (stop is not None and last >= stop):
        return None
    return last + 1, size


def told_length(response: IResponse) -> int | None:
    """
    Parse the Content-Length of an answer to a HEAD; None if there is none, or it is not a number.
    """
    length = header(response, "Content-Length") or ""
    return int(length) if _COUNT.fullmatch(length) else None


def header(response: IResponse, name: str) -> str | None:
    """
    Return the last value of a header.
    """
    values = header_values(response, name)
    return values[-1] if values else None


def header_values(response: IResponse, name: str) -> list[str]:
    """
    Return all values of a header, which may be any bytes: RFC 9110, 5.5. Twisted would decode them as UTF-8.
    """
    return [value.decode("latin-1") for value in response.headers.getRawHeaders(name.encode("ascii"), [])]


def is_page(response: IResponse) -> bool:
    """
    Return True if an answer is HTML and names no content: an intermediary's page, not the registry's answer.
    """
    media_type = (header(response, "Content-Type") or "").partition(";")[0].strip().lower()
    return media_type in ("text/html", "application/xhtml+xml") and header(response, "Docker-Content-Digest") is None
