"""
Manifests as documents: what they say about themselves, and what they list. Pure.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecrproxy.oci import (
    ARTIFACT_TYPE,
    IMAGE_TYPES,
    INDEX_TYPE,
    INDEX_TYPES,
    MANIFEST_TYPES,
    SIGNED_TYPE,
    Descriptor,
    Digest,
    Kind,
)

VALUES_LIMIT = 100_000
"""
Maximum values in a manifest, estimated before parsing. Python's parser blocks all other threads, and the garbage
collector scans all objects that it creates: 4 MiB of empty lists stop the process for seconds.
"""
DIGITS_LIMIT = 300
"""Maximum digits of an integer. The time to parse one grows with their square, and all threads wait meanwhile."""
SIGNATURES_LIMIT = 64 * 2**10
"""Maximum bytes of a manifest's signatures, which are parsed in the event loop. One without certificates has 700."""
SIZE_LIMIT = 2**62
"""Maximum size, in bytes, in a descriptor: files can't be much larger."""


@dataclass(frozen=True, slots=True)
class Document:
    """
    A manifest's bytes and its C{mediaType} field.

    @ivar own_type: None without that field.
    @ivar signed: whether it has signatures inside.
    """

    body: bytes
    own_type: str | None
    signed: bool = False

    @classmethod
    def read(cls, body: bytes) -> Document:
        """
        Parse a manifest.

        @raise ValueError: if C{body} is not a JSON object, or its media type is not a string.
        """
        document = _json_object(body)
        own_type = document.get("mediaType")
        if own_type is not None and not isinstance(own_type, str):
            raise ValueError(f"it calls itself {str(own_type)[:80]!r}")
        return cls(body, own_type or None, "signatures" in document)

    def may_be(self, media_type: str) -> bool:
        """
        Return True if cached bytes may be served as C{media_type}.

        What is signed has the digest by which registries name the signed manifest, but no signatures: if it is cached,
        another repository has it as content of its own.
        """
        if media_type == SIGNED_TYPE and not self.signed:
            return False
        return media_type in MANIFEST_TYPES and self.own_type in (None, media_type)

    def type_as(self, content_type: str) -> str:
        """
        Return the media type of this manifest, which a registry has sent as C{content_type}.

        @raise ValueError: if that is not a manifest's type, such as that of an HTML page,
            or differs from the manifest's own field (CVE-2021-41190).
        """
        named = _media_type(content_type)
        if named not in MANIFEST_TYPES:
            raise ValueError(f"its Content-Type is {named[:80]!r}, no manifest's")
        if self.own_type not in (None, named):
            raise ValueError(f"its Content-Type is {named}, but it calls itself {str(self.own_type)[:80]!r}")
        return named


def is_digest_of(digest: Digest, manifest: bytes, content_type: str) -> bool:
    """
    Return True if C{digest} is that of a manifest, or of the signed bytes of a signed one.

    A signed manifest of schema 1 has its signatures inside, and registries name it by the digest of the rest.

    @param manifest: if it is a JSON object, which is not checked here, it says nothing else than the signed bytes do.
    """
    if Digest.of(manifest, digest.algorithm) == digest:
        return True
    if _media_type(content_type) != SIGNED_TYPE:
        return False
    try:
        return Digest.of(_signed_bytes(manifest), digest.algorithm) == digest
    except (ValueError, LookupError, TypeError, RecursionError):  # it is not signed
        return False


def _signed_bytes(manifest: bytes) -> bytes:
    """
    Return the bytes that the first signature is for.

    @raise ValueError: if the manifest is anything else than these bytes with the signatures as the last member.
    """
    comma = manifest.rindex(b",", 0, manifest.rindex(b'"signatures"'))
    if len(manifest) - comma > SIGNATURES_LIMIT:
        raise ValueError("its signatures are too long")
    last = _json_object(b"{" + manifest[comma + 1 :])
    form = _json_object(_from_base64(last["signatures"][0]["protected"]))
    tail = _from_base64(form["formatTail"])
    if len(last) > 1 or form["formatLength"] != comma or tail.strip() != b"}":
        raise ValueError("it has members that are not signed")
    return manifest[:comma] + tail


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _from_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def index_type(content_type: str, body: bytes) -> str:
    """
    Return the media type of an index, such as a list of referrers, sent as C{content_type}.

    @raise ValueError: if it is not an index.
    """
    named = _media_type(content_type)
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
    if media_type in IMAGE_TYPES:
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
    if media_type in IMAGE_TYPES:
        return (("layers", Kind.BLOB), ("config", Kind.BLOB))
    return (("blobs", Kind.BLOB),) if media_type == ARTIFACT_TYPE else ()


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


def read_json(data: bytes, make: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None) -> Any:  # noqa: ANN401 (any JSON)
    """
    Parse JSON of a registry.

    @param make: makes a dict of the members of an object.
    @raise ValueError: if it is not JSON, or has an integer of more than C{DIGITS_LIMIT} digits.
    """
    try:
        return json.loads(data, object_pairs_hook=make, parse_int=_integer)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None


def _integer(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise ValueError(f"an integer has more than {DIGITS_LIMIT} digits")
    return int(text)


def _json_object(data: bytes, make: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None) -> dict[str, Any]:
    if sum(map(data.count, (b",", b"[", b"{"))) > VALUES_LIMIT:
        raise ValueError(f"it has more than {VALUES_LIMIT:,} values")
    document = read_json(data, make)
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004
    return document
