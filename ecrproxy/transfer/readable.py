"""
How far a transfer is, for its readers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecrproxy.transfer.follower import Follower

if TYPE_CHECKING:
    from ecrproxy.oci import Digest


class Readable:
    """
    How much of a blob its readers may read.

    @ivar size: the announced length in bytes, if any.
    @ivar received: number of readable bytes, counted from the first.
    @ivar verified: whether all bytes have arrived and match the digest.
    @ivar readers: ordered by when a part was last taken for each.
    @ivar attended: whether there has been a reader.
    @ivar ahead: whether the transfer was begun before any client request, and none has come yet.
    """

    def __init__(self, digest: Digest, size: int | None) -> None:
        self.digest, self.size = digest, size
        self.received, self.verified = 0, False
        self.attended, self.ahead = False, False
        self.readers: dict[Follower, None] = {}

    def show(self, received: int) -> None:
        """
        Let the readers have the first C{received} bytes.
        """
        self.received = received
        self.tell()

    def tell(self) -> None:
        """
        Tell the readers that something has changed.
        """
        for reader in list(self.readers):
            reader.news()
