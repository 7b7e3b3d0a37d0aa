"""
The index of a cache directory: knowledge about its content, in one SQLite database that may be lost.

Rules:

- The content is the truth. Absence of a row proves nothing: a file without a row is adopted, a row without a file is
  dropped. A lost index costs questions to ECR, and never makes an answer wrong.
- A new index has a new file name. C{index-1}, replaced by rename, names the one in use: nobody ever writes to a
  database that another process has put in the place of the one it opened.
- The files are opened by SQLite alone: closing any other descriptor of them would drop its locks.
- Whatever is wrong with the index, the daemon goes on: with a new one if it is damaged, with rows in memory while no
  file can be opened. Changes that fail because another process writes, or the disk is full, are tried again.
- Each process puts what it was promised for its transfers into an index that it opens in another's place.
- Uses are gathered, and written once a second. All other changes are written at once, in the order they came.
- C{index.lock} is held while an index is opened or replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from twisted.logger import Logger

from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.locks import open_in_place, opened
from ecrproxy.cache.mounts import find_mount, mountinfo
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.record import Reservation, Reserved
from ecrproxy.cache.sqlite import (
    LAYOUT,
    BusyError,
    DamagedError,
    File,
    FullError,
    Move,
    Rows,
    Totals,
    UnfitError,
    UnusableError,
)
from ecrproxy.oci import Digest

log = Logger()
T = TypeVar("T")

POINTER: Final = f"index-{LAYOUT}"
LOCK: Final = "index.lock"
LATE: Final = 10_000
"""Changes that wait for another try; the oldest are lost when there are more."""
LATE_SAVES: Final = LATE // 10
"""Changes that wait, from which on entries don't: one may have a thousand of them."""
ROOM: Final = 2**16
"""Bytes that are evicted where changes find the disk full: pages of the database and of its log."""
AGAIN_SECONDS: Final = 5.0
"""How often a database that can't be opened is tried again."""
_NAME: Final = re.compile(rf"{POINTER}-[0-9a-f]{{8}}\.sqlite3")
OCCUPIED_SECONDS: Final = 5.0
"""For how long nobody but C{settle} waits for another process that was waited for in vain: longer than that waits."""
_POINTER_BYTES: Final = 100
"""More than its name and a line's end."""
_SUFFIXES: Final = "", "-wal", "-shm"
_LOCK_TRIES: Final = 250
_LOCK_PAUSE: Final = 0.02


@dataclass(frozen=True, slots=True)
class News:
    """
    What others, or this process, have purged: whoever has it in memory is to forget it.

    @ivar everything: whether it is not known what.
    """

    everything: bool = False
    purged: Sequence[EntryKey | Digest] = ()

    def __bool__(self) -> bool:
        return self.everything or bool(self.purged)


class Index:
    """
    The index of one cache directory, shared by threads.

    The event loop may look at its attributes, and call C{use} and C{gone}; all other calls may block.

    @param root: the cache directory.
    @param now: seconds since the epoch.
    @param memory: whether to keep the rows in memory alone.
    @param before_opening: called before files are opened or made; whatever it raises is a reason not to.
    @ivar shared: whether other processes see it.
    @ivar unfit: whether the file system can't have an index that processes share.
    @ivar size: bytes of disk that it takes.
    @ivar busy: how many changes had to wait because another process wrote.
    @ivar opened: how many databases it has been: a scrub begins anew with each.
    @ivar evict: takes a number of bytes out of the directory when the disk is full; false if it can't.
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
        self._root, self._now, self._memory, self._before_opening = root, now, memory, before_opening
        self.busy = self.opened = self.size = 0
        self._swapping, self._changing, self._noting = threading.RLock(), threading.RLock(), threading.Lock()
        self._uses: OrderedDict[Digest, float] = OrderedDict()
        self._verified: dict[Digest, float] = {}
        self._gone: set[Digest] = set()
        self._promised: dict[str, tuple[Reservation, int]] = {}
        self._added: dict[Digest, File] = {}
        self._late: deque[Callable[[Rows], object]] = deque(maxlen=LATE)
        self._rows, self._files, self._seen = Rows(), tuple[Path, ...](), tuple[object, ...]()
        self._heights = [0, 0]
        self._generation = 0
        self._everything, self._full, self._tried = False, False, float("-inf")
        self._occupied = float("-inf")
        self.shared, self.unfit, self._problem = False, False, ""

    @property
    def totals(self) -> Totals:
        """
        What there is, by what this process has seen: at most a second old.
        """
        return self._rows.totals

    @property
    def problem(self) -> str:
        """
        Why rows are kept in memory alone, if they are.
        """
        return self._problem

    def close(self) -> None:
        """
        Write what is gathered, and close the database.
        """
        with contextlib.suppress(OSError):
            self.settle_uses()
        self._rows.close()

    # The database that is in use

    def open(self) -> None:
        """
        Open the database, if that was not tried yet: the first call that asks does it, too.
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
                    if old.read_only:  # SQLite would hand its memory, mapped for reading alone, to the next one
                        old.close()
                    self._rows = self._found(root) or self._made(root)
            except OSError as problem:
                self._fall_back(problem, old)
                return
            if self._problem:
                log.info("Recovered: the cache's index can be used")
            self.shared, self.unfit, self._problem = True, False, ""
            self._became(old)

    def _fall_back(self, problem: OSError, old: Rows) -> None:
        """
        Go on with a database that can only be read, or with one in memory.
        """
        if not self._problem:
            log.warn("The cache's index can't be used: {problem}; going on with one in memory", problem=str(problem))
        self._problem, self.unfit = str(problem), isinstance(problem, UnfitError)
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
            self._late.append(self._put_back)
        self._note_files()

    def _put_back(self, rows: Rows) -> None:
        """
        Note what may have been noted in the database before: what was promised to this process's transfers.

        And the files that it brought in since it looked whether that database is still the one in use.
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
        Open the database that the pointer names; none if it is of no use.
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
        if self._files and path == self._files[0]:
            log.warn("The cache's index was changed while it was open: beginning a new one")
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
        Read which database is in use.

        @raise OSError: if that can't be told.
        """
        fd = open_in_place(self._root / POINTER, os.O_RDONLY)
        try:
            name = os.read(fd, _POINTER_BYTES).strip().decode("ascii", "replace")
        finally:
            os.close(fd)
        return name if _NAME.fullmatch(name) else "no-index"

    def _made(self, root: Path) -> Rows:
        """
        Make a new database, and have the pointer name it; older ones go.
        """
        name = f"{POINTER}-{secrets.token_hex(4)}.sqlite3"
        files = tuple(root / f"{name}{each}" for each in _SUFFIXES)
        draft = root / f"{POINTER}.{secrets.token_hex(4)}"
        try:
            rows = Rows(root / name)
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
        Return what tells the files from others, and the sizes of those that only grow.
        """
        if not self._files:
            return (), [0, 0]
        found = [status_of(path) for path in (self._root / POINTER, *self._files)]
        self.size = sum(each.st_blocks * 512 for each in found if each is not None)
        identities = tuple((each.st_dev, each.st_ino) if each else None for each in found)
        return identities, [each.st_size if each else 0 for each in (found[1], found[3])]

    def _see(self) -> None:
        """
        See that the files are still those that were opened; open others if not.
        """
        if self._memory:
            return
        with self._swapping:
            if not self.shared:
                if not 0 <= self._now() - self._tried < AGAIN_SECONDS:
                    self._open()
                return
            seen, heights = self._look()
            if seen == self._seen and all(was <= now for was, now in zip(self._heights, heights, strict=True)):
                self._heights = heights
            else:
                self._open()

    def _replace(self, rows: Rows, problem: OSError) -> None:
        """
        Begin a new database, unless that has happened: C{rows} are damaged.
        """
        with self._swapping:
            if rows is self._rows and not self._memory:
                log.warn("The cache's index is damaged: {problem}", problem=str(problem))
                self._open()

    def _ask(self, question: Callable[[Rows], T]) -> T:
        """
        Ask the database, once more if it turned out to be damaged.

        @raise OSError: if it can't be asked.
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
        Yield a list that is read by pages.

        @raise OSError: if the index can't be read; it has been replaced if it is damaged.
        """
        self.open()
        rows = self._rows
        try:
            yield from listed(rows)
        except DamagedError as problem:
            self._replace(rows, problem)
            raise

    def _change(self, change: Callable[[Rows], object]) -> None:
        """
        Have something changed, now or when that can be.
        """
        if self._is_occupied():
            self._late.append(change)
            return
        with self._changing:
            self._late.append(change)
            self._catch_up()

    def _is_occupied(self) -> bool:
        """
        Return True if another process was seen to write for long: not everybody is to wait for it, one after the other.
        """
        return time.monotonic() < self._occupied

    def _refuse_if_occupied(self) -> None:
        if self._is_occupied():
            raise BusyError("another process has been writing to the index for seconds")

    def _is_busy(self) -> None:
        self.busy += 1
        self._occupied = time.monotonic() + OCCUPIED_SECONDS

    def _catch_up(self, *, waiting: bool = False) -> None:
        """
        Make the changes that are late.

        @param waiting: whether to wait for another process where others have waited in vain.
        """
        if not waiting and self._is_occupied():
            return
        with self._changing:
            if not waiting and self._is_occupied():  # seen by whoever had the lock
                return
            self._full = False
            while self._late:
                try:
                    self._ask(self._late[0])
                except BusyError:
                    self._is_busy()
                    return
                except OSError as problem:
                    self._full = isinstance(problem, FullError)
                    log.warn("The cache's index can't be written: {problem}", problem=str(problem), once="index")
                    return
                except Exception:  # which no later try would mend: those behind it are not to wait for ever
                    self._late.popleft()
                    raise
                self._late.popleft()
                self._occupied = float("-inf")

    # Once a second

    def settle(self) -> News:
        """
        Write what was gathered, and tell what was purged. Called each second, in a thread.
        """
        with self._noting:
            added = list(self._added)
        self._see()
        with self._noting:
            for each in added:
                self._added.pop(each, None)
        late = bool(self._late)
        self._catch_up(waiting=True)
        if self._full and self.evict(ROOM):  # not before: whoever evicts has changes to make himself
            self._catch_up()
        with contextlib.suppress(OSError):
            if not (late and self._is_occupied()):
                self.settle_uses()
            news = self._news()
            if late:  # what was purged may have been among it
                self.forget(*(each for each in news.purged if isinstance(each, EntryKey)))
            return news
        return News()

    def settle_uses(self) -> None:
        """
        Write which files were used, verified or found gone.

        @raise OSError: if that can't be done: it is tried again.
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

    def _status(self, digest: Digest) -> os.stat_result | None:
        return status_of(self._root / content_path(digest))

    def _is_there(self, digest: Digest) -> bool:
        """
        Return True if there is a file of this name, or if that can't be told.
        """
        try:
            (self._root / content_path(digest)).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True

    def _news(self) -> News:
        everything, self._everything = self._everything, False
        before, self._generation = self._generation, self._ask(lambda rows: rows.refresh())
        if everything or self._generation < before:
            return News(everything=True)
        if self._generation == before:
            return News()
        purged = self._ask(lambda rows: rows.purged_since(before))
        return News(everything=purged is None, purged=purged or ())

    # Content

    def use(self, digest: Digest) -> None:
        """
        Note that a file of content is used now.
        """
        with self._noting:
            self._gone.discard(digest)
            self._uses[digest] = self._now()
            self._uses.move_to_end(digest)

    def verified(self, digest: Digest) -> None:
        """
        Note that a file of content was seen to be what its digest names; that is no use.
        """
        with self._noting:
            self._verified[digest] = self._now()

    def gone(self, digest: Digest) -> None:
        """
        Note that a file of content was not found.
        """
        with self._noting:
            self._uses.pop(digest, None)
            self._gone.add(digest)

    def add(self, digest: Digest, size: int, arriving: Reservation | None = None) -> None:
        """
        Note that a file of content has come, verified; the reservation that it had ends.
        """
        now = self._now()
        with self._noting:
            self._gone.discard(digest)
            self._added[digest] = File(digest, size, now)
            self._end_promises([] if arriving is None else [arriving])
        self._change(lambda rows: rows.add(File(digest, size, now, now), arriving))

    def adopt(self, files: Sequence[File]) -> None:
        """
        Note files that were found, unless something is known of them.

        @raise OSError: if that can't be noted.
        """
        self._ask(lambda rows: rows.add_all(files))

    def drop(self, digests: Iterable[Digest] = (), arriving: Iterable[Reservation] = ()) -> None:
        """
        Note that files are gone. One that has come back meanwhile stays.
        """
        digests, arriving = list(digests), list(arriving)
        with self._noting:
            for each in digests:
                self._uses.pop(each, None)
            self._end_promises(arriving)
        self._change(lambda rows: rows.drop(digests, arriving, self._is_there))

    def files(self, after: Digest | None = None) -> list[File]:
        """
        List content in the order of digests, up to a thousand files.

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
        Look a file of content up.

        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.known(digest))

    def least_recently_used(self) -> Iterator[File]:
        """
        Yield content, the least recently used first.

        @raise OSError: if the index can't be read.
        """
        with contextlib.suppress(OSError):
            self.settle_uses()
        yield from self._each(Rows.least_recently_used)

    # What is arriving

    def reserve(self, what: Reservation, size: int, limit: int) -> int:
        """
        Promise C{size} bytes to what will arrive. Its claim is held.

        @param limit: the most bytes of disk for all files together, and the index.
        @return: by how many bytes that would be too much: zero if they are promised.
        @raise OSError: if the index can't be written.
        """
        self._catch_up()
        self._refuse_if_occupied()
        with self._changing:
            self._refuse_if_occupied()
            opened = self.opened
            try:
                excess = self._ask(lambda rows: rows.reserve(what, size, limit - self.size))
            except BusyError:
                self._is_busy()
                raise
        if not excess:
            with self._noting:
                self._promised[what.name] = what, size
            if opened not in (0, self.opened):  # it may have been noted in the one before
                self._change(self._put_back)
        return excess

    def arrive(self, what: Reservation, size: int, written: float = 0) -> None:
        """
        Note a file that arrives, whatever the limit; or one that is left over. Its claim is held.

        @param written: when it was written last; zero as long as it is being written.
        """
        with self._noting:
            if written:
                self._end_promises([what])
            else:
                self._promised[what.name] = what, size
        self._change(lambda rows: rows.arrive(what, size, written))

    def _end_promises(self, arriving: Iterable[Reservation]) -> None:
        for each in arriving:
            if self._promised.get(each.name, (None, 0))[0] == each:
                del self._promised[each.name]

    def pass_over(self, what: Reservation) -> None:
        """
        Count an interrupted transfer, which some process has open, as one under way until the next sweep.
        """
        self._change(lambda rows: rows.pass_over(what))

    def arriving(self) -> list[Reserved]:
        """
        List what is arriving, or was interrupted, the longest unwritten first.

        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.arriving())

    # Entries

    def entry(self, key: EntryKey) -> Entry | None:
        """
        Look an entry up. What can't be read is as good as absent.
        """
        with contextlib.suppress(OSError):
            return self._ask(lambda rows: rows.entry(key))
        return None

    def written(self, key: EntryKey) -> Entry | None:
        """
        Look an entry up, as the last of all processes has left it.

        @raise OSError: if that can't be told: the index can't be read, or changes wait to be made.
        """
        if self._late:
            raise BusyError("changes of the index wait for another try")
        return self._ask(lambda rows: rows.entry(key))

    def save(self, entries: Sequence[tuple[EntryKey, Entry]]) -> None:
        """
        Note entries in one transaction: each answer in place of the one that was known to the same set of types.

        They are lost if much waits for another try: ECR can be asked again.
        """
        if len(self._late) < LATE_SAVES:
            self._change(lambda rows: rows.save(entries))

    def forget(self, *keys: EntryKey) -> None:
        """
        Drop entries.
        """
        self._change(lambda rows: rows.forget(keys))

    def forget_answers(self, key: EntryKey, accepts: Iterable[frozenset[str]]) -> None:
        """
        Drop what a tag led to for some sets of types.
        """
        accepts = list(accepts)
        self._change(lambda rows: rows.forget_answers(key, accepts))

    def entries(self) -> Iterator[tuple[EntryKey, Entry, float]]:
        """
        Yield all entries with their last use.

        @raise OSError: if the index can't be read.
        """
        return self._each(Rows.entries)

    def moves(self, key: EntryKey) -> list[Move]:
        """
        List the moves of a tag that were seen, the newest first.

        @raise OSError: if the index can't be read.
        """
        return self._ask(lambda rows: rows.moves(key))

    def forget_absent(self, before: float) -> Iterator[None]:
        """
        Drop entries that ECR confirmed last before this moment, and whose content is not there; in short steps.

        @raise OSError: if the index can't be read or written.
        """
        return self._each(lambda rows: rows.forget_absent(before))

    # The operator

    def purge(self, keys: Sequence[EntryKey], digests: Sequence[Digest]) -> int:
        """
        Forget entries, and content whose files are gone, for all processes.

        @return: how many entries there were.
        @raise OSError: if the index can't be written.
        """
        self._catch_up()
        return self._ask(lambda rows: rows.purge(keys, digests, self._is_there))

    def refresh(self) -> None:
        """
        Read the totals now.

        @raise OSError: if the index can't be read.
        """
        self._ask(lambda rows: rows.refresh())

    def note_compared(self, began: float, opened: int) -> None:
        """
        Note that all files were compared with the index, unless it is another one by now.

        @param began: when that began.
        @param opened: what C{opened} was then.
        @raise OSError: if the index can't be written.
        """
        with self._swapping:
            if self.opened != opened:
                return
            rows = self._rows
        rows.note_compared(began)

    def check(self) -> None:
        """
        Look for damage that no statement has met yet; begin a new index if there is some.
        """
        with contextlib.suppress(OSError):
            self._ask(lambda rows: rows.check())


def status_of(path: Path) -> os.stat_result | None:
    """
    Look at a file; none if that can't be done.
    """
    try:
        return path.lstat()
    except OSError:
        return None


def give(path: Path, root: Path) -> None:
    """
    Give what root has made to the owner of the cache directory.

    Root's commands must not lock a daemon out, nor a daemon itself that begins as root (C{twistd --uid}).
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            owner = root.stat()
            # Whoever owns it may have put links into it.
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _refuse_far(root: Path) -> None:
    """
    Refuse a file system whose locks and shared memory may not hold.

    @raise UnfitError: if it is one.
    """
    mount = find_mount(mountinfo(), os.path.realpath(root))
    if mount is not None and mount.is_far:
        raise UnfitError(f"{root} is on {mount.kind}, whose locks and shared memory may not hold; use a local disk")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """
    Hold a lock file.

    @raise OSError: if locks do not work there, or another process holds it for seconds.
    """
    with opened(path) as fd, opened(path) as other:
        give(path, path.parent)
        for _ in range(_LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_LOCK_PAUSE)
        else:
            raise UnusableError(f"{path} is locked by another process")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise UnfitError(f"locks do not hold on the file system of {path}; use a local disk")
        yield
