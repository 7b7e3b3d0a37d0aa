"""
Import what earlier versions left in a cache directory: entries, each in a small JSON file, and a file C{purged}.

The name of an entry's file is a hash of the cache key and the requested object. So entries with the default key, and
facts, are recognized by their names. All others may be for any client's key: they are dropped, and ECR is asked again.

Importing all entries takes a while and runs in the background; requested entries are imported at once.
A file is removed once its entry is in an index that lasts: until then it may be needed again.
An entry whose file has gone before it is written is not written: another process has imported it, and it may have been
purged or denied since.
An earlier version may run again, or beside this one: newer answers of it about a tag are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from ecrproxy.cache.directory import without_waiting
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.documents import SIZE_LIMIT
from ecrproxy.identity import RegistryId
from ecrproxy.oci import MANIFEST_TYPES, Descriptor, Digest, Kind

log = Logger()

TOGETHER: Final = 100
"""Files read in one step."""
LIMIT: Final = 64 * 2**10
"""Maximum size in bytes of an entry's file."""


def take_over(root: Path, index: Index) -> Iterator[int]:
    """
    Import the entries of earlier versions, in short steps, and remove their files. Called in a thread.

    Yields the number of entries imported by each step.

    @param root: the cache directory.
    """
    folder = root / "entries"
    if not folder.is_dir():
        return
    index.open()
    opened, imported, dropped = index.database.opened, 0, 0
    for batch in _batches(folder):
        some = [each for each in batch if each.is_file()]  # another process may have been faster
        count = _import(index, some)
        if count is None:
            return
        imported, dropped = imported + count, dropped + len(some) - count
        yield count
    if not index.database.lasts or index.database.opened != opened:
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
    Import the entry that earlier versions had for C{key}, as L{take_over} does, before all others. Called in a thread.
    """
    folder = f"{root}/entries"
    if os.path.isdir(folder):  # noqa: PTH112 (a Path takes its time, and this is done for each question)
        there = [path for path in _files_of(folder, key) if path.is_file()]
        if there:
            _import(index, there)


def forget_left(root: Path, keys: Iterable[EntryKey]) -> None:
    """
    Remove files of earlier versions for C{keys} that could not be imported. Called in a thread.
    """
    folder = f"{root}/entries"
    if os.path.isdir(folder):  # noqa: PTH112 (as above)
        _remove(itertools.chain.from_iterable(_files_of(folder, key) for key in keys))


def left(root: Path, index: Index) -> Iterator[tuple[EntryKey, Entry]]:
    """
    Yield entries that could not be imported: the index can't be written. Called in a thread.
    """
    for batch in _batches(root / "entries"):
        yield from (found for found in map(_read, batch) if found is not None and index.entry(found[0]) is None)


def _files_of(folder: str, key: EntryKey) -> list[Path]:
    names = [old_name("\0fact", key)]
    if not key.variant:
        names.append(old_name(f"/v2/{key.repository}/{key.kind.value}/{key.reference}", key))
    return [Path(folder, name[:2], name) for name in names]


def _import(index: Index, paths: Sequence[Path]) -> int | None:
    """
    Import files and remove them. They stay until their entries are written to an index that lasts.

    @return: the number of entries; None if they can't be written.
    """
    index.open()
    opened, entries, files = (
        index.database.opened,
        list[tuple[EntryKey, Entry]](),
        defaultdict[EntryKey, list[Path]](list),
    )
    for path in paths:
        if (found := _read(path)) is not None:
            entries.append(found)
            files[found[0]].append(path)
    news = [(key, _news(key, entry, index.entry(key))) for key, entry in entries]
    # Who purges or denies removes the file first, then the rows: so the file must be looked for within the transaction.
    saved = index.save(
        [(key, entry) for key, entry in news if entry.answers],
        lambda key: any(map(os.path.exists, files[key])),
    )
    try:
        index.changes.wait()
    except OSError:  # another process is writing, or the disk is full
        return None
    if not saved:
        return None
    if index.database.lasts and index.database.opened == opened:
        _remove(paths)
    return len(entries)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _news(key: EntryKey, entry: Entry, known: Entry | None) -> Entry:
    """
    Select the answers of an imported entry to store: those about a tag that are newer than all known ones.
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
    Parse an entry's file of earlier versions.

    @return: None if its cache key is unknown.
    @raise ValueError: if it is not an entry.
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
    Return the name of an entry's file in earlier versions.
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
    # Earlier versions did not store the manifest through which a fact is known: any digest marks it as a fact.
    return Confirmed(descriptor, when, descriptor.digest if fact else None)
