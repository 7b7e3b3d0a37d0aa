"""
What earlier versions have left in a cache directory: entries, each in a small JSON file, and a file C{purged}.

What an entry's file was called is a hash over the cache key and over what was asked for. So those of the default key
and the facts are known by their names. Others can be of any client's key: they are dropped, and asked of ECR again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.store import Store, without_waiting
from ecrproxy.identity import RegistryId
from ecrproxy.oci import MANIFEST_TYPES, SIZE_LIMIT, Descriptor, Digest, Kind

log = Logger()

TOGETHER: Final = 100
"""Files that are read in one step."""
LIMIT: Final = 64 * 2**10
"""The most bytes that an entry's file may have."""


def take_over(store: Store) -> Iterator[None]:
    """
    Import the entries of earlier versions, in short steps, and remove their files. Called in a thread.
    """
    folder = store.root / "entries"
    if not folder.is_dir():
        return
    imported = dropped = 0
    for some in _batches(folder):
        entries = [found for found in map(_read, some) if found is not None]
        store.index.save([(key, entry) for key, entry in entries if store.index.entry(key) is None])
        imported, dropped = imported + len(entries), dropped + len(some) - len(entries)
        for path in some:
            with contextlib.suppress(OSError):
                path.unlink()
        yield
    for path in (*folder.glob("*"), folder):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        (store.root / "purged").unlink()
    log.info(
        "The cache directory of an earlier version was taken over: {imported} entries imported, {dropped} dropped",
        imported=imported,
        dropped=dropped,
    )


def _batches(folder: Path) -> Iterator[list[Path]]:
    with contextlib.suppress(OSError):
        for each in sorted(folder.iterdir()):
            names = sorted(each.iterdir()) if each.is_dir() else []
            yield from (names[at : at + TOGETHER] for at in range(0, len(names), TOGETHER))


def _read(path: Path) -> tuple[EntryKey, Entry] | None:
    try:
        with open(path, "rb", opener=without_waiting) as file:
            data = file.read(LIMIT + 1)
        return read_entry(path.name, data) if len(data) <= LIMIT else None
    except (OSError, ValueError):
        return None


def read_entry(name: str, data: bytes) -> tuple[EntryKey, Entry] | None:
    """
    Read an entry's file of earlier versions.

    @return: none if it is of a cache key that isn't known.
    @raise ValueError: if it is no entry.
    """
    try:
        document = json.loads(data)
        kind, repository, reference = Kind(document["kind"]), document["repository"], document["reference"]
        key = EntryKey(RegistryId(document["registry"]), kind, repository, reference)
        fact = name == old_name("\0fact", key)
        answers = {_accept(item): _confirmed(key, item, fact=fact) for item in document["answers"]}
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        raise ValueError(f"no entry: {problem!r}") from None
    known = fact or name == old_name(f"/v2/{repository}/{kind.value}/{reference}", key)
    return (key, Entry(answers)) if known and answers else None


def old_name(cache_key: str, key: EntryKey) -> str:
    """
    Name the file that an earlier version kept an entry in.
    """
    parts = (cache_key, str(key.registry), key.kind.value, key.repository, key.reference)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _accept(item: Mapping[str, Any]) -> frozenset[str]:
    accept = MANIFEST_TYPES.intersection(item["accept"])
    if len(accept) != len(item["accept"]):
        raise ValueError("an answer to types that no manifest has")
    return accept


def _confirmed(key: EntryKey, item: Mapping[str, Any], *, fact: bool) -> Confirmed:
    size, when = item["size"], float(item["confirmed"])
    if type(size) is not int or not 0 <= size <= SIZE_LIMIT or not math.isfinite(when) or not 0 <= when < 2**40:
        raise ValueError("no size, or no time")
    descriptor = Descriptor(str(item["mediaType"]), Digest.parse(item["digest"]), size)
    if key.kind is Kind.MANIFEST and descriptor.media_type not in MANIFEST_TYPES:
        raise ValueError("no manifest's media type")
    if not key.is_tag and key.reference != str(descriptor.digest):
        raise ValueError("what is named by a digest led to another")
    # Through which manifest a fact is known was not kept: any digest says that it is one.
    return Confirmed(descriptor, when, descriptor.digest if fact else None)
