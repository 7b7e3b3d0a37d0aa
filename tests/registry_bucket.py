"""
The S3 bucket of the stand-in for ECR: signed URLs, and blobs by range.

A URL is valid for GET, for its exact path and query, and for a limited time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from twisted.internet.interfaces import IReactorTime

from tests.registry_content import Repository
from tests.registry_http import Asked, Quirks, Reply, account_of, region_of

_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")
_TWICE: Final = (
    "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter, "
    "Signature query string parameter or the Authorization header should be specified"
)


def bucket_error(status: int, code: str, message: str) -> Reply:
    """
    Build an error as S3 writes it.
    """
    xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()
    return Reply(status, {"Content-Type": "application/xml"}, body)


@dataclass
class Urls:
    """
    The URLs that the registry signs for the bucket, and the bucket checks.
    """

    clock: IReactorTime
    registry: str
    bucket: str
    quirks: Quirks
    _objects: dict[str, tuple[str, str]] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def sign(self, repository: str, digest: str) -> str:
        """
        Sign a URL for one blob of one repository; no two are the same.
        """
        name = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{repository}/{digest}"))
        path = f"/{name[:4]}-{account_of(self.registry)}-{name}/{name}"
        self._objects[path] = (repository, digest)
        now = self.clock.seconds()
        stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"AKIASTANDIN/{stamp[:8]}/{region_of(self.registry)}/s3/aws4_request"
        # A long token that is always new, as temporary credentials have; with "+" and "=" to quote.
        session = base64.b64encode(b"~~~" * 40 + f"{len(self._until):05d}xx".encode()).decode()
        query = (
            f"X-Amz-Security-Token={quote(session, safe='')}"
            f"&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={stamp}&X-Amz-SignedHeaders=host"
            f"&X-Amz-Expires={self.quirks.url_lifetime}&X-Amz-Credential={quote(scope, safe='')}"
        )
        signature = self._signature(path, query)
        self._until[signature] = now + self.quirks.url_lifetime
        return f"{self.bucket}{path}?{query}&X-Amz-Signature={signature}"

    def signatures(self) -> list[str]:
        """
        Return the signatures of all URLs signed so far.
        """
        return list(self._until)

    def expire(self) -> None:
        """
        Expire all URLs signed so far.
        """
        self._until = dict.fromkeys(self._until, float("-inf"))

    def named_in(self, path: str) -> tuple[str, str]:
        """
        Return the repository and the digest that a path of the bucket names.
        """
        return self._objects.get(path, ("", ""))

    def refusal(self, asked: Asked) -> Reply | None:
        """
        Return why the bucket rejects a request, if it does.
        """
        if "authorization" in asked.headers:
            return bucket_error(400, "InvalidArgument", _TWICE)
        query, _, signature = asked.query.rpartition("&X-Amz-Signature=")
        if not signature:
            return bucket_error(403, "AccessDenied", "Access Denied")
        if asked.method != "GET" or signature != self._signature(asked.path, query):
            text = "The request signature we calculated does not match the signature you provided."
            return bucket_error(403, "SignatureDoesNotMatch", text)
        if self.clock.seconds() >= self._until.get(signature, float("-inf")):
            return bucket_error(403, "AccessDenied", "Request has expired")
        return None

    def _signature(self, path: str, query: str) -> str:
        text = f"GET\n{self.bucket}\n{path}\n{query}"
        return hmac.new(b"stand-in", text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class BucketSide:
    """
    The bucket's half of ECR: bytes for requests with a signed URL.
    """

    repositories: Mapping[str, Repository]
    corrupted: Mapping[str, bytes]
    urls: Urls
    quirks: Quirks

    def reply(self, asked: Asked) -> Reply:
        """
        Answer one request.
        """
        refusal = self.urls.refusal(asked)
        if refusal is not None:
            return refusal
        repository = self.repositories.get(asked.repository, Repository())
        data = repository.blobs.get(asked.digest)
        if data is None:
            return bucket_error(404, "NoSuchKey", "The specified key does not exist.")
        data = self.corrupted.get(asked.digest, data)
        # Not a hash of the bytes (nor is S3's, for multipart uploads): corruption must not show.
        etag = self.quirks.etag or f'"{hashlib.md5(asked.digest.encode()).hexdigest()}-1"'
        if asked.headers.get("if-match", etag) not in (etag, "*"):
            return bucket_error(412, "PreconditionFailed", "At least one condition did not hold")
        return self._part(data, etag, asked)

    def _part(self, data: bytes, etag: str, asked: Asked) -> Reply:
        """
        Return the requested range, or everything.
        """
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": etag,
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "x-amz-request-id": "STANDIN",
        }
        current = asked.headers.get("if-range", etag) == etag and not self.quirks.ignore_range
        chosen = byte_range(asked.headers.get("range", ""), len(data)) if current else None
        if chosen is None:
            return Reply(200, headers, memoryview(data))
        start, end = chosen
        if start >= end:
            refused = bucket_error(416, "InvalidRange", "The requested range is not satisfiable")
            unsatisfied = {"Content-Range": f"bytes */{len(data)}"}
            return Reply(416, {**refused.headers, **unsatisfied}, refused.body)
        end = min(end, start + self.quirks.longest_part)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return Reply(206, headers, memoryview(data)[start:end])


def byte_range(header: str, total: int) -> tuple[int, int] | None:
    """
    Parse a Range header into a half-open range of bytes: empty if it selects none, None for everything.

    S3 supports only a single range: several ranges, like nonsense, select everything.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return max(0, total - int(last)), total
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, total) if last else total
