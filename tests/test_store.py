"""
The cache directory is the only truth: whatever was done to it, the store returns verified content or nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import stat
import tracemalloc
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import allocation
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.entries import ANSWERS_LIMIT, Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.locks import remove_unused
from ecrproxy.cache.paths import arriving_path
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.scrub import scrub
from ecrproxy.cache.sqlite import Rows
from ecrproxy.cache.store import Store
from ecrproxy.cache.troubles import QUIET_SECONDS
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import MANIFEST_TYPES, Digest, Kind
from tests import store_contract
from tests.routes import REGISTRY
from tests.store_contract import (
    ANY,
    INDEX_TYPE,
    MANIFEST_TYPE,
    START,
    begin,
    being_read,
    confirmed,
    entry_of,
    failing,
    give_to_another,
    key_of,
    put,
    read,
    scratch,
)


def open_files() -> int:
    """
    Count the files that this process has open.
    """
    gc.collect()  # leftovers of earlier tests would disappear at any time
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def files_in(folder: Path) -> list[str]:
    """
    List all files in a directory, at any depth.
    """
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


class DirectoryContractTests(store_contract.StoreContract):
    def make_store(self) -> Store:
        """
        Create a new directory.
        """
        store = Store(scratch(self), lambda: START)
        store.prepare()
        return store


class StoreTests(SynchronousTestCase):
    """
    A directory whose clock the test sets.
    """

    def setUp(self) -> None:
        self.now = START
        self.store = self.reopened(scratch(self))
        self.key = key_of("/v2/a/manifests/latest")

    def reopened(self, root: Path) -> Store:
        """
        Open a directory as a starting daemon does.
        """
        store = Store(root, lambda: self.now, Index(root, lambda: self.now, memory=True))
        self.addCleanup(store.index.close)
        store.prepare()
        store.sweep()
        for _ in scrub(store, lambda: None):
            pass
        return store

    def path_of(self, digest: Digest) -> Path:
        """
        Return the path of content.
        """
        return self.store.root / self.store.content_path(digest)

    def plant(self, digest: Digest) -> Path:
        """
        Remove a content file so that something else can take its place.
        """
        path = self.path_of(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class StartTests(StoreTests):
    """
    A daemon starts with what the previous one left, and nothing incomplete.
    """

    def test_a_directory_is_made_where_none_is(self) -> None:
        """
        Parents too, readable only for this user, and no probe file is left.
        """
        root = scratch(self) / "deep" / "cache"
        store = Store(root, lambda: START)
        self.addCleanup(store.index.close)
        store.prepare()
        self.assertEqual([], [name for name in files_in(root) if not name.startswith("index")])
        self.assertEqual(0o700, stat.S_IMODE((root / "content").stat().st_mode))
        put(store, b"x")

    def test_a_directory_that_cannot_be_written_is_told(self) -> None:
        """
        It is an error at the start, and in every later check.
        """
        blocked = scratch(self)
        blocked.write_text("a file where the directory should be")
        self.assertRaises(OSError, Store(blocked, lambda: START).prepare)
        self.store.checks.run()
        self.store.arriving.folder.rmdir()
        self.store.arriving.folder.touch()
        self.assertRaises(OSError, self.store.checks.run)

    def begun(self, number: int, *, there: bool = True) -> tuple[Store, bool]:
        """
        Start while the disk fails so, with earlier content or without a directory.
        """
        root = scratch(self)
        if there:
            put(self.reopened(root), b"x")
        store = Store(root, lambda: self.now)
        patches = [self.patch(Path, "write_bytes", failing(number))]
        if not there:
            patches.append(self.patch(Path, "mkdir", failing(number)))
        try:
            return store, store.begin()
        finally:
            for patch in patches:
                patch.restore()

    def test_a_disk_that_fails_keeps_no_daemon_from_starting(self) -> None:
        """
        Nor does it end one that runs. Cached content is served; the trouble is reported.
        """
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE):
            store, warm = self.begun(number)
            self.assertTrue(warm)
            self.assertIn(os.strerror(number), str(store.troubles.reasons()))
            self.assertTrue(store.has(Digest.of(b"x")))
        for number in (errno.ENOSPC, errno.EIO):
            store, warm = self.begun(number, there=False)
            self.assertFalse(warm)
            self.assertIn(os.strerror(number), str(store.troubles.reasons()))
            put(store, b"y")  # its directories are made as soon as possible

    def test_folders_that_are_mounted_apart_are_told_while_the_daemon_runs(self) -> None:
        """
        Rename does not work across two mounts of one file system.
        """
        store = self.reopened(scratch(self))
        self.assertEqual([], store.checks.reasons())
        patch = self.patch(os, "rename", failing(errno.EXDEV))
        self.assertIn("content/ is on another file system than arriving/; move the", str(store.checks.reasons()))
        patch.restore()
        self.now += QUIET_SECONDS
        self.assertEqual([], store.checks.reasons())

    def test_a_directory_that_is_a_wrong_setting_keeps_the_daemon_from_starting(self) -> None:
        for number in (errno.EACCES, errno.EPERM):
            self.assertRaises(OSError, self.begun, number)
        for number in (errno.ENOENT, errno.EROFS):
            self.assertRaises(OSError, self.begun, number, there=False)
        blocked = scratch(self)
        blocked.touch()
        for path in (blocked, blocked / "cache"):
            self.assertRaises(NotADirectoryError, Store(path, lambda: START).begin)

    def test_a_full_disk_is_told_and_leaves_nothing(self) -> None:
        """
        A check that fails midway removes its file.
        """
        self.patch(Path, "write_bytes", lambda path, data: (path.touch(), failing(errno.ENOSPC)()))
        self.assertRaises(OSError, self.store.checks.run)
        self.assertEqual([], files_in(self.store.root))

    def test_what_a_dead_daemon_was_receiving_is_swept(self) -> None:
        """
        Files whose writers have exited are removed, and were never content.
        """
        writer = begin(self.store, Digest.of(b"whole"), 5)
        writer.write(0, [b"whole"])
        writer.close()  # like a killed process
        self.assertEqual(2, len(files_in(self.store.arriving.folder)))
        self.store = self.reopened(self.store.root)
        self.assertEqual([], files_in(self.store.root))
        self.assertIsNone(self.store.open(Digest.of(b"whole")))

    def test_what_is_still_being_received_is_not_swept(self) -> None:
        """
        A file whose writer runs stays, and becomes content.
        """
        writer = begin(self.store, Digest.of(b"whole"), 5)
        self.reopened(self.store.root)
        writer.write(0, [b"whole"])
        writer.commit()
        writer.close()
        self.assertEqual(b"whole", read(self.store, Digest.of(b"whole")))

    def test_sweeping_survives_what_does_not_belong_there(self) -> None:
        """
        Directories and links among the incomplete files neither stop the sweep nor lead it elsewhere; files without a
        name of the cache's own stay.
        """
        outside = scratch(self)
        outside.write_text("not the cache's")
        (self.store.arriving.folder / "directory").mkdir()
        (self.store.arriving.folder / "link").symlink_to(outside.absolute())
        (self.store.arriving.folder / "left").write_text("x")
        self.store.sweep()
        self.assertTrue((self.store.arriving.folder / "left").exists())
        self.assertTrue(outside.exists())

    def test_a_probe_is_swept_when_it_is_old(self) -> None:
        """
        Another daemon on the same directory may be about to read a young one.
        """
        for name, age in (("probe.young", 10), ("probe.old", 1000)):
            (self.store.arriving.folder / name).write_text("probe")
            os.utime(self.store.arriving.folder / name, (START - age, START - age))
        self.store.sweep()
        self.assertEqual(["probe.young"], files_in(self.store.arriving.folder))

    def test_what_is_found_is_what_the_directory_holds(self) -> None:
        """
        Content counts with its blocks, whether or not its arrival was seen.
        """
        put(self.store, b"x" * 5000)
        writer = begin(self.store, Digest.of(b"y"), 5000)
        self.addCleanup(writer.discard)
        again = self.reopened(self.store.root)
        self.assertEqual((1, 8192), again.index.totals[:2])
        self.assertEqual(self.store.index.totals[:2], again.index.totals[:2])

    def test_files_that_are_not_its_own_are_neither_counted_nor_removed(self) -> None:
        digest = Digest.of(b"data")
        mine = self.store.root / self.store.content_path(digest)
        others = ("content/sha256/ab/notes.txt", f"content/sha256/cd/{'ab' * 32}", f"content/ab/{'ab' * 32}")
        for path in (mine, *(self.store.root / each for each in others)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"data")
        again = self.reopened(self.store.root)
        self.assertEqual((1, 4096), again.index.totals[:2])
        self.assertEqual([digest], again.evict_unused(each.what for each in again.candidates()))
        self.assertTrue(all((self.store.root / each).exists() for each in others))
        self.assertFalse(mine.exists())

    def test_recency_survives_a_lost_index(self) -> None:
        """
        What was used last is evicted last, whatever came first.
        """
        digests = []
        for data in (b"one", b"two", b"three"):
            self.now += 1
            digests.append(put(self.store, data))
            read(self.store, digests[-1])
        self.now += 1
        read(self.store, digests[0])
        again = self.reopened(self.store.root)
        self.assertEqual([digests[1], digests[2], digests[0]], [each.what for each in again.candidates()])

    def test_files_from_before_1970_and_from_the_future_are_counted(self) -> None:
        """
        A clock that was once wrong neither hides content nor drops it, nor makes it the last to be evicted.
        """
        old, new = put(self.store, b"x"), put(self.store, b"yz")
        os.utime(self.path_of(old), (-5, -5))
        os.utime(self.path_of(new), (START * 2, START * 2))
        again = self.reopened(self.store.root)
        self.assertEqual([(old, 0.0), (new, START)], [(each.what, each.used) for each in again.candidates()])
        self.assertEqual((b"x", b"yz"), (read(again, old), read(again, new)))

    def test_what_root_makes_belongs_to_the_owner_of_the_directory(self) -> None:
        """
        twistd --uid starts as root, and is another user when the first file arrives.
        """
        given = dict[str, tuple[int, int]]()
        self.patch(os, "geteuid", lambda: 0)
        self.patch(os, "chown", lambda path, *ids, follow_symlinks: given.update({Path(path).name: ids}))
        root = scratch(self)
        self.reopened(root)
        owner = root.stat().st_uid, root.stat().st_gid
        self.assertEqual((owner, owner), (given["content"], given["arriving"]))


def _there(writer: Writer) -> object:
    record = writer._claim.read()  # noqa: SLF001
    return record and record.there


class WriterTests(StoreTests):
    """
    Only complete and verified files become content.
    """

    def test_only_the_arriving_file_shows_before_the_commit(self) -> None:
        """
        Nothing incomplete is ever among the content, and no incomplete file is left behind.
        """
        digest = Digest.of(b"whole")
        writer = begin(self.store, digest, 5)
        writer.write(0, [b"who"])
        self.assertEqual([], files_in(self.store.root / "content"))
        name = f"sha256-{digest.hex}"
        self.assertEqual([name, f"{name}.claim"], files_in(self.store.arriving.folder))
        writer.write(3, [b"le"])
        writer.commit()
        writer.close()
        self.assertEqual([str(self.path_of(digest).relative_to(self.store.root))], files_in(self.store.root))

    def test_a_mismatch_leaves_no_file_at_all(self) -> None:
        """
        Corrupt data uses no disk.
        """
        writer = begin(self.store, Digest.of(b"right"), 5)
        writer.write(0, [b"wrong"])
        self.assertRaises(DigestMismatchError, writer.commit)
        self.assertEqual([], files_in(self.store.root / "content"))
        writer.discard()
        self.assertEqual([], files_in(self.store.root))
        self.assertEqual(0, self.store.index.totals.blocks)

    def test_what_completes_a_file_while_another_thread_hashes_is_hashed(self) -> None:
        """
        That thread may be at its end, and not look again.
        """
        digest = Digest.of(b"first second")
        writer = begin(self.store, digest, 12)
        writer.write(0, [b"first "])
        with ThreadPoolExecutor(1) as threads:
            with writer._hash.turn:  # noqa: SLF001
                finished = threads.submit(writer.finish, 6, b"second", closes=True)
                while not finished.done() and _there(writer) != ((0, 12),):  # which is recorded after it was hashed
                    futures.wait([finished], 0.001)
            finished.result()
        self.assertTrue(self.store.has(digest))

    def test_a_disk_without_room_says_so_at_once(self) -> None:
        """
        The space is allocated before the first byte arrives; if there is none, nothing stays behind.
        """
        before = open_files()
        self.patch(allocation, "fallocate", failing(errno.ENOSPC))
        problem = self.assertRaises(OSError, begin, self.store, Digest.of(b"x"), 10**9)
        self.assertEqual(errno.ENOSPC, problem.errno)
        self.assertEqual([], files_in(self.store.root))
        self.assertEqual(before, open_files())

    def test_the_room_is_taken_of_the_disk(self) -> None:
        """
        A transfer that has begun has its space to the end.
        """
        writer = begin(self.store, Digest.of(b"x"), 300_000)
        self.addCleanup(writer.discard)
        self.assertGreaterEqual(os.fstat(writer.fileno()).st_blocks * 512, 300_000)

    def test_without_fallocate_a_file_begins_without_a_write(self) -> None:
        """
        NFS has none; glibc's emulation writes to each block.
        """
        for name in ("pwritev", "write", "posix_fallocate"):
            self.patch(os, name, failing(errno.EIO))
        for number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            self.patch(allocation, "fallocate", failing(number))
            writer = begin(self.store, Digest.of(b"x%d" % number), 300_000)
            self.addCleanup(writer.discard)
            status = os.fstat(writer.fileno())
            self.assertEqual((writer.size, 0), (status.st_size, status.st_blocks))

    def test_where_libc_has_no_fallocate_a_file_has_its_length(self) -> None:
        self.patch(allocation, "_call", None)
        writer = begin(self.store, Digest.of(b"x"), 300_000)
        self.addCleanup(writer.discard)
        self.assertEqual(writer.size, os.fstat(writer.fileno()).st_size)

    def test_what_fallocate_says_is_raised(self) -> None:
        ends = os.pipe()
        for end in ends:
            self.addCleanup(os.close, end)
        problem = self.assertRaises(OSError, allocation.fallocate, ends[1], 10)
        self.assertIn(problem.errno, (errno.ESPIPE, errno.ENODEV))

    def test_a_call_that_a_signal_interrupts_is_made_again(self) -> None:
        numbers = [errno.EINTR, errno.EINTR]

        def call(*_: int) -> int:
            if not numbers:
                return 0
            ctypes.set_errno(numbers.pop())
            return -1

        self.patch(allocation, "_call", call)
        allocation.fallocate(0, 10)
        self.assertEqual([], numbers)

    def test_a_disk_that_fails_midway_keeps_what_was_written_readable(self) -> None:
        """
        Readers go on from there without the disk.
        """
        writer = begin(self.store, Digest.of(b"first second"), 12)
        self.addCleanup(writer.discard)
        writer.write(0, [b"first "])
        self.patch(os, "pwrite", failing(errno.EIO))
        self.assertRaises(OSError, writer.write, 6, [b"second"])
        self.assertEqual(6, writer.hashed)
        self.assertEqual(b"first ", os.pread(writer.fileno(), writer.hashed, 0))

    def test_a_disk_that_writes_little_at_a_time_loses_nothing(self) -> None:
        """
        Short writes are continued.
        """
        real = os.pwrite
        self.patch(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
        digest = put(self.store, b"0123456789")
        self.assertEqual(b"0123456789", read(self.store, digest))

    def test_a_commit_that_the_disk_refuses_leaves_no_content(self) -> None:
        """
        Content that might not survive a power cut does not count.
        """
        writer = begin(self.store, Digest.of(b"x"), 1)
        writer.write(0, [b"x"])
        self.patch(os, "fsync", failing(errno.EIO))
        self.assertRaises(OSError, writer.commit)
        writer.discard()
        self.assertEqual([], files_in(self.store.root))
        self.assertEqual(0, self.store.index.totals.blocks)

    def test_content_that_is_changed_as_soon_as_it_has_its_name_is_not_proved(self) -> None:
        """
        Other processes may find it before its writer comes to record that it is right.
        """
        rename = Path.rename

        def rename_and_change(path: Path, target: Path) -> None:
            rename(path, target)
            target.write_bytes(b"y")

        self.patch(Path, "rename", rename_and_change)
        content = self.store.open(put(self.store, b"x"))
        assert content is not None
        self.addCleanup(content.close)
        self.assertFalse(content.proved)

    def test_content_is_on_the_disk_before_it_has_its_name(self) -> None:
        """
        After a power cut no name leads to unwritten bytes.
        """
        digest, synced = Digest.of(b"x"), []
        self.patch(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_size, self.store.has(digest))))
        put(self.store, b"x")
        self.assertIn((1, False), synced)
        self.assertTrue(self.store.has(digest))

    def test_an_arriving_file_is_locked_and_private(self) -> None:
        """
        Another process can tell that its writer runs, and another user sees nothing.
        """
        writer = begin(self.store, Digest.of(b"x"), 1)
        self.addCleanup(writer.discard)
        data, claim = sorted(self.store.arriving.folder.iterdir())
        for path, kinds in ((data, [fcntl.LOCK_EX]), (claim, [fcntl.LOCK_EX, fcntl.LOCK_SH])):
            self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
            with path.open("rb") as file:
                for kind in kinds:
                    self.assertRaises(BlockingIOError, fcntl.flock, file, kind | fcntl.LOCK_NB)

    def test_content_is_being_read_by_who_followed_it_in(self) -> None:
        """
        The followers of its arrival still read its file: it is not evicted before they are done.
        """
        writer = begin(self.store, Digest.of(b"x"), 1)
        writer.write(0, [b"x"])
        writer.commit()
        self.assertEqual([], self.store.evict_unused([Digest.of(b"x")]))
        writer.close()
        writer.close()
        self.assertEqual([Digest.of(b"x")], self.store.evict_unused([Digest.of(b"x")]))

    def test_committed_content_is_counted(self) -> None:
        """
        Its bytes count once, however often it arrives.
        """
        for _ in range(2):
            put(self.store, b"12345")
        self.assertEqual((1, 4096), self.store.index.totals[:2])


class ContentTests(StoreTests):
    """
    A changed file is noticed before it is served.
    """

    def test_deleted_content_is_a_miss_and_not_counted(self) -> None:
        """
        Deleting files by hand breaks nothing.
        """
        digest = put(self.store, b"x")
        self.path_of(digest).unlink()
        self.assertIsNone(self.store.open(digest))
        self.store.index.settle()
        self.assertEqual(0, self.store.index.totals.blocks)

    def test_a_bad_file_that_is_gone_says_nothing_of_one_that_has_its_inode(self) -> None:
        """
        The kernel reuses the inode for the next file, which may be a good one from another process.
        """
        for replaced in (False, True):
            digest = put(self.store, b"content")
            content = self.store.open(digest)
            assert content is not None
            if replaced:
                good = self.path_of(digest).with_name("good")
                good.write_bytes(b"content")
                good.rename(self.path_of(digest))
            content.drop(DigestMismatchError("other bytes"))
            self.assertEqual(replaced, self.path_of(digest).exists())
            self.assertIsNone(self.store.proofs.verdict(digest, content.status))
            content.close()

    def test_is_purged_also_while_a_process_has_the_claim_or_no_file_can_be_made(self) -> None:
        """
        Its writer is about to end its claim, or another process checks for it; the disk has no inode.
        """
        digest = put(self.store, b"x")
        path = self.store.root / arriving_path(digest)
        claim = Claim.take(path)
        assert claim is not None
        self.assertTrue(self.store.unlink(digest))
        claim.end()
        digest = put(self.store, b"y")
        opens = os.open

        def full(path: Any, flags: int, *args: Any) -> int:
            return failing(errno.ENOSPC)() if flags & os.O_CREAT else opens(path, flags, *args)

        self.patch(os, "open", full)
        self.assertTrue(self.store.unlink(digest))

    def test_a_link_in_contents_place_leads_nowhere(self) -> None:
        """
        Nothing outside the cache is served, even with the right bytes.
        """
        outside = scratch(self)
        outside.write_bytes(b"x")
        digest = Digest.of(b"x")
        self.plant(digest).symlink_to(outside.absolute())
        self.assertIsNone(self.store.open(digest))
        self.assertTrue(outside.exists())
        self.assertEqual(digest, put(self.store, b"x"))
        self.assertEqual(b"x", read(self.store, digest))

    def test_a_link_in_contents_place_is_not_content(self) -> None:
        """
        What can't be opened is missing: both questions have one answer.
        """
        outside = scratch(self)
        outside.write_bytes(b"x")
        self.plant(Digest.of(b"x")).symlink_to(outside.absolute())
        self.assertFalse(self.store.has(Digest.of(b"x")))

    def test_a_directory_in_contents_place_is_a_miss(self) -> None:
        """
        The request that finds it does not fail.
        """
        self.plant(Digest.of(b"x")).mkdir()
        self.assertFalse(self.store.has(Digest.of(b"x")))
        self.assertIsNone(self.store.open(Digest.of(b"x")))

    def test_a_pipe_in_contents_place_holds_nobody_up(self) -> None:
        """
        A file that would block is a miss.
        """
        path, real = self.plant(Digest.of(b"x")), os.open
        os.mkfifo(path)

        def impatient(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            self.assertTrue(Path(name) != path or flags & os.O_NONBLOCK, "this would wait for a writer for ever")
            return real(name, flags, *args, **kwargs)

        self.patch(os, "open", impatient)
        self.assertFalse(self.store.has(Digest.of(b"x")))
        self.assertIsNone(self.store.open(Digest.of(b"x")))

    def test_another_users_file_is_a_miss(self) -> None:
        """
        Its owner could change it after verification, and set its time back.
        """
        digest = put(self.store, b"x")
        self.store.proofs.forget(digest)
        give_to_another(self, self.store)
        self.assertFalse(self.store.has(digest))
        self.assertIsNone(self.store.open(digest))
        self.assertFalse(self.path_of(digest).exists())

    def test_another_users_file_is_a_miss_though_it_was_verified(self) -> None:
        """
        C{ecr-proxy verify} verifies files of any owner.
        """
        digest = put(self.store, b"x")
        give_to_another(self, self.store)
        self.assertEqual("good", list(Inventory(self.store).verify(digest, keep=False))[-1]["verdict"])
        self.assertIsNone(self.store.open(digest))
        self.assertFalse(self.path_of(digest).exists())

    def test_whoever_the_file_system_gives_our_files_to_is_believed(self) -> None:
        """
        NFS and FUSE may map all files to one user other than the daemon's.
        """
        digest = put(self.store, b"x")
        self.store.proofs.forget(digest)
        give_to_another(self, self.store)
        self.store.checks.run()
        self.assertTrue(self.store.has(digest))
        self.assertIsNotNone(self.store.open(digest))

    def test_whoever_owns_the_directory_by_now_is_believed(self) -> None:
        """
        It was given to another user since the start, with its content; or its owner could not be read then.
        """
        digest = put(self.store, b"x")
        self.store.proofs.forget(digest)
        self.store.directory.owners.clear()
        self.patch(os, "geteuid", lambda: -1)
        self.assertTrue(self.store.has(digest))
        self.assertIsNotNone(read(self.store, digest))

    def test_content_that_cannot_be_opened_is_a_miss_and_logged(self) -> None:
        """
        A file of another user costs a transfer, and the log says why.
        """
        digest = put(self.store, b"x")
        self.patch(os, "open", failing(errno.EACCES))
        with capturedLogs() as events:
            self.assertIsNone(self.store.open(digest))
        self.assertEqual([True], [digest.hex in event["path"] for event in events if "path" in event])
        self.assertEqual((1, 4096), self.store.index.totals[:2])  # it is still there

    def test_a_file_whose_status_can_not_be_read_is_closed_and_unlocked(self) -> None:
        """
        Otherwise each request leaks a descriptor while the disk fails, and locked content is never evicted.
        """
        digest, other = put(self.store, b"x"), Digest.of(b"y")
        before, broken = open_files(), self.patch(os, "fstat", failing(errno.EIO))
        self.assertIsNone(self.store.open(digest))
        self.assertRaises(OSError, self.store.claim, other)
        broken.restore()
        self.assertEqual(before, open_files())
        self.assertTrue(remove_unused(self.path_of(digest)))

    def test_reads_of_an_open_file_do_nothing_else(self) -> None:
        """
        Recording a use waits for the file system's journal, reading ahead for the disk; and so would the event loop.
        """
        advised = set[int]()
        self.patch(os, "posix_fadvise", lambda fd, *about: advised.add(fd) if about[-1] == os.POSIX_FADV_RANDOM else 0)
        arriving, peer = Digest.of(b"arriving"), Digest.of(b"peer")
        writer = begin(self.store, arriving, 3)
        self.addCleanup(writer.discard)
        other = begin(self.store, peer, 3)
        self.addCleanup(other.discard)
        other.write(0, [b"x"])
        followed = self.store.claim(peer)
        assert isinstance(followed, PeerTransfer), followed
        self.addCleanup(followed.close)
        content = self.store.open(put(self.store, b"x"))
        assert content is not None
        self.addCleanup(content.close)
        self.assertEqual(
            [os.O_NOATIME] * 3,
            [fcntl.fcntl(each.fileno(), fcntl.F_GETFL) & os.O_NOATIME for each in (content, writer, followed)],
        )
        self.assertLessEqual({each.fileno() for each in (content, writer, followed)}, advised)

    def test_a_disk_without_writing_serves_what_it_has(self) -> None:
        """
        That a use can't be recorded prevents no reads.
        """
        digest = put(self.store, b"x")
        self.patch(os, "utime", failing(errno.EROFS))
        self.assertEqual(b"x", read(self.store, digest))

    def test_open_content_is_being_read_until_it_is_closed(self) -> None:
        """
        As long as one of its readers is there, whether it is closed or only forgotten.
        """
        digest = put(self.store, b"x")
        one, other = self.store.open(digest), self.store.open(digest)
        assert one is not None
        states = [self.is_read()]
        one.close()
        one.close()
        states.append(self.is_read())
        del other
        states.append(self.is_read())
        self.assertEqual([True, True, False], states)

    def is_read(self) -> bool:
        """
        Return True if the store's only file is being read.
        """
        return being_read(self.store) != set()

    def test_a_use_is_noted(self) -> None:
        """
        Opening content makes it the most recently used, in the index and in the file's own time.
        """
        digest, other = put(self.store, b"x"), put(self.store, b"y")
        self.now = START + 1000
        read(self.store, digest)
        self.assertEqual(START + 1000, self.path_of(digest).stat().st_mtime)
        self.assertEqual([other, digest], [each.what for each in self.store.candidates()])


class EntryTests(SynchronousTestCase):
    """
    An entry keeps the answers for a reference, by the types that the client accepts.
    """

    def test_an_entry_weighs_what_it_takes_of_memory(self) -> None:
        """
        The memory limit uses this estimate.
        """
        key = EntryKey(REGISTRY, Kind.MANIFEST, "a" * 255, "b" * 128)
        rows = Rows()
        self.addCleanup(rows.close)
        for size in range(len(MANIFEST_TYPES) + 1):
            accepts = [frozenset(each) for each in combinations(sorted(MANIFEST_TYPES), size)][:ANSWERS_LIMIT]
            rows.save([(key, Entry({accept: confirmed(str(accept).encode()) for accept in accepts}))], START)
            tracemalloc.start()
            held = [rows.entry(key) for _ in range(20)]
            taken, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert held[0] is not None
            self.assertLess(taken / 20, held[0].weight, size)

    def test_the_latest_answer_fits_the_client(self) -> None:
        """
        An answer for the same Accept set comes first, then the newest answer of a type that the client accepts.
        """
        same = frozenset({INDEX_TYPE, MANIFEST_TYPE})
        entry = entry_of(confirmed(b"manifest", START + 5), confirmed(b"index", START, INDEX_TYPE))
        entry = entry.with_answer(same, confirmed(b"same", START - 5))
        for accept, data in (
            (same, b"same"),
            (frozenset({INDEX_TYPE, "other/type"}), b"index"),
            (same | {"other/type"}, b"manifest"),
            (ANY, b"manifest"),
        ):
            latest = entry.latest(accept)
            assert latest is not None
            self.assertEqual(Digest.of(data), latest.descriptor.digest)
        self.assertIsNone(entry.latest(frozenset({"other/type"})))
        self.assertIsNone(entry_of().latest(ANY))

    def test_a_new_answer_replaces_the_one_for_the_same_clients(self) -> None:
        """
        Others keep theirs.
        """
        entry = entry_of(confirmed(b"old"), confirmed(b"index", START, INDEX_TYPE))
        newer = entry.with_answer(frozenset({MANIFEST_TYPE}), confirmed(b"new", START + 1))
        self.assertEqual(entry_of(confirmed(b"new", START + 1), confirmed(b"index", START, INDEX_TYPE)), newer)

    def test_answers_that_were_not_confirmed_for_longest_make_room(self) -> None:
        """
        Clients that make up Accept headers don't make an entry grow for ever.
        """
        entry = entry_of()
        for number in range(ANSWERS_LIMIT + 3):
            entry = entry.with_answer(frozenset({f"type/{number}"}), confirmed(b"x", START + number))
        self.assertEqual(ANSWERS_LIMIT, len(entry.answers))
        self.assertNotIn(frozenset({"type/2"}), entry.answers)
        self.assertIn(frozenset({"type/3"}), entry.answers)
