"""
What a plain connection has yet to send.
"""

from __future__ import annotations

from twisted.internet.tcp import Connection


def has_sent_all(transport: object) -> bool:
    """
    Tell whether it is a plain socket that stays open, and nothing that was written waits for it.
    """
    return isinstance(transport, Connection) and not (
        transport.TLS or transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting  # noqa: SLF001
    )
