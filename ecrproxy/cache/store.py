"""
The cache directory: verified content by digest, entries by cache key, and what is still arriving.

Rules:

- The directory is the whole truth. The L{Ledger} only counts it, and is made anew at each start.
- A file gets into C{content/} by one road alone: C{writer.Writer.commit}, which has hashed every byte of it.
- What is in C{content/} and C{entries/} is never changed in place: it is replaced by rename, or unlinked.
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
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final, TypeVar

from twisted.logger import Logger

from ecrproxy.cache.content import Content, DigestMismatchError, OpenFile, content_path
from ecrproxy.cache.entries import ENTRY_LIMIT, Entry, occupied
from ecrproxy.cache.ingest import Ingest
from ecrproxy.cache.ledger import Ledger, Settled, is_own, packed
from ecrproxy.cache.proofs import Proofs, is_marked, mark
from ecrproxy.cache.trailer import boot_id
from ecrproxy.cache.troubles import Kind, Troubles, is_exhaustion
from ecrproxy.cache.volume import Volume
from ecrproxy.cache.writer import Writer
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Digest, Route

log = Logger()

LATEST: Final = 2**64 - 1
"""The latest use that is counted, in nanoseconds; a restored or foreign file may have any time, also before 1970."""
T = TypeVar("T")

_PROBE: Final = b"ok" + bytes(2**16)
"""What a check writes: more than a disk that is called full still takes."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
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
    }
)
"""Errors of a directory that is none, can't be made or belongs to others. All others are a disk's, and may pass."""
_TRIES: Final = 4
NO_INODES: Final = "No inodes left on device"
_MARGIN: Final = 64 * 2**20
"""Bytes of the disk that are left free, or a hundredth of a small one: for entries, and others' files."""
PURGED: Final = "purged"
"""The file that says, by being another one, that somebody has purged the directory."""


class Store:
    """
    The cache directory.

    @param root: where it is; made if it is missing.
    @param now: seconds since the epoch.
    @param ledger: where it is counted.
    @ivar arriving: the files that arrive.
    @ivar evict: takes a number of bytes out of the directory when the disk is full; false if it can't.
    @ivar see_room: raises C{OSError} if others have taken the disk's room.
    """

    evict: Callable[[int], bool] = staticmethod(lambda _: False)
    see_room: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, root: Path, now: Callable[[], float], ledger: Ledger | None = None) -> None:
        self.root, self._now = root, now
        self.ingest = root / "ingest"
        self.ledger = Ledger() if ledger is None else ledger
        self.proofs = Proofs()
        self.troubles = Troubles(now)
        self.arriving = Ingest(root, now, self.ledger, self.proofs, self.troubles, boot_id())
        self._volume: Volume | None = None

    def prepare(self) -> None:
        """
        Make the directories and see that files can be made in them.

        @raise OSError: if not.
        """
        with self.troubles.noted(Kind.WRITE):
            self._volume = Volume(self.root)
            self.make()
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
        for name in ("content", "entries", "ingest"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

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
                if problem.errno not in _FULL or not self.evict(size):
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
        try:
            self.see_room()
        except OSError as problem:  # not as of a write: small ones that succeed would end it
            self.troubles.failed(Kind.ROOM, problem)
            raise
        probe = self.ingest / f"probe.{secrets.token_hex(4)}"
        try:
            with self.troubles.noted(Kind.WRITE):
                self._anew(lambda: probe.write_bytes(_PROBE), len(_PROBE))
            with self.troubles.noted(Kind.READ):
                probe.read_bytes()
            self.troubles.succeeded(Kind.ROOM)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def free(self) -> int | None:
        """
        Tell how many bytes more the disk can hold, with some to spare: negative if it is too full; none if unknown.
        """
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize - _spare(disk) if disk.f_blocks else None

    def spare(self) -> int:
        """
        Return how many bytes of the disk are left free, for entries and others' files; 0 if its size is unknown.
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
        Unlink what arrived for writers that are no more, but for what is worth going on with.
        """
        self.arriving.sweep()

    def count(self) -> int:
        """
        Fill the ledger from the directory: its files by their last use, which is their mtime.

        Folder by folder, and in small steps: sorting it all at once would keep every other thread waiting.

        @return: by how many bytes the ledger was wrong: negative if it had too many.
        @raise OSError: if too many files are open, and the ledger is as it was.
        """
        self.ledger.begin()
        names, sizes, total = bytearray(), array("Q"), 0
        by_use: list[tuple[array[int], array[int]]] = []  # a list of so many pairs would never be given back
        others: list[tuple[int, str, int]] = []
        for folder in self.folders("content", "entries"):
            files = sorted(files_in(folder))
            uses = []
            for name, used, length in files:
                path = f"{folder}/{name}"[len(str(self.root)) + 1 :]
                size = occupied(length) if path.startswith("entries/") else length
                short = packed(path)
                if short is None and is_own(path):
                    others.append((used, path, size))
                elif short is not None:
                    uses.append((min(max(0, used), LATEST), len(sizes)))
                    names += short
                    sizes.append(size)
                    total += size
            uses.sort()
            by_use.append((array("Q", (used for used, _ in uses)), array("I", (place for _, place in uses))))
        # What is left over was written until a while ago: as a use, that is more recent than most.
        others += ((int(when * 1e9), path, size) for when, path, size in self.arriving.count() if is_own(path))
        order = array("I", (place for _, place in heapq.merge(*(zip(*each, strict=True) for each in by_use))))
        return self.ledger.load(Settled(names, sizes, order), total, [(path, size) for _, path, size in sorted(others)])

    def folders(self, *tops: str) -> Iterator[str]:
        """
        Yield the folders that may hold files, in the order of their names as the ledger packs them.

        @param tops: of what: content, entries.
        """
        for top in ("content/sha256", "content/sha512", "entries"):
            if top.partition("/")[0] in tops:
                yield from (str(folder) for folder in sorted(self._names(self.root / top)))

    def has(self, digest: Digest) -> bool:
        """
        Tell whether there is a file of this name, without opening it or noting a use.
        """
        try:
            return stat.S_ISREG(os.lstat(self.root / self.content_path(digest)).st_mode)
        except OSError:
            return False

    def writer(self, digest: Digest, size: int) -> Writer:
        """
        Begin a file that arrives.

        @param size: in bytes; so many are taken of the disk at once.
        @raise OSError: if the disk has no room for them, or fails.
        """
        with self.troubles.noted(Kind.WRITE):
            return self._anew(lambda: self.arriving.begin(digest, size), size)

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
            fd = os.open(self.root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as problem:
            if isinstance(problem, FileNotFoundError):
                self.ledger.gone(path)
            elif is_exhaustion(problem):
                self.troubles.failed(Kind.OPEN, problem)
            else:  # it is there, and counts
                log.warn("Can't read {path} from the cache: {why}", path=path, why=problem.strerror or problem)
                self.troubles.failed(Kind.READ, problem)
            return None
        self.troubles.succeeded(Kind.READ)
        status = os.fstat(fd)
        verdict = self.proofs.verdict(digest, status)
        if verdict is None and not stat.S_ISREG(status.st_mode):
            self.drop(digest, status, DigestMismatchError("it is no file"))
            verdict = False
        if verdict is False:
            os.close(fd)
            return None
        if verdict or is_marked(status):  # else the mark would hide that somebody has changed it
            self.mark(fd)
        self.ledger.used(path, status.st_size)
        return Content(self, digest, OpenFile(fd), status)

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
                return
        log.warn("{path} in the cache is dropped: {why}", path=path, why=why)
        self.remove(path)

    def entry(self, name: str, registry: RegistryId, route: Route) -> Entry | None:
        """
        Read the entry called C{name}, if there is one of what C{route} asks of C{registry}; note its use.
        """
        path = entry_path(name)
        try:
            with open(self.root / path, "rb", opener=without_waiting) as file:
                entry, size = read_entry(file)
                self.mark(file.fileno())
                self.ledger.used(path, occupied(size))
        except (OSError, ValueError):
            return None
        return entry if entry.is_of(registry, route) else None

    def save(self, name: str, entry: Entry) -> None:
        """
        Write an entry, whole or not at all.

        @raise OSError: if the disk fails.
        """
        data, path = entry.to_json(), entry_path(name)
        target, draft = self.root / path, self.ingest / f"entry.{secrets.token_hex(8)}"

        def write() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)
            draft.rename(target)

        try:
            with self.troubles.noted(Kind.WRITE):
                self._anew(write, len(data))
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        self.ledger.used(path, occupied(len(data)))

    def last_purge(self) -> tuple[int, int]:
        """
        Tell by a value, which changes with it, when somebody last purged the directory; zeros if nobody did.
        """
        try:
            status = (self.root / PURGED).stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    def note_purge(self) -> None:
        """
        Note that something was purged, for all daemons on the directory.

        @raise OSError: if the disk fails.
        """
        self._see_volume()
        draft = self.root / f"{PURGED}.{secrets.token_hex(4)}"
        draft.touch(mode=0o600)
        draft.rename(self.root / PURGED)  # another file each time: not all file systems tell times finely

    def forget(self, name: str) -> None:
        """
        Drop the entry called C{name}.
        """
        self.remove(entry_path(name))

    def remove(self, path: str) -> bool:
        """
        Unlink one file; those who have it open go on reading it.

        @param path: relative to the cache directory; one that the store cannot have made is refused.
        @return: whether it is gone.
        """
        if not is_own(path):
            log.error("Not removed: {path} is no name of the cache's own", path=path)
            return False
        try:
            if path.startswith("ingest/"):
                self.arriving.remove(path.removeprefix("ingest/"))
            else:
                (self.root / path).unlink()
        except FileNotFoundError:
            pass
        except OSError as problem:  # it goes on being counted
            log.warn("Can't remove {path} from the cache: {why}", path=path, why=problem.strerror or problem)
            return False
        self.ledger.gone(path)
        return True

    def mark(self, fd: int) -> None:
        """
        Note in a file that it is used, if that can be.
        """
        with contextlib.suppress(OSError):  # a read-only disk still serves what it has
            mark(fd, self._now())

    @staticmethod
    def _names(folder: Path) -> Iterable[Path]:
        with _all_but_exhaustion():
            yield from folder.iterdir()


def read_entry(file: IO[bytes]) -> tuple[Entry, int]:
    """
    Read an entry's file.

    @return: the entry, and how many bytes it has.
    @raise ValueError: if it is none, or larger than any that is written.
    """
    data = file.read(ENTRY_LIMIT + 1)
    if len(data) > ENTRY_LIMIT:
        raise ValueError("too large for an entry")
    return Entry.from_json(data), len(data)


def entry_path(name: str) -> str:
    """
    Name the file of the entry called C{name}, relative to the cache directory.
    """
    return f"entries/{name[:2]}/{name}"


def without_waiting(path: str, flags: int) -> int:
    """
    Open a file that somebody may have replaced by something else.
    """
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


def files_in(folder: str) -> Iterator[tuple[str, int, int]]:
    """
    Yield name, last use in nanoseconds and bytes of a folder's files.
    """
    with _all_but_exhaustion(), os.scandir(folder) as found:
        for file in found:
            with contextlib.suppress(OSError):
                status = file.stat(follow_symlinks=False)
                yield file.name, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _all_but_exhaustion() -> Iterator[None]:
    """
    Pass over what a disk can't give; not over what could be had if fewer files were open.
    """
    try:
        yield
    except OSError as problem:
        if is_exhaustion(problem):
            raise


def _spare(disk: os.statvfs_result) -> int:
    return min(_MARGIN, disk.f_blocks * disk.f_frsize // 100)
