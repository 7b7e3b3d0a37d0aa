"""
Certificates that the daemon has read, and reads again when their files have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
    @param what: what the log calls the files.
    @param reread: reads them, as SIGHUP does.
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
        looks = Reading(what, lambda: any(each.changed() for each in parts), self._looked, in_thread, clock)
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
