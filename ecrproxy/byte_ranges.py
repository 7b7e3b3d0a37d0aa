"""
Which bytes of a blob a client wants: the Range header, and the response to several ranges. RFC 9110, 14. Pure.

- Ranges are sent in the order in which they were asked for, one part each, as nginx and Go's net/http do. They are not
  coalesced: podman counts the parts (containers/image, C{handle206Response}).
- Several ranges are answered with the whole blob if they add up to more than it has, as nginx and Go do, or if there
  are more than C{MOST} of them: podman asks for up to 1,024 at once (containers/storage, C{maxNumberMissingChunks}).
- From a bucket they are fetched with C{QUESTIONS} requests at most, see L{joined}. Where that can't be done, the whole
  is sent: RFC 9110, 14.2 allows it, and containers/image and stargz-snapshotter take their parts from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

MOST: Final = 1024
"""Maximum number of ranges in one request."""
QUESTIONS: Final = 16
"""Maximum number of requests to a bucket for the ranges of one request."""
SMALL_GAP: Final = 64 * 2**10
"""Bytes between two ranges that are fetched with them, rather than asking once more: a round trip takes longer."""

_SPEC: Final = re.compile(r"([0-9]*)-([0-9]*)")
_DIGITS: Final = 18
"""Digits of a number that is read as it is; a longer one is past the end of any blob."""
_BOUNDARY_LENGTH: Final = 64

Span = tuple[int, int]
"""Offset of the first byte, and of the one behind the last."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """
    A Range header, before the size of the blob is known.

    @ivar specs: first and last byte of each range; without a first, C{last} counts bytes from the end.
    """

    specs: tuple[tuple[int | None, int | None], ...]

    @classmethod
    def parse(cls, header: str | None) -> Ranges | None:
        """
        Parse a Range header.

        @return: none if the whole blob is to be sent: no header, another unit, bad syntax, or too many ranges.
        """
        unit, _, listed = (header or "").strip().partition("=")
        if unit.lower() != "bytes" or listed.count(",") >= MOST:
            return None
        found = [_SPEC.fullmatch(each.strip()) for each in listed.split(",") if each.strip()]
        specs = tuple((_number(each[1]), _number(each[2])) for each in found if each is not None)
        sound = all(last is not None if first is None else last is None or first <= last for first, last in specs)
        return cls(specs) if specs and len(specs) == len(found) and sound else None

    def of(self, size: int) -> list[Span]:
        """
        Apply the ranges to a blob of C{size} bytes.

        @return: what to send, in the order of the request; nothing if the whole blob is to be sent.
        @raise LookupError: if no byte of the blob is in any of them.
        """
        spans = [span for first, last in self.specs if (span := _span(first, last, size)) is not None]
        if not spans:
            raise LookupError(f"no byte of {size}")
        too_much = len(spans) > 1 and _total(spans) > size
        return [] if too_much else spans


class Multipart:
    """
    The framing of a multipart/byteranges body.

    @param unique: text that does not occur in the blob, such as its digest in hex.
    @ivar heads: what comes before each part.
    @ivar end: what comes after the last.
    @ivar length: bytes of the whole body.
    """

    def __init__(self, spans: Sequence[Span], size: int, media_type: str, unique: str) -> None:
        self.spans = spans
        self._boundary = unique[:_BOUNDARY_LENGTH]
        self.heads = [
            f"\r\n--{self._boundary}\r\nContent-Type: {media_type}\r\n"
            f"Content-Range: {content_range(span, size)}\r\n\r\n".encode("ascii")
            for span in spans
        ]
        self.end = f"\r\n--{self._boundary}--\r\n".encode("ascii")
        self.length = sum(map(len, self.heads)) + len(self.end) + _total(spans)

    @property
    def content_type(self) -> str:
        """
        The Content-Type of the response.
        """
        return f"multipart/byteranges; boundary={self._boundary}"


def joined(spans: Sequence[Span], most: int = QUESTIONS) -> list[Span]:
    """
    Join neighbours, so that at most C{most} ranges are left to ask for; none if that is not possible.

    The spans are fetched in their order: one that starts before the end of the one before it can't be joined to it.
    Gaps smaller than C{SMALL_GAP} are always closed; of the others, the smallest.
    """
    if not spans:
        return []
    gaps = [start - stop for (_, stop), (start, _) in pairwise(spans)]
    backwards = [at for at, gap in enumerate(gaps) if gap < 0]
    large = sorted((at for at, gap in enumerate(gaps) if gap >= SMALL_GAP), key=lambda at: gaps[at], reverse=True)
    left = most - 1 - len(backwards)
    if left < 0:
        return []
    edges = [-1, *sorted([*backwards, *large[:left]]), len(gaps)]
    return [(spans[before + 1][0], spans[last][1]) for before, last in pairwise(edges)]


def questions(spans: Sequence[Span], *, ranged: bool) -> list[Span]:
    """
    Choose what to ask a bucket for, so that C{spans} of a blob that is not kept can be sent; none to send it whole.

    Between them no more bytes are read in vain than there are in C{spans}, or in C{MOST} small gaps.

    @param ranged: whether the bucket gives parts. If not, a single request brings all bytes up to the last one.
    """
    if not ranged:
        return joined(spans, 1)
    asked = joined(spans)
    wanted = _total(spans)
    return asked if _total(asked) - wanted <= max(wanted, MOST * SMALL_GAP) else []


def content_range(span: Span, size: int) -> str:
    """
    Format a Content-Range header.
    """
    return f"bytes {span[0]}-{span[1] - 1}/{size}"


def _total(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def _number(digits: str) -> int | None:
    if not digits:
        return None
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= _DIGITS else 10**_DIGITS


def _span(first: int | None, last: int | None, size: int) -> Span | None:
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    else:
        start, stop = first, size if last is None else min(size, last + 1)
    return (start, stop) if start < stop else None
