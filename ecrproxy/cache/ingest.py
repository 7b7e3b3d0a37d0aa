"""
What is still arriving: a file for each transfer, which tells by itself which of its bytes are there.

Rules:

- A file has its full size from the start, so its length says nothing. Behind the blob's bytes it has a trailer:
  the stretches that are there, written anew after each of them. It is cut off when the file becomes content.
- A file is locked by its writer, and the kernel drops the lock with the process. One that nobody locks is
  I{left over}: the next transfer of its digest goes on from it.
- A trailer proves nothing. What it tells of is hashed before anybody is shown it, the bytes are held against the digest
  when all are there, and a file that fails is dropped. A torn or missing trailer is a file that is no use.
- Only who holds its lock, and found it in its place then, writes to a file or removes it.
- What is there is never written again: it may be hashed already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ecrproxy.cache.proofs import Proofs, mark
from ecrproxy.cache.troubles import Kind, Troubles

if TYPE_CHECKING:
    from ecrproxy.cache.ledger import Ledger
    from ecrproxy.oci import Digest

WORTH_RESUMING: Final = 2**20
"""Bytes from which on a blob has a trailer: less is had again sooner than looked for."""
LEFT_SECONDS: Final = 24 * 3600
"""How long a file that is left over is of use: clients that want it come back sooner."""
_DRAFTS: Final = ("entry.", "probe.")
_YOUNG_SECONDS: Final = 60
_TRIES: Final = 10
"""New files that are made, if others are quicker to lock them: each time that is less than likely."""
_CATCH_UP: Final = 16 * 2**20
"""Bytes that are hashed in one go: a lane that has bytes to write waits for no more."""

_MAGIC: Final = b"ecrprxy1"
_HEAD: Final = struct.Struct(">8sQdI")
_SPAN: Final = struct.Struct(">QQ")
_MOST_SPANS: Final = 60
"""A lane leaves one gap; more come of a transfer that was interrupted often, and are forgotten."""
TRAILER: Final = 1024
"""Bytes that are kept for the trailer."""


class DigestMismatchError(Exception):
    """
    The bytes that arrived are not those that the digest names.
    """


class Left(NamedTuple):
    """
    What a file that is left over is good for.

    @ivar size: the bytes that the blob was announced with.
    @ivar start: the first byte that is missing.
    @ivar stop: the first behind it that isn't.
    """

    size: int
    start: int
    stop: int


class Stretches:
    """
    Which bytes of a file are there, where they come in several places at once.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]] = ()) -> None:
        self._stretches = list(stretches)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._stretches)

    def add(self, start: int, stop: int) -> None:
        """
        Note that the bytes from C{start} to C{stop} are there.
        """
        joined = [(start, stop)]
        for first, last in self._stretches:
            if last < joined[0][0] or joined[0][1] < first:
                joined.append((first, last))
            else:
                joined[0] = (min(first, joined[0][0]), max(last, joined[0][1]))
        self._stretches = sorted(joined)

    def end_of(self, offset: int) -> int:
        """
        Tell up to where all bytes from C{offset} on are there.
        """
        return next((stop for start, stop in self._stretches if start <= offset <= stop), offset)

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """
        Tell which of the first C{size} bytes are not there.
        """
        bounds = [0, *(edge for stretch in self._stretches for edge in stretch), size]
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return [(start, stop) for start, stop in pairs if start < stop]


@dataclass(frozen=True, slots=True)
class Trailer:
    """
    What a file says of itself.

    @ivar size: the bytes that the blob was announced with.
    @ivar when: seconds since the epoch, of the last write.
    @ivar there: the stretches that are there, in order.
    """

    size: int
    when: float
    there: tuple[tuple[int, int], ...]

    def pack(self) -> bytes:
        """
        Write it in C{TRAILER} bytes at most.
        """
        there = self.there[:_MOST_SPANS]
        packed = _HEAD.pack(_MAGIC, self.size, self.when, len(there)) + b"".join(_SPAN.pack(*each) for each in there)
        return packed + zlib.crc32(packed).to_bytes(4, "big")

    @classmethod
    def unpack(cls, data: bytes) -> Trailer | None:
        """
        Read what L{pack} wrote; none if it is anything else, or tells of no stretch or of no gap.
        """
        if len(data) < _HEAD.size:
            return None
        magic, size, when, count = _HEAD.unpack_from(data)
        end = _HEAD.size + count * _SPAN.size
        if magic != _MAGIC or count > _MOST_SPANS or zlib.crc32(data[:end]).to_bytes(4, "big") != data[end : end + 4]:
            return None
        there = tuple(_SPAN.iter_unpack(data[_HEAD.size : end]))
        edges = [edge for stretch in there for edge in stretch]
        sound = edges == sorted(set(edges)) and len(edges) > 0 and edges[-1] <= size and there != ((0, size),)
        return cls(size, when, there) if sound else None

    @classmethod
    def read(cls, fd: int) -> Trailer | None:
        """
        Read a file's trailer; none if it has none that fits, or it can't be read.
        """
        with contextlib.suppress(OSError):
            return cls._read(fd)
        return None

    @classmethod
    def _read(cls, fd: int) -> Trailer | None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size < TRAILER:
            return None
        size = status.st_size - TRAILER
        trailer = cls.unpack(os.pread(fd, TRAILER, size))
        return trailer if trailer is not None and trailer.size == size else None


class Writer:
    """
    A file that arrives, in several places at once; hashed in order; content once its digest is right.

    @ivar hashed: the bytes that are there and hashed, from the first on.
    @ivar room: the bytes that it takes of the disk.
    """

    def __init__(self, ingest: Ingest, digest: Digest, size: int, path: Path, fd: int) -> None:
        self._ingest, self._digest, self.size, self._path, self._fd = ingest, digest, size, path, fd
        self.room = room_for(size)
        self._hash = digest.hasher()
        self.hashed = 0
        self._there = Stretches()
        self._shown = Stretches()
        self._lock = threading.Lock()
        self._committed: str | None = None

    def fileno(self) -> int:
        """
        Hand out the file descriptor, for reading what was written.
        """
        return self._fd

    def take_up(self, trailer: Trailer) -> None:
        """
        Go on from what C{trailer} says.
        """
        self._there = Stretches(trailer.there)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """
        Tell which bytes are missing.
        """
        return self._there.gaps(self.size)

    @property
    def missing(self) -> int:
        """
        Tell how many bytes are missing.
        """
        return sum(stop - start for start, stop in self.gaps)

    @property
    def front(self) -> int:
        """
        Tell up to where all bytes from the first on are there.
        """
        return self._there.end_of(0)

    def write(self, offset: int, pieces: Sequence[bytes]) -> None:
        """
        Write C{pieces} from C{offset} on. Threads may do so at the same time, in different places.

        @raise OSError: if the disk fails; what was written before stays readable.
        """
        with self._ingest.troubles.noted(Kind.WRITE):
            self._write(offset, pieces)

    def _write(self, offset: int, pieces: Sequence[bytes]) -> None:
        end = offset
        for piece in pieces:
            view = memoryview(piece)
            while view:
                count = os.pwrite(self._fd, view, end)
                view, end = view[count:], end + count
        with self._lock:
            self._there.add(offset, end)
            self._shown.add(offset, end)
            if offset == self.hashed:  # as it comes, from memory
                for piece in pieces:
                    self._hash.update(piece)
                self.hashed = end
            self._hash_on()
            self._tell()

    def catch_up(self) -> bool:
        """
        Hash some of what came before its turn, or was there from the start.

        @return: whether there is more of it.
        @raise OSError: if the disk fails.
        """
        with self._lock:
            return self._hash_on()

    def _hash_on(self) -> bool:
        end = self._there.end_of(self.hashed)
        stop = min(end, self.hashed + _CATCH_UP)
        while self.hashed < stop:
            data = os.pread(self._fd, min(2**20, stop - self.hashed), self.hashed)
            if not data:
                raise OSError(errno.EIO, "what was written can't be read")
            self._hash.update(data)
            self.hashed += len(data)
        return stop < end

    def _tell(self) -> None:
        """
        Note in the file what is there of it; a disk that can't take that costs a transfer, another time.
        """
        there = tuple(self._there)
        if self.room > self.size and there != ((0, self.size),):
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, Trailer(self.size, self._ingest.now(), there).pack(), self.size)

    def reach(self, offset: int) -> int:
        """
        Tell up to where all bytes from C{offset} on came by this writer.
        """
        return self._shown.end_of(offset)

    def hash(self) -> Any:  # noqa: ANN401 (hashlib's objects have no public type)
        """
        Copy the state of the hash over the first C{hashed} bytes.
        """
        return self._hash.copy()

    def verify(self) -> None:
        """
        Hold the hash against the digest.

        @raise DigestMismatchError: if they differ.
        """
        if self._hash.hexdigest() != self._digest.hex:
            raise DigestMismatchError(f"what arrived is not {self._digest}")

    def commit(self) -> None:
        """
        Make the file content, for good. The file descriptor stays open until L{close}.

        @raise DigestMismatchError: if it is not what its digest names.
        @raise OSError: if the disk fails; the file is not content then.
        """
        self.verify()
        with self._ingest.troubles.noted(Kind.WRITE):
            self._commit()

    def _commit(self) -> None:
        if self.hashed < self.room:
            os.ftruncate(self._fd, self.hashed)
        with contextlib.suppress(OSError):
            mark(self._fd, self._ingest.now())
        os.fsync(self._fd)
        path = content_path(self._digest)
        target = self._ingest.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path.rename(target)
        self._ingest.proofs.note(self._digest, os.fstat(self._fd), good=True)
        self._ingest.ledger.used(path, self.hashed)
        self._ingest.ledger.reading(path, 1)  # by those who follow, until it is closed
        self._committed = path

    def close(self) -> None:
        """
        Let go of the file, committed or discarded before.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._committed is not None:
                self._ingest.ledger.reading(self._committed, -1)

    def leave(self) -> None:
        """
        Let go of the file, and leave it to the next transfer of its digest if it is worth that.
        """
        if self._fd < 0 or self._committed is not None:
            self.close()
        elif Trailer.read(self._fd) is None:
            self.discard()
        else:
            self._ingest.ledger.used(f"ingest/{self._path.name}", self.room)
            self.close()

    def discard(self) -> None:
        """
        Unlink the file and let go of it.
        """
        if self._committed is None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.close()


class Ingest:
    """
    The files that arrive.

    @param root: the cache directory.
    @param now: seconds since the epoch.
    @param ledger: where what is left over is counted.
    @param proofs: what is told of what has become content.
    @param troubles: what is told of a disk that fails.
    """

    def __init__(
        self, root: Path, now: Callable[[], float], ledger: Ledger, proofs: Proofs, troubles: Troubles
    ) -> None:
        self.root, self.now, self.ledger, self.proofs, self.troubles = root, now, ledger, proofs, troubles
        self.folder = root / "ingest"

    def begin(self, digest: Digest, size: int) -> Writer:
        """
        Begin a file.

        @param size: in bytes; so many are taken of the disk at once.
        @raise OSError: if the disk has no room for them, or fails.
        """
        path, fd = self._new(digest)
        writer = Writer(self, digest, size, path, fd)
        try:
            if size:
                os.posix_fallocate(fd, 0, writer.room)  # a disk too full says so now, not in the middle
        except OSError:
            writer.discard()
            raise
        return writer

    def left(self, digest: Digest) -> Left | None:
        """
        See whether a file of C{digest} is left over that is worth going on with.
        """
        found = [trailer for _, trailer in self._left_of(digest) if trailer is not None]
        best = max(found, key=_worth, default=None)
        return Left(best.size, *Stretches(best.there).gaps(best.size)[0]) if best is not None else None

    def resume(self, digest: Digest, size: int) -> Writer | None:
        """
        Go on with what is left over of C{digest}; what is of no use is dropped.

        What the ledger counted of it is a reservation from then on, as for any other file that arrives.
        """
        found = sorted(self._left_of(digest), key=lambda each: _worth(each[1]), reverse=True)
        for path, seen in found:
            if seen is None or seen.size != size:
                with contextlib.suppress(OSError):
                    self.remove(path.name)
                continue
            fd = self._locked(path)
            if fd is None:
                continue
            trailer = Trailer.read(fd)  # it may have been somebody's meanwhile
            if trailer is None or trailer.size != size:
                os.close(fd)
                continue
            writer = Writer(self, digest, size, path, fd)
            writer.take_up(trailer)
            with self.ledger.lock:
                self.ledger.gone(f"ingest/{path.name}")
                self.ledger.reserve(writer.room)
            return writer
        return None

    def sweep(self) -> None:
        """
        Unlink what arrived for writers that are no more, but for what is worth going on with.

        Drafts of entries have no lock; another daemon on this directory may be about to rename a young one.
        """
        for path in self._names():
            with contextlib.suppress(OSError):
                if path.name.startswith(_DRAFTS) and self.now() - path.stat().st_mtime < _YOUNG_SECONDS:
                    continue
            fd = self._locked(path)
            if fd is None:
                continue
            with contextlib.suppress(OSError):
                if not self._is_of_use(path, Trailer.read(fd)):
                    path.unlink()
            os.close(fd)

    def count(self) -> list[tuple[float, str, int]]:
        """
        List what is left over: last write, path in the cache directory and bytes.
        """
        found = []
        for path in self._names():
            trailer = self._trailer(path)
            if trailer is not None:
                found.append((trailer.when, f"ingest/{path.name}", trailer.size + TRAILER))
        return found

    def remove(self, name: str) -> None:
        """
        Unlink a file that nobody lives behind.

        @raise OSError: if that can't be done.
        """
        path = self.folder / name
        fd = self._locked(path)
        if fd is not None:
            try:
                path.unlink()
            finally:
                os.close(fd)
            self.ledger.gone(f"ingest/{name}")

    def _is_of_use(self, path: Path, trailer: Trailer | None) -> bool:
        if trailer is None or not abs(self.now() - trailer.when) < LEFT_SECONDS:
            return False
        algorithm, _, rest = path.name.partition("-")
        digits = rest.partition(".")[0]
        return not (self.root / "content" / algorithm / digits[:2] / digits).exists()

    def _left_of(self, digest: Digest) -> Iterator[tuple[Path, Trailer | None]]:
        prefix = f"{digest.algorithm}-{digest.hex}."
        for path in self._names():
            if path.name.startswith(prefix):
                yield path, self._trailer(path)

    def _new(self, digest: Digest) -> tuple[Path, int]:
        """
        Make a file, and lock it: that says that somebody lives behind it.

        Who counts or sweeps may meet the file before it is locked, and take it for left over: then another is made.
        """
        for _ in range(_TRIES):
            path = self.folder / f"{digest.algorithm}-{digest.hex}.{secrets.token_hex(4)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if _claimed(fd, path):
                    return path, fd
            except OSError:
                _drop(fd, path)
                raise
            _drop(fd, path)
        raise BlockingIOError(errno.EWOULDBLOCK, "somebody locks each new file", str(self.folder))

    def _trailer(self, path: Path) -> Trailer | None:
        """
        Read what a file says of itself, if nobody lives behind it.
        """
        fd = self._locked(path)
        if fd is None:
            return None
        try:
            return Trailer.read(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _locked(path: Path) -> int | None:
        """
        Open a file and lock it; none if somebody lives behind it, or it is in its place no more.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            if _claimed(fd, path):
                return fd
        os.close(fd)
        return None

    def _names(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self.folder.iterdir()


def content_path(digest: Digest) -> str:
    """
    Name the file of C{digest}, relative to the cache directory.
    """
    return f"content/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"


def room_for(size: int) -> int:
    """
    Tell how many bytes of the disk a blob of C{size} bytes takes while it arrives.
    """
    return size + TRAILER if size >= WORTH_RESUMING else size


def _claimed(fd: int, path: Path) -> bool:
    """
    Lock a file; tells whether that was to be had, and the file is still the one at C{path}.

    It is not, if its writer had just made it content, or somebody swept it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _drop(fd: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(fd)


def _worth(trailer: Trailer | None) -> int:
    return sum(stop - start for start, stop in trailer.there) if trailer else -1
