"""
Send the bytes of a source, finished or still arriving, to a client at the client's own pace.

Rules:

- To a plain socket, the kernel moves the bytes; they never come into Python. Over TLS, they are sealed in large pieces.
  Any other transport gets pieces that are read in threads. At most one piece per client is held in memory; the more
  responses are in flight, the smaller it is.
- Only threads wait for a disk: what the kernel doesn't have in memory is read there first.
- It sends only when the client can take more. Once it has caught up with a growing source, it costs nothing until the
  source has news.
- A client that takes nothing for too long is disconnected. Time spent waiting for the source or a disk does not count.
- If a source fails, or a file is shorter than it was, the connection is aborted: a truncated response must never look
  complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.internet.tcp import Connection
from twisted.protocols.tls import BufferingTLSTransport

from ecrproxy.threads import InThread
from ecrproxy.transfer.piece_sending import PieceSending
from ecrproxy.transfer.response_body import LEAST_PIECE, PIECE
from ecrproxy.transfer.sealed_sending import SealedSending
from ecrproxy.transfer.slot_sending import KernelSending
from ecrproxy.transfer.sources import Source

if TYPE_CHECKING:
    from twisted.web.server import Request

TOGETHER: Final = 32 * 2**20
"""Bytes that all responses together may hold in memory, as long as each gets C{LEAST_PIECE}."""


def piece_size(under_way: int) -> int:
    """
    Return how many bytes each of C{under_way} responses may hold in memory.
    """
    return max(LEAST_PIECE, min(PIECE, TOGETHER // max(1, under_way)))


def send(
    request: Request, source: Source, in_thread: InThread, held: Callable[[], int] = lambda: PIECE
) -> Deferred[None]:
    """
    Send C{source} as the rest of the response, whose headers have a length or are still to be written.

    @param held: returns how many bytes the response may hold in memory; see L{piece_size}.
    @return: fires when all bytes were handed to the transport, fails if they never will be. Cancelling it stops
        sending.
    """
    transport = request.channel.transport
    direct = request.startedWriting and not request.chunked
    if direct and isinstance(transport, Connection) and not transport.TLS:
        return KernelSending(request, source, in_thread, transport).start()
    if direct and isinstance(transport, BufferingTLSTransport) and isinstance(transport.transport, Connection):
        return SealedSending(request, source, in_thread, transport, held).start()
    return PieceSending(request, source, in_thread, held).start()
