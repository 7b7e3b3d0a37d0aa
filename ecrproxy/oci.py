"""
The distribution protocol as values: digests, descriptors, routes, media types and error bodies. Pure.

The raw request target is parsed here, once; no later code sees a raw path. The grammar is that of the OCI distribution
spec 1.1, "Pull".
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, unquote_plus

from ecrproxy.identity import RegistryId, Repository, is_repository_name
from ecrproxy.reasons import Reason

if TYPE_CHECKING:
    from hashlib import _Hash

MANIFEST_LIMIT = 4 * 2**20
"""Maximum bytes of a manifest: what the spec requires registries to accept, and ECR's limit."""
VALUES_LIMIT = 100_000
"""
Maximum values in a manifest, estimated before parsing. Python's parser blocks all other threads, and the garbage
collector scans all objects that it creates: 4 MiB of empty lists stop the process for seconds.
"""

SIZE_LIMIT = 2**62
"""Maximum size, in bytes, in a descriptor: files can't be much larger."""
CATALOG_PAGE = 1000
"""Maximum names on a page of the catalog."""
BLOB_TYPE = "application/octet-stream"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
INDEX_TYPES = frozenset({INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"})
_IMAGE_TYPES = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
_ARTIFACT_TYPE = "application/vnd.oci.artifact.manifest.v1+json"
SIGNED_TYPE = "application/vnd.docker.distribution.manifest.v1+prettyjws"
MANIFEST_TYPES = (
    INDEX_TYPES
    | _IMAGE_TYPES
    | {
        _ARTIFACT_TYPE,
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

    Order, spelling and quality values are ignored: ECR only looks whether a type is listed (field notes C7), so clients
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


@dataclass(frozen=True, slots=True)
class Document:
    """
    A manifest's bytes and its C{mediaType} field.

    @ivar own_type: None without that field.
    """

    body: bytes
    own_type: str | None

    @classmethod
    def read(cls, body: bytes) -> Document:
        """
        Parse a manifest.

        @raise ValueError: if C{body} is not a JSON object, or its media type is not a string.
        """
        own_type = _json_object(body).get("mediaType")
        if own_type is not None and not isinstance(own_type, str):
            raise ValueError(f"it calls itself {str(own_type)[:80]!r}")
        return cls(body, own_type or None)

    def type_as(self, content_type: str) -> str:
        """
        Return the media type of this manifest, which a registry has sent as C{content_type}.

        @raise ValueError: if that is not a manifest's type, such as that of an HTML page,
            or differs from the manifest's own field (CVE-2021-41190).
        """
        named = content_type.partition(";")[0].strip().lower()
        if named not in MANIFEST_TYPES:
            raise ValueError(f"its Content-Type is {named[:80]!r}, no manifest's")
        if self.own_type not in (None, named):
            raise ValueError(f"its Content-Type is {named}, but it calls itself {str(self.own_type)[:80]!r}")
        return named


def is_digest_of(digest: Digest, manifest: bytes, content_type: str) -> bool:
    """
    Return True if C{digest} is that of a manifest, or of the signed bytes of a signed one.

    A signed manifest of schema 1 has its signatures inside, and registries name it by the digest of the rest.
    """
    if Digest.of(manifest, digest.algorithm) == digest:
        return True
    if content_type.partition(";")[0].strip().lower() != SIGNED_TYPE:
        return False
    try:
        return Digest.of(_signed_bytes(manifest), digest.algorithm) == digest
    except (ValueError, LookupError, TypeError, RecursionError):  # it is not signed
        return False


def _signed_bytes(manifest: bytes) -> bytes:
    """
    Return the bytes that the first signature is for.

    @raise ValueError: if the manifest says anything else than they do.
    """
    document = _json_object(manifest)
    form = _json_object(_from_base64(document.pop("signatures")[0]["protected"]))
    signed = manifest[: operator.index(form["formatLength"])] + _from_base64(form["formatTail"])
    if _json_object(signed) != document:
        raise ValueError("it has members that are not signed")
    return signed


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def index_type(content_type: str, body: bytes) -> str:
    """
    Return the media type of an index, such as a list of referrers, sent as C{content_type}.

    @raise ValueError: if it is not an index.
    """
    named = content_type.partition(";")[0].strip().lower()
    if named in INDEX_TYPES:
        return named
    if not isinstance(_json_object(body).get("manifests"), list):
        raise ValueError(f"its Content-Type is {named[:80]!r}, and it lists no manifests")  # noqa: TRY004
    return INDEX_TYPE


def listed(manifest: bytes, media_type: str) -> Iterator[tuple[Kind, Descriptor]]:
    """
    Yield the content of its own repository that a manifest of C{media_type} lists.

    Only the fields that the type defines are read, because registries check only these when they accept a manifest:
    C{manifests} of an index, C{layers} and C{config} of an image, C{blobs} of an artifact. Content that may be stored
    elsewhere (foreign layers, C{urls}) and a C{subject} are ignored: a registry accepts a manifest without having them.

    If an object in a manifest has duplicate member names, nothing is listed: the registry may have checked the other.
    Names are compared without case, as Go's parsers do, and so are media types (RFC 6838, 4.2).

    @raise ValueError: if C{manifest} is not a JSON object.
    """
    try:
        document = _json_object(manifest, _told_apart)
    except _AmbiguousError:
        return
    for field_name, kind in _fields_of(media_type):
        for descriptor in _own_descriptors(document, field_name):
            yield kind, descriptor


def layers(manifest: bytes, media_type: str) -> Iterator[Descriptor]:
    """
    Yield the layers of an image, in order, by the rules of L{listed}; nothing for other manifests.

    @raise ValueError: if C{manifest} is not a JSON object.
    """
    if media_type in _IMAGE_TYPES:
        with contextlib.suppress(_AmbiguousError):
            yield from _own_descriptors(_json_object(manifest, _told_apart), "layers")


def _own_descriptors(document: Mapping[str, object], field_name: str) -> Iterator[Descriptor]:
    found = document.get(field_name)
    items = [found] if field_name == "config" else found
    for item in items if isinstance(items, list) else []:
        descriptor = _own_descriptor(item)
        if descriptor is not None:
            yield descriptor


def _fields_of(media_type: str) -> Sequence[tuple[str, Kind]]:
    """
    Return the fields of this type that list content of the repository.
    """
    if media_type in INDEX_TYPES:
        return (("manifests", Kind.MANIFEST),)
    if media_type in _IMAGE_TYPES:
        return (("layers", Kind.BLOB), ("config", Kind.BLOB))
    return (("blobs", Kind.BLOB),) if media_type == _ARTIFACT_TYPE else ()


def _own_descriptor(item: object) -> Descriptor | None:
    if not isinstance(item, dict) or any(value for name, value in item.items() if name.casefold() == "urls"):
        return None
    media_type, digest, size = item.get("mediaType"), item.get("digest"), item.get("size")
    if (
        not isinstance(media_type, str)
        or not isinstance(digest, str)
        or type(size) is not int
        or not 0 <= size <= SIZE_LIMIT
    ):
        return None
    if any(word in media_type.casefold() for word in ("foreign", "nondistributable")):
        return None
    try:
        return Descriptor(media_type, Digest.parse(digest), size)
    except ValueError:
        return None


class _AmbiguousError(Exception):
    """
    A JSON object has duplicate member names.
    """


def _told_apart(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name.casefold() for name, _ in members}) < len(members):
        raise _AmbiguousError
    return dict(members)


def _json_object(data: bytes, make: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None) -> dict[str, Any]:
    if sum(map(data.count, (b",", b"[", b"{"))) > VALUES_LIMIT:
        raise ValueError(f"it has more than {VALUES_LIMIT:,} values")
    try:
        document = json.loads(data, object_pairs_hook=make)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004
    return document
