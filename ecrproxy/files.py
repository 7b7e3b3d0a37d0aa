"""
The operator's files: settings, certificates, passwords. They are read at start, and reloaded while the daemon runs.

Anything may replace them, and their file system may hang: neither stops the daemon.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

    from ecrproxy.threads import InThread

log = Logger()

READ_SECONDS: Final = 10.0
"""How long reading may take before it is logged and callers stop waiting."""

_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """
    Open a regular file for reading. Blocks only as long as its file system does; opening a FIFO waits for a writer.

    @raise OSError: if it can't be opened or is not a regular file.
    """
    require_regular(path)
    # O_NONBLOCK, in case a FIFO replaces the file at this moment.
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))


def require_regular(path: str | os.PathLike[str]) -> None:
    """
    Check that a path leads to a regular file, without opening it: opening a device may have side effects. Blocks.

    @raise OSError: if it does not exist or is not a regular file.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 (as it was given)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))


def unread(problem: OSError) -> str:
    """
    Return the message that a file can't be read, with the daemon's user, which few operators know in a container.
    """
    by = f" by user {os.geteuid()}" if isinstance(problem, PermissionError) else ""
    return f"can't be read{by}: {problem.strerror or problem}"


class Files:
    """
    Detects changes of files, and of all files below directories, since they were last noted.
    """

    def __init__(self, paths: Iterable[str | None]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._noted: Sequence[tuple[int, ...]] = ()

    def note(self, seen: Sequence[tuple[int, ...]]) -> None:
        """
        Note the state of the files as L{seen} before they were read; later changes count as changes.
        """
        self._noted = seen

    def changed(self) -> bool:
        """
        Return True if a file has changed. Blocks.
        """
        return self.seen() != self._noted

    def seen(self) -> list[tuple[int, ...]]:
        """
        Return the current state of the files. Blocks.
        """
        return [_signature(each) for path in self._paths for each in (path, *_below(path))]


def _below(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from (f"{folder}/{name}" for name in sorted(names))


def _signature(path: str) -> tuple[int, ...]:
    """
    Describe what C{path} leads to, through symbolic links: Kubernetes swaps that of the whole directory.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (as it was given)
    except OSError:
        return ()
    # The ctime includes changes of permissions.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class FileReader:
    """
    Reloads files in a thread, one reading at a time.

    Requests during a reading cause one more afterwards. A reading that takes longer than C{READ_SECONDS} is logged,
    and callers stop waiting for it. Its result is still used, however late: it was requested, and nothing else has been
    read since. A thread can't be interrupted, so the next reading starts after that.

    @param what: names the files at the start of log lines.
    @param read: reads the files. Blocks; takes the arguments of L{again}.
    @param use: called in the reactor thread with the result.
    @param in_thread: calls C{read} in a thread.
    """

    def __init__(
        self,
        what: str,
        read: Callable[..., Any],
        use: Callable[[Any], object],
        in_thread: InThread,
        clock: IReactorTime,
    ) -> None:
        self._what, self._read, self._use, self._in_thread, self._clock = what, read, use, in_thread, clock
        self._limit: IDelayedCall | None = None
        """Timeout of the reading in progress; not active once that is late."""
        self._served, self._waiting = list[Deferred[None]](), list[Deferred[None]]()
        self._next: tuple[Any, ...] | None = None

    def again(self, *args: object) -> Deferred[None]:
        """
        Read. After several requests during a reading, the next one uses the arguments of the last.

        @return: fires when the result is in use, on failure, or when reading takes too long. Never fails.
        """
        self._next, asked = args, Deferred[None]()
        self._waiting.append(asked)
        if self._limit is None:
            self._begin(args)
        elif not self._limit.active():
            self._late()
        return asked

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._next, self._served, self._waiting = None, self._waiting, []
        self._limit = self._clock.callLater(READ_SECONDS, self._late)
        reading = self._in_thread(self._read, *args).addCallback(self._use)
        reading.addErrback(self._failed).addCallback(lambda _: self._ended())

    def _late(self) -> None:
        log.error(
            "{what}: not read within {seconds:g} s: see whether the file system hangs; what was read before is in use"
            " until the reading ends",
            what=self._what,
            seconds=READ_SECONDS,
            once=self._what,
        )
        self._waiting, self._served = [], [*self._served, *self._waiting]
        self._let_go()

    def _failed(self, failure: Failure) -> None:
        log.failure(
            "{what}: reading failed: {problem}", failure, what=self._what, problem=str(failure.value), once=self._what
        )

    def _ended(self) -> None:
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        self._limit = None
        self._let_go()
        if self._next is not None and self._limit is None:
            self._begin(self._next)

    def _let_go(self) -> None:
        served, self._served = self._served, []
        for each in served:
            each.callback(None)
