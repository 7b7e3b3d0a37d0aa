"""
A transfer that another process writes: its file is read as far as its record says.

If the other process dies, this one continues in the same file. If it fails or stalls, the rest is fetched off disk.
Readers notice none of this: see L{record.next_step}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, Look, Step, next_step
from ecrproxy.cache.writer import Writer
from ecrproxy.reasons import Reason
from ecrproxy.threads import Disk
from ecrproxy.transfer.backing import Backing, close_later
from ecrproxy.transfer.download import Download, starting_at
from ecrproxy.transfer.file_backed import FileBacked
from ecrproxy.transfer.gaps import SMALLEST_PART, Urgency
from ecrproxy.transfer.inflow import Blob, Buffered
from ecrproxy.transfer.readable import Readable
from ecrproxy.transfer.sources import FilePiece
from ecrproxy.transfer.windowed import Windowed

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

_STEP: Final = 4 * 2**20
"""Bytes of another process's file to hash per thread call."""


class PeerBacked(Backing):
    """
    Shows readers what another process writes.
    """

    def __init__(self, peer: PeerTransfer, readable: Readable, disk: Disk) -> None:
        self._peer, self._readable, self._disk = peer, readable, disk
        self._file: PeerTransfer | None = peer
        self._failed = False

    def nears(self, start: int) -> bool:
        """
        Return True if the byte at C{start} has arrived or is about to. The other process can't be told to hurry.
        """
        return start < self._peer.reach(start) or start <= self._peer.reach(0) + SMALLEST_PART

    def offers(self, start: int) -> bool:  # noqa: ARG002 (all bytes from the first one on come)
        """
        Return True until the transfer has failed, or has ended without readers.
        """
        return self._file is not None and not self._failed

    def reach(self, offset: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{offset}.
        """
        received = self._readable.received
        return received if self._failed else max(received, self._peer.reach(offset))

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.
        """
        if self._file is None or self._failed:
            raise LookupError(f"byte {offset} of {self._readable.digest} has passed")
        return self._file.fileno(), offset, count

    async def watch(self, look_at: Callable[[PeerTransfer], Deferred[Look]]) -> Step | None:
        """
        Show what the other process brings, until there is something else to do; none if there are no readers.

        @param look_at: takes the next look: see L{looks}.
        """
        peer, readable, idle = self._peer, self._readable, 0.0
        last = peer.record
        while readable.readers or not readable.attended:
            try:
                look = await look_at(peer)
            except OSError:
                return Step.GO_ALONE
            idle += POLL_SECONDS
            if last is None or (look.record is not None and look.record.is_progress_since(last)):
                last, idle = look.record, 0.0
            step = next_step(look, idle)
            readable.received = peer.reach(0)
            if step is not Step.WAIT:
                return step
            if look.moved:
                readable.tell()
        return None

    async def hashed(self) -> tuple[Any, int, PeerTransfer | None]:
        """
        Hash the contiguous bytes from the start. If the disk can't be read, everything has to be fetched.

        @return: the hash, the number of these bytes, and the file that has them.
        """
        state = self._readable.digest.hasher()
        offset, end = 0, self._peer.reach(0)
        try:
            while offset < end:
                offset += await self._disk.hashing(self._peer.hash, state, offset, min(_STEP, end - offset))
        except OSError:
            state, offset = self._readable.digest.hasher(), 0
        return state, offset, self._file

    def verify(self) -> None:
        """
        Do nothing: the other process has verified the file.
        """

    def fail(self, failure: Failure) -> None:  # noqa: ARG002
        """
        Accept no more readers.
        """
        self._failed = True

    def close(self) -> None:
        """
        Close the file. It stays open after another backing took over: it may still be sent.
        """
        file, self._file = self._file, None
        if file is not None:
            close_later(self._disk, self._peer.close)


class PeerDownload(Download):
    """
    A transfer that another process has begun, and that this one may have to finish.
    """

    def __init__(
        self, digest: Digest, peer: PeerTransfer, disk: Disk, buffered: Buffered, call_later: Callable[..., Any]
    ) -> None:
        super().__init__(digest, peer.size, None, disk, buffered=buffered, call_later=call_later)
        self._peer = self._backing = PeerBacked(peer, self._readable, disk)

    @property
    def elsewhere(self) -> bool:
        """
        Return True while the other process fetches the blob.
        """
        return self._backing is self._peer and self.failure is None

    def nears(self, start: int) -> bool:
        """
        Return True if the byte at C{start} has arrived or is about to, or can be fetched next.
        """
        return self._backing is not self._peer or self._peer.nears(start)

    async def watch(self, look_at: Callable[[PeerTransfer], Deferred[Look]]) -> Step | None:
        """
        Show what the other process brings, until there is something else to do; none if there are no readers.

        @param look_at: takes the next look: see L{looks}.
        """
        return await self._peer.watch(look_at)

    def end_beside(self, step: Step | None) -> None:
        """
        End along with the other process's transfer, which is verified or has failed for good.
        """
        if step is Step.FAIL:
            raise DigestMismatchError(f"what arrived is not {self.digest}")
        if step is Step.FINISH:
            self._readable.verified = True
            self._readable.show(self.size or 0)

    def continue_in(self, writer: Writer) -> FileBacked:
        """
        Continue in the file, whose process has exited. Bytes that readers could see stay visible.
        """
        backing = self._in_file(writer, 1, Urgency.NOBODY)
        self._change_to(backing)
        return backing

    async def go_alone(self) -> int:
        """
        Continue without the file. Its contiguous bytes from the start are still read from there.

        @return: the offset from which the rest has to be fetched.
        """
        state, offset, file = await self._peer.hashed()
        self.unkept, self._readable.received = Reason.PASSED, offset
        self._change_to(self._in_window(state, file))
        return offset

    async def run_alone(self, blob: Blob | None) -> None:
        """
        Fetch what is missing, in order, through the window.

        @param blob: none if nothing is missing.
        """
        if blob is not None and isinstance(self._backing, Windowed):
            self._blob = blob
            await self._backing.fetch(blob, starting_at(self.received, blob))
        await self._finish()
