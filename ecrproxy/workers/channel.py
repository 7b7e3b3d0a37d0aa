"""
The channel between the parent and one worker: length-prefixed messages over an inherited socket pair.

No other process can connect: the socket has no name, and only these two processes have it open.
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
    One end of the channel.

    @param known: the types of messages that the other end may send.
    @ivar heard: called with each message.
    @ivar lost: called when the other end has closed, or has sent something invalid. No messages follow.
    """

    MAX_LENGTH: Final = LIMIT  # type: ignore[misc]
    transport: Any
    heard: Callable[[Any], object] = staticmethod(lambda _: None)
    lost: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, known: Any) -> None:  # noqa: ANN401
        self._known, self._flow = known, _Flow()

    def connectionMade(self) -> None:
        """
        Register for back-pressure, see C{full}.
        """
        self.transport.registerProducer(self._flow, True)  # noqa: FBT003 (Twisted's signature)

    @property
    def full(self) -> bool:
        """
        Return True if more is waiting to be sent than the transport's buffer holds (64 KiB).
        """
        return self._flow.paused

    def tell(self, message: Message) -> None:
        """
        Send a message. Never blocks; a message that is too large is dropped and logged.
        """
        try:
            data = encode(message)
        except ValueError as problem:
            log.error(
                "Message between parent and worker dropped, too large: {problem}",
                problem=problem,
                once="channel",
            )
            return
        if self.connected:
            self.sendString(data)  # type: ignore[no-untyped-call]

    def stringReceived(self, string: bytes) -> None:
        """
        Decode a message and pass it on; an invalid one closes the channel.
        """
        if not self.connected:  # the data also had an invalid message before this one
            return
        try:
            message = decode(string, self._known)
        except ValueError as problem:
            self._break(str(problem))
        else:
            self.heard(message)

    def lengthLimitExceeded(self, length: int) -> None:
        """
        Close the channel: valid messages are shorter.
        """
        self._break(f"a message of {length} bytes")

    def _break(self, problem: str) -> None:
        log.error("Channel between parent and worker closed: invalid message: {problem}", problem=problem)
        self.connected = 0
        self.abort()

    def close(self) -> None:
        """
        Close after everything has been sent.
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
        Call C{lost}.
        """
        self.connected = 0
        self.lost()


@implementer(IPushProducer)
class _Flow:
    """
    Tracks whether the transport has asked to pause.
    """

    paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        """
        Do nothing: C{connectionLost} follows.
        """


class _One(Factory):
    noisy = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def buildProtocol(self, addr: object) -> Channel:  # noqa: ARG002
        return self._channel


def adopt(end: socket.socket, channel: Channel, reactor: Any) -> None:  # noqa: ANN401
    """
    Connect a channel to its end of a socket pair. Closes C{end}: the reactor has its own descriptor.

    @raise OSError: if there is no descriptor left.
    """
    with end:
        end.setblocking(False)  # noqa: FBT003
        reactor.adoptStreamConnection(end.fileno(), socket.AF_UNIX, _One(channel))
