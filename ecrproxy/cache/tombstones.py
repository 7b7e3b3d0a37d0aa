"""
Deleted answers of entries, hidden from lookups until their deletion is written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.write_behind import LATE


class Tombstones:
    """
    A time for each deleted answer: it, and older ones, are hidden. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deleted: dict[EntryKey, dict[frozenset[str], float]] = {}

    def add(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float) -> None:
        """
        Hide a tag's answers for some sets of types.

        @param asked: when ECR was asked. Answers to later requests stay visible.
        """
        with self._lock:
            if key in self._deleted or len(self._deleted) < LATE:  # as many as changes may wait
                self._deleted.setdefault(key, {}).update(dict.fromkeys(accepts, asked))

    def remove(self, key: EntryKey, accepts: Iterable[frozenset[str]]) -> None:
        """
        Hide answers for these sets of types no longer: there are new ones.
        """
        with self._lock:
            deleted = self._deleted.get(key, {})
            for accept in accepts:
                deleted.pop(accept, None)

    def clear(self) -> None:
        """
        Hide nothing any more: all deletions are written.
        """
        with self._lock:
            self._deleted.clear()

    def of(self, key: EntryKey) -> Mapping[frozenset[str], float]:
        """
        Return the sets of types whose answers are hidden, with the time up to which they are.
        """
        with self._lock:
            return dict(self._deleted.get(key, {}))


def visible(entry: Entry, deleted: Mapping[frozenset[str], float], now: float) -> Entry | None:
    """
    Return what is left of an entry without the deleted answers; None if nothing is.
    """
    answers = {
        accept: known
        for accept, known in entry.answers.items()
        if accept not in deleted or known.is_newer(deleted[accept], now)
    }
    return replace(entry, answers=answers) if answers else None
