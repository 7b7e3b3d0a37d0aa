"""
What is still arriving: a file for each transfer, which tells by itself which of its bytes are there.

Rules:

- A file has its full size from the start, so its length says nothing. Behind the blob's bytes it has a trailer:
  the stretches that are there, written anew after each of them. It is cut off when the file becomes content.
- A file is locked by its writer, and the kernel drops the lock with the process. One that nobody locks is
  I{left over}: the next transfer of its digest goes on from it.
- A trailer proves nothing. What it tells of is hashed before it is part of a complete response, and before anything
  of it is sent if the machine has started since (see L{Writer.take_up}); the bytes are held against the digest
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ecrproxy.cache.allocation import allocate
from ecrproxy.cache.proofs import Proofs
from ecrproxy.cache.trailer import UNKNOWN_BOOT, Stretches, Trailer, room_for
from ecrproxy.cache.troubles import Troubles
from ecrproxy.cache.writer import Writer

if TYPE_CHECKING:
    from ecrproxy.cache.content import Readers
    from ecrproxy.cache.index import Index
    from ecrproxy.oci import Digest

LEFT_SECONDS: Final = 24 * 3600
"""How long a file that is left over is of use: clients that want it come back sooner."""
_PROBE: Final = "probe."
_YOUNG_SECONDS: Final = 60
_TRIES: Final = 10
"""New files that are made, if others are quicker to lock them: each time that is less than likely."""


class Left(NamedTuple):
    """
    What a file that is left over is good for.

    @ivar size: the bytes that the blob was announced with.
    @ivar gaps: the stretches of it that are missing.
    """

    size: int
    gaps: Sequence[tuple[int, int]]


class Ingest:
    """
    The files that arrive.

    @param root: the cache directory.
    @param now: seconds since the epoch.
    @param index: where what arrives, and what is left over, is counted.
    @param readers: who reads what has become content.
    @param proofs: what is told of what has become content.
    @param troubles: what is told of a disk that fails.
    @param boot: the current start of the machine: see L{trailer.boot_id}.
    """

    def __init__(
        self,
        root: Path,
        now: Callable[[], float],
        index: Index,
        readers: Readers,
        proofs: Proofs,
        troubles: Troubles,
        boot: bytes = UNKNOWN_BOOT,
    ) -> None:
        self.root, self.now, self.index, self.readers = root, now, index, readers
        self.proofs, self.troubles = proofs, troubles
        self.folder, self.boot = root / "ingest", boot
        self._absent: dict[str, float] = {}

    def begin(self, digest: Digest, size: int, name: str | None = None) -> Writer:
        """
        Begin a file.

        @param size: in bytes; so many are taken of the disk at once, where the file system can do that.
        @param name: what room was reserved for, see L{new_name}; the reservation ends with the file.
        @raise OSError: if the disk has no room for them, or fails.
        """
        name = name or new_name(digest)
        try:
            path, fd = self._new(name)
        except OSError:
            self.index.drop(arriving=[name])
            raise
        writer = Writer(self, digest, size, path, fd)
        try:
            if size:
                allocate(fd, writer.room)  # a disk too full says so now, not in the middle
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
        return Left(best.size, Stretches(best.there).gaps(best.size)) if best is not None else None

    def resume(self, digest: Digest, size: int) -> Writer | None:
        """
        Go on with what is left over of C{digest}; what is of no use is dropped.
        """
        found = sorted(self._left_of(digest), key=lambda each: _worth(each[1]), reverse=True)
        for path, seen in found:
            if seen is None or seen.size != size:
                with contextlib.suppress(OSError):
                    if self.remove(path.name):
                        self.index.drop(arriving=[path.name])
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
            self.index.arrive(path.name, writer.room)  # it may not be counted yet
            return writer
        return None

    def sweep(self) -> None:
        """
        Unlink what arrived for writers that are no more, but for what is worth going on with; count that.

        A reservation without a file ends after a minute: its writer may be about to make the file.
        """
        there, gone = set(), set()
        for path in self._names():
            with contextlib.suppress(OSError):
                if path.name.startswith(_PROBE) and self.now() - path.stat().st_mtime < _YOUNG_SECONDS:
                    continue
            there.add(path.name)
            fd = self._locked(path)
            if fd is None:
                continue
            with contextlib.suppress(OSError):
                trailer = Trailer.read(fd)
                if trailer is not None and self._is_of_use(path, trailer):
                    self.index.arrive(path.name, room_for(trailer.size), trailer.when)
                else:
                    path.unlink()
                    gone.add(path.name)
            os.close(fd)
        with contextlib.suppress(OSError):
            absent = {name for name, _, _ in self.index.arriving()} - there - gone
            self._absent = {name: self._absent.get(name, self.now()) for name in absent}
            old = {name for name, since in self._absent.items() if not 0 <= self.now() - since < _YOUNG_SECONDS}
            self.index.drop(arriving=gone | old)

    def remove(self, name: str) -> bool:
        """
        Unlink a file whose writer has exited.

        @return: whether it is gone.
        @raise OSError: if that can't be done.
        """
        path = self.folder / name
        fd = self._locked(path)
        if fd is None:
            return not path.exists()
        try:
            path.unlink()
        finally:
            os.close(fd)
        return True

    def _is_of_use(self, path: Path, trailer: Trailer) -> bool:
        if not abs(self.now() - trailer.when) < LEFT_SECONDS:
            return False
        algorithm, _, rest = path.name.partition("-")
        digits = rest.partition(".")[0]
        return not (self.root / "content" / algorithm / digits[:2] / digits).exists()

    def _left_of(self, digest: Digest) -> Iterator[tuple[Path, Trailer | None]]:
        prefix = f"{digest.algorithm}-{digest.hex}."
        for path in self._names():
            if path.name.startswith(prefix):
                yield path, self._trailer(path)

    def _new(self, name: str) -> tuple[Path, int]:
        """
        Make a file, and lock it: that says that somebody lives behind it.

        Who sweeps may meet the file before it is locked, and take it for left over: then another is made.
        """
        path = self.folder / name
        for _ in range(_TRIES):
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


def new_name(digest: Digest) -> str:
    """
    Name a file that will arrive.
    """
    return f"{digest.algorithm}-{digest.hex}.{secrets.token_hex(4)}"


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
