"""
Repair the index, slowly, in the background: adopt files without a row, drop rows without a file.

Rules:

- One process goes over the directory at a time, under a lock that goes with it. Each of the others goes on, from the
  start, should it exit.
- It begins every ten minutes at the most, for others may bring or delete files; when a process starts, with what
  earlier versions have left; and when the index has been replaced. Processes that start together need it once.
- It goes over the whole directory in steps of a millisecond, and takes a twentieth of the time at the most. Nobody
  waits for it.
- What is known on both sides is compared as text; digests are made of the rest.
- A file that is adopted counts as used when it was modified, which is its last use. It is verified when it is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.cache.database import BusyError, UnusableError
from ecrproxy.cache.index import give
from ecrproxy.cache.locks import open_in_place, own
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
"""How long after its beginning it begins again."""
BUSY_SECONDS: Final = 30.0
"""How long after one that met another process's writing."""
TOGETHER_SECONDS: Final = 10.0
"""Processes that start within this time need it once."""
LOOK_SECONDS: Final = 1.0
"""How often it looks whether it is due."""
SHARE: Final = 20
"""A pause is so many times as long as the work before it."""
STEP_SECONDS: Final = 0.001
"""How long it works before it pauses, or a little longer: the interpreter is the event loop's, too."""
STEP: Final = 50
"""Files that are adopted or dropped together."""
ABSENT_SECONDS: Final = 30 * 24 * 3600
"""How long entries whose content is gone are kept."""
SCRUBBING: Final = "scrub.lock"


def scrub(store: Store, make_room: Callable[[], object]) -> Iterator[None]:
    """
    Go over the directory once, in short steps. Called in a thread.

    @param make_room: called where files were adopted.
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
    for _ in take_over(store.root, store.index):  # last: it keeps no limit, and what is asked for is imported before
        yield
    yield from store.index.forget_absent(store.now() - ABSENT_SECONDS)
    if adopted:
        log.info("Adopted {count} files of content that the cache's index did not know", count=adopted)


def _compare(store: Store, algorithm: str, prefix: str) -> Iterator[int]:
    """
    Compare a folder, and yield after each step how many files were adopted.
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
    Yield digests, some at a time; files of other names are somebody else's.
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
    The right to go over a directory: one process has it at a time.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._fd = root, -1

    def take(self) -> bool:
        """
        Take it, unless another process has it; it is everybody's on a file system without locks.
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
        Let others have it.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    __del__ = end


class Scrub(Service):
    """
    Compares the cache directory with its index.

    @param make_room: called where files were adopted, and once it is known how much there is.
    @param in_thread: where it works; a thread of its own.
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
        if failure.check(BusyError):  # until then the limit counts what is known
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
        Return True unless a process has begun not long ago, and none of what this one knows of came after that.
        """
        index, now = self._store.index, self._clock.seconds()
        if index.opened != self._opened:
            self._opened, self._since, self._rest = index.opened, now, float("-inf")
        age, mine = self._store.now() - index.totals.compared, now - self._since
        together = TOGETHER_SECONDS if index.shared else 0
        return now >= self._rest and not 0 <= age < min(PAUSE_SECONDS, mine + together)

    def _work(self) -> bool:
        """
        Do a step, called in a thread; return False if there is nothing more to do.
        """
        index = self._store.index
        index.open()
        if self._steps is None or index.opened != self._opened:
            self._end()
            if index.shared and not self._turn.take():
                return False
            index.refresh()  # whoever had the turn has just come to the end
            if not self._is_due():
                self._end()
                return False
            self._began, self._rest = self._store.now(), self._clock.seconds() + PAUSE_SECONDS
            self._steps = scrub(self._store, self._make_room)
        until = self._clock.seconds() + STEP_SECONDS
        for _ in self._steps:
            if self._clock.seconds() >= until:
                return True
        with contextlib.suppress(UnusableError):  # one that can only be read
            index.note_compared(self._began, self._opened)
        if not self._told:
            self._told, totals = True, index.totals
            log.info("The cache holds {total} bytes in {count} files", total=totals.blocks, count=totals.files)
            self._make_room()
        self._end()
        return False

    def _end(self) -> None:
        """
        Let another process have its turn.
        """
        self._steps = None
        self._turn.end()
