"""
Why an answer is what it is: the words of X-Cache-Reason. Pure.

Whoever decides names the reason, with the answer or with the error; docs/reference/http.rst says what each word means.
"""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """
    Why the cache had it, or had not, or why a client gets no content.
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

    # From ECR, and not kept.
    LIST = "list"
    TOO_LARGE = "too-large"
    SIZE_UNKNOWN = "size-unknown"
    NO_ROOM = "no-room"
    DISK = "disk"
    PASSED = "passed"

    # ECR is of no help: stale if there is something old, an error if not.
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

    # The proxy's own.
    BUSY = "busy"
    FAILED = "failed"
