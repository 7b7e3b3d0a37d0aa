"""
The transfer of one blob, with any number of readers following it.

Rules:

- A L{Download} runs on its own. Readers neither start it nor end it by leaving.
- The bytes go to a file of the cache (L{file_backed}), or through a window in memory if they can't be kept
  (L{windowed}). A blob that another process fetches is read from its file (L{peer_backed}). A transfer may change from
  one to another; readers do not notice.
- Hashing follows in order. A reader sees a byte once all bytes from the reader's start up to it are written. A reader
  of the whole blob gets its last byte once the digest is verified: no complete response has wrong bytes. A reader of a
  part gets all of it at once: clients that request parts verify by themselves.
- Memory does not depend on the blob's size and the number of readers. A transfer that has ended holds none, even if it
  is still referenced: a failed one is often part of a cycle, through its exception's frames, and the garbage collector
  counts objects, not bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.cache.record import WORTH_RESUMING
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import Disk
from ecrproxy.tracing import Span
from ecrproxy.transfer.backing import Backing
from ecrproxy.transfer.file_backed import DiskError, FileBacked, UnattendedError
from ecrproxy.transfer.follower import Follower
from ecrproxy.transfer.gaps import Urgency
from ecrproxy.transfer.inflow import Blob, Buffered, Stretch
from ecrproxy.transfer.lane import ShortBodyError, drop
from ecrproxy.transfer.readable import Readable
from ecrproxy.transfer.sources import FilePiece
from ecrproxy.transfer.windowed import EarlierFile, Windowed

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

log = Logger()


class Download:
    """
    One transfer of the blob C{digest}.

    @param size: the announced length in bytes, if any.
    @param writer: the file to write; none to keep only a window.
    @param lanes: number of connections.
    @param unkept: why the blob isn't kept, if it isn't; the disk is to blame for a file that is given up.
    @param buffered: counts the bytes that all transfers hold in memory.
    @param urgency: what waits for the range that was requested first.
    @param call_later: a reactor's, to time out stuck readers; none to wait for them forever.
    @ivar attendance: called when the first reader comes or the last has left.
    @ivar split_off: called with a separate transfer for readers that got stuck; the callee has to run it.
    @ivar others: registries whose clients have joined, and their sources of the blob: see L{bucket.Blob}.
    @ivar span: of the transfer, if it is traced.
    @ivar stopped: whether it was stopped because it had no reader.
    @ivar failure: why the transfer failed, if it did.
    """

    def __init__(
        self,
        digest: Digest,
        size: int | None,
        writer: Writer | None,
        disk: Disk,
        lanes: int = 1,
        *,
        unkept: Reason = Reason.DISK,
        buffered: Buffered | None = None,
        urgency: Urgency = Urgency.NOBODY,
        call_later: Callable[..., Any] | None = None,
    ) -> None:
        self.digest, self.size, self.unkept = digest, size, unkept
        self._disk, self._buffered, self._call_later = disk, buffered or Buffered(), call_later
        self._readable = Readable(digest, size)
        self._earlier: list[Backing] = []
        self._backing: Backing
        if writer is not None:
            self._backing = self._in_file(writer, lanes, urgency)
        else:
            self._backing = self._in_window(digest.hasher())
        self._blob: Blob | None = None
        self._running, self.stopped, self._parts_sent = True, False, 0
        self.failure: Failure | None = None
        self.others: dict[Any, Any] = {}
        self.span: Span | None = None
        self.attendance: Callable[[], None] = lambda: None
        self.split_off: Callable[[Download], None] | None = None

    def _in_file(self, writer: Writer, lanes: int, urgency: Urgency) -> FileBacked:
        return FileBacked(writer, self._readable, self._disk, lanes, self._buffered, urgency, self._call_later)

    def _in_window(self, state: Any, file: EarlierFile | None = None) -> Windowed:  # noqa: ANN401 (a hash)
        return Windowed(self._readable, self._disk, self._buffered, self._call_later, self._split, state, file)

    # What it is, and how far.

    @property
    def received(self) -> int:
        """
        Return the number of readable bytes, counted from the first.
        """
        return self._readable.received

    @property
    def verified(self) -> bool:
        """
        Return True if all bytes have arrived and match the digest.
        """
        return self._readable.verified

    @property
    def ahead(self) -> bool:
        """
        Return True if the transfer was begun before any client request, and none has come yet.
        """
        return self._readable.ahead

    @ahead.setter
    def ahead(self, ahead: bool) -> None:
        self._readable.ahead = ahead

    @property
    def kept(self) -> bool:
        """
        Return True if the bytes go to the cache, or did when the transfer failed.
        """
        return self._backing.kept

    @property
    def elsewhere(self) -> bool:
        """
        Return True if another process fetches the blob.
        """
        return False

    @property
    def followers(self) -> int:
        """
        Return the number of readers.
        """
        return len(self._readable.readers)

    @property
    def unattended(self) -> bool:
        """
        Return True if the transfer serves only the cache, and has a file that the next transfer could continue.

        Not so once it is verified: it fetches nothing more, and if it stopped, new readers would wait for the disk.
        """
        resumable = self._backing.resumable and (self.size or 0) >= WORTH_RESUMING
        return self._running and resumable and not (self.verified or self.followers or self.stopped)

    @property
    def missing(self) -> int:
        """
        Return how many bytes the file still lacks; 0 without a file.
        """
        return self._backing.missing

    def offers(self, start: int) -> bool:
        """
        Return True if a reader can still begin at C{start}.
        """
        return not self.stopped and self._backing.offers(start)

    def nears(self, start: int) -> bool:  # noqa: ARG002 (other transfers can't fetch it next)
        """
        Return True if the byte at C{start} has arrived or is about to, or can be fetched next.
        """
        return True

    # Readers.

    def follow(
        self, start: int, stop: int | None, waiting: Stopwatch | None = None, until: int | None = None
    ) -> Follower:
        """
        Read from C{start} up to, not including, C{stop}, as the bytes come.

        @param stop: none for the whole blob, if the size is unknown.
        @param waiting: measures how long the reader waits for bytes.
        @param until: the end of the last part that is fetched along with this one, for a reader of several.
        """
        readable = self._readable
        follower = Follower(self, start, stop, waiting or Stopwatch(lambda: 0.0), until)
        readable.readers[follower] = None
        readable.attended = True
        if readable.ahead:
            readable.ahead = False
            self._backing.expect()
        if follower.partial:
            self._backing.hasten(follower)
        if len(readable.readers) == 1:
            self.attendance()
        return follower

    def reach(self, offset: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{offset}.
        """
        return self._backing.reach(offset)

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.

        @raise LookupError: if they are no longer available.
        """
        return self._backing.piece(offset, count)

    def progressed(self) -> None:
        """
        Record that a reader has advanced.
        """
        self._backing.progressed()

    def left(self, follower: Follower) -> None:
        """
        Record that a reader is done or gone.
        """
        self._readable.readers.pop(follower, None)
        self._parts_sent += follower.partial and follower.done
        self._backing.left()
        self._close_if_idle()
        if not self.followers:
            self.attendance()

    def let_go(self) -> None:
        """
        Record that the client that requested the blob does not read it after all.
        """
        if not self.followers:
            self._readable.attended, self._readable.ahead = True, False
            if self._running:
                self._backing.abandon()
            self.attendance()

    def _news(self) -> None:
        self._readable.tell()
        self._backing.progressed()

    # Running.

    def add_source(self, registry: object, source: object) -> None:
        """
        Add a registry to ask for what the others do not bring, or are slow to: see C{others}.
        """
        if registry not in self.others:
            self.others[registry] = source
            if self._blob is not None:
                self._blob.look_again()

    def stop(self) -> None:
        """
        Stop a transfer without a reader; the next transfer of this digest continues its file.
        """
        if self.unattended and isinstance(self._backing, FileBacked) and self._backing.is_fetching:
            self.stopped = True
            self._backing.stop()

    async def run(self, blob: Blob) -> None:
        """
        Run the transfer to its end. Never raises: followers are told of failures.
        """
        await self.to_the_end(self.fetch(blob))

    async def to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """
        Let C{work} run the transfer to its end. Never raises: followers are told of failures.
        """
        try:
            await work
        except Exception as problem:  # noqa: BLE001 (whatever it is, followers must be told)
            self._fail(Failure(problem))
        finally:
            self._running = False
            self._close_if_idle()

    async def fetch(self, blob: Blob) -> None:
        """
        Fetch what is missing, and verify the blob.
        """
        self._blob = blob
        if isinstance(self._backing, FileBacked):
            await self._fill(self._backing, blob)
        elif isinstance(self._backing, Windowed):
            await self._backing.fetch(blob, None if self.received else starting_at(0, blob))
        await self._finish()

    async def _fill(self, backing: FileBacked, blob: Blob) -> None:
        """
        Fetch into the file; if the disk fails, continue in the window from the last byte that was written and hashed.
        """
        try:
            await backing.fetch(blob)
        except DiskError as problem:
            log.info("{digest} goes on without the cache: {problem}", digest=self.digest, problem=str(problem))
            problem.with_traceback(None)  # its frames, and all that called them, refer back to it
            if backing.given_up:
                return
            state, self._readable.received, file = backing.spill()
            window = self._in_window(state, file)
            self._change_to(window)
        else:
            return
        if self.received != self.size:
            await window.fetch(blob, None)

    def _change_to(self, backing: Backing) -> None:
        """
        Go on with another backing. Readers may still be sent bytes of the earlier one.
        """
        self._earlier.append(self._backing)
        self._backing = backing

    def _split(self, window: Windowed, readers: Sequence[Follower]) -> bool:
        """
        Move stuck readers to a transfer of their own. Return False if nothing would run it.
        """
        if self.split_off is None:
            return False
        split = Download(
            self.digest,
            self.size,
            None,
            self._disk,
            unkept=self.unkept,
            buffered=self._buffered,
            call_later=self._call_later,
        )
        if isinstance(split._backing, Windowed):
            window.move(readers, split._backing)
        for each in readers:
            each.move(split)
        self.split_off(split)
        return True

    # Ending.

    async def _finish(self) -> None:
        if self.size is not None and self.received != self.size:
            raise ShortBodyError(f"{self.received} bytes of {self.digest} came, {self.size} were announced")
        if self.verified:
            return
        self._backing.verify()
        self._readable.verified = True
        self._news()  # before the commit: readers need not wait for the disk
        await self._backing.commit()

    def _fail(self, failure: Failure) -> None:
        self._backing.fail(failure)
        self.failure = failure
        foreseen = failure.check(RegistryError, ShortBodyError, UnattendedError, DigestMismatchError, CancelledError)
        why = str(failure.value) if foreseen else failure.getTraceback()
        if failure.check(UnattendedError):
            log.info("The transfer of {digest} stops: {problem}", digest=self.digest, problem=why)
        else:
            log.warn("The transfer of {digest} failed: {problem}", digest=self.digest, problem=why)
        if failure.check(DigestMismatchError) and self._parts_sent:
            said = "{count} partial responses had bytes of {digest} that may be wrong: clients that verify ask again"
            log.warn(said, count=self._parts_sent, digest=self.digest)
        failure.cleanFailure()  # the failure is kept; without this, so would its frames and all callers' be
        self._news()

    def _close_if_idle(self) -> None:
        """
        Release files and window once the transfer has ended and has no readers.
        """
        if not (self._running or self.followers):
            for each in (self._backing, *self._earlier):
                each.close()


def starting_at(offset: int, blob: Blob) -> Stretch | None:
    """
    Return the first response if it begins at C{offset}; otherwise drop it: it was for a file that can't be continued.
    """
    if blob.first.start == offset:
        return blob.first
    drop(blob.first)
    return None
