"""
What earlier versions have left in a cache directory: entries, each in a small JSON file, and a file C{purged}.

What an entry's file was called is a hash over the cache key and over what was asked for. So those of the default key
and the facts are known by their names. Others can be of any client's key: they are dropped, and asked of ECR again.

To import all of them takes a while, for it is done in the background; what somebody asks for is imported then.
A file goes once what it says is in an index that lasts: until there is one, it may be needed again.
An earlier version may run again, or beside this one: what it has learned of a tag since counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from ecrproxy.cache.directory import without_waiting
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.identity import RegistryId
from ecrproxy.oci import MANIFEST_TYPES, SIZE_LIMIT, Descriptor, Digest, Kind

log = Logger()

TOGETHER: Final = 100
"""Files that are read in one step."""
LIMIT: Final = 64 * 2**10
"""The most bytes that an entry's file may have."""


def take_over(root: Path, index: Index) -> Iterator[int]:
    """
    Import the entries of earlier versions, in short steps, and remove their files. Called in a thread.

    Yields how many each step has imported.

    @param root: the cache directory.
    """
    folder = root / "entries"
    if not folder.is_dir():
        return
    index.open()
    opened, imported, dropped = index.opened, 0, 0
    for batch in _batches(folder):
        some = [each for each in batch if each.is_file()]  # else another has been quicker
        count = _import(index, some)
        if count is None:
            return
        imported, dropped = imported + count, dropped + len(some) - count
        yield count
    if not index.lasts or index.opened != opened:
        return
    for path in (*folder.glob("*"), folder):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        (root / "purged").unlink()
    log.info(
        "The cache directory of an earlier version was taken over: {imported} entries imported, {dropped} dropped",
        imported=imported,
        dropped=dropped,
    )


def take_over_one(root: Path, index: Index, key: EntryKey) -> None:
    """
    Import what earlier versions knew of C{key} as L{take_over} does, ahead of all others. Called in a thread.
    """
    folder = f"{root}/entries"
    if os.path.isdir(folder):  # noqa: PTH112 (a Path takes its time, and this is done for each question)
        there = [path for path in _files_of(folder, key) if path.is_file()]
        if there:
            _import(index, there)


def forget_left(root: Path, keys: Iterable[EntryKey]) -> None:
    """
    Remove what earlier versions knew of C{keys}, where that could not be imported. Called in a thread.
    """
    folder = f"{root}/entries"
    if os.path.isdir(folder):  # noqa: PTH112 (as above)
        _remove(itertools.chain.from_iterable(_files_of(folder, key) for key in keys))


def _files_of(folder: str, key: EntryKey) -> list[Path]:
    names = [old_name("\0fact", key)]
    if not key.variant:
        names.append(old_name(f"/v2/{key.repository}/{key.kind.value}/{key.reference}", key))
    return [Path(folder, name[:2], name) for name in names]


def _import(index: Index, paths: Sequence[Path]) -> int | None:
    """
    Import files and remove them; they stay until what they say is written to an index that lasts.

    @return: how many were entries; none if that can't be written.
    """
    index.open()
    opened, entries = index.opened, [found for found in map(_read, paths) if found is not None]
    news = [(key, _news(key, entry, index.entry(key))) for key, entry in entries]
    saved = index.save([(key, entry) for key, entry in news if entry.answers])
    try:
        index.wait()
    except OSError:  # another process writes, or the disk is full
        return None
    if not saved:
        return None
    if index.lasts and index.opened == opened:
        _remove(paths)
    return len(entries)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _news(key: EntryKey, entry: Entry, known: Entry | None) -> Entry:
    """
    Choose of an imported entry what is to be noted: what ECR said of a tag after the last that is known.
    """
    if known is None:
        return entry
    last = max((each.when for each in known.answers.values()), default=0.0)
    return Entry({accept: each for accept, each in entry.answers.items() if key.is_tag and each.when > last})


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
