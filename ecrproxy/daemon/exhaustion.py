"""
Ends a process that has no memory or no threads left.

Such a process neither serves nor exits: requests and the event loop fail in random places. A separate thread regularly
tries to get some memory and a thread. If that fails, the process releases threads that it does not need; after several
failures in a row it exits with one line, so that its supervisor starts another.
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
"""Failures in a row before the process exits: a short lack of memory passes."""
BEGIN_SECONDS: Final = 10.0
"""Timeout for a new thread to start running: on a busy machine it waits for a CPU."""
PIECE: Final = 8 * 2**20
"""Bytes of memory to try: as many as a thread's stack."""
_MEMORY: Final = "Out of memory: ending; raise the limit of memory or address space (MemoryMax, ulimit -v)"
_THREADS: Final = "No thread can be started: ending; raise the limit of threads (TasksMax, pids.max, ulimit -u)"


def look() -> str | None:
    """
    Return what this process has run out of; None if nothing.
    """
    begun = _thread.allocate_lock()
    begun.acquire()
    try:
        mmap.mmap(-1, PIECE).close()  # bypasses the free memory that Python and malloc keep
        _thread.start_new_thread(begun.release, ())
    except (MemoryError, OSError):
        return _MEMORY
    except RuntimeError:
        return _THREADS
    # Not Thread.start(): it waits forever if the thread has no memory to start with.
    return None if begun.acquire(timeout=BEGIN_SECONDS) else _THREADS


class Orphaned:
    """
    A check for workers that still run long after their parent has exited: the event loop hangs, and keeps the port.

    @param limit: seconds for which a worker may outlive its parent.
    @param parent: returns the id of the parent process.
    @param seconds: a monotonic clock.
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
        Check the parent, then what L{look} checks.
        """
        if self._parent() == self._first:
            self._since = self._seconds()
        elif self._seconds() - self._since > self._limit:
            return "The parent has exited, and this worker does not end: ending now"
        return look()


class Exhaustion(Service):
    """
    Checks regularly that memory and threads are available.

    @param end: exits the process; called with the reason, in the thread that checks.
    @param relieve: releases resources that the process can do without; called in the same thread after each failure.
    @param look: see L{look}.
    @param sleep: sleeps for a number of seconds.
    """

    def __init__(
        self,
        end: Callable[[str], object],
        relieve: Callable[[], object],
        look: Callable[[], str | None] = look,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        # Not time.sleep(): it may fail while the clock is being set.
        self._end, self._relieve, self._look, self._sleep = end, relieve, look, sleep or Event().wait

    def startService(self) -> None:  # noqa: D102
        super().startService()
        Thread(target=self.watch, name="ecrproxy-exhaustion", daemon=True).start()

    def watch(self) -> None:
        """
        Check in a loop. Runs in a thread.
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
