"""
Repair the index, slowly, in the background: adopt files without a row, drop rows without a file.

Rules:

- One process scans the directory at a time, under a lock that is released when it exits. Each of the others then
  starts over.
- A scan starts at most every ten minutes, because others may add or delete files; when a process starts, including
  entries of earlier versions; and when the index has been replaced. Processes that start together need one scan.
- A scan covers the whole directory in steps of a millisecond, and takes at most a twentieth of the time. Nothing
  waits for it.
- Names known on both sides are compared as text; only the rest are parsed as digests.
- An adopted file counts as used at its mtime, which is its last use. It is verified when it is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.cache.database import BusyError, UnusableError
from ecrproxy.cache.locks import open_in_place, own
from ecrproxy.cache.ownership import give
from ecrproxy.cache.takeover import take_over
from ecrproxy.oci import HEX_LENGTHS, Digest

if TYPE_CHECKING:
    from pathlib import Path

    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

PAUSE_SECONDS: Final = 600.0
"""Interval between the starts of two scans."""
BUSY_SECONDS: Final = 30.0
"""Delay after a scan that failed because another process was writing."""
TOGETHER_SECONDS: Final = 10.0
"""Processes that start within this time need one scan."""
LOOK_SECONDS: Final = 1.0
"""How often to check whether a scan is due."""
SHARE: Final = 20
"""Each pause is this many times as long as the work before it."""
STEP_SECONDS: Final = 0.001
"""Minimum duration of a step; slightly more is possible. The event loop needs the interpreter, too."""
STEP: Final = 50
"""Files adopted or dropped in one transaction."""
ABSENT_SECONDS: Final = 30 * 24 * 3600
"""Seconds to keep entries whose content is gone."""
SCRUBBING: Final = "scrub.lock"


def scrub(store: Store, make_room: Callable[[], object]) -> Iterator[None]:
    """
    Scan the directory once, in short steps. Called in a thread.

    @param make_room: called after files were adopted.
    @raise OSError: if the index can't be read or written.
    """
    store.index.check()
    yield
    adopted = 0
    for algorithm in filter(store.has_any, HEX_LENGTHS):
        for number in range(256):
            for count in _compare(store, algorithm, f"{number:02x}"):
                if count:
                    make_room()
                adopted += count
                yield
    for _ in take_over(store.root, store.index):  # last: ignores the limit; requested entries are imported before
        yield
    yield from store.index.forget_absent(store.now() - ABSENT_SECONDS)
    if adopted:
        log.info("Adopted {count} files of content that the cache's index did not know", count=adopted)


def _compare(store: Store, algorithm: str, prefix: str) -> Iterator[int]:
    """
    Compare one folder. Yields after each step the number of files adopted.
    """
    unknown = store.names(algorithm, prefix)
    for known in store.index.names(algorithm, prefix):
        gone = known - unknown
        unknown -= known
        for some in _digests(algorithm, prefix, gone):
            store.index.drop(some)
            yield 0
        yield 0
    for some in _digests(algorithm, prefix, unknown):
        found = [file for file in map(store.found, some) if file is not None]
        store.index.adopt(found)
        yield len(found)
    yield 0


def _digests(algorithm: str, prefix: str, names: set[str]) -> Iterator[list[Digest]]:
    """
    Yield digests in batches. Skips files with other names, which are not ours.
    """
    ordered = sorted(names)
    for at in range(0, len(ordered), STEP):
        some = []
        for name in ordered[at : at + STEP]:
            with contextlib.suppress(ValueError):
                if name.startswith(prefix):
                    some.append(Digest.parse(f"{algorithm}:{name}"))
        yield some


class Turn:
    """
    The right to scan a directory: one process has it at a time.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._fd = root, -1

    def take(self) -> bool:
        """
        Take it unless another process has it. On a file system without locks, every process may take it.
        """
        path = self._root / SCRUBBING
        try:
            self._fd = open_in_place(path, os.O_RDWR | os.O_CREAT)
            give(path, self._root)
            if own(self._fd, path):
                return True
        except OSError:
            return True
        self.end()
        return False

    def end(self) -> None:
        """
        Release it.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    __del__ = end


class Scrub(Service):
    """
    Compares the cache directory with its index.

    @param make_room: called after files were adopted, and once the totals are known.
    @param in_thread: runs the steps, in a thread of their own.
    """

    def __init__(self, store: Store, make_room: Callable[[], object], in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._make_room, self._in_thread, self._clock = store, make_room, in_thread, clock
        self._turn = Turn(store.root)
        self._next: IDelayedCall | None = None
        self._steps: Iterator[None] | None = None
        self._opened, self._began = 0, 0.0
        self._since, self._rest, self._told = clock.seconds(), float("-inf"), False

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._step()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None
            self._end()

    def _step(self) -> None:
        began = self._clock.seconds()
        step: Deferred[bool] = self._in_thread(self._work)
        step.addErrback(self._failed)
        step.addCallback(lambda more: self._go_on(began, more=more))

    def _failed(self, failure: Failure) -> bool:
        self._end()
        if failure.check(BusyError):  # until then the limit counts the known files only
            self._rest = self._clock.seconds() + BUSY_SECONDS
        if failure.check(OSError):
            log.warn("Can't compare the cache with its index: {problem}", problem=str(failure.value), once="scrub")
        else:
            log.failure("Comparing the cache with its index", failure)
        return False

    def _go_on(self, began: float, *, more: bool) -> None:
        if self.running:
            pause = SHARE * (self._clock.seconds() - began) if more else LOOK_SECONDS
            self._next = self._clock.callLater(pause, self._look)
        else:
            self._end()

    def _look(self) -> None:
        self._next = None
        if self._steps is not None or self._is_due():
            self._step()
        else:
            self._next = self._clock.callLater(LOOK_SECONDS, self._look)

    def _is_due(self) -> bool:
        """
        Return True unless a scan has started recently, and after everything that this process knows of.
        """
        index, now = self._store.index, self._clock.seconds()
        if index.database.opened != self._opened:
            self._opened, self._since, self._rest = index.database.opened, now, float("-inf")
        age, mine = self._store.now() - index.totals.compared, now - self._since
        together = TOGETHER_SECONDS if index.database.shared else 0
        return now >= self._rest and not 0 <= age < min(PAUSE_SECONDS, mine + together)

    def _work(self) -> bool:
        """
        Run a step. Called in a thread. Return False if there is nothing more to do.
        """
        index = self._store.index
        index.open()
        if self._steps is None or index.database.opened != self._opened:
            self._end()
            if index.database.shared and not self._turn.take():
                return False
            index.refresh()  # another process may have just finished its turn
            if not self._is_due():
                self._end()
                return False
            self._began, self._rest = self._store.now(), self._clock.seconds() + PAUSE_SECONDS
            self._steps = scrub(self._store, self._make_room)
        until = self._clock.seconds() + STEP_SECONDS
        for _ in self._steps:
            if self._clock.seconds() >= until:
                return True
        with contextlib.suppress(UnusableError):  # the index is read-only
            index.note_compared(self._began, self._opened)
        if not self._told:
            self._told, totals = True, index.totals
            log.info("The cache holds {total} bytes in {count} files", total=totals.blocks, count=totals.files)
            self._make_room()
        self._end()
        return False

    def _end(self) -> None:
        """
        Drop the scan and release the turn.
        """
        self._steps = None
        self._turn.end()
