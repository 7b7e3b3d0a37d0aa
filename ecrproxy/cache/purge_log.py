"""
Which purges, by this process or others, this process has not heard of yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ecrproxy.cache.current_database import CurrentDatabase
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.sqlite import Rows
from ecrproxy.oci import Digest


@dataclass(frozen=True, slots=True)
class News:
    """
    Items purged by this process or others: memory must drop them.

    @ivar everything: True if the items are unknown, and all must be dropped.
    """

    everything: bool = False
    purged: Sequence[EntryKey | Digest] = ()

    def __bool__(self) -> bool:
        return self.everything or bool(self.purged)


class PurgeLog:
    """
    Reads the purges that the index lists. Called in one thread at a time.
    """

    def __init__(self, database: CurrentDatabase) -> None:
        self._database = database
        self._everything, self._generation = False, 0
        self._purged, self._heard, self._opened = frozenset[EntryKey](), float("-inf"), 0

    def start_over(self, rows: Rows) -> None:
        """
        Begin with another database. What was purged in the one before is unknown.
        """
        self._everything = self._database.opened > 1
        with contextlib.suppress(OSError):
            self._generation = rows.refresh()

    def read(self) -> News:
        """
        Return what was purged since the last call.

        @raise OSError: if that can't be read. The next call returns everything.
        """
        everything, self._everything = self._everything, False
        try:
            before, self._generation = self._generation, self._database.ask(lambda rows: rows.refresh())
            if everything or self._generation < before:
                return News(everything=True)
            if self._generation == before:
                return News()
            purged = self._database.ask(lambda rows: rows.purged_since(before))
        except OSError:
            self._everything = True  # the purged items are unknown, and will not be read again
            raise
        return News(everything=purged is None, purged=purged or ())

    def purged_while_waiting(
        self, news: News, waited: Mapping[EntryKey, float], written: Mapping[EntryKey, float]
    ) -> set[EntryKey]:
        """
        Choose the entries that were purged while they waited to be written: they must be deleted again.

        For some, the wait becomes known only after they are written, when the purge has been noticed already.

        @param news: the purges that were just read.
        @param waited: entries that waited, and since when.
        @param written: entries that were written late, and since when they had waited.
        """
        before, heard = self._purged, self._heard
        self._purged = frozenset(_plain(each) for each in news.purged if isinstance(each, EntryKey))
        self._heard = time.monotonic()
        late = {key for key, since in written.items() if since < heard and _plain(key) in before} if before else set()
        opened, self._opened = self._opened, self._database.opened
        unknown = news.everything and opened == self._opened  # too many to list, or unreadable
        if unknown or self._purged:
            late.update(key for key in {*written, *waited} if unknown or _plain(key) in self._purged)
        return late


def _plain(key: EntryKey) -> EntryKey:
    """
    Return an entry's key without its variant: the index does not keep all variants, and a purge covers all of them.
    """
    return key._replace(variant="")
