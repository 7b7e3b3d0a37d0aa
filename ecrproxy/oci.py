"""
The distribution protocol as values: digests, descriptors, routes, media types and error bodies. Pure.

The raw request target is parsed here, once; no later code sees a raw path. The grammar is that of the OCI distribution
spec 1.1, "Pull".
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, unquote_plus

from ecrproxy.identity import RegistryId, Repository, is_repository_name
from ecrproxy.reasons import Reason

if TYPE_CHECKING:
    from hashlib import _Hash

MANIFEST_LIMIT = 4 * 2**20
"""Maximum bytes of a manifest: what the spec requires registries to accept, and ECR's limit."""

CATALOG_PAGE = 1000
"""Maximum names on a page of the catalog."""
BLOB_TYPE = "application/octet-stream"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
INDEX_TYPES = frozenset({INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"})
IMAGE_TYPES = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
ARTIFACT_TYPE = "application/vnd.oci.artifact.manifest.v1+json"
SIGNED_TYPE = "application/vnd.docker.distribution.manifest.v1+prettyjws"
MANIFEST_TYPES = (
    INDEX_TYPES
    | IMAGE_TYPES
    | {
        ARTIFACT_TYPE,
        "application/vnd.docker.distribution.manifest.v1+json",
        SIGNED_TYPE,
    }
)
_KNOWN_TYPES = {media_type: media_type for media_type in MANIFEST_TYPES}

_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
HEX_LENGTHS = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[a-f0-9]+")
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class RegistryError(Exception):
    """
    An error response.

    @ivar status: the HTTP status.
    @ivar code: the spec's error code, "Error Codes".
    @ivar message: what happened, and what to do.
    @ivar headers: additional response headers.
    @ivar reason: the value of X-Cache-Reason; each class has a default.
    """

    reason = Reason.BAD_REQUEST

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        reason: Reason | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.message = status, code, message
        self.headers: Mapping[str, str] = headers or {}
        self.reason = reason or self.reason

    def body(self) -> bytes:
        """
        Return the error as the spec's JSON.
        """
        return json.dumps({"errors": [{"code": self.code, "message": self.message}]}).encode() + b"\n"


class Digest(NamedTuple):
    """
    A sha256 or sha512 digest.
    """

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """
        Parse C{algorithm:hex}.

        @raise ValueError: if it is not a digest of an algorithm that the proxy can verify.
        """
        algorithm, colon, digits = text.partition(":")
        if not colon or len(digits) != HEX_LENGTHS.get(algorithm) or not _HEX.fullmatch(digits):
            raise ValueError(f"not a sha256 or sha512 digest: {text[:150]!r}")
        return cls(algorithm, digits)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """
        Return the digest of C{data}.
        """
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def hasher(self) -> _Hash:
        """
        Return a new hash object of this algorithm; at the end, its C{hexdigest()} must equal C{hex}.
        """
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """
    A content descriptor: OCI image spec, "Content Descriptors".

    @ivar size: in bytes.
    """

    media_type: str
    digest: Digest
    size: int


class Kind(enum.Enum):
    """
    The kind of resource in a path; the value is its path segment.
    """

    MANIFEST = "manifests"
    BLOB = "blobs"
    TAGS = "tags"
    REFERRERS = "referrers"


@dataclass(frozen=True, slots=True)
class Route:
    """
    A parsed request path under /v2/.

    @ivar reference: a tag, or the text of C{digest}; C{list} for tags.
    @ivar digest: the reference as a digest; None for tags.
    @ivar query: the raw query string, without C{?}.
    """

    kind: Kind
    repository: Repository
    reference: str
    digest: Digest | None = None
    query: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """
        The canonical path: what nginx calls C{$uri}.
        """
        return f"/v2/{self.repository.name}/{self.kind.value}/{self.reference}"

    def at(self, digest: Digest) -> Route:
        """
        Return the route to C{digest}, with the same repository and kind.
        """
        return replace(self, reference=str(digest), digest=digest)


def first_component(repository: str) -> str:
    """
    Return the part of a repository's name before the first slash: in a pull-through cache, the rule's prefix.
    """
    return repository.partition("/")[0]


def parse_route(target: str, registry: RegistryId) -> Route:
    """
    Parse a raw origin-form request target under /v2/ of C{registry}.

    The raw path is split; then the name and the reference are percent-decoded, once, and must match the grammar.

    @raise RegistryError: 404 for a path that is not in the pull part of the protocol,
        400 for a name, digest or tag outside the grammar, and for a query that is not valid in a URL.
    """
    path, _, query = target.partition("?")
    parts = path.removeprefix("/v2/").rsplit("/", 2)
    if not path.startswith("/v2/") or len(parts) != 3:  # noqa: PLR2004
        raise _no_such_path()
    name, word, reference = unquote(parts[0]), parts[1], unquote(parts[2])
    if word not in {kind.value for kind in Kind} or (word == Kind.TAGS.value and reference != "list"):
        raise _no_such_path()
    kind = Kind(word)
    if not is_repository_name(name):
        raise RegistryError(
            400, "NAME_INVALID", "the repository's name is outside the grammar of the distribution spec"
        )
    if not _QUERY.fullmatch(query):
        raise _no_such_query()
    if kind is Kind.TAGS:
        return Route(kind, Repository(registry, name), reference, None, query)
    return _with_reference(Route(kind, Repository(registry, name), reference, None, query))


def _with_reference(route: Route) -> Route:
    if ":" in route.reference or route.kind is not Kind.MANIFEST:
        try:
            return route.at(Digest.parse(route.reference))
        except ValueError as problem:
            raise RegistryError(400, "DIGEST_INVALID", str(problem)) from None
    if not _TAG.fullmatch(route.reference):
        raise RegistryError(400, "TAG_INVALID", "the tag is outside the grammar of the distribution spec")
    return route


def _no_such_path() -> RegistryError:
    return RegistryError(
        404,
        "UNSUPPORTED",
        "no such path: this proxy answers GET and HEAD of manifests, blobs, tags/list, referrers and _catalog",
    )


def _no_such_query() -> RegistryError:
    return RegistryError(400, "UNSUPPORTED", "the query string has characters that belong in no URL")


def query_values(query: str) -> dict[str, str]:
    """
    Return the first value for each name of a raw query string, still escaped.
    """
    values: dict[str, str] = {}
    for name, _, value in (pair.partition("=") for pair in query.split("&") if pair):
        values.setdefault(unquote_plus(name), value)
    return values


def parse_catalog(query: str) -> tuple[str, int]:
    """
    Return the requested page of the catalog: the name it starts after, and the maximum number of names.

    C{n} is limited to C{CATALOG_PAGE}.

    @raise RegistryError: 400 if C{n} is not a number.
    """
    if not _QUERY.fullmatch(query):
        raise _no_such_query()
    values = query_values(query)
    most = unquote(values.get("n", "")) or str(CATALOG_PAGE)
    if not re.fullmatch("[0-9]{1,9}", most):
        said = f"n is no number of repositories; give one from 1 to {CATALOG_PAGE}"
        raise RegistryError(400, "PAGINATION_NUMBER_INVALID", said)
    return unquote_plus(values.get("last", "")), min(int(most), CATALOG_PAGE)


def passed_on(query: str) -> dict[str, str]:
    """
    Return the parameters of a list that are passed between client and ECR, unchanged: C{last} is opaque.

    Containerd's C{ns}, and names that would need escaping, are dropped.
    """
    return {name: value for name, value in query_values(query).items() if name != "ns" and _PARAMETER.fullmatch(name)}


def to_query(values: Mapping[str, str]) -> str:
    """
    Return a query string of values that are already escaped.
    """
    return "&".join(f"{name}={value}" for name, value in values.items())


def accepted_types(accept: Sequence[str]) -> frozenset[str]:
    """
    Return the set of manifest types in Accept headers; empty means any.

    Order, spelling and quality values are ignored: ECR only looks whether a type is listed (docs/ecr.rst), so clients
    that accept the same types share one answer. Types of no manifest have no effect and are dropped: a client could
    fill the cache with them. RFC 9110, 12.5.1.
    """
    types = set()
    for item in ",".join(accept).split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        refused = any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
        if media_type in ("*/*", "application/*") and not refused:
            return frozenset()
        if media_type in _KNOWN_TYPES and not refused:
            types.add(_KNOWN_TYPES[media_type])  # one string for all clients
    return frozenset(types)
