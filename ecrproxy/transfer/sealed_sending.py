"""
Send a body over TLS, sealed in large pieces.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from OpenSSL import SSL
from OpenSSL.SSL import WantReadError
from twisted.internet.tcp import Connection
from twisted.protocols.tls import TLSMemoryBIOProtocol

from ecrproxy.buffers import AT_ONCE
from ecrproxy.threads import InThread
from ecrproxy.transfer.outgoing import write
from ecrproxy.transfer.response_body import LEAST_PIECE, PIECE, CutShortError
from ecrproxy.transfer.slot_sending import SlotSending
from ecrproxy.transfer.sources import Source

if TYPE_CHECKING:
    from twisted.web.server import Request

SEAL: Final = (PIECE // 2**14 + 1) * 64
"""Bytes that sealing adds to a piece, up to 64 for each record, unless a client asks for short records."""


class SealedSending(SlotSending):
    """
    Seal large pieces for a TLS connection at once, and write them directly to its socket.

    Twisted's TLS takes 16 KiB at a time and copies each several more times: a third of all work.
    """

    _scratch = mmap.mmap(-1, AT_ONCE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    """
    Buffer between the file and OpenSSL, which takes the bytes at once: one for all connections.

    It is page-aligned, like the bytes in the file: otherwise some processors copy at a fifth of the speed.
    """

    def __init__(
        self,
        request: Request,
        source: Source,
        in_thread: InThread,
        tls: TLSMemoryBIOProtocol,
        held: Callable[[], int],
    ) -> None:
        super().__init__(request, source, in_thread, cast(Connection, tls.transport))
        self._tls: Any = tls
        self._held, self._sealed_much = held, False

    def _most(self) -> int:
        return self._held()

    def _take_slot(self) -> None:
        self._tls._aggregator.flush()  # noqa: SLF001 (it holds the headers; there is no public way to send them)
        self._tls.unregisterProducer()

    def _give_slot_back(self) -> None:
        self._tls.registerProducer(self._channel, True)  # noqa: FBT003

    def _leave(self) -> None:
        if self._sealed_much:
            renew_buffer(self._tls._tlsConnection)  # noqa: SLF001
        super()._leave()

    def _send_bytes(self, data: bytes) -> int:
        self._seal(memoryview(data))
        return len(data)

    def _send_file(self, fd: int, offset: int, count: int) -> int:
        done, goes_on = 0, True
        while goes_on and done < count:
            read = os.preadv(fd, [memoryview(self._scratch)[: count - done]], offset + done)
            if not read:
                raise CutShortError
            goes_on = self._seal(memoryview(self._scratch)[:read])
            done += read
        return done

    def _seal(self, data: memoryview) -> bool:
        """
        Seal and send bytes; return True if the client has taken all.
        """
        connection = self._tls._tlsConnection  # noqa: SLF001
        size, left = len(data), data
        self._sealed_much = self._sealed_much or size > LEAST_PIECE
        while left:  # OpenSSL may be set to take one record at a time
            left = left[connection.send(left) :]
        return write(self._transport, self._take_sealed(size + SEAL))

    def _take_sealed(self, expected: int) -> bytes:
        """
        Take everything that OpenSSL has sealed: more than C{expected} if the client asked for short records.
        """
        connection = self._tls._tlsConnection  # noqa: SLF001
        sealed: bytes = connection.bio_read(expected)
        if len(sealed) < expected:
            return sealed
        taken = [sealed]
        with contextlib.suppress(WantReadError):
            while True:
                taken.append(connection.bio_read(LEAST_PIECE))
        return b"".join(taken)


def renew_buffer(connection: object) -> None:
    """
    Give OpenSSL a new output buffer if the current one is empty.

    The buffer never shrinks: a connection that was sent one blob would hold 330 KB until the client closes it.
    pyOpenSSL has no call for that; if its internals change, the buffer stays.
    """
    if type(connection) is not SSL.Connection:
        return
    with contextlib.suppress(AttributeError):
        lib, ffi = SSL._lib, SSL._ffi  # type: ignore[attr-defined]  # noqa: SLF001
        if connection._from_ssl is None or lib.BIO_get_mem_data(connection._from_ssl, ffi.NULL):  # noqa: SLF001
            return
        buffer = lib.BIO_new(lib.BIO_s_mem())
        if buffer != ffi.NULL:
            lib.SSL_set_bio(connection._ssl, connection._into_ssl, buffer)  # noqa: SLF001 (the old one is freed)
            connection._from_ssl = buffer  # noqa: SLF001
