"""
Incomplete downloads: one process writes each, and its record says which ranges are there. They are resumed if that is
certain.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.arriving import LEFT_SECONDS, Met
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.directory import Directory
from ecrproxy.cache.locks import is_free, locked
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import RECORD, UNKNOWN_BOOT, WORTH_RESUMING, Record, Reservation, State, Step, Why, next_step
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest
from tests.daemon import MIB, noise
from tests.store_contract import START, begin, failing, give_to_another, put, read, scratch

SIZE = 3 * MIB
DATA = noise("ingest", SIZE)
DIGEST = Digest.of(DATA)


class ArrivingTests(SynchronousTestCase):
    """
    A cache directory with incomplete downloads.
    """

    def setUp(self) -> None:
        self.now = START
        self.store = Store(scratch(self), lambda: self.now)
        self.store.prepare()
        self.arriving = self.store.arriving
        self.data = self.arriving.folder / f"sha256-{DIGEST.hex}"
        self.path = self.data.with_name(f"{self.data.name}.claim")

    def begin(self, size: int = SIZE) -> Writer:
        return begin(self.store, DIGEST, size)

    def left_over(self, *stretches: tuple[int, int], size: int = SIZE) -> None:
        """
        Leave what a writer has written that exits in the middle of the blob.
        """
        writer = self.begin(size)
        for start, stop in stretches:
            writer.write(start, [DATA[start:stop]])
        writer.close()

    def resume(self, size: int = SIZE) -> Writer | None:
        """
        Claim the digest, and resume.
        """
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim), claim
        writer = self.arriving.resume(claim, DIGEST, size)
        if writer is None:
            self.arriving.let_go(claim)
        return writer

    def resumed(self) -> Writer:
        writer = self.resume()
        assert writer is not None
        self.addCleanup(writer.discard)
        return writer

    def peer(self, store: Store | None = None) -> PeerTransfer:
        """
        Look at the transfer as another process does.
        """
        peer = (store or self.store).claim(DIGEST)
        assert isinstance(peer, PeerTransfer), peer
        self.addCleanup(peer.close)
        return peer

    def record(self) -> Record:
        record = Record.unpack(self.path.read_bytes())
        assert record is not None
        return record

    def counted(self) -> list[tuple[int, float]]:
        """
        Return what the index knows of the transfer: bytes of disk, and when it was interrupted.
        """
        return [(size, written) for _, size, written in self.store.index.arriving()]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.arriving.folder.iterdir())


class ClaimTests(ArrivingTests):
    def test_one_process_gets_a_digest(self) -> None:
        """
        The others get its transfer, or are told to look again while there is nothing to follow.
        """
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        self.assertEqual(Met.BUSY, self.store.claim(DIGEST))
        writer = self.store.writer(claim, DIGEST, SIZE)
        self.addCleanup(writer.discard)
        self.assertEqual(SIZE, self.peer().size)

    def test_content_is_looked_for_again_under_the_claim(self) -> None:
        """
        Its writer may have finished between the look and the lock.
        """
        put(self.store, DATA)
        self.assertEqual((Met.CONTENT, []), (self.store.claim(DIGEST), self.names()))

    def test_a_second_name_of_a_file_elsewhere_is_not_written_to(self) -> None:
        """
        Only this link is removed; the next transfer is cached again.
        """
        other = self.store.root / "elsewhere"
        other.write_bytes(b"precious")
        self.path.hardlink_to(other)
        self.assertRaises(OSError, self.store.claim, DIGEST)
        self.assertEqual((b"precious", False), (other.read_bytes(), self.path.exists()))
        self.assertIsInstance(self.store.claim(DIGEST), Claim)

    def test_another_users_transfer_is_not_followed(self) -> None:
        """
        That user may write a record that claims anything to be verified.
        """
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        self.addCleanup(self.store.writer(claim, DIGEST, SIZE).discard)
        self.peer()
        give_to_another(self, self.store)
        self.assertEqual(Met.BUSY, self.store.claim(DIGEST))

    def test_another_users_transfer_is_not_gone_on_with(self) -> None:
        """
        Nor is it taken over, whether that user has replaced the data file that is followed, or only owns the record.
        """
        for whose in ("data", "claim"):
            self.left_over((0, WORTH_RESUMING))
            inode = (self.data if whose == "data" else self.path).stat().st_ino
            patch = self.patch(Directory, "is_own", lambda _, status, inode=inode: status.st_ino != inode)
            self.assertIsNone(self.resume())
            self.assertEqual([], self.names())
            patch.restore()
            writer = self.begin()
            peer = self.peer()
            writer.write(0, [DATA[:1000]])
            writer.close()
            inode = (self.data if whose == "data" else self.path).stat().st_ino
            patch = self.patch(Directory, "is_own", lambda _, status, inode=inode: status.st_ino != inode)
            self.assertRaises(OSError, self.arriving.take_over, peer, DIGEST)
            patch.restore()
            self.path.unlink()

    def test_another_users_content_is_replaced(self) -> None:
        put(self.store, DATA)
        self.store.proofs.forget(DIGEST)
        give_to_another(self, self.store)
        self.assertIsInstance(self.store.claim(DIGEST), Claim)
        self.assertFalse((self.store.root / self.store.content_path(DIGEST)).exists())

    def test_known_bad_content_is_replaced(self) -> None:
        put(self.store, DATA)
        path = self.store.root / self.store.content_path(DIGEST)
        self.store.proofs.note(DIGEST, path.stat(), good=False)
        self.assertIsInstance(self.store.claim(DIGEST), Claim)
        self.assertFalse(path.exists())

    def test_content_that_is_being_evicted_is_not_replaced_meanwhile(self) -> None:
        """
        Eviction would unlink the new file.
        """
        put(self.store, DATA)
        with (self.store.root / self.store.content_path(DIGEST)).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.assertEqual(Met.BUSY, self.store.claim(DIGEST))
        self.assertEqual(Met.CONTENT, self.store.claim(DIGEST))

    def test_who_asks_whether_it_is_held_is_not_taken_for_its_holder_by_others_who_ask(self) -> None:
        self.left_over((0, 1000))
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self.assertTrue(is_free(self.path))
        self.assertIsInstance(self.store.claim(DIGEST), Claim)

    def test_a_claim_that_was_swept_while_it_was_taken_is_taken_anew(self) -> None:
        flock, met = fcntl.flock, list[int]()

        def late(fd: int, operation: int) -> None:
            if not met:
                met.append(fd)
                self.path.unlink()
            flock(fd, operation)

        self.patch(fcntl, "flock", late)
        writer = self.begin()
        self.addCleanup(writer.close)
        self.assertEqual([self.data.name, self.path.name], self.names())

    def test_nothing_is_left_where_no_lock_is_to_be_had(self) -> None:
        """
        A disk without locks fails the transfer at once.
        """
        self.patch(fcntl, "flock", failing(errno.ENOLCK))
        self.assertRaises(OSError, self.begin)
        self.assertEqual([], self.names())

    def test_locks_that_exclude_nobody_are_noticed(self) -> None:
        self.assertTrue(self.store.checks.has_locks())
        for broken in (failing(errno.ENOLCK), lambda *_: None):
            self.patch(fcntl, "flock", broken)
            self.assertFalse(self.store.checks.has_locks())
        self.assertEqual([], self.names())

    def test_locks_take_no_descriptor_for_good_where_there_are_few(self) -> None:
        """
        One more file may be opened, and two are needed.
        """
        before, opens = set(Path("/proc/self/fd").iterdir()), os.open

        def one(*args: Any) -> int:
            self.patch(os, "open", failing(errno.EMFILE))
            return opens(*args)

        for lock in (self.store.checks.has_locks, locked(self.store.root / "evict.lock").__enter__):
            self.patch(os, "open", one)
            self.assertRaises(OSError, lock)
        self.patch(os, "open", opens)
        self.assertEqual(before, set(Path("/proc/self/fd").iterdir()))

    def test_a_link_or_a_pipe_in_its_place_leads_nowhere_and_holds_nobody_up(self) -> None:
        outside = scratch(self)
        outside.write_bytes(DATA[:1000])
        self.path.symlink_to(outside.absolute())
        self.assertRaises(OSError, self.store.claim, DIGEST)
        self.path.unlink()
        os.mkfifo(self.path)
        self.assertRaises(OSError, self.store.claim, DIGEST)
        self.arriving.sweep()
        self.assertEqual([], self.counted())
        self.path.unlink()
        self.data.symlink_to(outside.absolute())
        self.begin().discard()
        self.assertEqual(DATA[:1000], outside.read_bytes())

    def test_that_can_not_be_locked_may_be_another_process_s(self) -> None:
        """
        An empty claim is removed by the process that made it: its holder writes nothing before ECR has answered.
        """
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        self.patch(fcntl, "flock", failing(errno.ENOLCK))
        self.assertRaises(OSError, self.store.claim, DIGEST)
        self.assertEqual([self.path.name], self.names())
        claim.end()
        self.assertEqual([], self.names())

    def test_that_somebody_has_removed_says_nothing_about_the_data(self) -> None:
        """
        The data belongs to the next holder.
        """
        writer = self.begin()
        self.path.unlink()
        self.data.unlink()
        other = self.begin()
        self.addCleanup(other.discard)
        writer.discard()
        self.assertEqual([self.data.name, self.path.name], self.names())

    def test_that_somebody_has_removed_begins_nothing_and_resumes_nothing(self) -> None:
        """
        Its holder waited for ECR meanwhile; another process has claimed the digest since, and writes.
        """
        self.left_over((0, 1000))
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        self.path.unlink()
        self.data.unlink()
        other = self.begin()
        self.addCleanup(other.discard)
        for begin_or_resume in (self.arriving.begin, self.arriving.resume):
            self.assertRaises(OSError, begin_or_resume, claim, DIGEST, SIZE)
        other.write(0, [DATA])
        other.commit()

    def test_is_no_transfer_if_its_data_is_about_to_be_removed(self) -> None:
        self.left_over((0, 1000))
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        with self.data.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.assertRaises(OSError, self.arriving.resume, claim, DIGEST, SIZE)
        claim.release()
        self.assertEqual([], self.store.index.arriving())

    def test_content_has_the_bytes_of_its_writer(self) -> None:
        """
        If the directory was replaced, nothing else gets the name.
        """
        writer = self.begin()
        writer.write(0, [DATA])
        self.data.unlink()
        self.data.write_bytes(bytes(SIZE))
        self.assertRaises(OSError, writer.commit)
        writer.discard()
        self.assertFalse(self.store.has(DIGEST))

    def test_content_has_the_bytes_of_its_writer_also_if_the_disk_hung_meanwhile(self) -> None:
        """
        The writer gives up, another one begins, and then the disk does the first one's write.
        """
        writer = self.begin()
        writer.write(0, [DATA])
        self.addCleanup(writer.close)
        mkdir = Path.mkdir

        def hang(path: Path, *args: Any, **options: Any) -> None:
            self.patch(Path, "mkdir", mkdir)
            writer.give_up()
            self.addCleanup(self.begin().discard)
            mkdir(path, *args, **options)

        self.patch(Path, "mkdir", hang)
        self.assertRaises(OSError, writer.commit)
        self.assertFalse(self.store.has(DIGEST))
        self.assertTrue(self.data.exists())


class PeerTests(ArrivingTests):
    """
    Another process's transfer.
    """

    def step(self, peer: PeerTransfer, idle: float = 0) -> Step:
        return next_step(peer.look(), idle)

    def test_shows_what_its_writer_has_written(self) -> None:
        writer = self.begin()
        self.addCleanup(writer.discard)
        peer = self.peer()
        self.assertEqual([0, 5000], [peer.reach(offset) for offset in (0, 5000)])
        writer.write(0, [DATA[:1000]])
        writer.write(5000, [DATA[5000:6000]])
        self.assertEqual(Step.WAIT, self.step(peer))
        self.assertEqual([1000, 6000], [peer.reach(offset) for offset in (0, 5000)])
        self.assertEqual(DATA[:1000], os.pread(peer.fileno(), 1000, 0))
        self.assertFalse(peer.look().moved)

    def test_is_finished_when_it_is_verified(self) -> None:
        """
        Before fsync, and also if that never ends.
        """
        writer = self.begin()
        writer.write(0, [DATA])
        peer = self.peer()
        self.assertEqual(Step.WAIT, self.step(peer))
        steps = []

        def fails(_: int) -> None:
            steps.append(self.step(peer))
            failing(errno.EIO)()

        self.patch(os, "fsync", fails)
        self.assertRaises(OSError, writer.commit)
        writer.discard()
        self.assertEqual(([Step.FINISH], Step.FINISH), (steps, self.step(peer)))
        self.assertEqual(DATA, os.pread(peer.fileno(), SIZE, 0))

    def test_of_before_a_crash_of_the_machine_is_not_finished(self) -> None:
        """
        It was verified, and may not have reached the disk. Another process has just got the claim.
        """
        self.left_over((0, SIZE))
        for boot, shown in ((self.record().boot, True), (b"another".ljust(16), False), (UNKNOWN_BOOT, False)):
            self.path.write_bytes(replace(self.record(), state=State.VERIFIED, boot=boot).pack())
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = self.store.claim(DIGEST)
            self.assertEqual(shown, isinstance(found, PeerTransfer))
            if isinstance(found, PeerTransfer):
                found.close()

    def test_is_finished_when_it_is_content(self) -> None:
        writer = self.begin()
        peer = self.peer()
        writer.write(0, [DATA])
        writer.commit()
        writer.close()
        self.assertEqual((Step.FINISH, State.CONTENT), (self.step(peer), peer.record.state))
        self.assertEqual([], self.names())

    def test_is_not_evicted_once_it_is_content(self) -> None:
        """
        From its first byte on, with no moment between its writer's lock and that of the follower.
        """
        writer = self.begin()
        peer = self.peer()
        writer.write(0, [DATA])
        writer.commit()
        writer.close()
        self.assertFalse(self.store.evict_unused([DIGEST]))
        peer.close()
        self.assertTrue(self.store.evict_unused([DIGEST]))

    def test_is_taken_over_when_its_writer_dies(self) -> None:
        """
        Readers keep what they have, and the file is resumed where it was.
        """
        writer = self.begin()
        peers = [self.peer(), self.peer()]
        writer.write(0, [DATA[:1000]])
        writer.write(5000, [DATA[5000:6000]])
        writer.close()
        self.assertEqual([Step.WAIT] * 2, [self.step(peer) for peer in peers])  # there is new data to send
        self.assertEqual([Step.TAKE_OVER] * 2, [self.step(peer) for peer in peers])
        again = self.arriving.take_over(peers[0], DIGEST)
        assert again is not None
        self.assertIsNone(self.arriving.take_over(peers[1], DIGEST))
        self.assertEqual(Step.WAIT, self.step(peers[1]))
        self.assertEqual([(0, 1000), (5000, 6000)], list(self.record().shown))
        self.assertEqual((2, [(1000, 5000), (6000, SIZE)]), (peers[1].record.epoch, again.gaps))
        for start, stop in again.gaps:
            again.write(start, [DATA[start:stop]])
        again.commit()
        again.close()
        self.assertEqual([Step.FINISH] * 2, [self.step(peer) for peer in peers])
        self.assertEqual(DATA, os.pread(peers[1].fileno(), SIZE, 0))
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_tells_that_its_disk_failed_or_its_bytes_were_wrong(self) -> None:
        for why, step in ((Why.DISK, Step.GO_ALONE), (Why.DIGEST, Step.FAIL)):
            writer = self.begin()
            writer.write(0, [DATA[:1000]])
            peer = self.peer()
            writer.give_up(why)
            self.assertEqual(([], step), (self.names(), self.step(peer)))
            self.assertEqual(DATA[:1000], os.pread(peer.fileno(), SIZE, 0)[:1000])
            writer.close()

    def test_is_not_waited_for_if_it_has_no_name_any_more(self) -> None:
        """
        Another process has removed it, or started again.
        """
        self.left_over((0, 1000))
        other = self.begin()
        peer = self.peer()
        other.close()
        self.arriving.begin(self.claimed(), DIGEST, SIZE)
        self.assertEqual(Step.GO_ALONE, self.step(peer))
        self.assertRaises(OSError, self.arriving.take_over, peer, DIGEST)

    def test_can_be_taken_over_from_who_has_only_claimed_it(self) -> None:
        """
        That process was killed before it went on.
        """
        writer = self.begin()
        peer = self.peer()
        writer.write(0, [DATA[:1000]])
        writer.close()
        self.claimed().release()
        self.step(peer)
        self.assertEqual(Step.TAKE_OVER, self.step(peer))
        again = self.arriving.take_over(peer, DIGEST)
        assert again is not None
        self.assertEqual([(1000, SIZE)], again.gaps)
        again.discard()

    def test_without_a_record_can_not_be_taken_over(self) -> None:
        writer = self.begin()
        peer = self.peer()
        writer.close()
        self.path.write_bytes(b"")
        self.assertEqual(Step.TAKE_OVER, self.step(peer))
        self.assertRaises(OSError, self.arriving.take_over, peer, DIGEST)

    def test_that_was_verified_meanwhile_is_not_taken_over(self) -> None:
        writer = self.begin()
        peer = self.peer()
        writer.write(0, [DATA])
        writer.commit()
        peer.look()
        self.path.write_bytes(peer.record.pack())  # as if its writer had exited before it removed the claim
        self.assertIsNone(self.arriving.take_over(peer, DIGEST))
        self.assertEqual(Step.FINISH, self.step(peer))

    def claimed(self) -> Claim:
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        return claim

    def test_shows_nothing_that_its_holder_has_not_begun_with(self) -> None:
        """
        What an earlier holder left may be of another boot, or of another size.
        """
        self.left_over((0, 1000))
        claim = self.claimed()
        self.assertEqual(Met.BUSY, self.store.claim(DIGEST))
        claim.release()  # as after a kill
        self.assertEqual([(1000, SIZE)], self.resumed().gaps)

    def test_a_record_that_is_torn_is_read_again(self) -> None:
        writer = self.begin()
        self.addCleanup(writer.discard)
        peer = self.peer()
        writer.write(0, [DATA[:1000]])
        good, reads = os.pread, []

        def torn(fd: int, count: int, offset: int) -> bytes:
            reads.append(fd)
            data = good(fd, count, offset)
            return data[:100] if len(reads) == 1 else data

        self.patch(os, "pread", torn)
        self.assertEqual((Step.WAIT, 1000), (self.step(peer), peer.reach(0)))
        self.assertEqual(2, len(reads))

    def test_a_blob_of_any_size_can_be_followed(self) -> None:
        for data in (b"", b"x", b"small" * 100):
            digest = Digest.of(data)
            writer = begin(self.store, digest, len(data))
            peer = self.store.claim(digest)
            assert isinstance(peer, PeerTransfer)
            writer.write(0, [data])
            writer.commit()
            writer.close()
            self.assertEqual(Step.FINISH, self.step(peer))
            self.assertEqual(data, os.pread(peer.fileno(), 1000, 0))
            peer.close()


class LocksTests(ArrivingTests):
    """
    Two stores over one directory behave to each other like two processes.
    """

    def test_what_another_process_reads_is_not_evicted(self) -> None:
        put(self.store, DATA)
        other = Store(self.store.root, lambda: START)
        content = other.open(DIGEST)
        assert content is not None
        again = other.open(DIGEST)
        assert again is not None
        self.assertEqual(content.fileno(), again.fileno())
        content.close()
        self.assertFalse(self.store.evict_unused([DIGEST]))
        again.close()
        self.assertTrue(self.store.evict_unused([DIGEST]))
        self.assertIsNone(other.open(DIGEST))

    def test_what_is_evicted_just_now_is_a_miss(self) -> None:
        put(self.store, DATA)
        with (self.store.root / self.store.content_path(DIGEST)).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.assertIsNone(self.store.open(DIGEST))
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_what_was_purged_while_it_is_read_is_not_shared_with_others(self) -> None:
        put(self.store, DATA)
        content = self.store.open(DIGEST)
        assert content is not None
        self.assertTrue(self.store.unlink(DIGEST))
        self.assertIsNone(self.store.open(DIGEST))
        put(self.store, DATA)
        again = self.store.open(DIGEST)
        assert again is not None
        self.assertNotEqual(content.status.st_ino, again.status.st_ino)
        content.close()
        self.assertEqual(DATA, os.pread(again.fileno(), SIZE, 0))
        again.close()

    def test_bad_content_is_not_removed_while_another_process_replaces_it(self) -> None:
        put(self.store, DATA)
        status = (self.store.root / self.store.content_path(DIGEST)).stat()
        claim = self.arriving.hold(DIGEST)
        assert claim is not None
        self.store.files.drop(DIGEST, status, OSError())
        self.assertTrue(self.store.has(DIGEST))
        self.arriving.let_go(claim)
        self.store.files.drop(DIGEST, status, OSError())
        self.assertEqual((False, []), (self.store.has(DIGEST), self.names()))


class ResumeTests(ArrivingTests):
    def test_goes_on_to_the_whole(self) -> None:
        """
        Missing ranges are reported, then written, and the complete file becomes content.
        """
        self.left_over((0, 1000), (5000, 6000))
        writer = self.resumed()
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
        To readers of ranges, which verify them: the page cache has the data, synced or not.
        """
        self.left_over((0, 1000), (5000, 6000))
        writer = self.resumed()
        self.assertEqual([1000, 6000], [writer.reach(offset) for offset in (0, 5000)])
        self.assertEqual(0, writer.hashed)

    def test_shows_nothing_of_before_that_is_not_hashed(self) -> None:
        """
        After a reboot the data may be wrong: it is shown once it is hashed, while new data is shown at once. The same
        holds for those that resume later.
        """
        self.left_over((0, 1000), (5000, 6000))
        self.arriving.directory.boot = b"another machine's"[:16]
        writer = self.resume()
        assert writer is not None
        self.assertEqual([0, 5000], [writer.reach(offset) for offset in (0, 5000)])
        writer.write(6000, [DATA[6000:7000]])
        self.assertEqual([5000, 7000], [writer.reach(offset) for offset in (5000, 6000)])
        writer.close()
        writer = self.resumed()
        self.assertEqual([5000, 7000], [writer.reach(offset) for offset in (5000, 6000)])

    def test_hashes_in_steps(self) -> None:
        """
        A lane that wants to write never waits until gigabytes are hashed.
        """
        data = bytes(20 * MIB)
        digest = Digest.of(data)
        writer = begin(self.store, digest, 21 * MIB)
        writer.write(0, [data])
        writer.close()
        again = begin(self.store, digest, 21 * MIB)
        self.addCleanup(again.discard)
        self.assertTrue(again.catch_up())
        self.assertEqual(16 * MIB, again.hashed)
        self.assertFalse(again.catch_up())
        self.assertEqual(20 * MIB, again.hashed)

    def test_bytes_of_another_blob_never_get_in(self) -> None:
        """
        The digest decides.
        """
        self.left_over((0, 1000))
        with self.data.open("r+b") as file:
            file.write(b"other bytes")
        writer = self.resumed()
        writer.write(1000, [DATA[1000:]])
        self.assertRaises(DigestMismatchError, writer.commit)
        writer.discard()
        self.assertEqual([], self.names())

    def test_of_a_file_that_has_all_its_bytes_asks_for_one_of_them(self) -> None:
        """
        Its writer was killed before it had verified or renamed the file.
        """
        self.left_over((0, SIZE))
        for state in (State.ARRIVING, State.VERIFIED):
            self.path.write_bytes(replace(self.record(), state=state).pack())
            claim = self.store.claim(DIGEST)
            assert isinstance(claim, Claim)
            self.assertEqual((SIZE, [(SIZE - 1, SIZE)]), self.arriving.left(claim))
            claim.release()
        writer = self.resumed()
        writer.write(SIZE - 1, [DATA[-1:]])
        writer.commit()
        self.assertTrue(self.store.has(DIGEST))

    def test_is_not_of_another_size(self) -> None:
        """
        A file of another length than upstream announces starts again.
        """
        self.left_over((0, 1000), size=SIZE - 1)
        self.assertIsNone(self.resume())
        self.arriving.sweep()
        self.assertEqual([(on_disk(SIZE - 1 + RECORD), START)], self.counted())
        writer = self.begin()
        self.addCleanup(writer.discard)
        self.assertEqual([(0, SIZE)], writer.gaps)
        self.assertEqual(SIZE, self.data.stat().st_size)

    def test_is_not_of_a_file_with_another_name(self) -> None:
        """
        A file with another link, which may be content too, is never written to.
        """
        self.left_over((0, 1000))
        other = self.store.root / "other"
        other.hardlink_to(self.data)
        self.assertIsNone(self.resume())
        before = other.stat().st_mtime_ns
        self.begin().discard()
        self.assertEqual(before, other.stat().st_mtime_ns)

    def test_is_not_of_what_can_not_be_read(self) -> None:
        """
        A bad block in the record costs a transfer, and causes no failure.
        """
        self.left_over((0, 1000))
        self.patch(os, "pread", failing(errno.EIO))
        self.assertIsNone(self.resume())
        self.assertEqual([], self.counted())

    def test_of_small_files_is_not_worth_it(self) -> None:
        """
        Below a megabyte nothing is left.
        """
        writer = self.begin(WORTH_RESUMING - 1)
        writer.write(0, [b"x"])
        writer.leave()
        self.assertEqual([], self.names())

    def test_is_done_without_where_the_disk_takes_no_record(self) -> None:
        """
        The transfer goes on; only what it leaves is useless.
        """
        writer = self.begin()
        pwrite = os.pwrite

        def full(fd: int, data: bytes, offset: int) -> int:
            return failing(errno.ENOSPC)() if len(data) < 1000 else pwrite(fd, data, offset)

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
        Whatever was written, in whatever order, before each crash: only the missing ranges are fetched.
        """
        folder = tempfile.mkdtemp(prefix="ecrproxy-")
        try:
            store = Store(Path(folder), lambda: START)
            store.prepare()
            came, writer = 0, begin(store, DIGEST, SIZE)
            for near, length, crashes in writes:
                start, stop = next((gap for gap in writer.gaps if gap[1] > near), writer.gaps[-1])
                start = max(start, min(near, stop - 1))
                stop = min(stop, start + length)
                if crashes or stop - start == writer.missing:
                    writer.close()
                    writer = begin(store, DIGEST, SIZE)
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
            self.assertEqual([], list(store.arriving.folder.iterdir()))
        finally:
            shutil.rmtree(folder)


class WrittenOnceTests(ArrivingTests):
    """
    Bytes that may have been hashed are never changed.
    """

    def test_what_is_there_is_not_written_again(self) -> None:
        writer = self.begin()
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
        writer = self.resumed()
        self.assertRaises(ValueError, writer.write, 1, [b"x" * (SIZE - 1)])
        self.assertRaises(ValueError, writer.write, 2 * MIB - 1, [b"xx"])
        writer.write(MIB, [DATA[MIB : 2 * MIB]])
        while writer.catch_up():
            pass
        writer.verify()

    def test_content_is_not_written(self) -> None:
        writer = self.begin()
        writer.write(0, [DATA])
        writer.commit()
        for offset in (0, SIZE - 1, SIZE):
            self.assertRaises(ValueError, writer.write, offset, [b"x"])
        writer.close()
        self.assertEqual(DATA, read(self.store, DIGEST))

    def test_nothing_is_written_outside_the_blob(self) -> None:
        writer = self.begin()
        self.addCleanup(writer.discard)
        for offset, count in ((SIZE, 1), (SIZE - 1, 2), (-1, 1), (-2, 4)):
            self.assertRaises(ValueError, writer.write, offset, [b"x" * count])
        self.assertEqual([(0, SIZE)], writer.gaps)

    def test_what_another_thread_writes_is_not_written(self) -> None:
        """
        One of them would be hashed, and the other would be on the disk.
        """
        writer = self.begin()
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

    def test_writing_does_not_wait_for_hashing(self) -> None:
        """
        What is written while a thread hashes is hashed later.
        """
        writer = self.begin()
        self.addCleanup(writer.discard)
        writer.write(1000, [DATA[1000:2000]])
        preadv, written = os.preadv, list[int]()

        def meanwhile(fd: int, buffers: list[memoryview], offset: int) -> int:
            self.patch(os, "preadv", preadv)
            writer.write(2000, [DATA[2000:]])
            written.append(writer.hashed)
            return preadv(fd, buffers, offset)

        self.patch(os, "preadv", meanwhile)
        writer.write(0, [DATA[:1000]])
        self.assertEqual(([1000], 2000, SIZE), (written, writer.hashed, writer.reach(0)))
        self.assertFalse(writer.catch_up())
        writer.verify()

    def test_what_the_disk_did_not_take_may_be_written_again(self) -> None:
        writer = self.begin()
        self.addCleanup(writer.discard)
        pwrite = os.pwrite
        self.patch(os, "pwrite", failing(errno.EIO))
        self.assertRaises(OSError, writer.write, 0, [DATA])
        self.patch(os, "pwrite", pwrite)
        writer.write(0, [DATA])
        writer.verify()


class LeftOverTests(ArrivingTests):
    def evict(self) -> bool:
        """
        Evict what the index knows.
        """
        return bool(self.store.evict_unused(each.what for each in self.store.index.arriving()))

    def test_counts_from_when_it_is_left(self) -> None:
        """
        It counts as used then, with its full size on disk; a process that resumes it has that reserved.
        """
        writer = self.begin()
        writer.write(0, [DATA[:1000]])
        self.assertEqual([], self.counted())
        self.now += 5
        writer.leave()
        writer.leave()
        self.assertEqual([(on_disk(SIZE + RECORD), START + 5)], self.counted())
        self.assertEqual(on_disk(SIZE) + RECORD, sum(on_disk(p.stat().st_size) for p in self.arriving.folder.iterdir()))
        self.resumed()
        self.assertEqual([(on_disk(SIZE + RECORD), 0)], self.counted())

    def test_is_counted_by_a_sweep(self) -> None:
        """
        As the rest of a killed writer; a resumed one stays.
        """
        self.left_over((0, 1000))
        for _ in range(2):
            self.arriving.sweep()
            self.assertEqual([(on_disk(SIZE + RECORD), START)], self.counted())
        self.resumed()
        self.arriving.sweep()
        self.assertEqual([(on_disk(SIZE + RECORD), 0)], self.counted())

    def test_of_a_killed_writer_is_no_transfer_under_way_any_more(self) -> None:
        """
        Its reservation ends with its file.
        """
        self.left_over((0, 1000))
        self.store.index.reservations.arrive(Reservation(self.data.name, "killed"), SIZE + RECORD)
        self.arriving.sweep()
        self.assertEqual([(on_disk(SIZE + RECORD), START)], self.counted())
        self.now += LEFT_SECONDS
        self.arriving.sweep()
        self.assertEqual([], self.counted())

    def test_a_reservation_ends_with_a_sweep_that_finds_nothing_of_it(self) -> None:
        """
        Its writer was killed before it created a file. The holder of the claim is about to create one.
        """
        claim = self.store.claim(DIGEST)
        assert isinstance(claim, Claim)
        self.store.index.reservations.arrive(claim.reservation, SIZE)
        self.store.index.reservations.arrive(Reservation("sha256-" + "0" * 64, "killed"), SIZE)
        self.arriving.sweep()
        self.assertEqual([(on_disk(SIZE), 0)], self.counted())
        claim.release()
        self.arriving.sweep()
        self.assertEqual(([], []), (self.counted(), self.names()))

    def test_a_reservation_of_what_is_content_ends_with_a_sweep_that_counts_that(self) -> None:
        """
        Its writer was killed before it could record that, or can't open the index.
        """
        self.store.index.reservations.arrive(Reservation(self.data.name, "killed"), SIZE)
        path = self.store.root / self.store.content_path(DIGEST)
        path.parent.mkdir(parents=True)
        path.write_bytes(DATA)
        self.arriving.sweep()
        self.assertEqual(([], (1, on_disk(SIZE), 0)), (self.counted(), self.store.index.totals[:3]))

    def test_is_evicted_like_any_other_file(self) -> None:
        """
        Unless a process resumes it, or waits to.
        """
        self.left_over((0, 1000))
        writer = self.resume()
        assert writer is not None
        self.assertFalse(self.evict())
        peer = self.peer()
        writer.leave()
        self.assertFalse(self.evict())
        self.assertEqual(Step.TAKE_OVER, next_step(peer.look(), 0))
        peer.close()
        self.assertTrue(self.evict())
        self.assertEqual(([], []), (self.names(), self.counted()))

    def test_that_was_discarded_is_gone(self) -> None:
        """
        A file that was resumed and failed is not left again.
        """
        self.left_over((0, 1000))
        writer = self.resumed()
        writer.discard()
        writer.leave()
        self.assertEqual(([], []), (self.names(), self.counted()))

    def test_is_swept_after_a_day(self) -> None:
        """
        By the time of its last write, whatever its dates say, and by clocks that are wrong either way.
        """
        self.left_over((0, 1000))
        for away, there in ((LEFT_SECONDS - 1, True), (-LEFT_SECONDS + 1, True), (LEFT_SECONDS, False)):
            self.now = START + away
            self.arriving.sweep()
            self.assertEqual([self.data.name, self.path.name] if there else [], self.names(), away)
        self.now = START
        self.left_over((0, 1000))
        self.now = START - LEFT_SECONDS
        self.arriving.sweep()
        self.assertEqual([], self.names())

    def test_of_what_is_content_is_swept(self) -> None:
        """
        Content that came by another way makes it obsolete.
        """
        self.left_over((0, 1000))
        path = self.store.root / self.store.content_path(DIGEST)
        path.parent.mkdir(parents=True)
        path.write_bytes(DATA)
        self.arriving.sweep()
        self.assertEqual([], self.names())

    def test_without_a_use_is_swept(self) -> None:
        """
        Without a record, without data, or with too little data; what some process holds stays.
        """
        self.left_over()
        other, lonely = (f"sha256-{Digest.of(each).hex}" for each in (b"other", b"lonely"))
        (self.arriving.folder / other).write_bytes(bytes(MIB))
        (self.arriving.folder / f"{lonely}.claim").write_bytes(b"garbage")
        held = begin(self.store, Digest.of(b"held"), 4)
        self.addCleanup(held.discard)
        self.arriving.sweep()
        name = f"sha256-{Digest.of(b'held').hex}"
        self.assertEqual([name, f"{name}.claim"], self.names())

    def test_of_a_folder_that_is_gone_is_none(self) -> None:
        """
        The leftovers were removed with the directory.
        """
        self.left_over((0, 1000))
        shutil.rmtree(self.arriving.folder)
        self.arriving.sweep()
        self.assertEqual([], self.counted())
        self.assertIsNone(self.resume())

    def test_of_an_earlier_version_is_removed(self) -> None:
        """
        Unless a daemon of that version, which runs beside this one, has it locked.
        """
        ingest = self.store.root / "ingest"
        ingest.mkdir()
        for name in ("left", "live"):
            (ingest / f"sha256-{DIGEST.hex}.{name}").write_bytes(DATA)
        with (ingest / f"sha256-{DIGEST.hex}.live").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.store.sweep()
            self.assertEqual([f"sha256-{DIGEST.hex}.live"], [path.name for path in ingest.iterdir()])
        self.store.sweep()
        self.assertFalse(ingest.exists())
