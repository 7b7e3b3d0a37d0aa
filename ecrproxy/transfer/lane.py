"""
The bytes of a blob from one offset to another, over one connection at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.transfer.inflow import GATHERED, Blob, Buffered, Inflow, Stretch, Urgency

if TYPE_CHECKING:
    from ecrproxy.oci import Digest

log = Logger()

LEAST_GATHERED: Final = 512 * 2**10
"""Parts of fewer bytes are handed out as they come: somebody waits for just these."""
CRUMBS: Final = 1024
"""Bytes that a connection must bring before it breaks off, if the rest is to be asked for at once."""
TRIES: Final = 3
"""How often in a row a lane may break off without having brought a byte; once more for each other who may have them."""


class ShortBodyError(Exception):
    """
    A transfer ended with more or fewer bytes than it had announced.
    """


class Lane:
    """
    Brings the bytes from C{start} to C{stop} in order. After a break it asks for the rest, from its last good byte on.

    @param stop: none for all, where the size is not known; such a lane cannot be resumed.
    @param first: what has been asked for already, from C{start} on.
    @param inflow: makes what takes the bytes of one connection.
    @param reads_on: the end instead of C{stop}, if the bucket turns out to give no parts: it sends all anyway.
    @ivar urgency: who waits for these bytes.
    @ivar reached: the offset behind the last byte that was handed out.
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
        The offset behind the last byte that has arrived.
        """
        return self.reached + (self._inflow.waiting if self._inflow is not None else 0)

    async def batch(self) -> list[bytes]:
        """
        Wait for the next bytes; empty at the end. Asking for more says that the last batch is used up.

        @raise Exception: if the rest can't be had.
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
        self._hang_up()  # a bucket may send more than it was asked for
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
            self._hang_up()  # all that was asked for has come, and there is more to ask for
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
        Hang up after C{problem}; tells whether to try again.
        """
        self._hang_up()
        if self._problem is not None or self.stop is None:
            return False
        if self.reached >= self.stop:
            return True  # cut meanwhile: there is nothing left to try
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
        Leave the rest to other lanes. What has arrived is still handed out.

        @param give_back: told what is left, from where to where, before anything else happens.
        """
        end, self.stop = self.stop or self.arrived, self.arrived
        give_back(self.stop, end)
        if self._inflow is not None:
            self._inflow.refuse()
        elif self._opening is not None:
            self._opening.cancel()

    def abort(self, problem: Failure | None = None) -> None:
        """
        End it; whoever waits for bytes gets C{problem}.
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
    Do without bytes that were asked for.
    """
    inflow = Inflow(Buffered())
    inflow.begin(stretch)
    inflow.abort()
