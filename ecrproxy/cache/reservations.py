"""
Disk space that this process has reserved for its transfers, and the files that they have become.

Each process adds these to every database that it opens in place of another: the other one may have had them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Final

from ecrproxy.cache.cells import File, on_disk
from ecrproxy.cache.current_database import CurrentDatabase
from ecrproxy.cache.database import BusyError, UnusableError
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.write_behind import WriteBehind
from ecrproxy.oci import Digest

PLENTY: Final = 64
"""
Divisor of the free space that may be reserved before that is written. Other processes do the same, and their
reservations are seen a second late: this many processes together stay within the limit.
"""


class Reservations:
    """
    The reservations of this process. Thread-safe.

    @param is_there: returns True if a file of content exists.
    """

    def __init__(self, database: CurrentDatabase, changes: WriteBehind, is_there: Callable[[Digest], bool]) -> None:
        self._database, self._changes, self._is_there = database, changes, is_there
        self._lock = threading.Lock()
        self._promised: dict[str, tuple[Reservation, int]] = {}
        self._files: dict[Digest, File] = {}

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Reserve C{size} bytes for a transfer, whose claim is held.

        @param limit: maximum bytes of disk for all files and the index.
        @return: the excess in bytes; 0 if the bytes are reserved.
        @raise OSError: if the index can't be written, or others may have one that this process can't open.
        """
        if self._database.shut_out:
            raise UnusableError(self._database.trouble)
        if self.has_plenty(on_disk(size), limit):
            self._arrive(what, size, 0, 0)  # nothing has been counted for it, and nothing needs to wait for the disk
            return 0
        opened = self._database.opened
        self._changes.refuse_if_occupied()  # check this first: no change is in flight that would have to be undone
        try:
            excess = self._changes.change_now(lambda rows: rows.reserve(what, size, limit - self._database.files.size))
        except BusyError:
            if self._changes.wake_writer is not None:  # it may be in progress
                self.end([what])
                self._changes.change(lambda rows: rows.drop((), [what]))
            raise
        if not excess:
            with self._lock:
                self._promised[what.name] = what, size
            if opened not in (0, self._database.opened):  # it may be in the previous database
                self._changes.change(self.put_back)
        return excess

    def has_plenty(self, size: int, limit: int) -> bool:
        """
        Return True if there is so much free space that some can be reserved before that is written.
        """
        if self._changes.wake_writer is None or self._database.shut_out or self._changes.is_crowded:
            return False
        totals = self._database.rows.totals
        free = limit - self._database.files.size - totals.blocks - totals.arriving
        return (self._changes.promised + size) * PLENTY <= free

    def arrive(self, what: Reservation, size: int, written: float = 0) -> None:
        """
        Add an arriving file, whatever the limit, or an interrupted one. Its claim is held.

        @param written: when it was last written; 0 while it is in progress.
        """
        self._arrive(what, size, written, self._counted(what.name))

    def _arrive(self, what: Reservation, size: int, written: float, counted: int) -> None:
        if written:
            self.end([what])
        else:
            with self._lock:
                self._promised[what.name] = what, size
        more = max(0, on_disk(size) - counted)
        self._changes.change(lambda rows: rows.arrive(what, size, written), more, what.name)

    def _counted(self, name: str) -> int:
        """
        Return the bytes of disk counted for a transfer, written or not.
        """
        waiting = self._changes.promised_to(name)  # first: it may be written meanwhile
        with contextlib.suppress(OSError):
            return max(waiting, self._database.ask(lambda rows: rows.room_of(name)))
        return waiting

    def promised(self, what: Reservation) -> int:
        """
        Return the bytes of disk reserved by this process under the same name.
        """
        with self._lock:
            return on_disk(self._promised.get(what.name, (what, 0))[1])

    def add(self, file: File, arriving: Reservation | None) -> None:
        """
        Note a new file of content, whose reservation ends.
        """
        with self._lock:
            self._files[file.digest] = file._replace(verified=None)
        self.end([] if arriving is None else [arriving])

    def end(self, arriving: Iterable[Reservation]) -> None:
        """
        End reservations, unless their names have been taken since.
        """
        with self._lock:
            for each in arriving:
                if self._promised.get(each.name, (None, 0))[0] == each:
                    del self._promised[each.name]

    def files(self) -> list[Digest]:
        """
        List the new files that the database may lack: it may have been replaced since they were added.
        """
        with self._lock:
            return list(self._files)

    def forget_files(self, digests: Iterable[Digest]) -> None:
        """
        Forget new files: the database that has them is still the current one.
        """
        with self._lock:
            for each in digests:
                self._files.pop(each, None)

    def put_back(self, rows: Rows) -> None:
        """
        Add all of them to a database that was opened in place of another.

        @raise OSError: if it can't be written.
        """
        with self._lock:
            promised, files = list(self._promised.values()), list(self._files.values())
        if promised:
            rows.put_back(promised)
        there = [each for each in files if self._is_there(each.digest)]
        if there:
            rows.add_all(there)
