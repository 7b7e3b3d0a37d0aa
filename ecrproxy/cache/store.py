"""
The cache directory: verified content by digest, what is still arriving, and an index of both.

Rules:

- The content is the truth. The L{Index} is knowledge about it, and may be lost.
- A file gets into C{content/} by one road alone: C{writer.Writer.commit}, which has hashed every byte of it.
- Whoever has a file open holds a shared lock on it, in whichever process. Eviction needs the exclusive one at once.
- What is in C{content/} is never changed in place: it is replaced by rename, or unlinked.
  Whoever has a file open keeps reading the bytes that were there.
- Nothing here waits for anything but the disk. All of it is called in threads, several at a time.
- What can't be read, doesn't parse or has the wrong size is as good as absent: a miss, never a failure.
- A name that the store cannot have made is neither counted nor removed.
- Directories that somebody removes are made anew. What fails is told once, by L{Troubles}.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
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
from ecrproxy.cache.index import Index, give
from ecrproxy.cache.intents import Intents
from ecrproxy.cache.kept_open import KeptOpen
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.proofs import Proofs, is_marked, mark
from ecrproxy.cache.record import RECORD, Reservation
from ecrproxy.cache.takeover import forget_left, take_over_one
from ecrproxy.cache.troubles import Kind, Troubles, is_exhaustion
from ecrproxy.cache.volume import Volume
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import HEX_LENGTHS, Digest

log = Logger()

T = TypeVar("T")

_PROBE: Final = b"ok" + bytes(2**16)
"""What a check writes: more than a disk that is called full still takes."""
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
"""Errors of a directory that is none, can't be made or belongs to others. All others are a disk's, and may pass."""
_TOGETHER: Final = "move the whole directory there, and have PROXY_CACHE_DIR name that"
_TRIES: Final = 4
NO_INODES: Final = "No inodes left on device"
_MARGIN: Final = 64 * 2**20
"""Bytes of the disk that are left free, or a hundredth of a small one: for entries, and others' files."""


class Candidate(NamedTuple):
    """
    A file that may be evicted.

    @ivar what: the digest of content, or the reservation of what a transfer has left.
    @ivar size: the bytes of disk that it takes.
    @ivar used: its last use, or when it was written last.
    """

    what: Digest | Reservation
    size: int
    used: float


class Store:
    """
    The cache directory.

    @param root: where it is; made if it is missing.
    @param now: seconds since the epoch.
    @param index: what is known about it; its own if none is given.
    @ivar arriving: the files that arrive.
    @ivar evict: takes a number of bytes out of the directory when the disk is full; false if it can't.
    @ivar kept: files that stay open for a moment; none where nobody keeps any.
    @ivar see_room: raises C{OSError} if others have taken the disk's room.
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
        Make the directories and see that files can be made in them.

        @raise OSError: if not.
        """
        with self.troubles.noted(Kind.WRITE):
            self._volume = Volume(self.root)
            self.make()
        self.index.open()
        self.check()

    def begin(self) -> bool:
        """
        Prepare the directory, whatever its disk can do at the moment; tell whether there is any content.

        @raise OSError: if it can't be the cache directory.
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
        Make the directories that are missing.
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
        Make a file of C{size} bytes; again, if its directory was taken away, or the disk is full and something can go.
        """
        for _ in range(_TRIES):
            try:
                self._see_volume()
                return make()
            except FileNotFoundError:
                log.warn("{root} is not what it was: its directories are made anew", root=str(self.root))
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
        Raise C{OSError} if the directory's file system is not mounted any more: the one underneath is not written to.
        """
        if self._volume is not None and self._volume.is_gone():
            raise OSError(errno.ENODEV, f"its file system is not mounted on {self._volume.mount} any more")

    def _explained(self, problem: OSError) -> OSError:
        """
        Say so if it is inodes that a full disk lacks: the kernel has one error for both.
        """
        return OSError(errno.ENOSPC, NO_INODES) if problem.errno == errno.ENOSPC and self.lacks_inodes() else problem

    def check(self) -> None:
        """
        See that a file can be written, and read, and that there is room for more than that.

        @raise OSError: if not.
        """
        self._see_one_file_system()
        try:
            self.see_room()
        except OSError as problem:  # not as of a write: small ones that succeed would end it
            self.troubles.failed(Kind.ROOM, problem)
            raise
        probe = self.arriving.folder / f"probe.{secrets.token_hex(4)}"
        try:
            with self.troubles.noted(Kind.WRITE):
                self._anew(lambda: probe.write_bytes(_PROBE), len(_PROBE))
            with self.troubles.noted(Kind.READ):
                probe.read_bytes()
            self._see_owner()
            self.troubles.succeeded(Kind.ROOM)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def _see_one_file_system(self) -> None:
        """
        See that what has arrived can become content by being renamed.

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
                self.troubles.failed(Kind.WRITE, apart)
                raise apart

    def _see_owner(self) -> None:
        """
        See whose the file system says that our files are: NFS and FUSE may give all of them to one user.
        """
        with contextlib.suppress(OSError), TemporaryFile(prefix="probe.", dir=self.arriving.folder) as file:
            self.directory.owners.add(os.fstat(file.fileno()).st_uid)

    @property
    def counted(self) -> bool:
        """
        Whether all files were compared with the index, by whichever process.
        """
        return self.index.totals.compared > 0

    def holds(self, held: int) -> int | None:
        """
        Tell how many bytes the disk can hold of the cache, with some to spare; none if unknown.

        @param held: what the cache takes already. As long as that is not known, the disk's size is the answer.
        """
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return None
        size = disk.f_blocks * disk.f_frsize
        return (held + disk.f_bavail * disk.f_frsize if self.counted else size) - _spare(disk) if size else None

    def spare(self) -> int:
        """
        Return how many bytes of the disk are left free, for others' files; 0 if its size is unknown.
        """
        try:
            return _spare(os.statvfs(self.root))
        except OSError:
            return 0

    def lacks_inodes(self) -> bool:
        """
        Return True if the disk has bytes left, and no inode for another file.
        """
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return False
        # Where inodes are made of free space, as on XFS, a disk without bytes has none either.
        return bool(disk.f_files) and disk.f_favail == 0 and disk.f_bavail * disk.f_frsize >= 2**20

    def reasons(self) -> list[str]:
        """
        Say what is wrong with the directory.
        """
        with contextlib.suppress(OSError):
            self.check()
        return self.troubles.reasons()

    def has_locks(self) -> bool:
        """
        Tell whether files of the directory can be locked against other processes.

        @raise OSError: if no file can be made there.
        """
        return locks.exclude(self.arriving.folder)

    def has_content(self) -> bool:
        """
        Tell whether there is any content.
        """
        try:
            return any(path.is_file() for path in (self.root / "content").glob("*/*/*"))
        except OSError:
            return False

    def sweep(self) -> None:
        """
        Remove what arrived for writers that have exited, but for what is worth going on with.
        """
        removed = sweep_ingest(self.root / "ingest")
        if removed:
            log.info("Removed {count} unfinished transfers of an earlier version from ingest/", count=removed)
        self.arriving.sweep()

    def candidates(self) -> Iterator[Candidate]:
        """
        Yield what may be evicted, unless some process has it open, the least recently used first.

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
        List the files of the folder for digests whose hashes begin with C{prefix}; some may be somebody else's.

        What the disk can't give is not listed.

        @raise OSError: if a folder could be listed if fewer files were open.
        """
        try:
            return set(os.listdir(self.root / "content" / algorithm / prefix))  # noqa: PTH208 (a Path each takes its time)
        except OSError as problem:
            if is_exhaustion(problem):
                raise
            return set()

    def has(self, digest: Digest) -> bool:
        """
        Tell whether there is a file of this name, without opening it or noting a use.
        """
        try:
            status = os.lstat(self.root / self.content_path(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and self.directory.is_own(status)

    def intend(self, digest: Digest) -> bool:
        """
        Return True if there is no file of this name, and no process brings it or is about to. This one is, then.
        """
        if not self.intents.take(digest):
            return False
        if self.has(digest) or self.arriving.is_claimed(digest):
            self.intents.release(digest)
            return False
        return True

    def found(self, digest: Digest) -> File | None:
        """
        Look at a file of content that nothing is known of.
        """
        return self.directory.found(digest)

    def claim(self, digest: Digest) -> Claim | PeerTransfer | Met:
        """
        Claim a digest, to bring it in; or give what is there instead: see L{Arriving.claim}.

        @raise OSError: if the disk fails, or has no locks.
        """
        with self.troubles.noted(Kind.WRITE):
            return self._anew(lambda: self.arriving.claim(digest), RECORD)

    def writer(self, claim: Claim, digest: Digest, size: int) -> Writer:
        """
        Begin a file that arrives.

        @param size: in bytes; so many are taken of the disk at once.
        @raise OSError: if the disk has no room for them, or fails. The claim is still held then.
        """
        with self.troubles.noted(Kind.WRITE):
            return self._anew(lambda: self.arriving.begin(claim, digest, size), size)

    def content_path(self, digest: Digest) -> str:
        """
        Name the file of C{digest}, relative to the cache directory.
        """
        return content_path(digest)

    def open(self, digest: Digest) -> Content | None:
        """
        Open content and note its use. Whether it is right still, L{Content.proved} tells.
        """
        path = self.content_path(digest)
        try:
            found = self._opened_file(digest, f"{self.root}/{path}")
        except OSError as problem:
            if is_exhaustion(problem):
                self.troubles.failed(Kind.OPEN, problem)
            else:  # it is there, and counts
                log.warn("Can't read {path} from the cache: {why}", path=path, why=problem.strerror or problem)
                self.troubles.failed(Kind.READ, problem)
            return None
        if found is None:
            self.index.gone(digest)
            return None
        self.troubles.succeeded(Kind.READ)
        file, status = found
        verdict = self.proofs.verdict(digest, status)
        if verdict is not False and not (stat.S_ISREG(status.st_mode) and self.directory.is_own(status)):
            why = "it is another user's" if stat.S_ISREG(status.st_mode) else "it is no file"
            self.drop(digest, status, DigestMismatchError(why))
            verdict = False
        if verdict is False:
            file.let_go()
            return None
        if verdict or is_marked(status):  # else the mark would hide that somebody has changed it
            self.mark(file.fd)
        self.index.use(digest)
        return Content(self, digest, file, status)

    def _opened_file(self, digest: Digest, path: str) -> tuple[OpenFile, os.stat_result] | None:
        """
        Open a file under a shared lock, or share the one that is open already; none if there is none.

        Clients of a large file cost one descriptor, not one each.

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
        there = True  # on a file system without locks, too: the kernel keeps the file for who has it open
        try:
            with contextlib.suppress(OSError):
                there = locks.share(fd, path)  # not if it is being evicted, or was just replaced
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
        Return True if the file of this status was verified since it was modified last.
        """
        return self.proofs.verdict(digest, status) is True

    def prove(self, digest: Digest, status: os.stat_result, fd: int) -> None:
        """
        Note that a file was verified.
        """
        self.proofs.note(digest, status, good=True)
        self.mark(fd)
        self.index.verified(digest)

    def drop(self, digest: Digest, status: os.stat_result, why: Exception) -> None:
        """
        Take a bad file of content out of the cache, unless another has taken its place already.
        """
        path = self.content_path(digest)
        self.proofs.note(digest, status, good=False)
        if isinstance(why, OSError):
            self.troubles.failed(Kind.READ, why)
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
        Look up what is known of C{key}.
        """
        take_over_one(self.root, self.index, key)
        return self.index.entry(key)

    def written(self, key: EntryKey) -> Entry | None:
        """
        Look up what is known of C{key}, as the last of all processes has left it.

        @raise OSError: if that can't be told: see L{Index.written}.
        """
        take_over_one(self.root, self.index, key)
        return self.index.written(key)

    def deny(self, key: EntryKey) -> None:
        """
        Have what was hidden of C{key} dropped, and what earlier versions knew of it.
        """
        forget_left(self.root, [key])
        self.index.go_on()

    def save(self, *entries: tuple[EntryKey, Entry]) -> bool:
        """
        Note what is known, all of it or nothing; return whether it is, or is to be.
        """
        return self.index.save(entries)

    def evict_unused(self, files: Iterable[Digest | Reservation]) -> list[Digest | Reservation]:
        """
        Unlink files of content, and what transfers have left, unless some process has them open.

        @return: those that are gone.
        """
        gone = [each for each in files if self._removed(each, partial(self._unlink_unused, each))]
        if gone:
            content = [each for each in gone if isinstance(each, Digest)]
            self.index.drop(content, [each for each in gone if isinstance(each, Reservation)])
        return gone

    def unlink(self, digest: Digest) -> bool:
        """
        Unlink a file of content, and leave it in the index; those who have it open go on reading it.

        @return: whether it is gone.
        """
        return self._removed(digest, (self.root / self.content_path(digest)).unlink)

    def _removed(self, what: Digest | Reservation, unlink: Callable[[], bool | None]) -> bool:
        """
        Return whether a file is gone.

        @param unlink: returns False if it has to stay.
        """
        if self.kept is not None and isinstance(what, Digest):
            self.kept.drop(what)
        try:
            self._see_volume()
            return unlink() is not False
        except FileNotFoundError:
            return True
        except OSError as problem:  # it goes on being counted
            path = self.content_path(what) if isinstance(what, Digest) else f"arriving/{what.name}"
            log.warn("Can't remove {path} from the cache: {why}", path=path, why=problem.strerror or problem)
            return False

    def _unlink_unused(self, what: Digest | Reservation) -> bool:
        if isinstance(what, Reservation):
            return self.arriving.remove(what.name)
        return locks.remove_unused(self.root / self.content_path(what))

    def _unlink_bad(self, digest: Digest, inode: int) -> bool:
        """
        Unlink a file of content, if it is still the one with this inode.

        Under the claim: nobody brings in a good file of this name between the look and the end of the bad one.
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
        Note in a file that it is used, if that can be.
        """
        with contextlib.suppress(OSError):  # a read-only disk still serves what it has
            mark(fd, self.now())


def _spare(disk: os.statvfs_result) -> int:
    return min(_MARGIN, disk.f_blocks * disk.f_frsize // 100)
