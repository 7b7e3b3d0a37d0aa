"""
Files that the daemon has read, and reads again when they have changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.periodic import Periodic

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
        self._noted = self.seen()

    def changed(self) -> bool:
        """
        Return True if a path leads to something else than it did. Blocks.
        """
        return self.seen() != self._noted

    def seen(self) -> list[tuple[int, ...]]:
        """
        Describe the files as they are now. Blocks.
        """
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


class Seen(Protocol):
    """
    Something that is read from files.
    """

    def seen(self) -> Sequence[object]:
        """Describe the files as they are now. Blocks."""


def generation(parts: Iterable[Seen]) -> str:
    """
    Name the files that C{parts} are read from: whoever gets the same name reads the same files. Blocks.
    """
    return hashlib.sha256(repr([each.seen() for each in parts]).encode()).hexdigest()


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
        self._looking = Periodic("Looking for renewed certificates", self._look, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._looking.start(LOOK_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._looking.stop()

    def _look(self) -> Deferred[None]:
        return self._in_thread(lambda: [each.changed() for each in self._parts]).addCallback(self._looked)

    def _looked(self, changed: Sequence[bool]) -> None:
        if self.running and any(changed):
            self._reread()
