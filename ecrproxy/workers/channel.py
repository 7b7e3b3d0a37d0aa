"""
The channel between the parent and one worker: messages, each with its length before it, over an inherited socket.

Nobody else can come to it: it has no name, and it is open in these two processes alone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.workers.messages import LIMIT, Message, decode, encode

log = Logger()


class Channel(Int32StringReceiver):
    """
    One end of it.

    @param known: the types of messages that the other end may send.
    @ivar heard: told each message.
    @ivar lost: told when the other end has gone, or has said what it never should: nothing more is heard then.
    """

    MAX_LENGTH: Final = LIMIT  # type: ignore[misc]
    transport: Any
    heard: Callable[[Any], object] = staticmethod(lambda _: None)
    lost: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, known: Any) -> None:  # noqa: ANN401
        self._known, self._flow = known, _Flow()

    def connectionMade(self) -> None:
        """
        Learn of what waits to be read by the other end.
        """
        self.transport.registerProducer(self._flow, True)  # noqa: FBT003 (Twisted's signature)

    @property
    def full(self) -> bool:
        """
        Return True if the other end is slow to read what it was told.
        """
        return self._flow.paused

    def tell(self, message: Message) -> None:
        """
        Send a message; one that is too large is left out, and logged.
        """
        try:
            data = encode(message)
        except ValueError as problem:
            log.error("Not told, for it is too large: {problem}", problem=problem, once="channel")
            return
        if self.connected:
            self.sendString(data)  # type: ignore[no-untyped-call]

    def stringReceived(self, string: bytes) -> None:
        """
        Take a message in.
        """
        if not self.connected:  # it came with something that never should have
            return
        try:
            message = decode(string, self._known)
        except ValueError as problem:
            self._break(str(problem))
        else:
            self.heard(message)

    def lengthLimitExceeded(self, length: int) -> None:
        """
        Refuse a message that is too large.
        """
        self._break(f"a message of {length} bytes")

    def _break(self, problem: str) -> None:
        log.error("The channel between parent and worker broke: {problem}", problem=problem)
        self.connected = 0
        self.abort()

    def close(self) -> None:
        """
        Close once all has been sent.
        """
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def abort(self) -> None:
        """
        Close at once.
        """
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: ARG002
        """
        Tell of it.
        """
        self.connected = 0
        self.lost()


@implementer(IPushProducer)
class _Flow:
    """
    Knows whether the other end is slow to read.
    """

    paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        """
        Do nothing: the end of the connection is told by itself.
        """


class _One(Factory):
    noisy = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def buildProtocol(self, addr: object) -> Channel:  # noqa: ARG002
        return self._channel


def adopt(end: socket.socket, channel: Channel, reactor: Any) -> None:  # noqa: ANN401
    """
    Have a channel speak over its end of a pair of sockets, which is closed here: the reactor has its own descriptor.
    """
    with end:
        end.setblocking(False)  # noqa: FBT003
        reactor.adoptStreamConnection(end.fileno(), socket.AF_UNIX, _One(channel))
