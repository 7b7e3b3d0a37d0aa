"""
A plain connection is closed at once when its client disconnects, unless there is data left to send.
"""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.error import ConnectionDone
from twisted.internet.tcp import Server
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.http.answering import Health, Missing
from ecrproxy.http.site import make_site


class LeavingTests(SynchronousTestCase):
    def setUp(self) -> None:
        reactor = MemoryReactorClock()
        self.site = make_site(Missing(), Health(), reactor)
        connection = socket.socket()  # never connected
        self.addCleanup(connection.close)
        self.channel: Any = self.site.buildProtocol(None)
        port = cast(Any, SimpleNamespace(_realPortNumber=5000))  # for its name in the log
        self.transport: Any = Server(connection, self.channel, ("192.0.2.7", 1), port, 1, cast(Any, reactor))
        self.channel.makeConnection(self.transport)

    def leave(self) -> None:
        """
        Have the client close its side.
        """
        self.transport.readConnectionLost(Failure(ConnectionDone()))

    def test_a_client_that_asked_nothing_is_gone_at_once(self) -> None:
        self.assertEqual(1, self.site.crowd.connected)
        self.leave()
        self.assertEqual((0, False), (self.site.crowd.connected, bool(self.transport.connected)))

    def test_what_was_written_is_sent_first(self) -> None:
        self.transport.write(b"the end of an answer")
        self.leave()
        self.assertEqual(1, self.site.crowd.connected)
        self.assertTrue(self.transport.disconnecting)

    def test_a_request_that_has_begun_to_come_is_refused_as_ever(self) -> None:
        self.channel.dataReceived(b"GET /healthz HTTP/1.1\r\n")
        self.leave()
        self.assertTrue(self.transport.disconnecting)
