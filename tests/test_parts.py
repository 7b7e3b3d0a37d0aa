"""
Ranges of blobs: several in one response, of blobs that are cold, in flight, not cached or left over.
"""

from __future__ import annotations

from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from random import Random
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent

from ecrproxy.byte_ranges import QUESTIONS, Multipart
from ecrproxy.cache.record import UNKNOWN_BOOT
from ecrproxy.transfer.gaps import SMALLEST_PART
from ecrproxy.transfer.inflow import Lanes
from ecrproxy.transfer.unattended import MOST, SLOW, SLOW_SECONDS
from tests.daemon import MIB, DaemonTestCase, Reply, noise
from tests.test_ranges import DATA, SIZE, RangesTestCase

T = TypeVar("T")
FOOTER = 51


def spans_of(header: str) -> list[tuple[int, int]]:
    """
    Parse a Range header of closed ranges.
    """
    pairs = [each.partition("-") for each in header.removeprefix("bytes=").split(",")]
    return [(int(first), int(last) + 1) for first, _, last in pairs]


def ranges_of(spans: list[tuple[int, int]]) -> str:
    """
    Build a Range header.
    """
    return "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)


def parts_of(reply: Reply) -> list[tuple[str, str, bytes]]:
    """
    Parse a multipart response like a mail: Content-Range, Content-Type and bytes of each part.
    """
    head = f"Content-Type: {reply.header('Content-Type')}\r\n\r\n".encode()
    parts = cast(list[Message], message_from_bytes(head + bytes(reply.body)).get_payload())
    return [
        (part["Content-Range"], part.get_content_type(), cast(bytes, part.get_payload(decode=True))) for part in parts
    ]


class SeveralRangesTests(DaemonTestCase):
    """
    Several ranges of a blob that is cold, in flight, on disk, in memory, or not cached.
    """

    def setUp(self) -> None:
        super().setUp()
        # Lines and text only: mail's parser would take a bare carriage return for the end of a line.
        self.data = noise("several", 150_000).hex().encode()
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def assertParts(self, reply: Reply, header: str, data: bytes = b"") -> None:
        """
        Assert that the response has these parts of the blob, in this order, and the announced length.
        """
        data = data or self.data
        self.assertEqual((206, "whole"), (reply.code, reply.ended))
        self.assertEqual(reply.length, len(reply.body))
        self.assertIsNone(reply.header("Content-Range"))
        expected = [
            (f"bytes {start}-{stop - 1}/{len(data)}", "application/octet-stream", data[start:stop])
            for start, stop in spans_of(header)
        ]
        self.assertEqual(expected, parts_of(reply))

    def test_are_parts_in_the_order_of_the_request(self) -> None:
        """
        Neither sorted nor merged where they touch or overlap: podman counts the parts and uses its own order.
        """
        for header in (
            "bytes=0-99,1000-1099",
            "bytes=200000-200009,5-9",
            "bytes=0-99,100-199,200-299",
            "bytes=0-99,50-149",
            "bytes=0-0,299999-299999",
        ):
            for path in self.files():
                path.unlink()
            cold = self.get(self.path, Range=header)
            self.assertParts(cold, header)
            self.assertEqual("MISS", cold.cache)
            warm = self.get(self.path, Range=header)
            self.assertParts(warm, header)
            self.assertEqual("HIT", warm.cache)

    def test_of_a_blob_on_its_way(self) -> None:
        self.standin.hold(self.digest)
        whole = self.get(self.path)
        header = "bytes=250000-250099,10-19"
        parts = self.get(self.path, Range=header)
        self.standin.release(self.digest)
        self.flush()
        self.assertParts(parts, header)
        self.assertWhole(whole, self.data)

    def test_of_a_blob_in_memory(self) -> None:
        data = self.data[:60_000]
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        for _ in range(3):
            self.assertParts(self.get(path, Range="bytes=0-99,59000-59999"), "bytes=0-99,59000-59999", data)

    def test_of_a_blob_that_is_not_kept_are_all_that_is_fetched(self) -> None:
        self.start(limit=100_000)
        self.get(self.path, Range="bytes=0-0")  # this makes the size known
        before = self.standin.bytes_sent
        header = "bytes=250000-250099,10-19,100000-109999"
        reply = self.get(self.path, Range=header)
        self.assertParts(reply, header)
        self.assertEqual("BYPASS", reply.cache)
        self.assertEqual(100 + 10 + 10_000, self.standin.bytes_sent - before)

    def test_close_to_each_other_of_a_blob_that_is_not_kept_are_one_question(self) -> None:
        self.start(limit=100_000)
        self.get(self.path, Range="bytes=0-0")
        self.standin.forget_asked()
        header = ranges_of([(at, at + 10) for at in range(1000, 1000 + 1024 * 290, 290)])
        self.assertParts(self.get(self.path, Range=header), header)
        self.assertEqual(1, self.standin.count("bucket"))

    def test_that_go_back_often_are_the_whole_unless_it_is_cached(self) -> None:
        """
        Each that starts before the end of the previous one would cost another request to the bucket.
        """
        header = ranges_of([(at, at + 10) for at in range(20_000, 0, -1000)])
        for limit in (100_000, 2**30):
            self.start(limit=limit)
            for _ in range(2):
                self.head(self.path)
                self.standin.forget_asked()
                reply = self.get(self.path, Range=header)
                if reply.cache == "HIT":
                    self.assertParts(reply, header)
                else:
                    self.assertWhole(reply, self.data)
                    self.assertLessEqual(self.standin.count("bucket"), 3)

    def test_as_many_as_podman_sends(self) -> None:
        self.start(in_thread=lambda blocking, *args: deferLater(self.clock, 0, blocking, *args))
        header = ranges_of([(at, at + 10) for at in range(0, 100 * 600, 100)])
        for _ in range(2):
            self.assertParts(self.get(self.path, Range=header), header)

    def test_one_that_can_be_had_is_a_single_part(self) -> None:
        self.assertWhole(self.get(self.path, Range="bytes=300000-,5-9"), self.data[5:10], "MISS", 206)

    def test_none_that_can_be_had_is_refused(self) -> None:
        for _ in range(2):
            reply = self.get(self.path, Range="bytes=300000-,400000-400001")
            self.assertRefused(reply, 416, "RANGE_INVALID", "300000")
            self.get(self.path)

    def test_more_bytes_than_the_blob_has_is_the_whole(self) -> None:
        """
        Overlapping ranges must not multiply the cost of a request.
        """
        self.assertWhole(self.get(self.path, Range="bytes=" + ",".join(["0-"] * 500)), self.data)

    def test_count_only_if_the_blob_is_the_one_that_was_meant(self) -> None:
        header = "bytes=0-99,1000-1099"
        self.assertParts(self.get(self.path, Range=header, If_Range=f'"{self.digest}"'), header)
        self.assertWhole(self.get(self.path, Range=header, If_Range='"another"'), self.data)

    def test_of_a_head_are_the_whole(self) -> None:
        reply = self.head(self.path, Range="bytes=0-99,1000-1099")
        self.assertEqual((200, 300_000), (reply.code, reply.length))


class PartsTestCase(RangesTestCase):
    """
    A blob of 40 MiB, whose size is known.
    """

    def setUp(self) -> None:
        super().setUp()
        self.head(self.path)

    def part(self, start: int, stop: int) -> Reply:
        return self.get(self.path, Range=f"bytes={start}-{stop - 1}")

    def asked_first(self) -> str:
        return self.standin.requests("bucket", "GET", self.digest)[0].headers["range"]


class ColdPartTests(PartsTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.standin.forget_asked()

    def test_a_footer_is_asked_for_first_and_sent_at_once(self) -> None:
        """
        Before any other byte of the blob.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path, Range=f"bytes=-{FOOTER}")
        self.assertEqual(f"bytes={SIZE - FOOTER}-{SIZE - 1}", self.asked_first())
        self.standin.deliver(self.digest, FOOTER)
        self.flush()
        self.assertWhole(reply, DATA[-FOOTER:], "MISS", 206)
        self.standin.release(self.digest)
        self.flush()
        self.assertTrue(self.has(self.digest))
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_the_first_two_bytes_are_sent_at_once(self) -> None:
        """
        SOCI and stargz request them to test for ranges.
        """
        self.standin.hold(self.digest)
        reply = self.part(0, 2)
        self.standin.deliver(self.digest, 2)
        self.flush()
        self.assertWhole(reply, DATA[:2], "MISS", 206)

    def test_is_for_no_cache_in_between_until_the_whole_is_verified(self) -> None:
        self.standin.hold(self.digest)
        reply = self.part(0, 2)
        self.standin.release(self.digest)
        self.flush()
        self.assertEqual("no-store", reply.header("Cache-Control"))
        self.assertEqual("max-age=31536000, immutable", self.part(0, 2).header("Cache-Control"))

    def test_of_no_byte_begins_no_transfer(self) -> None:
        self.assertEqual(416, self.get(self.path, Range=f"bytes={SIZE}-").code)
        self.assertEqual(([], 0), (self.daemon.pull_through.transfers(), self.standin.count("bucket")))

    def test_thirty_clients_with_a_part_each_cost_one_transfer(self) -> None:
        step = SIZE // 30
        starts = list(range(0, SIZE, step))
        replies = [self.daemon.send("GET", self.path, Range=f"bytes={at}-{at + 9_999}") for at in reversed(starts)]
        self.flush()
        for at, reply in zip(reversed(starts), replies, strict=True):
            self.assertWhole(reply, DATA[at : at + 10_000], code=206)
        self.assertTrue(self.has(self.digest))
        self.assertLess(self.standin.bytes_sent, 1.2 * SIZE)

    def test_many_parts_ask_no_more_of_the_bucket_than_the_whole_and_a_few(self) -> None:
        """
        Distant parts are fetched together with the bytes between them: all of it is cached.
        """
        for step in (60_000, 100_000, 400_000):
            for path in self.files():
                path.unlink()
            self.standin.forget_asked()
            spans = [(at, at + 10) for at in range(0, SIZE - 10, step)]
            reply = self.get(self.path, Range=ranges_of(spans))
            self.assertEqual((206, "whole", reply.length), (reply.code, reply.ended, len(reply.body)))
            self.assertLessEqual(self.standin.count("bucket"), SIZE // SMALLEST_PART + 3 * QUESTIONS)
            self.assertTrue(self.has(self.digest))

    def test_chunks_come_in_the_order_of_the_blob(self) -> None:
        self.standin.hold(self.digest)
        chunks = [self.get(self.path, Range=f"bytes={start}-") for start in range(0, SIZE, 2 * MIB)]
        self.standin.deliver(self.digest, SMALLEST_PART)
        self.flush()
        self.standin.deliver(self.digest, SMALLEST_PART)
        self.flush()
        self.assertGreater(min(len(chunk.body) for chunk in chunks[:4]), 0)

    def test_of_a_bucket_without_parts_comes_with_the_stream(self) -> None:
        self.standin.quirks.ignore_range = True
        reply = self.part(SIZE - FOOTER, SIZE)
        self.assertWhole(reply, DATA[-FOOTER:], "MISS", 206)
        self.assertTrue(self.has(self.digest))
        self.assertLessEqual(self.standin.bytes_sent, 2 * SIZE)

    def test_the_first_file_of_a_layer_that_is_asked_for_without_a_range(self) -> None:
        """
        If the blob arrives as one stream, but the bucket supports ranges, the range is requested separately.
        """
        self.start(lanes=Lanes(1))
        self.standin.hold(self.digest)
        whole = self.get(self.path)
        reply = self.part(SIZE - FOOTER, SIZE)
        self.standin.deliver(self.digest, FOOTER)
        self.flush()
        self.assertWhole(reply, DATA[-FOOTER:], "JOINED", 206)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(whole, DATA)
        self.assertLess(self.standin.bytes_sent, 1.1 * SIZE)


class JoinedPartTests(PartsTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.standin.hold(self.digest)
        self.whole = self.get(self.path)
        self.asked = self.standin.count("bucket")

    def test_a_lane_leaves_its_part_for_what_is_wanted(self) -> None:
        """
        With as many connections as before, and no byte twice except those in flight.
        """
        reply = self.part(SIZE - FOOTER, SIZE)
        self.assertEqual(4, self.standin.held(self.digest))
        self.standin.deliver(self.digest, FOOTER)
        self.flush()
        self.assertWhole(reply, DATA[-FOOTER:], "JOINED", 206)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(self.whole, DATA)
        self.assertLess(self.standin.bytes_sent, 1.05 * SIZE)

    def test_what_a_lane_is_about_to_bring_is_not_asked_for_again(self) -> None:
        start, _ = self.spans()[2]
        reply = self.part(start + 1000, start + 2000)
        self.assertEqual(self.asked, self.standin.count("bucket"))
        self.arrive(self.digest, 2000)
        self.assertWhole(reply, DATA[start + 1000 : start + 2000], "JOINED", 206)

    def test_a_small_part_does_not_wait_for_large_ones(self) -> None:
        """
        Lanes with wanted bytes are not interrupted, and the smallest wish is next.
        """
        large = self.get(self.path, Range=f"bytes={SIZE // 2}-")
        for at in range(3):
            self.part(SIZE // 2 + at * 5 * MIB, SIZE // 2 + at * 5 * MIB + 300_000)
        small = self.part(SIZE - FOOTER, SIZE)
        self.standin.deliver(self.digest, SMALLEST_PART)
        self.flush()
        self.standin.deliver(self.digest, FOOTER)
        self.flush()
        self.assertEqual("whole", small.ended)
        self.assertEqual("", large.ended)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(large, DATA[SIZE // 2 :], code=206)
        self.assertWhole(self.whole, DATA)

    def deliver_each(self, size: int) -> None:
        """
        Have each connection deliver so many bytes.
        """
        self.standin.deliver(self.digest, size)
        self.flush()

    def test_a_resumed_pull_and_a_reader_of_the_whole_share_the_connections(self) -> None:
        """
        However much one of them has still to read.
        """
        resumed = self.get(self.path, Range=f"bytes={SIZE // 2}-")
        for _ in range(2):
            self.deliver_each(SMALLEST_PART)
        self.assertGreater(len(self.whole.body), 12 * MIB)
        self.assertGreaterEqual(len(resumed.body), SMALLEST_PART)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(resumed, DATA[SIZE // 2 :], code=206)
        self.assertWhole(self.whole, DATA)
        self.assertLess(self.standin.bytes_sent, 1.2 * SIZE)

    def test_readers_that_come_and_go_do_not_starve_a_reader_of_the_whole(self) -> None:
        """
        containerd reads everything from a chunk's start on, but no more than the chunk.
        """
        chunks: list[Reply] = []
        for start in range(SIZE - MIB, 18 * MIB, -3 * MIB):
            chunks.append(self.get(self.path, Range=f"bytes={start}-"))
            self.deliver_each(MIB)
            for chunk in chunks[:-4]:
                chunk.leave()
            self.flush()
        self.assertGreater(len(self.whole.body), 8 * MIB)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(self.whole, DATA)
        self.assertLess(self.standin.bytes_sent, 1.5 * SIZE)

    def test_a_small_part_does_not_wait_for_parts_of_open_ended_ranges(self) -> None:
        for start in range(8 * MIB, SIZE, 8 * MIB):
            self.get(self.path, Range=f"bytes={start}-")
        self.deliver_each(SMALLEST_PART)
        small = self.part(SIZE - FOOTER, SIZE)
        self.assertEqual(4, self.standin.held(self.digest))
        self.deliver_each(FOOTER)
        self.assertWhole(small, DATA[-FOOTER:], "JOINED", 206)

    def test_wrong_bytes_are_never_kept(self) -> None:
        self.standin.corrupt(self.digest, DATA[:-1] + b"x")
        with capturedLogs() as events:
            reply = self.part(SIZE - FOOTER, SIZE)
            self.standin.release(self.digest)
            self.flush()
        self.assertWhole(reply, DATA[-FOOTER:-1] + b"x", code=206)
        self.assertBroken(self.whole, DATA)
        self.assertFalse(self.has(self.digest))
        self.assertTrue([event for event in events if "1 partial responses" in formatEvent(event)])


class UnkeptPartTests(PartsTestCase):
    """
    A blob that is larger than the cache.
    """

    def setUp(self) -> None:
        super().setUp()
        self.start(limit=10 * MIB)
        self.part(0, 1)  # this makes the size known
        self.standin.forget_asked()
        self.before = self.standin.bytes_sent

    def fetched(self) -> int:
        return self.standin.bytes_sent - self.before

    def test_all_parts_together_are_fetched_once(self) -> None:
        got = b""
        for start in range(0, SIZE, 4 * MIB):
            reply = self.part(start, start + 4 * MIB)
            self.assertEqual((206, "BYPASS", "too-large"), (reply.code, reply.cache, reply.header("X-Cache-Reason")))
            got += bytes(reply.body)
        self.assertTrue(got == DATA)
        self.assertEqual(SIZE, self.fetched())

    def test_parts_at_the_same_time_are_fetched_once(self) -> None:
        starts = range(0, SIZE, 4 * MIB)
        replies = [self.daemon.send("GET", self.path, Range=f"bytes={at}-{at + 4 * MIB - 1}") for at in starts]
        self.flush()
        self.assertTrue(b"".join(bytes(reply.body) for reply in replies) == DATA)
        self.assertLess(self.fetched(), 1.5 * SIZE)

    def test_a_break_is_mended(self) -> None:
        self.standin.hold(self.digest)
        reply = self.part(MIB, 3 * MIB)
        self.standin.deliver(self.digest, 1000)
        self.flush()
        self.standin.cut(self.digest)
        self.flush()
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA[MIB : 3 * MIB], "BYPASS", 206)
        self.assertEqual([(MIB, 3 * MIB), (MIB + 1000, 3 * MIB)], self.spans())

    def test_a_client_that_leaves_ends_it(self) -> None:
        self.standin.hold(self.digest)
        reply = self.get(self.path, Range=f"bytes={MIB}-")
        self.standin.deliver(self.digest, 1000)
        self.flush()
        reply.leave()
        self.flush()
        self.assertEqual(0, self.standin.held(self.digest))
        self.standin.release(self.digest)
        self.flush()
        self.assertLess(self.fetched(), 10_000)

    def test_a_client_that_leaves_before_the_answer_leaves_no_connection(self) -> None:
        self.standin.hold(self.digest)
        client = self.daemon.send("GET", self.path, Range=f"bytes={MIB}-")
        client.leave()
        self.flush()
        self.assertEqual(0, self.standin.held(self.digest))
        reply = self.get(self.path, Range=f"bytes={MIB}-", If_None_Match=f'"{self.digest}"')
        self.assertEqual((304, 0), (reply.code, self.standin.held(self.digest)))

    def test_a_client_that_does_not_read_holds_the_bucket_back(self) -> None:
        reply = self.daemon.send("GET", self.path, Range="bytes=1-")
        reply.stop_reading()
        self.flush()
        self.assertLess(self.fetched(), 5 * MIB)
        reply.read_on()
        self.flush()
        self.assertTrue(bytes(reply.body) == DATA[1:])

    def assertParts(self, spans: list[tuple[int, int]]) -> Reply:
        """
        Assert that the response has exactly these parts.
        """
        reply = self.get(self.path, Range=ranges_of(spans))
        self.assertEqual((206, "whole", reply.length), (reply.code, reply.ended, len(reply.body)))
        frame = Multipart(spans, SIZE, "application/octet-stream", self.digest.partition(":")[2])
        body = b"".join(head + DATA[start:stop] for head, (start, stop) in zip(frame.heads, spans, strict=True))
        self.assertTrue(body + frame.end == reply.body, "other bytes came")
        return reply

    def test_many_parts_are_few_questions(self) -> None:
        """
        However many ranges a client requests at once: the smallest gaps are read, and dropped.
        """
        for step, size in ((SIZE // 800, 10), (400 * 1024, 40_000), (MIB, MIB // 2)):
            self.standin.forget_asked()
            self.assertParts([(at, at + size) for at in range(0, SIZE - size, step)])
            self.assertLessEqual(self.standin.count("bucket"), QUESTIONS)

    def test_parts_may_go_back(self) -> None:
        self.assertParts([(30 * MIB, 31 * MIB), (MIB, MIB + 5), (MIB + 2, MIB + 9), (7, 8), (39 * MIB, SIZE)])
        self.assertLessEqual(self.standin.count("bucket"), 6)

    def test_many_parts_of_a_bucket_without_parts_are_one_stream(self) -> None:
        self.standin.quirks.ignore_range = True
        self.assertParts([(at, at + 10) for at in range(MIB, SIZE, MIB)])
        self.assertEqual(1, self.standin.count("bucket"))

    def test_many_parts_of_a_bucket_that_stops_giving_parts_are_one_more_stream(self) -> None:
        spans = [(at, at + 2 * MIB) for at in range(0, SIZE, 4 * MIB)]
        reply = self.daemon.send("GET", self.path, Range=ranges_of(spans))
        reply.stop_reading()
        self.flush()
        asked = self.standin.count("bucket")
        self.standin.quirks.ignore_range = True
        reply.read_on()
        self.flush()
        self.assertEqual((206, "whole", reply.length), (reply.code, reply.ended, len(reply.body)))
        self.assertEqual(1, self.standin.count("bucket") - asked)

    def test_a_client_of_many_parts_that_leaves_ends_it(self) -> None:
        reply = self.daemon.send("GET", self.path, Range=ranges_of([(at, at + MIB) for at in range(0, SIZE, 4 * MIB)]))
        reply.stop_reading()
        self.flush()
        reply.leave()
        self.flush()
        self.assertLess(self.fetched(), 6 * MIB)
        self.assertEqual(0, self.daemon.lanes.buffered.size)

    def test_the_whole_as_a_range_is_verified(self) -> None:
        self.standin.corrupt(self.digest, DATA[:-1] + b"x")
        self.assertBroken(self.get(self.path, Range="bytes=0-"), DATA)


class AnyPartsTests(DaemonTestCase):
    """
    Any ranges, of a blob that is cached or not, from a bucket that sends ranges, shorter ones, or everything.
    """

    def test_are_the_bytes_of_the_blob(self) -> None:
        data, chance = noise("any parts", MIB), Random(4)
        self.digest = self.standin.push_blob("team/app", data)
        for _ in range(60):
            self.start(limit=chance.choice((MIB // 2, 2**30)))
            for path in self.files():
                path.unlink()
            if chance.random() < 0.5:
                self.head(f"/v2/team/app/blobs/{self.digest}")
            self.compare(data, chance)

    def compare(self, data: bytes, chance: Random) -> None:
        quirks = self.standin.quirks
        quirks.ignore_range = chance.random() < 0.3
        quirks.longest_part = chance.choice((100_000, 2**62, 2**62))
        starts = [chance.randrange(MIB) for _ in range(chance.choice((2, 3, 10)))]
        spans = [(at, min(MIB, at + chance.choice((1, 1000, 90_000)))) for at in starts]
        spans = spans if chance.random() < 0.5 else sorted(spans)
        path = f"/v2/team/app/blobs/{self.digest}"
        replies = [self.daemon.send("GET", path, Range=ranges_of(spans)) for _ in range(2)]
        replies[0].stop_reading()
        self.flush()
        quirks.ignore_range = quirks.ignore_range or chance.random() < 0.3
        replies[0].read_on()
        self.flush()
        frame = Multipart(spans, MIB, "application/octet-stream", self.digest.partition(":")[2])
        parts = b"".join(head + data[start:stop] for head, (start, stop) in zip(frame.heads, spans, strict=True))
        for reply in replies:
            self.assertEqual("whole", reply.ended, (spans, quirks))
            self.assertTrue(bytes(reply.body) == (data if reply.code == 200 else parts + frame.end), (spans, quirks))


class LeftOverPartTests(PartsTestCase):
    """
    A transfer that was killed after it had received the footer and the first bytes.
    """

    def setUp(self) -> None:
        super().setUp()
        self.standin.hold(self.digest)
        self.part(SIZE - 1000, SIZE)
        self.standin.deliver(self.digest, 1000)
        self.flush()
        self.daemon.kill()
        self.standin.release(self.digest)
        self.standin.hold(self.digest)

    def test_is_served_from_what_the_machine_has_in_memory(self) -> None:
        self.start()
        self.assertWhole(self.part(SIZE - FOOTER, SIZE), DATA[-FOOTER:], "MISS", 206)
        self.standin.release(self.digest)
        self.flush()
        self.assertTrue(self.has(self.digest))

    def test_waits_for_the_hash_if_the_machine_was_started_anew(self) -> None:
        """
        The data that the record lists may not have reached the disk then.
        """
        for boot in (b"another".ljust(16), UNKNOWN_BOOT):
            self.start()
            self.daemon.store.arriving.directory.boot = boot
            reply = self.part(SIZE - FOOTER, SIZE)
            self.assertEqual((206, 0, ""), (reply.code, len(reply.body), reply.ended))
            self.daemon.kill()
        self.start()
        self.daemon.store.arriving.directory.boot = b"another".ljust(16)
        reply = self.daemon.send("GET", self.path, Range=f"bytes=-{FOOTER}")
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA[-FOOTER:], code=206)


class UnattendedTests(RangesTestCase):
    """
    Clients that request many blobs and disconnect.
    """

    COUNT = 50

    def setUp(self) -> None:
        super().setUp()
        self.blobs = [noise(f"unattended {number}", 2 * MIB) for number in range(self.COUNT)]
        self.digests = [self.standin.push_blob("team/app", data) for data in self.blobs]
        for digest in self.digests:
            self.standin.hold(digest)

    def ask(self, digest: str) -> Reply:
        return self.get(f"/v2/team/app/blobs/{digest}")

    def open_connections(self) -> int:
        return sum(self.standin.held(digest) for digest in self.digests)

    def test_a_few_go_on_and_the_others_leave_their_files(self) -> None:
        replies = [self.ask(digest) for digest in self.digests]
        for digest in self.digests:
            self.arrive(digest, 1000)
        self.assertEqual(self.COUNT, self.open_connections())
        for reply in replies:
            reply.leave()
        self.flush()
        self.assertEqual((MOST, MOST), (self.open_connections(), len(self.daemon.pull_through.transfers())))
        self.assertEqual(self.COUNT, len(self.arriving()))
        self.standin.release(self.digests[-1])
        self.assertWhole(self.ask(self.digests[-1]), self.blobs[-1], "MISS")
        self.assertEqual((self.COUNT - 1) * 1000 + 2 * MIB, self.standin.bytes_sent)
        for digest in self.digests:
            self.standin.release(digest)
        self.flush()
        self.assertEqual(MOST + 1, sum(self.has(digest) for digest in self.digests))

    def test_those_that_trickle_stop(self) -> None:
        """
        A few bytes a second don't count as a stall, but are too few for a transfer without a reader: its file is left.
        """
        slow = self.digests[:MOST]
        for digest in slow:
            self.ask(digest).leave()
            self.flush()
        for _ in range(int(2 * SLOW_SECONDS)):
            for digest in slow:
                self.standin.deliver(digest, 1000)
            self.pass_time(1)
        self.assertEqual(0, self.open_connections())
        self.assertEqual([], self.daemon.pull_through.transfers())
        self.assertEqual(MOST, len(self.arriving()))

    def test_those_that_are_fast_or_read_go_on(self) -> None:
        large = self.standin.push_blob("team/app", noise("large", 15 * MIB))
        self.standin.hold(large)
        self.ask(large).leave()
        reader = self.ask(self.digests[0])
        for _ in range(int(3 * SLOW_SECONDS)):
            self.standin.deliver(large, SLOW // 20)
            self.standin.deliver(self.digests[0], 1000)
            self.pass_time(1)
        self.assertEqual((1, 1), (self.standin.held(large), self.standin.held(self.digests[0])))
        self.assertEqual("", reader.ended)

    def test_those_of_clients_who_left_before_the_first_byte_are_bounded_too(self) -> None:
        for digest in self.digests:
            self.daemon.send("GET", f"/v2/team/app/blobs/{digest}").leave()
            self.flush()
        self.assertLessEqual(len(self.daemon.pull_through.transfers()), MOST + 1)

    def test_those_that_were_asked_for_in_vain_are_bounded_too(self) -> None:
        """
        A failed condition, or an unsatisfiable range, begins a transfer that its client does not read.
        """
        for digest in self.digests:
            self.assertEqual(304, self.get(f"/v2/team/app/blobs/{digest}", If_None_Match=f'"{digest}"').code)
        self.assertLessEqual(len(self.daemon.pull_through.transfers()), MOST + 1)

    def test_a_client_that_comes_back_while_it_stops_begins_it_anew(self) -> None:
        others = [self.ask(digest) for digest in self.digests[:MOST]]
        for reply in others:
            reply.leave()
        self.flush()
        last = self.digests[-1]
        reply = self.ask(last)
        self.arrive(last, 1000)
        reply.leave()
        again = self.daemon.send("GET", f"/v2/team/app/blobs/{last}")
        self.standin.release(last)
        self.flush()
        self.assertWhole(again, self.blobs[-1])
        self.assertLess(self.standin.bytes_sent, 2 * MIB + 2**19)

    def test_one_that_a_client_comes_back_to_goes_on(self) -> None:
        reply = self.ask(self.digests[0])
        reply.leave()
        self.flush()
        again = self.ask(self.digests[0])
        self.assertEqual("JOINED", again.cache)
        for digest in self.digests[1 : 2 * MOST]:
            self.ask(digest).leave()
            self.flush()
        self.standin.release(self.digests[0])
        self.flush()
        self.assertWhole(again, self.blobs[0])

    def test_a_slow_disk_holds_a_bounded_number_of_bytes(self) -> None:
        """
        Fifty transfers to a disk that accepts nothing hold their common limit, and one read for each connection.
        """
        lanes = Lanes()
        lanes.buffered.most = 8 * MIB
        DaemonTestCase.start(self, lanes=lanes, in_thread=self.never_written)
        for digest in self.digests:
            self.standin.release(digest)
            self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.flush()
        self.assertLess(self.standin.bytes_sent, 8 * MIB + 4 * self.COUNT * 2**17)
        self.assertLessEqual(lanes.buffered.size, 8 * MIB + self.COUNT * 2**17)

    def never_written(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Run all calls for threads except writes, which never end.
        """
        return Deferred() if getattr(blocking, "__name__", "") == "write" else self.soon(blocking, *args)
