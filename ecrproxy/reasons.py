"""
The values of X-Cache-Reason. Pure.

The code that decides sets the reason, on the answer or the error; docs/reference/http.rst explains each value.
"""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """
    Why an answer came from the cache or from ECR, or why there is an error.
    """

    # From the cache.
    CACHED = "cached"
    TAG_TTL = "tag-ttl"
    TAG_CONFIRMED = "tag-confirmed"
    REPOSITORY_CONFIRMED = "repository-confirmed"

    # From ECR.
    FIRST_USE = "first-use"
    NOT_KEPT = "not-kept"
    TAG_MOVED = "tag-moved"
    IN_FLIGHT = "in-flight"

    # From ECR, and not stored.
    LIST = "list"
    TOO_LARGE = "too-large"
    SIZE_UNKNOWN = "size-unknown"
    NO_ROOM = "no-room"
    DISK = "disk"
    PASSED = "passed"

    # ECR is not available: a stale answer if there is one, otherwise an error.
    UNREACHABLE = "unreachable"
    FAILING = "failing"
    THROTTLED = "throttled"
    QUEUE_FULL = "queue-full"
    CIRCUIT_OPEN = "circuit-open"
    NO_TOKEN = "no-token"  # noqa: S105 (a word, no secret)
    WRONG_BYTES = "wrong-bytes"
    NO_MANIFEST = "no-manifest"

    # Denied.
    ADDRESS = "address"
    CERTIFICATE = "certificate"
    PASSWORD = "password"  # noqa: S105
    WEB_PAGE = "web-page"
    NAMESPACE = "namespace"
    UNKNOWN_REGISTRY = "unknown-registry"
    NOT_FOUND = "not-found"
    ECR_DENIED = "ecr-denied"
    BAD_REQUEST = "bad-request"

    # The proxy itself.
    BUSY = "busy"
    FAILED = "failed"
