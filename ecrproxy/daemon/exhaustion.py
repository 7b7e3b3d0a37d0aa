"""
Ends a process that has no memory or no threads left.

Such a process neither serves nor ends: each request fails in another place, and so does the event loop. A thread of its
own asks for a little of either. When that fails, the process gives back the threads that it does not need; when it has
failed several times in a row, the process ends with one line, for its supervisor to start another.
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
import os
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Final

from twisted.application.service import Service

PAUSE_SECONDS: Final = 1.0
TRIES: Final = 5
"""How often in a row a look has to fail: a moment without memory passes."""
BEGIN_SECONDS: Final = 10.0
"""How long a thread that was started may take to begin: on a busy machine it waits for a processor."""
PIECE: Final = 8 * 2**20
"""Bytes of memory that are asked for: a thread's stack has as many."""
_MEMORY: Final = "Out of memory: ending; raise the limit of memory or address space (MemoryMax, ulimit -v)"
_THREADS: Final = "No thread can be started: ending; raise the limit of threads (TasksMax, pids.max, ulimit -u)"


def look() -> str | None:
    """
    Tell what this process can't have any more; none if all is well.
    """
    begun = _thread.allocate_lock()
    begun.acquire()
    try:
        mmap.mmap(-1, PIECE).close()  # not what Python or malloc may still have in store
        _thread.start_new_thread(begun.release, ())
    except (MemoryError, OSError):
        return _MEMORY
    except RuntimeError:
        return _THREADS
    # Not Thread.start(): that waits for ever for a thread that has no memory to begin with.
    return None if begun.acquire(timeout=BEGIN_SECONDS) else _THREADS


class Orphaned:
    """
    A look that finds a worker still there long after its parent has exited: its event loop hangs, and keeps the port.

    @param limit: seconds for which a worker may outlive its parent.
    @param parent: returns the id of the parent process.
    @param seconds: the time, on a clock that nobody sets.
    """

    def __init__(
        self,
        limit: float,
        parent: Callable[[], int] = os.getppid,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._parent, self._seconds = limit, parent, seconds
        self._first, self._since = parent(), seconds()

    def __call__(self) -> str | None:
        """
        Look at the parent, and at what L{look} looks at.
        """
        if self._parent() == self._first:
            self._since = self._seconds()
        elif self._seconds() - self._since > self._limit:
            return "The parent has exited, and this worker does not end: ending now"
        return look()


class Exhaustion(Service):
    """
    Looks whether there is memory, and threads, as long as it runs.

    @param end: ends the process; told why, in the thread that looks.
    @param relieve: gives back what the process can do without. Called in the thread that looks, each time that fails.
    @param look: see L{look}.
    @param sleep: waits so many seconds.
    """

    def __init__(
        self,
        end: Callable[[str], object],
        relieve: Callable[[], object],
        look: Callable[[], str | None] = look,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        # Not time.sleep(): that may fail while the clock is being set.
        self._end, self._relieve, self._look, self._sleep = end, relieve, look, sleep or Event().wait

    def startService(self) -> None:  # noqa: D102
        super().startService()
        Thread(target=self.watch, name="ecrproxy-exhaustion", daemon=True).start()

    def watch(self) -> None:
        """
        Look again and again. Called in a thread.
        """
        failed = 0
        while self.running:
            self._sleep(PAUSE_SECONDS)
            problem = self._look()
            failed = failed + 1 if problem else 0
            if problem and failed >= TRIES:
                self._end(problem)
                return
            if problem:
                with contextlib.suppress(MemoryError):
                    self._relieve()
