"""
The history in a file of the cache directory, so that a restart does not begin a new one.

What is lost with it is charts, so nothing waits for it: it is written each minute in a thread, and what can't be read
is begun anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.admin.history import SAMPLE_SECONDS, History, Sample
from ecrproxy.files import open_file
from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.threads import InThread

log = Logger()

NAME: Final = "history.json"
WRITE_SECONDS: Final = 60
LARGEST_FILE: Final = 2**20
"""Bytes. It has some 20,000, and twice that where all counts are large."""
LARGEST_COUNT: Final = 2**63
"""More is no count: a file that somebody wrote could have numbers that take seconds to add up."""


def told(history: History, when: float) -> bytes:
    """
    Write a history.

    @param when: now, in seconds since the epoch.
    """
    scales = {name: list(steps.kept) for name, steps in history.steps.items()}
    return json.dumps({"when": when, "scales": scales}, separators=(",", ":")).encode() + b"\n"


def recalled(data: bytes, when: float) -> History:
    """
    Read what L{told} wrote. In the time since then there was nothing; if that is in the future, no time has passed.

    @raise ValueError: if it is anything else.
    """
    try:
        document = json.loads(data)
        history, missed = History(), int(max(0.0, when - document["when"]) / SAMPLE_SECONDS)
        for name, steps in history.steps.items():
            kept = ((_count(turns, steps.samples), _sample(*sample)) for turns, sample in document["scales"][name])
            steps.kept.extend(kept)
            if missed:
                steps.note(Sample(), missed)
    except (ArithmeticError, KeyError, TypeError, RecursionError) as problem:
        raise ValueError(f"it is no history: {problem!r}") from None
    return history


def _sample(*counts: Any) -> Sample:  # noqa: ANN401
    *numbers, took = counts
    if len(took) != len(Sample().took):
        raise ValueError("times of another version")
    return Sample.of(map(_count, numbers), map(_count, took))


def _count(number: object, most: int = LARGEST_COUNT) -> int:
    if type(number) is not int or not 0 <= number <= most:
        raise ValueError("a number that counts nothing")
    return number


def read(root: Path, when: float) -> History:
    """
    Read the history of a cache directory; a new one if there is none, or none that can be read. Blocks.
    """
    try:
        with open_file(root / NAME) as file:
            return recalled(file.read(LARGEST_FILE), when)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as problem:
        said = "The status page begins a new history: {file} can't be read: {problem}"
        log.warn(said, file=f"{root}/{NAME}", problem=problem)
    return History()


def write(root: Path, data: bytes) -> None:
    """
    Put C{data} in the place of the history of a cache directory, unless another process is about to. Blocks.

    @raise OSError: if that can't be done; what was there stays.
    """
    draft = f"{root}/{NAME}.new"
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as opened, contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.lstat(draft)
        if os.path.samestat(os.fstat(file), status):  # else the other has put it in place meanwhile
            if status.st_nlink > 1:
                Path(draft).unlink()
                raise OSError(errno.EMLINK, "it is a link to a file elsewhere", draft)
            opened.truncate()
            opened.write(data)
            opened.flush()
            Path(draft).replace(root / NAME)


class KeptHistory(Service):
    """
    Writes a history now and then.

    @param root: the cache directory.
    @param now: seconds since the epoch.
    """

    def __init__(
        self, root: Path, history: History, now: Callable[[], float], in_thread: InThread, clock: IReactorTime
    ) -> None:
        self._root, self._history, self._now, self._in_thread = root, history, now, in_thread
        self._loop = Periodic("Writing the status page's history", self._turn, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(WRITE_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    def _turn(self) -> object:
        return self._in_thread(write, self._root, told(self._history, self._now()))
