"""
The history in a file of the cache directory, so that it survives restarts.

Only charts depend on it, so nothing waits for it: a thread writes it each minute, and an unreadable file is replaced.
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
"""In bytes. Usual size: 20,000; twice that if all counts are large."""
LARGEST_COUNT: Final = 2**63
"""Larger numbers are invalid: adding up huge numbers from a forged file could take seconds."""


def told(history: History, when: float) -> bytes:
    """
    Serialize a history.

    @param when: now, in seconds since the epoch.
    """
    scales = {name: list(steps.kept) for name, steps in history.steps.items()}
    return json.dumps({"when": when, "scales": scales}, separators=(",", ":")).encode() + b"\n"


def recalled(data: bytes, when: float) -> History:
    """
    Parse what L{told} serialized. The time since then counts as idle; a time in the future counts as now.

    @raise ValueError: if it is invalid.
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
    Read the history of a cache directory; return an empty one if it is missing or invalid. Blocks.
    """
    try:
        with open_file(root / NAME) as file:
            return recalled(file.read(LARGEST_FILE), when)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as problem:
        said = "The status page starts with an empty history: {file} can't be read: {problem}"
        log.warn(said, file=f"{root}/{NAME}", problem=problem)
    return History()


def write(root: Path, data: bytes) -> None:
    """
    Replace the history of a cache directory by C{data}, unless another process is writing it. Blocks.

    @raise OSError: if that fails; the previous file stays.
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
    Writes a history regularly.

    @param root: the cache directory.
    @param now: returns seconds since the epoch.
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
