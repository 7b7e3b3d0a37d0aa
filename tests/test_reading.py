"""
How much is read at once from a registry or bucket.
"""

from __future__ import annotations

import socket
from typing import Any, cast

from OpenSSL.SSL import Error, WantReadError, ZeroReturnError
from twisted.internet.tcp import Connection
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.connections import StrictClient
from ecrproxy.registry.reading import READ, Records


class Said:
    """
    An OpenSSL connection with a script: records, and the errors in place of one.
    """

    def __init__(self, *said: bytes | Error) -> None:
        self.left = list(said)

    def recv(self, count: int) -> bytes:
        assert count == 2**14
        said = self.left.pop(0) if self.left else WantReadError()
        if isinstance(said, Error):
            raise said
        return said

    def state(self) -> str:
        return "known"


class RecordsTests(SynchronousTestCase):
    def records(self, *said: bytes | Error) -> Any:
        return Records(Said(*said))

    def test_come_together(self) -> None:
        records = self.records(b"a", b"b", b"c")
        self.assertEqual(b"abc", records.recv(2**15))
        self.assertRaises(WantReadError, records.recv, 2**15)
        self.assertRaises(WantReadError, self.records().recv, 2**15)

    def test_are_not_read_without_end(self) -> None:
        """
        No piece is longer than one read from a socket, and a record.
        """
        records = self.records(*[bytes(2**14)] * 100)
        sizes = [len(records.recv(2**15)) for _ in range(3)]
        self.assertEqual([READ] * 3, sizes)

    def test_come_before_what_ends_them(self) -> None:
        """
        A connection that has ended, or failed, returns what came before, and then the end.
        """
        for problem in (ZeroReturnError(), Error([("", "", "bad record mac")])):
            records = self.records(b"a", b"b", problem)
            self.assertEqual(b"ab", records.recv(2**15))
            self.assertIs(problem, self.assertRaises(type(problem), records.recv, 2**15))

    def test_leave_all_else_to_the_connection(self) -> None:
        self.assertEqual("known", self.records().state())


class ReadingTests(SynchronousTestCase):
    def test_connections_of_clients_read_much_at_once(self) -> None:
        unconnected = socket.socket()
        self.addCleanup(unconnected.close)
        client = StrictClient()
        transport = Connection(unconnected, cast(Any, client), cast(Any, MemoryReactorClock()))
        client.makeConnection(transport)
        self.assertEqual(READ, transport.bufferSize)

    def test_other_transports_are_left_as_they_are(self) -> None:
        client, transport = StrictClient(), StringTransport()
        client.makeConnection(transport)
        self.assertFalse(hasattr(transport, "bufferSize"))
