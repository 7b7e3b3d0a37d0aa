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

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from OpenSSL import SSL
from OpenSSL.SSL import Error as SSLError
from OpenSSL.SSL import WantReadError
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.internet.tcp import Connection
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.access.limits import Patience
from ecrproxy.buffers import AT_ONCE
from ecrproxy.threads import InThread
from ecrproxy.transfer.outgoing import write
from ecrproxy.transfer.page_cache import in_memory
from ecrproxy.transfer.sources import FilePiece, Source

if TYPE_CHECKING:
    from twisted.web.server import Request

PIECE: Final = 2**20
"""Bytes moved at once: larger pieces gain nothing, smaller ones cost processor time."""
LEAST_PIECE: Final = 2**16
"""Smallest piece, in bytes: transports buffer that much anyway."""
TOGETHER: Final = 32 * 2**20
"""Bytes that all responses together may hold in memory, as long as each gets C{LEAST_PIECE}."""
SEAL: Final = (PIECE // 2**14 + 1) * 64
"""Bytes that sealing adds to a piece, up to 64 for each record, unless a client asks for short records."""
READ_AHEAD: Final = 8 * 2**20
"""Bytes that the kernel is told to read ahead."""

_CUT = "the file was cut while it was being sent"


class CutShortError(Exception):
    """
    A file has fewer bytes than when the response began.
    """


def piece_size(under_way: int) -> int:
    """
    Return how many bytes each of C{under_way} responses may hold in memory.
    """
    return max(LEAST_PIECE, min(PIECE, TOGETHER // max(1, under_way)))


def warm_start(fd: int, size: int) -> int:
    """
    Return how many of a file's first bytes are in the page cache, of those that may be sent in one turn.
    """
    return in_memory(fd, 0, min(size, PIECE))


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


@implementer(IPushProducer)
class PieceSending(Sending):
    """
    Sends through memory, a piece at a time: over TLS, and to anything else that is not a plain socket.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread, held: Callable[[], int]) -> None:
        super().__init__(request, source)
        self._in_thread, self._held = in_thread, held
        self._paused = self._reading = False

    def start(self) -> Deferred[None]:
        """
        Begin to send.
        """
        self._source.listen(self._go)
        self._request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)
        self._go()
        return self._ended

    def pauseProducing(self) -> None:
        """
        Pause: the client takes nothing for now.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Resume.
        """
        self._paused = False
        self._go()

    def _go(self) -> None:
        while not (self._paused or self._reading or self._over):
            if self._source.failure is not None:
                self._end(self._source.failure)
            elif self._source.done:
                self._end(None)
            else:
                piece = self._source.piece(self._held())
                if piece is None:
                    return
                if isinstance(piece, bytes):
                    self._write(piece)
                else:
                    self._read(piece)

    def _read(self, piece: FilePiece) -> None:
        fd, offset, count = piece
        self._reading = True
        reading = self._in_thread(self._pread, fd, count, offset)
        reading.addCallbacks(self._have_read, self._failed).addErrback(self._failed)

    def _have_read(self, data: bytes) -> None:
        self._reading = False
        if self._over:
            self._source.close()
            return
        if not data:
            raise CutShortError(_CUT)
        self._write(data)
        self._go()

    def _failed(self, failure: Failure) -> None:
        self._reading = False
        if self._over:
            self._source.close()
        self._end(failure)

    def _write(self, data: bytes) -> None:
        self._request.write(data)  # before source.sent, which may call _go again
        self._source.sent(len(data))

    def _leave(self) -> None:
        if not self._reading:  # a thread that still reads needs the open descriptor
            self._source.close()
        if self._request.channel is not None:  # else the client has gone, and the request with it
            self._request.unregisterProducer()


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
            raise CutShortError(_CUT)
        return sent


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
                raise CutShortError(_CUT)
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
