"""
Parsers of text or bytes that need no connection: they accept their input, or reject it in the documented way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from ecrproxy.byte_ranges import Ranges
from ecrproxy.cache.cache_key import Asker, CacheKey
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.takeover import read_entry
from ecrproxy.documents import Document, listed
from ecrproxy.http.conditions import matches
from ecrproxy.http.target import parse_target
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Digest, RegistryError, accepted_types, parse_route, query_values
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.headers import told_part
from ecrproxy.registry.links import next_target
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import LONGEST_ASKED, asked_wait
from ecrproxy.settings.table import SETTINGS, ConfigError
from ecrproxy.workers.messages import FromParent, FromWorker, decode, encode

REGISTRY = RegistryId("registry.test:443")


def route(data: bytes) -> None:
    with contextlib.suppress(RegistryError):
        found = parse_route(data.decode("ascii", "replace"), REGISTRY)
        assert parse_route(found.path, REGISTRY) == found


def target(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        found = parse_target(data)
        assert found.path.startswith("/")
        again = parse_target(found.origin.encode("latin-1"))
        assert (again.path, again.query) == (found.path, found.query)


def told(data: bytes) -> None:
    for known in (FromWorker, FromParent):
        with contextlib.suppress(ValueError):
            message = decode(data, known)
            assert decode(encode(message), known) == message


def span(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(LookupError):
        ranges = Ranges.parse(text)
        assert ranges is None or all(0 <= start < stop <= len(data) * 3 for start, stop in ranges.of(len(data) * 3))
    matches([text], '"x"')


def fields(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert accepted_types(text.split("\n")) == accepted_types(list(reversed(text.split("\n"))))
    query_values(text)


def manifest(data: bytes) -> None:
    kind, _, body = data.partition(b"\n")
    with contextlib.suppress(ValueError):
        Document.read(body).type_as(kind.decode("latin-1"))
    with contextlib.suppress(ValueError):
        assert all(descriptor.size >= 0 for _, descriptor in listed(body, kind.decode("latin-1")))
    with contextlib.suppress(ValueError):
        Digest.parse(data.decode("latin-1"))


def entry(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_entry("0" * 64, data)


def setting(data: bytes) -> None:
    chosen = SETTINGS[data[0] % len(SETTINGS)] if data else SETTINGS[0]
    refusal = ""
    try:
        chosen.read(data[1:].decode("utf-8", "surrogateescape"), chosen.variable)
    except ConfigError as problem:
        refusal = str(problem)
    assert len(refusal.splitlines()) <= 1, refusal


def key(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        asker = Asker(target=text, host=text)
        CacheKey.parse(text).expand(parse_route("/v2/team/app/manifests/latest", REGISTRY), asker)


def entry_key(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(ValueError):
        assert str(EntryKey.parse(text)) == text


def upstream(data: bytes) -> None:
    text = data.decode("latin-1")
    next_target(text)
    said_by_bucket(data)
    wait = asked_wait(text, text)
    assert wait is None or 0 <= wait <= LONGEST_ASKED
    part = told_part(text, 64, 4096)
    assert part is None or 64 < part[0] <= min(4096, part[1])
    Refusal.read(403, data, challenged=False)


PARSERS: Final[tuple[Callable[[bytes], None], ...]] = (
    route,
    span,
    fields,
    manifest,
    entry,
    setting,
    key,
    entry_key,
    upstream,
    target,
    told,
)


def parse(data: bytes) -> None:
    """
    The first byte chooses the parser of the rest.
    """
    if data:
        PARSERS[data[0] % len(PARSERS)](data[1:])
