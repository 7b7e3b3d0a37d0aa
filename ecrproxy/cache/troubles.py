"""
What is wrong with the cache's disk: one line in the log when it begins, one when it is over.

Rules:

- A trouble begins with the first call that fails, and is not told again for as long as it lasts.
- It is over when a call of its kind succeeds, and none has failed for C{QUIET_SECONDS}. A full disk takes small files
  and refuses large ones by turns: that is one trouble, not one for each file.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import threading
from collections.abc import Callable, Iterator
from typing import Final

from twisted.logger import Logger

log = Logger()

QUIET_SECONDS: Final = 10.0
# These say nothing about a file or a disk: it is this process, or this machine, that has too much open.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})


class Kind(enum.Enum):
    """
    What can't be done.
    """

    WRITE = "the cache directory can't be written"
    READ = "the cache directory can't be read"
    OPEN = "no more files can be opened"
    ROOM = "the cache directory has no room"


def is_exhaustion(problem: OSError) -> bool:
    """
    Tell whether it is only that too many files are open.
    """
    return problem.errno in _EXHAUSTED


class Troubles:
    """
    Those of one cache directory, told by threads.

    @param now: seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._standing: dict[Kind, tuple[str, float]] = {}

    @contextlib.contextmanager
    def noted(self, kind: Kind) -> Iterator[None]:
        """
        Note how the calls in the block end.
        """
        try:
            yield
        except OSError as problem:
            self.failed(kind, problem)
            raise
        else:
            self.succeeded(kind)

    def failed(self, kind: Kind, problem: OSError) -> None:
        """
        Note that something of C{kind} could not be done.
        """
        kind = Kind.OPEN if is_exhaustion(problem) else kind
        why = problem.strerror or str(problem)
        with self._lock:
            begins = kind not in self._standing
            self._standing[kind] = why, self._now()
        if begins:
            log.error("{what}: {problem}; going on without it", what=_sentence(kind), problem=str(problem))

    def succeeded(self, *kinds: Kind) -> None:
        """
        Note that something of these kinds could be done, which took opening a file too.
        """
        if not self._standing:  # as a rule; it is asked at each use of a file
            return
        for kind in {*kinds, Kind.OPEN}:
            with self._lock:
                _, last = self._standing.get(kind, ("", 0.0))
                if kind not in self._standing or 0 <= self._now() - last < QUIET_SECONDS:
                    continue
                del self._standing[kind]
            log.info("No more: {what}", what=kind.value)

    def standing(self) -> set[Kind]:
        """
        Tell what can't be done.
        """
        with self._lock:
            return set(self._standing)

    def reasons(self) -> list[str]:
        """
        Say what is wrong.
        """
        with self._lock:
            return [f"{kind.value}: {why}" for kind, (why, _) in self._standing.items()]


def _sentence(kind: Kind) -> str:
    return kind.value[0].upper() + kind.value[1:]
