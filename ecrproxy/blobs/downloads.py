"""
Start downloads, and run them to their end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ecrproxy import tracing
from ecrproxy.blobs.fetches import Fetch, Fetches
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.threads import Disk, on_its_own
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.gaps import Urgency
from ecrproxy.transfer.inflow import Lanes
from ecrproxy.transfer.unattended import Unattended

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall


class Downloads:
    """
    Runs downloads over the connections that are free, and forgets their fetches when they end.

    @param on_end: called when a download ends, with whether it was begun to read ahead.
    @ivar lanes: the connections for blobs.
    @ivar unattended: limits the downloads that continue without readers.
    """

    def __init__(
        self,
        fetches: Fetches,
        disk: Disk,
        lanes: Lanes,
        unattended: Unattended,
        call_later: Callable[..., IDelayedCall],
        on_end: Callable[[Download, bool], None],
    ) -> None:
        self._fetches, self._disk, self._call_later, self._on_end = fetches, disk, call_later, on_end
        self.lanes, self.unattended = lanes, unattended

    def begin(
        self,
        blob: BlobSource,
        digest: Digest,
        file: Writer | Reason,
        *,
        fetch: Fetch | None = None,
        urgency: Urgency = Urgency.NOBODY,
        ahead: bool = False,
    ) -> Download:
        """
        Start a download, into C{file}; or, if that is a reason, through a window.

        @param fetch: the fetch that it serves; None if it is for one client alone.
        @param ahead: whether it is read ahead.
        """
        writer, unkept = (None, file) if isinstance(file, Reason) else (file, Reason.DISK)
        lanes = self.lanes.take(writer.missing if writer is not None and blob.ranged else 0)
        download = Download(
            digest,
            blob.size,
            writer,
            self._disk,
            lanes,
            unkept=unkept,
            buffered=self.lanes.buffered,
            urgency=urgency,
            call_later=self._call_later,
        )
        download.ahead, blob.others = ahead, download.others
        download.span = tracing.child("download", {"ecrproxy.digest": str(digest), "ecrproxy.read_ahead": ahead})
        download.attendance = partial(self._attend, download, blob)
        download.split_off = partial(self.run_apart, blob)
        if fetch is not None:
            self._fetches.begin(fetch, download)
        on_its_own(self._run(download, blob, lanes, fetch, ahead=ahead))
        self.unattended.settle(download)
        return download

    def _attend(self, download: Download, blob: BlobSource) -> None:
        blob.ahead = download.ahead
        self.unattended.settle()

    def run_apart(self, blob: BlobSource, download: Download) -> None:
        """
        Run a download that was split off another one.
        """
        download.split_off = partial(self.run_apart, blob)
        on_its_own(self._run(download, blob, self.lanes.take(0), None))

    async def _run(
        self, download: Download, blob: BlobSource, lanes: int, fetch: Fetch | None, *, ahead: bool = False
    ) -> None:
        if download.span is not None:
            tracing.current.set(download.span)
        try:
            await download.run(blob)
        finally:
            if download.span is not None:
                failed = download.failure is not None
                download.span.end({"ecrproxy.received": download.received, "ecrproxy.lanes": lanes}, failed=failed)
            self.lanes.give_back(lanes)
            self.ended(download, fetch, ahead=ahead)

    def ended(self, download: Download, fetch: Fetch | None, *, ahead: bool = False) -> None:
        """
        Let others have the room of a download that has ended.
        """
        if fetch is not None:
            self._fetches.end(fetch)
        self.unattended.settle()
        self._on_end(download, ahead)
