"""
What a connection rejects before it becomes a request, and what it accepts.
"""

from __future__ import annotations

import json
import tempfile

from twisted.internet.protocol import Factory
from twisted.internet.ssl import CertificateOptions
from twisted.logger import LogLevel
from twisted.protocols.tls import TLSMemoryBIOFactory

from ecrproxy.daemon.balanced import BalancedFactory
from ecrproxy.daemon.tls import Certificate, SecuredFactory
from ecrproxy.http.channel import READ_AHEAD
from ecrproxy.http.closing import LINGER_SECONDS
from ecrproxy.http.empty_body import EMPTY_BODY_LIMIT
from ecrproxy.http.framing import LENGTH_DIGITS
from tests.daemon import BUFFER, CLIENT, MIB, DaemonTestCase, End, Hands, Network, Raw, noise
from tests.store_contract import scratch
from tests.test_tls import Files

HEADER_SECONDS = 10
HELLO = b"\x16\x03\x01\x02\x00\x01"
PROXY_LINE = b"PROXY TCP4 198.51.100.1 203.0.113.1 5 80\r\n"
GOOD = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
MANY = 100
PIPELINE = (GOOD[:-2] + b"A: " + b"x" * 10_000 + b"\r\n\r\n") * MANY


class ChannelTestCase(DaemonTestCase):
    """
    A client that writes raw bytes.
    """

    def setUp(self) -> None:
        super().setUp()
        self.client = Raw()

    def tearDown(self) -> None:
        loud = [event for event in self.events if event["log_level"] >= LogLevel.error or "log_failure" in event]
        self.assertEqual([], loud, "a client's nonsense is no error of ours")
        super().tearDown()

    def connect(self) -> End:
        """
        Connect a client that stays.
        """
        self.client = Raw()
        return self.daemon.front.connect(self.client, "proxy.example", 80, secure=False)

    def say(self, *pieces: bytes) -> bytes:
        """
        Write pieces, each after the previous one has arrived, and return what came back.
        """
        wire = self.connect()
        for piece in pieces:
            wire.write(piece)
            self.flush()
        return bytes(self.client.got)

    def assertRefused400(self, *pieces: bytes) -> None:
        """
        Assert that the answer is one 400 that closes; a valid request that follows is not answered.
        """
        got = self.say(*pieces, GOOD)
        what = repr(b"".join(pieces)[:200])
        self.assertTrue(got.startswith(b"HTTP/1.1 400 Bad Request\r\n"), f"{what}: {got[:200]!r}")
        self.assertEqual(1, got.count(b"HTTP/1."), what)
        self.assertTrue(self.client.closed, what)
        self.assertEqual([], self.standin.asked, what)


class RefusalTests(ChannelTestCase):
    def test_says_what_is_wrong(self) -> None:
        """
        In the JSON of the distribution spec, and in the log, once for each client; an answer to HEAD has no body.
        """
        for head, said in (
            (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n", "must not announce a body"),
            (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", "needs one Host"),
            (b"GET v2 HTTP/1.1\r\nHost: x\r\n\r\n", "neither a path"),
            (b"GET /v2/ HTTP/1.1\r\nA: " + b"a" * 2**15 + b"\r\n", "PROXY_HEADER_BYTES"),
            (b"GET /v2/ HTTP/1.1\r\n B: c\r\n", "RFC 9112"),
        ):
            body = self.say(head).partition(b"\r\n\r\n")[2]
            self.assertIn(said, json.loads(body)["errors"][0]["message"])
            self.assertIn(said, self.logged())
        self.assertEqual(b"", self.say(b"HEAD /v2/ HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")[2])

    def test_two_ways_to_tell_a_length(self) -> None:
        """
        Content-Length with Transfer-Encoding, in either order, is rejected: two servers could read it in two ways.
        """
        length, chunked = b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"
        for method in (b"GET", b"POST"):
            for fields in (length + chunked, chunked + length):
                self.assertRefused400(method + b" /v2/ HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n0\r\n\r\n")

    def test_several_lengths(self) -> None:
        """
        Several Content-Lengths are rejected, different ones and equal ones.
        """
        for second in (b"5", b"6", b"0"):
            fields = b"Content-Length: 5\r\nContent-Length: " + second
            self.assertRefused400(b"POST /v2/ HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\nhello")

    def test_lengths_that_are_none(self) -> None:
        """
        A Content-Length that is no number, or too large a number, is rejected.
        """
        for length in (
            b"",
            b"x",
            b"-1",
            b"+5",
            b"5,5",
            b"5 5",
            b"0x5",
            b"5.0",
            b"1_0",
            b"\xb2",
            b"9" * (LENGTH_DIGITS + 1),
            b"9" * 5000,
            b"0" * 5000,
        ):
            for method in (b"GET", b"POST"):
                self.assertRefused400(method + b" /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n")

    def test_codings_that_are_not_chunked(self) -> None:
        """
        Any Transfer-Encoding other than chunked alone is rejected.
        """
        for coding in (b"identity", b"gzip", b"chunked, chunked", b"gzip, chunked", b"chunked;q=1", b"xchunked", b""):
            self.assertRefused400(
                b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n"
            )

    def test_a_second_coding(self) -> None:
        """
        A second Transfer-Encoding is rejected, whatever its value.
        """
        for second in (b"identity", b"chunked"):
            fields = b"Transfer-Encoding: chunked\r\nTransfer-Encoding: " + second
            self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n0\r\n\r\n")

    def test_a_coding_in_http_1_0(self) -> None:
        """
        HTTP/1.0 has no Transfer-Encoding.
        """
        self.assertRefused400(b"POST /v2/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")

    def test_hosts(self) -> None:
        """
        Two Hosts are rejected in either version, equal ones too; in HTTP/1.1 a missing one is rejected.
        """
        self.assertRefused400(b"GET /v2/ HTTP/1.1\r\n\r\n")
        for version in (b"1.0", b"1.1"):
            for second in (b"x", b"y"):
                self.assertRefused400(b"GET /v2/ HTTP/" + version + b"\r\nHost: x\r\nHost: " + second + b"\r\n\r\n")

    def test_folded_lines(self) -> None:
        """
        A header that continues on the next line is rejected, as is a first line that begins with a blank.
        """
        for fold in (b" ", b"\t"):
            self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nAccept: a\r\n" + fold + b"b\r\n\r\n")
            self.assertRefused400(b"GET /v2/ HTTP/1.1\r\n" + fold + b"Host: x\r\n\r\n")
            self.assertRefused400(fold + GOOD)

    def test_bare_line_ends(self) -> None:
        """
        A lone line feed or carriage return ends no line, and is rejected inside one.
        """
        for bare in (b"\n", b"\r"):
            self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nA: b" + bare + b"Content-Length: 5\r\n\r\n")
            self.assertRefused400(b"GET /v2/" + bare + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertRefused400(b"GET /v2/ HTTP/1.1\nHost: x\n\n\r\n")

    def test_a_body_where_one_reads(self) -> None:
        """
        A GET or HEAD with a body is rejected, unless the body is empty.
        """
        for method in (b"GET", b"HEAD"):
            head = method + b" /v2/ HTTP/1.1\r\nHost: x\r\n"
            self.assertRefused400(head + b"Content-Length: 5\r\n\r\nhello")
            self.assertRefused400(head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
            self.assertIn(b" 200 OK\r\n", self.say(head + b"Content-Length: 0\r\n\r\n"))

    def test_a_body_where_one_writes(self) -> None:
        """
        A POST with a body gets 405 at once, its body unread, and what follows is not taken for a request.
        """
        for fields in (b"Content-Length: 1000000", b"Transfer-Encoding: chunked"):
            for method in (b"POST", b"PUT", b"PATCH", b"DELETE"):
                line = method + b" /v2/team/app/blobs/uploads/ HTTP/1.1\r\nHost: x\r\n"
                got = self.say(line + fields + b"\r\n\r\n", GOOD)
                self.assertTrue(got.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n"), got)
                self.assertIn(b"\r\nAllow: GET, HEAD\r\n", got)
                self.assertTrue(got.endswith(b'"message": "this proxy only reads"}]}\n'), got)
                self.assertEqual(1, got.count(b"HTTP/1."))
                self.assertTrue(self.client.closed)

    def test_a_line_without_end(self) -> None:
        """
        A line, or headers together, beyond the limit are rejected without waiting for their end.
        """
        self.assertRefused400(b"GET /v2/" + b"a" * 2**17)
        self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2**17)

    def test_many_headers(self) -> None:
        """
        A hundred headers are accepted; more are rejected.
        """
        several = b"".join(b"A%d: x\r\n" % number for number in range(99))
        self.assertIn(b" 200 OK\r\n", self.say(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + several + b"\r\n"))
        self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + several + b"B: x\r\nC: x\r\n\r\n")

    def test_blanks_before_a_colon(self) -> None:
        """
        A header's name ends at its colon, and has neither blanks nor invalid bytes; a line without a colon is no
        header.
        """
        for field in (b"Content-Length : 5", b" : x", b": x", b"A b: x", b"A", b"A\x00: x", b"A: x\x00", b"\xe4: x"):
            self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n")

    def test_other_versions(self) -> None:
        """
        HTTP/0.9, HTTP/2 in the clear, and versions that don't exist are rejected.
        """
        for line in (
            b"GET /v2/\r\n\r\n",
            b"GET /v2/ HTTP/0.9\r\n\r\n",
            b"GET /v2/ HTTP/2.0\r\nHost: x\r\n\r\n",
            b"GET /v2/ HTTP/1.2\r\nHost: x\r\n\r\n",
            b"GET /v2/ HTTP/1.10\r\nHost: x\r\n\r\n",
            b"GET /v2/ http/1.1\r\nHost: x\r\n\r\n",
            b"GET  /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /v2/  HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET\t/v2/\tHTTP/1.1\r\nHost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            self.assertRefused400(line)

    def test_chunks_with_content_are_refused(self) -> None:
        """
        Invalid sizes, extensions and trailers are rejected: they could be read in two ways.
        """
        for chunks in (
            b"5",
            b"05\r\n",
            b"5;x=y\r\nhello\r\n0\r\n\r\n",
            b"0x5\r\nhello\r\n",
            b"00000000000000000\r\n\r\n",
            b"-1\r\n",
            b"\r\n0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"0\n\n\r\n",
            b"0\n\r\n\r\n",
            b"0;x\ny\r\n\r\n",
            b"0\r\nA: b\nGET / HTTP/1.1\r\n\r\n",
            b"0\r\n A: b\r\n\r\n",
            b"0\r\nA : b\r\n\r\n",
            b"0\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"0\r\nA: " + b"x" * EMPTY_BODY_LIMIT,
            b"0\r\n" + b"A: b\r\n" * EMPTY_BODY_LIMIT,
            b"0;" + b"x" * EMPTY_BODY_LIMIT,
        ):
            head = b" /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.assertRefused400(b"GET" + head + chunks)
            self.assertRefused400(b"GET" + head, *(chunks[at : at + 1] for at in range(min(len(chunks), 30))), chunks)
            got = self.say(b"POST" + head + chunks + GOOD)
            self.assertEqual((True, 1), (got.startswith(b"HTTP/1.1 405 "), got.count(b"HTTP/1.")))

    def test_a_body_that_was_announced(self) -> None:
        """
        A client that sends Expect gets no 100 before the refusal.
        """
        expects = b" /v2/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        self.assertRefused400(b"GET" + expects)
        got = self.say(b"PUT" + expects)
        self.assertEqual((True, True), (got.startswith(b"HTTP/1.1 405 "), self.client.closed))

    def test_bodies_are_read_nowhere(self) -> None:
        """
        However much of a body comes, and whatever the method, none of it is kept in memory or in a file.
        """
        self.patch(tempfile, "TemporaryFile", lambda *_: self.fail("a body went to a file"))
        for method in (b"GET", b"HEAD", b"PUT", b"POST", b"PATCH", b"DELETE"):
            for length in (b"Content-Length: 100000000", b"Transfer-Encoding: chunked"):
                wire = self.connect()
                wire.write(
                    method + b" /v2/ HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n" + b"f0000\r\n" + b"x" * 2**20
                )
                channel = wire.peer.protocol
                self.flush()
                self.assertTrue(self.client.closed)
                self.assertLess(len(channel._buffer), 2**17)  # type: ignore[attr-defined]  # noqa: SLF001
                self.assertEqual([], channel._dataBuffer)  # type: ignore[attr-defined]  # noqa: SLF001

    def test_a_refusal_ends_a_pipeline(self) -> None:
        """
        Whatever follows a rejected request on its connection is ignored, in the same piece or later.
        """
        wire = self.connect()
        wire.write(GOOD + b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 44\r\n\r\n" + GOOD * 3)
        self.flush()
        wire.write(GOOD)
        self.flush()
        self.assertEqual((2, 1), (self.client.got.count(b"HTTP/1.1 "), self.client.got.count(b"HTTP/1.1 200 ")))

    def test_nonsense(self) -> None:
        for line in (b"nonsense\r\n\r\n", b"GET\r\n\r\n", b"GET /v2/ HTTP/1.1 x\r\n\r\n", b"GET /v2/ FTP/1.1\r\n\r\n"):
            self.assertRefused400(line)

    def test_a_refusal_says_so_in_the_registrys_way(self) -> None:
        """
        A refusal does not name the server software, closes the connection, and has a length.
        """
        got = self.say(b"GET /v2/ HTTP/1.1\r\n\r\n")
        head, _, body = got.partition(b"\r\n\r\n")
        fields = head.split(b"\r\n")[1:]
        self.assertIn(b"Connection: close", fields)
        self.assertIn(b"Content-Length: %d" % len(body), fields)
        self.assertIn(b"Server: ecrproxy", fields)

    def test_a_tls_hello_is_answered_in_plain_http_1_0(self) -> None:
        got = self.say(HELLO)
        self.assertTrue(got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), got)
        self.assertTrue(got.endswith(b"\r\n\r\nThis port speaks HTTP without TLS.\n"), got)
        self.assertTrue(self.client.closed)

    def test_a_tls_hello_is_logged_under_its_address(self) -> None:
        self.say(HELLO)
        (event,) = [event for event in self.events if "speaks TLS" in event.get("log_format", "")]
        self.assertEqual((CLIENT, CLIENT), (event["client"], event["once"]))

    def test_what_looks_like_a_hello_later_is_none(self) -> None:
        """
        Only the first byte of a connection can belong to a TLS hello.
        """
        got = self.say(b"GET /v2/?", b"\x16 HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertTrue(got.startswith(b"HTTP/1.1 "), got)


class LingeringTests(ChannelTestCase):
    """
    A rejected client that goes on sending.
    """

    def refuse(self) -> End:
        """
        Reject a client that does not read yet, and so does not see the end of the connection either.
        """
        wire = self.connect()
        wire.reading = False
        wire.write(b"PUT /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
        self.flush()
        return wire

    def test_what_it_sends_is_read_and_kept_nowhere(self) -> None:
        """
        Unread data would reset the connection, and lose the answer.
        """
        wire = self.refuse()
        for _ in range(8):
            wire.write(b"x" * MIB)
            self.flush()
            self.assertEqual((0, b""), (wire.waiting, wire.peer.protocol._buffer))  # type: ignore[attr-defined]  # noqa: SLF001
        wire.reading = True
        self.flush()
        self.assertTrue(self.client.got.startswith(b"HTTP/1.1 405 "))
        self.assertTrue(self.client.closed)

    def test_it_has_its_time(self) -> None:
        wire = self.refuse()
        self.pass_time(LINGER_SECONDS + 1)
        wire.write(b"x" * MIB)
        self.flush()
        self.assertEqual(MIB, wire.waiting)
        wire.reading = True
        self.flush()
        self.assertTrue(self.client.closed)
        self.assertEqual(0, self.daemon.crowd.connected)


class BoundTests(ChannelTestCase):
    """
    Clients that send without reading.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("x", BUFFER)
        self.path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"
        self.request = f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        self.assertWhole(self.get(self.path), self.data)

    def secure(self) -> None:
        """
        Start TLS.
        """
        files = Files(scratch(self))
        factory = SecuredFactory(Certificate(files.key, files.certificate), self.daemon.site, self.clock)
        self.daemon.front = Network(factory, self.clock)  # type: ignore[arg-type]

    def connect_securely(self) -> tuple[End, TLSMemoryBIOFactory]:
        """
        Connect a TLS client that stays.
        """
        self.client = client = Raw()
        factory = TLSMemoryBIOFactory(
            CertificateOptions(), isClient=True, wrappedFactory=Factory.forProtocol(lambda: client), clock=self.clock
        )
        speaking = factory.buildProtocol(None)
        wire = self.daemon.front.connect(speaking, "proxy.example", 80, secure=False)
        self.flush()
        return wire, factory

    def test_no_request_is_started_while_responses_wait(self) -> None:
        """
        A client that pipelines hundreds of requests has one buffer of responses waiting for it, and gets all.
        """
        wire = self.connect()
        wire.reading = False
        wire.write(self.request * 400)
        self.flush()
        self.assertLess(wire.peer.waiting, 3 * BUFFER)
        self.assertLess(wire.peer.written, 3 * BUFFER)
        wire.reading = True
        self.flush()
        self.assertEqual(400, self.client.got.count(b"HTTP/1.1 200 OK"))
        self.assertEqual(400, self.client.got.count(self.data))

    def test_no_request_is_started_over_tls_while_responses_wait(self) -> None:
        self.secure()
        wire, _ = self.connect_securely()
        self.client.transport.write(self.request * 400)  # type: ignore[union-attr]
        wire.reading = False
        self.flush()
        self.assertLess(wire.peer.written, 4 * BUFFER)
        wire.reading = True
        self.flush()
        self.assertEqual(400, self.client.got.count(self.data))

    def test_responses_that_wait_are_no_slow_request(self) -> None:
        """
        The time for a head counts while the head is read, not while the client reads.
        """
        wire = self.connect()
        wire.write(self.request * 10)
        wire.reading = False
        self.flush()
        for _ in range(4):
            wire.write(self.request)
            self.pass_time(HEADER_SECONDS - 1)
        wire.reading = True
        self.flush()
        self.assertEqual((14, 0), (self.client.got.count(self.data), self.daemon.crowd.slow_heads))

    def test_reading_stops_whatever_is_in_progress(self) -> None:
        """
        A response that the client does not read, one that ECR is slow to give, one behind a balancer.
        """
        large = noise("y", 4 * MIB)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', large)}"
        asked = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        balanced = Network(BalancedFactory(self.daemon.site, self.clock), self.clock)  # type: ignore[arg-type]
        for front, greeting in ((self.daemon.front, b""), (balanced, PROXY_LINE)):
            self.daemon.front = front
            wire = self.connect()
            wire.reading = False
            wire.write(greeting + asked)
            self.flush()
            wire.write(PIPELINE)
            self.flush()
            self.assertLessEqual(len(PIPELINE) - wire.waiting, READ_AHEAD + 2 * BUFFER)
            wire.reading = True
            self.flush()
            self.assertTrue(large in self.client.got)
            self.assertEqual(MANY + 1, self.client.got.count(b"HTTP/1.1 200 OK"))

    def test_reading_stops_while_upstream_is_waited_for(self) -> None:
        data = noise("z", 1000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        self.standin.quirks.latency = 20
        wire = self.connect()
        wire.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.flush()
        wire.write(PIPELINE)
        self.flush()
        self.assertLessEqual(len(PIPELINE) - wire.waiting, READ_AHEAD + BUFFER)
        self.pass_time(61)
        self.assertTrue(data in self.client.got)
        self.assertEqual(MANY + 1, self.client.got.count(b"HTTP/1.1 200 OK"))

    def test_input_after_the_last_response_is_dropped(self) -> None:
        """
        Over TLS, where the connection is read until the client's close_notify.
        """
        self.secure()
        wire, _ = self.connect_securely()
        self.client.transport.write(GOOD[:-2] + b"Connection: close\r\n\r\n")  # type: ignore[union-attr]
        wire.reading = False
        self.flush()
        channel = wire.peer.protocol.wrappedProtocol  # type: ignore[attr-defined]
        for _ in range(8):
            self.client.transport.write(b"x" * BUFFER)  # type: ignore[union-attr]
            self.flush()
            self.assertEqual(b"", channel._buffer)  # noqa: SLF001
        wire.reading = True
        self.flush()
        self.assertEqual((1, True), (self.client.got.count(b"HTTP/1.1 200"), self.client.closed))

    def test_plain_http_to_tls_is_answered_in_plain_http(self) -> None:
        self.secure()
        got = self.say(GOOD[:5], GOOD[5:], GOOD)
        self.assertTrue(got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), got)
        self.assertTrue(got.endswith(b"\r\n\r\nThis port speaks HTTP over TLS alone: use https.\n"), got)
        self.assertEqual((1, True), (got.count(b"HTTP/1."), self.client.closed))
        (event,) = [event for event in self.events if "speaks plain HTTP" in event.get("log_format", "")]
        self.assertEqual(CLIENT, event["once"])
        self.assertEqual(0, self.daemon.crowd.connected)

    def test_a_tls_hello_behind_a_balancer_is_answered(self) -> None:
        self.daemon.front = Network(BalancedFactory(self.daemon.site, self.clock), self.clock)  # type: ignore[arg-type]
        got = self.say(PROXY_LINE, HELLO)
        self.assertTrue(got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), got)
        (event,) = [event for event in self.events if "speaks TLS" in event.get("log_format", "")]
        self.assertEqual("198.51.100.1", event["once"])

    def test_what_follows_a_body_is_answered_in_order(self) -> None:
        """
        On the admin port, where requests may have bodies: what comes with the body, and while its answer waits.
        """
        hands = Hands()
        self.daemon.front = self.start(in_thread=hands).admin
        fields = b"Content-Type: application/json\r\nX-Ecrproxy-Api: 1\r\nContent-Length: 16\r\n\r\n"
        post = b"POST /api/remove HTTP/1.1\r\nHost: localhost\r\n" + fields + b'{"digests": [] }'
        asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        wire, hands.idle = self.connect(), False
        for piece in (post + asked[:10], asked[10:20], asked[20:] + asked):
            wire.write(piece)
            self.flush()
        self.assertEqual((b"", 1), (bytes(self.client.got), len(hands.waiting)))
        hands.idle = True
        hands.work_off()
        self.flush()
        self.assertEqual([b"200"] * 3, [part[:3] for part in self.client.got.split(b"HTTP/1.1 ")[1:]])


class SlowTests(ChannelTestCase):
    """
    Slow clients.
    """

    def test_headers_have_ten_seconds(self) -> None:
        """
        A head that is not complete after ten seconds is dropped, however fast its bytes come.
        """
        wire = self.connect()
        wire.write(b"GET /v2/ HTTP/1.1\r\n")
        for second in range(HEADER_SECONDS - 1):
            self.pass_time(1)
            wire.write(b"A%d: x\r\n" % second)
        self.assertFalse(self.client.closed)
        self.pass_time(2)
        self.assertTrue(self.client.closed)
        self.assertEqual(b"", bytes(self.client.got))

    def test_each_request_has_its_own_ten_seconds(self) -> None:
        wire = self.connect()
        for _ in range(3):
            wire.write(b"GET /v2/ HTTP/1.1\r\n")
            self.pass_time(HEADER_SECONDS - 1)
            wire.write(b"Host: x\r\n\r\n")
            self.pass_time(HEADER_SECONDS - 1)
        self.assertEqual((3, False), (self.client.got.count(b" 200 OK"), self.client.closed))

    def test_a_slow_answer_is_not_a_slow_request(self) -> None:
        """
        Once the head has arrived its time is over: ECR may take longer.
        """
        data = b"x" * 1000
        digest = self.standin.push_blob("team/app", data)
        self.standin.quirks.latency = 20
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest}")
        self.pass_time(61)
        self.assertWhole(reply, data)

    def test_a_client_that_leaves_in_its_head_leaves_no_clock(self) -> None:
        """
        After a client has disconnected no timer waits for the rest of its request.
        """
        wire = self.connect()
        before = len(self.clock.getDelayedCalls())
        wire.write(b"GET /v2/ HTTP/1.1\r\n")
        self.flush()
        self.assertGreater(len(self.clock.getDelayedCalls()), before)
        wire.abortConnection()
        self.flush()
        self.assertLess(len(self.clock.getDelayedCalls()), before + 1)


class GoodTests(ChannelTestCase):
    def test_pipelined_requests(self) -> None:
        """
        Requests that come together are answered in order; in one piece, or byte by byte.
        """
        requests = b"HEAD" + GOOD[3:] + GOOD + GOOD.replace(b"/v2/", b"/healthz") + GOOD
        whole = self.say(requests)
        self.assertEqual((4, 2), (whole.count(b" 200 OK\r\n"), whole.count(b"\r\n\r\n{}\n")))
        self.assertFalse(self.client.closed)
        self.assertEqual(4, self.say(*(requests[at : at + 1] for at in range(len(requests)))).count(b" 200 OK\r\n"))

    def test_good_ones_before_a_bad_one_are_answered(self) -> None:
        """
        Requests before a rejected one are answered, before the refusal.
        """
        got = self.say(GOOD + b"GET /v2/ HTTP/1.1\r\n\r\n" + GOOD)
        self.assertEqual([b"200", b"400"], [part[:3] for part in got.split(b"HTTP/1.1 ")[1:]])
        self.assertTrue(self.client.closed)

    def test_close_closes(self) -> None:
        """
        The client sends Connection: close, or uses HTTP/1.0.
        """
        for line in (
            b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"GET /v2/ HTTP/1.0\r\n\r\n",
        ):
            got = self.say(line, GOOD)
            self.assertEqual(1, got.count(b" 200 OK\r\n"))
            self.assertTrue(self.client.closed)

    def test_offers_to_upgrade_are_passed_over(self) -> None:
        """
        The other protocol is not used, and its settings are ignored.
        """
        for fields in (
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n",
        ):
            got = self.say(GOOD[:-2] + fields + b"\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            self.assertEqual([b"200", b"400"], [part[:3] for part in got.split(b"HTTP/1.1 ")[1:]])
            self.assertNotIn(b"101", got[:20])

    def test_a_length_of_nothing(self) -> None:
        """
        An empty body counts as none, whether in a GET or with Expect.
        """
        self.assertIn(b" 200 OK\r\n", self.say(GOOD[:-2] + b"Content-Length: 0\r\n\r\n"))
        self.assertTrue(self.say(GOOD[:-2] + b"Expect: 100-continue\r\n\r\n").endswith(b"{}\n"))

    def test_blank_lines_before_a_request(self) -> None:
        """
        As RFC 9112 requires.
        """
        self.assertEqual(2, self.say(b"\r\n" + GOOD + b"\r\n" + GOOD).count(b" 200 OK\r\n"))

    def test_names_and_codings_in_any_case(self) -> None:
        """
        Header names and the chunked coding are case-insensitive, with blanks around their values.
        """
        self.assertRefused400(b"GET /v2/ HTTP/1.1\r\nhOST: x\r\nHost: x\r\n\r\n")
        got = self.say(b"POST /v2/ HTTP/1.1\r\nHOST:\tx \r\ntransfer-ENCODING: \tChunked \r\n\r\n")
        self.assertTrue(got.startswith(b"HTTP/1.1 405 "), got)


class EmptyBodyTests(ChannelTestCase):
    """
    A GET or HEAD that Envoy, linkerd or Vert.x has framed as chunked, without a byte of content.
    """

    chunked = GOOD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"

    def test_is_answered_and_the_connection_goes_on(self) -> None:
        for last in (b"0", b"000", b"0 ", b"0;x=y", b'0 ; x="y z"', b"0\r\nA: b\r\nX-Trace:"):
            for request in (self.chunked, b"HEAD" + self.chunked[3:]):
                whole = (request + last + b"\r\n\r\n") * 2 + GOOD
                for pieces in ([whole], [whole[at : at + 1] for at in range(len(whole))]):
                    got = self.say(*pieces)
                    self.assertEqual((3, 3), (got.count(b"HTTP/1."), got.count(b"HTTP/1.1 200 OK\r\n")), (last, got))
                    self.assertFalse(self.client.closed)

    def test_is_answered_whatever_is_asked_for(self) -> None:
        data = noise("chunked", 100_000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}".encode()
        got = self.say(self.chunked.replace(b"/v2/", path) + b"0\r\n", b"\r\n")
        self.assertTrue(got.startswith(b"HTTP/1.1 200 OK\r\n"), got[:200])
        self.assertTrue(got.endswith(data))

    def test_is_waited_for_as_long_as_a_head(self) -> None:
        for come in (b"", b"0\r\n"):
            wire = self.connect()
            wire.write(self.chunked + come)
            self.pass_time(HEADER_SECONDS - 1)
            self.assertEqual((b"", False), (bytes(self.client.got), self.client.closed))
            self.pass_time(2)
            self.assertTrue(self.client.closed)
            self.assertEqual(0, self.daemon.crowd.connected)

    def test_that_was_announced_is_asked_for(self) -> None:
        got = self.say(self.chunked[:-2] + b"Expect: 100-continue\r\n\r\n", b"0\r\n\r\n")
        self.assertTrue(got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"), got)

    def test_goes_to_no_file(self) -> None:
        self.patch(tempfile, "TemporaryFile", lambda *_: self.fail("a body went to a file"))
        self.assertIn(b" 200 OK\r\n", self.say(self.chunked + b"0\r\n\r\n"))


class HalfClosedTests(ChannelTestCase):
    """
    A client that shuts down its sending side after its request, as C{nc -N} does, is answered.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("half", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.ask = f"GET /v2/team/app/blobs/{self.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    def test_gets_its_answer_and_then_the_end(self) -> None:
        wire = self.connect()
        wire.write(self.ask)
        wire.half_close()
        self.flush()
        self.assertTrue(self.client.got.startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertTrue(self.client.got.endswith(self.data))
        self.assertTrue(self.client.closed)
        self.assertEqual(0, self.daemon.crowd.connected)

    def test_gets_an_answer_that_takes_time(self) -> None:
        self.standin.hold(self.digest)
        wire = self.connect()
        wire.write(self.ask)
        self.flush()
        wire.half_close()
        self.flush()
        self.assertFalse(self.client.closed)
        self.standin.release(self.digest)
        self.flush()
        self.assertTrue(self.client.got.endswith(self.data))
        self.assertTrue(self.client.closed)

    def test_gets_all_answers_to_what_it_had_asked(self) -> None:
        wire = self.connect()
        wire.write(GOOD + self.ask + GOOD + b"GET /unfinished")
        wire.half_close()
        self.flush()
        self.assertEqual(3, self.client.got.count(b"HTTP/1.1 200 OK\r\n"))
        self.assertTrue(self.client.got.endswith(b"{}\n"))
        self.assertTrue(self.client.closed)

    def test_gets_all_answers_however_late_it_reads_them(self) -> None:
        wire = self.connect()
        wire.reading = False
        wire.write(GOOD * 2000)
        self.flush()
        wire.half_close()
        self.flush()
        wire.reading = True
        self.flush()
        self.assertEqual(2000, self.client.got.count(b"HTTP/1.1 200 OK\r\n"))
        self.assertTrue(self.client.closed)

    def test_between_two_requests_is_closed(self) -> None:
        for sent in (b"", GOOD, b"GET /v2/"):
            wire = self.connect()
            wire.write(sent)
            self.flush()
            self.assertFalse(self.client.closed)
            wire.half_close()
            self.flush()
            self.assertTrue(self.client.closed, sent)
        self.assertEqual(0, self.daemon.crowd.connected)

    def test_of_a_socket_with_a_path_has_gone(self) -> None:
        self.daemon.front.socket = "/run/proxy"
        self.standin.hold(self.digest)
        wire = self.connect()
        wire.write(self.ask)
        self.flush()
        wire.half_close()
        self.flush()
        self.assertTrue(self.client.closed)
        self.assertEqual((0, 0), (self.daemon.crowd.connected, self.daemon.crowd.transferring))

    def test_that_has_gone_altogether_is_noticed_with_the_first_bytes(self) -> None:
        self.standin.hold(self.digest)
        wire = self.connect()
        wire.write(self.ask)
        self.flush()
        wire.loseConnection()
        self.flush()
        self.standin.release(self.digest)
        self.flush()
        self.assertEqual((0, 0), (self.daemon.crowd.connected, self.daemon.crowd.transferring))


class ExpectTests(ChannelTestCase):
    def test_without_a_body_no_100_is_sent(self) -> None:
        for method in (b"GET", b"HEAD"):
            for fields in (b"", b"Content-Length: 0\r\n"):
                got = self.say(method + b" /v2/ HTTP/1.1\r\nHost: x\r\n" + fields + b"Expect: 100-continue\r\n\r\n")
                self.assertTrue(got.startswith(b"HTTP/1.1 200 OK\r\n"), got)
                self.assertEqual(1, got.count(b"HTTP/1.1"))

    def test_a_body_on_the_operators_port_is_asked_for(self) -> None:
        head = b"POST /api/remove HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n", self.daemon.raw(head, self.daemon.admin))
