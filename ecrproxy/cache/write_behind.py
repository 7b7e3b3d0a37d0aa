"""
Changes of the index that wait to be written, in order.

Rules:

- Changes are written as soon as possible. Those that wait at the same time share one transaction.
- Changes that fail because another process writes, or the disk is full, are retried.
- In a daemon one thread writes (see L{Scribe}). Only callers that need scarce space wait for it, and not for long.
- After a wait for the index has timed out, only C{Index.settle} waits for it during the next few seconds. Other callers
  fail, or leave their change pending: if all of them waited, they would time out one after the other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar, cast

from twisted.logger import Logger

from ecrproxy.cache.current_database import CurrentDatabase
from ecrproxy.cache.database import BusyError, FullError
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.sqlite import Rows

log = Logger()
T = TypeVar("T")

LATE: Final = 10_000
"""Maximum number of changes that wait for a retry. Beyond it the oldest are lost."""
LATE_SAVES: Final = LATE // 10
"""Number of waiting changes beyond which entries are no longer accepted."""
LATE_ENTRIES: Final = 20_000
"""Number of waiting entries beyond which others are refused: a change may have a thousand, of a kilobyte each."""
OCCUPIED_SECONDS: Final = 5.0
"""Seconds during which only C{Index.settle} waits for another process, or the disk, after a wait has timed out."""
WAIT_SECONDS: Final = 2.0
"""Seconds to wait for a change that another thread writes."""
TOGETHER: Final = 1000
"""Maximum number of changes in one transaction."""
_LATE_SECONDS: Final = 0.25
"""Wait after which another process may have purged an entry before it was written."""


@dataclass(eq=False, slots=True)
class Change:
    """
    A pending change.

    @ivar promised: bytes of disk that it reserves, beyond those already counted.
    @ivar name: the name of that reservation.
    @ivar saves: the keys of the entries that it saves.
    @ivar since: when it began to wait.
    @ivar over: set when it was made or has failed; None to retry until it succeeds.
    @ivar outcome: its result.
    """

    make: Callable[[Rows], object]
    promised: int = 0
    name: str = ""
    saves: Sequence[EntryKey] = ()
    since: float = 0.0
    over: threading.Event | None = None
    outcome: object = None

    def end(self, outcome: object) -> None:
        """
        Set the result and wake the waiting thread.
        """
        self.outcome = outcome
        if self.over is not None:
            self.over.set()


class WriteBehind:
    """
    The changes that wait to be written. Thread-safe.

    @param drained: called when nothing waits, before a further change can.
    @ivar busy: number of changes that had to wait for another process.
    @ivar wake_writer: makes another thread call L{flush}; None if callers write their own changes.
    @ivar disk_is_full: True if the last flush found the disk full.
    @ivar trouble: why changes can't be written; empty if they can.
    """

    wake_writer: Callable[[], object] | None = None

    def __init__(self, database: CurrentDatabase, drained: Callable[[], object]) -> None:
        self._database, self._drained = database, drained
        self._flushing, self._lock = threading.RLock(), threading.Lock()
        self._waiting: deque[Change] = deque(maxlen=LATE)
        self._making: Sequence[Change] = ()
        self._singly, self._was_late = 0, False
        self._saved_late: dict[EntryKey, float] = {}
        self._occupied_until = float("-inf")
        self.busy, self.disk_is_full, self.trouble = 0, False, ""

    def append(self, change: Change) -> None:
        """
        Add a change, which the next flush makes.
        """
        change.since = time.monotonic()
        with self._lock:
            self._waiting.append(change)

    def change(self, make: Callable[[Rows], object], promised: int = 0, name: str = "") -> None:
        """
        Make a change, now or as soon as possible.
        """
        self.append(Change(make, promised, name))
        self.flush_soon()

    def change_now(self, make: Callable[[Rows], T]) -> T:
        """
        Make a change now, after all pending ones.

        @raise OSError: if it fails or takes too long. After a timeout it may have been made.
        """
        waiting = Change(make, over=(over := threading.Event()))
        self.refuse_if_occupied()
        self.append(waiting)
        self.flush_soon()
        if not over.wait(0 if self.wake_writer is None else WAIT_SECONDS):
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            if self.wake_writer is not None and not self.is_occupied:
                self.note_busy()
            raise BusyError("the index takes too long to be written")
        if isinstance(waiting.outcome, OSError):
            raise waiting.outcome
        return cast("T", waiting.outcome)

    def wait(self) -> None:
        """
        Wait until all pending changes are written.

        @raise OSError: if they aren't in time.
        """
        if self.is_pending:
            self.change_now(lambda _: None)

    # What waits

    @property
    def is_pending(self) -> bool:
        """
        Return True if any change waits, or is being written.
        """
        return bool(self._waiting or self._making)

    @property
    def is_crowded(self) -> bool:
        """
        Return True if so many changes wait that only those that must not be lost are accepted.
        """
        return len(self._waiting) >= LATE_SAVES

    @property
    def accepts_entries(self) -> bool:
        """
        Return False if so many changes or entries wait that no more entries are accepted.
        """
        return not self.is_crowded and sum(len(each.saves) for each in self.pending()) < LATE_ENTRIES

    def pending(self) -> Sequence[Change]:
        """
        List the changes that wait, or are being written.
        """
        with self._lock:
            return *self._making, *self._waiting

    @property
    def promised(self) -> int:
        """
        Return the bytes of disk reserved by pending changes, which the totals do not include yet.
        """
        return sum(each.promised for each in self.pending())

    def promised_to(self, name: str) -> int:
        """
        Return the most bytes of disk that a pending change reserves under this name.
        """
        return max((each.promised for each in self.pending() if each.name == name), default=0)

    def take_late(self) -> tuple[Sequence[Change], dict[EntryKey, float]]:
        """
        Return the pending changes, and the entries that have been written late since the last call.

        @return: the entries with the time since when they had waited.
        """
        with self._lock:
            late, self._saved_late = self._saved_late, {}
            return (*self._making, *self._waiting), late

    def take_lateness(self) -> bool:
        """
        Return True if a change waits, or has waited for long since the last call.
        """
        late, self._was_late = self.is_pending or self._was_late, False
        return late

    # When another process keeps the index locked

    @property
    def is_occupied(self) -> bool:
        """
        Return True if a recent wait for the index has timed out. Callers should not wait for it.
        """
        return time.monotonic() < self._occupied_until

    def refuse_if_occupied(self) -> None:
        """
        Raise L{BusyError} if a recent wait for the index has timed out.
        """
        if self.is_occupied:
            raise BusyError("another process has been writing to the index for seconds")

    def note_busy(self) -> None:
        """
        Record that a wait for the index has timed out: during C{OCCUPIED_SECONDS}, only C{Index.settle} waits for it.
        """
        self.busy += 1
        self._occupied_until = time.monotonic() + OCCUPIED_SECONDS

    def note_free(self) -> None:
        """
        Record that the index was written, so that callers wait for it again.
        """
        self._occupied_until = float("-inf")

    # Writing

    def flush_soon(self) -> None:
        """
        Make the pending changes, or have another thread make them.
        """
        (self.wake_writer or self.flush)()

    def flush(self, *, waiting: bool = False) -> None:
        """
        Make the pending changes.

        @param waiting: True to wait for another process even if others have waited in vain.
        """
        if not waiting and self.is_occupied:
            return
        with self._flushing:
            if not waiting and self.is_occupied:  # the previous holder of the lock found out
                return
            self.disk_is_full = False
            while some := self._take():
                try:
                    outcomes = self._database.ask(partial(_make, some))
                except OSError as problem:
                    self._put_off(some, problem)
                    return
                except Exception:  # a retry would not help, and later changes must not wait forever
                    if len(some) == 1:
                        self._end(some, [BusyError("it can't be changed")])
                        raise
                    self._singly = len(some)
                    self._put_back(some)
                else:
                    self._end(some, outcomes)
                    self.note_free()
                    self.trouble = ""

    def _take(self) -> Sequence[Change]:
        """
        Take the changes for one transaction.
        """
        with self._lock:
            count = min(len(self._waiting), 1 if self._singly else TOGETHER)
            self._making = [self._waiting.popleft() for _ in range(count)]
            self._singly = max(0, self._singly - 1)
            if not self._making:
                self._drained()
            return self._making

    def _end(self, some: Sequence[Change], outcomes: Sequence[object]) -> None:
        if time.monotonic() - some[0].since > _LATE_SECONDS:
            self._was_late, saved = True, saved_by(some)
            with self._lock:
                if len(self._saved_late) < LATE_ENTRIES:
                    self._saved_late.update(saved)
        self._making = ()
        for each, outcome in zip(some, outcomes, strict=True):
            each.end(outcome)

    def _put_off(self, some: Sequence[Change], problem: OSError) -> None:
        """
        Queue changes for a retry, except those that a thread waits for.
        """
        if isinstance(problem, BusyError):
            self.note_busy()
        else:
            self.disk_is_full, self.trouble = isinstance(problem, FullError), str(problem)
            log.warn("The cache's index can't be written: {problem}", problem=str(problem), once="index")
        self._put_back([each for each in some if each.over is None])
        for each in some:
            each.end(problem)

    def _put_back(self, some: Sequence[Change]) -> None:
        with self._lock:
            self._making = ()
            self._waiting.extendleft(reversed(some))


def saved_by(some: Iterable[Change]) -> dict[EntryKey, float]:
    """
    Return the keys of the entries that changes save, and when the last change of each began to wait.
    """
    return {key: each.since for each in some for key in each.saves}


def _make(some: Sequence[Change], rows: Rows) -> Sequence[object]:
    """
    Make changes, all or none.
    """
    if len(some) == 1:
        return [some[0].make(rows)]
    with rows.together():
        return [each.make(rows) for each in some]
