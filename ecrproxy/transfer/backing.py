"""
What a transfer's bytes go to, and are read from: a file, another process's file, or a window in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.threads import Disk
from ecrproxy.transfer.sources import FilePiece

if TYPE_CHECKING:
    from ecrproxy.transfer.follower import Follower

log = Logger()


class Backing:
    """
    The bytes of a transfer, for its readers. What a subclass does not define does nothing.

    @ivar kept: whether the bytes go to the cache, or did when the transfer failed.
    """

    kept = True

    @property
    def resumable(self) -> bool:
        """
        Return True if the next transfer of the blob could continue from these bytes.
        """
        return False

    @property
    def missing(self) -> int:
        """
        Return how many bytes the file still lacks; 0 without a file of this process.
        """
        return 0

    def offers(self, start: int) -> bool:
        """
        Return True if a reader can still begin at C{start}.
        """
        raise NotImplementedError

    def reach(self, offset: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{offset}.
        """
        raise NotImplementedError

    def piece(self, offset: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} of the available bytes at C{offset}.

        @raise LookupError: if they are no longer available.
        """
        raise NotImplementedError

    def hasten(self, reader: Follower) -> None:
        """
        Fetch next what a reader of a part waits for.
        """

    def expect(self) -> None:
        """
        Note that a client has requested a transfer that was begun ahead.
        """

    def progressed(self) -> None:
        """
        Note that a reader has advanced.
        """

    def left(self) -> None:
        """
        Note that a reader has left.
        """

    def abandon(self) -> None:
        """
        End a transfer that has no readers, unless its bytes go to the cache.
        """

    def verify(self) -> None:
        """
        Compare the hash with the digest.

        @raise DigestMismatchError: if they differ.
        """
        raise NotImplementedError

    async def commit(self) -> None:
        """
        Make the verified bytes content, if they go to the cache.
        """

    def fail(self, failure: Failure) -> None:
        """
        Release what other processes wait for: the transfer has failed.
        """
        raise NotImplementedError

    def close(self) -> None:
        """
        Release file and memory. The transfer has ended and has no readers.
        """
        raise NotImplementedError


def close_later(disk: Disk, close: Callable[..., None], *args: object) -> None:
    """
    Close a file or release a claim in a thread.
    """
    disk.closing(close, *args).addErrback(lambda problem: log.failure("Letting a claim go", problem))
