"""
The index may be lost, swapped, damaged, cut, newer, unreadable, on a full or read-only disk: nothing else is affected.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import current_database, index_files, locks
from ecrproxy.cache.cells import File
from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.cache.current_database import AGAIN_SECONDS, LOCK
from ecrproxy.cache.database import UnusableError
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.index_files import LONG_LOOKS, POINTER
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.janitor import EVICTING
from ecrproxy.cache.mounts import find_mount
from ecrproxy.cache.ownership import give
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.scrub import SCRUBBING, Turn, scrub
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.store import Store
from ecrproxy.cache.takeover import old_name, take_over
from ecrproxy.cache.write_behind import LATE_ENTRIES, LATE_SAVES
from ecrproxy.command.survey import Survey
from ecrproxy.oci import Digest, Kind
from tests.daemon import DaemonTestCase, Hands, noise
from tests.routes import REGISTRY
from tests.store_contract import ANY, START, confirmed, failing, key_of, put, read, scratch

KEY = EntryKey(REGISTRY, Kind.MANIFEST, "team/app", "latest")
ENTRY = Entry({ANY: confirmed()})


def reading_only(real: Callable[..., int]) -> Callable[..., int]:
    """
    Return an C{os.open} for a directory that can only be read.
    """

    def opened(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *args, **kwargs)

    return opened


class LossTestCase(SynchronousTestCase):
    """
    A store with some content and entries.
    """

    def setUp(self) -> None:
        self.now = START
        self.root = scratch(self)
        self.store = self.open()
        self.digests = [put(self.store, b"%d" % number) for number in range(50)]
        self.store.save((KEY, ENTRY))
        self.index = self.store.index

    def open(self) -> Store:
        """
        Open the directory as a starting process does.
        """
        store = Store(self.root, lambda: self.now)
        self.addCleanup(store.index.close)
        store.prepare()
        return store

    def files(self) -> list[Path]:
        """
        Return the files of the database in use: itself, its log, its shared memory.
        """
        name = (self.root / POINTER).read_text().strip()
        return [self.root / f"{name}{suffix}" for suffix in ("", "-wal", "-shm")]

    def repaired(self, store: Store) -> None:
        """
        Assert that the index works, and that the scrub restores what it knew of content.
        """
        store.index.settle()
        for _ in scrub(store, lambda: None):
            pass
        self.assertEqual((50, 50 * 4096), store.index.totals[:2])
        self.assertIn(store.index.entry(KEY), (None, ENTRY))
        store.save((KEY, ENTRY))
        self.assertEqual(ENTRY, store.index.entry(KEY))
        self.assertTrue(store.index.database.shared)
        for digest in self.digests:
            self.assertIsNotNone(read(store, digest))


class WhileOpenTests(LossTestCase):
    """
    What happens to the files while a daemon has them open is noticed within a second.
    """

    def test_deleted(self) -> None:
        for gone in ([0, 1, 2], [0], [1], [2]):
            files = self.files()
            for number in gone:
                files[number].unlink()
            news = self.index.settle()
            self.assertTrue(news.everything, "memory may have what is not known any more")
            self.assertNotEqual(files, self.files())
            self.repaired(self.store)

    def test_with_its_pointer(self) -> None:
        (self.root / POINTER).unlink()
        self.assertTrue(self.index.settle().everything)
        self.repaired(self.store)

    def test_swapped(self) -> None:
        """
        By an older copy of itself, with or without its log.
        """
        files = self.files()
        copies = [shutil.copy(path, path.with_name(f"copy{path.name}")) for path in files]
        self.store.save((KEY, Entry({ANY: confirmed(b"newer")})))
        for copy, path in zip(copies, files, strict=True):
            Path(copy).rename(path)
        self.assertTrue(self.index.settle().everything)
        self.assertIsNone(self.index.entry(KEY))
        self.repaired(self.store)

    @contextlib.contextmanager
    def read_while_it_is_written(self) -> Iterator[None]:
        """
        Read like a program that ends its transaction with the block, and have the log grow meanwhile.
        """
        database, log, _ = self.files()
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM content").fetchone()
            for number in itertools.count():
                if log.stat().st_size > 200_000:
                    break
                self.change(number)
            yield

    def change(self, number: int) -> None:
        self.store.save((KEY._replace(reference=f"t{number}"), ENTRY))

    def test_a_program_that_reads_it_all_the_time(self) -> None:
        """
        SQLite can't restart its log, which would use all of the cache's space: there is a new index after ten minutes.
        """
        self.patch(index_files, "LONG_LOG", 100_000)
        other, files = self.open(), self.files()
        with self.read_while_it_is_written():
            for number in range(1, LONG_LOOKS):
                self.change(-number)
                self.assertFalse(self.index.settle().everything)
            self.change(-LONG_LOOKS)
            self.assertTrue(self.index.settle().everything)
            self.assertNotEqual(files, self.files())
            other.index.settle()
            self.assertEqual(other.index.database.files.paths, self.index.database.files.paths)
        self.repaired(other)
        self.repaired(self.store)

    def test_a_log_that_is_long_since_the_last_change(self) -> None:
        """
        As after a large purge, or a long backup, of a daemon that is idle then: the next change restarts it.
        """
        self.patch(index_files, "LONG_LOG", 100_000)
        files = self.files()
        with self.read_while_it_is_written():
            self.index.settle()
        for _ in range(LONG_LOOKS):
            self.now += 1
            self.assertFalse(self.index.settle().everything)
        self.change(-1)
        self.assertFalse(self.index.settle().everything)
        self.assertEqual(files, self.files())

    def test_a_log_that_was_long_for_a_while(self) -> None:
        """
        As after a large purge: it restarts with the next change.
        """
        self.patch(index_files, "LONG_LOG", 100_000)
        files = self.files()
        for _ in range(3):
            with self.read_while_it_is_written():
                for number in range(LONG_LOOKS // 2):
                    self.change(-number)
                    self.assertFalse(self.index.settle().everything)
            self.index.database.rows._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # noqa: SLF001
            self.assertFalse(self.index.settle().everything)
        self.assertEqual(files, self.files())

    def test_cut(self) -> None:
        for number, size in ((0, 5000), (0, 0), (2, 0)):
            os.truncate(self.files()[number], size)
            if number == 2:  # reading from it would be a SIGBUS: a worker that dies of it is replaced
                self.index.database.check_files()
            self.repaired(self.store)

    def test_damaged(self) -> None:
        """
        A statement that reads it finds the damage, or the scrub.
        """
        self.index.database.rows._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # noqa: SLF001
        with self.files()[0].open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 60_000)
        self.index.database.rows.close()
        self.repaired(self.open())

    def test_replaced_by_another_process(self) -> None:
        """
        All processes end up using the same one.
        """
        other = self.open()
        for path in self.files():
            path.unlink()
        other.index.settle()
        self.index.settle()
        self.assertEqual(other.index.database.files.paths, self.index.database.files.paths)
        self.repaired(other)
        self.assertEqual(ENTRY, self.index.entry(KEY))

    def test_no_other_descriptor_of_it_is_ever_closed(self) -> None:
        """
        That would drop the locks that SQLite has on it.
        """
        opened: list[str] = []
        real = os.open

        def noting(path: str, *args: Any, **kwargs: Any) -> int:
            opened.append(str(path))
            return real(path, *args, **kwargs)

        self.patch(os, "open", noting)
        self.index.settle()
        self.repaired(self.store)
        self.assertEqual([], [path for path in opened if ".sqlite3" in path])

    def test_values_that_nobody_wrote(self) -> None:
        """
        A valid page may hold nonsense, as SQLite has no checksums: that is damage, neither an answer nor a failure.
        """
        for change in (
            "UPDATE tag SET digest = x'00ab'",
            "UPDATE tag SET digest = x''",
            "UPDATE tag SET digest = x'07' || digest",
            "UPDATE tag SET digest = 'text'",
            "UPDATE holds SET kind = 7",
            "UPDATE content SET digest = x'00' WHERE digest = (SELECT max(digest) FROM content)",
            "UPDATE content SET used = 'text'",
            "UPDATE content SET used = 9223372036854775807",
            "UPDATE content SET size = x'00'",
            "UPDATE content SET verified = 'text'",
            "UPDATE holds SET confirmed = 'text'",
            "UPDATE holds SET size = -1",
            "UPDATE tag SET size = 1e300",
            "UPDATE total SET blocks = -1",
            "UPDATE total SET blocks = 'text'",
            "DELETE FROM total",
            "INSERT INTO arriving VALUES (x'00', 'token', 1, 5)",
            "INSERT INTO arriving VALUES ('name', 'token', 'text', 'text')",
            "UPDATE sqlite_sequence SET seq = 'text'",
            "CREATE TRIGGER bad BEFORE INSERT ON tag BEGIN SELECT RAISE(ABORT, 'no'); END",
        ):
            held = key_of(f"/v2/team/app/blobs/{self.digests[0]}")
            self.store.save((held, Entry({ANY: confirmed(b"0")})))
            self.index.purge([], [Digest.of(b"purged")])
            rows = self.index.database.rows
            rows._writer.execute(change)  # noqa: SLF001
            self.store.save((KEY._replace(reference="other"), ENTRY))
            for listed in (self.index.entries, self.index.least_recently_used, self.index.arriving):
                with contextlib.suppress(OSError):  # the list that reads it is broken off
                    list(listed())
            self.index.settle()
            self.assertIn(self.index.entry(KEY), (None, ENTRY))
            self.assertIsNot(rows, self.index.database.rows, change)
            self.repaired(self.store)

    def test_a_change_that_nobody_can_make_keeps_no_other_from_being_made(self) -> None:
        def fail(rows: Rows) -> object:
            raise OverflowError("an error of ours")

        self.assertRaises(OverflowError, self.index.changes.change, fail)
        self.store.save((KEY, Entry({ANY: confirmed(b"newer")})))
        self.assertEqual(Entry({ANY: confirmed(b"newer")}), self.index.written(KEY))

    def test_totals_of_another_time_than_the_rows(self) -> None:
        self.index.database.rows._writer.execute("UPDATE total SET files = 7, blocks = 4096, arriving = 12288")  # noqa: SLF001
        self.repaired(self.store)
        self.assertEqual(0, self.index.totals.arriving)

    def test_an_order_of_use_of_another_time_than_the_rows(self) -> None:
        """
        As in a copy that was made while it was written: what the order lacks would never be evicted.
        """
        self.index.close()
        (path, *_) = self.files()
        order = "type, name, tbl_name, rootpage, sql FROM sqlite_master WHERE name = 'content_by_use'"
        hidden: Sequence[object] = ()
        for statement in (f"SELECT {order}", "UPDATE content SET used = used + 10000000", ""):
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as raw:
                raw.execute("PRAGMA writable_schema = ON")
                if not statement:
                    raw.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", hidden)
                elif hidden:
                    raw.execute(f"{statement} WHERE digest IN (SELECT digest FROM content LIMIT 20)")
                else:
                    hidden = raw.execute(statement).fetchone()
                    raw.execute("DELETE FROM sqlite_master WHERE name = 'content_by_use'")
        store = self.open()
        opened = store.index.database.opened
        self.repaired(store)
        self.assertEqual(opened, store.index.database.opened, "what it knows is not lost")
        self.assertEqual(ENTRY, store.index.entry(KEY))
        listed = [(each.used, str(each.digest)) for each in store.index.least_recently_used()]
        self.assertEqual(sorted((each.used, str(each.digest)) for each in store.index.files()), sorted(listed))
        self.assertEqual(sorted(used for used, _ in listed), [used for used, _ in listed])


class TransfersTests(LossTestCase):
    """
    The index is lost while two processes have transfers in flight: their reservations stay.
    """

    def setUp(self) -> None:
        super().setUp()
        self.other = self.open().index
        self.one, self.two = Reservation("one", "1"), Reservation("two", "2")
        self.limit = 2**40
        self.assertEqual(0, self.index.reservations.reserve(self.one, 4096, self.limit))
        self.assertEqual(0, self.other.reservations.reserve(self.two, 8192, self.limit))

    def lose(self) -> None:
        for path in self.files():
            path.unlink()

    def arriving(self) -> list[tuple[Reservation, int]]:
        for each in (self.index, self.other):
            each.settle()
        self.index.settle()
        self.assertEqual(self.index.totals.arriving, sum(each.size for each in self.index.arriving()))
        self.assertEqual(self.index.arriving(), self.other.arriving())
        return [(each.what, each.size) for each in self.index.arriving()]

    def test_each_puts_back_its_own(self) -> None:
        for happens in (self.lose, (self.root / POINTER).unlink, lambda: os.truncate(self.files()[0], 0)):
            happens()
            self.assertEqual([(self.one, 4096), (self.two, 8192)], self.arriving())
        self.index.drop(arriving=[self.one])
        self.assertEqual([(self.two, 8192)], self.arriving())

    def test_before_anything_else_is_promised(self) -> None:
        """
        Also if that reservation finds the damage.
        """
        limit = self.index.size + 12288 + 4096 * 50
        self.lose()
        self.index.settle()
        limit += self.index.size
        self.assertLess(0, self.index.reservations.reserve(Reservation("big"), limit - 4096, limit))
        self.other.settle()
        rows = self.index.database.rows
        rows._writer.execute("DROP TABLE arriving")  # noqa: SLF001
        self.assertLess(0, self.index.reservations.reserve(Reservation("big"), limit - 4096, limit))
        self.assertIsNot(rows, self.index.database.rows)

    def test_what_has_ended_does_not_come_back(self) -> None:
        """
        However it ended: it is content, failed, or was left for resuming, where its file counts.
        """
        more = [Reservation(f"more{number}") for number in range(3)]
        for each in more:
            self.index.reservations.arrive(each, 4096)
        self.index.add(Digest.of(b"more"), 4096, more[0])
        self.index.drop(arriving=more[1:2])
        self.index.reservations.arrive(more[2], 4096, START)
        self.assertLess(0, self.index.reservations.reserve(Reservation("more3"), 2**40, 2**20))
        self.lose()
        self.assertEqual([(self.one, 4096), (self.two, 8192)], self.arriving())

    def test_the_room_of_who_has_claimed_it_since_is_not_taken(self) -> None:
        """
        A process that was stopped for long enough believes that it holds a claim which another has.
        """
        since = Reservation("one", "since")
        self.lose()
        self.other.settle()
        self.assertEqual(0, self.other.reservations.reserve(since, 4096, self.limit))
        self.assertEqual([(since, 4096), (self.two, 8192)], self.arriving())

    def test_with_rows_in_memory_and_back(self) -> None:
        far = f"1 2 0:3 / {os.path.realpath(self.root)} rw - nfs4 server:/x rw"
        patch = self.patch(current_database, "mountinfo", lambda: far)
        self.lose()
        self.index.settle()
        self.assertFalse(self.index.database.shared)
        self.assertEqual([(self.one, 4096, 0)], self.index.arriving())
        patch.restore()
        self.now += AGAIN_SECONDS
        self.assertEqual([(self.one, 4096), (self.two, 8192)], self.arriving())

    def test_a_promise_while_the_index_is_being_replaced(self) -> None:
        """
        It was written into the old one, which another thread has just moved away.
        """
        real, three = Rows.reserve, Reservation("three")

        def reserve(rows: Rows, *args: Any) -> int:
            excess = real(rows, *args)
            self.lose()
            self.index.settle()
            return excess

        patch = self.patch(Rows, "reserve", reserve)
        self.assertEqual(0, self.index.reservations.reserve(three, 4096, self.limit))
        patch.restore()
        self.assertEqual([(self.one, 4096), (three, 4096), (self.two, 8192)], self.arriving())

    def test_content_that_came_into_an_index_that_is_gone_counts(self) -> None:
        """
        Another process has begun a new one, and may have compared its folder already.
        """
        self.lose()
        self.other.settle()
        digest = put(self.store, b"meanwhile")
        self.index.settle()
        self.assertIsNotNone(self.other.known(digest))


class AtStartTests(LossTestCase):
    """
    What happened to the files while no daemon ran.
    """

    def setUp(self) -> None:
        super().setUp()
        self.index.close()

    def test_cut_at_any_byte(self) -> None:
        size = self.files()[0].stat().st_size
        for cut in (0, 1, 99, 100, 4096, size // 2, size - 1):
            os.truncate(self.files()[0], min(cut, self.files()[0].stat().st_size))
            store = self.open()
            self.repaired(store)
            store.index.close()

    def test_nonsense_in_its_place(self) -> None:
        for data in (b"", b"nonsense" * 1000, b"SQLite format 3\0" + bytes(5000)):
            self.files()[0].write_bytes(data)
            store = self.open()
            self.repaired(store)
            store.index.close()

    def test_a_copy_of_the_directory_by_links(self) -> None:
        """
        As C{cp -al} makes them: the rows of one directory are not those of the other.
        """
        one, copy = self.open(), self.root.with_name("copy")
        shutil.copytree(self.root, copy, copy_function=os.link)
        other = Store(copy, lambda: self.now)
        self.addCleanup(shutil.rmtree, copy)
        self.addCleanup(other.index.close)
        other.prepare()
        for digest in self.digests[:20]:
            self.assertTrue(other.unlink(digest))
        for _ in scrub(other, lambda: None):
            pass
        one.index.settle()
        self.assertEqual((30, 50), (other.index.totals.files, one.index.totals.files))
        self.assertEqual(ENTRY, one.index.entry(KEY))
        self.assertEqual(1, one.index.database.opened)

    def test_a_pointer_to_nowhere(self) -> None:
        for data in (b"", b"\xff\xfe", b"../../etc/passwd", b"index-1-00000000.sqlite3", b"index-1-zz.sqlite3"):
            (self.root / POINTER).write_bytes(data)
            store = self.open()
            self.repaired(store)
            store.index.close()

    def test_a_log_that_was_cut_gives_no_repository_what_another_holds(self) -> None:
        """
        SQLite restores the pages of its first part, over newer ones that had got into the database: no row of the other
        repository is left, and its content is. For SQLite nothing is damaged.
        """
        secret = EntryKey(REGISTRY, Kind.BLOB, "team/secret", str(self.digests[0]))
        for turn, cut in enumerate((False, True)):
            store = self.open()
            rows = store.index.database.rows
            rows._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # noqa: SLF001
            store.save((KEY._replace(repository=f"team/first{turn}"), ENTRY))
            size = self.files()[1].stat().st_size
            store.save((secret._replace(repository=f"team/secret{turn}"), Entry({ANY: confirmed(b"0")})))
            rows._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")  # noqa: SLF001
            copies = [path.read_bytes() for path in self.files()[:2]]
            store.index.close()
            for path, data in zip(self.files(), copies, strict=False):
                path.write_bytes(data[:size] if cut and path.name.endswith("-wal") else data)
            store = self.open()
            stranger = f"team/stranger{turn}"
            store.save((KEY._replace(repository=stranger), ENTRY))
            self.assertIsNone(store.index.entry(secret._replace(repository=stranger)))
            if cut:
                self.assertIsNone(store.index.entry(secret._replace(repository=f"team/secret{turn}")))
            store.index.close()

    def test_what_is_no_file_in_the_place_of_one(self) -> None:
        """
        Nothing waits for the other end of a pipe, or reads a file without end.
        """
        for number in range(3):
            path = self.files()[number]
            path.unlink(missing_ok=True)
            os.mkfifo(path)
            store = self.open()
            self.repaired(store)
            store.index.close()
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            (self.root / POINTER).unlink()
            make(self.root / POINTER)
            store = self.open()
            self.assertFalse(store.index.database.shared)
            self.assertIsNotNone(read(store, self.digests[0]))
            store.index.close()

    def test_a_link_in_the_place_of_a_lock_gives_nothing_away(self) -> None:
        """
        The owner of the directory must not get a file to which root's commands were led.
        """
        victim = self.root.parent / "victim"
        victim.touch(0o600)
        given: list[str] = []

        def chown(path: Path, *_: object, follow_symlinks: bool = True) -> None:
            given.append(os.path.realpath(path) if follow_symlinks else os.fspath(path))

        self.patch(os, "geteuid", lambda: 0)
        self.patch(os, "chown", chown)
        for name in (LOCK, SCRUBBING, EVICTING):
            (self.root / name).unlink(missing_ok=True)
            (self.root / name).symlink_to(victim)
        store = self.open()
        self.assertFalse(store.index.database.shared)
        for _ in scrub(store, lambda: None):
            pass
        Turn(self.root).take()
        give(self.root / LOCK, self.root)
        self.assertNotIn(str(victim), given)

    def test_another_schema_in_its_place(self) -> None:
        for script in ("CREATE TABLE content (x)", "CREATE TABLE other (x); PRAGMA user_version = 1"):
            path = self.files()[0]
            path.unlink()
            connection = sqlite3.connect(path)
            connection.executescript(script)
            connection.close()
            store = self.open()
            self.repaired(store)
            store.index.close()

    def test_a_newer_version_of_it_is_used(self) -> None:
        """
        Migrations only add: what an older version knows is still there.
        """
        connection = sqlite3.connect(self.files()[0])
        connection.executescript("ALTER TABLE content ADD COLUMN more; CREATE TABLE new (x); PRAGMA user_version = 7")
        connection.close()
        files = self.files()
        store = self.open()
        self.assertEqual(files, self.files())
        self.assertEqual(ENTRY, store.index.entry(KEY))
        self.repaired(store)

    def test_older_databases_go(self) -> None:
        """
        Those of another layout stay: a newer daemon may come back.
        """
        newer = self.root / "index-2-01234567.sqlite3"
        newer.touch()
        self.files()[0].write_bytes(b"nonsense")
        store = self.open()
        names = {path.name for path in self.root.glob("index-*.sqlite3")}
        self.assertEqual({newer.name, self.files()[0].name}, names)
        self.repaired(store)


class UnusableTests(LossTestCase):
    """
    The daemon runs on with rows in memory, and returns to a file as soon as possible.
    """

    def fall_back(self) -> Store:
        store = self.open()
        self.assertFalse(store.index.database.shared)
        digest = put(store, b"while in memory")
        self.assertIsNotNone(read(store, digest))
        self.assertEqual((1, 4096), store.index.totals[:2])
        self.digests.append(digest)
        return store

    def recovered(self, store: Store) -> None:
        self.now += AGAIN_SECONDS
        store.index.settle()
        self.assertTrue(store.index.database.shared)
        for _ in scrub(store, lambda: None):
            pass
        self.assertEqual(len(self.digests), store.index.totals.files)

    def test_where_locks_do_not_work(self) -> None:
        for flock in (failing(errno.ENOLCK), lambda *_: None):
            patch = self.patch(fcntl, "flock", flock)
            with capturedLogs() as events:
                store = Store(self.root, lambda: self.now)
                self.addCleanup(store.index.close)
                for _ in range(20):
                    self.now += 1
                    store.index.settle()
            self.assertFalse(store.index.database.shared)
            self.assertEqual(1, sum("in memory" in event["log_format"] for event in events))
            patch.restore()
            self.now += AGAIN_SECONDS
            store.index.settle()
            self.assertTrue(store.index.database.shared)

    def test_on_a_file_system_that_is_far(self) -> None:
        """
        Its locks and its shared memory may seem to work.
        """
        line = f"1 2 0:3 / {os.path.realpath(self.root)} rw - nfs4 server:/x rw"
        patch = self.patch(current_database, "mountinfo", lambda: line)
        store = self.fall_back()
        self.assertIn("nfs4", store.index.database.problem)
        patch.restore()
        self.recovered(store)

    def test_without_write_ahead_logging(self) -> None:
        real = Rows.__init__

        def opened(rows: Rows, path: Path | None = None, **options: bool) -> None:
            if path is not None:
                raise UnusableError("SQLite can't use write-ahead logging there, only delete")
            real(rows, path, **options)

        patch = self.patch(Rows, "__init__", opened)
        store = self.fall_back()
        patch.restore()
        self.recovered(store)

    def test_a_directory_that_can_only_be_read(self) -> None:
        """
        What the index knows is known; changes are not recorded. With its log, and without.
        """
        for closes in (False, True):
            if closes:
                self.index.close()
            patch = self.patch(os, "open", reading_only(os.open))
            index = Index(self.root, lambda: self.now)
            index.open()
            patch.restore()
            self.addCleanup(index.close)
            self.assertEqual(ENTRY, index.entry(KEY))
            self.assertEqual(50, index.totals.files)
            self.assertRaises(UnusableError, index.reservations.reserve, Reservation("name"), 1, 2**30)
            index.uses.use(self.digests[0])
            index.settle()
            self.now += AGAIN_SECONDS
            index.settle()
            self.assertEqual(0, index.reservations.reserve(Reservation("name"), 1, 2**30))

    def test_a_directory_that_can_only_be_read_and_that_others_write_later(self) -> None:
        """
        A file that was opened as immutable is opened again when it changes.
        """
        self.index.close()
        patch = self.patch(os, "open", reading_only(os.open))
        index = Index(self.root, lambda: self.now)
        index.open()
        self.addCleanup(index.close)
        self.assertEqual(ENTRY, index.entry(KEY))
        patch.restore()
        newer = Entry({ANY: confirmed(b"newer")})
        other = self.open()
        other.save((KEY, newer))
        self.patch(os, "open", reading_only(os.open))
        self.now += AGAIN_SECONDS
        self.assertTrue(index.settle().everything)
        self.assertEqual(newer, index.entry(KEY))

    def test_what_waits_is_bounded(self) -> None:
        """
        Data that ECR can be asked for again gives way to what counts.
        """
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        for _ in range(LATE_SAVES + 10):
            self.store.save((KEY, ENTRY))
        self.assertEqual(LATE_SAVES, len(self.index.changes._waiting))  # noqa: SLF001
        self.index.drop([self.digests[0]])
        self.assertEqual(LATE_SAVES + 1, len(self.index.changes._waiting))  # noqa: SLF001

    def test_what_waits_is_bounded_by_its_entries(self) -> None:
        """
        A manifest may add a thousand entries at once.
        """
        writer = self.index.database.rows._writer  # noqa: SLF001
        writer.execute("PRAGMA query_only = 1")
        facts = [(key_of(f"/v2/a/manifests/{number}"), ENTRY) for number in range(1000)]
        for _ in range(LATE_SAVES):
            self.store.save(*facts)
        self.assertEqual(LATE_ENTRIES // 1000, len(self.index.changes._waiting))  # noqa: SLF001
        writer.execute("PRAGMA query_only = 0")
        self.index.settle()
        self.store.save((KEY, ENTRY))
        self.assertEqual(ENTRY, self.index.entry(KEY))

    def test_a_full_disk(self) -> None:
        """
        Files are unlinked first, rows follow once that is possible; so do entries, if not too many wait.
        """
        self.index.database.rows._writer.execute("PRAGMA max_page_count = 1")  # noqa: SLF001
        with capturedLogs() as events:
            for number in range(3000):
                self.store.save((key_of(f"/v2/a/manifests/{number:0120}"), ENTRY))
        self.assertEqual(1, len({event.get("once") for event in events if "can't be written" in event["log_format"]}))
        self.assertEqual([self.digests[0]], self.store.evict_unused([self.digests[0]]))
        self.assertFalse(self.store.has(self.digests[0]))
        self.index.database.rows._writer.execute("PRAGMA max_page_count = 100000")  # noqa: SLF001
        self.index.settle()
        self.assertIsNone(self.index.known(self.digests[0]))
        for number in range(LATE_SAVES):
            self.assertIsNotNone(self.index.entry(key_of(f"/v2/a/manifests/{number:0120}")))
        self.assertEqual(0, len(self.index.changes._waiting))  # noqa: SLF001

    def test_a_lock_that_another_process_keeps_is_not_waited_for(self) -> None:
        self.patch(locks, "_LOCK_PAUSE", 0)
        with (self.root / LOCK).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            store = self.fall_back()
        self.recovered(store)


WRITER = """
    import sys, time
    from pathlib import Path
    from ecrproxy.cache.store import Store
    from ecrproxy.cache.claim import Claim
    from ecrproxy.cache.janitor import Janitor
    from ecrproxy.oci import Digest
    from tests.store_contract import confirmed, entry_of, key_of
    store = Store(Path(sys.argv[1]), time.time)
    store.prepare()
    janitor = Janitor(store, 1000 * 4096, None, None)
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        data = f"{sys.argv[2]} {number}".encode() * 1000
        digest = Digest.of(data)
        claim = store.claim(digest)
        if isinstance(claim, Claim):
            if janitor.make_room(claim.reservation, len(data)):
                writer = store.writer(claim, digest, len(data))
                writer.write(0, [data])
                writer.commit()
                writer.close()
            else:
                store.arriving.let_go(claim)
        store.save((key_of(f"/v2/a/manifests/{number % 50}"), entry_of(confirmed(data))))
        content = store.open(digest)
        if content is not None:  # the other one may have evicted it
            content.close()
        if not number % 20:
            store.index.settle()
            store.sweep()
"""


class KillTests(SynchronousTestCase):
    """
    Processes that are killed at any time, and files that are cut at any byte.
    """

    rounds = int(os.environ.get("INDEX_ROUNDS", "4"))

    def test_nothing_is_wrong_after_kills_and_cuts(self) -> None:
        """
        Two processes write, one of them is killed, both are from time to time, with the database cut at a random
        offset: content is right, and the index matches the directory in the end.

        INDEX_ROUNDS=200 does what SQLite does to test itself.
        """
        chance, root = random.Random(3), scratch(self)
        root.mkdir()
        for turn in range(self.rounds):
            writers = [self.write(root, f"{turn} {each}") for each in range(2)]
            for writer in writers:
                assert writer.stdout is not None
                self.assertEqual(b"ready\n", writer.stdout.readline())
            for writer in writers:
                with self.assertRaises(subprocess.TimeoutExpired):
                    writer.wait(chance.random() * 0.4)
                writer.kill()
                writer.wait()
            if turn % 2:
                self.cut(root, chance)
            self.hold(root)

    def write(self, root: Path, name: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", textwrap.dedent(WRITER), str(root), name]
        writer = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
        assert writer.stdout is not None
        self.addCleanup(writer.stdout.close)
        self.addCleanup(writer.wait)
        self.addCleanup(writer.kill)
        return writer

    def cut(self, root: Path, chance: random.Random) -> None:
        paths = sorted(root.glob(f"{POINTER}-*.sqlite3*"))
        path = chance.choice([each for each in paths if not each.name.endswith("-shm")])
        os.truncate(path, chance.randrange(path.stat().st_size + 1))

    def hold(self, root: Path) -> None:
        now = [time.time()]
        store = Store(root, lambda: now[0])
        store.prepare()
        for _ in range(2):
            store.sweep()
            now[0] += 60
        for _ in range(2):  # damage that the first one finds begins another index
            try:
                for _ in scrub(store, lambda: None):
                    pass
            except OSError:
                continue
        files = {path.name: path for path in (root / "content").rglob("*") if path.is_file()}
        for name, path in files.items():
            self.assertEqual(name, Digest.of(path.read_bytes()).hex)
        listed = [each for page in self.pages(store) for each in page]
        self.assertEqual(files.keys(), {each.digest.hex for each in listed})
        sizes = sum(-(-each.size // 4096) * 4096 for each in listed)
        arriving = sum(size for _, size, _ in store.index.arriving())
        self.assertEqual((len(files), sizes, arriving), store.index.totals[:3])
        self.assertEqual(arriving, sum(-(-p.stat().st_size // 4096) * 4096 for p in store.arriving.folder.iterdir()))
        for key, entry, _ in store.index.entries():
            self.assertEqual(1, len(entry.answers), key)
        store.index.close()

    def pages(self, store: Store) -> list[list[File]]:
        found = [store.index.files()]
        while found[-1]:
            found.append(store.index.files(found[-1][-1].digest))
        return found


class EarlierTestCase(DaemonTestCase):
    """
    A cache directory of a version that kept entries in files.
    """

    def plant(self, key: EntryKey, cache_key: str, digest: Digest, size: int, accept: str = "[]") -> Path:
        name = old_name(cache_key, key)
        path = self.root / "entries" / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        media_type = "application/vnd.oci.image.manifest.v1+json" if key.kind is Kind.MANIFEST else "x/y"
        path.write_text(
            f'{{"registry": "{key.registry}", "kind": "{key.kind.value}", "repository": "{key.repository}",'
            f' "reference": "{key.reference}", "answers": [{{"accept": {accept}, "mediaType": "{media_type}",'
            f' "digest": "{digest}", "size": {size}, "confirmed": {self.clock.seconds() - 60}}}]}}'
        )
        return path


class TakeOverTests(EarlierTestCase):
    """
    It is taken over.
    """

    def test_serves_what_it_has_without_ecr(self) -> None:
        """
        Content is adopted, entries are imported, and the log says how many; other files are removed.
        """
        layer, registry = noise("layer", 100_000), self.daemon.registry
        image = self.standin.push_image("team/app", "v1", layers=[layer])
        manifest = Digest.parse(image.digest)
        for data in (layer, image.manifest):
            path = self.root / "content/sha256" / Digest.of(data).hex[:2] / Digest.of(data).hex
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        tag, digest = EntryKey(registry, Kind.MANIFEST, "team/app", "v1"), Digest.of(layer)
        fact = EntryKey(registry, Kind.BLOB, "team/app", str(digest))
        held = EntryKey(registry, Kind.MANIFEST, "team/app", str(manifest))
        self.plant(tag, "/v2/team/app/manifests/v1", manifest, len(image.manifest))
        self.plant(fact, "\0fact", digest, len(layer))
        self.plant(held, f"/v2/team/app/manifests/{manifest}", manifest, len(image.manifest))
        self.plant(tag._replace(reference="other"), "a client's", manifest, len(image.manifest))
        self.plant(tag._replace(reference="x"), "/v2/team/app/manifests/x", manifest, 1, '["no type"]')
        (self.root / "entries/00").mkdir(exist_ok=True)
        (self.root / "entries/00/nonsense").write_bytes(b"\xff")
        (self.root / "purged").touch()
        self.start()
        self.standin.refuse("registry")
        self.assertWhole(self.get("/v2/team/app/manifests/v1"), image.manifest, "STALE")
        self.assertWhole(self.get(f"/v2/team/app/manifests/{manifest}"), image.manifest, "HIT")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), layer, "HIT")
        self.assertEqual({tag, fact, held}, self.entries().keys())
        self.assertFalse((self.root / "entries").exists() or (self.root / "purged").exists())
        self.assertIn("3 entries imported, 3 dropped", self.logged())
        self.assertEqual(2, self.index.totals.files)

    def test_what_is_known_better_by_now_stays(self) -> None:
        registry = self.daemon.registry
        tag = EntryKey(registry, Kind.MANIFEST, "team/app", "v1")
        entry = Entry({ANY: confirmed(when=self.clock.seconds())})
        self.index.save([(tag, entry)])
        self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"old"), 3)
        self.start()
        self.assertEqual({tag: entry}, self.entries())

    def test_what_an_earlier_version_has_learned_since_counts(self) -> None:
        """
        It ran again, or beside this one.
        """
        registry = self.daemon.registry
        tag = EntryKey(registry, Kind.MANIFEST, "team/app", "v1")
        self.index.save([(tag, Entry({ANY: confirmed(when=self.clock.seconds() - 3600)}))])
        self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"newer"), 5)
        self.start()
        self.assertEqual(Digest.of(b"newer"), self.entries()[tag].answers[ANY].descriptor.digest)

    def test_what_is_asked_for_is_imported_at_once(self) -> None:
        """
        The request does not wait for thousands of other entries, and what is removed then does not come back.
        """
        store, registry = self.daemon.store, self.daemon.registry
        tag = EntryKey(registry, Kind.MANIFEST, "team/app", "v1")
        digest = Digest.of(b"layer")
        fact = EntryKey(registry, Kind.BLOB, "team/app", str(digest), "another variant")
        paths = [
            self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8),
            self.plant(fact, "\0fact", digest, 5),
        ]
        for key in (tag, fact):
            self.assertIsNotNone(store.entry(key), key)
        self.assertFalse(any(path.exists() for path in paths))
        store.index.forget(tag)
        self.assertIsNone(store.written(tag))
        self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        self.assertIsNotNone(store.written(tag))

    def test_who_lists_or_purges_meanwhile_sees_what_is_not_imported_yet(self) -> None:
        """
        It would be served, and could not be purged. The running import goes on, and counts its work.
        """
        keys = [EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", f"v{number}") for number in range(3)]
        for key in keys:
            self.plant(key, f"/v2/team/app/manifests/{key.reference}", Digest.of(b"manifest"), 8)
        importing, inventory = take_over(self.root, self.index), Inventory(self.daemon.store)
        next(importing)
        survey = Survey.of(inventory.entries(), inventory.content())
        self.assertEqual({str(each) for each in keys}, {each.name for each in survey.entries})
        self.assertEqual(3, inventory.remove(keys, []).entries)
        for _ in importing:
            pass
        self.assertEqual([], list(inventory.entries()))
        self.assertIn("2 entries imported, 0 dropped", self.logged())
        self.assertIn("1 entries imported, 0 dropped", self.logged())

    def test_who_lists_meanwhile_hears_of_each_step(self) -> None:
        """
        It may take minutes, and the command does not wait for a silent daemon for more than one.
        """
        hands, tag = Hands(), EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v")
        daemon = self.start(in_thread=hands)
        for number in range(300):
            key = tag._replace(reference=f"v{number}")
            self.plant(key, f"/v2/team/app/manifests/{key.reference}", Digest.of(b"manifest"), 8)
        hands.idle = False
        reply = daemon.ask_admin("/api/entries", headers={"X-Ecrproxy-Api": "1"})
        hands.work()
        daemon.flush()
        self.assertIn(b'{"imported":', reply.body)
        self.assertTrue((self.root / "entries").exists())
        hands.idle = True
        hands.work_off()
        daemon.flush()
        self.assertEqual("whole", reply.ended)
        told = [json.loads(line) for line in reply.body.splitlines()]
        self.assertEqual(300, sum(each.get("imported", 0) for each in told))
        self.assertEqual(300, sum("name" in each for each in told))

    def test_it_stays_until_the_index_has_a_file(self) -> None:
        """
        On a full disk the index is in memory, and what is imported would be lost with that once there is room again.

        What is purged until then does not come back, nor what ECR denies.
        """
        full, now = [OSError(errno.ENOSPC, "full")], [START]

        def see_room() -> None:
            for each in full:
                raise each

        index = Index(self.root, lambda: now[0], before_opening=see_room)
        self.addCleanup(index.close)
        store = Store(self.root, lambda: now[0], index)
        keys = [EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", f"v{number}") for number in range(4)]
        paths = [self.plant(key, f"/v2/team/app/manifests/{key.reference}", Digest.of(b"manifest"), 8) for key in keys]
        self.assertIsNotNone(store.entry(keys[0]))
        listed = {each["name"] for each in Inventory(store).entries() if "name" in each}
        self.assertEqual({str(each) for each in keys}, listed)
        Inventory(store).remove(keys[2:3], [])
        index.hide_answers(keys[3], [ANY], now[0])
        store.deny(keys[3], [ANY], START)
        self.assertEqual([True, True, False, False], [each.exists() for each in paths])
        self.assertEqual([None, None], [store.entry(each) for each in keys[2:]])
        self.assertNotIn("taken over", self.logged())
        full.clear()
        now[0] += AGAIN_SECONDS
        index.settle()
        for _ in take_over(self.root, index):
            pass
        self.assertEqual(set(keys[:2]), {key for key, _, _ in index.entries()})
        self.assertFalse(any(each.exists() for each in paths))

    def test_it_stays_while_another_process_writes(self) -> None:
        """
        A process that is killed until then has not lost it, nor one that has more to write than it can keep.
        """
        index = Index(self.root, lambda: START)
        self.addCleanup(index.close)
        index.open()
        tag = EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v1")
        path = self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        (database,) = self.root.glob("index-*.sqlite3")
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in take_over(self.root, index):
                pass
        self.assertTrue(path.exists())
        index.changes.flush(waiting=True)
        for _ in take_over(self.root, index):
            pass
        self.assertEqual({tag}, {key for key, _, _ in index.entries()})
        self.assertFalse(path.exists())

    def test_content_is_counted_first(self) -> None:
        """
        The limit is kept while entries are still imported: there may be hundreds of thousands.
        """
        put(self.daemon.store, b"content")
        content = self.root / "content/sha256" / Digest.of(b"more").hex[:2] / Digest.of(b"more").hex
        content.parent.mkdir(parents=True, exist_ok=True)
        content.write_bytes(b"more")
        tag = EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v1")
        path = self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        there = [(path.exists(), self.index.totals.files) for _ in scrub(self.daemon.store, lambda: None)]
        self.assertEqual((True, 2), [each for each in there if each[0]][-1])
        self.assertFalse(path.exists())


class TakeOverTogetherTests(EarlierTestCase):
    """
    It is taken over while others use it.
    """

    index_in_memory = False

    def test_what_is_purged_or_denied_while_it_is_imported_does_not_come_back(self) -> None:
        """
        Its file had been read by then, in a process that was about to write the entry.
        """
        index, other = Index(self.root, self.clock.seconds), self.daemon.store
        self.addCleanup(index.close)
        keys = [EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", f"v{number}") for number in range(3)]
        for key in keys:
            self.plant(key, f"/v2/team/app/manifests/{key.reference}", Digest.of(b"manifest"), 8)

        def later() -> None:
            index.changes.wake_writer = None
            Inventory(other).remove([keys[0]], [])
            other.index.hide_answers(keys[1], [ANY], self.clock.seconds())
            other.deny(keys[1], [ANY], self.clock.seconds())
            index.changes.flush()

        index.changes.wake_writer = later
        for _ in take_over(self.root, index):
            pass
        self.assertEqual({keys[2]}, {key for key, _, _ in index.entries()})

    def test_what_is_imported_once_a_404_has_been_written_does_not_stay(self) -> None:
        """
        The answers were hidden and deleted before another process imported them, and their file was still there.
        """
        index, other = Index(self.root, self.clock.seconds), self.daemon.store
        self.addCleanup(index.close)
        tag = EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v1")
        self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        other.index.hide_answers(tag, [ANY], self.clock.seconds())
        other.index.changes.flush(waiting=True)
        self.assertEqual([1], list(take_over(self.root, index)))
        other.deny(tag, [ANY], self.clock.seconds())
        other.index.changes.flush(waiting=True)
        self.assertEqual([], list(index.entries()))

    def test_what_is_denied_while_nothing_can_be_imported_does_not_come_back(self) -> None:
        """
        Another process writes, or the disk is full: nobody knows then what the earlier version knew of the tag.
        """
        tag = EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v1")
        self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        (database,) = self.root.glob("index-*.sqlite3")
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            self.get("/v2/team/app/manifests/v1")
        self.index.changes.flush(waiting=True)
        self.start()
        self.assertEqual({}, self.entries())

    def test_what_can_not_be_imported_is_listed_and_purged(self) -> None:
        """
        It is imported later, and would be served then.
        """
        store = self.daemon.store
        tag = EntryKey(self.daemon.registry, Kind.MANIFEST, "team/app", "v1")
        path = self.plant(tag, "/v2/team/app/manifests/v1", Digest.of(b"manifest"), 8)
        (database,) = self.root.glob("index-*.sqlite3")
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            survey = Survey.of(Inventory(store).entries(), iter(()))
        self.assertEqual([str(tag)], [each.name for each in survey.entries])
        Inventory(store).remove([tag], [])
        self.assertFalse(path.exists())
        store.index.changes.flush(waiting=True)
        self.assertEqual([], [each for each in Inventory(store).entries() if "name" in each])


class ShutOutTests(DaemonTestCase):
    """
    One of the processes on a directory can't open the index that the others have open.
    """

    index_in_memory = False

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", 300_000)
        self.standin.push_blob("team/app", self.data)

    def pull(self, data: bytes) -> str | None:
        reply = self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}")
        self.assertWhole(reply, data)
        return reply.cache

    def reasons(self) -> str:
        """
        Return the problem, though all requests are served.
        """
        self.pass_time(FRESH_SECONDS)
        reply = self.get("/readyz")
        self.assertEqual(200, reply.code)
        return str(json.loads(reply.body)["reasons"])

    def another_user(self) -> list[Any]:
        """
        Run this process as another user than the owner of the index files.
        """
        return [self.patch(os, "geteuid", lambda: 12345), self.patch(os, "access", lambda *_, **__: False)]

    def lock_of_another_user(self) -> list[Any]:
        real = os.open

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            if str(path).endswith(LOCK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        return [self.patch(os, "open", opened)]

    def too_many_files(self) -> list[Any]:
        real = os.open

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            return failing(errno.EMFILE)() if "index" in str(path) else real(path, *args, **kwargs)

        return [self.patch(os, "open", opened)]

    def too_many_files_for_sqlite(self) -> list[Any]:
        """
        SQLite opens several for a connection, and has an error of its own.
        """
        real = sqlite3.connect

        def connect(name: str, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = real(
                ":memory:" if name == ":memory:" else "file:/nowhere/x?mode=rw", **options
            )
            return connection

        return [self.patch(sqlite3, "connect", connect)]

    def check(self, shut_out: Callable[[], list[Any]], saying: str, there: str = "REVALIDATED") -> None:
        first, data = self.daemon, noise("y", 300_000)
        self.pull(self.data)
        patches = shut_out()
        self.start()
        self.pass_time(1)
        self.assertFalse(self.index.database.shared)
        self.assertEqual((there, "BYPASS"), (self.pull(self.data), self.pull(data)))
        self.assertIn(saying, self.reasons())
        self.assertIn("nothing new is cached", self.reasons())
        self.assertEqual(1, len(self.files()))
        self.assertEqual(first.store.index.totals.files, 1)
        for patch in patches:
            patch.restore()
        self.pass_time(AGAIN_SECONDS)
        self.index.settle()
        self.assertTrue(self.index.database.shared)
        self.assertEqual("[]", self.reasons())
        self.assertEqual(("MISS", "HIT"), (self.pull(data), self.pull(data)))
        first.store.index.settle()
        self.assertEqual(2, first.store.index.totals.files)
        self.assertEqual(1, self.logged().count("The cache's index can't be used"))

    def test_by_another_user(self) -> None:
        self.check(self.another_user, "runs as 12345; have all processes on the directory run as the user that owns it")

    def test_by_the_rights_of_its_lock(self) -> None:
        """
        The index can still be read.
        """
        self.check(self.lock_of_another_user, "index.lock'; have all processes on the directory run as the user", "HIT")

    def test_by_its_limit_of_open_files(self) -> None:
        self.check(self.too_many_files, "Too many open files; raise the limit of open files")

    def test_by_its_limit_of_open_files_as_sqlite_tells_it(self) -> None:
        self.check(self.too_many_files_for_sqlite, "unable to open database file; raise the limit of open files")

    def test_one_that_could_be_written_once(self) -> None:
        """
        It says so; what it reserves is known to no other process, and is little.
        """
        self.pull(self.data)
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        self.assertEqual("BYPASS", self.pull(noise("y", 300_000)))
        self.index.settle()
        self.assertIn("the cache's index can't be written: attempt to write a readonly database", self.reasons())
        self.index.database.rows._writer.execute("PRAGMA query_only = 0")  # noqa: SLF001
        self.index.settle()
        self.assertEqual("[]", self.reasons())

    def test_one_that_can_be_written_again_though_nothing_is_to_be_written(self) -> None:
        self.index.settle()
        self.index.database.rows._writer.execute("PRAGMA query_only = 1")  # noqa: SLF001
        self.assertRaises(UnusableError, self.index.reservations.reserve, Reservation("x"), 1, 2**30)
        self.index.settle()
        self.assertIn("can't be written", self.index.trouble)
        self.index.database.rows._writer.execute("PRAGMA query_only = 0")  # noqa: SLF001
        self.index.settle()
        self.assertEqual("", self.index.trouble)

    def test_a_mode_that_somebody_changed_costs_the_index_alone(self) -> None:
        """
        The process that has the old one open follows.
        """
        self.pull(self.data)
        first, denied = self.index, (self.root / POINTER).read_text().strip()
        self.patch(os, "access", lambda path, *_, **__: denied not in str(path))
        self.start()
        self.pass_time(1)
        first.settle()
        self.assertTrue(self.index.database.shared)
        self.assertNotEqual(denied, (self.root / POINTER).read_text().strip())
        self.index.adopt([File(Digest.of(b"x"), 1, START)])
        self.assertIsNotNone(first.known(Digest.of(b"x")))
        self.index.drop([Digest.of(b"x")])


class MountTests(SynchronousTestCase):
    def test_which_are_far(self) -> None:
        kinds: dict[str, bool] = {"ext4": False, "overlay": False, "fuse.overlayfs": False, "nfs": True, "9p": True}
        for kind, far in {**kinds, "fuse": True, "fuse.sshfs": True, "cifs": True, "fuseblk": False}.items():
            mount = find_mount(f"1 2 0:3 / /cache rw - {kind} x rw", "/cache/dir")
            assert mount is not None
            self.assertEqual(far, mount.is_far, kind)
