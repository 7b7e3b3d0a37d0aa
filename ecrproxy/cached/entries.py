"""
Entries of the index, with a copy of the recently used ones in memory.

Entries that wait to be written are dropped when a purge is noticed: the index did not list them, so the purge may have
missed them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from twisted.logger import Logger

from ecrproxy.answers import ANY
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.store import Store
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.oci import Descriptor, Digest
from ecrproxy.threads import Disk

log = Logger()

KeyedEntries = Sequence[tuple[EntryKey, Entry]]
_ENTRIES_BYTES = 8 * 2**20
"""Bytes of memory for entries."""


class EntryCache:
    """
    Reads entries from memory or the index, and writes them to both.

    @param now: returns seconds since the epoch.
    """

    def __init__(self, store: Store, disk: Disk, purges: PurgeCount, now: Callable[[], float]) -> None:
        self._store, self._disk, self._purges, self._now = store, disk, purges, now
        self._memory: Memory[EntryKey, Entry] = Memory(_ENTRIES_BYTES)
        self._unwritten: dict[EntryKey, Entry] = {}

    def held(self, key: EntryKey) -> Entry | None:
        """
        Return an entry if it is in memory.
        """
        return self._memory.get(key)

    def at_hand(self, key: EntryKey) -> Entry | None:
        """
        Return an entry from memory, written or not. A fact applies to every cache key.
        """
        found = self._memory.get(key) or self._unwritten.get(key)
        if found is None and key.variant and not key.is_tag:
            key = key._replace(variant="")
            found = self._memory.get(key) or self._unwritten.get(key)
            known = found.answers.get(ANY) if found else None
            return found if known is not None and known.manifest is not None else None
        return found

    async def read(self, key: EntryKey) -> Entry | None:
        """
        Return an entry from memory or disk, empty if there is none; None if it can't be read.
        """
        entry = self._memory.get(key)
        if entry is None:
            with contextlib.suppress(OSError):
                entry = await self._disk.reading(self._store.entry, key) or Entry()
        return entry

    async def read_fact(self, key: EntryKey) -> Confirmed | None:
        """
        Return what is known of an object named by its digest, from memory or disk, with whatever cache key.
        """
        entry = self.at_hand(key)
        with contextlib.suppress(OSError):
            entry = entry or await self._disk.reading(self._store.entry, key)
        return entry.answers.get(ANY) if entry is not None else None

    def confirmed(self, descriptor: Descriptor, manifest: Digest | None = None) -> Entry:
        """
        Return an entry for an object named by its digest that ECR has confirmed now.

        @param manifest: see L{Confirmed}.
        """
        return Entry({ANY: Confirmed(descriptor, self._now(), manifest)})

    def hold(self, key: EntryKey, entry: Entry) -> None:
        """
        Hold an entry in memory.
        """
        self._memory.put(key, entry, entry.weight)

    def hold_all(self, entries: KeyedEntries, since: int) -> None:
        """
        Hold entries of the index, unless a purge has been noticed since: they may have been deleted.

        @param since: number of purges noticed before they were read or written.
        """
        for key, entry in entries if self._purges.is_current(since) else ():
            self.hold(key, entry)

    def hold_unwritten(self, entries: KeyedEntries) -> None:
        """
        Hold entries that are about to be written, so that L{at_hand} finds them, until L{release_unwritten}.
        """
        self._unwritten.update(entries)

    def release_unwritten(self, entries: KeyedEntries) -> None:
        """
        Release entries of L{hold_unwritten}, after they have been written or given up.
        """
        for key, entry in entries:
            if self._unwritten.get(key) is entry:
                del self._unwritten[key]

    def drop(self, key: EntryKey) -> None:
        """
        Drop an entry from memory.
        """
        self._memory.drop(key)

    async def save(self, entries: KeyedEntries, since: int) -> None:
        """
        Store entries on disk and in memory, unless a purge has been noticed since.
        """
        try:
            if entries:
                await self._disk.writing(self.write, entries, since)
            self.hold_all(entries, since)
        except OSError as problem:
            log.debug("Not written to the index: {problem}", problem=problem)
        finally:
            self.release_unwritten(entries)

    def write(self, entries: KeyedEntries, since: int) -> bool:
        """
        Store entries in the index, unless a purge has been noticed since. Called in a thread, possibly late.

        @param since: number of purges noticed when ECR was asked.
        @return: True if they are stored, or will be.
        """
        return self._purges.is_current(since) and self._store.save(*entries)

    def forget_purged(self, news: News) -> None:
        """
        Drop purged entries from memory with every cache key: it may hold variants that the index has not kept.

        Drop entries that are not written, too: the purge did not see them.
        """
        self._unwritten.clear()
        if news.everything:
            self._memory.clear()
        purged = {each._replace(variant="") for each in news.purged if isinstance(each, EntryKey)}
        if purged:
            for key in [each for each in self._memory if each._replace(variant="") in purged]:
                self._memory.drop(key)
