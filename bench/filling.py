"""
Create cache directories of any size without an upstream, and remove content from them again.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from bench.ground import Ground, say
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.scrub import scrub
from ecrproxy.cache.store import Store
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, Descriptor, Digest, parse_route

AGE = 30 * 24 * 3600
"""How long ago the made entries were used last, in seconds: they go first."""


def make_cache(root: Path, count: int, each: int) -> None:
    """
    Fill a cache directory with so many entries, each leading to sparse content of so many bytes.
    """
    store = Store(root, time.time)
    store.prepare()
    before, registry = time.time() - AGE, RegistryId.of_host("filler.test")
    entries = []
    for number in range(count):
        digest = Digest("sha256", hashlib.sha256(f"{number}".encode()).hexdigest())
        route = parse_route(f"/v2/filler/app{number % 100}/blobs/{digest}", registry)
        known = Confirmed(Descriptor(BLOB_TYPE, digest, each), before)
        entries.append((EntryKey.of(route), Entry({frozenset(): known})))
        path = root / store.content_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(each)
        os.utime(path, (before, before))
        if number % 20000 == 19999 or number + 1 == count:
            store.save(*entries)
            entries.clear()
            say(f"made {number + 1} of {count} entries")
    for _ in scrub(store, lambda: None):
        pass
    store.index.close()


def bytes_in(root: Path) -> int:
    """
    Return how many bytes the cache counts for its files.
    """
    content = sum(
        on_disk(os.lstat(os.path.join(folder, name)).st_size)  # noqa: PTH118 (a Path each would take its time)
        for folder, _, names in os.walk(root / "content")
        for name in names
    )
    return content + sum(path.stat().st_blocks * 512 for path in root.glob("index-*"))


def layers(ground: Ground) -> list[str]:
    """
    Return the layers.
    """
    return list(ground.shelf.blobs())[1:]


def forget_layers(ground: Ground, cache: Path) -> None:
    """
    Remove from a cache what was pulled into it.
    """
    for digest in (*layers(ground), ground.shelf.large):
        name = digest.partition(":")[2]
        (cache / "content" / "sha256" / name[:2] / name).unlink(missing_ok=True)


def forget_manifest(ground: Ground, cache: Path) -> None:
    """
    Remove the manifest from a cache.
    """
    name = ground.shelf.manifest.partition(":")[2]
    (cache / "content" / "sha256" / name[:2] / name).unlink(missing_ok=True)
