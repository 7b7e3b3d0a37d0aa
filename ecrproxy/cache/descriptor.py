"""
A file descriptor that threads use: it stays open until the last of them has finished.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator


class HeldFile:
    """
    An open file.

    @ivar fd: the file descriptor; -1 once it is closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock, self._users, self._closed = threading.Lock(), 0, False
        self._due: list[Callable[[], object]] = []

    @contextlib.contextmanager
    def using(self) -> Iterator[int]:
        """
        Use the file: a thread may do so after others have given it up.

        @raise OSError: if it is closed.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield self.fd
        finally:
            with self._lock:
                self._users -= 1
                self._settle()

    def once_unused(self, action: Callable[[], object]) -> None:
        """
        Call C{action} once no thread uses the file.
        """
        with self._lock:
            self._due.append(action)
            self._settle()

    def close(self, before: Callable[[], object]) -> None:
        """
        Once no thread uses the file, call C{before} and close it. From now on none can.
        """
        with self._lock:
            self._due.append(before)
            self._closed = True
            self._settle()

    def _settle(self) -> None:
        if self._users:
            return
        while self._due:
            self._due.pop(0)()
        if self._closed and self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
