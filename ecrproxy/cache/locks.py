"""
Locks on files, by flock(2): shared for readers, exclusive to write or remove a file.

Rules:

- A lock belongs to an open file description. The kernel releases it with the last descriptor, also when a process
  is killed.
- A lock on an open file says nothing about a path: after locking, compare the open file with the one at the path.
- Never wait for a lock, and never convert one: a failed conversion releases the lock that was held. Release it only
  by closing the file.
- To find out whether a file is locked exclusively, try a shared lock: probes do not conflict with each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ecrproxy.cache.database import UnfitError, UnusableError
from ecrproxy.cache.ownership import give

_LOCK_TRIES: Final = 250
_LOCK_PAUSE: Final = 0.02


def open_in_place(path: Path | str, flags: int) -> int:
    """
    Open a regular file. Refuse links, pipes and folders in its place, without blocking.

    @raise OSError: if there is no such file, or it can't be opened.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        os.close(fd)
        raise
    if not regular:
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def without_side_effects(fd: int) -> None:
    """
    Make reads of a file update no access time and cause no readahead.

    Updating the access time waits for the file system's journal, even with RWF_NOWAIT; readahead waits for room in the
    disk's queue, even if the bytes themselves are in memory. The event loop does these reads.
    """
    with contextlib.suppress(OSError):  # the file is another user's
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_NOATIME)
    with contextlib.suppress(OSError):  # not a file
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def share(fd: int, path: Path | str) -> bool:
    """
    Take a shared lock, which prevents eviction. Return False if the file is being removed, or is no longer at C{path}.

    @raise OSError: if the file system does not support locks.
    """
    return _lock(fd, fcntl.LOCK_SH) and is_in_place(fd, path)


def own(fd: int, path: Path | str) -> bool:
    """
    Take the exclusive lock. Return False if any other open file has a lock on it, or it is no longer at C{path}.

    @raise OSError: if the file system does not support locks.
    """
    return _lock(fd, fcntl.LOCK_EX) and is_in_place(fd, path)


def is_in_place(fd: int, path: Path | str) -> bool:
    """
    Return True if C{path} leads to the open file.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def see_one_name(fd: int, path: Path | str) -> None:
    """
    Check before writing that an open file has no name but C{path}: any other name may be outside the cache.

    A file with more names loses this one, so the next attempt finds none.

    @raise OSError: if it has another name, or is no longer at C{path}.
    """
    status = os.lstat(path)
    if not os.path.samestat(os.fstat(fd), status):
        raise OSError(errno.ESTALE, "it is another file by now", str(path))
    if status.st_nlink > 1:
        os.unlink(path)  # noqa: PTH108 (it may be no Path)
        raise OSError(errno.EMLINK, "it is a link to a file elsewhere", str(path))


def is_free(path: Path | str) -> bool:
    """
    Return True if the file at C{path} exists, and no process has locked it exclusively.
    """
    try:
        fd = open_in_place(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return share(fd, path)
    except OSError:
        return False
    finally:
        os.close(fd)


def remove_unused(path: Path) -> bool:
    """
    Unlink a file, unless a process holds a lock on it.

    @return: True if it is gone.
    @raise OSError: if it can't be opened or unlinked.
    """
    try:
        fd = open_in_place(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not own(fd, path):
            return not os.path.lexists(path)
        path.unlink()
    finally:
        os.close(fd)
    return True


def exclude(folder: Path) -> bool:
    """
    Return True if locks work in C{folder}: some file systems refuse them, or grant conflicting ones.

    @raise OSError: if no file can be created there.
    """
    probe = folder / f"probe.{os.urandom(4).hex()}"
    try:
        with opened(probe) as one, opened(probe) as other, contextlib.suppress(OSError):
            return _lock(one, fcntl.LOCK_EX) and not _lock(other, fcntl.LOCK_SH)
        return False
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """
    Open a lock file for the duration of the block, and create it if it is missing.

    @raise OSError: if it can't be opened, or something else is in its place.
    """
    fd = open_in_place(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path, *, waiting: bool = True) -> Iterator[None]:
    """
    Hold a lock file.

    @param waiting: True to wait for another process that holds it.
    @raise OSError: if locks do not work there, or another process holds it, after seconds of waiting if C{waiting}.
    """
    with opened(path) as fd, opened(path) as other:
        give(path, path.parent)
        for _ in range(_LOCK_TRIES if waiting else 1):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE)
            except OSError as problem:
                raise UnfitError(f"{path} can't be locked: {problem.strerror}; use a local disk") from None
            else:
                break
        else:
            raise UnusableError(f"{path} is locked by another process")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise UnfitError(f"locks do not hold on the file system of {path}; use a local disk")
        yield


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
