"""
Files that the daemon has read, and reads again when they have changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.application.service import Service

from ecrproxy.files import Reading
from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from ecrproxy.threads import InThread

LOOK_SECONDS: Final = 60.0
"""How often the files are looked at."""
PAIRS: Final = "Key and certificate"
"""What the log calls them."""


class Files:
    """
    Files, and all files below directories, as they were when they were last noted.
    """

    def __init__(self, paths: Iterable[str | None]) -> None:
        self._paths = [path for path in paths if path is not None]
        self._noted: Sequence[tuple[int, ...]] = ()

    def note(self, seen: Sequence[tuple[int, ...]]) -> None:
        """
        Take the files for known as they were when they were L{seen}, before they were read.

        What has changed since is read again.
        """
        self._noted = seen

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


def generation(seen: Iterable[Sequence[tuple[int, ...]]]) -> str:
    """
    Name files, of several parts, as they were L{seen}: whoever gets the same name has read the same files. Pure.
    """
    return hashlib.sha256(repr([list(each) for each in seen]).encode()).hexdigest()


class Changing(Protocol):
    """
    Something that was read from files.
    """

    def changed(self) -> bool:
        """Return True if the files have changed since. Blocks."""


class Renewal(Service):
    """
    Has certificates read again once their files have changed.

    @param in_thread: calls what blocks, in the thread that reads the files.
    @param reread: reads them, as SIGHUP does.
    @param clock: a reactor's.
    """

    def __init__(
        self,
        parts: Sequence[Changing],
        in_thread: InThread,
        reread: Callable[[], object],
        clock: Any,  # noqa: ANN401
    ) -> None:
        self._reread = reread
        looks = Reading(PAIRS, lambda: any(each.changed() for each in parts), self._looked, in_thread, clock)
        self._looking = Periodic("Looking for renewed certificates", looks.again, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._looking.start(LOOK_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._looking.stop()

    def _looked(self, changed: bool) -> None:  # noqa: FBT001
        if self.running and changed:
            self._reread()
