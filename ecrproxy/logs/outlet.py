"""
A file that never blocks its callers: a thread writes to it from a bounded queue.

A pipe or a socket blocks when its reader stops, and a disk may hang. O_NONBLOCK is no alternative: it would change the
pipe for all processes that share it.
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


class Writable(Protocol):
    """
    A file that can be written to.
    """

    def write(self, data: bytes, /) -> object:
        """Write all bytes."""

    def flush(self) -> object:
        """Flush buffers."""


class RawFile:
    """
    An open file by its descriptor, without Python's buffers.

    While a thread waits for the lock of C{sys.stdout}'s buffer, the interpreter can't exit.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        """
        Write all of C{data}, even if another process has made the file non-blocking.
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
        Do nothing: there is no buffer.
        """


class Outlet:
    """
    Writes bytes to a file: directly until C{start}, then in a thread.

    @param limit: maximum bytes in the queue.
    """

    def __init__(self, file: Writable, limit: int = QUEUED_BYTES) -> None:
        self._file, self._limit = file, limit
        self._changed = threading.Condition()  # reentrant, because a signal handler may log too
        self._queue: deque[bytes | Callable[[], object]] = deque()
        self._bytes = 0
        self._lost: Counter[bool] = Counter()
        self._threaded = False

    def start(self, tick: Callable[[], object]) -> None:
        """
        Write in a thread from now on. Call after the daemon has forked: a child would lack the thread.

        @param tick: called by that thread about once a second, unless the file blocks.
        """
        threading.Thread(target=self._run, args=(tick,), name="ecrproxy-log", daemon=True).start()
        self._threaded = True  # after the start: if it fails, the error must still be written

    def write(self, data: bytes, *, of_requests: bool = False) -> None:
        """
        Queue whole lines, or count them as lost if the queue is full.

        @param of_requests: True for lines that clients cause, in any number: part of the queue is reserved for others.
        """
        room = self._limit * 3 // 4 if of_requests else self._limit
        with self._changed:
            if self._threaded and self._bytes + len(data) > room:
                self._lost[of_requests] += data.count(b"\n")
                return
        self._enqueue(data, len(data))

    def call(self, work: Callable[[], object]) -> None:
        """
        Call a function between two writes, for example to replace the file.
        """
        self._enqueue(work, 0)

    def take_lost(self) -> tuple[int, int]:
        """
        Return how many lines have been lost since the last call, once there is room to report them.

        @return: all lost lines, and those of requests among them.
        """
        with self._changed:
            if self._bytes > self._limit // 2:
                return 0, 0
            lost, self._lost = self._lost, Counter()
        return lost.total(), lost[True]

    def drain(self, seconds: float) -> bool:
        """
        Wait up to C{seconds} until everything is written; return True if it is.
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
        except OSError:  # the reader has closed, or the disk is full
            if isinstance(item, bytes):
                with self._changed:
                    self._lost[False] += item.count(b"\n")
