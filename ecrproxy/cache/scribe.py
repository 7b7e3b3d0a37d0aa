"""
The one thread of a process that writes the index.

What is to be written waits for it in memory, and nobody who serves a client waits for a disk, or another process, that
takes long. What came while it was writing is written together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.application.service import Service
from twisted.logger import Logger

if TYPE_CHECKING:
    from ecrproxy.cache.index import Index

log = Logger()


class Scribe(Service):
    """
    Writes what is to be changed of the index, as long as it runs. Then whoever has something changed does it himself.

    @param post: has a function called in a thread, whichever thread asks.
    """

    def __init__(self, index: Index, post: Callable[[Callable[[], None]], None]) -> None:
        self._index, self._post = index, post
        self._lock, self._at_work, self._again = threading.Lock(), False, False

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._index.elsewhere = self._begin

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._index.elsewhere = None

    def _begin(self) -> None:
        with self._lock:
            self._again, begun, self._at_work = self._at_work, self._at_work, True
        if not begun:
            try:
                self._post(self._write)
            except RuntimeError:  # the machine gives no thread: it is written within a second
                self._at_work = False

    def _write(self) -> None:
        more = True
        while more:
            try:
                self._index.catch_up()
            except Exception:  # noqa: BLE001 (whatever one change's trouble, those behind it are made)
                log.failure("Writing the cache's index")
                self._again = True
            with self._lock:
                more = self._at_work = self._again
                self._again = False
