"""
Uses of content, collected in memory and written once a second.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ecrproxy.cache.cells import File
from ecrproxy.cache.current_database import CurrentDatabase
from ecrproxy.cache.database import BusyError
from ecrproxy.cache.paths import arriving_path, content_path
from ecrproxy.cache.presence import is_there, status_of
from ecrproxy.cache.write_behind import LATE, WriteBehind
from ecrproxy.oci import Digest

COMING_SECONDS: Final = 60.0
"""Seconds to keep the use of a file that is still arriving, to record it with the file."""


class Uses:
    """
    Which files were used, verified or found gone since that was last written. Thread-safe.

    The event loop may call all but L{write}.
    """

    def __init__(self, root: Path, now: Callable[[], float], database: CurrentDatabase, changes: WriteBehind) -> None:
        self._root, self._now, self._database, self._changes = root, now, database, changes
        self._lock = threading.Lock()
        self._used: OrderedDict[Digest, float] = OrderedDict()
        self._verified: dict[Digest, float] = {}
        self._gone: set[Digest] = set()

    def use(self, digest: Digest) -> None:
        """
        Record that a file of content is used now.
        """
        with self._lock:
            self._gone.discard(digest)
            self._used[digest] = self._now()
            self._used.move_to_end(digest)

    def verified(self, digest: Digest) -> None:
        """
        Record that a file of content matches its digest. Does not count as a use.
        """
        with self._lock:
            self._verified[digest] = self._now()

    def gone(self, digest: Digest) -> None:
        """
        Record that a file of content was not found.
        """
        with self._lock:
            self._used.pop(digest, None)
            self._gone.add(digest)

    def added(self, digest: Digest) -> None:
        """
        Forget that a file was not found: it has been added.
        """
        with self._lock:
            self._gone.discard(digest)

    def dropped(self, digests: Iterable[Digest]) -> None:
        """
        Forget uses of files that were removed.
        """
        with self._lock:
            for each in digests:
                self._used.pop(each, None)

    def last(self, digest: Digest) -> tuple[float, float | None]:
        """
        Return the last use and verification that are not written; minus infinity and None if there are none.
        """
        with self._lock:
            return self._used.get(digest, float("-inf")), self._verified.get(digest)

    def unwritten(self) -> Mapping[Digest, float]:
        """
        Return all uses that are not written, the first one first.
        """
        with self._lock:
            return dict(self._used)

    def write(self) -> None:
        """
        Write them, and what was verified or found gone.

        @raise OSError: if that fails. It is retried.
        """
        with self._lock:
            used, self._used = self._used, OrderedDict()
            verified, self._verified = self._verified, {}
            gone, self._gone = self._gone, set()
        try:
            if used or verified:
                unknown = self._database.ask(lambda rows: rows.use(used, verified))
                self._changes.note_free()
                self._adopt({each: used[each] for each in unknown})
            absent = [each for each in gone if not self._is_there(each)]
            if absent:
                self._database.ask(lambda rows: rows.drop(absent, (), self._is_there))
        except OSError as problem:
            if isinstance(problem, BusyError):
                self._changes.note_busy()
            with self._lock:
                self._used = OrderedDict([*used.items(), *self._used.items()][-LATE:])
                if len(self._verified) + len(self._gone) < LATE:
                    self._verified, self._gone = {**verified, **self._verified}, gone | self._gone
            raise

    def _adopt(self, used: Mapping[Digest, float]) -> None:
        """
        Add rows for files that have none, and keep the uses of those that are still arriving.

        @raise OSError: if the index can't be written.
        """
        found = [(each, self._status(each)) for each in used]
        there = [File(each, seen.st_size, used[each]) for each, seen in found if seen is not None]
        if there:
            self._database.ask(lambda rows: rows.add_all(there))
        self._keep_coming([each for each, seen in found if seen is None], used)

    def _keep_coming(self, digests: Sequence[Digest], used: Mapping[Digest, float]) -> None:
        """
        Keep uses of arriving files until they become content.
        """
        now = self._now()
        recent = [each for each in digests if 0 <= now - used[each] < COMING_SECONDS]
        coming = [each for each in recent if status_of(self._root / arriving_path(each)) or self._status(each)]
        with self._lock:
            for each in coming:
                self._used.setdefault(each, used[each])

    def _status(self, digest: Digest) -> os.stat_result | None:
        return status_of(self._root / content_path(digest))

    def _is_there(self, digest: Digest) -> bool:
        return is_there(self._root / content_path(digest))
