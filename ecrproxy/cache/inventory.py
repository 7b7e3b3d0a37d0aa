"""
List, remove and verify what is in the cache, by its index.

Rules:

- Nothing here counts as a use: looking at a file does not delay its eviction.
- It works while daemons serve from the directory. Files that come or go meanwhile may or may not be listed.
- Each step of a generator is short. All of it is called in threads.
- Files are unlinked first; then one transaction deletes their rows and the entries, and all processes are notified.
  Removed files stay readable for readers that have them open.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ecrproxy.cache.content import DigestMismatchError, hash_range
from ecrproxy.cache.directory import without_waiting
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.locks import share
from ecrproxy.cache.store import Store
from ecrproxy.cache.takeover import forget_left, left, take_over
from ecrproxy.documents import listed
from ecrproxy.oci import MANIFEST_LIMIT, Descriptor, Digest, Kind

STEP: Final = 4 * 2**20
"""Bytes hashed in one step."""

Document = dict[str, Any]
"""The description of one item, as JSON."""


@dataclass(frozen=True, slots=True)
class Removed:
    """
    The result of a removal.

    @ivar entries: number of entries removed.
    @ivar files: number of files of content removed, with C{bytes} bytes in all.
    @ivar used: number of items kept because they were used meanwhile.
    @ivar stuck: number of files kept because the disk failed to remove them.
    """

    entries: int = 0
    files: int = 0
    bytes: int = 0
    used: int = 0
    stuck: int = 0


class Inventory:
    """
    The contents of a cache directory.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(self) -> Iterator[Document]:
        """
        Yield the entries of all repositories; manifests with what they list, tags with their moves.

        Entries of earlier versions are imported first: they are served already, and must be listed to be removed. This
        may take minutes; each step yields the number imported. If the index can't be written, they are listed as well.
        """
        for count in take_over(self._store.root, self._store.index):
            yield {"imported": count}
        unwritten = (
            (key, entry, max(each.when for each in entry.answers.values()))
            for key, entry in left(self._store.root, self._store.index)
        )
        for key, entry, used in itertools.chain(self._store.index.entries(), unwritten):
            yield {
                "name": str(key),
                "kind": key.kind.value,
                "registry": str(key.registry),
                "repository": key.repository,
                "reference": key.reference,
                "used": used,
                "answers": [self._told(key.kind, each.descriptor) for each in entry.answers.values()],
                **self._moves(key),
            }

    def _moves(self, key: EntryKey) -> Document:
        moves = self._store.index.moves(key) if key.is_tag else []
        told = [{"from": str(each.before), "to": str(each.after), "seen": each.seen} for each in moves]
        return {"moves": told} if told else {}

    def content(self) -> Iterator[Document]:
        """
        Yield the files of content, ordered by digest.
        """
        page = self._store.index.files()
        while page:
            for each in page:
                verified = {} if each.verified is None else {"verified": each.verified}
                yield {"digest": str(each.digest), "bytes": each.size, "used": each.used, **verified}
            page = self._store.index.files(page[-1].digest)

    def _told(self, kind: Kind, descriptor: Descriptor) -> Document:
        told: Document = {"digest": str(descriptor.digest), "mediaType": descriptor.media_type}
        if kind is Kind.MANIFEST:
            told["lists"] = sorted({str(each.digest) for _, each in self.lists(descriptor)})
        return told

    def lists(self, descriptor: Descriptor) -> Sequence[tuple[Kind, Descriptor]]:
        """
        Read what a manifest lists; nothing if it is not in the cache, or no manifest.
        """
        if descriptor.size > MANIFEST_LIMIT:
            return []
        path = self._store.root / self._store.content_path(descriptor.digest)
        try:
            with open(path, "rb", opener=without_waiting) as file:
                return list(listed(file.read(MANIFEST_LIMIT), descriptor.media_type))
        except (OSError, ValueError):  # removed meanwhile, or an old signed manifest
            return []

    def remove(
        self, entries: Sequence[EntryKey], content: Iterable[Digest], unused_since: float | None = None
    ) -> Removed:
        """
        Remove entries and content. Files are removed first, even if the index then fails.

        @param unused_since: keep items used after this time; None to remove all.
        @raise OSError: if the index can't be written.
        """
        index = self._store.index
        with contextlib.suppress(OSError):  # the disk is full: the removal makes room
            index.uses.write()
        keys = [key for key in entries if unused_since is None or not self._confirmed_since(key, unused_since)]
        gone, size, used, stuck = list[Digest](), 0, len(entries) - len(keys), 0
        for digest in content:
            found = index.known(digest) or self._store.found(digest)
            if found is not None and unused_since is not None and found.used > unused_since:
                used += 1
            elif not self._store.unlink(digest):
                stuck += 1
            elif found is not None:
                gone.append(digest)
                size += found.size
        forget_left(self._store.root, keys)
        entries_gone = index.purge(keys, gone) if keys or gone else 0
        return Removed(entries_gone, len(gone), size, used, stuck)

    def _confirmed_since(self, key: EntryKey, when: float) -> bool:
        entry = self._store.index.entry(key)
        return entry is not None and any(each.when > when for each in entry.answers.values())

    def verify(self, digest: Digest, *, keep: bool) -> Iterator[Document]:
        """
        Verify a file of content against its digest.

        Yields the number of bytes hashed by each step, then the verdict: C{good}, C{bad}, C{unreadable}, or C{gone} if
        there is no file.

        @param keep: True to keep a bad file; this process does not serve it.
        """
        path = self._store.root / self._store.content_path(digest)
        try:
            fd = without_waiting(str(path), os.O_RDONLY)
            with contextlib.suppress(OSError):  # the file system does not support locks
                share(fd, path)
        except FileNotFoundError:
            yield {"digest": str(digest), "verdict": "gone"}
            return
        except OSError as problem:
            yield {"digest": str(digest), "verdict": "unreadable", "why": problem.strerror}
            return
        try:
            yield from self._verify(fd, digest, keep=keep)
        finally:
            os.close(fd)

    def _verify(self, fd: int, digest: Digest, *, keep: bool) -> Iterator[Document]:
        before, verdict, state, offset = os.fstat(fd), "good", digest.hasher(), 0
        why: Exception = DigestMismatchError("it is not what its name says")
        try:
            while stat.S_ISREG(before.st_mode) and (count := hash_range(fd, state, offset, STEP)):
                offset += count
                yield {"hashed": count}
        except OSError as problem:
            verdict, why = "unreadable", problem
        after = os.fstat(fd)
        if verdict == "good" and state.hexdigest() != digest.hex:
            verdict = "bad"
        if verdict == "good":
            if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
                self._store.proofs.note(digest, after, good=True)
                self._store.index.uses.verified(digest)
        elif keep:
            self._store.proofs.note(digest, after, good=False)
        else:
            self._store.files.drop(digest, after, why)
        yield {"digest": str(digest), "verdict": verdict, **({} if verdict == "good" else {"bytes": after.st_size})}
