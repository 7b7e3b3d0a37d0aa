"""
Troubles with the cache's disk: one log line when a trouble begins, one when it is over.

Rules:

- A trouble begins with the first failed call, and is not logged again while it lasts.
- It is over when a call of its kind succeeds and none has failed for C{QUIET_SECONDS}. A full disk alternates between
  accepting small files and refusing large ones: that is one trouble, not one for each file.
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
# These say nothing about a file or a disk: this process, or the machine, has too many files open.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})


class TroubleKind(enum.Enum):
    """
    What fails.
    """

    WRITE = "the cache directory can't be written"
    READ = "the cache directory can't be read"
    OPEN = "no more files can be opened"
    ROOM = "the cache directory has no room"


def is_exhaustion(problem: OSError) -> bool:
    """
    Return True if the only cause is that too many files are open.
    """
    return problem.errno in _EXHAUSTED


class Troubles:
    """
    The troubles of one cache directory. Thread-safe.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._standing: dict[TroubleKind, tuple[str, float]] = {}

    @contextlib.contextmanager
    def noted(self, kind: TroubleKind) -> Iterator[None]:
        """
        Record whether the calls in the block succeed.
        """
        try:
            yield
        except OSError as problem:
            self.failed(kind, problem)
            raise
        else:
            self.succeeded(kind)

    def failed(self, kind: TroubleKind, problem: OSError) -> None:
        """
        Record a failure of this kind.
        """
        kind = TroubleKind.OPEN if is_exhaustion(problem) else kind
        why = problem.strerror or str(problem)
        with self._lock:
            begins = kind not in self._standing
            self._standing[kind] = why, self._now()
        if begins:
            log.error("{what}: {problem}; going on without it", what=_sentence(kind), problem=str(problem))

    def succeeded(self, *kinds: TroubleKind) -> None:
        """
        Record a success of these kinds. It implies that a file could be opened.
        """
        if not self._standing:  # the usual case; this is called at each use of a file
            return
        for kind in {*kinds, TroubleKind.OPEN}:
            with self._lock:
                _, last = self._standing.get(kind, ("", 0.0))
                if kind not in self._standing or 0 <= self._now() - last < QUIET_SECONDS:
                    continue
                del self._standing[kind]
            log.info("No more: {what}", what=kind.value)

    def standing(self) -> set[TroubleKind]:
        """
        Return the kinds that currently fail.
        """
        with self._lock:
            return set(self._standing)

    def reasons(self) -> list[str]:
        """
        Return the current failures and their causes, for people.
        """
        with self._lock:
            return [f"{kind.value}: {why}" for kind, (why, _) in self._standing.items()]


def _sentence(kind: TroubleKind) -> str:
    return kind.value[0].upper() + kind.value[1:]
