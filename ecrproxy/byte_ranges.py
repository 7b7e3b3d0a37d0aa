"""
Range requests: the Range header, and the response to several ranges. RFC 9110, 14. Pure.

- Ranges are sent in the order of the request, one part each, as in nginx and Go's net/http. They are not coalesced:
  podman counts the parts (containers/image, C{handle206Response}).
- The whole blob is sent if several ranges add up to more than its size, as in nginx and Go, or if there are more than
  C{MOST}: podman requests up to 1,024 at once (containers/storage, C{maxNumberMissingChunks}).
- Ranges are fetched from a bucket with at most C{QUESTIONS} requests, see L{joined}. If that is impossible, the whole
  blob is sent: RFC 9110, 14.2 allows it, and containers/image and stargz-snapshotter extract their parts.
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
"""Gaps of fewer bytes between two ranges are fetched along with them: another round trip would take longer."""

_SPEC: Final = re.compile(r"([0-9]*)-([0-9]*)")
_DIGITS: Final = 18
"""Maximum digits of a number that is parsed; a longer one is past the end of any blob."""
_BOUNDARY_LENGTH: Final = 64

Span = tuple[int, int]
"""Offsets of the first byte, and of the byte after the last."""


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

        @return: None to send the whole blob: no header, another unit, bad syntax, or too many ranges.
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

        @return: the spans to send, in the order of the request; empty to send the whole blob.
        @raise LookupError: if no range overlaps the blob.
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
    @ivar heads: the bytes before each part.
    @ivar end: the bytes after the last.
    @ivar length: bytes of the complete body.
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
    Join adjacent spans so that at most C{most} remain to request. Return none if that is impossible.

    The spans are fetched in order: one that starts before the end of its predecessor can't be joined to it.
    Gaps smaller than C{SMALL_GAP} are always closed; of the others, the smallest as needed.
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
    Choose the requests to a bucket for C{spans} of a blob that is not stored; none to send the whole blob.

    At most as many bytes are read in vain as there are in C{spans}, or in C{MOST} small gaps.

    @param ranged: whether the bucket supports ranges. If not, one request reads all bytes up to the last.
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
