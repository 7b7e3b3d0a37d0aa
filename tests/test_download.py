"""
A transfer and its followers, without a network.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.index import Index
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.logs.repeats import Repeats
from ecrproxy.oci import Digest
from ecrproxy.threads import Disk
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.file_backed import TAIL
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.gaps import LARGEST_PART, SMALLEST_PART
from ecrproxy.transfer.inflow import GATHER_SECONDS, HIGH_WATER, Buffered, Inflow
from ecrproxy.transfer.lane import TRIES, ShortBodyError
from ecrproxy.transfer.windowed import STUCK_SECONDS, WINDOW
from tests.daemon import Hands, noise
from tests.store_contract import begin, failing

T = TypeVar("T")
PWRITE = os.pwrite


class Tap:
    """
    A connection to a bucket in a test: the bytes from C{start} to C{stop}, which arrive when the test says.
    """

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop
        self.paused, self.aborted, self.over = False, False, False
        self.pauses = 0
        self.early: list[bytes] = []
        """The bytes that arrive, with the end, as soon as they are requested."""
        self._sink: Inflow | None = None

    def deliver(self, sink: Inflow) -> Tap:
        self._sink = sink
        for data in self.early:
            sink.arrived(data)
        if self.early:
            sink.ended(None)
        return self

    @property
    def began(self) -> bool:
        """
        Return True if its bytes are wanted by now.
        """
        return self._sink is not None

    def arrived(self, data: bytes) -> None:
        assert self._sink is not None, "nobody has asked for its bytes"
        self._sink.arrived(data)

    def ended(self, problem: Failure | None) -> None:
        assert self._sink is not None, "nobody has asked for its bytes"
        self.over = True
        self._sink.ended(problem)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted = self.over = True


class Source:
    """
    A blob of a bucket in a test.

    @ivar taps: its connections, in the order of the requests.
    @ivar refuses: why it fails, if so.
    @ivar late: answers that are still to come; None where they come at once.
    """

    ranged, sources = True, 1

    def __init__(self, size: int | None, first: int | None) -> None:
        self.size, self.first = size, Tap(0, first)
        self.taps = [self.first]
        self.refuses: Exception | None = None
        self.late: list[Deferred[None]] | None = None

    def look_again(self) -> None:
        """
        No other registry has it.
        """

    async def open(self, start: int, stop: int | None, breaks: int = 0) -> Tap:
        if self.late is not None:
            self.late.append(Deferred())
            await self.late[-1]
        if self.refuses is not None:
            raise self.refuses
        self.taps.append(Tap(start, stop))
        return self.taps[-1]

    @property
    def spans(self) -> list[tuple[int, int | None]]:
        """
        Return the requested ranges.
        """
        return [(tap.start, tap.stop) for tap in self.taps]


def pour(tap: Tap, data: bytes) -> None:
    """
    Deliver C{data} as a socket does: in pieces of 64 KiB.
    """
    for start in range(0, len(data), 2**16):
        tap.arrived(data[start : start + 2**16])


def feed(tap: Tap, data: bytes) -> None:
    """
    Have a connection deliver the requested part of C{data}, in pieces of 100 bytes.
    """
    stop = len(data) if tap.stop is None else tap.stop
    for start in range(tap.start, stop, 100):
        tap.arrived(data[start : min(start + 100, stop)])


class Reader:
    """
    A client that reads as fast as it may, or when told to.
    """

    def __init__(self, follower: Follower, *, eager: bool = True) -> None:
        self.follower, self.got, self.eager = follower, bytearray(), eager
        follower.listen(self.news)
        self.news()

    def news(self) -> None:
        if self.eager:
            self.read()

    def read(self, limit: int = 2**60) -> None:
        """
        Read at most C{limit} bytes of what there is.
        """
        while limit and (piece := self.follower.piece(min(limit, 2**16))) is not None:
            data = piece if isinstance(piece, bytes) else os.pread(piece[0], piece[2], piece[1])
            assert data, "a piece of nothing"
            self.got += data
            limit -= len(data)
            self.follower.sent(len(data))


class DownloadTestCase(SynchronousTestCase):
    """
    A cache directory, and threads that can be slow.
    """

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, self.root)
        index = Index(self.root, lambda: 4e9, memory=True)
        self.addCleanup(index.close)
        self.store = Store(self.root, lambda: 4e9, index)
        self.store.prepare()
        self.hands, self.clock = Hands(), Clock()
        self.blob: Source

    @property
    def tap(self) -> Tap:
        """
        Return the connection that was opened last.
        """
        return self.blob.taps[-1]

    def begin(
        self,
        data: bytes,
        *,
        kept: bool = True,
        size: int | None = -1,
        lanes: int = 1,
        first: int | None = -1,
        early: Sequence[bytes] = (),
        buffered: Buffered | None = None,
        disk: Disk | None = None,
    ) -> Download:
        """
        Begin the transfer of C{data}; the bytes up to C{first} have been requested.
        """
        digest, size = Digest.of(data), len(data) if size == -1 else size
        self.store.unlink(digest)
        writer = begin(self.store, digest, size or 0) if kept else None
        disk = disk or Disk.of(self.hands)
        download = Download(digest, size, writer, disk, lanes, buffered=buffered, call_later=self.clock.callLater)
        self.blob = Source(size, size if first == -1 else first)
        self.tap.early = list(early)
        Deferred.fromCoroutine(download.run(self.blob))
        return download

    def open_files(self) -> list[str]:
        """
        Return the files of the cache directory that this process has open.
        """
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the descriptor of this listing
                found.append(str(link.readlink()))
        return [path for path in found if path.startswith(str(self.root))]

    def assertFailed(self, download: Download, kind: type[BaseException]) -> None:
        """
        Assert that the transfer failed for this reason, and has left nothing.
        """
        assert download.failure is not None
        self.assertIsInstance(download.failure.value, kind)
        self.assertFalse(download.verified)
        self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])


class KeptTests(DownloadTestCase):
    """
    A transfer that is written to a file.
    """

    def test_ends_as_content(self) -> None:
        """
        Complete and verified bytes become content, and no file stays open.
        """
        data = noise("x", 300_000)
        download = self.begin(data)
        self.assertTrue(download.kept)
        for start in range(0, len(data), 50_000):
            self.tap.arrived(data[start : start + 50_000])
        self.tap.ended(None)
        self.assertTrue(download.verified)
        content = self.store.open(download.digest)
        assert content is not None
        self.assertEqual(data, content.read())
        content.close()
        self.assertEqual([], self.open_files())

    def test_is_followed_from_any_place(self) -> None:
        """
        Readers of the whole, of parts, early and late, each get exactly theirs.
        """
        data = noise("x", 150_000)
        download = self.begin(data)
        readers = [(0, 150_000), (0, 1), (50_000, 100_000), (149_999, 150_000)]
        early = [Reader(download.follow(start, stop)) for start, stop in readers]
        self.tap.arrived(data[:75_000])
        late = [Reader(download.follow(start, stop)) for start, stop in readers]
        self.tap.arrived(data[75_000:])
        self.tap.ended(None)
        for (start, stop), reader in zip(readers * 2, early + late, strict=True):
            self.assertEqual(data[start:stop], bytes(reader.got))
            self.assertTrue(reader.follower.done)

    def test_last_byte_of_the_whole_waits_for_the_proof(self) -> None:
        data = noise("x", 1000)
        download = self.begin(data)
        whole, as_a_range = Reader(download.follow(0, 1000)), Reader(download.follow(0, 1000))
        self.tap.arrived(data[:-1])
        self.assertEqual((999, 999), (len(whole.got), len(as_a_range.got)))
        self.assertFalse(whole.follower.done or as_a_range.follower.done)
        self.tap.arrived(data[-1:])
        self.assertEqual((data, data), (bytes(whole.got), bytes(as_a_range.got)))
        self.assertTrue(whole.follower.done and as_a_range.follower.done)

    def test_a_part_is_complete_once_its_bytes_are_there(self) -> None:
        for kept in (True, False):
            data = noise("x", 1000)
            download = self.begin(data, kept=kept)
            part, open_ended = Reader(download.follow(10, 20)), Reader(download.follow(1, 1000))
            self.tap.arrived(data[:19])
            self.assertFalse(part.follower.done)
            self.tap.arrived(data[19:30])
            self.assertEqual(data[10:20], bytes(part.got))
            self.assertTrue(part.follower.done)
            self.assertFalse(download.verified or open_ended.follower.done)

    def test_bytes_show_once_they_are_written(self) -> None:
        """
        Readers see no byte that the disk doesn't have.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        self.hands.idle = False
        reader = Reader(download.follow(0, 1000))
        self.tap.arrived(data[:600])
        self.assertEqual((0, 0), (download.received, len(reader.got)))
        self.hands.work()
        self.assertEqual((600, 600), (download.received, len(reader.got)))

    def test_bytes_may_come_at_once(self) -> None:
        """
        Bytes that arrived, or a transfer that ended, before it is run are not lost.
        """
        data = noise("x", 1000)
        for kept in (True, False):
            self.hands.idle = False
            download = self.begin(data, kept=kept, early=[data[:500], data[500:]])
            reader = Reader(download.follow(0, 1000))
            self.hands.idle = True
            self.hands.work_off()
            self.assertEqual(data, bytes(reader.got))
            reader.follower.close()

    def test_other_bytes_fail(self) -> None:
        """
        Wrong bytes fail and become no content; readers get the error at least a byte before the end.
        """
        for size, got in ((1000, 0), (TAIL, 0), (TAIL + 1, TAIL)):
            download = self.begin(noise("x", size))
            reader = Reader(download.follow(0, size))
            self.tap.arrived(bytes(size))
            self.tap.ended(None)
            self.assertEqual(got, len(reader.got))
            self.assertIs(download.failure, reader.follower.failure)
            reader.follower.close()
            self.assertFailed(download, DigestMismatchError)
            self.assertEqual([], self.open_files())
            self.assertTrue(download.kept, "it is not the disk's fault: all of a small one may come before the answer")

    def test_fewer_bytes_fail(self) -> None:
        """
        A bucket that ends each answer before the announced length is asked again, and finally given up.
        """
        data = noise("x", 1000)
        for body, tries in ((data[:-1], 1 + TRIES), (b"", TRIES)):
            download = self.begin(data)
            self.tap.arrived(body)
            for _ in range(tries):
                self.tap.ended(None)
            self.assertFailed(download, ShortBodyError)
            self.assertEqual([(0, 1000), *[(len(body), 1000)] * (tries - 1)], self.blob.spans)

    def test_more_bytes_belong_to_nothing(self) -> None:
        """
        Bytes beyond the announced length are not written, and their connection is closed.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        self.tap.arrived(data + b"x")
        self.assertTrue(download.verified and self.tap.aborted)
        content = self.store.open(download.digest)
        assert content is not None
        self.assertEqual(data, content.read())
        content.close()

    def test_a_break_is_mended(self) -> None:
        """
        The rest is requested from upstream, and followers notice nothing.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        reader = Reader(download.follow(0, 1000))
        for end in (100, 500, 700):
            self.tap.arrived(data[self.tap.start : end])
            self.tap.ended(Failure(ZeroDivisionError()))
        self.assertEqual([(0, 1000), (100, 1000), (500, 1000), (700, 1000)], self.blob.spans)
        self.tap.arrived(data[700:])
        self.assertEqual(data, bytes(reader.got))
        self.assertTrue(download.verified)

    def test_upstreams_trouble_is_told(self) -> None:
        """
        After three breaks without a byte followers get the reason; what they had was right.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        reader = Reader(download.follow(0, 1000))
        self.tap.arrived(data[:500])
        self.tap.ended(Failure(KeyError()))
        for _ in range(TRIES):
            self.assertIsNone(download.failure)
            self.tap.ended(Failure(ZeroDivisionError()))
        self.assertEqual(data[:500], bytes(reader.got))
        reader.follower.close()
        self.assertFailed(download, ZeroDivisionError)
        self.assertEqual(1 + TRIES, len(self.blob.taps))

    def test_answers_that_announce_nothing_are_given_up(self) -> None:
        """
        A bucket that claims to have sent everything, and has sent nothing, is not asked without end.
        """
        data = noise("x", 1000)
        download = self.begin(data, first=400)

        async def nothing(start: int, stop: int | None, breaks: int = 0) -> Tap:
            self.blob.taps.append(Tap(start, start))
            return self.tap

        self.patch(self.blob, "open", nothing)
        self.tap.arrived(data[:400])
        for _ in range(TRIES):
            self.assertIsNone(download.failure)
            self.tap.ended(None)
        self.assertFailed(download, ShortBodyError)

    def test_a_byte_begins_the_tries_anew(self) -> None:
        """
        A bucket that breaks off often, but delivers some bytes each time, is not given up.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        for byte in range(20):
            for _ in range(TRIES - 1):
                self.tap.ended(Failure(ZeroDivisionError()))
            self.tap.arrived(data[byte : byte + 1])
            self.tap.ended(Failure(ZeroDivisionError()))
        self.tap.arrived(data[20:])
        self.assertTrue(download.verified)

    def test_any_number_of_breaks_is_one_line_of_log_a_minute(self) -> None:
        data = noise("x", 1000)
        repeats = Repeats(lambda: 0)
        with capturedLogs() as events:
            download = self.begin(data)
            for byte in range(20):
                self.tap.arrived(data[byte : byte + 1])
                self.tap.ended(Failure(ZeroDivisionError()))
            self.tap.arrived(data[20:])
        self.assertTrue(download.verified)
        written = [each for each in events if repeats.admit(each) is not None]
        self.assertEqual(1, sum("Going on with" in str(formatEvent(each)) for each in written))

    def test_a_refusal_to_go_on_is_told(self) -> None:
        """
        A break and then a refusal end the transfer, with that reason.
        """
        download = self.begin(noise("x", 1000))
        self.blob.refuses = KeyError()
        self.tap.ended(Failure(ZeroDivisionError()))
        self.assertFailed(download, KeyError)
        self.assertEqual([], self.open_files())

    def test_what_nobody_foresaw_is_told_too(self) -> None:
        """
        A bug in the daemon ends the transfer: readers get an error, upstream is stopped, the log has the traceback.
        """
        download = self.begin(b"x" * 1000)
        self.patch(Writer, "write", fail_unforeseen)
        with capturedLogs() as events:
            for _ in range(TRIES):
                self.tap.arrived(b"x")
        self.assertIn("in fail_unforeseen", formatEvent(events[-1]))
        self.assertEqual({True}, {tap.aborted for tap in self.blob.taps})
        self.assertFailed(download, ZeroDivisionError)

    def test_goes_on_without_readers(self) -> None:
        data = noise("x", 1000)
        download = self.begin(data)
        for end in (300, 600):
            reader = Reader(download.follow(0, 1000))
            self.tap.arrived(data[end - 300 : end])
            reader.follower.close()
            self.assertFalse(self.tap.aborted)
        self.tap.arrived(data[600:])
        self.assertTrue(download.verified)

    def test_a_slow_reader_slows_nobody(self) -> None:
        """
        One that does not read delays neither the transfer nor the others, and gets all of it in the end.
        """
        data = noise("x", 3 * WINDOW)
        download = self.begin(data)
        slow, quick = Reader(download.follow(0, len(data)), eager=False), Reader(download.follow(0, len(data)))
        self.tap.arrived(data)
        self.tap.ended(None)
        self.assertEqual(data, bytes(quick.got))
        quick.follower.close()
        self.assertEqual(0, self.tap.pauses)
        self.assertEqual(1, len(self.open_files()))
        slow.read()
        self.assertEqual(data, bytes(slow.got))
        slow.follower.close()
        self.assertEqual([], self.open_files())

    def test_readers_need_not_wait_for_the_commit(self) -> None:
        """
        The answer is complete once the digest is verified, before the file is synced.
        """
        data = noise("x", TAIL + 1)
        download = self.begin(data)
        reader = Reader(download.follow(0, TAIL + 1))
        self.hands.idle = False
        self.tap.arrived(data)
        self.tap.ended(None)
        self.hands.work()
        self.assertTrue(reader.follower.done)
        self.assertIsNone(self.store.open(download.digest))
        self.assertTrue(download.offers(0))
        self.hands.work()
        content = self.store.open(download.digest)
        assert content is not None
        content.close()

    def test_a_commit_that_fails_takes_nothing_back(self) -> None:
        """
        If the file can't become content, followers still have their answer, late ones too, and nothing stays.
        """
        data = noise("x", 1000)
        download = self.begin(data)

        def failing(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(os, "fsync", failing)
        slow = Reader(download.follow(0, 1000), eager=False)
        self.tap.arrived(data)
        self.tap.ended(None)
        self.assertIsNone(download.failure)
        slow.read()
        self.assertEqual(data, bytes(slow.got))
        self.assertTrue(slow.follower.done)
        slow.follower.close()
        self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])
        self.assertEqual([], self.open_files())
        self.assertFalse(download.offers(0))

    def test_what_is_read_while_it_lands_stays(self) -> None:
        """
        A file that just became content counts as being read until its last follower is done.
        """
        data = noise("x", 1000)
        download = self.begin(data)
        slow = Reader(download.follow(0, 1000), eager=False)
        self.tap.arrived(data)
        self.tap.ended(None)

        self.assertEqual([], self.store.evict_unused([Digest.of(data)]))
        slow.follower.close()
        self.assertEqual([Digest.of(data)], self.store.evict_unused([Digest.of(data)]))

    def test_a_slow_disk_bounds_memory(self) -> None:
        """
        While the disk is slow no more than HIGH_WATER bytes wait in memory, beside those that are being written.
        """
        piece = bytes(2**16)
        size = 10 * HIGH_WATER
        download = self.begin(bytes(size))
        self.hands.idle = False
        arrived = most = 0
        while arrived < size:
            while not self.tap.paused and arrived < size:
                self.tap.arrived(piece)
                arrived += len(piece)
                most = max(most, arrived - download.received)
            self.hands.work()
        self.assertLessEqual(most, 2 * (HIGH_WATER + len(piece)))
        self.tap.ended(None)
        self.hands.work_off()
        self.assertTrue(download.verified)

    def test_a_disk_that_keeps_up_pauses_nothing(self) -> None:
        """
        Upstream is not paused if the disk keeps up; and one pause is one pause.
        """
        self.begin(bytes(4 * HIGH_WATER))
        for _ in range(2):
            self.tap.arrived(bytes(HIGH_WATER))
        self.assertEqual(0, self.tap.pauses)
        self.hands.idle = False
        self.tap.arrived(b"\0")
        self.tap.arrived(bytes(HIGH_WATER))
        self.tap.arrived(b"\0")
        self.assertEqual(1, self.tap.pauses)
        self.hands.work(2)  # the first bytes, and those that have waited since
        self.assertFalse(self.tap.paused)


class LanesTests(DownloadTestCase):
    """
    A blob that comes over several connections at once.
    """

    SIZE = 40 * 2**20
    data: bytes

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("lanes", self.SIZE)

    def start(self, *, lanes: int = 4) -> Download:
        """
        Begin over several lanes; the first part has been requested.
        """
        return self.begin(self.data, lanes=lanes, first=SMALLEST_PART)

    def open_taps(self) -> list[Tap]:
        """
        Return the connections whose part has not arrived.
        """
        return [tap for tap in self.blob.taps if not tap.over]

    def bring(self, tap: Tap, count: int | None = None) -> None:
        """
        Have a connection deliver its part, or the first bytes of it.
        """
        assert tap.stop is not None
        stop = tap.stop if count is None else tap.start + count
        for start in range(tap.start, stop, 2**20):
            tap.arrived(self.data[start : min(stop, start + 2**20)])
        self.clock.advance(GATHER_SECONDS)

    def finish(self) -> None:
        """
        Deliver everything that is still to come.
        """
        while taps := self.open_taps():
            self.bring(taps[0])

    def assertKept(self, download: Download) -> None:
        """
        Assert that the whole blob is content.
        """
        self.assertIsNone(download.failure)
        content = self.store.open(download.digest)
        assert content is not None
        kept = os.pread(content.fileno(), content.size + 1, 0)
        self.assertTrue(self.data == kept, "other bytes were kept")
        content.close()
        self.assertEqual([], self.open_files())

    def test_every_byte_is_asked_for_once(self) -> None:
        """
        The lanes' parts lie end to end, whichever lane is faster; together they are the blob, hashed in order.
        """
        for order in (0, -1, 1):
            download = self.start()
            self.assertEqual(4, len(self.open_taps()))
            while taps := self.open_taps():
                self.bring(taps[order % len(taps)])
            self.assertKept(download)
            spans = sorted((start, stop or 0) for start, stop in self.blob.spans)
            ends = [stop for _, stop in spans]
            self.assertEqual([0, *ends[:-1]], [start for start, _ in spans])
            self.assertEqual(self.SIZE, ends[-1])
            self.assertLessEqual(max(stop - start for start, stop in spans), LARGEST_PART)

    def test_no_more_lanes_than_given(self) -> None:
        """
        Never more connections than lanes are open; a single lane fetches the rest in one part.
        """
        for lanes in (1, 2, 4):
            download = self.start(lanes=lanes)
            while taps := self.open_taps():
                self.assertLessEqual(len(taps), lanes)
                self.bring(taps[0])
            self.assertKept(download)
        download = self.start(lanes=1)
        self.finish()
        self.assertEqual([(0, SMALLEST_PART), (SMALLEST_PART, self.SIZE)], self.blob.spans)

    def test_a_lane_without_a_part_has_nothing_to_do(self) -> None:
        """
        A blob of fewer parts than lanes arrives whole.
        """
        self.data = self.data[: SMALLEST_PART + 1000]
        download = self.start()
        self.assertEqual([(0, SMALLEST_PART), (SMALLEST_PART, len(self.data))], self.blob.spans)
        self.finish()
        self.assertKept(download)

    def test_the_pieces_of_all_lanes_may_mix(self) -> None:
        """
        Bytes that arrive in turns over all lanes, and in slow threads, end up in the right order.
        """
        download = self.start()
        reader = Reader(download.follow(0, self.SIZE))
        self.hands.idle = False
        at: dict[Tap, int] = {}
        while taps := self.open_taps():
            for tap in taps:
                assert tap.stop is not None
                start = at.get(tap, tap.start)
                if start < tap.stop and not tap.paused:
                    at[tap] = min(tap.stop, start + 300_000)
                    tap.arrived(self.data[start : at[tap]])
            if self.hands.waiting:
                self.hands.waiting.rotate(1)
                self.hands.work()
        self.hands.work_off()
        self.assertTrue(self.data == reader.got)
        reader.follower.close()
        self.hands.work_off()
        self.assertKept(download)

    def test_readers_see_no_gap(self) -> None:
        """
        Bytes of a later lane are visible to a reader once all before them are there.
        """
        download = self.start()
        reader = Reader(download.follow(0, self.SIZE))
        first, second, third, fourth = self.blob.taps
        self.bring(second)
        self.bring(first, 1000)
        self.assertEqual(1000, len(reader.got))
        self.assertEqual(1000, download.received)
        first.arrived(self.data[1000:SMALLEST_PART])
        self.assertEqual(second.stop, len(reader.got))
        self.bring(fourth)
        self.assertEqual(second.stop, len(reader.got))
        self.bring(third)
        self.assertEqual(fourth.stop, len(reader.got))
        self.assertTrue(self.data.startswith(bytes(reader.got)))
        self.finish()
        self.assertTrue(self.data == reader.got)

    def test_a_reader_far_ahead_is_served_from_its_lane(self) -> None:
        """
        A reader of a range has its bytes when their lane has delivered them, whatever is missing before.
        """
        download = self.start()
        third = self.blob.taps[2]
        start = third.start + 1000
        self.assertTrue(download.offers(start))
        reader = Reader(download.follow(start, start + 5000))
        self.bring(third, 500)
        self.assertEqual(b"", bytes(reader.got))
        third.arrived(self.data[third.start + 500 : start + 2000])
        self.clock.advance(GATHER_SECONDS)
        self.assertEqual(2000, len(reader.got))
        third.arrived(self.data[start + 2000 : start + 9000])
        self.clock.advance(GATHER_SECONDS)
        self.assertEqual(self.data[start : start + 5000], bytes(reader.got))
        self.assertEqual(0, download.received)
        self.assertTrue(reader.follower.done)
        third.ended(Failure(ZeroDivisionError()))
        self.finish()
        self.assertEqual(self.data[start : start + 5000], bytes(reader.got))

    def test_a_lane_that_breaks_goes_on(self) -> None:
        """
        A lane goes on from its last good byte to the end of its own part; the others notice nothing.
        """
        download = self.start()
        broken = self.blob.taps[1]
        self.bring(broken, 1_500_000)
        broken.ended(Failure(ZeroDivisionError()))
        self.assertEqual((broken.start + 1_500_000, broken.stop), self.blob.spans[-1])
        self.assertEqual(4, len(self.open_taps()))
        self.finish()
        self.assertKept(download)

    def test_a_lane_that_can_not_go_on_ends_all(self) -> None:
        """
        Three breaks in a row without a byte end the whole transfer: no lane goes on, no file stays.
        """
        download = self.start()
        others = [tap for tap in self.blob.taps if tap is not self.blob.taps[2]]
        reader = Reader(download.follow(0, self.SIZE))
        self.bring(self.blob.taps[0], 1000)
        self.blob.taps[2].ended(Failure(ZeroDivisionError()))
        for _ in range(TRIES - 1):
            self.assertIsNone(download.failure)
            self.tap.ended(Failure(ZeroDivisionError()))
        self.assertEqual({True}, {tap.aborted for tap in others})
        self.assertEqual(1000, len(reader.got))
        reader.follower.close()
        self.assertFailed(download, ZeroDivisionError)
        self.assertEqual([], self.open_files())

    def test_the_end_ends_what_is_being_opened(self) -> None:
        """
        A transfer that fails does not wait for parts that were requested and have not been answered.
        """
        digest = Digest.of(self.data)
        download = Download(digest, self.SIZE, begin(self.store, digest, self.SIZE), Disk.of(self.hands), 4)
        self.blob = Source(self.SIZE, SMALLEST_PART)
        self.blob.late = []
        running = Deferred.fromCoroutine(download.run(self.blob))
        self.assertEqual(3, len(self.blob.late))
        for tried in (0, 3, 4):
            self.blob.late[tried].errback(KeyError())
        self.successResultOf(running)
        self.assertEqual([True] * 5, [late.called for late in self.blob.late])
        self.assertTrue(self.blob.first.aborted)
        self.assertFailed(download, KeyError)

    def test_other_bytes_in_one_lane_fail(self) -> None:
        """
        One wrong byte from any lane fails the whole blob.
        """
        download = self.start()
        reader = Reader(download.follow(0, self.SIZE))
        third = self.blob.taps[2]
        third.arrived(b"\0" * 10)
        third.arrived(self.data[third.start + 10 : third.stop])
        self.finish()
        self.assertEqual(self.SIZE - 1, len(reader.got))
        reader.follower.close()
        self.assertFailed(download, DigestMismatchError)

    def test_more_than_a_part_is_left_aside(self) -> None:
        """
        A bucket that sends more than a lane's part is stopped: the next bytes are another lane's.
        """
        download = self.start()
        second = self.blob.taps[1]
        assert second.stop is not None
        second.arrived(self.data[second.start : second.stop] + b"x" * 1000)
        self.assertTrue(second.aborted)
        self.finish()
        self.assertKept(download)

    def test_a_slow_disk_bounds_each_lane(self) -> None:
        """
        While the disk is slow each lane is paused by itself.
        """
        self.start()
        self.hands.idle = False
        second, third = self.blob.taps[1:3]
        self.bring(second, SMALLEST_PART)
        second.arrived(self.data[second.start + SMALLEST_PART : second.stop])
        self.assertFalse(third.paused)
        self.hands.work_off()

    def test_a_disk_that_fails_loses_nothing(self) -> None:
        """
        If the disk fails with bytes of several lanes on it, readers get everything: the complete ranges from the first
        byte on from the file, the rest again in one stream.
        """
        download = self.start()
        reader = Reader(download.follow(0, self.SIZE), eager=False)
        lanes = list(self.blob.taps)
        self.bring(lanes[2])
        self.bring(lanes[0], 2**20)

        def failing(fd: int, data: Any, offset: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(os, "pwrite", failing)
        self.bring(lanes[1], 1000)
        self.assertEqual({True}, {tap.aborted for tap in lanes})
        self.assertEqual((2**20, self.SIZE), self.blob.spans[-1])
        reader.eager = True
        pour(self.tap, self.data[2**20 :])
        self.tap.ended(None)
        self.assertTrue(self.data == reader.got)
        self.assertTrue(reader.follower.done)
        reader.follower.close()
        self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])
        self.assertEqual([], self.open_files())


class LastBytesTests(DownloadTestCase):
    """
    The bytes that complete a file are sent from memory, and written and committed in one call.
    """

    def test_a_small_blob_costs_one_call(self) -> None:
        data = noise("x", 1000)
        download = self.begin(data)
        self.hands.idle = False
        self.tap.arrived(data)
        self.tap.ended(None)
        self.assertFalse(self.tap.aborted)  # the connection can be used again
        readers = [Reader(download.follow(0, 1000)), Reader(download.follow(500, 700))]
        self.assertEqual([data, data[500:700]], [bytes(each.got) for each in readers])
        self.assertTrue(all(each.follower.done for each in readers))
        self.hands.work()
        for each in readers:
            each.follower.close()
        self.assertEqual([0, []], [len(self.hands.waiting), self.open_files()])
        content = self.store.open(download.digest)
        assert content is not None
        content.close()

    def test_readers_of_what_was_written_before_go_on(self) -> None:
        buffered, data = Buffered(), noise("x", 1000)
        download = self.begin(data, buffered=buffered)
        slow = Reader(download.follow(0, 1000), eager=False)
        self.tap.arrived(data[:400])
        self.hands.idle = False
        self.tap.arrived(data[400:])
        self.tap.ended(None)
        slow.read(300)
        late = Reader(download.follow(350, 1000))
        self.assertEqual(data[350:], bytes(late.got))
        self.hands.idle = True
        self.hands.work_off()
        self.assertEqual(0, buffered.size)
        slow.read()
        self.assertEqual(data, bytes(slow.got))
        for each in (slow, late):
            each.follower.close()
        self.assertEqual([], self.open_files())

    def test_a_disk_that_fails_then_keeps_no_reader_from_them(self) -> None:
        for before in (0, 400):
            buffered, data = Buffered(), noise("x", 1000)
            download = self.begin(data, buffered=buffered)
            if before:
                self.tap.arrived(data[:before])
            readers = [Reader(download.follow(start, 1000), eager=False) for start in (0, 700)] if before else []
            self.patch(os, "fsync", failing(errno.EIO))
            self.tap.arrived(data[before:])
            self.tap.ended(None)
            for each in readers:
                each.read()
            self.assertEqual([data, data[700:]][: len(readers)], [bytes(each.got) for each in readers])
            for each in readers:
                each.follower.close()
            self.assertIsNone(self.store.open(download.digest))
            self.assertEqual([0, [], False], [buffered.size, self.open_files(), download.kept])
            self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])


class SpillTests(DownloadTestCase):
    """
    A disk that fails in the middle.
    """

    def breaking(self, after: int) -> None:
        """
        Let the disk accept so many bytes more, and then none.
        """
        left = [after]

        def failing(fd: int, data: Any, offset: int) -> int:
            left[0] -= len(data) if is_data(data) else 0
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return PWRITE(fd, data, offset)

        self.patch(os, "pwrite", failing)

    def test_loses_nothing(self) -> None:
        """
        Wherever the disk fails, between batches, within one, or at the first byte, every reader gets everything.
        """
        size = TAIL + 1000
        data = noise("x", size)
        for taken in (0, 99, 100, 150, 600, size - 1):
            self.breaking(taken)
            download = self.begin(data)
            quick, slow = Reader(download.follow(0, size)), Reader(download.follow(0, size), eager=False)
            part = Reader(download.follow(500, 700), eager=False)
            self.hands.idle = False
            feed(self.tap, data)  # all but the first arrive in one batch, as pieces
            self.hands.idle = True
            self.hands.work_off()
            self.assertEqual((download.received, size), (self.tap.start, self.tap.stop))
            feed(self.tap, data)
            self.tap.ended(None)
            slow.read()
            part.read()
            for reader, expected in ((quick, data), (slow, data), (part, data[500:700])):
                self.assertEqual(expected, bytes(reader.got), taken)
                self.assertTrue(reader.follower.done)
                reader.follower.close()
            self.assertFalse(download.kept)
            self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])
            self.assertEqual([], self.open_files())

    def test_verifies_all_the_same(self) -> None:
        """
        The hash covers what the file has and what it hasn't: wrong bytes fail.
        """
        size = 400 + TAIL + 1
        self.breaking(500)
        download = self.begin(noise("x", size))
        reader = Reader(download.follow(0, size))
        self.tap.arrived(bytes(400))
        self.tap.arrived(bytes(TAIL + 1))
        self.assertEqual([(0, size), (400, size)], self.blob.spans)
        self.tap.arrived(bytes(TAIL + 1))
        self.tap.ended(None)
        self.assertEqual(size - 1, len(reader.got))
        reader.follower.close()
        self.assertFailed(download, DigestMismatchError)

    def test_late_ones_begin_where_there_are_bytes(self) -> None:
        """
        After the failure a reader may begin in the written part as long as everything behind it is still held.
        """
        data = noise("x", 10_000)
        self.breaking(4000)
        download = self.begin(data)
        first = Reader(download.follow(0, 10_000), eager=False)
        self.tap.arrived(data[:4000])
        self.tap.arrived(b"lost")
        self.tap.arrived(data[4000:8000])
        self.assertEqual([True] * 4, [download.offers(start) for start in (0, 3999, 4000, 9000)])
        late = Reader(download.follow(0, 10_000))
        first.read()
        late.read()
        self.assertEqual([False, False, False, True], [download.offers(start) for start in (0, 3999, 4000, 9000)])
        self.tap.arrived(data[8000:])
        self.tap.ended(None)
        self.assertEqual((data, data[:-1]), (bytes(late.got), bytes(first.got) + data[len(first.got) : -1]))
        self.assertEqual([False] * 2, [download.offers(start) for start in (0, 9000)], "the end has passed")
        first.read()
        self.assertEqual(data, bytes(first.got))

    def test_without_readers_is_given_up(self) -> None:
        """
        If the disk fails and there is no follower, the transfer ends once its window is full.
        """
        data = noise("x", 4 * WINDOW)
        self.breaking(1000)
        download = self.begin(data)
        self.tap.arrived(data[:2000])
        self.clock.advance(GATHER_SECONDS)
        pour(self.tap, data[: 3 * WINDOW])
        self.assertTrue(self.tap.aborted)
        self.assertFailed(download, CancelledError)

    def test_of_much_that_waited_loses_nothing(self) -> None:
        """
        If the disk fails with many bytes waiting for it and upstream has ended meanwhile, readers still get everything.
        """
        data = noise("x", 3 * WINDOW)
        self.breaking(2**16)
        download = self.begin(data)
        reader = Reader(download.follow(0, len(data)))
        self.hands.idle = False
        pour(self.tap, data[: 2**16])
        self.clock.advance(GATHER_SECONDS)
        pour(self.tap, data[2**16 :])
        self.tap.ended(None)
        self.hands.work_off()
        self.assertEqual([(0, len(data)), (2**16, len(data))], self.blob.spans)
        pour(self.tap, data[2**16 :])
        self.tap.ended(None)
        self.hands.work_off()
        self.assertTrue(download.verified)
        self.assertEqual(data, bytes(reader.got))


class WindowTests(DownloadTestCase):
    """
    A transfer without a file.
    """

    def test_passes_through(self) -> None:
        """
        Its readers get all of it, the last byte once the digest is verified.
        """
        data = noise("x", 300_000)
        download = self.begin(data, kept=False)
        self.assertFalse(download.kept)
        readers = [Reader(download.follow(0, len(data))) for _ in range(3)]
        self.tap.arrived(data[:-1])
        self.assertEqual({len(data) - 1}, {len(reader.got) for reader in readers})
        self.tap.arrived(data[-1:])
        for reader in readers:
            self.assertEqual(data, bytes(reader.got))
            self.assertTrue(reader.follower.done)

    def test_of_unknown_length(self) -> None:
        """
        Without an announced length all bytes are passed on, and the end once the digest is verified.
        """
        data = noise("x", 1000)
        download = self.begin(data, kept=False, size=None)
        reader = Reader(download.follow(0, None))
        self.tap.arrived(data)
        self.assertEqual(data, bytes(reader.got))
        self.assertFalse(reader.follower.done)
        self.tap.ended(None)
        self.assertTrue(reader.follower.done)

    def test_of_unknown_length_with_other_bytes(self) -> None:
        """
        Without a length wrong bytes fail before the end, too.
        """
        download = self.begin(b"right", kept=False, size=None)
        reader = Reader(download.follow(0, None))
        self.tap.arrived(b"wrong")
        self.tap.ended(None)
        self.assertFalse(reader.follower.done)
        self.assertFailed(download, DigestMismatchError)

    def test_a_break_is_mended(self) -> None:
        data = noise("x", 1000)
        download = self.begin(data, kept=False)
        reader = Reader(download.follow(0, 1000))
        for end in (100, 500, 700):
            self.tap.arrived(data[self.tap.start : end])
            self.tap.ended(Failure(ZeroDivisionError()))
        self.assertEqual([(0, 1000), (100, 1000), (500, 1000), (700, 1000)], self.blob.spans)
        self.tap.arrived(data[700:])
        self.assertEqual(data, bytes(reader.got))
        self.assertTrue(download.verified)

    def test_a_break_without_a_byte_three_times_in_a_row_is_the_end(self) -> None:
        download = self.begin(noise("x", 1000), kept=False)
        reader = Reader(download.follow(0, 1000))
        for _ in range(TRIES):
            self.assertIsNone(download.failure)
            self.tap.ended(Failure(ZeroDivisionError()))
        reader.follower.close()
        self.assertFailed(download, ZeroDivisionError)

    def test_of_unknown_length_a_break_is_the_end(self) -> None:
        """
        What is missing is unknown then.
        """
        download = self.begin(b"x" * 1000, kept=False, size=None)
        reader = Reader(download.follow(0, None))
        self.tap.arrived(b"x" * 500)
        self.tap.ended(Failure(ZeroDivisionError()))
        reader.follower.close()
        self.assertFailed(download, ZeroDivisionError)

    def test_waits_for_the_slowest(self) -> None:
        """
        Upstream is paused while a reader does not read, with bounded memory, and resumed when it does.
        """
        data = noise("x", 16 * WINDOW)
        download = self.begin(data, kept=False)
        quick, slow = Reader(download.follow(0, len(data))), Reader(download.follow(0, len(data)), eager=False)
        arrived = rounds = 0
        while arrived < len(data):
            while not self.tap.paused and arrived < len(data):
                self.tap.arrived(data[arrived : arrived + 2**16])
                arrived += 2**16
            # Bytes that wait to be hashed, that are being hashed, and that wait to be read.
            self.assertLessEqual(arrived - len(slow.got), 3 * WINDOW + 2 * 2**16)
            rounds += 1
            slow.read(WINDOW)
        self.tap.ended(None)
        slow.read()
        self.assertEqual((data, data), (bytes(quick.got), bytes(slow.got)))
        self.assertGreater(rounds, 4)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_goes_on_without_a_reader_that_stops(self) -> None:
        """
        After some seconds, as others wait for it; as long as it reads, however slowly, they wait.
        """
        data = noise("x", 12 * WINDOW)
        download = self.begin(data, kept=False)
        quick, slow = Reader(download.follow(0, len(data))), Reader(download.follow(0, len(data)), eager=False)
        pour(self.tap, data[:-1])
        for _ in range(3):
            self.clock.advance(STUCK_SECONDS - 1)
            slow.read(2**16)
            self.assertTrue(self.tap.paused)
        with capturedLogs() as events:
            self.clock.advance(STUCK_SECONDS)
        self.assertGreater(len(quick.got), 4 * WINDOW)
        self.tap.arrived(data[-1:])
        self.tap.ended(None)
        self.assertEqual(data, bytes(quick.got))
        assert slow.follower.failure is not None
        slow.follower.failure.trap(CancelledError)
        self.assertIn("took nothing", formatEvent(events[0]))
        slow.follower.close()
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_goes_on_without_a_reader_that_stops_while_others_come_and_leave(self) -> None:
        data = noise("x", 12 * WINDOW)
        download = self.begin(data, kept=False)
        quick, _ = Reader(download.follow(0, len(data))), Reader(download.follow(0, len(data)), eager=False)
        pour(self.tap, data)
        for _ in range(2):
            self.clock.advance(STUCK_SECONDS - 1)
            if download.offers(WINDOW):
                Reader(download.follow(WINDOW, WINDOW + 1)).follower.close()
        self.assertGreater(len(quick.got), 4 * WINDOW)

    def test_waits_for_readers_that_nobody_else_waits_for(self) -> None:
        """
        However long: the client's own limit applies. It is left behind when another reader has to wait for it.
        """
        data = noise("x", 12 * WINDOW)
        download = self.begin(data, kept=False)
        several = [Reader(download.follow(0, len(data)), eager=False) for _ in range(2)]
        pour(self.tap, data)
        self.clock.advance(10 * STUCK_SECONDS)
        self.assertEqual([None, None], [each.follower.failure for each in several])
        quick = Reader(download.follow(0, len(data)))
        self.clock.advance(STUCK_SECONDS)
        self.tap.ended(None)
        self.assertEqual(data, bytes(quick.got))

    def test_many_whose_readers_stop_hold_together_what_is_allowed_and_a_read_each(self) -> None:
        data, count, most = noise("x", 4 * WINDOW), 40, 8 * WINDOW
        buffered, taps, arrived = Buffered(most), [], 0
        for _ in range(count):
            download = self.begin(data, kept=False, buffered=buffered)
            Reader(download.follow(0, len(data)), eager=False)
            taps.append(self.tap)
        for at in range(0, len(data), 2**16):
            for tap in taps:
                if not tap.paused:
                    tap.arrived(data[at : at + 2**16])
                    arrived += 2**16
        self.assertLessEqual(arrived, most + count * 2**16)
        self.assertTrue(all(tap.paused for tap in taps))

    def test_beside_many_that_stop_a_reader_gets_all(self) -> None:
        data = noise("x", 2 * WINDOW)
        buffered = Buffered()
        buffered.size = buffered.most + 1
        download = self.begin(data, kept=False, buffered=buffered)
        slow = Reader(download.follow(0, len(data)), eager=False)
        for at in range(0, len(data), 2**16):
            self.assertFalse(self.tap.paused)
            self.tap.arrived(data[at : at + 2**16])
            slow.read()
        self.tap.ended(None)
        slow.read()
        self.assertEqual(data, bytes(slow.got))
        self.assertTrue(download.verified)

    def test_more_bytes_than_a_window_at_the_end_are_verified(self) -> None:
        data = noise("x", WINDOW + 2)
        download = self.begin(data, kept=False)
        reader = Reader(download.follow(0, len(data)))
        self.tap.arrived(data + b"more")  # cut to the blob's size, they are one piece
        self.assertEqual(data, bytes(reader.got))

    def test_goes_on_when_the_slowest_leaves(self) -> None:
        """
        A reader that disconnects no longer delays others.
        """
        data = noise("x", 12 * WINDOW)
        download = self.begin(data, kept=False)
        quick, slow = Reader(download.follow(0, len(data))), Reader(download.follow(0, len(data)), eager=False)
        pour(self.tap, data)
        self.assertTrue(self.tap.paused)
        self.assertLess(len(quick.got), len(data))
        slow.follower.close()
        self.assertEqual(data, bytes(quick.got))

    def test_ends_with_its_last_reader(self) -> None:
        """
        When the last reader disconnects upstream is stopped, and nobody can follow any longer.
        """
        data = noise("x", 1000)
        download = self.begin(data, kept=False)
        readers = [Reader(download.follow(0, 1000)) for _ in range(2)]
        self.tap.arrived(data[:500])
        readers[0].follower.close()
        self.assertFalse(self.tap.aborted)
        readers[1].follower.close()
        self.assertTrue(self.tap.aborted)
        self.assertFalse(download.offers(0) or download.offers(600))
        self.assertFailed(download, CancelledError)

    def test_is_offered_from_where_it_is(self) -> None:
        """
        A reader can begin at bytes that are still held or yet to come, not at earlier ones.
        """
        data = noise("x", 1000)
        download = self.begin(data, kept=False)
        reader = Reader(download.follow(0, 1000), eager=False)
        self.tap.arrived(data[:400])
        self.tap.arrived(data[400:800])
        self.assertEqual([True, True, True], [download.offers(start) for start in (0, 500, 900)])
        reader.read(500)
        self.assertEqual([False, True, True], [download.offers(start) for start in (0, 400, 900)])
        self.assertRaises(LookupError, download.piece, 0, 10)
        late = Reader(download.follow(400, 1000))
        self.tap.arrived(data[800:])
        self.tap.ended(None)
        self.assertEqual(data[400:], bytes(late.got))

    def test_a_reader_ahead_of_it_waits(self) -> None:
        """
        A reader whose range begins later delays nobody and gets its range.
        """
        data = noise("x", 6 * WINDOW)
        download = self.begin(data, kept=False)
        reader = Reader(download.follow(5 * WINDOW, 6 * WINDOW))
        pour(self.tap, data)
        self.assertEqual(0, self.tap.pauses)
        self.tap.ended(None)
        self.assertEqual(data[5 * WINDOW :], bytes(reader.got))

    def test_a_reader_of_a_part_holds_nobody_back(self) -> None:
        """
        A reader that has its range except for the last byte, which waits for verification, does not delay the transfer.
        """
        data = noise("x", 6 * WINDOW)
        download = self.begin(data, kept=False)
        part, whole = Reader(download.follow(100, 200)), Reader(download.follow(0, len(data)))
        pour(self.tap, data)
        self.tap.ended(None)
        self.assertEqual(data, bytes(whole.got))
        self.assertEqual(data[100:200], bytes(part.got))

    def test_upstream_may_end_while_the_window_is_full(self) -> None:
        """
        If upstream has ended before a slow reader read, it still gets everything.
        """
        data = noise("x", 4 * WINDOW)
        download = self.begin(data, kept=False)
        slow = Reader(download.follow(0, len(data)), eager=False)
        pour(self.tap, data)
        self.tap.ended(None)
        self.assertFalse(download.verified)
        slow.eager = True
        slow.read()
        self.assertEqual(data, bytes(slow.got))
        self.assertTrue(download.verified)


class EndedTests(DownloadTestCase):
    """
    An ended transfer holds no bytes, whatever still refers to it: the garbage collector sees objects, not their size.
    """

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(gc.enable)
        gc.disable()
        self.data = noise("x", 2000)
        self.piece = noise("y", 1000)

    def assertForgotten(self, end: Callable[[], object], *, kept: bool) -> None:
        """
        Assert that nothing holds the received bytes when the transfer has ended and its reader has left.
        """
        before = sys.getrefcount(self.piece)
        download = self.begin(self.data, kept=kept)
        reader = Reader(download.follow(0, 2000), eager=False)
        self.hands.idle = False  # a Deferred that has failed before it is awaited keeps its frames, in Twisted itself
        self.tap.arrived(self.piece)
        self.hands.work_off()
        end()
        self.hands.work_off()
        reader.follower.close()
        self.assertTrue(self.tap.over)
        self.assertEqual(before, sys.getrefcount(self.piece))

    def test_forgets_other_bytes(self) -> None:
        """
        Bytes with another digest are dropped when their followers have left.
        """

        def end() -> None:
            self.tap.arrived(self.piece)
            self.tap.ended(None)

        for kept in (True, False):
            self.assertForgotten(end, kept=kept)

    def test_forgets_what_broke_off(self) -> None:
        """
        Bytes of a transfer that upstream broke off, once or for good, are dropped.
        """

        def end() -> None:
            for _ in range(1 + TRIES):
                self.tap.ended(Failure(ZeroDivisionError()))

        for kept in (True, False):
            self.assertForgotten(end, kept=kept)

    def test_forgets_what_the_disk_refused(self) -> None:
        """
        Bytes that a failing disk did not accept are dropped with the transfer.
        """
        for code in (errno.EIO, errno.ENOSPC):
            fails = partial(fail_with, code)
            self.patch(os, "pwrite", lambda *args, fails=fails: (fails if is_data(args[1]) else PWRITE)(*args))
            self.assertForgotten(lambda: self.tap.arrived(self.piece), kept=True)

    def test_forgets_what_nobody_waits_for(self) -> None:
        """
        A window is dropped with its last reader.
        """
        self.assertForgotten(lambda: None, kept=False)

    def test_forgets_what_nobody_foresaw(self) -> None:
        """
        A bug in the daemon keeps no bytes.
        """
        self.patch(Writer, "write", fail_unforeseen)

        def end() -> None:
            for _ in range(TRIES):
                self.tap.arrived(b"x")
                self.hands.work_off()

        self.assertForgotten(end, kept=True)

    def test_forgets_while_it_waits(self) -> None:
        """
        Nothing holds bytes that are written, or that all have read, while the next are awaited.
        """
        for kept in (True, False):
            before = sys.getrefcount(self.piece)
            download = self.begin(self.data, kept=kept)
            Reader(download.follow(0, 2000))
            self.tap.arrived(self.piece)
            self.assertEqual(before, sys.getrefcount(self.piece))
            self.tap.arrived(self.data[1000:])
            self.tap.ended(None)


def is_data(written: bytes | memoryview) -> bool:
    """
    Return True for a blob's bytes, False for a record.
    """
    return isinstance(written, memoryview)


def fail_unforeseen(*_: object) -> NoReturn:
    raise ZeroDivisionError


def fail_with(code: int, *_: object) -> NoReturn:
    raise OSError(code, os.strerror(code))


class FollowerTests(DownloadTestCase):
    def test_hears_nothing_after_closing(self) -> None:
        """
        A closed reader gets no notifications.
        """
        download = self.begin(b"x" * 10)
        heard: list[int] = []
        follower = download.follow(0, 10)
        follower.listen(lambda: heard.append(1))
        self.tap.arrived(b"x")
        follower.close()
        self.tap.arrived(b"x" * 9)
        self.tap.ended(None)
        self.assertEqual([1], heard)

    def test_one_may_close_while_all_are_told(self) -> None:
        """
        A reader that closes when it is notified doesn't keep others from being notified.
        """
        download = self.begin(b"x" * 10)
        first = download.follow(0, 10)
        first.listen(first.close)
        second = Reader(download.follow(0, 10))
        self.tap.arrived(b"x" * 10)
        self.tap.ended(None)
        self.assertEqual(b"x" * 10, bytes(second.got))

    def test_takes_no_more_than_it_asks_for(self) -> None:
        """
        A piece is as long as the reader wants, or as there is.
        """
        data = noise("x", 1000)
        for kept in (True, False):
            download = self.begin(data, kept=kept)
            follower = download.follow(0, 1000)
            self.tap.arrived(data[:-1])
            for limit, length in ((1, 1), (100, 100), (5000, 999)):
                piece = follower.piece(limit)
                assert piece is not None
                self.assertEqual(length, len(piece) if isinstance(piece, bytes) else piece[2])
            follower.close()
            if kept:
                self.tap.arrived(data[-1:])

    def test_of_nothing_is_done_when_it_is_proved(self) -> None:
        """
        The reader of an empty blob has nothing to read, and is done once the digest is verified; no other reader is.
        """
        follower = self.begin(b"").follow(0, 0)
        self.assertIsNone(follower.piece(10))
        self.assertTrue(follower.done)
        follower.close()
        download = self.begin(b"x", size=0)
        self.assertFalse(download.follow(0, 0).done)
        assert download.failure is not None
        download.failure.trap(DigestMismatchError)


class HandsTests(SynchronousTestCase):
    """
    The double for threads works as the tests expect.
    """

    def test_works_when_told_to(self) -> None:
        """
        Idle hands work at once, others when told, in order; failures are passed on.
        """
        hands, done = Hands(), list[Sequence[object]]()
        self.assertEqual(3, self.successResultOf(hands(len, "abc")))
        hands.idle = False
        first, second = hands(done.append, "a"), hands(int, "x")
        self.assertNoResult(first)
        hands.work()
        self.assertEqual((None, ["a"]), (self.successResultOf(first), done))
        hands.work_off()
        self.failureResultOf(second, ValueError)
        self.assertEqual(
            (1, None), (self.successResultOf(succeed(1)), self.failureResultOf(fail(KeyError())).check(int))
        )
