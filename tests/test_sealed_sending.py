"""
Sending to clients over TLS: encrypted in large pieces, at their pace and within their time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Any

from OpenSSL import SSL
from twisted.internet.address import IPv4Address
from twisted.protocols.tls import TLSMemoryBIOFactory

from ecrproxy.access.limits import Limits
from ecrproxy.buffers import AT_ONCE
from ecrproxy.daemon.tls import Certificate
from ecrproxy.transfer.response_body import LEAST_PIECE
from tests.daemon import MIB, DaemonTestCase, noise
from tests.store_contract import scratch
from tests.test_sending import PipeConnection, Reactor
from tests.test_tls import Files, client

CONNECTIONS = 8


class MallInfo(ctypes.Structure):
    """
    The result of glibc's mallinfo2(3).
    """

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


def taken() -> int:
    """
    Return how many bytes of memory are allocated.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


class ShortRecords:
    """
    OpenSSL's connection to a client that has requested records of 512 bytes: RFC 6066, 4.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def send(self, data: memoryview) -> int:
        """
        Encrypt a record.
        """
        return int(self._connection.send(data[:512]))


class SealedTests(DaemonTestCase):
    """
    A TLS client at the other end of a pipe of limited capacity.
    """

    def setUp(self) -> None:
        super().setUp()
        files = Files(scratch(self))
        self.certificate = Certificate(files.key, files.certificate)
        self.data = noise("x", 3 * MIB)
        self.digest = self.standin.push_blob("team/app", self.data)

    def connect(self, *, short: bool = False) -> None:
        """
        Have a client connect, and request the blob.

        @param short: whether it accepts only short records.
        """
        factory = TLSMemoryBIOFactory(self.certificate, False, self.daemon.site, self.clock)
        self.protocol: Any = factory.buildProtocol(IPv4Address("TCP", "192.0.2.7", 31337))
        self.connection = PipeConnection(self.protocol, Reactor())
        self.protocol.makeConnection(self.connection)
        self.addCleanup(self.connection.shut)
        self.client, self.got = client(), bytearray()
        for _ in range(10):
            with contextlib.suppress(SSL.WantReadError):
                self.client.do_handshake()
                break
            self.say()
            self.take()
        if short:
            protocol: Any = self.protocol
            protocol._tlsConnection = ShortRecords(protocol._tlsConnection)  # noqa: SLF001
        self.client.send(f"GET /v2/team/app/blobs/{self.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.say()

    def say(self) -> None:
        """
        Deliver what the client wants to send.
        """
        with contextlib.suppress(SSL.WantReadError):
            self.connection.protocol.dataReceived(self.client.bio_read(2**16))
        self.flush()

    def take(self) -> bool:
        """
        Have the daemon write once, and the client read what the pipe holds; return True if there was anything.
        """
        self.clock.advance(0)  # Twisted's TLS batches small writes until then
        if self.connection.turner.writing:
            self.connection.turn()
        came = self.connection.read()
        if came:
            self.client.bio_write(bytes(self.connection.received))
            self.connection.received.clear()
            with contextlib.suppress(SSL.WantReadError):
                while data := self.client.recv(2**16):
                    self.got += data
        return came

    def take_up_to(self, count: int) -> None:
        """
        Have the client read so many bytes of the blob.
        """
        while len(self.body) < count:
            self.assertTrue(self.take() or self.connection.turner.writing, len(self.got))

    @property
    def body(self) -> bytes:
        """
        Return what the client has of the blob.
        """
        return bytes(self.got).partition(b"\r\n\r\n")[2]

    def take_all(self) -> None:
        """
        Have the client read everything that there is.
        """
        while self.take() or self.connection.turner.writing:
            pass

    def test_sends_a_cached_blob(self) -> None:
        self.get(f"/v2/team/app/blobs/{self.digest}")
        self.connect()
        self.take_all()
        self.assertTrue(self.body == self.data)

    def test_a_client_that_asks_for_short_records_gets_all_of_a_cached_blob(self) -> None:
        """
        Their frames are longer than those of full records; no part of a piece is left behind.
        """
        self.get(f"/v2/team/app/blobs/{self.digest}")
        self.connect(short=True)
        self.take_all()
        self.assertTrue(self.body == self.data)

    def test_a_connection_that_was_sent_a_blob_holds_no_buffer_for_the_next(self) -> None:
        """
        Clients in large fleets keep their connections: thousands of them would hold a gigabyte.
        """
        self.get(f"/v2/team/app/blobs/{self.digest}")
        held, before = [], 0
        for number in range(CONNECTIONS + 1):
            self.connect()
            self.take_all()
            self.assertTrue(self.body == self.data)
            held.append((self.protocol, self.connection))
            del self.client, self.got
            gc.collect()
            if not number:  # the first one allocates what all need
                before = taken()
        self.assertLess((taken() - before) / CONNECTIONS, LEAST_PIECE)
        self.assertEqual(CONNECTIONS + 1, self.daemon.crowd.connected)

    def test_a_client_that_takes_nothing_is_given_up(self) -> None:
        """
        Its timeout restarts with each complete piece that it has read.
        """
        self.get(f"/v2/team/app/blobs/{self.digest}")
        self.connect()
        for pieces in (1, 2):
            self.take_up_to(pieces * AT_ONCE)
            self.pass_time(299)
            self.assertFalse(self.connection.over)
        self.take_up_to(2 * AT_ONCE + AT_ONCE // 2)
        self.pass_time(2)
        self.assertTrue(self.connection.over)
        self.assertEqual((1, 0), (self.daemon.crowd.slow_readers, self.daemon.crowd.transferring))

    def test_what_tls_has_sealed_by_itself_goes_before_what_comes(self) -> None:
        """
        TLS itself answers a key update, for example: each record has its number, and comes in order.
        """
        self.standin.hold(self.digest)
        self.connect()
        self.standin.deliver(self.digest, MIB)
        self.flush()
        self.take_all()
        sealing = self.protocol.getHandle()
        sealing.send(b"by itself")
        self.connection.write(sealing.bio_read(100))
        self.standin.release(self.digest)
        self.flush()
        self.take_all()
        self.assertTrue(self.body == self.data[:MIB] + b"by itself" + self.data[MIB:])

    def test_a_client_that_has_taken_all_is_not_slow(self) -> None:
        """
        While a bucket sends nothing there is nothing to read: the client's timeout is paused.
        """
        self.start(limits=Limits(send_seconds=10))
        self.standin.hold(self.digest)
        self.connect()
        self.standin.deliver(self.digest, MIB)
        self.flush()
        self.take_all()
        self.assertTrue(self.body == self.data[:MIB])
        self.pass_time(20)
        self.assertFalse(self.connection.over)
        self.standin.release(self.digest)
        self.flush()
        self.take_all()
        self.assertTrue(self.body == self.data)
        self.assertEqual(0, self.daemon.crowd.slow_readers)

    def test_a_client_that_says_goodbye_is_gone(self) -> None:
        """
        Go's clients send close_notify when a pull is cancelled, before they close the connection. That is no error.
        """
        self.get(f"/v2/team/app/blobs/{self.digest}")
        self.connect()
        self.take_up_to(MIB)
        self.client.shutdown()
        self.say()
        while self.connection.turner.writing and not self.connection.over:
            self.connection.turn()
            if not self.connection.over:
                self.connection.read()
        self.assertTrue(self.connection.over)
        self.assertEqual(0, self.daemon.crowd.transferring)
