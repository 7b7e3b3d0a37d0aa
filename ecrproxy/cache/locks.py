"""
Locks on files, by flock(2): shared by whoever has a file open, exclusive for whoever writes or removes it.

Rules:

- A lock belongs to an open file, and goes with its last descriptor: also when its process is killed.
- It says something about a path only if the path still leads to the locked file: that is looked at afterwards.
- None is waited for, converted, or released but by close: a conversion that fails would drop the former lock.
- Whether a file is locked is asked with a shared lock, so that those who ask don't take each other for its owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def open_in_place(path: Path | str, flags: int) -> int:
    """
    Open a regular file, which somebody may have replaced by something else.

    @raise OSError: if there is none.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def share(fd: int, path: Path | str) -> bool:
    """
    Lock an open file against its removal; false if it is about to be removed, or is at C{path} no more.

    @raise OSError: if the file system has no locks.
    """
    return _lock(fd, fcntl.LOCK_SH) and is_in_place(fd, path)


def own(fd: int, path: Path | str) -> bool:
    """
    Lock an open file for itself; false if others have it open, or it is at C{path} no more.

    @raise OSError: if the file system has no locks.
    """
    return _lock(fd, fcntl.LOCK_EX) and is_in_place(fd, path)


def is_in_place(fd: int, path: Path | str) -> bool:
    """
    Tell whether C{path} leads to an open file.
    """
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_free(path: Path | str) -> bool:
    """
    Tell whether nobody owns the file at C{path}; false too if there is none.
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
    Unlink a file, unless some process has it open under a lock.

    @return: whether it is gone.
    @raise OSError: if that can't be done.
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
    Tell whether locks in C{folder} exclude others: some file systems refuse them, or grant them to everybody.

    @raise OSError: if no file can be made there.
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
    Open a file for its lock alone, made if it is missing, and close it.

    @raise OSError: if it can't be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
