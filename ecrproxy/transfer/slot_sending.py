"""
Send a body from the producer slot of a plain socket, without copying its bytes into Python.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, cast

from OpenSSL.SSL import Error as SSLError
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPullProducer
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.access.limits import Patience
from ecrproxy.threads import InThread
from ecrproxy.transfer.page_cache import in_memory
from ecrproxy.transfer.response_body import PIECE, CutShortError, Sending
from ecrproxy.transfer.sources import Source

if TYPE_CHECKING:
    from twisted.web.server import Request

READ_AHEAD: Final = 8 * 2**20
"""Bytes that the kernel is told to read ahead."""


@implementer(IPullProducer)
class SlotSending(Sending):
    """
    Sends from the transport's own producer slot.

    HTTPChannel holds that slot otherwise. A pull producer there is called exactly when everything written before has
    left: first the headers. It sends what it has, and requests its next turn with C{startWriting}; once it has caught
    up with a source that still grows, it requests none.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread, transport: Connection) -> None:
        super().__init__(request, source)
        self._in_thread, self._transport, self._channel = in_thread, transport, request.channel
        self._patience: Patience = cast(Any, request.channel).patience
        self._warm = (0, 0)
        self._begun = self._warming = self._caught_up = False

    def start(self) -> Deferred[None]:
        """
        Begin to send.
        """
        self._source.listen(self._more)
        self._take_slot()
        self._transport.registerProducer(self, False)  # noqa: FBT003 (Twisted's signature)
        self._patience.begin()
        self._begun = True  # the call made at registration comes before the headers have left
        self._more()
        return self._ended

    def resumeProducing(self) -> None:
        """
        Send what the socket takes, at most one piece: then other connections have their turn.
        """
        if self._over or self._warming or not self._begun:
            return
        try:
            self._turn()
        except BlockingIOError:
            self._wait_for_client()
        except SSLError:  # the client has closed TLS, or no longer speaks it
            self._end(Failure(ConnectionDone()))
        except (OSError, CutShortError):
            self._end(Failure())

    def _more(self) -> None:
        if self._over:
            return
        if self._caught_up:  # nothing is buffered: the new bytes can go at once
            self._caught_up = False
            self.resumeProducing()
        else:
            self._transport.startWriting()

    def _turn(self) -> None:
        if self._source.failure is not None:
            self._end(self._source.failure)
        elif self._source.done:
            self._end(None)
        elif (piece := self._source.piece(self._most())) is None:
            self._caught_up = True
            self._patience.end()
        elif isinstance(piece, bytes):
            self._handed_over(self._send_bytes(piece))
        elif count := self._warm_part(*piece):
            self._handed_over(self._send_file(*piece[:2], count))

    def _handed_over(self, count: int) -> None:
        self._request.sentLength += count
        self._source.sent(count)
        if not self._over:
            self._wait_for_client()

    def _wait_for_client(self) -> None:
        """
        Ask for a turn when the client has taken the bytes, and start the client's timeout.
        """
        self._patience.begin()
        self._transport.startWriting()

    def _warm_part(self, fd: int, offset: int, count: int) -> int:
        """
        Return how many of the bytes are in the page cache. If none, a thread reads them and then asks for another turn.

        Each byte is looked up once: requests to a disk end in any order, and one in the middle may hang.
        """
        if not self._warm[0] <= offset < self._warm[1]:
            there = in_memory(fd, offset, count)
            if not there:
                self._warming = True
                self._patience.end()
                self._in_thread(self._read_ahead, fd, count, offset).addBoth(self._warmed, (offset, offset + count))
                return 0
            self._warm = (offset, offset + there)
        return min(count, self._warm[1] - offset)

    def _read_ahead(self, fd: int, count: int, offset: int) -> None:
        """
        Read bytes, and have the kernel start on those after them. Called in a thread: either may wait for the disk.
        """
        self._pread(fd, count, offset)
        if not self._over:
            os.posix_fadvise(fd, offset + count, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def _warmed(self, result: object, warm: tuple[int, int]) -> None:
        self._warming = False
        if self._over:
            self._source.close()
        elif isinstance(result, Failure):
            self._end(result)
        else:
            self._warm = warm
            self._wait_for_client()

    def _leave(self) -> None:
        if not self._warming:  # a thread that still reads needs the open descriptor
            self._source.close()
        self._patience.end()
        self._transport.unregisterProducer()
        if self._request.channel is not None:  # else the client has gone
            self._give_slot_back()

    def _take_slot(self) -> None:
        self._transport.unregisterProducer()

    def _give_slot_back(self) -> None:
        self._transport.registerProducer(self._channel, True)  # noqa: FBT003

    def _most(self) -> int:
        """
        Return the maximum number of bytes for one turn.
        """
        return PIECE

    def _send_bytes(self, data: bytes) -> int:
        """
        Send bytes and return how many were sent.
        """
        raise NotImplementedError

    def _send_file(self, fd: int, offset: int, count: int) -> int:
        """
        Take up to C{count} bytes of a file, from C{offset} on, and pass them to the connection.

        @return: how many were taken; over TLS, some may still wait to be written.
        @raise CutShortError: if the file ends earlier.
        """
        raise NotImplementedError


class KernelSending(SlotSending):
    """
    Have the kernel move the bytes from file to socket with sendfile(2).
    """

    def _send_bytes(self, data: bytes) -> int:
        self._transport.write(data)
        return len(data)

    def _send_file(self, fd: int, offset: int, count: int) -> int:
        sent = os.sendfile(self._transport.fileno(), fd, offset, count)
        if not sent:
            raise CutShortError
        return sent


def warm_start(fd: int, size: int) -> int:
    """
    Return how many of a file's first bytes are in the page cache, of those that may be sent in one turn.
    """
    return in_memory(fd, 0, min(size, PIECE))
