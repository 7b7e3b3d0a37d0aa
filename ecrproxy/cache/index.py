"""
The index of a cache directory: knowledge about its content, in one SQLite database that may be lost.

Rules:

- The content is the truth. Absence of a row proves nothing: a file without a row is adopted, a row without a file is
  dropped. A lost index costs requests to ECR, and never makes an answer wrong.
- Uses are collected and written once a second (see L{Uses}). All other changes are written at once, in order (see
  L{WriteBehind}).
- Forgotten entries are hidden at once, even before that is written (see L{Tombstones}).
- Whatever is wrong with its files, there is a database: see L{CurrentDatabase}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ecrproxy.cache.cells import File, Move, Totals
from ecrproxy.cache.current_database import CurrentDatabase
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.presence import is_there
from ecrproxy.cache.purge_log import News, PurgeLog
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.cache.reservations import Reservations
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.tombstones import Tombstones, visible
from ecrproxy.cache.uses import Uses
from ecrproxy.cache.write_behind import Change, WriteBehind, saved_by
from ecrproxy.oci import Digest

ROOM: Final = 2**16
"""Bytes to evict if changes find the disk full: pages of the database and of its log."""


class Index:
    """
    The index of one cache directory. Thread-safe.

    The event loop may read attributes, and note uses; all other calls may block.

    @param root: the cache directory.
    @param now: returns seconds since the epoch.
    @param memory: True to keep the rows in memory only.
    @param before_opening: called before files are opened or created; raises if they must not be.
    @ivar database: the database in use.
    @ivar changes: the changes that wait to be written.
    @ivar uses: the uses that wait to be written.
    @ivar reservations: the disk space of this process's transfers.
    @ivar evict: evicts a number of bytes when the disk is full; returns False if it can't.
    """

    evict: Callable[[int], bool] = staticmethod(lambda _: False)

    def __init__(
        self,
        root: Path,
        now: Callable[[], float],
        *,
        memory: bool = False,
        before_opening: Callable[[], object] = lambda: None,
    ) -> None:
        self._root, self._now = root, now
        self.database = CurrentDatabase(root, now, self._adopt, memory=memory, before_opening=before_opening)
        self._tombstones, self._purge_log = Tombstones(), PurgeLog(self.database)
        self.changes = WriteBehind(self.database, drained=self._tombstones.clear)
        self.uses = Uses(root, now, self.database, self.changes)
        self.reservations = Reservations(self.database, self.changes, self._is_there)

    def _adopt(self, rows: Rows) -> None:
        """
        Use another database.
        """
        self._purge_log.start_over(rows)
        try:
            self.reservations.put_back(rows)
        except OSError:
            self.changes.append(Change(self.reservations.put_back))

    def _is_there(self, digest: Digest) -> bool:
        return is_there(self._root / content_path(digest))

    @property
    def totals(self) -> Totals:
        """
        Return the totals as this process knows them, at most a second old.
        """
        return self.database.rows.totals

    @property
    def size(self) -> int:
        """
        Return the bytes of disk that the index takes.
        """
        return self.database.files.size

    @property
    def taken(self) -> int:
        """
        Return the bytes of disk that content and the index take.
        """
        return self.totals.blocks + self.size

    @property
    def trouble(self) -> str:
        """
        Return why this process can't share its knowledge of the cache with others; empty if it can.
        """
        unwritable = self.changes.trouble
        return self.database.trouble or (f"the cache's index can't be written: {unwritable}" if unwritable else "")

    def open(self) -> None:
        """
        Open the database, unless that has been tried. The first query does this, too.
        """
        self.database.open()

    def close(self) -> None:
        """
        Write pending uses, and close the database.
        """
        with contextlib.suppress(OSError):
            self.uses.write()
        self.database.rows.close()

    # Once a second

    def settle(self) -> News:
        """
        Write pending changes, and return what was purged. Called every second, in a thread.
        """
        files, waited = self.reservations.files(), self.changes.pending()
        self.database.check_files()
        self.reservations.forget_files(files)
        late = self.changes.take_lateness()
        if self.changes.trouble and not self.changes.is_pending:
            self.changes.append(Change(Rows.try_writing))
        self.changes.flush(waiting=True)
        if self.changes.disk_is_full and self.evict(ROOM):  # not before: eviction makes changes, too
            self.changes.flush()
        with contextlib.suppress(OSError):
            if not (late and self.changes.is_occupied):
                self.uses.write()
        with contextlib.suppress(OSError):  # purges can be read even if nothing can be written
            news = self._purge_log.read()
            self._forget_purged(waited, news)
            return news
        return News()

    def _forget_purged(self, waited: Sequence[Change], news: News) -> None:
        """
        Forget entries that were purged while they waited to be written, or that still wait.

        @param waited: the changes that waited before uses were written.
        """
        waiting, written = self.changes.take_late()
        late = self._purge_log.purged_while_waiting(news, saved_by([*waited, *waiting]), written)
        if late:
            self.forget(*late)

    # Content

    def add(self, digest: Digest, size: int, arriving: Reservation | None = None, used: float | None = None) -> None:
        """
        Add a verified file of content, and end its reservation.

        @param used: its last use, if no client has requested it.
        """
        now = self._now()
        file = File(digest, size, now if used is None else used, now)
        self.uses.added(digest)
        self.reservations.add(file, arriving)
        told = {} if used is None else {"asked_for": False}
        self.changes.change(lambda rows: rows.add(file, arriving, **told))

    def adopt(self, files: Sequence[File]) -> None:
        """
        Add files that were found, unless they have rows.

        @raise OSError: if the index can't be written.
        """
        self.database.ask(lambda rows: rows.add_all(files))

    def drop(self, digests: Iterable[Digest] = (), arriving: Iterable[Reservation] = ()) -> None:
        """
        Remove files that are gone. One that has come back meanwhile stays.
        """
        digests, arriving = list(digests), list(arriving)
        self.uses.dropped(digests)
        self.reservations.end(arriving)
        self.changes.change(lambda rows: rows.drop(digests, arriving, self._is_there))

    def files(self, after: Digest | None = None) -> list[File]:
        """
        List content, ordered by digest, up to a thousand files.

        @param after: the last of the page before.
        @raise OSError: if the index can't be read.
        """
        return self.database.ask(lambda rows: rows.files(after))

    def names(self, algorithm: str, prefix: str) -> Iterator[set[str]]:
        """
        Yield the hashes of content that begin with C{prefix}, up to a thousand at once.

        @param prefix: an even number of hexadecimal digits.
        @raise OSError: if the index can't be read.
        """
        return self.database.each(lambda rows: rows.names(algorithm, prefix))

    def known(self, digest: Digest) -> File | None:
        """
        Look up a file of content. Uses and verifications that are not written yet count.

        @raise OSError: if the index can't be read.
        """
        used, verified = self.uses.last(digest)
        found = self.database.ask(lambda rows: rows.known(digest))
        return found and found._replace(used=max(found.used, used), verified=verified or found.verified)

    def least_recently_used(self) -> Iterator[File]:
        """
        Yield content, the least recently used first.

        @raise OSError: if the index can't be read.
        """
        if self.changes.wake_writer is None:
            with contextlib.suppress(OSError):
                self.uses.write()
        uses = self.uses.unwritten()
        used: dict[Digest, File] = {}
        for each in self.database.each(Rows.least_recently_used):
            if each.digest in uses:
                used[each.digest] = each
            else:
                yield each
        yield from (used[each]._replace(used=when) for each, when in uses.items() if each in used)

    # Transfers

    def pass_over(self, what: Reservation) -> None:
        """
        Count an interrupted transfer that some process has open as in progress until the next sweep.
        """
        self.changes.change(lambda rows: rows.pass_over(what))

    def arriving(self) -> list[Reserved]:
        """
        List all transfers: those in progress, then the interrupted ones, the longest unwritten first.

        @raise OSError: if the index can't be read.
        """
        return self.database.ask(lambda rows: rows.arriving())

    # Entries

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry. An unreadable one counts as absent.
        """
        with contextlib.suppress(OSError):
            return self._entry(key)
        return None

    def _entry(self, key: EntryKey) -> Entry | None:
        deleted, now = self._tombstones.of(key), self._now()  # first: it may be written meanwhile
        entry = self.database.ask(lambda rows: rows.entry(key))
        return entry if entry is None or not deleted else visible(entry, deleted, now)

    def written(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry as last written by any process.

        @raise OSError: if the index can't be read, or changes are still pending.
        """
        self.changes.wait()
        return self._entry(key)

    def save(
        self, entries: Sequence[tuple[EntryKey, Entry]], counts: Callable[[EntryKey], bool] = lambda _: True
    ) -> bool:
        """
        Save entries in one transaction. Each answer replaces an older one for the same set of types.

        @param counts: asked in the transaction; returns False if an entry must not be saved after all.
        @return: False if they are dropped because too many changes are pending: ECR can be asked again.
        """
        if not self.changes.accepts_entries:
            return False
        saves = [key for key, _ in entries]
        due = partial(filter, lambda each: counts(each[0]), entries)  # evaluated as they are written, not before
        self.changes.append(Change(lambda rows: rows.save(due(), self._now()), saves=saves))
        for key, entry in entries:
            self._tombstones.remove(key, entry.answers)
        self.changes.flush_soon()
        return True

    def forget(self, *keys: EntryKey) -> None:
        """
        Delete entries.
        """
        self.changes.change(lambda rows: rows.forget(keys))

    def forget_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float) -> None:
        """
        Delete a tag's answers for some sets of types.

        @param asked: when ECR was asked. Answers to later requests stay.
        """
        self.hide_answers(key, accepts, asked)
        self.changes.flush_soon()

    def hide_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float) -> None:
        """
        Hide a tag's answers for some sets of types; the next flush deletes them. Does not wait for the disk.

        @param asked: see L{forget_answers}.
        """
        accepts = list(accepts)
        self.changes.append(Change(lambda rows: rows.forget_answers(key, accepts, asked, self._now())))
        self._tombstones.add(key, accepts, asked)

    def entries(self) -> Iterator[tuple[EntryKey, Entry, float]]:
        """
        Yield all entries with their last use.

        @raise OSError: if the index can't be read.
        """
        return self.database.each(Rows.entries)

    def moves(self, key: EntryKey) -> list[Move]:
        """
        List the known moves of a tag, the newest first.

        @raise OSError: if the index can't be read.
        """
        return self.database.ask(lambda rows: rows.moves(key))

    def forget_absent(self, before: float) -> Iterator[None]:
        """
        Delete entries last confirmed by ECR before this time whose content is neither there nor arriving.

        Runs in short steps.

        @raise OSError: if the index can't be read or written.
        """
        return self.database.each(lambda rows: rows.forget_absent(before))

    # The operator

    def purge(self, keys: Sequence[EntryKey], digests: Sequence[Digest]) -> int:
        """
        Delete entries, and content whose files are gone, for all processes.

        @return: the number of entries deleted.
        @raise OSError: if the index can't be written.
        """
        self.changes.flush()
        return self.database.ask(lambda rows: rows.purge(keys, digests, self._is_there))

    def refresh(self) -> None:
        """
        Read the totals now.

        @raise OSError: if the index can't be read.
        """
        self.database.ask(lambda rows: rows.refresh())

    def note_compared(self, began: float, opened: int) -> None:
        """
        Record a complete comparison of all files with the index, unless its database has been replaced since.

        @param began: when the comparison began.
        @param opened: the value of C{database.opened} then.
        @raise OSError: if the index can't be written.
        """
        rows = self.database.rows_if(opened)
        if rows is not None:
            rows.note_compared(began)

    def check(self) -> None:
        """
        Look for damage that no query has met yet; if there is any, start a new index.
        """
        with contextlib.suppress(OSError):
            self.database.ask(lambda rows: rows.check())
