"""
The bucket behind the front: a store of objects that knows no tokens.

A URL is valid for one object, for a GET, and for as long as its query says.
An Authorization header beside the signature is one scheme too many (400).  A
single Range is honoured; several are answered with the whole object.  Bytes
are sent at a set rate for each connection, so that a transfer lasts long enough
to be watched; and while a certain file exists, none beyond the first half of an answer
are sent.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlencode

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

PIECE = 64 * 1024
# How far a transfer may run ahead to make up for a late timer.
SLACK = 0.05
# How often to check whether the file that holds the bytes back still exists.
LOOK = 0.02
LIFE = 3600
SINGLE_RANGE = re.compile(r"bytes=(?:(?P<first>\d+)-(?P<last>\d*)|-(?P<tail>\d+))")


@dataclass
class Counters:
    """
    What the bucket sent, and to how many.
    """

    requests: int = 0
    finished: int = 0
    bytes: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Grant:
    """
    One object, and the expiry of its URL.
    """

    path: Path
    until: float


@dataclass(frozen=True)
class Pace:
    """
    How fast bytes are sent.

    @ivar rate: bytes a second, for each connection; 0 means no limit.
    @ivar hold: no answer goes beyond its first half while this file exists.
    """

    rate: int = 0
    hold: Path | None = None

    def held(self) -> bool:
        """
        Return True if the second half has to wait.
        """
        return self.hold is not None and self.hold.exists()


class Bucket(Resource):
    """
    The registry's blobs, under signed URLs.
    """

    isLeaf = True

    def __init__(self, url: str, storage: Path, pace: Pace, clock: IReactorTime) -> None:
        super().__init__()
        self.counters = Counters()
        self._url, self._storage, self._pace, self._clock = url, storage, pace, clock
        self._grants: dict[str, Grant] = {}

    def sign(self, digest: str) -> str:
        """
        Sign a URL for a blob.
        """
        algorithm, _, encoded = digest.partition(":")
        path = self._storage / "docker/registry/v2/blobs" / algorithm / encoded[:2] / encoded
        query = {
            "X-Amz-Security-Token": secrets.token_urlsafe(600),
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
            "X-Amz-SignedHeaders": "host",
            "X-Amz-Expires": str(LIFE),
            "X-Amz-Credential": "ASIASTANDIN/20260101/eu-west-1/s3/aws4_request",
            "X-Amz-Signature": secrets.token_hex(32),
        }
        uri = f"/{secrets.token_hex(2)}-{secrets.token_hex(16)}/{encoded[:8]}?{urlencode(query)}"
        self._grants[uri] = Grant(path / "data", time.time() + LIFE)
        return self._url + uri

    def render_HEAD(self, request: Request) -> bytes:
        """
        Reject: the signature is for a GET.
        """
        return self._refuse(request, 403, "SignatureDoesNotMatch")

    def render_GET(self, request: Request) -> bytes | int:
        """
        Send the object, or its one requested range.
        """
        if request.getHeader("Authorization") is not None:
            return self._refuse(request, 400, "InvalidArgument")
        grant = self._grants.get(request.uri.decode("ascii"))
        if grant is None or grant.until < time.time():
            return self._refuse(request, 403, "AccessDenied")
        size = grant.path.stat().st_size
        first, last = wanted(request.getHeader("Range"), size)
        if first > last and size:
            return self._refuse(request, 416, "InvalidRange")
        self.counters.requests += 1
        if last - first + 1 < size:
            request.setResponseCode(206)
            request.setHeader("Content-Range", f"bytes {first}-{last}/{size}")
        request.setHeader("Content-Length", str(last - first + 1))
        request.setHeader("Content-Type", "application/octet-stream")
        request.setHeader("ETag", f'"{grant.path.parent.name[:32]}"')
        request.setHeader("Accept-Ranges", "bytes")
        source = grant.path.open("rb")
        source.seek(first)
        Sending(request, source, last - first + 1, self._pace, self._clock, self.counters).start()
        return NOT_DONE_YET

    def _refuse(self, request: Request, status: int, code: str) -> bytes:
        self.counters.refused += 1
        request.setResponseCode(status)
        request.setHeader("Content-Type", "application/xml")
        return f"<Error><Code>{code}</Code></Error>".encode()


def wanted(value: str | None, size: int) -> tuple[int, int]:
    """
    Convert a Range header into the first and the last byte to send.
    """
    match = SINGLE_RANGE.fullmatch(value) if value else None
    if match is None:
        return 0, size - 1
    if match["tail"]:
        return max(0, size - int(match["tail"])), size - 1
    return int(match["first"]), min(int(match["last"] or size), size - 1)


@implementer(IPushProducer)
class Sending:
    """
    A part of a file in transfer, at a steady rate and never ahead of the reader.
    """

    def __init__(
        self,
        request: Request,
        source: BinaryIO,
        length: int,
        pace: Pace,
        clock: IReactorTime,
        counters: Counters,
    ) -> None:
        self._request, self._source, self._left, self._half = request, source, length, length // 2
        self._pace, self._clock, self._counters = pace, clock, counters
        self._paused, self._next = False, clock.seconds()
        self._call: IDelayedCall | None = None

    def start(self) -> None:
        """
        Begin, and go on until the file or the reader is gone.
        """
        self._request.registerProducer(self, True)
        self._turn()

    def pauseProducing(self) -> None:
        """
        Pause: the reader is behind.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Resume: the reader has caught up.
        """
        self._paused = False
        if self._call is None:
            self._turn()

    def stopProducing(self) -> None:
        """
        Stop: the reader has disconnected.
        """
        self._paused, self._left = True, 0
        self._source.close()
        if self._call is not None:
            self._call.cancel()

    def _turn(self) -> None:
        self._call = None
        while self._left and not self._paused:
            early = LOOK if self._left <= self._half and self._pace.held() else self._next - self._clock.seconds()
            if early > 0:
                self._call = self._clock.callLater(early, self._turn)
                return
            self._write()
        if not self._left and not self._source.closed:
            self._source.close()
            self._counters.finished += 1
            self._request.unregisterProducer()
            self._request.finish()

    def _write(self) -> None:
        piece = self._source.read(min(PIECE, self._left))
        self._left -= len(piece)
        self._counters.bytes += len(piece)
        if self._pace.rate:
            start = max(self._clock.seconds() - SLACK, self._next)
            self._next = start + len(piece) / self._pace.rate
        self._request.write(piece)
