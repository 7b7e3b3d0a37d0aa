"""
The one thread of a process that writes the index.

Changes wait for it in memory, so that nothing that serves a client waits for a slow disk or another process. Changes
that arrive while it writes are written together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.application.service import Service
from twisted.logger import Logger

if TYPE_CHECKING:
    from ecrproxy.cache.write_behind import WriteBehind

log = Logger()


class Scribe(Service):
    """
    Writes changes to the index while it runs. After that, callers write their own changes.

    @param post: runs a function in a thread; may be called from any thread.
    """

    def __init__(self, changes: WriteBehind, post: Callable[[Callable[[], None]], None]) -> None:
        self._changes, self._post = changes, post
        self._lock, self._at_work, self._again = threading.Lock(), False, False

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._changes.wake_writer = self._begin

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._changes.wake_writer = None

    def _begin(self) -> None:
        with self._lock:
            self._again, begun, self._at_work = self._at_work, self._at_work, True
        if not begun:
            try:
                self._post(self._write)
            except RuntimeError:  # no thread available: the changes are written within a second
                self._at_work = False

    def _write(self) -> None:
        more = True
        while more:
            try:
                self._changes.flush()
            except Exception:  # noqa: BLE001 (if one change fails, those behind it must still be made)
                log.failure("Writing the cache's index")
                self._again = True
            with self._lock:
                more = self._at_work = self._again
                self._again = False
