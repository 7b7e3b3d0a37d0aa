"""
The index of a cache directory: knowledge about its content, in one SQLite database that may be lost.

Rules:

- The content is the truth. Absence of a row proves nothing: a file without a row is adopted, a row without a file is
  dropped. A lost index costs requests to ECR, and never makes an answer wrong.
- A new index has a new file name. C{index-1}, replaced by rename, names the current one: a process never writes to a
  database that another process has put in place of the one it opened.
- Only SQLite opens the files: closing any other descriptor of them would release its locks.
- The daemon goes on whatever is wrong with the index: with a new one if it is damaged, with rows in memory while no
  file can be opened. Changes that fail because another process writes, or the disk is full, are retried.
- A process that can't open an index that others may have open reserves no space: neither would know of the other's
  files.
- Each process adds the reservations of its transfers to every index that it opens in place of another.
- Uses are collected and written once a second. All other changes are written at once, in order; changes that wait at
  the same time share one transaction.
- In a daemon one thread writes (see L{Scribe}). Only callers that need scarce space wait for it, and not for long.
  Forgotten entries are hidden at once, even before that is written.
- C{index.lock} is held while an index is opened or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, cast

from twisted.logger import Logger

from ecrproxy.cache.cells import DamagedError, File, Move, Totals, on_disk
from ecrproxy.cache.database import FULL, BusyError, FullError, UnfitError, UnusableError
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.locks import locked, open_in_place
from ecrproxy.cache.mounts import find_mount, mountinfo
from ecrproxy.cache.ownership import ONE_USER, give, may_use
from ecrproxy.cache.paths import arriving_path, content_path
from ecrproxy.cache.presence import is_there, status_of
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.cache.schema import LAYOUT
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.troubles import is_exhaustion
from ecrproxy.oci import Digest

log = Logger()
T = TypeVar("T")

POINTER: Final = f"index-{LAYOUT}"
LOCK: Final = "index.lock"
LATE: Final = 10_000
"""Maximum number of changes that wait for a retry. Beyond it the oldest are lost."""
LATE_SAVES: Final = LATE // 10
"""Number of waiting changes beyond which entries are no longer accepted."""
LATE_ENTRIES: Final = 20_000
"""Number of waiting entries beyond which others are refused: a change may have a thousand, of a kilobyte each."""
ROOM: Final = 2**16
"""Bytes to evict if changes find the disk full: pages of the database and of its log."""
AGAIN_SECONDS: Final = 5.0
"""Seconds between attempts to open a database that can't be opened."""
_NAME: Final = re.compile(rf"{POINTER}-[0-9a-f]{{8}}\.sqlite3")
OCCUPIED_SECONDS: Final = 5.0
"""Seconds during which only C{settle} waits for another process, or the disk, after a wait has timed out."""
WAIT_SECONDS: Final = 2.0
"""Seconds to wait for a change that another thread writes."""
TOGETHER: Final = 1000
"""Maximum number of changes in one transaction."""
PLENTY: Final = 64
"""
Divisor of the free space that may be reserved before that is written. Other processes do the same, and their
reservations are seen a second late: this many processes together stay within the limit.
"""
LONG_LOG: Final = 64 * 2**20
"""Bytes beyond which a log larger than its database is long. SQLite restarts it unless a reader prevents that."""
LONG_LOOKS: Final = 600
"""Number of checks, one a second, that may find a long log grown. A long log without writers does no harm."""
COMING_SECONDS: Final = 60.0
"""Seconds to keep the use of a file that is still arriving, to record it with the file."""
_LATE_SECONDS: Final = 0.25
"""Wait after which another process may have purged an entry before it was written."""
_NOTHING_TO_KEEP: Final = FULL | {errno.EROFS}
"""Errors of a disk that accepts no files: no process keeps anything new there."""
_POINTER_BYTES: Final = 100
"""More than the length of the name and a newline."""
_SUFFIXES: Final = "", "-wal", "-shm"


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


@dataclass(eq=False, slots=True)
class _Change:
    """
    A pending change.

    @ivar promised: bytes of disk that it reserves, beyond those already counted.
    @ivar name: the name of that reservation.
    @ivar saves: the keys of the entries that it saves.
    @ivar since: when it began to wait.
    @ivar over: set when it was made or has failed; None to retry until it succeeds.
    @ivar outcome: its result.
    """

    make: Callable[[Rows], object]
    promised: int = 0
    name: str = ""
    saves: Sequence[EntryKey] = ()
    since: float = 0.0
    over: threading.Event | None = None
    outcome: object = None

    def end(self, outcome: object) -> None:
        """
        Set the result and wake the waiting thread.
        """
        self.outcome = outcome
        if self.over is not None:
            self.over.set()


class Index:
    """
    The index of one cache directory. Thread-safe.

    The event loop may read attributes, and call C{use} and C{gone}; all other calls may block.

    @param root: the cache directory.
    @param now: returns seconds since the epoch.
    @param memory: True to keep the rows in memory only.
    @param before_opening: called before files are opened or created; raises if they must not be.
    @ivar shared: True if other processes see it.
    @ivar unfit: True if the file system can't have an index that processes share.
    @ivar shut_out: True if other processes may use an index that this one can't open: it reserves no space.
    @ivar size: bytes of disk that it takes.
    @ivar busy: number of changes that had to wait for another process.
    @ivar opened: number of databases opened so far: a scrub starts over with each.
    @ivar evict: evicts a number of bytes when the disk is full; returns False if it can't.
    @ivar elsewhere: makes another thread call C{catch_up}; None if callers write their own changes.
    """

    evict: Callable[[int], bool] = staticmethod(lambda _: False)
    elsewhere: Callable[[], object] | None = None

    def __init__(
        self,
        root: Path,
        now: Callable[[], float],
        *,
        memory: bool = False,
        before_opening: Callable[[], object] = lambda: None,
    ) -> None:
        self._root, self._now, self._memory, self._before_opening = root, now, memory, before_opening
        self.busy = self.opened = self.size = 0
        self._swapping, self._changing, self._noting = threading.RLock(), threading.RLock(), threading.Lock()
        self._uses: OrderedDict[Digest, float] = OrderedDict()
        self._verified: dict[Digest, float] = {}
        self._gone: set[Digest] = set()
        self._promised: dict[str, tuple[Reservation, int]] = {}
        self._added: dict[Digest, File] = {}
        self._late: deque[_Change] = deque(maxlen=LATE)
        self._making: Sequence[_Change] = ()
        self._singly, self._was_late = 0, False
        self._forgotten: dict[EntryKey, dict[frozenset[str], float]] = {}
        self._rows, self._files, self._seen = Rows(), tuple[Path, ...](), tuple[object, ...]()
        self._heights = [0, 0]
        self._log_size = self._log_grew = 0
        self._generation, self._settled = 0, 0
        self._came_late: dict[EntryKey, float] = {}
        self._purged, self._heard = frozenset[EntryKey](), float("-inf")
        self._everything, self._full, self._tried = False, False, float("-inf")
        self._occupied = float("-inf")
        self.shared, self.unfit, self.shut_out, self._problem, self._unwritable = False, False, False, "", ""

    @property
    def totals(self) -> Totals:
        """
        Return the totals as this process knows them, at most a second old.
        """
        return self._rows.totals

    @property
    def taken(self) -> int:
        """
        Return the bytes of disk that content and the index take.
        """
        return self.totals.blocks + self.size

    @property
    def problem(self) -> str:
        """
        Return why rows are in memory only; empty if they are not.
        """
        return self._problem

    @property
    def lasts(self) -> bool:
        """
        Return True if its rows will not be lost to another index that becomes usable again.
        """
        return self.shared or self.unfit or self._memory

    @property
    def trouble(self) -> str:
        """
        Return why this process can't share its knowledge of the cache with others; empty if it can.
        """
        if self.shut_out:
            return f"the cache's index can't be used, and nothing new is cached: {self._problem}"
        return f"the cache's index can't be written: {self._unwritable}" if self._unwritable else ""

    def close(self) -> None:
        """
        Write pending uses, and close the database.
        """
        with contextlib.suppress(OSError):
            self.settle_uses()
        self._rows.close()

    # The database that is in use

    def open(self) -> None:
        """
        Open the database, unless that has been tried. The first query does this, too.
        """
        if not self.opened and not self._memory:
            with self._swapping:
                if not self.opened:
                    self._open()

    def _open(self) -> None:
        """
        Open the database that the pointer names, or a new one in its place.
        """
        root, self._tried = self._root, self._now()
        with self._swapping:
            old = self._rows
            try:
                self._before_opening()
                _refuse_far(root)
                with locked(root / LOCK):
                    if old.read_only:  # SQLite would give its read-only mapped memory to the next one
                        old.close()
                    self._rows = self._found(root) or self._made(root)
            except OSError as problem:
                self._fall_back(problem, old)
                return
            if self._problem:
                log.info("Recovered: the cache's index can be used")
            self.shared, self.unfit, self.shut_out, self._problem = True, False, False, ""
            self._became(old)

    def _fall_back(self, problem: OSError, old: Rows) -> None:
        """
        Continue with a read-only database, or with one in memory.
        """
        begins, self._problem, self.unfit = not self._problem, _why(problem), isinstance(problem, UnfitError)
        self.shut_out = not self.unfit and not isinstance(problem, FullError) and problem.errno not in _NOTHING_TO_KEEP
        if begins:
            told = "The cache's index can't be used: {problem}; "
            told += "nothing new is cached until it can" if self.shut_out else "going on with one in memory"
            log.warn(told, problem=self._problem)
        if self.shared or not self.opened or old.closed or self._rows.outdated:
            self.shared, self._files, self._rows = False, (), Rows()
            if not isinstance(problem, UnusableError):  # the directory is read-only, or another user's
                with contextlib.suppress(OSError):
                    self._rows = Rows(self._root / self._pointed(), read_only=True)
            self._became(old)

    def _became(self, old: Rows) -> None:
        self.opened += 1
        self._everything = self.opened > 1
        old.close()
        with contextlib.suppress(OSError):
            self._generation = self._rows.refresh()
        try:
            self._put_back(self._rows)
        except OSError:
            self._wait_in_line(_Change(self._put_back))
        self._note_files()

    def _put_back(self, rows: Rows) -> None:
        """
        Add the reservations of this process's transfers: the database before may have had them.

        Also add the files that it brought in since it last checked that that database was the current one.
        """
        with self._noting:
            promised, added = list(self._promised.values()), list(self._added.values())
        if promised:
            rows.put_back(promised)
        there = [each for each in added if self._is_there(each.digest)]
        if there:
            rows.add_all(there)

    def _found(self, root: Path) -> Rows | None:
        """
        Open the database that the pointer names. Return None if it is unusable.
        """
        try:
            name = self._pointed()
        except FileNotFoundError:
            return None
        path, files = root / name, tuple(root / f"{name}{each}" for each in _SUFFIXES)
        found = [status_of(each) for each in files]
        if found[0] is None or not all(each is None or stat.S_ISREG(each.st_mode) for each in found):
            log.warn("The cache's index is lost: beginning a new one")
            return None
        if max(each.st_nlink for each in found if each is not None) > 1:
            log.warn("The cache's index is also that of a copy of the directory by links: beginning a new one")
            return None
        why = ""
        if self._files and path == self._files[0]:
            why = "another program has been reading it, and its log grows" if self._is_held_up else "it was changed"
        elif not may_use(files):
            why = "its mode was changed"
        if why:
            log.warn("The cache's index can't be used: {why}; beginning a new one", why=why)
            return None
        try:
            rows = Rows(path)
        except DamagedError as problem:
            log.warn("The cache's index is damaged: {problem}; beginning a new one", problem=str(problem))
            return None
        self._files = files
        return rows

    def _pointed(self) -> str:
        """
        Return the name of the current database.

        @raise OSError: if it can't be read.
        """
        fd = open_in_place(self._root / POINTER, os.O_RDONLY)
        try:
            name = os.read(fd, _POINTER_BYTES).strip().decode("ascii", "replace")
        finally:
            os.close(fd)
        return name if _NAME.fullmatch(name) else "no-index"

    def _made(self, root: Path) -> Rows:
        """
        Create a new database, point to it, and remove older ones.
        """
        name = f"{POINTER}-{secrets.token_hex(4)}.sqlite3"
        files = tuple(root / f"{name}{each}" for each in _SUFFIXES)
        draft = root / f"{POINTER}.{secrets.token_hex(4)}"
        try:
            rows = Rows(root / name)
            draft.touch(mode=0o600)
            draft.write_text(f"{name}\n", "ascii")
            for each in (*files, draft):
                give(each, root)
            draft.rename(root / POINTER)
        except BaseException:
            for each in (*files, draft):
                with contextlib.suppress(OSError):
                    each.unlink()
            raise
        self._files = files
        for each in root.glob(f"{POINTER}-*.sqlite3*"):
            if each not in files:
                with contextlib.suppress(OSError):
                    each.unlink()
        return rows

    def _note_files(self) -> None:
        self._seen, self._heights = self._look()

    def _look(self) -> tuple[tuple[object, ...], list[int]]:
        """
        Return the identities of the files, and the sizes of those that only grow.
        """
        if not self._files:
            return (), [0, 0]
        found = [status_of(path) for path in (self._root / POINTER, *self._files)]
        self.size = sum(each.st_blocks * 512 for each in found if each is not None)
        database, log_size = (each.st_size if each else 0 for each in found[1:3])
        is_long = log_size > max(LONG_LOG, database)
        self._log_size, self._log_grew = log_size, self._log_grew + (log_size > self._log_size) if is_long else 0
        identities = tuple((each.st_dev, each.st_ino) if each else None for each in found)
        return identities, [each.st_size if each else 0 for each in (found[1], found[3])]

    def _see(self) -> None:
        """
        Check that the files are still those that were opened; if not, open the new ones.
        """
        if self._memory:
            return
        with self._swapping:
            if not self.shared:
                if not 0 <= self._now() - self._tried < AGAIN_SECONDS:
                    self._open()
                return
            seen, heights = self._look()
            same = seen == self._seen and all(was <= now for was, now in zip(self._heights, heights, strict=True))
            if same and not self._is_held_up:
                self._heights = heights
            else:
                self._open()

    @property
    def _is_held_up(self) -> bool:
        """
        Return True if some program has been reading for so long that the log would grow without bound.
        """
        return self._log_grew >= LONG_LOOKS

    def _replace(self, rows: Rows, problem: OSError) -> None:
        """
        Replace damaged C{rows} with a new database, unless that has been done.
        """
        with self._swapping:
            if rows is self._rows and not self._memory:
                log.warn("The cache's index is damaged: {problem}", problem=str(problem))
                self._open()

    def _ask(self, question: Callable[[Rows], T]) -> T:
        """
        Query the database; retry once if it turns out to be damaged.

        @raise OSError: if the query fails.
        """
        self.open()
        rows = self._rows
        try:
            return question(rows)
        except DamagedError as problem:
            self._replace(rows, problem)
        except BusyError:
            if rows is self._rows:
                raise
        return question(self._rows)

    def _each(self, listed: Callable[[Rows], Iterator[T]]) -> Iterator[T]:
        """
        Yield a list that is read page by page.

        @raise OSError: if the index can't be read. A damaged one has been replaced.
        """
        self.open()
        rows = self._rows
        try:
            yield from listed(rows)
        except DamagedError as problem:
            self._replace(rows, problem)
            raise

    def _change(self, change: Callable[[Rows], object], promised: int = 0, name: str = "") -> None:
        """
        Make a change, now or as soon as possible.
        """
        self._wait_in_line(_Change(change, promised, name))
        self.go_on()

    def _change_now(self, change: Callable[[Rows], T]) -> T:
        """
        Make a change now, after all pending ones.

        @raise OSError: if it fails or takes too long. After a timeout it may have been made.
        """
        waiting = _Change(change, over=(over := threading.Event()))
        self._refuse_if_occupied()
        self._wait_in_line(waiting)
        self.go_on()
        if not over.wait(0 if self.elsewhere is None else WAIT_SECONDS):
            with self._noting, contextlib.suppress(ValueError):
                self._late.remove(waiting)
            if self.elsewhere is not None and not self._is_occupied():
                self._is_busy()
            raise BusyError("the index takes too long to be written")
        if isinstance(waiting.outcome, OSError):
            raise waiting.outcome
        return cast("T", waiting.outcome)

    def wait(self) -> None:
        """
        Wait until all pending changes are written.

        @raise OSError: if they aren't in time.
        """
        if self._waits:
            self._change_now(lambda _: None)

    @property
    def _waits(self) -> bool:
        return bool(self._late or self._making)

    def _wait_in_line(self, change: _Change) -> None:
        change.since = time.monotonic()
        with self._noting:
            self._late.append(change)

    def go_on(self) -> None:
        """
        Make the pending changes, or have another thread make them.
        """
        (self.elsewhere or self.catch_up)()

    def _is_occupied(self) -> bool:
        """
        Return True if another process was seen writing for long. Callers should not wait for it one after the other.
        """
        return time.monotonic() < self._occupied

    def _refuse_if_occupied(self) -> None:
        if self._is_occupied():
            raise BusyError("another process has been writing to the index for seconds")

    def _is_busy(self) -> None:
        self.busy += 1
        self._occupied = time.monotonic() + OCCUPIED_SECONDS

    def catch_up(self, *, waiting: bool = False) -> None:
        """
        Make the pending changes.

        @param waiting: True to wait for another process even if others have waited in vain.
        """
        if not waiting and self._is_occupied():
            return
        with self._changing:
            if not waiting and self._is_occupied():  # the previous holder of the lock found out
                return
            self._full = False
            while some := self._take():
                try:
                    outcomes = self._ask(partial(_make, some))
                except OSError as problem:
                    self._put_off(some, problem)
                    return
                except Exception:  # a retry would not help, and later changes must not wait forever
                    if len(some) == 1:
                        self._end(some, [BusyError("it can't be changed")])
                        raise
                    self._singly = len(some)
                    self._put_back_in_line(some)
                else:
                    self._end(some, outcomes)
                    self._occupied, self._unwritable = float("-inf"), ""

    def _take(self) -> Sequence[_Change]:
        """
        Take the changes for one transaction from the queue.
        """
        with self._noting:
            count = min(len(self._late), 1 if self._singly else TOGETHER)
            self._making = [self._late.popleft() for _ in range(count)]
            self._singly = max(0, self._singly - 1)
            if not self._making:
                self._forgotten.clear()
            return self._making

    def _end(self, some: Sequence[_Change], outcomes: Sequence[object]) -> None:
        if time.monotonic() - some[0].since > _LATE_SECONDS:
            self._was_late, saved = True, _saved_by(some)
            with self._noting:
                if len(self._came_late) < LATE_ENTRIES:
                    self._came_late.update(saved)
        self._making = ()
        for each, outcome in zip(some, outcomes, strict=True):
            each.end(outcome)

    def _put_off(self, some: Sequence[_Change], problem: OSError) -> None:
        """
        Queue changes for a retry, except those that a thread waits for.
        """
        if isinstance(problem, BusyError):
            self._is_busy()
        else:
            self._full, self._unwritable = isinstance(problem, FullError), str(problem)
            log.warn("The cache's index can't be written: {problem}", problem=str(problem), once="index")
        self._put_back_in_line([each for each in some if each.over is None])
        for each in some:
            each.end(problem)

    def _put_back_in_line(self, some: Sequence[_Change]) -> None:
        with self._noting:
            self._making = ()
            self._late.extendleft(reversed(some))

    # Once a second

    def settle(self) -> News:
        """
        Write pending changes, and return what was purged. Called every second, in a thread.
        """
        with self._noting:
            added, waited = list(self._added), (*self._making, *self._late)
        self._see()
        with self._noting:
            for each in added:
                self._added.pop(each, None)
        late, self._was_late = self._waits or self._was_late, False
        if self._unwritable and not self._waits:
            self._wait_in_line(_Change(Rows.try_writing))
        self.catch_up(waiting=True)
        if self._full and self.evict(ROOM):  # not before: eviction makes changes, too
            self.catch_up()
        with contextlib.suppress(OSError):
            if not (late and self._is_occupied()):
                self.settle_uses()
        with contextlib.suppress(OSError):  # purges can be read even if nothing can be written
            news = self._news()
            self._forget_late(waited, news)
            return news
        return News()

    def _forget_late(self, waited: Sequence[_Change], news: News) -> None:
        """
        Forget entries that were purged while they waited to be written, or that still wait.

        For some, the wait becomes known only after they are written, when the purge has been noticed already.

        @param waited: the changes that waited before uses were written.
        """
        with self._noting:
            waited = *waited, *self._making, *self._late
            came, self._came_late = self._came_late, {}
        before, heard = self._purged, self._heard
        self._purged = frozenset(_plain(each) for each in news.purged if isinstance(each, EntryKey))
        self._heard = time.monotonic()
        late = {each for each, since in came.items() if since < heard and _plain(each) in before} if before else set()
        opened, self._settled = self._settled, self.opened
        unknown = news.everything and opened == self.opened  # too many to list, or unreadable
        if unknown or self._purged:
            waiting = {*came, *_saved_by(waited)}
            late.update(each for each in waiting if unknown or _plain(each) in self._purged)
        if late:
            self.forget(*late)

    def settle_uses(self) -> None:
        """
        Write which files were used, verified or found gone.

        @raise OSError: if that fails. It is retried.
        """
        with self._noting:
            uses, self._uses = self._uses, OrderedDict()
            verified, self._verified = self._verified, {}
            gone, self._gone = self._gone, set()
        try:
            if uses or verified:
                unknown = self._ask(lambda rows: rows.use(uses, verified))
                self._occupied = float("-inf")
                found = [(each, self._status(each)) for each in unknown]
                there = [File(each, seen.st_size, uses[each]) for each, seen in found if seen is not None]
                if there:
                    self.adopt(there)
                self._use_later({each: uses[each] for each, seen in found if seen is None})
            absent = [each for each in gone if not self._is_there(each)]
            if absent:
                self._ask(lambda rows: rows.drop(absent, (), self._is_there))
        except OSError as problem:
            if isinstance(problem, BusyError):
                self._is_busy()
            with self._noting:
                self._uses = OrderedDict([*uses.items(), *self._uses.items()][-LATE:])
                if len(self._verified) + len(self._gone) < LATE:
                    self._verified, self._gone = {**verified, **self._verified}, gone | self._gone
            raise

    def _use_later(self, uses: Mapping[Digest, float]) -> None:
        """
        Keep uses of arriving files until they become content.
        """
        now, folder = self._now(), self._root
        recent = [each for each, when in uses.items() if 0 <= now - when < COMING_SECONDS]
        coming = [each for each in recent if status_of(folder / arriving_path(each)) or self._status(each)]
        with self._noting:
            for each in coming:
                self._uses.setdefault(each, uses[each])

    def _status(self, digest: Digest) -> os.stat_result | None:
        return status_of(self._root / content_path(digest))

    def _is_there(self, digest: Digest) -> bool:
        return is_there(self._root / content_path(digest))

    def _news(self) -> News:
        everything, self._everything = self._everything, False
        try:
            before, self._generation = self._generation, self._ask(lambda rows: rows.refresh())
            if everything or self._generation < before:
                return News(everything=True)
            if self._generation == before:
                return News()
            purged = self._ask(lambda rows: rows.purged_since(before))
        except OSError:
            self._everything = True  # the purged items are unknown, and will not be read again
            raise
        return News(everything=purged is None, purged=purged or ())

    # Content

    def use(self, digest: Digest) -> None:
        """
        Record that a file of content is used now.
        """
        with self._noting:
            self._gone.discard(digest)
            self._uses[digest] = self._now()
            self._uses.move_to_end(digest)

    def verified(self, digest: Digest) -> None:
        """
        Record that a file of content matches its digest. Does not count as a use.
        """
        with self._noting:
            self._verified[digest] = self._now()

    def gone(self, digest: Digest) -> None:
        """
        Record that a file of content was not found.
        """
        with self._noting:
            self._uses.pop(digest, None)
            self._gone.add(digest)

    def add(self, digest: Digest, size: int, arriving: Reservation | None = None, used: float | None = None) -> None:
        """
        Add a verified file of content, and end its reservation.

        @param used: its last use, if no client has requested it.
        """
        now = self._now()
        file = File(digest, size, now if used is None else used, now)
        with self._noting:
            self._gone.discard(digest)
            self._added[digest] = file._replace(verified=None)
            self._end_promises([] if arriving is None else [arriving])
        told = {} if used is None else {"asked_for": False}
        self._change(lambda rows: rows.add(file, arriving, **told))

    def adopt(self, files: Sequence[File]) -> None:
        """
        Add files that were found, unless they have rows.

        @raise OSError: if the index can't be written.
        """
        self._ask(lambda rows: rows.add_all(files))

    def drop(self, digests: Iterable[Digest] = (), arriving: Iterable[Reservation] = ()) -> None:
        """
        Remove files that are gone. One that has come back meanwhile stays.
        """
        digests, arriving = list(digests), list(arriving)
        with self._noting:
            for each in digests:
                self._uses.pop(each, None)
            self._end_promises(arriving)
        self._change(lambda rows: rows.drop(digests, arriving, self._is_there))

    def files(self, after: Digest | None = None) -> list[File]:
        """
        List content, ordered by digest, up to a thousand files.

        @param after: the last of the page before.
        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.files(after))

    def names(self, algorithm: str, prefix: str) -> Iterator[set[str]]:
        """
        Yield the hashes of content that begin with C{prefix}, up to a thousand at once.

        @param prefix: an even number of hexadecimal digits.
        @raise OSError: if the index can't be read.
        """
        return self._each(lambda rows: rows.names(algorithm, prefix))

    def known(self, digest: Digest) -> File | None:
        """
        Look up a file of content. Uses that are not written yet count.

        @raise OSError: if the index can't be read.
        """
        with self._noting:
            used = self._uses.get(digest, float("-inf"))
        found = self._ask(lambda rows: rows.known(digest))
        return None if found is None else found._replace(used=max(found.used, used))

    def least_recently_used(self) -> Iterator[File]:
        """
        Yield content, the least recently used first.

        @raise OSError: if the index can't be read.
        """
        if self.elsewhere is None:
            with contextlib.suppress(OSError):
                self.settle_uses()
        with self._noting:
            uses = dict(self._uses)
        used: dict[Digest, File] = {}
        for each in self._each(Rows.least_recently_used):
            if each.digest in uses:
                used[each.digest] = each
            else:
                yield each
        yield from (used[each]._replace(used=when) for each, when in uses.items() if each in used)

    # Transfers

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Reserve C{size} bytes for a transfer, whose claim is held.

        @param limit: maximum bytes of disk for all files and the index.
        @return: the excess in bytes; 0 if the bytes are reserved.
        @raise OSError: if the index can't be written, or others may have one that this process can't open.
        """
        if self.shut_out:
            raise UnusableError(self.trouble)
        if self.has_plenty(on_disk(size), limit):
            self._arrive(what, size, 0, 0)  # nothing has been counted for it, and nothing needs to wait for the disk
            return 0
        opened = self.opened
        self._refuse_if_occupied()  # check this first: no change is in flight that would have to be undone
        try:
            excess = self._change_now(lambda rows: rows.reserve(what, size, limit - self.size))
        except BusyError:
            if self.elsewhere is not None:  # it may be in progress
                self.drop(arriving=[what])
            raise
        if not excess:
            with self._noting:
                self._promised[what.name] = what, size
            if opened not in (0, self.opened):  # it may be in the previous database
                self._change(self._put_back)
        return excess

    def promised(self, what: Reservation) -> int:
        """
        Return the bytes of disk reserved by this process under the same name.
        """
        with self._noting:
            return on_disk(self._promised.get(what.name, (what, 0))[1])

    @property
    def unwritten(self) -> int:
        """
        Return the bytes of disk reserved by pending changes, which the totals do not include yet.
        """
        with self._noting:
            return sum(each.promised for each in (*self._making, *self._late))

    def has_plenty(self, size: int, limit: int) -> bool:
        """
        Return True if there is so much free space that some can be reserved before that is written.
        """
        if self.elsewhere is None or self.shut_out or len(self._late) >= LATE_SAVES:
            return False
        free = limit - self.size - self.totals.blocks - self.totals.arriving
        return (self.unwritten + size) * PLENTY <= free

    def arrive(self, what: Reservation, size: int, written: float = 0) -> None:
        """
        Add an arriving file, whatever the limit, or an interrupted one. Its claim is held.

        @param written: when it was last written; 0 while it is in progress.
        """
        self._arrive(what, size, written, self._counted(what.name))

    def _arrive(self, what: Reservation, size: int, written: float, counted: int) -> None:
        with self._noting:
            if written:
                self._end_promises([what])
            else:
                self._promised[what.name] = what, size
        more = max(0, on_disk(size) - counted)
        self._change(lambda rows: rows.arrive(what, size, written), more, what.name)

    def _counted(self, name: str) -> int:
        """
        Return the bytes of disk counted for a transfer, written or not.
        """
        with self._noting:  # first: it may be written meanwhile
            waiting = max((each.promised for each in (*self._making, *self._late) if each.name == name), default=0)
        with contextlib.suppress(OSError):
            return max(waiting, self._ask(lambda rows: rows.room_of(name)))
        return waiting

    def _end_promises(self, arriving: Iterable[Reservation]) -> None:
        for each in arriving:
            if self._promised.get(each.name, (None, 0))[0] == each:
                del self._promised[each.name]

    def pass_over(self, what: Reservation) -> None:
        """
        Count an interrupted transfer that some process has open as in progress until the next sweep.
        """
        self._change(lambda rows: rows.pass_over(what))

    def arriving(self) -> list[Reserved]:
        """
        List all transfers: those in progress, then the interrupted ones, the longest unwritten first.

        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.arriving())

    # Entries

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry. An unreadable one counts as absent.
        """
        with contextlib.suppress(OSError):
            return self._entry(key)
        return None

    def _entry(self, key: EntryKey) -> Entry | None:
        with self._noting:  # first: it may be written meanwhile
            forgotten, now = dict(self._forgotten.get(key, {})), self._now()
        entry = self._ask(lambda rows: rows.entry(key))
        if entry is None or not forgotten:
            return entry
        answers = {
            accept: known
            for accept, known in entry.answers.items()
            if accept not in forgotten or known.is_newer(forgotten[accept], now)
        }
        return replace(entry, answers=answers) if answers else None

    def written(self, key: EntryKey) -> Entry | None:
        """
        Look up an entry as last written by any process.

        @raise OSError: if the index can't be read, or changes are still pending.
        """
        self.wait()
        return self._entry(key)

    def save(
        self, entries: Sequence[tuple[EntryKey, Entry]], counts: Callable[[EntryKey], bool] = lambda _: True
    ) -> bool:
        """
        Save entries in one transaction. Each answer replaces an older one for the same set of types.

        @param counts: asked in the transaction; returns False if an entry must not be saved after all.
        @return: False if they are dropped because too many changes are pending: ECR can be asked again.
        """
        with self._noting:
            waiting = sum(len(each.saves) for each in (*self._making, *self._late))
        if len(self._late) >= LATE_SAVES or waiting >= LATE_ENTRIES:
            return False
        saves = [key for key, _ in entries]
        due = partial(filter, lambda each: counts(each[0]), entries)  # evaluated as they are written, not before
        self._wait_in_line(_Change(lambda rows: rows.save(due(), self._now()), saves=saves))
        with self._noting:
            for key, entry in entries:
                for accept in entry.answers.keys() & self._forgotten.get(key, {}).keys():
                    del self._forgotten[key][accept]
        self.go_on()
        return True

    def forget(self, *keys: EntryKey) -> None:
        """
        Delete entries.
        """
        self._change(lambda rows: rows.forget(keys))

    def forget_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float) -> None:
        """
        Delete a tag's answers for some sets of types.

        @param asked: when ECR was asked. Answers to later requests stay.
        """
        self.hide_answers(key, accepts, asked)
        self.go_on()

    def hide_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]], asked: float) -> None:
        """
        Hide a tag's answers for some sets of types; the next L{go_on} deletes them. Does not wait for the disk.

        @param asked: see L{forget_answers}.
        """
        accepts = list(accepts)
        self._wait_in_line(_Change(lambda rows: rows.forget_answers(key, accepts, asked, self._now())))
        with self._noting:
            if key in self._forgotten or len(self._forgotten) < LATE:  # as many as changes may wait
                self._forgotten.setdefault(key, {}).update(dict.fromkeys(accepts, asked))

    def entries(self) -> Iterator[tuple[EntryKey, Entry, float]]:
        """
        Yield all entries with their last use.

        @raise OSError: if the index can't be read.
        """
        return self._each(Rows.entries)

    def moves(self, key: EntryKey) -> list[Move]:
        """
        List the known moves of a tag, the newest first.

        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.moves(key))

    def forget_absent(self, before: float) -> Iterator[None]:
        """
        Delete entries last confirmed by ECR before this time whose content is neither there nor arriving.

        Runs in short steps.

        @raise OSError: if the index can't be read or written.
        """
        return self._each(lambda rows: rows.forget_absent(before))

    # The operator

    def purge(self, keys: Sequence[EntryKey], digests: Sequence[Digest]) -> int:
        """
        Delete entries, and content whose files are gone, for all processes.

        @return: the number of entries deleted.
        @raise OSError: if the index can't be written.
        """
        self.catch_up()
        return self._ask(lambda rows: rows.purge(keys, digests, self._is_there))

    def refresh(self) -> None:
        """
        Read the totals now.

        @raise OSError: if the index can't be read.
        """
        self._ask(lambda rows: rows.refresh())

    def note_compared(self, began: float, opened: int) -> None:
        """
        Record a complete comparison of all files with the index, unless the index has been replaced since.

        @param began: when the comparison began.
        @param opened: the value of C{opened} then.
        @raise OSError: if the index can't be written.
        """
        with self._swapping:
            if self.opened != opened:
                return
            rows = self._rows
        rows.note_compared(began)

    def check(self) -> None:
        """
        Look for damage that no query has met yet; if there is any, start a new index.
        """
        with contextlib.suppress(OSError):
            self._ask(lambda rows: rows.check())


def _make(some: Sequence[_Change], rows: Rows) -> Sequence[object]:
    """
    Make changes, all or none.
    """
    if len(some) == 1:
        return [some[0].make(rows)]
    with rows.together():
        return [each.make(rows) for each in some]


def _saved_by(some: Iterable[_Change]) -> dict[EntryKey, float]:
    """
    Return the keys of the entries that changes save, and when the last change of each began to wait.
    """
    return {key: each.since for each in some for key in each.saves}


def _plain(key: EntryKey) -> EntryKey:
    """
    Return an entry's key without its variant: the index does not keep all variants, and a purge covers all of them.
    """
    return key._replace(variant="")


def _why(problem: OSError) -> str:
    """
    Return why the index can't be opened, and what to do. SQLite reports neither.
    """
    if problem.errno in (errno.EACCES, errno.EPERM):
        return f"{problem}; {ONE_USER}"
    may_lack_files = is_exhaustion(problem) or str(problem) == "unable to open database file"
    return f"{problem}; raise the limit of open files (LimitNOFILE=, ulimit -n)" if may_lack_files else str(problem)


def _refuse_far(root: Path) -> None:
    """
    Refuse a file system whose locks and shared memory may not work.

    @raise UnfitError: if it is one.
    """
    mount = find_mount(mountinfo(), os.path.realpath(root))
    if mount is not None and mount.is_far:
        raise UnfitError(f"{root} is on {mount.kind}, whose locks and shared memory may not hold; use a local disk")
