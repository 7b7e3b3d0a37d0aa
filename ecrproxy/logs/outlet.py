"""
A file that never makes its callers wait: a thread writes to it, from a queue that is bounded.

A pipe or a socket blocks when its reader stops, and a disk may hang. Setting O_NONBLOCK instead would change the pipe
for every process that shares it.
"""

from __future__ import annotations

import os
import select
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, Protocol

QUEUED_BYTES: Final = 2**20
TICK_SECONDS: Final = 1.0


class File(Protocol):
    """
    What can be written to.
    """

    def write(self, data: bytes, /) -> object:
        """Take bytes, all of them."""

    def flush(self) -> object:
        """Let them go."""


class Descriptor:
    """
    An open file by its descriptor, past any buffer of Python's.

    While a thread waits for the lock of C{sys.stdout}'s buffer, the interpreter can't exit.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        """
        Write all of C{data}, also where another process has made the file non-blocking.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()

    def flush(self) -> None:
        """
        Do nothing: nothing is buffered here.
        """


class Outlet:
    """
    Passes bytes to a file: directly until C{start}, in a thread from then on.

    @param limit: bytes that may wait to be written.
    """

    def __init__(self, file: File, limit: int = QUEUED_BYTES) -> None:
        self._file, self._limit = file, limit
        self._changed = threading.Condition()  # reentrant: a signal handler may log, too
        self._queue: deque[bytes | Callable[[], object]] = deque()
        self._bytes = 0
        self._lost: Counter[bool] = Counter()
        self._threaded = False

    def start(self, tick: Callable[[], object]) -> None:
        """
        Write in a thread from now on. Not before the daemon has forked: the child would lack the thread.

        @param tick: called by that thread about once a second, unless the file blocks.
        """
        threading.Thread(target=self._run, args=(tick,), name="ecrproxy-log", daemon=True).start()
        self._threaded = True  # not where no thread can be started: that is still to be written

    def write(self, data: bytes, *, of_requests: bool = False) -> None:
        """
        Write whole lines, or count them as lost if too much is waiting already.

        @param of_requests: whether clients make them, who can make any number: a part of the room is not for them.
        """
        room = self._limit * 3 // 4 if of_requests else self._limit
        with self._changed:
            if self._threaded and self._bytes + len(data) > room:
                self._lost[of_requests] += data.count(b"\n")
                return
        self._enqueue(data, len(data))

    def call(self, work: Callable[[], object]) -> None:
        """
        Do something with the file between two writes.
        """
        self._enqueue(work, 0)

    def take_lost(self) -> tuple[int, int]:
        """
        Return how many lines were lost since this was last asked, once there is room to tell of them.

        @return: all, and those of requests.
        """
        with self._changed:
            if self._bytes > self._limit // 2:
                return 0, 0
            lost, self._lost = self._lost, Counter()
        return lost.total(), lost[True]

    def drain(self, seconds: float) -> bool:
        """
        Wait until everything is written, but no longer than C{seconds}; tells whether it is.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, seconds)

    def _enqueue(self, item: bytes | Callable[[], object], size: int) -> None:
        with self._changed:
            if self._threaded:
                self._queue.append(item)
                self._bytes += size
                self._changed.notify_all()
                return
        self._do(item)

    def _run(self, tick: Callable[[], object]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue, TICK_SECONDS)
                item = self._queue[0] if self._queue else None
            if item is None:
                tick()
                continue
            self._do(item)
            with self._changed:
                self._queue.popleft()
                self._bytes -= len(item) if isinstance(item, bytes) else 0
                self._changed.notify_all()

    def _do(self, item: bytes | Callable[[], object]) -> None:
        try:
            if isinstance(item, bytes):
                self._file.write(item)
                self._file.flush()
            else:
                item()
        except OSError:  # the reader has gone, or the disk is full
            if isinstance(item, bytes):
                with self._changed:
                    self._lost[False] += item.count(b"\n")
