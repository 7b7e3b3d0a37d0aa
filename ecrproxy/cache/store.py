"""
The cache directory: verified content by digest, arriving files, and an index of both.

Rules:

- The content is the truth. The L{Index} is knowledge about it, and may be lost.
- Only C{writer.Writer.commit} puts a file into C{content/}, after hashing every byte of it.
- Nothing here waits for anything but the disk. All of it is called in threads, several at a time.
- A name that the store can't have made is neither counted nor removed.
- L{Troubles} reports each failure once.
"""

from __future__ import annotations

import errno
import heapq
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from twisted.logger import Logger

from ecrproxy.cache.arriving import Arriving, Met, sweep_ingest
from ecrproxy.cache.cells import File, on_disk
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import Content
from ecrproxy.cache.content_files import ContentFiles
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.folders import Folders
from ecrproxy.cache.index import Index
from ecrproxy.cache.intents import Intents
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.proofs import Proofs
from ecrproxy.cache.record import RECORD, Reservation
from ecrproxy.cache.self_check import SelfCheck
from ecrproxy.cache.space import DiskSpace
from ecrproxy.cache.takeover import forget_left, take_over_one
from ecrproxy.cache.troubles import TroubleKind, Troubles, is_exhaustion
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest

log = Logger()

_UNUSABLE: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EXDEV,
    }
)
"""Errors of a path that is not a directory, can't be created or belongs to others. All others may be temporary."""


class Candidate(NamedTuple):
    """
    A file that may be evicted.

    @ivar what: the digest of content, or the reservation of an interrupted transfer.
    @ivar size: the bytes of disk that it takes.
    @ivar used: its last use, or when it was last written.
    """

    what: Digest | Reservation
    size: int
    used: float


class Store:
    """
    The cache directory.

    @param root: its path; created if it is missing.
    @param now: returns seconds since the epoch.
    @param index: the index of the directory; by default one of its own.
    @ivar folders: its folders, in which files are created.
    @ivar files: the files of content.
    @ivar arriving: the arriving files.
    @ivar intents: which digests processes are about to fetch.
    @ivar space: the space of its disk.
    @ivar checks: checks that it can be used.
    """

    def __init__(self, root: Path, now: Callable[[], float], index: Index | None = None) -> None:
        self.root, self.now, self.space = root, now, DiskSpace(root)
        self.folders = Folders(root, self.space)
        self.index = Index(root, now, before_opening=self.folders.check_mounted) if index is None else index
        self.proofs, self.troubles = Proofs(), Troubles(now)
        self.directory = Directory(root, now, self.index, self.proofs, self.troubles)
        self.arriving, self.intents = Arriving(self.directory), Intents(root)
        self.files = ContentFiles(self.directory, self.folders, self.arriving)
        self.checks = SelfCheck(self.directory, self.folders)

    def prepare(self) -> None:
        """
        Create the directories and check that files can be created in them.

        @raise OSError: if not.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            self.folders.prepare()
        self.index.open()
        self.checks.run()

    def begin(self) -> bool:
        """
        Prepare the directory, even if its disk fails at the moment. Return True if there is any content.

        @raise OSError: if it can't be used as the cache directory.
        """
        try:
            self.prepare()
        except OSError as problem:
            missing = problem.errno == errno.EROFS and not self.root.is_dir()
            if missing or problem.errno in _UNUSABLE:
                raise
        return self.has_content()

    @property
    def counted(self) -> bool:
        """
        Return True if all files have been compared with the index, by any process.
        """
        return self.index.totals.compared > 0

    def has_content(self) -> bool:
        """
        Return True if there is any content.
        """
        try:
            return any(path.is_file() for path in (self.root / "content").glob("*/*/*"))
        except OSError:
            return False

    def sweep(self) -> None:
        """
        Remove files of writers that have exited, except transfers worth resuming.
        """
        removed = sweep_ingest(self.root / "ingest")
        if removed:
            log.info("Removed {count} unfinished transfers of an earlier version from ingest/", count=removed)
        self.arriving.sweep()

    def candidates(self) -> Iterator[Candidate]:
        """
        Yield candidates for eviction, the least recently used first. Some process may have them open.

        @raise OSError: if the index can't be read.
        """
        content = (Candidate(each.digest, on_disk(each.size), each.used) for each in self.index.least_recently_used())
        left = (Candidate(*each) for each in self.index.arriving() if each[2])
        return heapq.merge(content, left, key=lambda each: each.used)

    def has_any(self, algorithm: str) -> bool:
        """
        Return True if the directory or its index may have content whose digests are of C{algorithm}.

        @raise OSError: if the index can't be read.
        """
        return (self.root / "content" / algorithm).exists() or next(self.index.names(algorithm, ""), None) is not None

    def names(self, algorithm: str, prefix: str) -> set[str]:
        """
        List the files of the folder for hashes that begin with C{prefix}. Some may not be ours.

        Files that the disk fails to list are missing.

        @raise OSError: if too many files are open to list the folder.
        """
        try:
            return set(os.listdir(self.root / "content" / algorithm / prefix))  # noqa: PTH208 (a Path each takes its time)
        except OSError as problem:
            if is_exhaustion(problem):
                raise
            return set()

    # Content

    def content_path(self, digest: Digest) -> str:
        """
        Return the path of C{digest}'s content, relative to the cache directory.
        """
        return content_path(digest)

    def open(self, digest: Digest) -> Content | None:
        """
        Open content and record its use. Use L{Content.proved} to learn whether it is still verified.
        """
        return self.files.open(digest)

    def has(self, digest: Digest) -> bool:
        """
        Return True if there is a file for C{digest}. Does not open it, and does not count as a use.
        """
        return self.files.has(digest)

    def found(self, digest: Digest) -> File | None:
        """
        Look at a file of content that is not in the index.
        """
        return self.directory.found(digest)

    def evict_unused(self, files: Iterable[Digest | Reservation]) -> list[Digest | Reservation]:
        """
        Unlink files of content, and interrupted transfers, unless some process has them open.

        @return: those that are gone.
        """
        return self.files.evict_unused(files)

    def unlink(self, digest: Digest) -> bool:
        """
        Unlink a file of content, but keep it in the index. Readers that have it open keep reading it.

        @return: True if it is gone.
        """
        return self.files.unlink(digest)

    # Transfers

    def intend(self, digest: Digest) -> bool:
        """
        Return True, and reserve the digest for this process, if it has no file and no process fetches it or will.
        """
        if not self.intents.take(digest):
            return False
        if self.has(digest) or self.arriving.is_claimed(digest):
            self.intents.release(digest)
            return False
        return True

    def claim(self, digest: Digest) -> Claim | PeerTransfer | Met:
        """
        Claim a digest in order to fetch it, or return what exists instead: see L{Arriving.claim}.

        @raise OSError: if the disk fails, or does not support locks.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            return self.folders.create(lambda: self.arriving.claim(digest), RECORD)

    def writer(self, claim: Claim, digest: Digest, size: int) -> Writer:
        """
        Create an arriving file.

        @param size: in bytes; allocated at once.
        @raise OSError: if the disk is full, or fails. The claim is still held then.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            return self.folders.create(lambda: self.arriving.begin(claim, digest, size), size)

    # Entries

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry.
        """
        take_over_one(self.root, self.index, key)
        return self.index.entry(key)

    def written(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry as last written by any process.

        @raise OSError: if that can't be read: see L{Index.written}.
        """
        take_over_one(self.root, self.index, key)
        return self.index.written(key)

    def deny(self, key: EntryKey, accepts: Collection[frozenset[str]], asked: float) -> None:
        """
        Delete denied answers of an entry, and what earlier versions knew of it.

        They may have been hidden already, but imported again since: the files go first.

        @param asked: see L{Index.forget_answers}.
        """
        forget_left(self.root, [key])
        if accepts:
            self.index.forget_answers(key, accepts, asked)

    def save(self, *entries: tuple[EntryKey, Entry]) -> bool:
        """
        Store entries, all or none. Return True if they are stored, or will be.
        """
        return self.index.save(entries)
