"""
Files that arrive tell what is there of them, and are gone on with only when that is sure.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import allocation
from ecrproxy.cache.content import DigestMismatchError, Readers
from ecrproxy.cache.index import Index
from ecrproxy.cache.ingest import LEFT_SECONDS, Ingest, new_name
from ecrproxy.cache.proofs import Proofs
from ecrproxy.cache.sqlite import on_disk
from ecrproxy.cache.store import Store
from ecrproxy.cache.trailer import TRAILER, WORTH_RESUMING
from ecrproxy.cache.troubles import Troubles
from ecrproxy.oci import Digest
from tests.daemon import MIB, noise
from tests.store_contract import START, failing, read, scratch

SIZE = 3 * MIB
DATA = noise("ingest", SIZE)
DIGEST = Digest.of(DATA)


class IngestTests(SynchronousTestCase):
    """
    A cache directory with files that arrive.
    """

    def setUp(self) -> None:
        """
        An empty one.
        """
        self.now = START
        root = scratch(self)
        self.index = Index(root, lambda: self.now, memory=True)
        self.addCleanup(self.index.close)
        self.store = Store(root, lambda: self.now, self.index)
        self.store.prepare()
        self.ingest = self.store.arriving

    def left_over(self, *stretches: tuple[int, int], size: int = SIZE) -> Path:
        """
        Have a writer that writes some of the blob, and dies.
        """
        before = set(self.ingest.folder.iterdir())
        writer = self.ingest.begin(DIGEST, size)
        for start, stop in stretches:
            writer.write(start, [DATA[start:stop]])
        writer.close()
        (path,) = set(self.ingest.folder.iterdir()) - before
        return path

    def names(self) -> list[str]:
        """
        List what is in the directory of arriving files.
        """
        return sorted(path.name for path in self.ingest.folder.iterdir())


class ResumeTests(IngestTests):
    def test_goes_on_to_the_whole(self) -> None:
        """
        What is missing is told, written, and the whole is content.
        """
        self.left_over((0, 1000), (5000, 6000))
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.assertEqual([(1000, 5000), (6000, SIZE)], writer.gaps)
        self.assertEqual((SIZE - 2000, 0), (writer.missing, writer.hashed))
        self.assertFalse(writer.catch_up())
        self.assertEqual(1000, writer.hashed)
        for start, stop in writer.gaps:
            writer.write(start, [DATA[start:stop]])
        writer.commit()
        writer.close()
        self.assertEqual(DATA, read(self.store, DIGEST))
        self.assertEqual([], self.names())

    def test_shows_what_was_written_since_the_machine_started(self) -> None:
        """
        To readers of a part, who verify it: the page cache has it, whether it was synced or not.
        """
        self.left_over((0, 1000), (5000, 6000))
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.addCleanup(writer.discard)
        self.assertEqual([1000, 6000], [writer.reach(offset) for offset in (0, 5000)])
        self.assertEqual(0, writer.hashed)

    def test_shows_nothing_of_before_that_is_not_hashed(self) -> None:
        """
        After a start of the machine what was there may be wrong: it shows when it is hashed, while what comes now
        shows at once.
        """
        self.left_over((0, 1000), (5000, 6000))
        self.ingest.boot = b"another machine's"[:16]
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.addCleanup(writer.discard)
        self.assertEqual([0, 5000], [writer.reach(offset) for offset in (0, 5000)])
        writer.write(6000, [DATA[6000:7000]])
        self.assertEqual([5000, 7000], [writer.reach(offset) for offset in (5000, 6000)])

    def test_hashes_in_steps(self) -> None:
        """
        A lane that wants to write never waits for gigabytes to be hashed.
        """
        data = bytes(20 * MIB)
        digest = Digest.of(data)
        writer = self.ingest.begin(digest, 21 * MIB)
        writer.write(0, [data])
        writer.close()
        again = self.ingest.resume(digest, 21 * MIB)
        assert again is not None
        self.addCleanup(again.discard)
        self.assertTrue(again.catch_up())
        self.assertEqual(16 * MIB, again.hashed)
        self.assertFalse(again.catch_up())
        self.assertEqual(20 * MIB, again.hashed)

    def test_bytes_of_another_blob_never_get_in(self) -> None:
        """
        The digest decides, as ever.
        """
        path = self.left_over((0, 1000))
        with path.open("r+b") as file:
            file.write(b"other bytes")
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        writer.write(1000, [DATA[1000:]])
        self.assertRaises(DigestMismatchError, writer.commit)
        writer.discard()
        self.assertEqual([], self.names())

    def test_takes_the_one_that_has_most(self) -> None:
        """
        Two crashes may leave two; the other one stays for its own time.
        """
        self.left_over((0, 1000))
        self.left_over((0, 2000))
        left = self.ingest.left(DIGEST)
        self.assertEqual((SIZE, [(2000, SIZE)]), left)
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.addCleanup(writer.discard)
        self.assertEqual([(2000, SIZE)], writer.gaps)

    def test_is_not_of_what_somebody_lives_behind(self) -> None:
        """
        Another transfer's file is left alone.
        """
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.discard)
        writer.write(0, [DATA[:1000]])
        self.assertIsNone(self.ingest.left(DIGEST))
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertEqual([], self.index.arriving())
        self.assertEqual(1, len(self.names()))

    def test_is_not_of_another_size(self) -> None:
        """
        A file of a length that upstream does not announce any more is dropped.
        """
        self.left_over((0, 1000), size=SIZE - 1)
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertEqual([], self.names())

    def test_is_not_of_another_size_once_it_is_locked(self) -> None:
        """
        A file may be somebody else's between the look at it and the lock: it is looked at again.
        """
        path, other = self.left_over((0, 1000)), self.left_over((0, 2000), size=SIZE - 1)
        locked = self.ingest._locked  # noqa: SLF001

        def late(at: Path) -> int | None:
            if at == path and not other.exists():
                path.write_bytes(kept)
            return locked(at)

        kept = other.read_bytes()
        self.patch(self.ingest, "_locked", late)
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertEqual(SIZE - 1 + TRAILER, path.stat().st_size)

    def test_is_not_of_what_has_become_content(self) -> None:
        """
        A file that got its name in the moment before it was locked is nobody's to write to.
        """
        path = self.left_over((0, 1000))
        moved, flock, locks = scratch(self), fcntl.flock, []

        def late(fd: int, operation: int) -> None:
            locks.append(fd)
            if len(locks) == 2:  # it has been looked at, and is about to be taken
                path.rename(moved)
            flock(fd, operation)

        self.patch(fcntl, "flock", late)
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertTrue(moved.exists())

    def test_is_not_of_a_file_with_another_name(self) -> None:
        """
        What is content too, by a link of somebody's, is never written to.
        """
        path = self.left_over((0, 1000))
        (path.parent.parent / "other").hardlink_to(path)
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertTrue((path.parent.parent / "other").exists())

    def test_is_not_of_what_is_no_file(self) -> None:
        """
        Links, pipes and directories in a file's place lead nowhere and hold nobody up.
        """
        outside = self.left_over((0, 1000)).rename(scratch(self))
        name = f"sha256-{DIGEST.hex}"
        (self.ingest.folder / f"{name}.1").symlink_to(outside.absolute())
        (self.ingest.folder / f"{name}.2").mkdir()
        os.mkfifo(self.ingest.folder / f"{name}.3")
        self.assertIsNone(self.ingest.left(DIGEST))
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.ingest.sweep()
        self.assertEqual([], self.index.arriving())
        self.assertTrue(outside.exists())

    def test_is_not_of_what_can_not_be_read(self) -> None:
        """
        A bad block where the trailer is costs a transfer, and fails nobody.
        """
        self.left_over((0, 1000))
        self.patch(os, "pread", failing(errno.EIO))
        self.assertIsNone(self.ingest.left(DIGEST))
        self.assertIsNone(self.ingest.resume(DIGEST, SIZE))
        self.assertEqual([], self.names())

    def test_of_small_files_is_not_worth_it(self) -> None:
        """
        Under a megabyte there is no trailer, and nothing is left.
        """
        writer = self.ingest.begin(DIGEST, WORTH_RESUMING - 1)
        writer.write(0, [b"x"])
        self.assertEqual(WORTH_RESUMING - 1, os.fstat(writer.fileno()).st_size)
        writer.leave()
        self.assertEqual([], self.names())

    def test_is_done_without_where_the_disk_takes_no_trailer(self) -> None:
        """
        The transfer goes on; only its leftovers are worth nothing.
        """
        writer = self.ingest.begin(DIGEST, SIZE)
        pwrite = os.pwrite

        def full(fd: int, data: bytes, offset: int) -> int:
            return failing(errno.ENOSPC)() if offset == SIZE else pwrite(fd, data, offset)

        self.patch(os, "pwrite", full)
        writer.write(0, [DATA[:1000]])
        self.assertEqual(1000, writer.hashed)
        writer.leave()
        self.assertEqual([], self.names())


class CrashTests(SynchronousTestCase):
    """
    Transfers that are interrupted again and again.
    """

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.booleans()), max_size=12))
    def test_come_to_the_whole_in_the_end(self, writes: list[tuple[int, int, bool]]) -> None:
        """
        Whatever was written, in whatever order, before each crash: what is missing is all that has to come.
        """
        folder = tempfile.mkdtemp(prefix="ecrproxy-")
        try:
            store = Store(Path(folder), lambda: START)
            store.prepare()
            ingest, came = store.arriving, 0
            writer = ingest.begin(DIGEST, SIZE)
            for near, length, crashes in writes:
                start, stop = next((gap for gap in writer.gaps if gap[1] > near), writer.gaps[-1])
                start = max(start, min(near, stop - 1))
                stop = min(stop, start + length)
                if crashes or stop - start == writer.missing:
                    writer.close()
                    writer = ingest.resume(DIGEST, SIZE) or ingest.begin(DIGEST, SIZE)
                    continue
                writer.write(start, [DATA[start:stop]])
                came += stop - start
                self.assertEqual(SIZE - came, writer.missing)
            for start, stop in writer.gaps:
                writer.write(start, [DATA[start:stop]])
            while writer.catch_up():
                pass
            writer.commit()
            writer.close()
            self.assertEqual(DATA, read(store, DIGEST))
            self.assertEqual([], list(ingest.folder.iterdir()))
        finally:
            shutil.rmtree(folder)


class WrittenOnceTests(IngestTests):
    """
    Bytes that may have been hashed are never changed.
    """

    def test_what_is_there_is_not_written_again(self) -> None:
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.discard)
        writer.write(0, [DATA[:1000]])
        writer.write(2000, [DATA[2000:3000]])
        for start, stop in ((0, 1000), (0, 1), (999, 1001), (500, 600), (1500, 2001), (2999, 3001), (1000, 4000)):
            self.assertRaises(ValueError, writer.write, start, [b"x" * (stop - start)])
        writer.write(1000, [DATA[1000:2000]])
        writer.write(3000, [DATA[3000:]])
        writer.commit()
        self.assertEqual(DATA, os.pread(writer.fileno(), SIZE, 0))

    def test_what_an_earlier_transfer_left_is_not_written_again(self) -> None:
        self.left_over((0, MIB), (2 * MIB, SIZE))
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.addCleanup(writer.discard)
        self.assertRaises(ValueError, writer.write, 1, [b"x" * (SIZE - 1)])
        self.assertRaises(ValueError, writer.write, 2 * MIB - 1, [b"xx"])
        writer.write(MIB, [DATA[MIB : 2 * MIB]])
        while writer.catch_up():
            pass
        writer.verify()

    def test_content_is_not_written(self) -> None:
        writer = self.ingest.begin(DIGEST, SIZE)
        writer.write(0, [DATA])
        writer.commit()
        for offset in (0, SIZE - 1, SIZE, SIZE + TRAILER):
            self.assertRaises(ValueError, writer.write, offset, [b"x"])
        writer.close()
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_nothing_is_written_outside_the_blob(self) -> None:
        """
        Behind it is its trailer.
        """
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.discard)
        for offset, count in ((SIZE, 1), (SIZE - 1, 2), (-1, 1), (-2, 4)):
            self.assertRaises(ValueError, writer.write, offset, [b"x" * count])
        self.assertEqual([(0, SIZE)], writer.gaps)

    def test_what_another_thread_writes_is_not_written(self) -> None:
        """
        Whichever came first would be hashed, and the other would be on the disk.
        """
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.discard)
        refused, pwrite = [], os.pwrite

        def meanwhile(fd: int, data: bytes, offset: int) -> int:
            self.patch(os, "pwrite", pwrite)
            refused.append(self.assertRaises(ValueError, writer.write, 500, [b"x" * 1000]))
            return pwrite(fd, data, offset)

        self.patch(os, "pwrite", meanwhile)
        writer.write(0, [DATA[:1000]])
        self.assertEqual(1, len(refused))
        writer.write(1000, [DATA[1000:]])
        writer.verify()

    def test_what_the_disk_did_not_take_may_be_written_again(self) -> None:
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.discard)
        pwrite = os.pwrite
        self.patch(os, "pwrite", failing(errno.EIO))
        self.assertRaises(OSError, writer.write, 0, [DATA])
        self.patch(os, "pwrite", pwrite)
        writer.write(0, [DATA])
        writer.verify()


class BeginTests(IngestTests):
    """
    A new file is found by those who count and sweep before it is locked.
    """

    def met(self, times: int, meet: Callable[[Path], object]) -> None:
        """
        Have somebody do something to the next new files in the moment before they are locked.
        """
        flock, met = fcntl.flock, list[int]()

        def late(fd: int, operation: int) -> None:
            if len(met) < times:
                met.append(fd)
                meet(Path(f"/proc/self/fd/{fd}").readlink())
            flock(fd, operation)

        self.patch(fcntl, "flock", late)

    def lock(self, path: Path) -> None:
        """
        Lock a file, as who reads its trailer does.
        """
        fd = os.open(path, os.O_RDWR)
        self.addCleanup(os.close, fd)
        self.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    flock = staticmethod(fcntl.flock)

    def test_makes_another_for_one_that_somebody_locked(self) -> None:
        """
        The transfer is not failed by a count, and the first file is not left.
        """
        self.met(2, self.lock)
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.close)
        self.assertEqual(1, len(self.names()))
        writer.write(0, [DATA])
        writer.commit()
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_makes_another_for_one_that_was_swept(self) -> None:
        """
        A file without a name would never become content.
        """
        self.met(1, Path.unlink)
        writer = self.ingest.begin(DIGEST, SIZE)
        self.addCleanup(writer.close)
        writer.write(0, [DATA])
        writer.commit()
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_gives_up_where_each_is_locked(self) -> None:
        """
        A disk that says so always, as some of the network do, is one that fails; nothing is left on it.
        """
        self.met(1000, self.lock)
        self.assertRaises(BlockingIOError, self.ingest.begin, DIGEST, SIZE)
        self.assertEqual([], self.names())

    def test_leaves_nothing_where_no_lock_is_to_be_had(self) -> None:
        """
        A disk without locks fails the transfer at once.
        """
        self.patch(fcntl, "flock", failing(errno.ENOLCK))
        self.assertRaises(OSError, self.ingest.begin, DIGEST, SIZE)
        self.assertEqual([], self.names())


class LeftOverTests(IngestTests):
    def test_counts_with_all_that_it_takes_of_the_disk(self) -> None:
        """
        From when it is left, or was found; and as what arrives once somebody goes on with it.
        """
        writer = self.ingest.begin(DIGEST, SIZE)
        writer.write(0, [DATA[:1000]])
        self.now += 5
        writer.leave()
        writer.leave()
        (name,) = self.names()
        self.assertEqual([(name, on_disk(SIZE + TRAILER), self.now)], self.index.arriving())
        again = self.ingest.resume(DIGEST, SIZE)
        assert again is not None
        self.addCleanup(again.discard)
        self.assertEqual([(name, on_disk(SIZE + TRAILER), 0)], self.index.arriving())

    def test_is_found_by_the_sweep(self) -> None:
        """
        A daemon that starts counts what the one before left, by the time of its last write.
        """
        path = self.left_over((0, 1000))
        self.now += 60
        self.ingest.sweep()
        self.assertEqual([(path.name, on_disk(SIZE + TRAILER), START)], self.index.arriving())

    def test_is_removed_like_any_other_file(self) -> None:
        """
        Eviction takes it, unless somebody goes on with it.
        """
        path = self.left_over((0, 1000))
        self.ingest.sweep()
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        self.assertEqual([], self.store.remove([path.name]))
        self.assertTrue(path.exists())
        writer.leave()
        self.assertEqual([path.name], self.store.remove([path.name]))
        self.assertFalse(path.exists())
        self.assertEqual(0, self.index.totals.arriving)

    def test_that_was_discarded_is_gone(self) -> None:
        """
        A file that was gone on with and failed is not left again.
        """
        self.left_over((0, 1000))
        writer = self.ingest.resume(DIGEST, SIZE)
        assert writer is not None
        writer.discard()
        writer.leave()
        self.assertEqual(([], 0), (self.names(), self.index.totals.arriving))

    def test_a_reservation_whose_file_never_came_ends(self) -> None:
        """
        After a minute: its writer may be about to make the file.
        """
        self.index.reserve(new_name(DIGEST), SIZE, 2**30)
        self.ingest.sweep()
        self.assertEqual(on_disk(SIZE), self.index.totals.arriving)
        self.now += 60
        self.ingest.sweep()
        self.assertEqual(0, self.index.totals.arriving)

    def test_a_reservation_ends_with_a_file_that_can_not_be_made(self) -> None:
        """
        The disk may take none.
        """
        for call in ("open", "ftruncate"):
            name = new_name(DIGEST)
            self.index.reserve(name, SIZE, 2**30)
            self.patch(allocation, "fallocate", failing(errno.ENOSPC))
            if call == "open":
                self.ingest.folder.rename(self.ingest.folder.with_name("elsewhere"))
            self.assertRaises(OSError, self.ingest.begin, DIGEST, SIZE, name)
            self.assertEqual(0, self.index.totals.arriving)
            self.ingest.folder.mkdir(exist_ok=True)

    def test_is_swept_after_a_day(self) -> None:
        """
        By the time of its last write, whatever its dates say, and by clocks that are wrong either way.
        """
        path = self.left_over((0, 1000))
        for away, there in ((LEFT_SECONDS - 1, True), (-LEFT_SECONDS + 1, True), (LEFT_SECONDS, False)):
            self.now = START + away
            self.ingest.sweep()
            self.assertEqual(there, path.exists(), away)
        self.now = START
        path = self.left_over((0, 1000))
        self.now = START - LEFT_SECONDS
        self.ingest.sweep()
        self.assertFalse(path.exists())

    def test_of_what_is_content_is_swept(self) -> None:
        """
        What came by another way need not be gone on with.
        """
        path = self.left_over((0, 1000))
        writer = self.ingest.begin(DIGEST, SIZE)
        writer.write(0, [DATA])
        writer.commit()
        writer.close()
        self.ingest.sweep()
        self.assertFalse(path.exists())

    def test_without_a_use_is_swept(self) -> None:
        """
        Files that don't tell what is there of them, of this digest or of none, are removed.
        """
        self.left_over()
        for name, data in ((f"sha256-{DIGEST.hex}.x", b"garbage"), ("sha256-abc.1234", b""), ("whatever", bytes(MIB))):
            (self.ingest.folder / name).write_bytes(data)
        self.ingest.sweep()
        self.assertEqual(([], 0), (self.names(), self.index.totals.arriving))

    def test_of_a_folder_that_is_gone_is_none(self) -> None:
        """
        Who removed the directory has removed what was left.
        """
        ingest = Ingest(scratch(self), lambda: START, self.index, Readers(), Proofs(), Troubles(lambda: START))
        ingest.sweep()
        self.assertEqual(([], None), (self.index.arriving(), ingest.left(DIGEST)))
        self.assertIsNone(ingest.resume(DIGEST, SIZE))
