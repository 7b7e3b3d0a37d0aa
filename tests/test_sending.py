"""
Sending to clients: at their pace, in pieces or by the kernel, and never looking complete when it isn't.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import HTTPChannel

from ecrproxy.access.limits import Limits, Patience
from ecrproxy.answers import Asked
from ecrproxy.oci import Digest, parse_route
from ecrproxy.threads import Disk
from ecrproxy.transfer import slot_sending
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.piece_sending import PieceSending
from ecrproxy.transfer.response_body import LEAST_PIECE, PIECE
from ecrproxy.transfer.sending import TOGETHER, piece_size, send
from ecrproxy.transfer.slot_sending import KernelSending
from ecrproxy.transfer.sources import FilePiece, Held
from tests.daemon import BUFFER, MIB, Daemon, DaemonTestCase, End, Hands, Raw, at_once, noise
from tests.registry_content import OCI_MANIFEST
from tests.store_contract import being_read
from tests.test_download import Source as BucketSource


class PieceTests(DaemonTestCase):
    """
    Through memory, over a wire that can be slow.
    """

    def setUp(self) -> None:
        super().setUp()
        self.hands = Hands()
        self.start(in_thread=self.hands)
        self.data = noise("x", 5 * MIB)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def readings(self) -> list[int]:
        """
        Record the size of each piece that is read from a file from now on.
        """
        sizes: list[int] = []
        read = os.pread

        def noting(fd: int, count: int, offset: int) -> bytes:
            sizes.append(count)
            return read(fd, count, offset)

        self.patch(os, "pread", noting)
        return sizes

    def test_a_client_that_does_not_read_costs_one_piece(self) -> None:
        """
        However large a blob, at most one piece of it is held for a client that doesn't read.
        """
        self.get(self.path)
        sizes = self.readings()
        reply = self.daemon.send("GET", self.path)
        reply.stop_reading()
        self.flush()
        self.assertLessEqual(sum(sizes), PIECE)
        self.assertLessEqual(reply.wire.peer.waiting, PIECE + BUFFER)
        self.assertEqual("", reply.ended)
        reply.read_on()
        self.flush()
        self.assertWhole(reply, self.data, "HIT")

    def test_files_are_read_in_large_pieces(self) -> None:
        """
        Each byte is read once, a MiB at a time.
        """
        self.get(self.path)
        sizes = self.readings()
        self.get(self.path)
        self.assertEqual([PIECE] * 5, sizes)

    def test_a_crowd_that_does_not_read_shares_a_bound(self) -> None:
        """
        The more responses are in flight, the less of each is held.
        """
        self.get(self.path)
        self.daemon.crowd.transferring += 255
        sizes = self.readings()
        reply = self.daemon.send("GET", self.path)
        reply.stop_reading()
        self.flush()
        self.assertEqual([TOGETHER // 256], sizes)
        reply.read_on()
        self.flush()
        self.assertWhole(reply, self.data, "HIT")
        self.daemon.crowd.transferring -= 255

    def test_a_large_manifest_is_sent_from_its_file_in_small_pieces(self) -> None:
        """
        Of a cached manifest of up to 4 MiB, a client that does not read holds no more than of a small one.
        """
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "text": "x" * 3 * MIB}).encode()
        digest = self.standin.push_manifest("team/app", manifest, OCI_MANIFEST, "large")
        paths = [f"/v2/team/app/manifests/{reference}" for reference in (digest, "large")]
        for path in paths:
            self.get(path)
        sizes = self.readings()
        for path in paths:
            reply = self.daemon.send("GET", path)
            reply.stop_reading()
            self.flush()
            self.assertLessEqual(reply.wire.peer.waiting, 2 * BUFFER)
            reply.read_on()
            self.flush()
            self.assertWhole(reply, manifest)
        self.assertEqual((LEAST_PIECE, 2 * len(manifest)), (max(sizes), sum(sizes)))

    def test_a_large_list_is_sent_in_small_pieces(self) -> None:
        """
        Of a list of tags, which may be megabytes, a client that does not read holds no more than of anything else.
        """
        self.standin.push_image("team/tags", *(f"{number:0>100}" for number in range(900)))
        path = "/v2/team/tags/tags/list"
        self.assertGreater(len(self.get(path).body), LEAST_PIECE)
        reply = self.daemon.send("GET", path)
        reply.stop_reading()
        self.flush()
        self.assertLessEqual(reply.wire.peer.waiting, LEAST_PIECE + 2000)
        reply.read_on()
        self.flush()
        self.assertEqual((reply.length, "whole"), (len(reply.body), reply.ended))
        self.assertEqual(reply.length, self.daemon.ask("HEAD", path).length)

    def test_clients_that_do_not_read_share_what_they_are_sent(self) -> None:
        """
        Identical answers from ECR are in memory once.
        """
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "text": "x" * MIB}).encode()
        digest = self.standin.push_manifest("team/app", manifest, OCI_MANIFEST, "large")
        self.standin.push_image("team/tags", *(f"{number:0>100}" for number in range(900)))
        self.start(limit=1000)  # too small to cache anything
        manifests, pages = list[Any](), list[Any]()
        for reference in (digest, "large", digest):
            asked = Asked(parse_route(f"/v2/team/app/manifests/{reference}", self.daemon.registry), "key")
            Deferred.fromCoroutine(self.daemon.pull_through.manifest(asked)).addCallback(manifests.append)
            page = self.daemon.pull_through.page(parse_route("/v2/team/tags/tags/list", self.daemon.registry))
            Deferred.fromCoroutine(page).addCallback(pages.append)
            self.flush()
        self.assertEqual((3, 3), (len(manifests), len(pages)))
        self.assertEqual(1, len({id(answer.body) for answer in manifests}))
        self.assertEqual(1, len({id(page.body) for _, _, page in pages}))

    def test_waiting_costs_nothing(self) -> None:
        """
        A client that has caught up with a transfer costs no reads until there is more.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.arrive(self.digest, 1000)
        self.assertEqual(1000, len(reply.body))
        sizes = self.readings()
        self.pass_time(20)
        self.assertEqual([], sizes)

    def test_headers_do_not_wait_for_the_first_byte(self) -> None:
        """
        The headers leave as soon as the bucket has answered: clients time out without them.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.assertEqual((200, len(self.data), b""), (reply.code, reply.length, bytes(reply.body)))

    def test_a_file_that_is_cut_meanwhile_aborts(self) -> None:
        """
        A cached file that is truncated while it is being sent ends the connection, not the answer.
        """
        self.get(self.path)
        client, wire = self.kept_connection()
        wire.reading = False
        self.flush()
        os.truncate(self.file_of(self.digest), 2 * MIB)
        wire.reading = True
        self.flush()
        self.assertTrue(client.closed)
        self.assertLess(len(client.got), 3 * MIB)
        self.assertFalse(self.has(self.digest))

    def test_a_disk_that_fails_meanwhile_aborts(self) -> None:
        """
        A read that fails in the middle ends the connection, not the answer.
        """
        self.get(self.path)
        reply = self.daemon.send("GET", self.path)
        reply.stop_reading()
        self.flush()

        def failing(fd: int, count: int, offset: int) -> bytes:
            raise OSError(5, "Input/output error")

        self.patch(os, "pread", failing)
        reply.read_on()
        self.flush()
        self.assertBroken(reply, self.data)
        self.flushLoggedErrors()

    def test_who_leaves_while_a_thread_reads(self) -> None:
        """
        A client may disconnect while a thread reads for it: the file stays open for the thread, and is closed
        afterwards.
        """
        for fails in (False, True):
            self.get(self.path)
            reply = self.daemon.send("GET", self.path)
            self.hands.idle = False
            self.flush()
            while "pread" not in str(self.hands.waiting[0][1]):
                self.hands.work()
                self.flush()
            reply.leave()
            self.flush()
            (_, _, arguments) = self.hands.waiting[0]
            os.fstat(arguments[0])  # still open
            if fails:
                self.patch(os, "fstat", os.fstat)
                done, _, _ = self.hands.waiting.popleft()
                done.errback(OSError(5, "Input/output error"))
            self.hands.idle = True
            self.hands.work_off()
            self.flush()
            self.assertEqual(set(), being_read(self.daemon.store))
            self.flushLoggedErrors(OSError)

    def test_nothing_is_read_for_who_has_left(self) -> None:
        """
        On a slow disk hundreds of reads wait for a thread: unwanted ones would delay the others.
        """
        self.get(self.path)
        sizes = self.readings()
        self.hands.idle = False
        reply = self.daemon.send("GET", self.path)
        self.flush()
        while not being_read(self.daemon.store):
            self.hands.work()
            self.flush()
        self.assertEqual(1, len(self.hands.waiting))
        reply.leave()
        self.flush()
        self.hands.work_off()
        self.flush()
        self.assertEqual(([], set()), (sizes, being_read(self.daemon.store)))

    def test_the_connection_stays_of_use(self) -> None:
        """
        After a body sent in pieces, slowly or not, the next request on the connection is answered.
        """
        line = f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        got = self.daemon.raw(line + line + b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual((2, 3), (got.count(self.data), got.count(b"HTTP/1.1 200 OK\r\n")))
        self.assertTrue(got.endswith(b"{}\n"))

    def kept_connection(self) -> tuple[Raw, End]:
        """
        Request the blob on a keep-alive connection.
        """
        client = Raw()
        wire = self.daemon.front.connect(client, "proxy.example", 80, secure=False)
        wire.write(f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return client, wire

    def test_a_slow_client_is_not_timed_out(self) -> None:
        """
        A client that takes minutes for its last piece gets it: the idle timeout does not apply to answers.
        """
        self.get(self.path)
        client, wire = self.kept_connection()
        while len(client.got) < 4.5 * MIB:  # the last piece is in flight
            self.daemon.front.move()
        wire.reading = False
        self.pass_time(299)
        self.assertEqual((True, False), (wire.connected, client.closed))
        wire.reading = True
        self.flush()
        self.assertTrue(client.got.endswith(self.data))

    def test_a_client_that_takes_nothing_is_given_up(self) -> None:
        """
        After 300 seconds without reading its connection is closed, and what it was being sent is released.
        """
        self.get(self.path)
        client, wire = self.kept_connection()
        while len(client.got) < 3 * MIB:
            self.daemon.front.move()
        wire.reading = False
        self.pass_time(301)
        wire.reading = True
        self.flush()
        self.assertEqual((True, 1), (client.closed, self.daemon.crowd.slow_readers))
        self.assertLess(len(client.got), len(self.data))
        self.assertEqual((0, 0), (self.daemon.crowd.transferring, self.daemon.crowd.connected))

    def test_a_client_that_waits_for_ecr_is_not_slow(self) -> None:
        """
        A client that has read everything so far waits as long as needed: it is not the client that is slow.
        """
        self.start(limits=Limits(send_seconds=5))
        self.standin.quirks.latency = 20
        digest = self.standin.push_blob("team/app", b"late")
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.pass_time(61)
        self.assertWhole(reply, b"late")
        self.assertEqual(0, self.daemon.crowd.slow_readers)


class Request:
    """
    The part of a request that a sending uses.
    """

    startedWriting, chunked = True, False

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.sentLength = 0
        self.got = bytearray()
        self.producer: Any = None

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        self.got += data


class Channel:
    """
    The part of a channel that a sending uses.
    """

    def __init__(self, transport: Any) -> None:
        self.transport, self.patience = transport, Patience(Clock().callLater, 0, lambda: None)


class Slow:
    """
    A source that grows when told to.
    """

    def __init__(self) -> None:
        self.data, self.position, self.done = b"", 0, False
        self.failure: Failure | None = None
        self.news: Callable[[], None] = lambda: None
        self.closed = 0

    def piece(self, limit: int) -> FilePiece | bytes | None:
        return self.data[self.position : self.position + limit] or None

    def sent(self, count: int) -> None:
        self.position += count

    def listen(self, news: Callable[[], None]) -> None:
        self.news = news

    def close(self) -> None:
        self.closed += 1


class SendTests(SynchronousTestCase):
    """
    One sending, without a daemon.
    """

    def setUp(self) -> None:
        self.request, self.source = Request(Channel(object())), Slow()
        self.sending = send(cast(Any, self.request), self.source, Hands())

    def grow(self, data: bytes) -> None:
        self.source.data += data
        self.source.news()

    def test_follows_the_news(self) -> None:
        """
        New data is sent at once, and the end is reported when the source is done.
        """
        for data in (b"ab", b"cd"):
            self.grow(data)
        self.assertEqual(b"abcd", bytes(self.request.got))
        self.assertNoResult(self.sending)
        self.source.done = True
        self.source.news()
        self.assertIsNone(self.successResultOf(self.sending))
        self.assertEqual((1, None), (self.source.closed, self.request.producer))

    def test_waits_while_paused(self) -> None:
        """
        New data during a pause has no effect until the client reads.
        """
        self.request.producer.pauseProducing()
        self.grow(b"abc")
        self.assertEqual(b"", bytes(self.request.got))
        self.request.producer.resumeProducing()
        self.assertEqual(b"abc", bytes(self.request.got))

    def test_news_overtake_nothing(self) -> None:
        """
        New data that arrives while a piece is being written comes after it.
        """
        sent = self.source.sent

        def sent_and_more(count: int) -> None:
            sent(count)
            if len(self.source.data) < 4:
                self.grow(b"%d" % len(self.source.data))

        self.source.sent = sent_and_more  # type: ignore[method-assign]
        self.grow(b"0")
        self.assertEqual(b"0123", bytes(self.request.got))

    def test_a_transfer_that_ends_while_its_client_rests(self) -> None:
        """
        The last byte of an uncached transfer comes last, also if verification ends while its client reads on.
        """
        data = noise("x", 3 * MIB)
        hands = Hands()
        download = Download(Digest.of(data), len(data), None, Disk.of(hands))
        bucket = BucketSource(len(data), len(data))
        Deferred.fromCoroutine(download.run(bucket))
        request = Request(Channel(object()))
        sending = send(cast(Any, request), download.follow(0, len(data)), hands)
        request.producer.pauseProducing()
        hands.idle = False
        for start in range(0, len(data), BUFFER):
            bucket.first.arrived(data[start : start + BUFFER])
        bucket.first.ended(None)
        hands.work_off()
        request.producer.resumeProducing()
        hands.work_off()
        self.assertIsNone(self.successResultOf(sending))
        self.assertTrue(data == bytes(request.got), "other bytes, or in another order")

    def test_fails_with_its_source(self) -> None:
        """
        A source that fails ends the sending with its reason.
        """
        self.grow(b"ab")
        self.source.failure = Failure(ZeroDivisionError())
        self.source.news()
        self.failureResultOf(self.sending, ZeroDivisionError)
        self.assertEqual((1, None), (self.source.closed, self.request.producer))

    def test_ends_when_the_client_leaves(self) -> None:
        """
        A client that disconnects ends the sending, once, and later notifications are ignored.
        """
        producer = self.request.producer
        self.request.channel = None
        producer.stopProducing()
        producer.stopProducing()
        self.grow(b"ab")
        producer.resumeProducing()
        self.failureResultOf(self.sending, ConnectionDone)
        self.assertEqual((1, b""), (self.source.closed, bytes(self.request.got)))

    def test_ends_when_it_is_cancelled(self) -> None:
        """
        Cancelling the sending releases its source.
        """
        self.sending.cancel()
        self.failureResultOf(self.sending, ConnectionDone, CancelledError)
        self.assertEqual((1, None), (self.source.closed, self.request.producer))

    def test_way_is_chosen_by_what_is_beneath(self) -> None:
        """
        The kernel sends to plain sockets with a known length; over TLS, in chunks and elsewhere pieces are sent.
        """
        chosen: list[type] = []
        self.patch(PieceSending, "start", lambda sending: chosen.append(type(sending)))
        self.patch(KernelSending, "start", lambda sending: chosen.append(type(sending)))
        for started, chunked, tls in (
            (True, False, False),
            (False, False, False),
            (True, True, False),
            (True, False, True),
        ):
            connection = PipeConnection(None, Reactor())
            self.addCleanup(connection.shut)
            connection.TLS = tls
            request = Request(Channel(connection))
            request.startedWriting, request.chunked = started, chunked
            send(cast(Any, request), Held(b""), Hands())
        self.assertEqual([KernelSending, PieceSending, PieceSending, PieceSending], chosen)


class Reactor:
    """
    What a connection needs of a reactor: to be called when it may write.
    """

    def __init__(self) -> None:
        self.writing = False
        self.turns = 0

    def addWriter(self, writer: Any) -> None:
        self.writing = True

    def removeWriter(self, writer: Any) -> None:
        self.writing = False

    def addReader(self, reader: Any) -> None:
        pass

    def removeReader(self, reader: Any) -> None:
        pass


class PipeSocket:
    """
    The writing end of a pipe in the place of a connection's socket: like that, its capacity is limited.
    """

    def __init__(self) -> None:
        self.out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def setblocking(self, blocking: bool) -> None:
        pass

    def fileno(self) -> int:
        return self._in

    def send(self, data: bytes, flags: int = 0) -> int:
        return os.write(self._in, data)

    def shutdown(self, how: int) -> None:
        pass

    def setsockopt(self, *option: object) -> None:
        pass

    def close(self) -> None:
        if self._in >= 0:
            os.close(self._in)
            self._in = -1


class PipeConnection(Connection):
    """
    Twisted's own TCP connection over a pipe: with a file descriptor, as the kernel needs, and no socket.
    """

    def __init__(self, protocol: Any, reactor: Reactor) -> None:
        self.pipe = PipeSocket()
        super().__init__(cast(Any, self.pipe), protocol, cast(Any, reactor))
        self.turner = reactor
        self.connected = 1
        self.received = bytearray()
        self.over = False

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "proxy.example", 80)

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.7", 31337)

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass

    def setTcpKeepAlive(self, enabled: bool) -> None:
        pass

    def turn(self) -> None:
        """
        Have the reactor let it write once.
        """
        self.turner.turns += 1
        result = self.doWrite()
        if result:
            self.shut(result)

    def read(self) -> bool:
        """
        Read what the pipe holds; return True if there was anything.
        """
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe.out, 2**16):
                self.received += data
                return True
        return False

    def abortConnection(self) -> None:
        self.shut()

    def shut(self, reason: Exception | None = None) -> None:
        """
        End the connection.
        """
        if not self.over:
            self.over = True
            self.stopReading()
            self.stopWriting()
            if self.protocol is not None:
                self.connectionLost(Failure(reason or ConnectionLost()))
            self.pipe.close()
            os.close(self.pipe.out)


class KernelTests(DaemonTestCase):
    """
    By the kernel, from a real file to a real file descriptor.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", 3 * MIB)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.connection = self.connect(self.daemon)

    def connect(self, daemon: Daemon) -> PipeConnection:
        """
        Have a client connect over a pipe.
        """
        self.reactor = Reactor()
        protocol = daemon.site.buildProtocol(IPv4Address("TCP", "192.0.2.7", 31337))
        connection = PipeConnection(protocol, self.reactor)
        protocol.makeConnection(connection)
        self.addCleanup(connection.shut)
        return connection

    def ask(self, *headers: str, path: str = "") -> None:
        """
        Send a request and flush, without reading.
        """
        lines = [f"GET {path or self.path} HTTP/1.1", "Host: x", *headers, "", ""]
        self.connection.protocol.dataReceived("\r\n".join(lines).encode())
        self.flush()

    def read(self) -> None:
        """
        Read all that comes.
        """
        while True:
            moved = self.connection.read()
            if self.connection.turner.writing and not self.connection.over:
                before = self.connection.turner.turns
                self.connection.turn()
                moved = moved or self.connection.turner.turns > before
            if not self.connection.over:
                moved = self.connection.read() or moved
            if self.connection.over:
                return
            if not moved:
                self.flush()
                if not self.connection.turner.writing:
                    return
            self.assertLess(self.connection.turner.turns, 20_000, "it spins")

    @property
    def bodies(self) -> list[bytes]:
        """
        Return the received bodies, by their Content-Length, the last as far as it came.
        """
        found, rest = [], bytes(self.connection.received)
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            found.append(rest[:length])
            rest = rest[length:]
        return found

    def sendfiles(self) -> list[int]:
        """
        Record what the kernel sends at once from now on.
        """
        sent: list[int] = []
        really = os.sendfile

        def noting(out: int, source: int, offset: int, count: int) -> int:
            sent.append(really(out, source, offset, count))
            return sent[-1]

        self.patch(os, "sendfile", noting)
        return sent

    def test_sends_a_cached_blob(self) -> None:
        """
        A cached blob goes from file to socket whole, and we don't read its bytes.
        """
        self.get(self.path)
        sent = self.sendfiles()
        self.patch(os, "pread", lambda *_: self.fail("it was read"))
        self.ask()
        self.read()
        self.assertEqual([self.data], self.bodies)
        self.assertEqual(len(self.data), sum(sent))
        self.pass_time(1)  # lines are batched under load
        self.assertEqual(2, self.logged().count(f"GET {self.path} 200 {len(self.data)} bytes"))

    def test_a_known_request_is_sent_at_once_and_its_rest_as_any(self) -> None:
        """
        Its head, and as much of the file as the client accepts, in the turn of the request.
        """
        self.get(self.path)
        self.ask()
        self.read()
        sent = self.sendfiles()
        self.patch(os, "pread", lambda *_: self.fail("it was read"))
        turns = self.connection.turner.turns
        self.ask()
        self.assertEqual((1, turns), (len(sent), self.connection.turner.turns))
        self.read()
        self.assertEqual([self.data] * 2, self.bodies)
        self.assertEqual(len(self.data), sum(sent))

    def test_a_known_request_for_what_is_not_in_memory_waits_for_a_thread(self) -> None:
        self.get(self.path)
        self.ask()
        self.read()
        sent, read, pread = self.sendfiles(), list[int](), os.pread

        def noting(fd: int, count: int, offset: int) -> bytes:
            read.append(offset)
            return pread(fd, count, offset)

        self.patch(os, "pread", noting)
        self.patch(slot_sending, "in_memory", lambda *_: 0)
        self.ask()
        self.assertEqual([], sent)
        self.read()
        self.assertEqual([self.data] * 2, self.bodies)
        self.assertEqual([0, MIB, 2 * MIB], read)

    def test_sends_several_ranges(self) -> None:
        """
        The parts go from file to socket, in whatever order, and we write only their heads; data that is not in memory
        is read in a thread, again before each part.
        """
        self.get(self.path)
        sent, warmed = self.sendfiles(), []

        def cold(fd: int, offset: int, count: int) -> int:
            warmed.append(offset)
            return 0

        self.patch(slot_sending, "in_memory", cold)
        for _ in range(2):
            self.ask("Range: bytes=2000000-2999999,5-9,1000000-1000099")
            self.read()
        body, again = self.bodies
        self.assertEqual(body, again)
        parts = [part.partition(b"\r\n\r\n")[2] for part in body.split(f"\r\n--{self.digest[7:]}".encode())]
        expected = [b"", self.data[2_000_000:3_000_000], self.data[5:10], self.data[1_000_000:1_000_100], b""]
        self.assertTrue(expected == parts)
        self.assertEqual(2 * (1_000_000 + 5 + 100), sum(sent))
        self.assertLessEqual({5, 1_000_000}, set(warmed))

    def test_nothing_but_threads_waits_for_the_disk(self) -> None:
        """
        Data that is missing in the middle of a piece is read by a thread, which also reads ahead.
        """
        cold, threads, advised = [range(100_000, 200_000)], list[bool](), list[bool]()
        pread, sendfile = os.pread, os.sendfile

        def in_thread(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            threads.append(True)
            try:
                return at_once(blocking, *args)
            finally:
                threads.pop()

        def there(fd: int, offset: int, count: int) -> int:
            return max(0, min([count, *(each.start - offset for each in cold if offset < each.stop)]))

        def send(out: int, fd: int, offset: int, count: int) -> int:
            self.assertFalse([each for each in cold if offset < each.stop and each.start < offset + count])
            return sendfile(out, fd, offset, count)

        def read(fd: int, count: int, offset: int) -> bytes:
            cold.clear()
            return pread(fd, count, offset)

        def advise(_fd: int, _offset: int, _count: int, advice: int) -> None:
            if advice == os.POSIX_FADV_WILLNEED:
                advised.append(bool(threads))

        self.start(in_thread=in_thread)
        self.get(self.path)
        self.connection = self.connect(self.daemon)
        self.patch(slot_sending, "in_memory", there)
        self.patch(os, "sendfile", send)
        self.patch(os, "pread", read)
        self.patch(os, "posix_fadvise", advise)
        self.ask()
        self.read()
        self.assertEqual(([self.data], [True]), (self.bodies, advised))

    def test_sends_a_range(self) -> None:
        """
        Exactly the range's bytes are sent.
        """
        self.get(self.path)
        self.ask("Range: bytes=1000000-1999999")
        self.read()
        self.assertEqual([self.data[1_000_000:2_000_000]], self.bodies)
        self.assertIn(b"HTTP/1.1 206 ", bytes(self.connection.received))

    def test_follows_a_transfer(self) -> None:
        """
        A blob in transfer is sent as it arrives, its last byte once it is verified; waiting costs no turns.
        """
        self.standin.hold(self.digest)
        self.ask()
        self.arrive(self.digest, MIB)
        self.read()
        self.assertEqual([self.data[:MIB]], self.bodies)
        turns = self.connection.turner.turns
        self.read()
        self.assertEqual((False, turns), (self.connection.turner.writing, self.connection.turner.turns))
        self.arrive(self.digest, 2 * MIB - 1)
        self.read()
        self.assertEqual([self.data[:-1]], self.bodies)
        self.standin.release(self.digest)
        self.flush()
        self.read()
        self.assertEqual([self.data], self.bodies)

    def test_the_next_request_is_answered(self) -> None:
        """
        After a body that the kernel sent the connection goes on, pipelined requests included.
        """
        self.get(self.path)
        self.ask()
        self.ask("Range: bytes=0-9")
        self.ask(path="/v2/")
        self.read()
        self.assertEqual([self.data, self.data[:10], b"{}\n"], self.bodies)
        # The channel is notified again when the client doesn't read.
        self.assertIsInstance(self.connection.producer, HTTPChannel)
        self.ask()
        self.read()
        self.assertEqual(self.data, self.bodies[3])

    def test_a_client_that_does_not_read_costs_nothing(self) -> None:
        """
        What a slow client has not read stays in the file: nothing is held for it.
        """
        self.get(self.path)
        sent = self.sendfiles()
        self.ask()
        for _ in range(50):
            if self.connection.turner.writing:
                self.connection.turn()
        self.assertLess(sum(sent), MIB)
        self.assertEqual((b"", []), (self.connection.dataBuffer, self.connection._tempDataBuffer))  # noqa: SLF001
        self.read()
        self.assertEqual([self.data], self.bodies)

    def test_a_client_that_takes_nothing_is_given_up(self) -> None:
        """
        Its timeout restarts with each piece that it reads, and is paused when it has read everything.
        """
        self.standin.hold(self.digest)
        self.ask()
        self.standin.deliver(self.digest, MIB)
        self.flush()
        self.read()
        self.pass_time(29)  # a bucket may be silent for so long
        self.daemon.standin.release(self.digest)
        self.flush()
        for _ in range(3):
            self.connection.turn()
            self.pass_time(299)
            self.assertFalse(self.connection.over)
            self.connection.read()
        self.connection.turn()
        self.pass_time(301)
        self.assertTrue(self.connection.over)
        self.assertEqual((1, 0), (self.daemon.crowd.slow_readers, self.daemon.crowd.transferring))

    def test_a_client_that_has_taken_all_is_not_slow(self) -> None:
        """
        While a bucket sends nothing there is nothing to read: the client's timeout is paused.
        """
        self.connection = self.connect(self.start(limits=Limits(send_seconds=10)))
        self.standin.hold(self.digest)
        self.ask()
        self.standin.deliver(self.digest, MIB)
        self.flush()
        self.read()
        self.pass_time(20)
        self.assertFalse(self.connection.over)
        self.standin.release(self.digest)
        self.flush()
        self.read()
        self.assertEqual([self.data], self.bodies)

    def test_an_uncached_blob_is_sent_too(self) -> None:
        """
        Bytes without a file are sent from memory in the same place, in order.
        """
        daemon = self.start(limit=1000)
        self.connection = self.connect(daemon)
        self.ask()
        while len(self.connection.received) < len(self.data):
            self.read()
            self.flush()
        self.read()
        self.assertEqual([self.data], self.bodies)
        self.assertIn("BYPASS", self.logged())

    def test_a_manifest_is_sent_too(self) -> None:
        """
        Manifests, which are in memory, come whole.
        """
        image = self.standin.push_image("team/app", "latest")
        for _ in range(2):
            self.ask(path="/v2/team/app/manifests/latest")
        self.read()
        self.assertEqual([image.manifest] * 2, self.bodies)

    def test_who_leaves_lets_go(self) -> None:
        """
        A client that disconnects in the middle releases the file.
        """
        self.get(self.path)
        self.ask()
        self.connection.turn()
        self.assertEqual(1, len(being_read(self.daemon.store)))
        self.connection.shut()
        self.flush()
        self.assertEqual(set(), being_read(self.daemon.store))
        self.assertEqual([], [event for event in self.events if event.get("log_failure")])

    def aborted(self) -> None:
        """
        Assert that the connection was aborted with the answer incomplete.
        """
        self.clock.advance(0)
        self.assertTrue(self.connection.disconnecting or self.connection.disconnected or self.aborts)
        (body,) = self.bodies
        self.assertLess(len(body), len(self.data))
        self.assertTrue(self.data.startswith(body))
        self.assertEqual([], self.daemon.front.ends)

    aborts = 0

    def watch_aborts(self) -> None:
        """
        Count the connection's aborts, which need a reactor, and end it there.
        """

        def aborting() -> None:
            self.aborts += 1
            self.connection.read()
            self.connection.shut()

        self.patch(self.connection, "abortConnection", aborting)

    def test_wrong_bytes_abort(self) -> None:
        """
        A digest mismatch ends the connection short of the last byte.
        """
        wrong = self.data[:-1] + bytes([self.data[-1] ^ 1])
        self.standin.corrupt(self.digest, wrong)
        self.watch_aborts()
        self.ask()
        self.read()
        self.assertEqual(1, self.aborts)
        self.aborted()

    def test_a_file_that_is_cut_meanwhile_ends_the_connection(self) -> None:
        """
        A file that is truncated while it is sent ends the connection.
        """
        self.get(self.path)
        self.watch_aborts()
        self.ask()
        self.connection.turn()
        self.connection.turn()
        os.truncate(self.file_of(self.digest), MIB)
        self.read()
        self.assertEqual(0, self.aborts)
        self.aborted()
        self.assertFalse(self.has(self.digest))

    def test_a_disk_that_fails_meanwhile_ends_the_connection(self) -> None:
        """
        A failed read of the kernel's ends the connection.
        """
        self.get(self.path)
        self.watch_aborts()

        def failing(*args: object) -> int:
            raise OSError(5, "Input/output error")

        self.patch(os, "sendfile", failing)
        self.ask()
        self.read()
        self.assertEqual(0, self.aborts)
        self.aborted()
        self.flushLoggedErrors()

    def test_news_after_the_end_are_nobodys(self) -> None:
        """
        A transfer that goes on after its client has left does not disturb the closed connection.
        """
        self.standin.hold(self.digest)
        self.ask()
        self.standin.deliver(self.digest, MIB)
        self.flush()
        self.connection.shut()
        self.flush()
        self.standin.release(self.digest)
        self.flush()
        self.assertFalse(self.connection.turner.writing)
        self.assertWhole(self.get(self.path), self.data, "HIT")


class PieceSizeTests(SynchronousTestCase):
    def test_few_have_large_pieces_and_many_have_least_ones(self) -> None:
        self.assertEqual([PIECE] * 3, [piece_size(count) for count in (0, 1, TOGETHER // PIECE)])
        self.assertEqual([LEAST_PIECE] * 2, [piece_size(count) for count in (TOGETHER // LEAST_PIECE, 10**6)])
        self.assertLessEqual(4096 * piece_size(4096), 256 * MIB)
