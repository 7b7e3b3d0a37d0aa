"""
Interrupted transfers are resumed from what has arrived, seen from the client.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ecrproxy.cache import allocation
from ecrproxy.cache.arriving import LEFT_SECONDS, Arriving
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.claim import claim_path
from ecrproxy.cache.record import POLL_SECONDS, RECORD, Record
from ecrproxy.transfer.gaps import SMALLEST_PART
from ecrproxy.transfer.inflow import Lanes
from tests.daemon import MIB, Reply, noise
from tests.store_contract import failing
from tests.test_ranges import RangesTestCase, span

SIZE = 20 * MIB
DATA = noise("resuming", SIZE)
EACH = MIB
"""Bytes that each lane fetches before the interruption."""


class ResumingTestCase(RangesTestCase):
    """
    A blob of 20 MiB, of which four lanes have fetched a megabyte each.
    """

    def setUp(self) -> None:
        super().setUp()
        self.digest = self.standin.push_blob("team/app", DATA)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def begun(self) -> Reply:
        """
        Begin the transfer.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, EACH)
        self.flush()
        self.assertEqual(4 * EACH, self.standin.bytes_sent)
        self.assertEqual(EACH, len(reply.body))
        return reply

    def interrupted(self) -> Path:
        """
        Kill the daemon in the middle of the transfer.

        @return: the file that is left over.
        """
        self.begun()
        self.daemon.kill()
        self.standin.release(self.digest)
        (left,) = self.arriving()
        return left

    def again(self) -> Reply:
        """
        Start another daemon, and send it a request.
        """
        self.start()
        return self.get(self.path)


class CrashTests(ResumingTestCase):
    def test_only_what_is_missing_is_fetched(self) -> None:
        """
        After a kill in the middle of a transfer the next one requests only the gaps, from the first on: each byte comes
        once, and nothing is left over.
        """
        self.interrupted()
        self.standin.forget_asked()
        self.assertWhole(self.again(), DATA, "MISS")
        self.assertEqual(SIZE - 4 * EACH, self.standin.bytes_sent)
        first = self.standin.requests("bucket")[0].headers["range"]
        self.assertEqual((EACH, SMALLEST_PART), span(first))
        self.assertEqual([], self.arriving())
        self.assertWhole(self.get(self.path), DATA, "HIT")

    def test_what_is_there_is_sent_at_once(self) -> None:
        """
        A client gets what an earlier transfer fetched before upstream has sent another byte.
        """
        self.interrupted()
        self.standin.hold(self.digest)
        reply = self.again()
        self.assertEqual((200, SIZE, EACH), (reply.code, reply.length, len(reply.body)))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)

    def test_it_may_happen_again_and_again(self) -> None:
        """
        Each daemon resumes from what all before it have fetched.
        """
        self.begun()
        for _ in range(3):
            self.daemon.kill()
            self.start()
            self.get(self.path)
            self.standin.deliver(self.digest, EACH)
            self.flush()
        self.daemon.kill()
        self.standin.release(self.digest)
        self.assertWhole(self.again(), DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_without_lanes_as_well(self) -> None:
        """
        With one connection per blob the rest is requested as one.
        """
        self.start(lanes=Lanes(1))
        self.standin.hold(self.digest)
        self.get(self.path)
        self.standin.deliver(self.digest, EACH)
        self.flush()
        self.daemon.kill()
        self.standin.release(self.digest)
        self.start(lanes=Lanes(1))
        self.assertWhole(self.get(self.path), DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_a_repository_without_the_blob_gets_nothing_of_it(self) -> None:
        """
        Leftovers belong to no repository: ECR is asked as before, and its refusal costs the next one nothing.
        """
        self.interrupted()
        self.start()
        self.standin.push_blob("team/other", b"something else")
        self.assertRefused(self.get(self.path.replace("app", "other")), 404, "BLOB_UNKNOWN")
        self.assertWhole(self.get(self.path), DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_a_bucket_that_gives_no_parts_any_more_is_put_up_with(self) -> None:
        """
        It sends everything, of which the missing ranges are used.
        """
        self.interrupted()
        self.standin.quirks.ignore_range = True
        self.assertWhole(self.again(), DATA)

    def test_altered_bytes_never_complete_an_answer(self) -> None:
        """
        A file that was changed meanwhile fails the digest: the client is aborted, the file dropped, and the next
        request is right.
        """
        for place in (EACH // 2, SMALLEST_PART + 5):
            left = self.interrupted()
            with left.open("r+b") as file:
                file.seek(place)
                file.write(bytes([DATA[place] ^ 1]))
            reply = self.again()
            self.assertEqual("broken", reply.ended)
            self.assertLess(len(reply.body), SIZE)
            self.assertEqual([], self.arriving())
            self.assertWhole(self.get(self.path), DATA, "MISS")
            self.file_of(self.digest).unlink()
            self.standin.forget_asked()

    def test_a_useless_file_is_begun_anew(self) -> None:
        """
        A torn, cut or lengthened file is dropped, and everything is fetched.
        """
        for spoil in (
            lambda left: os.truncate(left, SIZE - 1),
            lambda left: os.truncate(left, SIZE + 1),
            lambda left: os.truncate(left, 0),
            lambda left: os.truncate(claim_path(left), 0),
            lambda left: claim_path(left).unlink(),
            lambda left: left.unlink(),
            lambda left: self.scribble(claim_path(left), 0, b"torn"),
            lambda left: self.scribble(claim_path(left), 30, b"torn"),
        ):
            spoil(self.interrupted())
            self.standin.forget_asked()
            self.assertWhole(self.again(), DATA, "MISS")
            self.assertEqual((SIZE, []), (self.standin.bytes_sent, self.arriving()))
            self.file_of(self.digest).unlink()
            self.standin.forget_asked()

    def scribble(self, path: Path, at: int, data: bytes) -> None:
        """
        Write into a file.
        """
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def test_a_blob_that_has_another_size_now_is_begun_anew(self) -> None:
        """
        This daemon has announced the old length to no client: the new one is announced, and the old file dropped.
        """
        left = self.interrupted()
        shorter = Record(SIZE - EACH, self.clock.seconds(), there=((0, EACH),))
        os.truncate(left, SIZE - EACH)
        self.scribble(claim_path(left), 0, shorter.pack())
        self.standin.forget_asked()
        reply = self.again()
        self.assertEqual(SIZE, reply.length)
        self.assertWhole(reply, DATA)
        self.assertEqual([], self.arriving())

    def test_a_blob_that_is_shorter_than_what_is_there_is_begun_anew(self) -> None:
        """
        A first byte beyond the end is no reason to fail.
        """
        left = self.interrupted()
        longer = Record(2 * SIZE, self.clock.seconds(), there=((0, SIZE + 1),))
        os.truncate(left, 2 * SIZE)
        self.scribble(claim_path(left), 0, longer.pack())
        self.assertWhole(self.again(), DATA)
        self.assertEqual([], self.arriving())

    def test_an_old_file_is_swept(self) -> None:
        """
        No request for it has come for a day.
        """
        self.interrupted()
        self.clock.advance(LEFT_SECONDS)
        self.start()
        self.assertEqual([], self.arriving())

    def test_a_blob_that_the_cache_can_not_have_is_handed_through_from_its_start(self) -> None:
        """
        A leftover file, and then no space for any, costs no client a byte.
        """
        self.interrupted()
        self.start()
        self.patch(Arriving, "resume", lambda *_: None)
        self.patch(allocation, "fallocate", failing(errno.ENOSPC))
        self.assertWhole(self.get(self.path), DATA, "BYPASS")


class LimitTests(ResumingTestCase):
    limit = 24 * MIB

    def test_what_is_left_over_counts(self) -> None:
        """
        It is part of the size of the directory, and counted once when a transfer resumes it.
        """
        self.interrupted()
        self.start(limit=self.limit)
        self.assertEqual((0, on_disk(SIZE + RECORD)), (self.index.totals.blocks, self.promised()))
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.assertEqual((0, on_disk(SIZE + RECORD)), (self.index.totals.blocks, self.promised()))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA, "MISS")
        self.assertEqual(0, self.promised())
        self.assertTrue(self.has(self.digest))
        self.assertEqual(self.used(), self.index.totals.blocks)

    def test_it_makes_room_for_others(self) -> None:
        """
        Leftovers are evicted when their turn comes.
        """
        self.interrupted()
        self.start(limit=self.limit)
        other = self.standin.push_blob("team/app", DATA[:-1])
        self.assertWhole(self.get(f"/v2/team/app/blobs/{other}"), DATA[:-1], "MISS")
        self.assertEqual([], self.arriving())
        self.assertTrue(self.has(other))

    def test_a_lowered_limit_holds_for_it(self) -> None:
        """
        A daemon that starts with a lower limit drops what doesn't fit.
        """
        self.interrupted()
        self.daemons.clear()
        self.start(limit=SIZE)
        self.assertEqual([], self.arriving())

    def test_it_is_not_evicted_while_it_goes_on(self) -> None:
        """
        Once a transfer has resumed it, there is no space for another as large, which streams through uncached.
        """
        self.interrupted()
        self.start(limit=self.limit)
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        other = self.standin.push_blob("team/app", DATA[:-1])
        self.assertWhole(self.get(f"/v2/team/app/blobs/{other}"), DATA[:-1], "BYPASS")
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
        self.assertTrue(self.has(self.digest))


class ReversedRangeTests(ResumingTestCase):
    def test_changes_no_byte_that_is_there(self) -> None:
        """
        By the time a bucket resumes with the end before the start, it has other bytes in the place of the right ones.
        """
        self.interrupted()
        self.standin.corrupt(self.digest, DATA[:65] + b"x" * (EACH - 65) + DATA[EACH:])
        headers = {"Content-Range": f"bytes {EACH}-64/{SIZE}"}
        self.standin.fail("bucket", status=206, headers=headers, body=b"x", times=1, path_contains=self.digest)
        reply = self.again()
        self.pass_time(60)
        self.assertTrue(reply.code != 200 or DATA.startswith(bytes(reply.body)), "other bytes were sent")
        self.assertTrue(self.get(self.path).body == DATA, "other bytes were kept")


class FailureTests(ResumingTestCase):
    def failed(self) -> None:
        """
        Have the bucket fail for good in the middle of the transfer.
        """
        reply = self.begun()
        self.standin.fail("bucket", status=500)
        self.standin.cut(self.digest)
        self.flush()
        self.assertBroken(reply, DATA)
        self.standin.heal()
        self.standin.release(self.digest)
        self.standin.forget_asked()

    def test_the_next_request_goes_on(self) -> None:
        """
        When upstream has failed too often, the client is aborted; the next request gets what has arrived, and the rest.
        """
        self.failed()
        self.assertEqual((0, on_disk(SIZE + RECORD)), (self.index.totals.blocks, self.promised()))
        self.assertWhole(self.get(self.path), DATA, "MISS")
        self.assertEqual(SIZE - 4 * EACH, self.standin.bytes_sent)
        self.assertEqual((on_disk(SIZE), 0), (self.used(), self.promised()))

    def test_a_daemon_that_starts_goes_on_as_well(self) -> None:
        """
        A clean shutdown leaves files as usable as a crash does.
        """
        self.failed()
        self.assertWhole(self.again(), DATA, "MISS")
        self.assertEqual(SIZE - 4 * EACH, self.standin.bytes_sent)

    def test_wrong_bytes_are_not_kept(self) -> None:
        """
        After a digest mismatch everything is fetched again.
        """
        self.standin.corrupt(self.digest, bytes(SIZE))
        self.assertEqual("broken", self.get(self.path).ended)
        self.assertEqual([], self.arriving())
        self.standin.heal()
        self.standin.forget_asked()
        self.assertWhole(self.get(self.path), DATA, "MISS")
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_two_daemons_go_on_with_it_as_one(self) -> None:
        """
        Two daemons on one directory: one of them resumes the file, the other follows.
        """
        self.failed()
        one = self.daemon
        self.standin.hold(self.digest)
        first = self.get(self.path)
        two = self.start()
        second = two.ask("GET", self.path)
        self.assertEqual(1, len(self.arriving()))
        self.standin.release(self.digest)
        one.flush()
        self.pass_time(POLL_SECONDS)
        self.assertWhole(first, DATA, "MISS")
        self.assertWhole(second, DATA, "JOINED")
        self.assertEqual([], self.arriving())
        self.assertEqual(SIZE - 4 * EACH, self.standin.bytes_sent)

    def test_a_size_that_changed_under_way_aborts_and_is_believed_afterwards(self) -> None:
        """
        Clients have the announced length: they are aborted. The next request begins with the new one.
        """
        self.standin.corrupt(self.digest, DATA[:-EACH])
        reply = self.begun()
        self.standin.heal()
        self.standin.cut(self.digest)
        self.flush()
        self.assertEqual("broken", reply.ended)
        self.standin.release(self.digest)
        reply = self.get(self.path)
        self.assertEqual(SIZE, reply.length)
        self.assertWhole(reply, DATA, "MISS")

    def test_another_etag_is_no_matter(self) -> None:
        """
        The digest verifies the whole, whatever the bucket's ETag.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, EACH)
        self.flush()
        self.standin.quirks.etag = '"another"'
        self.standin.cut(self.digest)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
