"""
Write to plain connections, directly to the socket if nothing is queued.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.tcp import Connection


def has_sent_all(transport: object) -> bool:
    """
    Return True if C{transport} is an open plain socket with an empty write buffer.
    """
    return isinstance(transport, Connection) and not (
        transport.TLS or transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting  # noqa: SLF001
    )


def write(transport: Any, data: bytes, flags: int = 0) -> bool:  # noqa: ANN401
    """
    Send C{data}, directly if nothing is queued: a turn of the event loop costs as much as everything else here.

    @return: True if all bytes have been sent.
    """
    if has_sent_all(transport):
        try:
            sent = transport.socket.send(data, flags)
        except OSError:  # the socket's buffer is full, or the connection has ended: the transport finds out which
            sent = 0
        if sent == len(data):
            return True
        data = data[sent:]
    transport.write(data)
    return False
