"""
The bytes of a blob, range by range, from any kind of bucket.
"""

from __future__ import annotations

from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.iweb import IResponse

from ecrproxy.registry.blob_range import TRICKLE, BlobRange, BlobTransfer, Watch
from ecrproxy.registry.bodies import ERROR_LIMIT, SECONDS, discard, excerpt
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.connections import IDLE_SECONDS
from ecrproxy.registry.headers import told_part
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.transfer.inflow import Buffered, Inflow
from tests.daemon import MIB, End
from tests.registry import Fault, Reply
from tests.registry_bucket import bucket_error
from tests.test_upstream import Sink, UpstreamTestCase

PART = 400
STALL_SECONDS = 30


def reason(sink: Sink) -> UnavailableError:
    """
    Return why a body ended.
    """
    (end,) = sink.ends
    assert end is not None, "it ended well"
    assert isinstance(end.value, UnavailableError)
    return end.value


class BlobTestCase(UpstreamTestCase):
    """
    A caller that fetches a blob of 1000 bytes in ranges.
    """

    def begun(self, part: int | None = PART) -> BlobSource:
        """
        Request the first range.
        """
        return self.successResultOf(self.asking(self.daemon.upstream.blob(self.blob, part)))

    def opened(self, blob: BlobSource, start: int, stop: int | None) -> BlobRange:
        """
        Request another range.
        """
        return self.successResultOf(self.asking(blob.open(start, stop)))

    def brought(self, stretch: BlobRange) -> bytes:
        """
        Deliver the bytes.
        """
        sink = Sink()
        stretch.deliver(sink)
        self.flush()
        self.assertEqual([None], sink.ends)
        return bytes(sink.got)

    def ranges(self) -> list[str]:
        """
        Return which ranges the bucket was asked for.
        """
        return [asked.headers.get("range", "") for asked in self.standin.requests("bucket")]

    def answer_to(self, question: Deferred[BlobRange], head: str, body: bytes = b"x") -> Deferred[BlobRange]:
        """
        Have the bucket send an answer that the stand-in never sends.
        """
        self.assertNoResult(question)
        _, server = self.daemon.back.ends[-1]
        server.write(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        server.loseConnection()
        self.flush()
        return question


class FirstPartTests(BlobTestCase):
    def test_of_a_bucket_that_gives_parts(self) -> None:
        """
        The first range comes alone, and tells the size of the blob.
        """
        blob = self.begun()
        self.assertEqual((1000, True, 0, PART), (blob.size, blob.ranged, blob.first.start, blob.first.stop))
        self.assertEqual(self.data[:PART], self.brought(blob.first))
        self.assertEqual(["bytes=0-399"], self.ranges())

    def test_larger_than_the_blob(self) -> None:
        """
        A blob smaller than its first range comes whole.
        """
        blob = self.begun(5000)
        self.assertEqual((1000, 1000), (blob.size, blob.first.stop))
        self.assertEqual(self.data, self.brought(blob.first))

    def test_of_a_bucket_without_parts(self) -> None:
        """
        A bucket without support for ranges sends the whole blob as the first range.
        """
        self.standin.quirks.ignore_range = True
        blob = self.begun()
        self.assertEqual((1000, False, 0, 1000), (blob.size, blob.ranged, blob.first.start, blob.first.stop))
        self.assertEqual(self.data, self.brought(blob.first))

    def test_may_be_all(self) -> None:
        """
        Without ranges no Range is sent; the bucket says that it supports them.
        """
        blob = self.begun(None)
        self.assertEqual((1000, True), (blob.size, blob.ranged))
        self.assertEqual(self.data, self.brought(blob.first))
        self.assertEqual([""], self.ranges())

    def test_of_nothing(self) -> None:
        """
        The empty blob, without a first byte to request, is requested again without a range.
        """
        self.digest = self.standin.push_blob("team/app", b"")
        blob = self.begun()
        self.assertEqual((0, True), (blob.size, blob.ranged))
        self.assertEqual(b"", self.brought(blob.first))
        self.assertEqual(["bytes=0-399", ""], self.ranges())

    def test_without_a_length(self) -> None:
        """
        The size is unknown if the answer has no length.
        """
        asking = Deferred.fromCoroutine(self.daemon.upstream.blob(self.blob, None))
        self.answer_with(b"HTTP/1.1 200 OK\r\n\r\nabc")
        blob = self.successResultOf(asking)
        self.assertEqual((None, None), (blob.size, blob.first.stop))
        self.assertEqual(b"abc", self.brought(blob.first))

    def test_that_ecr_sends_itself(self) -> None:
        """
        If ECR does not redirect, its own answer is the blob, and no other host is asked.
        """
        self.standin.fail("registry", status=200, body=self.data)
        blob = self.begun()
        self.assertEqual((1000, False), (blob.size, blob.ranged))
        self.assertEqual(self.data, self.brought(blob.first))
        self.assertEqual(0, self.standin.count("bucket"))

    def test_a_url_that_is_refused_at_the_start_is_replaced_once(self) -> None:
        for status in (400, 401, 403, 404, 410):
            for start in (0, 400):
                for times, found in ((1, True), (2, False)):
                    self.standin.forget_asked()
                    self.standin.fail("bucket", status=status, body=b"<Error/>", times=times)
                    beginning = self.asking(self.daemon.upstream.blob(self.blob, 700, start))
                    if found:
                        self.assertEqual(self.data[start:700], self.brought(self.successResultOf(beginning).first))
                    else:
                        problem = self.failureResultOf(beginning, UnavailableError).value
                        self.assertIn(f"answers {status}", problem.message)
                    self.assertEqual((2, 2), (self.standin.count("registry"), self.standin.count("bucket")))

    def test_another_status_is_asked_once(self) -> None:
        self.standin.fail("bucket", status=501, body=b"<Error/>")
        self.assertUnavailable(502, "answers 501", self.daemon.upstream.blob(self.blob, PART))
        self.assertEqual((1, 1), (self.standin.count("registry"), self.standin.count("bucket")))


class LaterPartTests(BlobTestCase):
    def test_is_asked_of_the_same_place(self) -> None:
        """
        A later range is requested from the URL that ECR gave for the first, without asking ECR.
        """
        blob = self.begun()
        self.assertEqual(self.data[400:700], self.brought(self.opened(blob, 400, 700)))
        self.assertEqual(self.data[700:], self.brought(self.opened(blob, 700, None)))
        self.assertEqual(["bytes=0-399", "bytes=400-699", "bytes=700-"], self.ranges())
        self.assertEqual(1, self.standin.count("registry"))
        self.assertEqual(1, len({asked.target for asked in self.standin.requests("bucket")}))

    def test_of_a_bucket_that_gives_parts_no_more(self) -> None:
        """
        If a bucket sends everything from the first byte on, the bytes before the range are skipped.
        """
        blob = self.begun()
        self.standin.quirks.ignore_range = True
        stretch = self.opened(blob, 400, 700)
        self.assertEqual((400, 1000), (stretch.start, stretch.stop))
        self.assertEqual(self.data[400:], self.brought(stretch))

    def test_what_is_skipped_may_come_in_any_pieces(self) -> None:
        """
        Skipped and wanted bytes may come in one piece, or end with one.
        """
        for ends in ([1000], [400, 1000], [100, 400, 401, 1000], [399, 999, 1000], list(range(1, 1001))):
            sink = Sink()
            transfer = BlobTransfer(sink, Watch(self.clock, STALL_SECONDS, "bucket"), skip=400)
            for start, stop in zip([0, *ends], ends, strict=False):
                transfer.dataReceived(self.data[start:stop])
            self.assertEqual(self.data[400:], bytes(sink.got))

    def test_is_asked_for_anew_where_the_url_has_expired(self) -> None:
        """
        If a long transfer outlives its URL, ECR is asked for another one, and the range comes from there.
        """
        blob = self.begun()
        self.standin.expire_urls()
        self.assertEqual(self.data[400:700], self.brought(self.opened(blob, 400, 700)))
        self.assertEqual((2, 3), (self.standin.count("registry"), self.standin.count("bucket")))
        self.assertEqual(self.data[700:], self.brought(self.opened(blob, 700, 1000)))
        self.assertEqual((2, 4), (self.standin.count("registry"), self.standin.count("bucket")))

    def test_is_asked_for_anew_once(self) -> None:
        """
        A rejected URL is replaced once for the range; if that is rejected, too, the range fails.
        """
        blob = self.begun()
        for status in (400, 401, 403, 404, 410):
            for times, found in ((1, True), (2, False)):
                self.standin.forget_asked()
                self.standin.fail("bucket", status=status, body=b"<Error/>", times=times)
                opening = self.asking(blob.open(400, 700))
                if found:
                    self.assertEqual(self.data[400:700], self.brought(self.successResultOf(opening)))
                else:
                    self.assertEqual(502, self.failureResultOf(opening, UnavailableError).value.status)
                self.assertEqual((1, 2), (self.standin.count("registry"), self.standin.count("bucket")))

    def test_of_a_bucket_in_trouble_fails(self) -> None:
        """
        Another URL does not help if the bucket fails: ECR isn't asked again; the bucket is, where that may help.
        """
        blob = self.begun()
        self.brought(blob.first)
        wires = len(self.daemon.back.ends)
        for status, told, tries in ((416, 502, 1), (429, 429, 3), (500, 502, 3), (503, 503, 3)):
            self.standin.forget_asked()
            fault = self.standin.fail("bucket", status=status, body=b"<Error/>")
            self.assertUnavailable(told, "s3.eu-west-1.amazonaws.com", blob.open(400, 700))
            self.assertEqual((0, tries), (self.standin.count("registry"), self.standin.count("bucket")))
            fault.remove()
        # One request more, since the next attempt does not wait for the end of an error page.
        self.assertEqual(
            wires + 1, len(self.daemon.back.ends), "a connection was left with an answer that nobody reads"
        )

    def test_may_come_from_ecr_itself_at_last(self) -> None:
        """
        If ECR, asked again, sends the blob itself, the range is cut from that.
        """
        blob = self.begun()
        self.standin.expire_urls()
        self.standin.fail("registry", status=200, body=self.data, times=1)
        self.assertEqual(self.data[400:], self.brought(self.opened(blob, 400, 700)))

    def test_of_what_ecr_has_no_more(self) -> None:
        """
        If ECR, asked again, no longer has the blob, the range fails with its answer.
        """
        blob = self.begun()
        self.standin.expire_urls()
        self.standin.delete_blob("team/app", self.digest)
        self.assertEqual(404, self.refused(blob.open(400, 700)).status)

    def test_of_another_whole_fails(self) -> None:
        """
        A blob that changed its size upstream is not assembled from both.
        """
        blob = self.begun()
        for head in ("206 OK\r\nContent-Range: bytes 400-699/1001", "200 OK"):
            self.standin.hang("bucket", times=1)
            opening = self.answer_to(self.asking(blob.open(400, 700)), head, bytes(300))
            self.assertIn("changed its size", self.failureResultOf(opening, UnavailableError).value.message)
        self.assertEqual(self.data[400:700], self.brought(self.opened(blob, 400, 700)))

    def test_that_is_another_part_fails(self) -> None:
        """
        Bytes of another range, or without Content-Range, are not taken for the requested ones.
        """
        blob = self.begun()
        for span in (
            "bytes 0-299/1000",
            "bytes 401-700/1000",
            "bytes 400-699/*",
            "bytes 400-/1000",
            "bytes=400-699/1000",
            "400-699/1000",
            "",
            "bytes 400-699/1000000000000000000000",
            "bytes 400-399/1000",
            "bytes 400-64/1000",
            "bytes 400-700/1000",
            "bytes 400-999/1000",
            "bytes 400-699/699",
            "bytes 400-699/0",
            "bytes 400-699/-1000",
            "bytes 4_00-6_99/1_000",
            "bytes 400-699/" + "1" * 5000,
        ):
            self.standin.hang("bucket", times=1)
            head = f"206 Partial Content\r\nContent-Range: {span}"
            opening = self.answer_to(self.asking(blob.open(400, 700)), head, bytes(300))
            self.assertEqual(502, self.failureResultOf(opening, UnavailableError).value.status, span)

    def test_may_be_shorter_than_asked_for(self) -> None:
        """
        A bucket may send less: the stretch says where it ends.
        """
        blob = self.begun()
        self.standin.hang("bucket", times=1)
        head = "206 Partial Content\r\nContent-Range: bytes 400-499/1000"
        opening = self.answer_to(self.asking(blob.open(400, 700)), head, self.data[400:500])
        stretch = self.successResultOf(opening)
        self.assertEqual((400, 500), (stretch.start, stretch.stop))
        self.assertEqual(self.data[400:500], self.brought(stretch))

    def test_that_breaks_off(self) -> None:
        """
        The bytes before the break are delivered, with the reason for it.
        """
        blob = self.begun()
        self.standin.break_off(100)
        sink = Sink()
        self.opened(blob, 400, 700).deliver(sink)
        self.flush()
        self.assertEqual(self.data[400:500], bytes(sink.got))
        self.assertIn("broke off", reason(sink).message)

    def test_that_nobody_wants(self) -> None:
        """
        A large range that is dropped is not read to its end.
        """
        self.digest = self.standin.push_blob("team/app", bytes(8 * MIB))
        blob = self.begun(PART)
        self.opened(blob, PART, None).drop()
        self.flush()
        self.assertLess(self.standin.bytes_sent, 2 * MIB)


class BegunTests(BlobTestCase):
    """
    A body whose first bytes arrive before it has a reader.
    """

    def test_is_paused_at_its_first_bytes_while_too_many_wait(self) -> None:
        """
        When the memory for bytes that wait for disks is full, not a byte more is accepted until that changes.
        """
        self.digest = self.standin.push_blob("team/app", bytes(8 * MIB))
        first = self.begun(None).first
        self.assertTrue(self.successResultOf(self.asking(first.begin())))
        inflow = Inflow(Buffered(0))
        inflow.begin(first)
        self.pass_time(1)
        self.flush()
        self.assertLess(inflow.waiting, MIB)
        size = 0
        while batch := self.successResultOf(self.asking(inflow.batch())):
            size += sum(map(len, batch))
        self.assertEqual(8 * MIB, size)


class SilenceTests(BlobTestCase):
    """
    A body that stalls.
    """

    def setUp(self) -> None:
        super().setUp()
        self.standin.hold(self.digest)
        self.sink = Sink()
        self.transfer = self.begun(None).first.deliver(self.sink)
        self.flush()

    def wire(self) -> End:
        """
        Return the daemon's end of the connection to the bucket.
        """
        return self.daemon.back.ends[-1][0]

    def assertStalled(self) -> None:
        self.assertEqual(504, reason(self.sink).status)
        self.assertIn("nothing for 30 s", reason(self.sink).message)

    def test_of_half_a_minute_ends_it(self) -> None:
        """
        After 30 seconds without a byte the connection is closed, with that reason.
        """
        self.pass_time(STALL_SECONDS - 1)
        self.assertEqual(([], True), (self.sink.ends, self.wire().connected))
        wire = self.wire()
        self.pass_time(1)
        self.assertStalled()
        self.assertFalse(wire.connected)

    def test_is_as_long_as_the_operator_says(self) -> None:
        """
        PROXY_STALL_SECONDS sets how long a bucket may be silent.
        """
        self.daemon.upstream.stall_seconds = 5
        sink = Sink()
        self.begun(None).first.deliver(sink)
        self.pass_time(4)
        self.assertEqual([], sink.ends)
        self.pass_time(1)
        self.assertIn("nothing for 5 s", reason(sink).message)

    def test_ends_with_each_kilobyte(self) -> None:
        self.digest = self.standin.push_blob("team/app", bytes(16 * TRICKLE))
        self.standin.hold(self.digest)
        self.sink = Sink()
        self.begun(None).first.deliver(self.sink)
        for _ in range(5):
            self.pass_time(STALL_SECONDS - 1)
            self.standin.deliver(self.digest, TRICKLE)
            self.flush()
        self.assertEqual((5 * TRICKLE, []), (len(self.sink.got), self.sink.ends))
        self.pass_time(STALL_SECONDS)
        self.assertStalled()

    def test_broken_by_a_byte_now_and_then_is_silence(self) -> None:
        for _ in range(5):
            self.pass_time(5)
            self.standin.deliver(self.digest, 1)
            self.flush()
        self.assertEqual((5, []), (len(self.sink.got), self.sink.ends))
        self.pass_time(5)
        self.assertEqual(504, reason(self.sink).status)
        self.assertIn("no more than 5 bytes for 30 s", reason(self.sink).message)

    def test_that_we_asked_for_is_none(self) -> None:
        """
        No bytes are expected during a pause; the 30 seconds begin when it is resumed.
        """
        self.transfer.pause()
        self.pass_time(10 * STALL_SECONDS)
        self.assertEqual([], self.sink.ends)
        self.transfer.resume()
        self.pass_time(STALL_SECONDS - 1)
        self.assertEqual([], self.sink.ends)
        self.pass_time(1)
        self.assertStalled()

    def test_paused_brings_nothing(self) -> None:
        """
        Bytes that arrive during a pause wait in the network until it is resumed.
        """
        self.transfer.pause()
        self.standin.release(self.digest)
        self.flush()
        self.assertEqual((b"", []), (bytes(self.sink.got), self.sink.ends))
        self.transfer.resume()
        self.flush()
        self.assertEqual((self.data, [None]), (bytes(self.sink.got), self.sink.ends))

    def test_may_be_resumed_twice(self) -> None:
        """
        Resuming twice leaves no second timer that would end it later.
        """
        timers = len(self.clock.getDelayedCalls())
        self.transfer.resume()
        self.transfer.resume()
        self.assertEqual(timers, len(self.clock.getDelayedCalls()))

    def test_does_not_follow_the_end(self) -> None:
        """
        A body that was dropped has stopped for that reason, and leaves no timer.
        """
        timers = len(self.clock.getDelayedCalls())
        self.transfer.abort()
        self.assertEqual(timers - 1, len(self.clock.getDelayedCalls()))
        self.pass_time(2 * STALL_SECONDS)
        self.assertEqual(502, reason(self.sink).status)

    def test_is_not_watched_for_after_the_end(self) -> None:
        """
        A body that has ended leaves no timer.
        """
        clock = Clock()
        transfer = BlobTransfer(self.sink, Watch(clock, STALL_SECONDS, "bucket"))
        transfer.makeConnection(StringTransport())
        self.assertEqual(1, len(clock.getDelayedCalls()))
        transfer.connectionLost(Failure(ResponseDone()))
        self.assertEqual(([], [None]), (clock.getDelayedCalls(), self.sink.ends))

    def test_says_nothing_of_its_sender_if_it_was_left_before_it_brought_anything(self) -> None:
        """
        Otherwise a bucket that had stalled before would be trusted again once another was quicker.
        """
        for left, size, said in ((True, 10, []), (False, 10, [True]), (True, TRICKLE, [False])):
            told = list[bool]()
            watch = Watch(self.clock, STALL_SECONDS, "bucket", lambda told=told, *, barren: told.append(barren))
            transfer = BlobTransfer(self.sink, watch)
            transfer.makeConnection(StringTransport())
            transfer.dataReceived(bytes(size))
            if left:
                transfer.abort()
            transfer.connectionLost(Failure(ConnectionLost()))
            self.assertEqual(said, told)


class ToldPartTests(SynchronousTestCase):
    def test_is_what_was_asked_for_or_the_start_of_it(self) -> None:
        self.assertEqual((700, 1000), told_part("bytes 400-699/1000", 400, 700))
        self.assertEqual((401, 1000), told_part("bytes 400-400/1000", 400, 700))
        self.assertEqual((1000, 1000), told_part("bytes 400-999/1000", 400, None))
        self.assertEqual((1, 1), told_part("bytes 0-0/1", 0, 5000))


class FalseResponse:
    def __init__(self) -> None:
        self.transport = StringTransport()

    def deliverBody(self, protocol: Protocol) -> None:
        self.body = protocol
        protocol.makeConnection(self.transport)


class UnwantedBodyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.response = Clock(), FalseResponse()
        self.answer = cast("IResponse", self.response)

    def test_may_be_short(self) -> None:
        discard(self.answer, self.clock)
        self.response.body.dataReceived(bytes(ERROR_LIMIT))
        self.assertFalse(self.response.transport.disconnecting)
        self.response.body.connectionLost(Failure(ResponseDone()))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_is_not_read_beyond_its_bytes(self) -> None:
        discard(self.answer, self.clock)
        self.response.body.dataReceived(bytes(ERROR_LIMIT + 1))
        self.assertTrue(self.response.transport.disconnecting)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_is_not_waited_for_beyond_its_seconds(self) -> None:
        discard(self.answer, self.clock)
        self.clock.advance(SECONDS - 0.1)
        self.response.body.dataReceived(b"x")
        self.assertFalse(self.response.transport.disconnecting)
        self.clock.advance(0.1)
        self.assertTrue(self.response.transport.disconnecting)

    def test_has_a_start_that_can_be_read(self) -> None:
        for end in (
            lambda: self.response.body.connectionLost(Failure(ResponseDone())),
            lambda: self.response.body.connectionLost(Failure(ConnectionLost())),
            lambda: self.clock.advance(SECONDS),
            lambda: self.response.body.dataReceived(bytes(ERROR_LIMIT)),
        ):
            reading = excerpt(self.answer, self.clock)
            self.response.body.dataReceived(b"ab")
            self.response.body.dataReceived(b"c")
            self.assertNoResult(reading)
            end()
            text = self.successResultOf(reading)
            self.assertEqual(b"abc", text[:3])
            self.assertLessEqual(len(text), ERROR_LIMIT)
            self.response.body.connectionLost(Failure(ConnectionLost()))

    def test_is_closed_when_its_reader_leaves(self) -> None:
        reading = excerpt(self.answer, self.clock)
        reading.cancel()
        self.assertEqual(b"", self.successResultOf(reading))
        self.assertTrue(self.response.transport.disconnecting)


class UnwantedConnectionTests(BlobTestCase):
    """
    Connections with answers whose bodies nobody wants.
    """

    def test_of_a_short_error_serves_the_next_request(self) -> None:
        blob = self.begun()
        self.brought(blob.first)
        wires = len(self.daemon.back.ends)
        self.standin.fail("bucket", status=403, body=bytes(ERROR_LIMIT), times=1)
        self.opened(blob, 400, 700)
        self.assertEqual(wires, len(self.daemon.back.ends))

    def test_is_closed_where_the_body_never_comes(self) -> None:
        head = "HTTP/1.1 {} X\r\nLocation: {}\r\nContent-Encoding: {}\r\nContent-Length: 9\r\n\r\n"
        for service in ("registry", "bucket"):
            for status, encoding in ((307, "identity"), (403, "identity"), (503, "identity"), (200, "br")):
                self.standin.fault(Fault(service, times=1))
                asking = self.asking(self.daemon.upstream.blob(self.blob, 1))
                asking.addCallbacks(lambda blob: blob.first.drop(), lambda failure: failure.trap(UnavailableError))
                _, server = self.daemon.back.ends[-1]
                server.write(head.format(status, f"{self.standin.bucket}/x", encoding).encode())
                self.flush()
                self.pass_time(60 + IDLE_SECONDS)
                self.assertEqual([], self.daemon.back.ends, (service, status))


class WordsTests(BlobTestCase):
    """
    A bucket's error messages.
    """

    KMS = bucket_error(
        400, "KMS.DisabledException", "arn:aws:kms:eu-west-1:123456789012:key/1234 is disabled &amp; &quot;asleep&quot;"
    )
    POLICY = bucket_error(
        403,
        "AccessDenied",
        'User: arn:aws:sts::1:assumed-role/x is not authorized to perform: s3:GetObject on "arn:aws:s3:::prod-x-y"'
        " because no VPC endpoint policy allows the s3:GetObject action",
    )
    SKEW = bucket_error(
        403, "RequestTimeTooSkewed", "The difference between the request time and the time is too large."
    )

    def refuse(self, reply: Reply) -> UnavailableError:
        """
        Have the bucket reject the request with this answer; return the outcome.
        """
        self.standin.heal()
        self.standin.fault(Fault("bucket", reply=reply))
        problem = self.refused(self.daemon.upstream.blob(self.blob, PART))
        assert isinstance(problem, UnavailableError)
        return problem

    def test_reach_the_log_and_the_client(self) -> None:
        for reply, code, words in (
            (self.KMS, "KMS.DisabledException", 'is disabled & "asleep"'),
            (self.POLICY, "AccessDenied", "no VPC endpoint policy allows the s3:GetObject action"),
            (self.SKEW, "RequestTimeTooSkewed", "too large"),
        ):
            self.events.clear()
            told = self.refuse(reply).message
            (logged,) = [event for event in self.events if event["log_level"] is LogLevel.error]
            for text in (told, formatEvent(logged)):
                self.assertIn(f"answers {reply.status} instead of {self.digest}: {code}: ", text)
                self.assertIn(words, text)
            self.assertEqual(("prod-eu-west-1-starport-layer-bucket.s3.eu-west-1.amazonaws.com", code), logged["once"])
            client = self.get(f"/v2/team/app/blobs/{self.digest}")
            self.assertRefused(client, 502, "UNAVAILABLE", words)

    def test_are_not_repeated_where_they_repeat_the_request(self) -> None:
        self.fetched()
        url = f"{self.standin.bucket}{self.standin.requests('bucket')[0].target}"
        signature = self.standin.urls.signatures()[0]
        for message in (
            f"The request {url} is wrong",
            f"X-Amz-Signature={signature} is wrong",
            f"see {url.replace('://', '&#58;//')} is wrong",
            f"X-Amz-Security-Token of {url.partition('?')[2].replace('&', '&amp;')} is wrong",
        ):
            told = self.refuse(bucket_error(403, "SignatureDoesNotMatch", message)).message
            self.assertIn("SignatureDoesNotMatch: ", told)
            self.assertTrue(told.endswith("is wrong"), told)
            self.assertNotIn(signature, told)
            self.assertNotIn("Amz", told)

    def test_may_be_anything(self) -> None:
        entities = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
        for body, expected in (
            (b"", ""),
            (b"<html>no</html>", ""),
            (b"<Error><Code></Code></Error>", ""),
            (b"<Error><Code>X</Code></Error>", "X"),
            (b"<Error><Code>X</Code><Message></Message></Error>", "X"),
            (b"<Error><Code>X</Code><Message>a\r\n\x1b[31m\xff b</Message>", "X: a [31m\ufffd b"),
            (b"<Error><Code>a b</Code></Error>", ""),
            (entities + b"<Error><Code>X</Code><Message>&b;</Message></Error>", "X: &b;"),
            (b"<Error><Code>X</Code><Message>" + b"y" * 1000 + b"</Message>", "X: [...]"),
            (b"<Error><Code>X</Code><Message>" + b"y " * 900 + b"</Message>", "X: " + "y " * 150),
            (b"<Code>" * 10_000, ""),
            (b"<Message>" * 10_000, ""),
            (b"<Code>" + b"x" * 60_000, ""),
            (b"x" * 20_000 + b"<Code>X</Code>", ""),
        ):
            self.assertEqual(expected, said_by_bucket(body), body[:60])

    def test_that_do_not_come_to_an_end_are_not_waited_for(self) -> None:
        self.standin.hang("bucket", times=2)
        asking = self.asking(self.daemon.upstream.blob(self.blob, PART))
        for _ in range(2):
            _, server = self.daemon.back.ends[-1]
            server.write(b"HTTP/1.1 403 X\r\nContent-Length: 900\r\n\r\n<Error><Code>AccessDenied</Code><Message>")
            self.flush()
        self.pass_time(SECONDS)
        self.assertIn("answers 403", self.failureResultOf(asking, UnavailableError).value.message)
        self.pass_time(1)
        self.assertFalse([client for client, _ in self.daemon.back.ends[1:] if client.connected])
