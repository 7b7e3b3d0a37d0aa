"""
A disk that obeys: Python imports this at the start of a daemon whose PYTHONPATH names this folder.

The file that C{HOSTILE_DISK} names holds a word. C{well}: the disk works. C{failing}: each access to the cache
directory is an input/output error. C{full}: nothing more can be written. C{slow}: each write and fsync takes a second.
C{hung}: no access returns before the word changes. C{HOSTILE_CACHE} is the cache directory.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

SECONDS: Final = 1.0
LOOK: Final = 0.05
_PATHS: Final = frozenset({"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.scandir", "os.utime"})
_WRITERS: Final = ("fsync", "ftruncate", "pwrite")
_READERS: Final = ("pread", "preadv")

_file = open(os.environ["HOSTILE_DISK"])  # noqa: SIM115, PTH123 (it stays open as long as the process)
_cache = os.environ["HOSTILE_CACHE"]
_pread = os.pread


def word() -> str:
    return _pread(_file.fileno(), 20, 0).decode().strip()


def disturb(*, writes: bool) -> None:
    """
    Do to one access what the word says.
    """
    now = word()
    if now == "failing":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if now == "full" and writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if now == "slow" and writes:
        time.sleep(SECONDS)
    while word() == "hung":
        time.sleep(LOOK)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _PATHS and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(_cache):
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        disturb(writes=writes and event not in ("os.listdir", "os.scandir"))


def disturbed(name: str, *, writes: bool) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(*arguments: Any) -> Any:
        disturb(writes=writes)
        return real(*arguments)

    return call


for each in _WRITERS:
    setattr(os, each, disturbed(each, writes=True))
for each in _READERS:
    setattr(os, each, disturbed(each, writes=False))
sys.addaudithook(audit)
