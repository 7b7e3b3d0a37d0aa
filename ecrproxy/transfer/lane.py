"""
A range of a blob, fetched over one connection at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.transfer.gaps import Urgency
from ecrproxy.transfer.inflow import GATHERED, Blob, Buffered, Inflow, Stretch

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

log = Logger()

LEAST_GATHERED: Final = 512 * 2**10
"""Smaller parts, in bytes, are handed out as they come: a client waits for exactly these."""
CRUMBS: Final = 1024
"""Bytes that a connection must bring before it breaks for the lane to request the rest at once."""
TRIES: Final = 3
"""How often in a row a lane may break without having brought a byte; one more for each additional source."""


class ShortBodyError(Exception):
    """
    A transfer ended with more or fewer bytes than announced.
    """


class Lane:
    """
    Fetches the bytes from C{start} to C{stop} in order. After a break, it requests the rest from its last good byte on.

    @param stop: none for the whole blob, if the size is unknown; such a lane cannot be resumed.
    @param first: the range that has been requested already, beginning at C{start}.
    @param inflow: makes the receiver for one connection.
    @param reads_on: the end instead of C{stop} if the bucket serves no ranges: it sends everything anyway.
    @ivar urgency: what waits for these bytes.
    @ivar reached: the offset after the last byte that was handed out.
    """

    def __init__(
        self,
        digest: Digest,
        blob: Blob,
        start: int,
        stop: int | None,
        first: Stretch | None,
        inflow: Callable[[], Inflow],
        *,
        urgency: Urgency = Urgency.NOBODY,
        reads_on: int | None = None,
    ) -> None:
        self.digest, self._blob, self._new_inflow = digest, blob, inflow
        self._gathers = stop is not None and stop - start >= LEAST_GATHERED
        self.reached, self.stop, self.urgency = start, stop, urgency
        self._next, self._announced, self._reads_on = first, stop, reads_on
        self._inflow: Inflow | None = None
        self._opening: Deferred[Stretch] | None = None
        self._brought, self._barren, self._crumbs = 0, 0, False
        self._problem: Failure | None = None

    @property
    def arrived(self) -> int:
        """
        The offset after the last byte that has arrived.
        """
        return self.reached + (self._inflow.waiting if self._inflow is not None else 0)

    async def batch(self) -> list[bytes]:
        """
        Wait for the next bytes; an empty list is the end. Calling again releases the last batch.

        @raise Exception: if the rest can't be fetched.
        """
        while self.stop is None or self.reached < self.stop:
            try:
                if self._problem is not None:
                    self._problem.raiseException()
                if batch := await self._arrivals():
                    return self._take(batch)
            except Exception as problem:
                if not self._may_go_on(problem):
                    raise
            else:
                if self.stop is None:
                    break
        self._hang_up()  # a bucket may send more than was requested
        return []

    async def _arrivals(self) -> list[bytes]:
        if self._inflow is None:
            stretch = self._next or await self._open()
            self._next, self._brought, self._announced = None, 0, stretch.stop
            if self._reads_on is not None and not self._blob.ranged:
                self.stop = self._reads_on
            self._inflow = self._new_inflow()
            self._inflow.begin(stretch)
        gathered = min(self.stop - self.reached, GATHERED) if self._gathers and self.stop is not None else 1
        batch = await self._inflow.batch(gathered)
        if not batch and self.stop is not None and self.reached < self.stop:
            if not self._brought or self._announced is None or self.reached < self._announced:
                raise ShortBodyError(f"the connection ended at byte {self.reached} of {self.digest}")
            self._hang_up()  # the requested range is complete, and there is more to request
        return batch

    async def _open(self) -> Stretch:
        breaks = self._barren or int(self._crumbs)
        self._opening = Deferred.fromCoroutine(self._blob.open(self.reached, self.stop, breaks))
        try:
            return await self._opening
        finally:
            self._opening = None

    def _take(self, batch: list[bytes]) -> list[bytes]:
        size = sum(map(len, batch))
        self._brought += size
        if self.stop is not None and self.reached + size > self.stop:
            batch, size = [b"".join(batch)[: self.stop - self.reached]], self.stop - self.reached
        self.reached += size
        return batch

    def _may_go_on(self, problem: Exception) -> bool:
        """
        Close the connection after C{problem}; return True to try again.
        """
        self._hang_up()
        if self._problem is not None or self.stop is None:
            return False
        if self.reached >= self.stop:
            return True  # cut in the meantime: nothing is left to fetch
        self._barren = 0 if self._brought else self._barren + 1
        self._crumbs, self._brought = 0 < self._brought < CRUMBS, 0
        if self._barren >= TRIES + self._blob.sources - 1 or isinstance(problem, CancelledError):
            return False
        why = str(problem)
        said = "Going on with {digest} at byte {at}: {why}"
        log.info(said, digest=self.digest, at=self.reached, why=why, once=self.digest)
        return True

    def cut(self, give_back: Callable[[int, int], None]) -> None:
        """
        Leave the rest to other lanes. Bytes that have arrived are still handed out.

        @param give_back: called with the start and end of the rest, before anything else happens.
        """
        end, self.stop = self.stop or self.arrived, self.arrived
        give_back(self.stop, end)
        if self._inflow is not None:
            self._inflow.refuse()
        elif self._opening is not None:
            self._opening.cancel()

    def abort(self, problem: Failure | None = None) -> None:
        """
        Stop the lane; a pending C{batch} fails with C{problem}.
        """
        self._problem = self._problem or problem
        self._hang_up(problem)
        if self._opening is not None:
            self._opening.cancel()

    def _hang_up(self, problem: Failure | None = None) -> None:
        inflow, self._inflow = self._inflow, None
        if inflow is not None:
            inflow.abort(problem)
        if self._next is not None:
            drop(self._next)
            self._next = None


def drop(stretch: Stretch) -> None:
    """
    Discard a range that has been requested.
    """
    inflow = Inflow(Buffered())
    inflow.begin(stretch)
    inflow.abort()
