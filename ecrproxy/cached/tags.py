"""
What ECR answered about tags.

Rules:

- ECR's answers about one tag take effect in the order of their requests, by any process. The number of a request is
  its time in microseconds since the epoch; its answer counts as of then.
- A 404 denies only answers of types that its client accepts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial

from twisted.logger import Logger

from ecrproxy.answers import Asked
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.memory import Memory
from ecrproxy.cache.store import Store
from ecrproxy.cached.entries import EntryCache, KeyedEntries
from ecrproxy.cached.permissions import UNWRITTEN_SECONDS, Permissions
from ecrproxy.cached.purge_count import PurgeCount
from ecrproxy.documents import Document
from ecrproxy.oci import Descriptor
from ecrproxy.ordering import KeyedLocks, Order
from ecrproxy.threads import Disk

log = Logger()

_ORDERS_BYTES = 2**20
_ORDER_BYTES = 2**10
"""Bytes of memory for the order of ECR's answers about tags, which matters for the seconds that a request takes."""
_WRITTEN_BYTES = 2**20
"""Bytes of memory for tags that were recently written to the index."""


class Tags:
    """
    Looks up, records and forgets tags.

    @param now: returns seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        entries: EntryCache,
        permissions: Permissions,
        purges: PurgeCount,
        now: Callable[[], float],
    ) -> None:
        self._store, self._disk, self._entries, self._permissions = store, disk, entries, permissions
        self._purges, self._now = purges, now
        self._locks = KeyedLocks()
        self._orders: Memory[EntryKey, Order] = Memory(_ORDERS_BYTES)
        self._written: Memory[tuple[EntryKey, frozenset[str]], float] = Memory(_WRITTEN_BYTES)
        self._to_write: set[tuple[EntryKey, frozenset[str]]] = set()
        self._recording = Counter[EntryKey]()

    def at_hand(self, asked: Asked) -> Entry | None:
        """
        Return a tag's entry if it is in memory.
        """
        return self._entries.held(asked.entry_key)

    async def entry(self, asked: Asked) -> Entry:
        """
        Return a tag's entry from memory or disk; an empty one if there is none.
        """
        return await self._entries.read(asked.entry_key) or Entry()

    async def last_known(self, asked: Asked) -> Entry:
        """
        Return ECR's last answer about a tag, to any process; an empty entry if the last answer was that there is none.

        Answers to other processes do not reach the memory, which serves tags for which ECR is asked anyway.
        """
        return await self._last_known(asked.entry_key) or Entry()

    async def _last_known(self, key: EntryKey) -> Entry | None:
        if not self._recording[key]:  # otherwise the memory is ahead of the index
            with contextlib.suppress(OSError):
                return await self._disk.reading(self._store.written, key) or Entry()
        return await self._entries.read(key)

    async def record(
        self, asked: Asked, question: int, descriptor: Descriptor, document: Document | None, since: int
    ) -> None:
        """
        Record ECR's answer about a tag.

        @param question: the number of the request. The answer is outdated if a later request has been answered.
        @param document: the manifest, if the cache had it already: the repository holds what it lists, too.
        @param since: number of purges noticed when ECR was asked. After another purge nothing is recorded.
        """
        if not self._purges.is_current(since):
            return
        key = asked.entry_key
        self._recording[key] += 1
        try:
            hold = partial(self._hold_newer, key, asked, question, descriptor, since)
            known, entry = await self._locks.run(key, hold)
            if entry is None:
                return
            changed = known is None or known.descriptor != descriptor
            facts: KeyedEntries = ()
            if changed and document is not None:
                repository = asked.route.repository
                if self._permissions.begin_writing(repository, descriptor):
                    facts = await self._permissions.learn(repository, descriptor, document, since)
            about = key, asked.accept
            written = self._written.get(about)
            due = changed or written is None or not 0 <= self._now() - written < UNWRITTEN_SECONDS
            if due and about not in self._to_write:  # otherwise the pending write includes this
                self._to_write.add(about)
                await self._locks.run(key, partial(self._write_latest, key, asked.accept))
            await self._entries.save(facts, since)
        finally:
            self._recording[key] -= 1
            if not self._recording[key]:
                del self._recording[key]

    async def _hold_newer(
        self, key: EntryKey, asked: Asked, question: int, descriptor: Descriptor, since: int
    ) -> tuple[Confirmed | None, Entry | None]:
        """
        Hold an answer in memory, unless it is outdated, or from before a purge.

        @return: the old answer, if there is one, and the new entry; None if the answer is not held.
        """
        before, when = await self.entry(asked), question / 1e6
        if not self._purges.is_current(since):
            return None, None
        known = before.answers.get(asked.accept)
        if not self._order(key).answer(asked.accept, descriptor.media_type, question):
            return None, None
        if known is not None and known.is_newer(when, self._now()):
            return None, None
        entry = before.with_answer(asked.accept, Confirmed(descriptor, min(when, self._now())))
        self._entries.hold(key, entry)
        return known, entry

    async def _write_latest(self, key: EntryKey, accept: frozenset[str]) -> None:
        """
        Write the latest answer about a tag for one set of types only: other processes may have newer ones for others.

        A late write does not bring back anything that was forgotten or purged meanwhile.
        """
        self._to_write.discard((key, accept))
        entry = self._entries.held(key)
        if entry is None or accept not in entry.answers:
            return
        self._written.put((key, accept), self._now(), 500 + 100 * len(accept))
        noted = False
        try:
            latest = [(key, Entry({accept: entry.answers[accept]}))]
            noted = await self._disk.writing(self._entries.write, latest, self._purges.number)
        except OSError as problem:
            log.debug("Not written to the index: {problem}", problem=problem)
        finally:
            if not noted:  # the next confirmation retries: the index may have the tag's previous digest
                self._written.drop((key, accept))

    def _order(self, key: EntryKey) -> Order:
        order = self._orders.get(key) or Order()
        self._orders.put(key, order, _ORDER_BYTES)
        return order

    async def forget(self, asked: Asked, question: int) -> None:
        """
        Forget a tag for which ECR answered 404. The content stays for other repositories and tags.

        Answers of types that the client does not accept stay: ECR was not asked for them.

        @param question: the number of the request. Answers to later ones stay.
        """
        key = asked.entry_key
        if (entry := self._entries.held(key)) is not None:  # at once: a slow write of it may come first
            self._deny(key, asked, question, entry)
        await self._locks.run(key, partial(self._forget, key, asked, question))

    async def _forget(self, key: EntryKey, asked: Asked, question: int) -> None:
        since, entry = self._purges.number, await self._last_known(key)
        denied = self._deny(key, asked, question, entry, holds=self._purges.is_current(since))
        if denied or not (entry and entry.answers):  # an earlier version may know of it what can't be imported yet
            with contextlib.suppress(OSError):
                await self._disk.writing(self._store.deny, key, denied, question / 1e6)

    def _deny(
        self, key: EntryKey, asked: Asked, question: int, entry: Entry | None, *, holds: bool = True
    ) -> AbstractSet[frozenset[str]]:
        """
        Drop the answers that a 404 denies from memory, and hide them. Return their sets of types.

        @param entry: the known entry; None if it can't be read, as on a disk that hangs: it may exist.
        @param holds: True to hold the rest of the entry in memory.
        """
        types, newer, when = {asked.accept: ""}, set[frozenset[str]](), question / 1e6
        if entry is not None:
            types = {accept: known.descriptor.media_type for accept, known in entry.answers.items()}
            newer = {accept for accept, known in entry.answers.items() if known.is_newer(when, self._now())}
        left = self._order(key).forget(asked.accept, question, types) | newer
        if types and left == types.keys():
            return set()
        denied = types.keys() - left
        self._entries.drop(key)
        if entry is not None and left and holds:
            self._entries.hold(key, replace(entry, answers={accept: entry.answers[accept] for accept in left}))
        if types:
            self._store.index.hide_answers(key, denied, when)  # even if the thread fails
        for accept in denied:
            self._written.drop((key, accept))
        return denied

    def forget_purged(self) -> None:
        """
        Drop the tags that are being recorded from memory: the purge may not have seen them.
        """
        for key in self._recording:
            self._entries.drop(key)
