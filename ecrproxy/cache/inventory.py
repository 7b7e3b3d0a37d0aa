"""
What is in the cache directory, file by file, and what the operator does about it.

Rules:

- Nothing here is a use: looking at a file changes nothing about when it goes.
- It works on the files alone, while daemons serve from them. What comes or goes meanwhile may be told or not.
- Each step of what yields is short. All of it is called in threads.
- What is removed stays readable for whoever has it open. That a daemon has some of it in memory is seen to
  by L{Store.note_purge}.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.entries import Entry, occupied
from ecrproxy.cache.locks import share
from ecrproxy.cache.store import Store, entry_path, files_in, read_entry, without_waiting
from ecrproxy.oci import MANIFEST_LIMIT, Descriptor, Digest, Kind, listed

STEP: Final = 4 * 2**20
"""Bytes that are hashed in a step."""
_NANOSECONDS: Final = 10**9

Document = dict[str, Any]
"""What is told of one thing, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Removed:
    """
    What has become of files that were to go.

    @ivar files: that went, and how many C{bytes} they had.
    @ivar used: that stayed, because they were used meanwhile.
    @ivar stuck: that stayed, because the disk did not let them go.
    """

    files: int = 0
    bytes: int = 0
    used: int = 0
    stuck: int = 0


class Inventory:
    """
    The files of a cache directory.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(self) -> Iterator[Document]:
        """
        Yield what is known of repositories, entry by entry; a manifest with the digests that it lists.
        """
        for folder in self._store.folders("entries"):
            for name, used, size in sorted(files_in(folder)):
                entry = self._entry(f"{folder}/{name}")
                if entry is not None:
                    yield {
                        "name": name,
                        "kind": entry.kind.value,
                        "repository": entry.repository,
                        "reference": entry.reference,
                        "bytes": occupied(size),
                        "used": used / _NANOSECONDS,
                        "answers": [self._told(entry.kind, each.descriptor) for each in entry.answers.values()],
                    }

    def content(self) -> Iterator[Document]:
        """
        Yield the files of content, in the order of their digests.
        """
        for folder in self._store.folders("content"):
            algorithm = os.path.basename(os.path.dirname(folder))  # noqa: PTH119, PTH120 (text, not a file)
            for name, used, size in sorted(files_in(folder)):
                try:
                    digest = Digest.parse(f"{algorithm}:{name}")
                except ValueError:  # somebody else's
                    continue
                yield {"digest": str(digest), "bytes": size, "used": used / _NANOSECONDS}

    def _entry(self, path: str) -> Entry | None:
        try:
            with open(path, "rb", opener=without_waiting) as file:
                return read_entry(file)[0]
        except (OSError, ValueError):
            return None

    def _told(self, kind: Kind, descriptor: Descriptor) -> Document:
        told: Document = {"digest": str(descriptor.digest), "mediaType": descriptor.media_type}
        if kind is Kind.MANIFEST:
            told["lists"] = sorted({str(each.digest) for _, each in self._listed(descriptor)})
        return told

    def _listed(self, descriptor: Descriptor) -> Iterable[tuple[Kind, Descriptor]]:
        if descriptor.size > MANIFEST_LIMIT:
            return []
        path = self._store.root / self._store.content_path(descriptor.digest)
        try:
            with open(path, "rb", opener=without_waiting) as file:
                return list(listed(file.read(MANIFEST_LIMIT), descriptor.media_type))
        except (OSError, ValueError):  # it went, or is a signed one of old
            return []

    def remove(self, entries: Iterable[str], content: Iterable[Digest], unused_since: float | None = None) -> Removed:
        """
        Remove entries by their names, and content.

        @param unused_since: what was used after this time stays; none for all to go.
        @raise OSError: if the disk can't be written.
        """
        paths = [entry_path(name) for name in entries] + [self._store.content_path(digest) for digest in content]
        fates = [(path, *self._fate(path, unused_since)) for path in paths]
        gone = [size for path, size, goes in fates if goes and self._store.remove(path)]
        self._store.note_purge()
        there = [each for each in fates if each[1] is not None]
        used = sum(not goes for _, _, goes in there)
        return Removed(len(gone), sum(size or 0 for size in gone), used, len(there) - used - len(gone))

    def _fate(self, path: str, unused_since: float | None) -> tuple[int | None, bool]:
        """
        Tell the bytes of a file, if it is there, and whether it goes.
        """
        try:
            status = os.lstat(self._store.root / path)
        except OSError:
            return None, False
        size = occupied(status.st_size) if path.startswith("entries/") else status.st_size
        return size, unused_since is None or status.st_mtime_ns <= unused_since * _NANOSECONDS

    def verify(self, digest: Digest, *, keep: bool) -> Iterator[Document]:
        """
        Hold a file of content against its digest.

        Yields the bytes that were hashed, step by step, then the verdict: C{good}, C{bad}, C{unreadable}, or C{gone}
        if there is none.

        @param keep: whether a bad one stays; it is not served by this process.
        """
        path = self._store.root / self._store.content_path(digest)
        try:
            fd = without_waiting(str(path), os.O_RDONLY)
            with contextlib.suppress(OSError):  # where there are no locks
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
            while stat.S_ISREG(before.st_mode) and (data := os.pread(fd, 2**20, offset)):
                state.update(data)
                offset += len(data)
                if offset % STEP == 0:
                    yield {"hashed": STEP}
        except OSError as problem:
            verdict, why = "unreadable", problem
        after = os.fstat(fd)
        if verdict == "good" and state.hexdigest() != digest.hex:
            verdict = "bad"
        if offset % STEP:
            yield {"hashed": offset % STEP}
        if verdict == "good":
            if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
                self._store.proofs.note(digest, after, good=True)
        elif keep:
            self._store.proofs.note(digest, after, good=False)
        else:
            self._store.drop(digest, after, why)
        yield {"digest": str(digest), "verdict": verdict, **({} if verdict == "good" else {"bytes": after.st_size})}
