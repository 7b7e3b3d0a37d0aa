"""
What a plain connection has yet to send, and what goes at once.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.tcp import Connection


def has_sent_all(transport: object) -> bool:
    """
    Tell whether it is a plain socket that stays open, and nothing that was written waits for it.
    """
    return isinstance(transport, Connection) and not (
        transport.TLS or transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting  # noqa: SLF001
    )


def write(transport: Any, data: bytes, flags: int = 0) -> bool:  # noqa: ANN401
    """
    Send C{data}, at once where nothing waits: a turn of the event loop for it costs as much as all else here.

    @return: whether all has been sent.
    """
    if has_sent_all(transport):
        try:
            sent = transport.socket.send(data, flags)
        except OSError:  # it takes none now, or has ended: the transport finds out which
            sent = 0
        if sent == len(data):
            return True
        data = data[sent:]
    transport.write(data)
    return False
