"""
Reads more at once from registries and buckets.

Twisted reads at most 64 KiB from a socket, and delivers data over TLS record by record, in 16 KiB. The cost
per piece in parser, download and file does not depend on its size.
"""

from __future__ import annotations

from typing import Any, Final

from OpenSSL.SSL import Error
from twisted.internet.tcp import Connection
from twisted.protocols.tls import TLSMemoryBIOProtocol

READ: Final = 192 * 2**10
"""Bytes to read at once: from 256 KiB on, each read would allocate memory from the system."""
_RECORD: Final = 2**14


def read_more(transport: Any) -> None:  # noqa: ANN401
    """
    Make a connection read up to C{READ} bytes at once.
    """
    while isinstance(transport, TLSMemoryBIOProtocol):
        tls: Any = transport
        tls._tlsConnection = Records(tls._tlsConnection)  # noqa: SLF001 (there is no public way)
        transport = tls.transport
    if isinstance(transport, Connection):
        transport.bufferSize = READ


class Records:
    """
    An OpenSSL connection that returns several records at once.
    """

    def __init__(self, connection: Any) -> None:  # noqa: ANN401
        self._connection = connection
        self._problem: Error | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._connection, name)

    def recv(self, _: int) -> bytes:
        """
        Return the available data, up to C{READ} bytes, however few are requested.

        @raise Error: OpenSSL's, instead of another record: at once if there is no data before it, otherwise the next
            time.
        """
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        records, size = list[bytes](), 0
        try:
            while size < READ:
                records.append(self._connection.recv(_RECORD))
                size += len(records[-1])
        except Error as said:
            if not records:
                raise
            self._problem = said
        return b"".join(records)
