"""
Connections through a load balancer, with and without the PROXY header.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.protocol import Factory
from twisted.internet.ssl import CertificateOptions
from twisted.logger import LogLevel
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.limits import Limits
from ecrproxy.daemon.balanced import HEADER_SECONDS, LONGEST, Address, BalancedFactory, Header, parse_header
from ecrproxy.daemon.tls import Certificate, SecuredFactory
from ecrproxy.http.closing import LINGER_SECONDS
from tests.daemon import CLIENT, DaemonTestCase, End, Network, Raw
from tests.store_contract import scratch
from tests.test_tls import Files

GOOD = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
CLIENT_LINE = b"PROXY TCP4 198.51.100.1 203.0.113.1 5 80\r\n"
PAIR: tuple[Address, Address] = IPv4Address("TCP", "198.51.100.1", 5), IPv4Address("TCP", "203.0.113.1", 80)


def binary(command: int, kind: int, payload: bytes = b"") -> bytes:
    """
    Build a header of version 2.
    """
    return SIGNATURE + struct.pack("!BBH", command, kind, len(payload)) + payload


def four(source: str = "198.51.100.1", destination: str = "203.0.113.1") -> bytes:
    return socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!2H", 5, 80)


def six(source: str, destination: str = "2001:db8::2") -> bytes:
    both = (socket.inet_pton(socket.AF_INET6, each) for each in (source, destination))
    return b"".join(both) + struct.pack("!2H", 5, 80)


SIX: tuple[Address, Address] = IPv6Address("TCP", "2001:db8::1", 5), IPv6Address("TCP", "2001:db8::2", 80)
MAPPED = IPv4Address("TCP", "10.0.0.1", 5)
KNOWN: dict[bytes, tuple[Address, Address]] = {
    CLIENT_LINE: PAIR,
    b"PROXY TCP6 2001:db8::1 2001:db8::2 5 80\r\n": SIX,
    b"PROXY TCP6 2001:0db8:0:0:0:0:0:1 2001:DB8::2 5 80\r\n": SIX,
    b"PROXY TCP6 ::ffff:a00:1 2001:db8::2 5 80\r\n": (MAPPED, SIX[1]),
    b"PROXY TCP6 ::ffff:10.0.0.1 2001:db8::2 5 80\r\n": (MAPPED, SIX[1]),
    binary(0x21, 0x11, four()): PAIR,
    binary(0x21, 0x12, four()): PAIR,
    binary(0x21, 0x21, six("2001:db8::1")): SIX,
    binary(0x21, 0x21, six("::ffff:10.0.0.1")): (MAPPED, SIX[1]),
    binary(0x21, 0x11, four() + b"\x04\x00\x03abc"): PAIR,
}
UNKNOWN = (
    b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN ffff::1 ffff::2 5 80\r\n",
    b"PROXY UNKNOWN whatever % stands here\r\n",
    binary(0x20, 0x00),
    binary(0x20, 0x11, four()),
    binary(0x21, 0x00),
    binary(0x21, 0x00, b"\x04\x00\x03abc"),
    binary(0x21, 0x10, four()),
    binary(0x21, 0x31, b"\0" * 216),
)
MALFORMED = (
    GOOD,
    b"\x16\x03\x01\x02\x00\x01",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 5\r\n",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 5 80 6\r\n",
    b"PROXY TCP4 198.51.100.256 203.0.113.1 5 80\r\n",
    b"PROXY TCP4 198.51.100.01 203.0.113.1 5 80\r\n",
    b"PROXY TCP4 2001:db8::1 2001:db8::2 5 80\r\n",
    b"PROXY TCP6 198.51.100.1 203.0.113.1 5 80\r\n",
    b"PROXY TCP6 fe80::1%\x1b[31m fe80::2 5 80\r\n",
    b"PROXY TCP4 somebody.example 203.0.113.1 5 80\r\n",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 x 80\r\n",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 5 8_0\r\n",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 5 " + b"9" * 50 + b"\r\n",
    b"PROXY UDP4 198.51.100.1 203.0.113.1 5 80\r\n",
    b"PROXY \xff\r\n",
    b"PROXY TCP4 \xff 203.0.113.1 5 80\r\n",
    b"PROXY TCP4 198.51.100.1 203.0.113.1 5 \xb2\r\n",
    b"PROXY \r\n",
    b"PROXY UNKNOWN " + b"x" * 100,
    SIGNATURE + b"\x11\x11\x00\x00",
    binary(0x22, 0x11, four()),
    binary(0x21, 0x41, four()),
    binary(0x21, 0x13, four()),
    binary(0x21, 0x11, four()[:11]),
    binary(0x21, 0x21, six("2001:db8::1")[:35]),
    SIGNATURE + struct.pack("!BBH", 0x21, 0x11, LONGEST),
)


class HeaderTests(SynchronousTestCase):
    def test_addresses_are_those_of_the_client(self) -> None:
        for data, (source, destination) in KNOWN.items():
            self.assertEqual(Header(len(data), source, destination), parse_header(data + GOOD), data)

    def test_a_balancer_may_tell_no_address(self) -> None:
        for data in UNKNOWN:
            self.assertEqual(Header(len(data)), parse_header(data + GOOD), data)

    def test_a_part_of_a_header_is_waited_for(self) -> None:
        for data in (*KNOWN, *UNKNOWN):
            self.assertEqual({None}, {parse_header(data[:count]) for count in range(len(data))}, data)

    def test_anything_else_is_refused_in_words_of_ours(self) -> None:
        for data in MALFORMED:
            problem = self.assertRaises(ValueError, parse_header, data)
            self.assertRegex(str(problem), r"^(no|a) PROXY header( [a-zA-Z0-9 ,]+)?$")

    def test_a_header_with_too_few_fields_says_how_many_it_has(self) -> None:
        problem = self.assertRaises(ValueError, parse_header, b"PROXY TCP4 198.51.100.1 203.0.113.1 5\r\n")
        self.assertEqual("a PROXY header with 3 fields after TCP4, which has 4", str(problem))

    @given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE + b"\x21"]), st.binary())
    def test_whatever_comes_has_one_of_three_outcomes(self, start: bytes, rest: bytes) -> None:
        try:
            found = parse_header(start + rest)
        except ValueError:
            return
        self.assertTrue(found is None or found.size <= len(start + rest))


class Behind(ProtocolWrapper):
    """
    A client connection whose first bytes follow a balancer's header, in one piece with it.
    """

    def __init__(self, wrapped: Any, header: bytes) -> None:
        super().__init__(WrappingFactory(Factory()), wrapped)
        self._header = header

    def write(self, data: bytes) -> None:
        header, self._header = self._header, b""
        super().write(header + data)


class BalancedTests(DaemonTestCase):
    """
    The client port behind a balancer.
    """

    def balance(self, most: int = 4, **limits: float) -> None:
        """
        Start a daemon behind a balancer.
        """
        self.start(limits=Limits(**limits))  # type: ignore[arg-type]
        self.factory = BalancedFactory(self.daemon.site, self.clock, most)
        self.daemon.front = Network(self.factory, self.clock)  # type: ignore[arg-type]

    def connect(self, *pieces: bytes) -> tuple[Raw, End]:
        """
        Connect a client that stays.
        """
        client = Raw()
        wire = self.daemon.front.connect(client, "proxy.example", 80, secure=False)
        self.flush()
        for piece in pieces:
            wire.write(piece)
            self.flush()
        return client, wire

    def test_a_client_is_counted_under_its_own_address(self) -> None:
        """
        The access log has it too, and other clients of the same balancer are served.
        """
        self.balance(connections_per_address=1)
        first, _ = self.connect(CLIENT_LINE + GOOD)
        self.assertIn(b" 200 OK", bytes(first.got))
        for address, answers in ((b"198.51.100.1", 0), (b"198.51.100.2", 1)):
            client, _ = self.connect(CLIENT_LINE.replace(b"198.51.100.1", address) + GOOD)
            self.assertEqual(answers, client.got.count(b" 200 OK"))
        self.pass_time(1)
        self.assertIn("198.51.100.1 GET /v2/", self.logged())
        self.assertEqual(1, self.daemon.crowd.refused_connections)

    def secure(self) -> None:
        """
        Start TLS after the header.
        """
        files = Files(scratch(self))
        keys = Certificate(files.key, files.certificate)
        self.factory.wrappedFactory = SecuredFactory(keys, self.daemon.site, self.clock)

    def connect_securely(self, header: bytes, sent: bytes) -> tuple[Raw, End]:
        """
        Connect a TLS client through a balancer that prepends its header.
        """
        client = Raw()
        speaking = TLSMemoryBIOFactory(
            CertificateOptions(), isClient=True, wrappedFactory=Factory.forProtocol(lambda: client), clock=self.clock
        )
        behind = Behind(speaking.buildProtocol(None), header)
        wire = self.daemon.front.connect(behind, "proxy.example", 80, secure=False)
        self.flush()
        client.transport.write(sent)  # type: ignore[union-attr]
        return client, wire

    def test_tls_begins_behind_the_header(self) -> None:
        """
        Under the client's address, with headers of both versions, and with a hello in the same piece.
        """
        self.balance(connections_per_address=1)
        self.secure()
        headers = (CLIENT_LINE, *KNOWN)
        for header in headers:
            client, wire = self.connect_securely(header, GOOD)
            self.flush()
            self.assertIn(b" 200 OK", bytes(client.got), header)
            wire.abortConnection()
            self.flush()
        self.pass_time(1)
        lines = [line for line in self.logged().splitlines() if "GET /v2/" in line]
        self.assertEqual(len(headers), len(lines))
        self.assertFalse([line for line in lines if CLIENT in line])

    def test_a_client_of_tls_that_closes_is_gone(self) -> None:
        """
        TLS has no half-closed connections.
        """
        self.balance()
        self.secure()
        client, wire = self.connect_securely(CLIENT_LINE, GOOD)
        self.flush()
        wire.half_close()
        self.flush()
        self.assertTrue(client.closed)
        self.assertEqual(0, self.daemon.crowd.connected)

    def test_plain_http_behind_the_header_of_a_tls_port_is_answered(self) -> None:
        self.balance()
        self.secure()
        client, _ = self.connect(CLIENT_LINE, GOOD)
        self.assertTrue(client.got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), client.got)
        self.assertTrue(client.closed)

    def test_a_refused_client_is_told_so_over_tls(self) -> None:
        self.balance()
        self.secure()
        client, _ = self.connect_securely(CLIENT_LINE, CLIENT_LINE + GOOD)
        self.flush()
        self.assertIn(b" 400 Bad Request", bytes(client.got))
        self.assertTrue(client.closed)

    def test_a_refused_client_that_does_not_say_goodbye_is_not_waited_for(self) -> None:
        self.balance()
        self.secure()
        _, wire = self.connect_securely(CLIENT_LINE, CLIENT_LINE + GOOD)
        wire.protocol = Raw()
        self.flush()
        self.assertEqual(1, self.daemon.crowd.connected)
        self.pass_time(LINGER_SECONDS + 1)
        self.assertEqual(0, self.daemon.crowd.connected)

    def test_headers_of_both_versions_are_taken_in_any_pieces(self) -> None:
        self.balance()
        for data in (CLIENT_LINE, *UNKNOWN, *KNOWN):
            client, wire = self.connect(*(data[at : at + 1] for at in range(len(data))), GOOD)
            self.assertIn(b" 200 OK", bytes(client.got), data)
            wire.abortConnection()

    def test_a_connection_without_a_header_takes_nothing_from_clients(self) -> None:
        self.balance(connections_per_address=2, connections=2)
        silent = [self.connect()[0] for _ in range(4)]
        self.assertEqual(0, self.daemon.crowd.connected)
        served, _ = self.connect(CLIENT_LINE + GOOD)
        self.assertIn(b" 200 OK", bytes(served.got))
        self.assertEqual([True, False, False, False], [client.closed for client in silent])

    def test_one_too_many_has_the_oldest_closed(self) -> None:
        self.balance(most=4)
        several = [self.connect(b"PROXY")[0] for _ in range(7)]
        self.assertEqual([True] * 3 + [False] * 4, [client.closed for client in several])
        self.assertEqual(4, len(self.factory.waiting))

    def test_a_header_has_its_time(self) -> None:
        self.balance()
        client, wire = self.connect()
        for _ in range(HEADER_SECONDS):
            wire.write(b"P" if not wire.written else b"R" if wire.written == 1 else b"")
            self.pass_time(1)
        self.assertTrue(client.closed)
        self.assertEqual({}, self.factory.waiting)

    def test_a_header_that_came_leaves_no_deadline(self) -> None:
        self.balance()
        client, wire = self.connect(CLIENT_LINE)
        self.pass_time(HEADER_SECONDS + 1)
        wire.write(GOOD)
        self.flush()
        self.assertIn(b" 200 OK", bytes(client.got))

    def test_what_a_connection_without_header_sends_is_bounded(self) -> None:
        self.balance()
        client, wire = self.connect(SIGNATURE + struct.pack("!BBH", 0x21, 0x11, LONGEST - 16))
        for _ in range(LONGEST - 16):
            wire.write(b"\0")
        self.flush()
        wire.write(GOOD)
        self.flush()
        self.assertIn(b" 200 OK", bytes(client.got))
        refused, _ = self.connect(SIGNATURE + struct.pack("!BBH", 0x21, 0x11, LONGEST))
        self.assertTrue(refused.closed)

    def test_a_client_that_half_closes_has_its_answer(self) -> None:
        self.balance()
        client, wire = self.connect(CLIENT_LINE + GOOD[:-2])
        wire.write(GOOD[-2:])
        wire.half_close()
        self.flush()
        self.assertIn(b" 200 OK", bytes(client.got))
        self.assertTrue(client.closed)
        silent, wire = self.connect(CLIENT_LINE[:9])
        wire.half_close()
        self.flush()
        self.assertEqual((b"", True), (bytes(silent.got), silent.closed))

    def test_a_malformed_header_is_one_line_of_log(self) -> None:
        self.balance()
        for data in MALFORMED:
            self.events.clear()
            client, _ = self.connect(data, GOOD)
            self.assertEqual((b"", True), (bytes(client.got), client.closed), data)
            (event,) = [event for event in self.events if event["log_level"] >= LogLevel.warn]
            self.assertEqual((CLIENT, None), (event["once"], event.get("log_failure")))

    def test_a_balancer_speaks_for_itself_under_its_own_address(self) -> None:
        self.balance()
        for data in UNKNOWN:
            client, wire = self.connect(data + GOOD)
            self.assertIn(b" 200 OK", bytes(client.got), data)
            wire.abortConnection()
        self.pass_time(1)
        self.assertEqual(len(UNKNOWN), self.logged().count(f"{CLIENT} GET /v2/"))
