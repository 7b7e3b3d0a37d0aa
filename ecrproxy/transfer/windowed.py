"""
A transfer through a window in memory: the blob is larger than the cache, or the disk is full or has failed.

Rules:

- Bytes come in order, wait for the slowest reader, and stop when the last one leaves.
- The window has C{WINDOW} bytes. Once all transfers hold C{BUFFERED} bytes, it takes one read, and the next when its
  readers have taken that.
- What had reached a file before its disk failed is still read from there.
- Readers that stop for C{STUCK_SECONDS} while others wait for them get a transfer of their own, which continues from
  this one's window and hash. If the bucket serves no ranges, or the size is unknown, or the readers are still in the
  file, their responses are aborted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.access.limits import Patience
from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.threads import Disk
from ecrproxy.transfer.backing import Backing
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.inflow import Blob, Buffered, Inflow, Stretch
from ecrproxy.transfer.lane import Lane
from ecrproxy.transfer.readable import Readable
from ecrproxy.transfer.sources import FilePiece

if TYPE_CHECKING:
    from hashlib import _Hash

log = Logger()

WINDOW: Final = 2**20
"""Bytes held for the readers of a transfer without a file; one read while all transfers hold C{BUFFERED} bytes."""
STUCK_SECONDS: Final = 5
"""Seconds that one reader of a window may keep all others waiting."""


class EarlierFile(Protocol):
    """
    A file that had the first bytes.
    """

    def fileno(self) -> int:
        """Return its descriptor."""


class Windowed(Backing):
    """
    Fetches a blob in order, at the pace of its readers.

    @param buffered: counts the bytes that all transfers hold in memory.
    @param call_later: a reactor's, to time out stuck readers; None to wait for them forever.
    @param split: moves readers to a transfer of their own; returns False if it can't.
    @param file: has the bytes that are readable now; None if there are none.
    @param state: the hash of these bytes.
    """

    kept = False

    def __init__(
        self,
        readable: Readable,
        disk: Disk,
        buffered: Buffered,
        call_later: Callable[..., Any] | None,
        split: Callable[[Windowed, Sequence[Follower]], bool],
        state: _Hash,
        file: EarlierFile | None = None,
    ) -> None:
        self._readable, self._disk, self._buffered, self._call_later = readable, disk, buffered, call_later
        self._split, self._hash, self._file = split, state, file
        self._filed = self._start = readable.received
        self._pieces: deque[bytes] = deque()
        self._blob: Blob | None = None
        self._lane: Lane | None = None
        self._wake: Deferred[None] | None = None
        self._patience = Patience(call_later or _never, STUCK_SECONDS, self._leave_behind)
        self._abandoned = self._failed = False

    # Readers.

    def offers(self, start: int) -> bool:
        """
        Return True if a reader can still begin at C{start}.
        """
        if self._readable.verified:
            return self._file is not None and self._filed == self._readable.size
        if self._abandoned or self._failed:
            return False
        return start >= self._start or (start < self._filed and self._start == self._filed)

    def reach(self, offset: int) -> int:  # noqa: ARG002 (the bytes come in order)
        """
        Return the end of the bytes that have come.
        """
        return self._readable.received

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.
        """
        if self._file is not None and offset < self._filed:
            return self._file.fileno(), offset, min(count, self._filed - offset)
        at = self._start
        for part in self._pieces:
            if at <= offset < at + len(part):
                return part[offset - at : offset - at + count]
            at += len(part)
        raise LookupError(f"byte {offset} of {self._readable.digest} has passed")

    def progressed(self) -> None:
        """
        Drop what every reader has passed.
        """
        readers = self._readable.readers
        needed = [reader.position for reader in readers if reader.needs(self._start)]
        passed = min(needed, default=self._readable.received if readers else self._start)
        trimmed = False
        while self._pieces and self._start + len(self._pieces[0]) <= passed:
            passed_by = len(self._pieces.popleft())
            self._start += passed_by
            self._buffered.size -= passed_by
            trimmed = True
        if trimmed:
            self._stir()

    def left(self) -> None:
        """
        Stop waiting for a reader that has left; end with the last one.
        """
        if not self._readable.verified:
            self.progressed()
            if not self._readable.readers:
                self.abandon()
            self._stir()

    def abandon(self) -> None:
        """
        End the transfer, because it has no readers.
        """
        self._abandoned = True
        if self._lane is not None:
            self._lane.abort(Failure(_unread()))

    # Filling the window.

    async def fetch(self, blob: Blob, first: Stretch | None) -> None:
        """
        Fetch the bytes in order, at the readers' pace.

        @param first: the range requested already, if it begins with the next byte.
        @raise CancelledError: if no reader is left.
        """
        readable, self._blob = self._readable, blob
        inflow = partial(Inflow, self._buffered, WINDOW, self._call_later)
        self._lane = lane = Lane(readable.digest, blob, readable.received, readable.size, first, inflow)
        try:
            await self._room()  # a transfer that was split off begins with a full window
            while batch := await lane.batch():
                await self._disk.digesting(_hash_all, self._hash, batch)
                self._pieces.extend(batch)
                size = sum(map(len, batch))
                del batch  # the window alone holds it
                self._buffered.size += size
                readable.show(readable.received + size)
                self.progressed()
                await self._room()
        except Exception:
            lane.abort()
            raise
        finally:
            self._lane = None

    async def _room(self) -> None:
        """
        Wait for the slowest reader.

        @raise CancelledError: if no reader is left.
        """
        start, readable = -1, self._readable
        while self._is_ahead and readable.readers and not self._abandoned:
            if start != self._start:  # else a reader has come or left, and the others still wait for the same ones
                start = self._start
                self._patience.begin()
            self._wake = Deferred()
            await self._wake
        self._patience.end()
        if self._abandoned or (not readable.readers and readable.received - self._start > WINDOW):
            raise _unread()

    @property
    def _is_ahead(self) -> bool:
        """
        Return True if the window is full: its readers must take some bytes first.

        At the end there is nothing to wait for: a reader of the whole blob gets its last byte after the verification.
        """
        room = 0 if self._buffered.full else WINDOW
        received = self._readable.received
        return received - self._start > room and received != self._readable.size

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.callback(None)

    # Stuck readers.

    def _leave_behind(self) -> None:
        """
        Continue without the readers that block the window, if others wait for them.
        """
        start, first = self._start, self._start + len(self._pieces[0])
        stuck = [each for each in self._readable.readers if each.needs(start) and each.position < first]
        if len(stuck) == len(self._readable.readers):
            self._patience.begin()
            return
        resumable = self._blob is not None and self._blob.ranged and self._readable.size is not None
        apart = [each for each in stuck if resumable and each.position >= start]
        if not apart or not self._split(self, apart):
            apart = []
        said = "A reader of {digest} took nothing for {seconds} s while others waited for it: its response {fate}"
        fate, digest = "goes on apart" if apart else "is aborted", self._readable.digest
        log.info(said, digest=digest, seconds=STUCK_SECONDS, fate=fate, once=digest)
        for each in stuck:
            if each not in apart:
                each.leave_behind(Failure(CancelledError("it kept others waiting")))

    def move(self, readers: Sequence[Follower], other: Windowed) -> None:
        """
        Move readers to another transfer, which continues from a copy of this window and its hash.
        """
        other._pieces, other._start, other._hash = deque(self._pieces), self._start, self._hash.copy()
        held = sum(map(len, self._pieces))
        other._readable.received, self._buffered.size = self._start + held, self._buffered.size + held
        for each in readers:
            del self._readable.readers[each]
            other._readable.readers[each] = None
        self.progressed()
        self._stir()

    # Ending.

    def verify(self) -> None:
        """
        Compare the hash with the digest.

        @raise DigestMismatchError: if they differ.
        """
        if self._hash.hexdigest() != self._readable.digest.hex:
            raise DigestMismatchError(f"what arrived is not {self._readable.digest}")

    def fail(self, failure: Failure) -> None:  # noqa: ARG002
        """
        Accept no more readers.
        """
        self._failed = True

    def close(self) -> None:
        """
        Drop the window. Whoever opened the file closes it.
        """
        self._file = None
        self._buffered.size -= sum(map(len, self._pieces))
        self._pieces.clear()


def _unread() -> CancelledError:
    return CancelledError("nobody follows, and there is no file to go on for")


def _never(*_: object) -> None:
    """
    Do nothing: stands in for a reactor's C{callLater}.
    """


def _hash_all(state: Any, batch: Sequence[bytes]) -> None:  # noqa: ANN401 (hashlib's objects have no public type)
    for data in batch:
        state.update(data)
