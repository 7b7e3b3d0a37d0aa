"""
What all ways to send a response body have in common.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from ecrproxy.transfer.sources import Source

if TYPE_CHECKING:
    from twisted.web.server import Request

PIECE: Final = 2**20
"""Bytes moved at once: larger pieces gain nothing, smaller ones cost processor time."""
LEAST_PIECE: Final = 2**16
"""Smallest piece, in bytes: transports buffer that much anyway."""


class CutShortError(Exception):
    """
    A file has fewer bytes than when the response began.
    """

    def __init__(self) -> None:
        super().__init__("the file was cut while it was being sent")


class Sending:
    """
    One response body on its way to a client.
    """

    def __init__(self, request: Request, source: Source) -> None:
        self._request, self._source = request, source
        self._over = False
        self._ended: Deferred[None] = Deferred(lambda _: self._end(Failure(ConnectionDone())))

    def stopProducing(self) -> None:
        """
        Stop: the client has gone.
        """
        self._end(Failure(ConnectionDone()))

    def _end(self, failure: Failure | None) -> None:
        if self._over:
            return
        self._over = True
        self._leave()
        if not self._ended.called:
            if failure is None:
                self._ended.callback(None)
            else:
                self._ended.errback(failure)

    def _leave(self) -> None:
        """
        Release the source and the transport.
        """
        raise NotImplementedError

    def _pread(self, fd: int, count: int, offset: int) -> bytes:
        """
        Read from a file, unless the response has ended. Called in a thread.
        """
        return b"" if self._over else os.pread(fd, count, offset)
