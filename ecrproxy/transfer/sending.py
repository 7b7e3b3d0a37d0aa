"""
Move the bytes of a source, finished or still arriving, to a client at the client's own pace.

Rules:

- To a plain socket the kernel moves the bytes; they never come into Python. Over TLS they are sealed in large
  pieces. Elsewhere they pass in pieces that are read in threads. One piece at most is held in memory for a client;
  the more responses are under way, the smaller it is.
- Nothing waits for a disk but threads: what the kernel doesn't have in memory is read there first.
- It sends when the client can take more, and only then. Caught up with a source that still grows it
  sends nothing, and costs nothing, until the source has news.
- A client that takes nothing for too long is given up. Waiting for the source, or for a disk, is not its fault.
- A source that fails, or a file that turns out shorter than it was, aborts the connection: a response that
  is cut must never look whole.
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
"""Bytes moved at once: larger gains nothing, smaller costs processor time."""
LEAST_PIECE: Final = 2**16
"""What a transport buffers anyway."""
TOGETHER: Final = 32 * 2**20
"""Bytes that all responses may hold in memory, as long as each of them has its least."""
SEAL: Final = (PIECE // 2**14 + 1) * 64
"""Bytes by which sealing lengthens a piece, unless a client asks for short records: each has a frame of up to 64."""
READ_AHEAD: Final = 8 * 2**20
"""Bytes that the kernel is told of before they are sent."""

_CUT = "the file was cut while it was being sent"


class CutShortError(Exception):
    """
    A file has fewer bytes than it had when the response began.
    """


def piece_size(under_way: int) -> int:
    """
    Choose how many bytes one of C{under_way} responses may hold in memory.
    """
    return max(LEAST_PIECE, min(PIECE, TOGETHER // max(1, under_way)))


def warm_start(fd: int, size: int) -> int:
    """
    Return how many of a file's first bytes the kernel has in memory, of those that may be sent in one turn.
    """
    return in_memory(fd, 0, min(size, PIECE))


def send(
    request: Request, source: Source, in_thread: InThread, held: Callable[[], int] = lambda: PIECE
) -> Deferred[None]:
    """
    Send C{source} as the rest of the response, whose headers have a length or are still to be written.

    @param held: tells how many bytes the response may hold in memory; see L{piece_size}.
    @return: fires when all was handed to the transport, fails if it never will be. Cancelling it ends the sending.
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
        End: the client has gone.
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
        Give back what was taken.
        """
        raise NotImplementedError

    def _pread(self, fd: int, count: int, offset: int) -> bytes:
        """
        Read from a file, unless nobody wants it any more. Called in a thread.
        """
        return b"" if self._over else os.pread(fd, count, offset)


@implementer(IPushProducer)
class PieceSending(Sending):
    """
    Send by way of memory, a piece at a time: over TLS, and whatever else is no plain socket.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread, held: Callable[[], int]) -> None:
        super().__init__(request, source)
        self._in_thread, self._held = in_thread, held
        self._paused = self._reading = False

    def start(self) -> Deferred[None]:
        """
        Send it.
        """
        self._source.listen(self._go)
        self._request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)
        self._go()
        return self._ended

    def pauseProducing(self) -> None:
        """
        Wait: the client takes no more for now.
        """
        self._paused = True

    def resumeProducing(self) -> None:
        """
        Go on.
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
        self._request.write(data)  # before the source hears of it, whose news may lead here again
        self._source.sent(len(data))

    def _leave(self) -> None:
        if not self._reading:  # a thread that still reads must find its descriptor open
            self._source.close()
        if self._request.channel is not None:  # else the client has gone, and the request with it
            self._request.unregisterProducer()


@implementer(IPullProducer)
class SlotSending(Sending):
    """
    Send from the transport's own producer slot.

    HTTPChannel holds that slot otherwise. A pull producer is called there exactly when what was written before has
    left: the headers, at first. It hands over what it has and asks for the next turn with C{startWriting}; caught
    up with a source that grows, it asks for none.
    """

    def __init__(self, request: Request, source: Source, in_thread: InThread, transport: Connection) -> None:
        super().__init__(request, source)
        self._in_thread, self._transport, self._channel = in_thread, transport, request.channel
        self._patience: Patience = cast(Any, request.channel).patience
        self._warm = (0, 0)
        self._begun = self._warming = self._caught_up = False

    def start(self) -> Deferred[None]:
        """
        Send it.
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
        Send what the socket takes, a piece at the most: then others have their turn.
        """
        if self._over or self._warming or not self._begun:
            return
        try:
            self._turn()
        except BlockingIOError:
            self._wait_for_client()
        except SSLError:  # the client said goodbye, or speaks no TLS any more
            self._end(Failure(ConnectionDone()))
        except (OSError, CutShortError):
            self._end(Failure())

    def _more(self) -> None:
        if self._over:
            return
        if self._caught_up:  # nothing is buffered: what came can go at once
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
        Ask for a turn when the client has taken what it was given; for that it has its time.
        """
        self._patience.begin()
        self._transport.startWriting()

    def _warm_part(self, fd: int, offset: int, count: int) -> int:
        """
        Return how many of the bytes the kernel has in memory. If none, a thread reads them, and the turn comes again.

        Each byte is asked about, and once: requests to a disk end in any order, and one in the middle may hang.
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
        Have the kernel read bytes, and begin with those behind them. Called in a thread: either may wait for the disk.
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
        if not self._warming:  # a thread that still reads must find its descriptor open
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
        Tell how many bytes a turn may take.
        """
        return PIECE

    def _send_bytes(self, data: bytes) -> int:
        """
        Send bytes; tells how many.
        """
        raise NotImplementedError

    def _send_file(self, fd: int, offset: int, count: int) -> int:
        """
        Send bytes of a file; tells how many.
        """
        raise NotImplementedError


class KernelSending(SlotSending):
    """
    Have the kernel move the bytes from file to socket: sendfile(2).
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
    Seal large pieces for a TLS connection at once, and hand them to its socket.

    Twisted's TLS takes 16 KiB at a time, and copies each several times more: a third of all work.
    """

    _scratch = mmap.mmap(-1, AT_ONCE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    """
    Holds bytes between the file and OpenSSL, which takes them at once: one for all connections.

    It begins with a page, as what is read does: elsewhere some processors copy at a fifth of the speed.
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
        self._tls._aggregator.flush()  # noqa: SLF001 (the headers wait there; there is no public way to send them)
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
        Seal bytes, and send them; tells whether the client has taken all.
        """
        connection = self._tls._tlsConnection  # noqa: SLF001
        size, left = len(data), data
        self._sealed_much = self._sealed_much or size > LEAST_PIECE
        while left:  # OpenSSL may be set to take a record at a time
            left = left[connection.send(left) :]
        return write(self._transport, self._take_sealed(size + SEAL))

    def _take_sealed(self, expected: int) -> bytes:
        """
        Take from OpenSSL all that it has sealed: more than C{expected} where the client has asked for short records.
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
    Have OpenSSL seal in another buffer from now on, if nothing waits in this one.

    It never gets smaller: a connection that was sent a blob once would have 330 KB until it ends, as long as a client
    likes. pyOpenSSL has no call for that; should its own parts change, the buffer stays.
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
