"""
What the cache needs of whoever keeps it within its limit.
"""

from __future__ import annotations

from typing import Protocol

from ecrproxy.cache.record import Reservation


class Room(Protocol):
    """
    Keeps the cache within its limit: see C{janitor.Janitor}.

    @ivar limit: in bytes.
    """

    limit: int

    def fits(self, size: int) -> bool:
        """
        Return True if there is room for C{size} bytes without evicting anything.
        """

    async def can_hold(self, size: int) -> bool:
        """
        Return True if C{size} bytes are within the limit if all else is evicted.
        """

    async def fits_without(self, size: int, seconds: float) -> bool:
        """
        Return True if C{size} bytes fit without evicting files used within the last C{seconds}.

        @raise OSError: if the index can't be read.
        """

    def is_prompt(self, size: int) -> bool:
        """
        Return True if L{make_room} will not have to wait for the index.
        """

    async def reserve(self, what: Reservation, size: int) -> bool:
        """
        Make room as L{make_room} does, and wait briefly for it.

        @raise OSError: if the index fails, or takes too long.
        """

    def make_room(self, what: Reservation, size: int) -> bool:
        """
        Make room for C{size} bytes to arrive, if possible; it is released with that file. May block.

        @raise OSError: if the index fails.
        """
