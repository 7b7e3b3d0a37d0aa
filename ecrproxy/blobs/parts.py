"""
Which parts of a blob to request and to send, and the check of its size before parts are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ecrproxy.byte_ranges import Ranges, Span
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.transfer.gaps import SMALLEST_PART, Urgency, Wish
from ecrproxy.transfer.lane import drop

if TYPE_CHECKING:
    from ecrproxy.cache.arriving import Left
    from ecrproxy.transfer.download import Download


class OtherSizeError(UnavailableError):
    """
    A blob's size differs from the known one.

    @ivar certain: whether the known size is ECR's, given with this request; otherwise that may be wrong.
    """

    certain = False


def is_part(ranges: Ranges | None, size: int | None) -> bool:
    """
    Return True if only a part of a blob is, or may be, requested.
    """
    if ranges is None or size is None:
        return ranges is not None
    try:
        return bool(parts_of(ranges, size))
    except LookupError:  # no bytes
        return True


def parts_of(ranges: Ranges | None, size: int | None) -> list[Span]:
    """
    Return the parts of a blob to send; none for the whole blob, also if a range covers all of it.

    @raise LookupError: if no range overlaps the blob.
    """
    spans = ranges.of(size) if ranges is not None and size is not None else []
    return [] if spans == [(0, size)] else spans


def uncertain() -> OtherSizeError:
    """
    Return the error for ranges that overlap no blob of a size that ECR has not confirmed.
    """
    return OtherSizeError(502, "UNAVAILABLE", "the size of the blob is not certain")


def settle_size(blob: BlobSource, expected: int | None, parts: Sequence[Span]) -> None:
    """
    Use the manifest's size if the bucket sends none: the client then gets a length, and the cache can store the blob.

    @raise OtherSizeError: if parts are requested and the size differs.
    """
    if blob.size is None:
        blob.size = expected
    if parts:
        check_size(blob, expected)


def check_size(blob: BlobSource, expected: int | None, *, certain: bool = False) -> None:
    """
    Check a blob's size before parts of it are sent, because parts are not verified here.

    @param certain: whether ECR has just confirmed the expected size.
    @raise OtherSizeError: if the size differs; the blob's first response is discarded.
    """
    if blob.size != expected:
        drop(blob.first)
        said = f"a bucket has {blob.size} bytes where a blob of {expected} was asked for"
        problem = OtherSizeError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
        problem.certain = certain
        raise problem


def serves(download: Download, parts: Sequence[Span]) -> bool:
    """
    Return True if a shared transfer delivers the requested parts as soon as possible.
    """
    if not all(download.nears(start) for start, _ in parts):
        return False
    if not parts or download.kept:
        return download.offers(parts[0][0] if parts else 0)
    start = parts[0][0]  # the bytes come in order: a later part is faster by itself
    return len(parts) == 1 and download.offers(start) and start <= download.received


def first_span(left: Left | None, parts: Sequence[Span], part: int | None) -> tuple[int, int | None]:
    """
    Choose the first span of a blob to request: the requested part of what is missing.

    @param left: what an interrupted transfer has left.
    @param part: how many bytes to request at first; None for all.
    """
    gaps = left.gaps if left is not None else [(0, None)]
    for wanted, end in parts:
        for first, last in gaps:
            start, stop = max(wanted, first), end if last is None else min(end, last)
            if start < stop:
                return start, min(stop, start + SMALLEST_PART)
    start, last = gaps[0]
    stops = [stop for stop in (last, None if part is None else start + part) if stop is not None]
    return start, min(stops, default=None)


def urgency_of(parts: Sequence[Span]) -> Urgency:
    """
    Return how urgent the first of the requested parts is.
    """
    return Wish(*parts[0]).urgency if parts else Urgency.NOBODY
