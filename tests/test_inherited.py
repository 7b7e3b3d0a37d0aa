"""
The listening sockets that a worker inherits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import ServerFactory
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon import inherited
from ecrproxy.daemon.inherited import VARIABLE, Inherited, inherited_sockets

HANDED = 700
"""The first descriptor of inherited sockets in these tests: nothing else uses such numbers."""


class VariableTests(SynchronousTestCase):
    def test_a_worker_is_told_how_many_sockets_it_has(self) -> None:
        for text, found in (("0", 0), ("12", 12), ("", None), ("x", None), ("-1", None), ("9" * 9, None)):
            self.assertEqual(found, inherited_sockets({VARIABLE: text}), text)
        self.assertIsNone(inherited_sockets({"PATH": "/bin"}))


@dataclass
class AdoptingReactor:
    """
    A reactor of a worker.
    """

    adopted: list[tuple[int, int, Any]] = field(default_factory=list)
    answer: int = 42

    accepted: int = 0
    numberAccepts: int = 0
    socket: socket.socket = field(default_factory=socket.socket)

    def adoptStreamPort(self, fd: int, family: int, factory: Any) -> AdoptingReactor:
        """
        Adopt a socket, and act as its port.
        """
        self.adopted.append((fd, family, factory))
        return self

    def close(self) -> None:
        """
        Close the socket that the port has by now.
        """
        self.socket.close()

    def doRead(self) -> None:
        self.accepted += 1

    def listenTCP(self, *args: Any, **kwargs: Any) -> None:
        """
        Fail: nothing may be bound.
        """
        raise AssertionError("a worker binds nothing")

    listenUNIX = listenTCP


class InheritedTests(SynchronousTestCase):
    """
    A worker's sockets: unbound ones here.
    """

    def inherit(self, *families: int) -> Inherited:
        """
        Put sockets where a worker finds them.
        """
        self.patch(inherited, "SOCKETS_FD", HANDED)
        for number, family in enumerate(families):
            with socket.socket(family) as made:
                os.dup2(made.fileno(), HANDED + number)
            self.addCleanup(self.close, HANDED + number)
        self.reactor = AdoptingReactor()
        self.addCleanup(self.reactor.close)
        return Inherited(self.reactor, len(families))

    def close(self, fd: int) -> None:
        """
        Close the sockets that no endpoint has taken.
        """
        with contextlib.suppress(OSError):
            os.close(fd)

    def open_files(self) -> int:
        """
        Count the descriptors of this process.
        """
        gc.collect()  # leftovers of earlier tests would disappear at any time
        return len(list(Path("/proc/self/fd").iterdir()))

    def test_are_taken_in_order(self) -> None:
        """
        Each endpoint takes the next socket, in the order of the configuration; nothing is bound.

        Unix sockets are real ones: tests/e2e tests them.
        """
        taken = self.inherit(socket.AF_INET6, socket.AF_INET, socket.AF_INET)
        before = self.open_files()
        factories = [ServerFactory() for _ in range(3)]
        texts = ("tcp6:5000", "tcp:5001:interface=127.0.0.1:backlog=9")
        for text, factory in zip(texts, factories, strict=False):
            self.successResultOf(serverFromString(taken, text).listen(factory))
        self.successResultOf(taken.listen(factories[2]))
        families = (socket.AF_INET6, socket.AF_INET, socket.AF_INET)
        expected = [(HANDED + at, families[at], factories[at]) for at in range(3)]
        self.assertEqual(expected, self.reactor.adopted)
        self.assertEqual(before - len(families), self.open_files(), "an adopted port has a descriptor of its own")

    def test_are_closed_once_their_ports_have_descriptors_of_their_own(self) -> None:
        """
        A worker whose parent is gone, and which still sends, keeps no other process from listening there.
        """
        self.inherit(socket.AF_INET).listenTCP(5000, ServerFactory())
        self.assertRaises(OSError, os.fstat, HANDED)

    def test_end_when_the_first_process_shuts_them_down(self) -> None:
        """
        That ends the port, without an error: it accepts nothing more.
        """
        port = self.inherit(socket.AF_INET).listenTCP(5000, ServerFactory())
        with port.socket as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            port.numberAccepts = 100
            self.assertIsNone(port.doRead())
            self.assertEqual(
                (1, 1), (port.accepted, port.numberAccepts), "others are to have a burst's connections too"
            )
            listening.shutdown(socket.SHUT_RDWR)
            self.assertIs(CONNECTION_DONE, port.doRead())
            self.assertEqual(1, port.accepted)
            self.assertRaises(BlockingIOError, port.socket.accept)

    def test_leave_the_rest_to_the_reactor(self) -> None:
        """
        The real reactor has everything else that an endpoint needs.
        """
        self.assertEqual(42, self.inherit().answer)

    def test_that_are_not_there_are_an_error(self) -> None:
        """
        One endpoint more than there are sockets is an error.
        """
        with self.assertRaises(LookupError):
            self.inherit().listen(ServerFactory())
