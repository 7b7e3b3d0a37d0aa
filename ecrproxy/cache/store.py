"""
The cache directory: verified content by digest, arriving files, and an index of both.

Rules:

- The content is the truth. The L{Index} is knowledge about it, and may be lost.
- Only C{writer.Writer.commit} puts a file into C{content/}, after hashing every byte of it.
- A process holds a shared lock on each file that it has open. Eviction needs the exclusive lock, and does not wait.
- Files in C{content/} are never modified in place: they are replaced by rename, or unlinked.
  Readers that have a file open keep reading the old bytes.
- Nothing here waits for anything but the disk. All of it is called in threads, several at a time.
- A file that can't be read, doesn't parse or has the wrong size counts as absent: a miss, never a failure.
- A name that the store can't have made is neither counted nor removed.
- Deleted directories are made again. L{Troubles} reports each failure once.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from twisted.logger import Logger

from ecrproxy.cache import locks
from ecrproxy.cache.arriving import Arriving, Met, sweep_ingest
from ecrproxy.cache.cells import File, on_disk
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import Content, DigestMismatchError, OpenFile
from ecrproxy.cache.database import FULL
from ecrproxy.cache.directory import Directory, without_waiting
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.intents import Intents
from ecrproxy.cache.kept_open import KeptOpen
from ecrproxy.cache.ownership import give
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.proofs import Proofs, is_marked, mark
from ecrproxy.cache.record import RECORD, Reservation
from ecrproxy.cache.takeover import forget_left, take_over_one
from ecrproxy.cache.troubles import TroubleKind, Troubles, is_exhaustion
from ecrproxy.cache.volume import Volume
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import HEX_LENGTHS, Digest

log = Logger()

T = TypeVar("T")

_PROBE: Final = b"ok" + bytes(2**16)
"""Data written by a check: more than a disk that reports itself full still accepts."""
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
_TOGETHER: Final = "move the whole directory there, and have PROXY_CACHE_DIR name that"
_TRIES: Final = 4
NO_INODES: Final = "No inodes left on device"
_MARGIN: Final = 64 * 2**20
"""Bytes of disk left free for entries and other files. On a small disk a hundredth of it, if less."""


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
    @ivar arriving: the arriving files.
    @ivar evict: evicts a number of bytes when the disk is full; returns False if it can't.
    @ivar kept: files that stay open for a moment; None if nobody keeps any.
    @ivar see_room: raises C{OSError} if other files have taken the disk's space.
    """

    evict: Callable[[int], bool] = staticmethod(lambda _: False)
    kept: KeptOpen | None = None
    see_room: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, root: Path, now: Callable[[], float], index: Index | None = None) -> None:
        self.root, self.now = root, now
        self.index = Index(root, now, before_opening=self._see_volume) if index is None else index
        self.proofs, self.troubles = Proofs(), Troubles(now)
        self.directory = Directory(root, now, self.index, self.proofs, self.troubles)
        self.arriving, self.intents = Arriving(self.directory), Intents(root)
        self._opened: WeakValueDictionary[Digest, OpenFile] = WeakValueDictionary()
        self._volume: Volume | None = None

    def prepare(self) -> None:
        """
        Create the directories and check that files can be created in them.

        @raise OSError: if not.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            self._volume = Volume(self.root)
            self.make()
        self.index.open()
        self.check()

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

    def make(self) -> None:
        """
        Create missing directories.
        """
        for name in ("content", "arriving"):
            path = self.root / name
            if not path.is_dir():
                if path.is_symlink():
                    raise OSError(errno.ENOTDIR, f"{name}/ is a link that leads to no directory")
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                give(path, self.root)

    def _anew(self, make: Callable[[], T], size: int) -> T:
        """
        Create a file of C{size} bytes. Retry if its directory is gone, or if a full disk has something to evict.
        """
        for _ in range(_TRIES):
            try:
                self._see_volume()
                return make()
            except FileNotFoundError:
                log.warn("{root} is not what it was: its directories are created again", root=str(self.root))
                self.make()
            except OSError as problem:
                if problem.errno not in FULL or not self.evict(size):
                    raise self._explained(problem) from None
        try:
            return make()
        except OSError as problem:
            raise self._explained(problem) from None

    def _see_volume(self) -> None:
        """
        Raise C{OSError} if the directory's file system is no longer mounted: the one underneath must not be filled.
        """
        if self._volume is not None and self._volume.is_gone():
            raise OSError(errno.ENODEV, f"its file system is not mounted on {self._volume.mount} any more")

    def _explained(self, problem: OSError) -> OSError:
        """
        Return a clearer error if a full disk lacks inodes: the kernel has one error for both.
        """
        return OSError(errno.ENOSPC, NO_INODES) if problem.errno == errno.ENOSPC and self.lacks_inodes() else problem

    def check(self) -> None:
        """
        Check that a file can be written and read, and that there is room for more.

        @raise OSError: if not.
        """
        self._see_one_file_system()
        try:
            self.see_room()
        except OSError as problem:  # not as a write error, which successful small writes would end
            self.troubles.failed(TroubleKind.ROOM, problem)
            raise
        probe = self.arriving.folder / f"probe.{secrets.token_hex(4)}"
        try:
            with self.troubles.noted(TroubleKind.WRITE):
                self._anew(lambda: probe.write_bytes(_PROBE), len(_PROBE))
            with self.troubles.noted(TroubleKind.READ):
                probe.read_bytes()
            self._see_owner()
            self.troubles.succeeded(TroubleKind.ROOM)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def _see_one_file_system(self) -> None:
        """
        Check that arriving files can be renamed into content.

        @raise OSError: if not: one of the folders is a mount point, or a link to another file system.
        """
        content, nothing = self.root / "content", "no-file"
        for folder in (content, *(content / each for each in HEX_LENGTHS)):
            try:
                other = folder.stat().st_dev != self.arriving.folder.stat().st_dev
                os.rename(self.arriving.folder / nothing, folder / nothing)  # noqa: PTH104 (the mount is looked at first)
            except OSError as problem:
                other = problem.errno == errno.EXDEV
            if other:
                name = folder.relative_to(self.root)
                apart = OSError(errno.EXDEV, f"{name}/ is on another file system than arriving/; {_TOGETHER}")
                self.troubles.failed(TroubleKind.WRITE, apart)
                raise apart

    def _see_owner(self) -> None:
        """
        Find out which user the file system reports as owner of our files: NFS and FUSE may map all of them to one.
        """
        with contextlib.suppress(OSError), TemporaryFile(prefix="probe.", dir=self.arriving.folder) as file:
            self.directory.owners.add(os.fstat(file.fileno()).st_uid)

    @property
    def counted(self) -> bool:
        """
        Return True if all files have been compared with the index, by any process.
        """
        return self.index.totals.compared > 0

    def holds(self, held: int) -> int | None:
        """
        Return how many bytes of the cache the disk can hold, less the spare space. None if unknown.

        @param held: bytes that the cache takes already. Until the files have been counted, the disk's size is used.
        """
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return None
        size = disk.f_blocks * disk.f_frsize
        return (held + disk.f_bavail * disk.f_frsize if self.counted else size) - _spare(disk) if size else None

    def spare(self) -> int:
        """
        Return the bytes of disk to leave free for other files; 0 if the disk's size is unknown.
        """
        try:
            return _spare(os.statvfs(self.root))
        except OSError:
            return 0

    def lacks_inodes(self) -> bool:
        """
        Return True if the disk has bytes left, but no inode for another file.
        """
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return False
        # If inodes are allocated from free space, as on XFS, a disk without free bytes has no free inodes either.
        return bool(disk.f_files) and disk.f_favail == 0 and disk.f_bavail * disk.f_frsize >= 2**20

    def reasons(self) -> list[str]:
        """
        Check the directory, and return the reasons why it can't be used.
        """
        with contextlib.suppress(OSError):
            self.check()
        return self.troubles.reasons()

    def has_locks(self) -> bool:
        """
        Return True if files of the directory can be locked against other processes.

        @raise OSError: if no file can be created there.
        """
        return locks.exclude(self.arriving.folder)

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

    def has(self, digest: Digest) -> bool:
        """
        Return True if there is a file for C{digest}. Does not open it, and does not count as a use.
        """
        try:
            status = os.lstat(self.root / self.content_path(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and self.directory.is_own(status)

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

    def found(self, digest: Digest) -> File | None:
        """
        Look at a file of content that is not in the index.
        """
        return self.directory.found(digest)

    def claim(self, digest: Digest) -> Claim | PeerTransfer | Met:
        """
        Claim a digest in order to fetch it, or return what exists instead: see L{Arriving.claim}.

        @raise OSError: if the disk fails, or does not support locks.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            return self._anew(lambda: self.arriving.claim(digest), RECORD)

    def writer(self, claim: Claim, digest: Digest, size: int) -> Writer:
        """
        Create an arriving file.

        @param size: in bytes; allocated at once.
        @raise OSError: if the disk is full, or fails. The claim is still held then.
        """
        with self.troubles.noted(TroubleKind.WRITE):
            return self._anew(lambda: self.arriving.begin(claim, digest, size), size)

    def content_path(self, digest: Digest) -> str:
        """
        Return the path of C{digest}'s content, relative to the cache directory.
        """
        return content_path(digest)

    def open(self, digest: Digest) -> Content | None:
        """
        Open content and record its use. Use L{Content.proved} to learn whether it is still verified.
        """
        path = self.content_path(digest)
        try:
            found = self._opened_file(digest, f"{self.root}/{path}")
        except OSError as problem:
            if is_exhaustion(problem):
                self.troubles.failed(TroubleKind.OPEN, problem)
            else:  # the file exists, and counts
                log.warn("Can't read {path} from the cache: {why}", path=path, why=problem.strerror or problem)
                self.troubles.failed(TroubleKind.READ, problem)
            return None
        if found is None:
            self.index.uses.gone(digest)
            return None
        self.troubles.succeeded(TroubleKind.READ)
        file, status = found
        verdict = self.proofs.verdict(digest, status)
        if verdict is not False and not (stat.S_ISREG(status.st_mode) and self.directory.is_own(status)):
            why = "it is another user's" if stat.S_ISREG(status.st_mode) else "it is no file"
            self.drop(digest, status, DigestMismatchError(why))
            verdict = False
        if verdict is False:
            file.let_go()
            return None
        if verdict or is_marked(status):  # otherwise the mark would hide a modification
            self.mark(file.fd)
        self.index.uses.use(digest)
        return Content(self, digest, file, status)

    def _opened_file(self, digest: Digest, path: str) -> tuple[OpenFile, os.stat_result] | None:
        """
        Open a file under a shared lock, or share the one that is already open. None if there is none.

        All clients of a large file share one descriptor.

        @raise OSError: if it can't be opened.
        """
        file = self._opened.get(digest)
        if file is not None and file.share():
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if file.is_same(status):
                    return file, status
            file.let_go()
        try:
            fd = without_waiting(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        locks.without_side_effects(fd)
        there = True  # also without locks: an open file stays readable after it is unlinked
        try:
            with contextlib.suppress(OSError):
                there = locks.share(fd, path)  # False if it is being evicted, or was just replaced
            status = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        if not there:
            os.close(fd)
            return None
        file = self._opened[digest] = OpenFile(fd, status)
        return file, status

    def is_proved(self, digest: Digest, status: os.stat_result) -> bool:
        """
        Return True if the file with this status has been verified since it was last modified.
        """
        return self.proofs.verdict(digest, status) is True

    def prove(self, digest: Digest, status: os.stat_result, fd: int) -> None:
        """
        Record that a file was verified.
        """
        self.proofs.note(digest, status, good=True)
        self.mark(fd)
        self.index.uses.verified(digest)

    def drop(self, digest: Digest, status: os.stat_result, why: Exception) -> None:
        """
        Remove a bad file of content, unless another has already replaced it.
        """
        path = self.content_path(digest)
        self.proofs.note(digest, status, good=False)
        if isinstance(why, OSError):
            self.troubles.failed(TroubleKind.READ, why)
        with contextlib.suppress(OSError):
            if os.lstat(self.root / path).st_ino != status.st_ino:
                self.proofs.forget(digest)
                return
        log.warn("{path} in the cache is dropped: {why}", path=path, why=why)
        if self._removed(digest, partial(self._unlink_bad, digest, status.st_ino)):
            self.index.drop([digest])
            self.proofs.forget(digest)

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

    def evict_unused(self, files: Iterable[Digest | Reservation]) -> list[Digest | Reservation]:
        """
        Unlink files of content, and interrupted transfers, unless some process has them open.

        @return: those that are gone.
        """
        gone = [each for each in files if self._removed(each, partial(self._unlink_unused, each))]
        if gone:
            content = [each for each in gone if isinstance(each, Digest)]
            self.index.drop(content, [each for each in gone if isinstance(each, Reservation)])
        return gone

    def unlink(self, digest: Digest) -> bool:
        """
        Unlink a file of content, but keep it in the index. Readers that have it open keep reading it.

        @return: True if it is gone.
        """
        return self._removed(digest, (self.root / self.content_path(digest)).unlink)

    def _removed(self, what: Digest | Reservation, unlink: Callable[[], bool | None]) -> bool:
        """
        Call C{unlink} to remove a file. Return True if the file is gone.

        @param unlink: returns False if the file must stay.
        """
        if self.kept is not None and isinstance(what, Digest):
            self.kept.drop(what)
        try:
            self._see_volume()
            return unlink() is not False
        except FileNotFoundError:
            return True
        except OSError as problem:  # it still counts
            path = self.content_path(what) if isinstance(what, Digest) else f"arriving/{what.name}"
            log.warn("Can't remove {path} from the cache: {why}", path=path, why=problem.strerror or problem)
            return False

    def _unlink_unused(self, what: Digest | Reservation) -> bool:
        if isinstance(what, Reservation):
            return self.arriving.remove(what.name)
        return locks.remove_unused(self.root / self.content_path(what))

    def _unlink_bad(self, digest: Digest, inode: int) -> bool:
        """
        Unlink a file of content, if it still has this inode.

        The claim is held, so that nobody replaces the bad file by a good one between the check and the unlink.
        """
        path = self.root / self.content_path(digest)
        claim = self.arriving.hold(digest)
        if claim is None:
            return False
        try:
            if inode != os.lstat(path).st_ino:
                return False
            path.unlink()
            return True
        finally:
            self.arriving.let_go(claim)

    def mark(self, fd: int) -> None:
        """
        Record in a file's mtime that it is used, if possible.
        """
        with contextlib.suppress(OSError):  # a read-only disk still serves its content
            mark(fd, self.now())


def _spare(disk: os.statvfs_result) -> int:
    return min(_MARGIN, disk.f_blocks * disk.f_frsize // 100)
