"""
Repair the index, slowly, in the background: adopt files without a row, drop rows without a file.

Rules:

- It goes over the whole directory in short steps, and takes a twentieth of the time at the most. Nobody waits for it.
- It begins at the start, with what earlier versions have left; again now and then, for others may bring or delete
  files; and at once when the index has been replaced.
- A file that is adopted counts as used when it was modified, which is its last use. It is verified when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.cache.index import is_gone
from ecrproxy.cache.store import names_in
from ecrproxy.cache.takeover import take_over
from ecrproxy.oci import HEX_LENGTHS, Digest

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

    from ecrproxy.cache.store import Store
    from ecrproxy.threads import InThread

log = Logger()

PAUSE_SECONDS: Final = 600.0
"""How long after it has gone over the directory it begins again."""
LOOK_SECONDS: Final = 1.0
"""How often it looks whether the index has been replaced."""
SHARE: Final = 20
"""A pause is so many times as long as the step before it."""
STEP: Final = 100
"""Files that are adopted in one step."""
ABSENT_SECONDS: Final = 30 * 24 * 3600
"""How long entries whose content is gone are kept."""
_PREFIX: Final = re.compile(r"[0-9a-f]{2}")


def scrub(store: Store, tidy: Callable[[], None]) -> Iterator[None]:
    """
    Go over the directory once, in short steps. Called in a thread.

    @param tidy: makes room again, where files were adopted.
    @raise OSError: if the index can't be read or written.
    """
    store.index.check()
    yield
    yield from take_over(store)
    adopted = 0
    for algorithm, folder in store.folders():
        if _PREFIX.fullmatch(folder.name):
            for count in _compare(store, algorithm, folder, tidy):
                adopted += count
                yield
    yield from store.index.forget_absent(store.now() - ABSENT_SECONDS)
    if adopted:
        log.info("Adopted {count} files of content that the cache's index did not know", count=adopted)


def _compare(store: Store, algorithm: str, folder: Path, tidy: Callable[[], None]) -> Iterator[int]:
    """
    Compare a folder, and yield after each step how many files were adopted.
    """
    length = HEX_LENGTHS[algorithm] - len(folder.name)
    first, last = (Digest(algorithm, folder.name + each * length) for each in "0f")
    there = names_in(algorithm, folder)
    known = {first} if store.index.known(first) is not None else set()
    page = store.index.files(first, last)
    while page:
        known.update(each.digest for each in page)
        page = store.index.files(page[-1].digest, last)
    gone = [each for each in known - there if is_gone(store.root / store.content_path(each))]
    if gone:
        store.index.drop(gone)
    unknown = sorted(there - known, key=str)
    for at in range(0, len(unknown), STEP):
        found = [file for file in map(store.found, unknown[at : at + STEP]) if file is not None]
        store.index.adopt(found)
        tidy()
        yield len(found)
    yield 0


class Scrub(Service):
    """
    Compares the cache directory with its index.

    @param tidy: makes room again, where files were adopted, and once it is known how much there is.
    @param in_thread: where it works; a thread of its own.
    """

    def __init__(self, store: Store, tidy: Callable[[], None], in_thread: InThread, clock: IReactorTime) -> None:
        self._store, self._tidy, self._in_thread, self._clock = store, tidy, in_thread, clock
        self._next: IDelayedCall | None = None
        self._steps: Iterator[None] | None = None
        self._opened, self._due = 0, 0.0

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._step()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _step(self) -> None:
        began = self._clock.seconds()
        step: Deferred[bool] = self._in_thread(self._work)
        step.addErrback(self._failed)
        step.addCallback(lambda more: self._go_on(began, more=more))

    def _failed(self, failure: Failure) -> bool:
        self._steps = None
        if failure.check(OSError):
            log.warn("Can't compare the cache with its index: {problem}", problem=str(failure.value), once="scrub")
        else:
            log.failure("Comparing the cache with its index", failure)
        return False

    def _go_on(self, began: float, *, more: bool) -> None:
        now = self._clock.seconds()
        if not more:
            self._due = now + PAUSE_SECONDS
        if self.running:
            self._next = self._clock.callLater(SHARE * (now - began) if more else LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._next = None
        if self._steps is not None or self._clock.seconds() >= self._due or self._opened != self._store.index.opened:
            self._step()
        else:
            self._next = self._clock.callLater(LOOK_SECONDS, self._look)

    def _work(self) -> bool:
        """
        Do a step, called in a thread; return False once the whole directory was compared.
        """
        opened = self._store.index.opened
        if self._steps is None or opened != self._opened:
            self._opened, self._steps = opened, scrub(self._store, self._tidy)
        for _ in self._steps:
            return True
        self._steps = None
        if not self._store.counted:
            self._store.counted, totals = True, self._store.index.totals
            log.info("The cache holds {total} bytes in {count} files", total=totals.blocks, count=totals.files)
            self._tidy()
        return False
