"""
Files that the daemon has read, and reads again when they have changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

log = Logger()

LOOK_SECONDS: Final = 60.0
"""How often the files are looked at."""


class Files:
    """
    Files, and all files below directories, as they were when they were last noted.
    """

    def __init__(self, paths: Iterable[str | None]) -> None:
        self._paths = [path for path in paths if path is not None]
        self.note()

    def note(self) -> None:
        """
        Take the files as they are for known. Call this before they are read: what changes in between is read again.
        """
        self._seen = self._look()

    def changed(self) -> bool:
        """
        Return True if a path leads to something else than it did. Blocks.
        """
        return self._look() != self._seen

    def _look(self) -> list[tuple[int, ...]]:
        return [_signature(each) for path in self._paths for each in (path, *_below(path))]


def _below(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from (f"{folder}/{name}" for name in sorted(names))


def _signature(path: str) -> tuple[int, ...]:
    """
    Describe what C{path} leads to, behind symbolic links: Kubernetes swaps that of the whole directory.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (as it was given)
    except OSError:
        return ()
    # The change time tells of permissions, too.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Changing(Protocol):
    """
    Something that was read from files.
    """

    def changed(self) -> bool:
        """Return True if the files have changed since. Blocks."""


class Renewal(Service):
    """
    Has certificates read again once their files have changed.

    @param in_thread: calls what blocks.
    @param reread: reads them, as SIGHUP does.
    @param clock: a reactor's.
    """

    def __init__(
        self,
        parts: Sequence[Changing],
        in_thread: Callable[..., Deferred[Any]],
        reread: Callable[[], object],
        clock: Any,  # noqa: ANN401
    ) -> None:
        self._parts, self._in_thread, self._reread = parts, in_thread, reread
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._looking.start(LOOK_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._looking.stop()

    def _look(self) -> Deferred[None]:
        looked = self._in_thread(lambda: [each.changed() for each in self._parts])
        looked.addCallback(self._looked)
        return looked.addErrback(lambda failure: log.failure("Looking for renewed certificates", failure))

    def _looked(self, changed: Sequence[bool]) -> None:
        if self.running and any(changed):
            self._reread()
