"""
The files in C{content/}: opened, verified, evicted.

Rules:

- A process holds a shared lock on each file that it has open. Eviction needs the exclusive lock, and does not wait.
- Files are never modified in place: they are replaced by rename, or unlinked. Readers that have a file open go on
  reading the old bytes.
- A file that can't be read, is another user's or is known to be bad counts as absent: a miss, never a failure.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from functools import partial
from weakref import WeakValueDictionary

from twisted.logger import Logger

from ecrproxy.cache import locks
from ecrproxy.cache.arriving import Arriving
from ecrproxy.cache.content import Content, DigestMismatchError, OpenFile
from ecrproxy.cache.directory import Directory, without_waiting
from ecrproxy.cache.folders import Folders
from ecrproxy.cache.kept_open import KeptOpen
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.proofs import is_marked, mark
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.troubles import TroubleKind, is_exhaustion
from ecrproxy.oci import Digest

log = Logger()


class ContentFiles:
    """
    The files of content.

    @ivar kept: files that stay open for a moment; None if nobody keeps any.
    """

    kept: KeptOpen | None = None

    def __init__(self, directory: Directory, folders: Folders, arriving: Arriving) -> None:
        self._directory, self._folders, self._arriving = directory, folders, arriving
        self._opened: WeakValueDictionary[Digest, OpenFile] = WeakValueDictionary()

    def open(self, digest: Digest) -> Content | None:
        """
        Open content and record its use. Use L{Content.proved} to learn whether it is still verified.
        """
        path = content_path(digest)
        try:
            found = self._opened_file(digest, f"{self._directory.root}/{path}")
        except OSError as problem:
            if is_exhaustion(problem):
                self._directory.troubles.failed(TroubleKind.OPEN, problem)
            else:  # the file exists, and counts
                log.warn("Can't read {path} from the cache: {why}", path=path, why=problem.strerror or problem)
                self._directory.troubles.failed(TroubleKind.READ, problem)
            return None
        if found is None:
            self._directory.index.uses.gone(digest)
            return None
        self._directory.troubles.succeeded(TroubleKind.READ)
        file, status = found
        verdict = self._directory.proofs.verdict(digest, status)
        if verdict is not False and not (stat.S_ISREG(status.st_mode) and self._directory.is_own(status)):
            why = "it is another user's" if stat.S_ISREG(status.st_mode) else "it is no file"
            self.drop(digest, status, DigestMismatchError(why))
            verdict = False
        if verdict is False:
            file.let_go()
            return None
        if verdict or is_marked(status):  # otherwise the mark would hide a modification
            self.mark(file.fd)
        self._directory.index.uses.use(digest)
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
        return self._directory.proofs.verdict(digest, status) is True

    def prove(self, digest: Digest, status: os.stat_result, fd: int) -> None:
        """
        Record that a file was verified.
        """
        self._directory.proofs.note(digest, status, good=True)
        self.mark(fd)
        self._directory.index.uses.verified(digest)

    def mark(self, fd: int) -> None:
        """
        Record in a file's mtime that it is used, if possible.
        """
        with contextlib.suppress(OSError):  # a read-only disk still serves its content
            mark(fd, self._directory.now())

    def drop(self, digest: Digest, status: os.stat_result, why: Exception) -> None:
        """
        Remove a bad file of content, unless another has already replaced it.
        """
        path = content_path(digest)
        self._directory.proofs.note(digest, status, good=False)
        if isinstance(why, OSError):
            self._directory.troubles.failed(TroubleKind.READ, why)
        with contextlib.suppress(OSError):
            if os.lstat(self._directory.root / path).st_ino != status.st_ino:
                self._directory.proofs.forget(digest)
                return
        log.warn("{path} in the cache is dropped: {why}", path=path, why=why)
        if self._removed(digest, partial(self._unlink_bad, digest, status.st_ino)):
            self._directory.index.drop([digest])
            self._directory.proofs.forget(digest)

    def has(self, digest: Digest) -> bool:
        """
        Return True if there is a file for C{digest}. Does not open it, and does not count as a use.
        """
        try:
            status = os.lstat(self._directory.root / content_path(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and self._directory.is_own(status)

    def evict_unused(self, files: Iterable[Digest | Reservation]) -> list[Digest | Reservation]:
        """
        Unlink files of content, and interrupted transfers, unless some process has them open.

        @return: those that are gone.
        """
        gone = [each for each in files if self._removed(each, partial(self._unlink_unused, each))]
        if gone:
            content = [each for each in gone if isinstance(each, Digest)]
            self._directory.index.drop(content, [each for each in gone if isinstance(each, Reservation)])
        return gone

    def unlink(self, digest: Digest) -> bool:
        """
        Unlink a file of content, but keep it in the index. Readers that have it open keep reading it.

        @return: True if it is gone.
        """
        return self._removed(digest, self._directory.content(digest).unlink)

    def _removed(self, what: Digest | Reservation, unlink: Callable[[], bool | None]) -> bool:
        """
        Call C{unlink} to remove a file. Return True if the file is gone.

        @param unlink: returns False if the file must stay.
        """
        if self.kept is not None and isinstance(what, Digest):
            self.kept.drop(what)
        try:
            self._folders.check_mounted()
            return unlink() is not False
        except FileNotFoundError:
            return True
        except OSError as problem:  # it still counts
            path = content_path(what) if isinstance(what, Digest) else f"arriving/{what.name}"
            log.warn("Can't remove {path} from the cache: {why}", path=path, why=problem.strerror or problem)
            return False

    def _unlink_unused(self, what: Digest | Reservation) -> bool:
        if isinstance(what, Reservation):
            return self._arriving.remove(what.name)
        return locks.remove_unused(self._directory.root / content_path(what))

    def _unlink_bad(self, digest: Digest, inode: int) -> bool:
        """
        Unlink a file of content, if it still has this inode.

        The claim is held, so that nobody replaces the bad file by a good one between the check and the unlink.
        """
        path = self._directory.root / content_path(digest)
        claim = self._arriving.hold(digest)
        if claim is None:
            return False
        try:
            if inode != os.lstat(path).st_ino:
                return False
            path.unlink()
            return True
        finally:
            self._arriving.let_go(claim)
