"""
Checks of the cache directory and its disk: existence, operations, space.

Only one small temporary file is created, and never a directory: one that the caller creates may not be writable by the
daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ecrproxy.cache import allocation
from ecrproxy.cache.mounts import Mount, find_mount, mountinfo
from ecrproxy.command.checkup.findings import Finding, failed, ok, warning
from ecrproxy.command.terminal import counted, size_in_words

FOLDERS: Final = ("content", "arriving")
COUNT_SECONDS: Final = 8.0
"""Timeout for counting the cache's files."""
FEW_INODES: Final = 10_000
_MORE_INODES: Final = "use a file system with more: mkfs.ext4 -T news, or xfs"
_SAMPLE: Final = 64 * 2**10


@dataclass(frozen=True, slots=True)
class DirectoryState:
    """
    The state of the directory.

    @ivar exists: False if the rest is about the nearest existing parent directory.
    @ivar strangers: users other than the caller who own parts of it.
    @ivar problem: why no file can be created in it.
    @ivar lacking: file operations that fail in it, each with the reason.
    @ivar used: bytes of its files, as far as they were counted.
    """

    path: str
    exists: bool
    is_directory: bool
    strangers: Sequence[int]
    problem: str
    lacking: Sequence[tuple[str, str]]
    mount: Mount | None
    total: int
    free: int
    inodes: int | None
    used: int
    counted: bool


def survey(path: str, seconds: Callable[[], float]) -> DirectoryState:
    """
    Examine a directory. Blocks.
    """
    place = Path(path).absolute()
    exists = place.exists() or place.is_symlink()
    standing = place if exists else next(each for each in place.parents if each.exists())
    problem, lacking = _try_file(standing, make=exists)
    strangers = [_owner(each) for each in (standing, *(standing / name for name in FOLDERS))] if exists else []
    room = os.statvfs(standing)
    used, counted = _count(place, seconds() + COUNT_SECONDS, seconds) if exists else (0, True)
    return DirectoryState(
        str(place),
        exists,
        standing.is_dir(),
        sorted({each for each in strangers if each is not None and each != os.geteuid()}),
        problem,
        lacking,
        find_mount(mountinfo(), os.path.realpath(standing)),
        room.f_blocks * room.f_frsize,
        room.f_bavail * room.f_frsize,
        room.f_favail if room.f_files else None,  # file systems such as btrfs have no fixed number
        used,
        counted,
    )


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _try_file(directory: Path, *, make: bool) -> tuple[str, list[tuple[str, str]]]:
    """
    Create a file as the cache does, and remove it.
    """
    if not make:
        allowed = os.access(directory, os.W_OK | os.X_OK)
        return ("" if allowed else f"{directory} can't be written"), []
    lacking = []
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as file:
            attempts: dict[str, Callable[[], object]] = {
                "fallocate": partial(allocation.fallocate, file.fileno(), _SAMPLE),
                "flock": partial(fcntl.flock, file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB),
                "fsync": partial(os.fsync, file.fileno()),
            }
            for what, attempt in attempts.items():
                try:
                    attempt()
                except OSError as problem:
                    lacking.append((what, problem.strerror or str(problem.errno)))
            file.write(bytes(_SAMPLE))
            file.flush()
    except OSError as problem:
        return problem.strerror or type(problem).__name__, lacking
    return "", lacking


def _count(place: Path, until: float, seconds: Callable[[], float]) -> tuple[int, bool]:
    """
    Count the bytes of the cache's files until the deadline.
    """
    used = 0
    for name in FOLDERS:
        for folder, _, files in os.walk(place / name):
            for file in files:
                with contextlib.suppress(OSError):
                    used += os.lstat(os.path.join(folder, file)).st_size  # noqa: PTH118 (hundreds of thousands)
            if seconds() > until:
                return used, False
    return used, True


def judge_directory(seen: DirectoryState, user: int) -> Iterator[Finding]:
    """
    Judge the state of the directory.

    @param user: the user who runs this command.
    """
    check = "cache"
    as_user = f"by user {user}, who runs this command"
    if not seen.is_directory:
        yield failed(check, f"{seen.path} is no directory", "set PROXY_CACHE_DIR to one")
    elif seen.problem and seen.mount is not None and "ro" in seen.mount.options:
        yield failed(
            check, f"{seen.path} is on a file system that is read-only", f"mount {seen.mount.point} to be written"
        )
    elif seen.problem and seen.inodes == 0:
        yield failed(check, f"{seen.path} can't be written: the file system has no inodes left", _MORE_INODES)
    elif seen.problem:
        yield failed(
            check,
            f"{seen.path} can't be written {as_user}: {seen.problem}",
            "chown it to the daemon's user, and run this command as that user",
        )
    elif not seen.exists:
        yield ok(check, f"{seen.path} does not exist yet, and can be created {as_user}")
    elif seen.strangers:
        others = ", ".join(map(str, seen.strangers))
        yield warning(
            check,
            f"{seen.path} can be written {as_user}, but parts of it belong to user {others}",
            "run this command as the daemon's user; if that is what you did, chown the directory with all in it",
        )
    else:
        yield ok(check, f"{seen.path} can be written {as_user}")
    yield from _judge_kind(seen)


def _judge_kind(seen: DirectoryState) -> Iterator[Finding]:
    check, mount = "file system", seen.mount
    for what, why in seen.lacking:
        if what == "fallocate":  # only a warning
            yield warning(
                check,
                f"fallocate does not work there: {why}",
                "a disk that is too full is noticed in the middle of a blob; give the cache a local disk",
            )
            continue
        consequence = {
            "flock": "two daemons could write one file",
            "fsync": "a power failure may corrupt content, which is detected when it is read",
        }[what]
        yield failed(check, f"{what} does not work there: {why}", f"{consequence}; give the cache a local disk")
    if mount is None:
        yield ok(check, "its kind can't be determined")
    elif mount.is_far:
        yield warning(
            check,
            f"{mount.kind}, a network or FUSE file system",
            "give each daemon a local disk: hits are read from it, and locks must work",
        )
    elif mount.kind in ("overlay", "fuse.overlayfs"):
        yield warning(
            check,
            f"{mount.kind}: a container's writable layer, which is slow and removed with the container",
            "mount a volume at the cache directory",
        )
    elif mount.kind in ("tmpfs", "ramfs"):
        yield warning(check, f"{mount.kind}: in memory, and lost on restart", "use a disk, unless that is intended")
    else:
        yield ok(check, f"{mount.kind}, mounted at {mount.point}")


def judge_room(seen: DirectoryState, limit: int) -> Iterator[Finding]:
    """
    Compare the cache's limit with its disk.
    """
    check, words = "room", size_in_words
    there = seen.free + seen.used
    if seen.inodes is not None and seen.inodes < FEW_INODES:
        yield warning(
            "inodes",
            f"{counted(seen.inodes, 'more file')} can be made there",
            _MORE_INODES,
        )
    if limit > seen.total:
        yield warning(
            check,
            f"the limit is {words(limit)}, the whole file system {words(seen.total)}",
            f"set PROXY_CACHE_LIMIT to less than {words(there)}: nothing new is cached on a full disk",
        )
    elif seen.counted and limit > there:
        yield warning(
            check,
            f"the limit is {words(limit)}; {words(seen.used)} are used and {words(seen.free)} free",
            f"set PROXY_CACHE_LIMIT to less than {words(there)}, or make room",
        )
    elif not seen.counted:
        yield ok(check, f"{words(seen.free)} free; there are too many files to count")
    else:
        yield ok(check, f"the limit is {words(limit)}; {words(seen.used)} are used and {words(seen.free)} free")
