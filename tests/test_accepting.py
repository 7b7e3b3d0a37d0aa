"""
Connections are accepted as long as there are descriptors for them.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon.accepting import RETRY_SECONDS, Gate
from ecrproxy.daemon.process import most_clients


class Listener:
    """
    A listening socket: waiting connections, or the reason why none can be accepted.
    """

    family, type, proto = socket.AF_INET, socket.SOCK_STREAM, 0

    def __init__(self) -> None:
        self.backlog = 0
        self.problem: int | None = None

    def _accept(self) -> tuple[int, Any]:
        if self.problem is not None:
            raise OSError(self.problem, os.strerror(self.problem))
        if not self.backlog:
            raise BlockingIOError(errno.EAGAIN, "none waits")
        self.backlog -= 1
        return socket.socket().detach(), ("192.0.2.7", 1)  # never connected


class Port:
    """
    A port over such a socket, like Twisted's.
    """

    def __init__(self) -> None:
        self.listener = Listener()
        self.socket: Any = self.listener
        self.reading, self.connected, self.disconnecting = True, True, False
        self.tries = 0

    def stopReading(self) -> None:
        self.reading = False

    def startReading(self) -> None:
        self.reading = True

    def turn(self) -> list[socket.socket]:
        """
        Accept like a reactor: whenever a connection waits, unless the port is paused.
        """
        accepted = []
        while self.reading and (self.listener.backlog or self.listener.problem):
            self.tries += 1
            assert self.tries < 1000, "it spins"
            try:
                accepted.append(self.socket.accept()[0])
            except BlockingIOError:
                continue
        return accepted


class GateTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.port, self.other = Clock(), Port(), Port()

    def gate(self, *most: int) -> Gate:
        gate = Gate(self.clock, *most)
        for port in (self.port, self.other):
            gate.guard(port)
        return gate

    def accept(self, port: Port, count: int) -> list[socket.socket]:
        """
        Open so many connections to a port.
        """
        port.listener.backlog += count
        accepted = port.turn()
        for each in accepted:
            self.addCleanup(each.close)
        return accepted

    def warnings(self, events: Sequence[LogEvent]) -> list[LogEvent]:
        return [event for event in events if event["log_level"] is LogLevel.warn]

    def test_no_more_are_accepted_than_there_is_room_for(self) -> None:
        """
        All ports share the limit; the others wait, and are accepted one by one as connections close.
        """
        gate = self.gate(3)
        with capturedLogs() as events:
            inside = self.accept(self.port, 2) + self.accept(self.other, 5)
        self.assertEqual((3, 3, 4), (len(inside), gate.inside, self.other.listener.backlog))
        self.assertEqual((False, False), (self.port.reading, self.other.reading))
        self.assertEqual(["descriptors"], [event["once"] for event in self.warnings(events)])
        inside[0].close()
        self.assertTrue(self.port.reading)
        self.assertEqual(1, len(self.accept(self.other, 0)))
        self.assertEqual((3, 3), (gate.inside, self.other.listener.backlog))

    def test_a_connection_is_counted_until_it_is_closed_once(self) -> None:
        gate = self.gate(3)
        (connection,) = self.accept(self.port, 1)
        connection.close()
        connection.close()
        self.assertEqual(0, gate.inside)

    def test_without_descriptors_accepting_pauses_for_a_second(self) -> None:
        """
        The port does not spin, and tries again at once when a connection closes.
        """
        for problem in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
            self.setUp()
            self.gate()
            (connection,) = self.accept(self.port, 1)
            self.port.listener.problem = problem
            with capturedLogs() as events:
                self.assertEqual([], self.accept(self.port, 1))
            self.assertEqual((False, False, 2), (self.port.reading, self.other.reading, self.port.tries))
            self.assertEqual(1, len(self.warnings(events)))
            self.clock.advance(RETRY_SECONDS)
            self.assertEqual([], self.accept(self.port, 0))
            self.assertEqual(3, self.port.tries)
            self.port.listener.problem = None
            connection.close()
            self.assertEqual(1, len(self.accept(self.port, 0)))
            self.assertEqual([], self.clock.getDelayedCalls())

    def test_other_errors_are_the_ports(self) -> None:
        self.gate()
        self.port.listener.problem = errno.ECONNABORTED
        self.assertRaises(ConnectionAbortedError, self.port.socket.accept)
        self.assertTrue(self.port.reading)

    def test_a_port_that_was_closed_is_not_resumed(self) -> None:
        self.gate(1)
        (connection,) = self.accept(self.port, 2)
        self.port.disconnecting = True
        connection.close()
        self.assertEqual((False, True), (self.port.reading, self.other.reading))


class RoomTests(SynchronousTestCase):
    def test_descriptors_are_left_for_files_and_upstream(self) -> None:
        self.assertEqual([1, 45, 225, 16304], [most_clients(files) for files in (10, 256, 1024, 65536)])

    def test_an_endless_limit_is_none(self) -> None:
        self.assertGreater(most_clients(-1), 10**9)
