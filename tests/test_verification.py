"""
Changes to a cached file behind the daemon's back are noticed before a client has the whole of it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecrproxy.cache import allocation, verification
from ecrproxy.cache.content import Content
from ecrproxy.cache.verification import STEP
from ecrproxy.cached.verifications import VERIFICATIONS
from tests.daemon import BUFFER, MIB, DaemonTestCase, Hands, Reply, noise
from tests.registry_content import OCI_MANIFEST
from tests.store_contract import being_read, failing


class CachedBlob(DaemonTestCase):
    """
    A daemon that starts on a cache with one large blob in it.
    """

    size = 3 * MIB

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", self.size)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.get(self.path)
        self.hands = Hands()
        self.hashed: list[int] = []
        hash_ = Content.hash

        def noting(content: Content, state: Any, offset: int, limit: int) -> int:
            count = hash_(content, state, offset, limit)
            self.hashed.append(count)
            return count

        self.patch(Content, "hash", noting)
        self.start(in_thread=self.hands)

    def alter(self, at: int = 1000, *, quietly: bool = False) -> None:
        """
        Change a byte of the file.

        @param quietly: leave its time as it was: bit rot sets none.
        """
        path = self.file_of(self.digest)
        status = path.stat()
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([self.data[at] ^ 1]))
        if quietly:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def send(self, **headers: str) -> Reply:
        """
        Request the blob with threads that work when told to, and go on as far as possible without verification.
        """
        self.hands.idle = False
        reply = self.daemon.send("GET", self.path, **headers)
        self.read_on()
        return reply

    def read_on(self) -> None:
        """
        Let the threads do all but hash.
        """
        held = []
        self.flush()
        while self.hands.waiting:
            if self.names_of(self.hands.waiting[0]) & {"noting", "settle", "drop"}:
                held.append(self.hands.waiting.popleft())
            else:
                self.hands.work()
                self.flush()
        self.hands.waiting.extend(held)

    @staticmethod
    def names_of(call: tuple[Any, Callable[..., Any], tuple[Any, ...]]) -> set[str]:
        return {getattr(call[1], "__name__", "")}

    def come_to_a_verdict(self) -> None:
        """
        Let the threads do everything.
        """
        self.flush()
        while self.hands.waiting:
            self.hands.work()
            self.flush()
        self.hands.idle = True

    def dropped(self) -> int:
        """
        Count the log lines about dropped files.
        """
        return self.logged().count("in the cache is dropped")


class AlteredTests(CachedBlob):
    def test_content_altered_in_place_completes_no_answer(self) -> None:
        """
        A file with other bytes of the same number is dropped with one line, and the next request fetches it again.
        """
        self.get(self.path)
        self.alter()
        self.assertBroken(self.get(self.path), b"")
        self.assertFalse(self.has(self.digest))
        self.assertEqual(1, self.dropped())
        self.assertWhole(self.get(self.path), self.data, "MISS")
        self.assertWhole(self.get(self.path), self.data, "HIT")
        self.assertEqual(0, self.promised())

    def test_content_that_rotted_while_nobody_ran_completes_no_answer(self) -> None:
        """
        After a start each file is verified at its first use, whatever its time says.
        """
        self.alter(quietly=True)
        self.start()
        self.assertBroken(self.get(self.path), b"")
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_the_last_byte_waits_for_the_proof(self) -> None:
        """
        A client reads while the file is hashed, and gets the end once it is verified.
        """
        reply = self.send()
        self.assertEqual((len(self.data) - 1, ""), (len(reply.body), reply.ended))
        self.come_to_a_verdict()
        self.assertWhole(reply, self.data, "HIT")

    def test_a_range_of_the_whole_waits_for_the_proof(self) -> None:
        self.alter(at=2 * MIB)
        reply = self.send(Range="bytes=0-")
        self.assertEqual((206, len(self.data) - 1, ""), (reply.code, len(reply.body), reply.ended))
        self.come_to_a_verdict()
        self.assertEqual("broken", reply.ended)

    def test_a_range_does_not_wait_but_begins_the_proof(self) -> None:
        """
        A range request starts the verification; the file is dropped if it turns out to be bad.
        """
        self.alter(at=2 * MIB)
        reply = self.send(Range="bytes=7-7")
        self.assertWhole(reply, self.data[7:8], "HIT", 206)
        self.come_to_a_verdict()
        self.assertFalse(self.has(self.digest))
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_file_is_hashed_once(self) -> None:
        """
        However many clients read it at the same time, or later.
        """
        replies = [self.send() for _ in range(3)]
        self.come_to_a_verdict()
        for reply in [*replies, self.get(self.path)]:
            self.assertWhole(reply, self.data, "HIT")
        self.assertEqual(self.size, sum(self.hashed))

    def test_all_readers_of_a_bad_file_fail(self) -> None:
        """
        And it is dropped once. That the first has used it does not make it an unchanged one.
        """
        self.get(self.path)
        self.alter()
        replies = [self.send() for _ in range(3)]
        self.come_to_a_verdict()
        self.assertEqual(["broken"] * 3, [reply.ended for reply in replies])
        self.assertEqual(1, self.dropped())
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_reader_that_leaves_ends_no_proof(self) -> None:
        """
        The others wait for the same verification.
        """
        one, other = self.send(), self.send()
        one.leave()
        self.read_on()
        self.come_to_a_verdict()
        self.assertWhole(other, self.data, "HIT")
        self.assertEqual(self.size, sum(self.hashed))
        self.assertEqual(set(), being_read(self.daemon.store))

    def test_what_arrived_just_now_is_proved(self) -> None:
        """
        It was hashed on arrival.
        """
        path = self.file_of(self.digest)
        path.unlink()
        self.get(self.path)
        self.assertWhole(self.get(self.path), self.data, "HIT")
        self.assertEqual([], self.hashed)

    def test_a_file_that_is_changed_while_it_is_hashed_is_hashed_again(self) -> None:
        """
        What was read before the change says nothing about the current content.
        """
        reply = self.send()
        while self.names_of(self.hands.waiting[0]) != {"settle"}:
            self.hands.work()
        self.alter()
        self.come_to_a_verdict()
        self.assertEqual("broken", reply.ended)
        self.assertFalse(self.has(self.digest))

    def test_another_file_in_its_place_is_left_alone(self) -> None:
        """
        Dropping a bad file does not drop a good one that came meanwhile.
        """
        self.alter()
        reply = self.send()
        path = self.file_of(self.digest)
        good = path.with_name("good")
        good.write_bytes(self.data)
        good.rename(path)
        self.come_to_a_verdict()
        self.assertEqual("broken", reply.ended)
        self.assertWhole(self.get(self.path), self.data, "HIT")


class LargeTests(CachedBlob):
    size = 2 * STEP + 7

    def test_large_files_are_hashed_in_steps(self) -> None:
        """
        Other disk calls have their turn in between.
        """
        self.get(self.path)
        self.assertEqual([STEP, STEP, 7, 0], self.hashed)

    def test_that_a_manifest_gives_a_wrong_size_are_hashed_in_steps_and_once_for_all_who_ask(self) -> None:
        """
        A user who can push a manifest could keep all reading threads busy, by a few HEADs.
        """
        layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": self.digest, "size": 7}
        lie = json.dumps({"layers": [layer]}).encode()
        manifest = self.standin.push_manifest("team/liar", lie, OCI_MANIFEST)
        self.get(f"/v2/team/liar/manifests/{manifest}")
        self.standin.forget_asked()
        self.hands.idle = False
        replies = [self.daemon.send("HEAD", f"/v2/team/liar/blobs/{self.digest}") for _ in range(3)]
        self.come_to_a_verdict()
        self.assertEqual([(200, "HIT", self.size)] * 3, [(each.code, each.cache, each.length) for each in replies])
        self.assertEqual([STEP, STEP, 7, 0], self.hashed)
        self.assertEqual([], self.standin.asked)


class ManyFilesTests(DaemonTestCase):
    def test_are_hashed_in_step_so_that_no_reader_waits_for_another_file(self) -> None:
        """
        Clients cancel a pull whose bytes stop for a minute: cri-dockerd after one, containerd after five.
        """
        digests = [self.standin.push_blob("team/app", noise(f"{n}", MIB)) for n in range(3 * VERIFICATIONS)]
        paths = [f"/v2/team/app/blobs/{digest}" for digest in digests]
        for path in paths:
            self.get(path)
        self.patch(verification, "STEP", MIB // 4)
        offsets: list[int] = []
        hash_ = Content.hash

        def noting(content: Content, state: Any, offset: int, limit: int) -> int:
            offsets.append(offset)
            return hash_(content, state, offset, limit)

        self.patch(Content, "hash", noting)
        hands = Hands()
        self.start(in_thread=hands)
        hands.idle = False
        replies = [self.daemon.send("GET", path) for path in paths]
        self.flush()
        while hands.waiting:
            hands.work()
            self.flush()
        self.assertEqual([0] * len(paths), offsets[: len(paths)])
        self.assertEqual(["whole"] * len(paths), [reply.ended for reply in replies])


class FailingDiskTests(CachedBlob):
    def test_a_bad_file_that_can_not_be_removed_is_not_served_again(self) -> None:
        """
        On a read-only disk a bad file costs a transfer each time, and no client its answer.
        """
        self.alter()
        real = Path.unlink

        def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
            if "content" in str(path):
                failing(errno.EROFS)()
            real(path, *args, **kwargs)

        patch = self.patch(Path, "unlink", unlink)
        read_only = self.patch(allocation, "fallocate", failing(errno.EROFS))
        self.assertBroken(self.get(self.path), b"")
        for _ in range(3):
            self.assertWhole(self.get(self.path), self.data, "BYPASS")
        patch.restore()
        read_only.restore()
        self.assertEqual((1, 1), (self.dropped(), self.logged().count("Can't remove")))
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_file_that_can_not_be_hashed_is_dropped(self) -> None:
        """
        For example, a bad block that only hashing reads.
        """
        self.patch(Content, "hash", failing(errno.EIO))
        self.assertBroken(self.get(self.path), b"")
        self.assertFalse(self.has(self.digest))
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_proof_that_fails_by_itself_fails_its_readers(self) -> None:
        """
        Whatever error a thread has, readers don't wait for ever; the file stays.
        """
        patch = self.patch(Content, "settle", lambda content, state: 1 / 0)
        self.assertBroken(self.get(self.path), b"")
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))
        patch.restore()
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def test_a_file_that_can_not_be_read_while_it_is_sent_is_dropped(self) -> None:
        """
        The client is cut off, the log has one line, and the next request fetches the blob again.
        """
        self.get(self.path)
        really = os.pread

        def failing_later(fd: int, count: int, offset: int) -> bytes:
            if offset >= MIB:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return really(fd, count, offset)

        patch = self.patch(os, "pread", failing_later)
        self.assertBroken(self.get(self.path), self.data)
        patch.restore()
        self.assertFalse(self.has(self.digest))
        self.assertEqual((1, []), (self.dropped(), self.flushLoggedErrors()))
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_a_file_that_is_cut_while_it_is_sent_is_dropped(self) -> None:
        """
        Like one that can't be read.
        """
        self.get(self.path)
        reply = self.daemon.send("GET", self.path)
        reply.stop_reading()
        self.flush()
        os.truncate(self.file_of(self.digest), BUFFER)
        reply.read_on()
        self.flush()
        self.assertBroken(reply, self.data)
        self.assertFalse(self.has(self.digest))
        self.assertWhole(self.get(self.path), self.data, "MISS")


class SmallTests(DaemonTestCase):
    """
    Small content, which is read whole.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", 5000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.get(self.path)
        self.start()

    def test_a_small_blob_that_can_not_be_read_is_fetched(self) -> None:
        """
        It costs a transfer, once.
        """
        patch = self.patch(Content, "read", failing(errno.EIO))
        self.assertWhole(self.get(self.path), self.data, "MISS")
        patch.restore()
        self.assertWhole(self.get(self.path), self.data, "HIT")

    def test_a_rotten_small_blob_that_can_not_be_removed_is_fetched(self) -> None:
        """
        The daemon does not loop.
        """
        file = self.file_of(self.digest)
        file.write_bytes(self.data[::-1])
        patch = self.patch(Path, "unlink", failing(errno.EROFS))
        self.assertWhole(self.get(self.path), self.data, "MISS")
        patch.restore()
