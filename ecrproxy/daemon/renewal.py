"""
Reloading certificates after their files have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.application.service import Service

from ecrproxy.files import FileReader
from ecrproxy.periodic import Periodic

if TYPE_CHECKING:
    from ecrproxy.threads import InThread

LOOK_SECONDS: Final = 60.0
"""Interval for checking the files."""
PAIRS: Final = "Key and certificate"
"""Their name in the log."""


def generation(seen: Iterable[Sequence[tuple[int, ...]]]) -> str:
    """
    Return a name for the state of files: the same signatures give the same name. Pure.
    """
    return hashlib.sha256(repr([list(each) for each in seen]).encode()).hexdigest()


class Changing(Protocol):
    """
    Something that is loaded from files.
    """

    def changed(self) -> bool:
        """Return True if the files have changed since they were read. Blocks."""


class Renewal(Service):
    """
    Reloads certificates after their files have changed.

    @param in_thread: runs blocking calls, in the thread that reads the files.
    @param what: the files' name in the log.
    @param reread: reloads them, as SIGHUP does.
    @param clock: a reactor's.
    """

    def __init__(
        self,
        parts: Sequence[Changing],
        in_thread: InThread,
        reread: Callable[[], object],
        clock: Any,  # noqa: ANN401
        *,
        what: str = PAIRS,
    ) -> None:
        self._reread = reread
        looks = FileReader(what, lambda: any(each.changed() for each in parts), self._looked, in_thread, clock)
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
