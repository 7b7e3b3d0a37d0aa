"""
Follow a transfer that another process writes, and finish it if that process does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from twisted.logger import Logger

from ecrproxy.blobs.downloads import Downloads
from ecrproxy.blobs.fetches import Fetch, Fetches, Source
from ecrproxy.blobs.parts import check_size, serves
from ecrproxy.byte_ranges import Span
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import Step
from ecrproxy.cache.writer import Writer
from ecrproxy.cached.cache import Cache
from ecrproxy.oci import Route
from ecrproxy.registry.bucket import BlobSource
from ecrproxy.registry.unavailable import is_passed_on_always
from ecrproxy.threads import Disk, on_its_own
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.looks import Looks
from ecrproxy.transfer.peer_backed import PeerDownload

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()


class Peers:
    """
    The transfers of other processes, as the clients of this one read them. The rules are in L{record.next_step}.
    """

    def __init__(
        self,
        fetches: Fetches,
        downloads: Downloads,
        cache: Cache,
        disk: Disk,
        call_later: Callable[..., IDelayedCall],
    ) -> None:
        self._fetches, self._downloads, self._cache = fetches, downloads, cache
        self._disk, self._call_later = disk, call_later
        self._looks = Looks(disk.reading, call_later)

    def follow(
        self, peer: PeerTransfer, fetch: Fetch, route: Route, size: int, parts: Sequence[Span]
    ) -> Download | None:
        """
        Follow another process's transfer; None if it is of another size, or far from the parts that a client wants.

        @param size: in bytes, as ECR has confirmed for the repository.
        """
        buffered = self._downloads.lanes.buffered
        download = PeerDownload(fetch.digest, peer, self._disk, buffered, self._call_later)
        if peer.size != size or not serves(download, parts):
            return None
        download.attendance = self._downloads.unattended.settle
        self._fetches.begin(fetch, download)
        log.info("Another process brings {digest}: following it", digest=fetch.digest)
        on_its_own(self._run(download, peer, fetch, route))
        return download

    async def _run(self, download: PeerDownload, peer: PeerTransfer, fetch: Fetch, route: Route) -> None:
        try:
            await download.to_the_end(self._follow(download, peer, fetch, route))
        finally:
            self._cache.used(download.digest)  # unknown to the writer, which may have read it ahead
            self._downloads.ended(download, fetch)

    async def _follow(self, download: PeerDownload, peer: PeerTransfer, fetch: Fetch, route: Route) -> None:
        digest, step = download.digest, await download.watch(self._looks.at)
        while step is Step.TAKE_OVER:
            try:
                writer = await self._cache.claims.take_over(peer, digest)
            except OSError:
                step = Step.GO_ALONE
                break
            if writer is not None:
                await self._take_over(download, writer, fetch, route)
                return
            step = await download.watch(self._looks.at)  # another process was faster
        if step is Step.GO_ALONE:
            log.info("{digest} goes on alone: the process that brings it gets no further", digest=digest)
            start = await download.go_alone()
            blob = None if start == download.size else await _rest(download, fetch, route, None, start)
            download.split_off = None if blob is None else partial(self._downloads.run_apart, blob)
            await download.run_alone(blob)
        else:
            download.end_beside(step)

    async def _take_over(self, download: PeerDownload, writer: Writer, fetch: Fetch, route: Route) -> None:
        """
        Finish the transfer of a process that has exited, in the same file.
        """
        start, stop = writer.gaps[0]
        log.info("Taking over {digest} at byte {at}: its writer has exited", digest=writer.digest, at=start)
        file = download.continue_in(writer)
        self._downloads.unattended.settle()  # the readers may have left meanwhile
        blob = await _rest(download, fetch, route, stop, start)
        if blob.size is None:
            blob.size = download.size
        check_size(blob, download.size)
        file.lanes = self._downloads.lanes.take(writer.missing if blob.ranged else 0)
        download.split_off = partial(self._downloads.run_apart, blob)
        try:
            await download.fetch(blob)
        finally:
            self._downloads.lanes.give_back(file.lanes)


async def _rest(download: Download, fetch: Fetch, route: Route, stop: int | None, start: int) -> BlobSource:
    """
    Start to fetch what another process left unfinished, from the first registry; if it fails or is slow, another.
    """

    async def ask(source: Source) -> BlobSource:
        return await source[0].blob(source[1], stop, start)

    blob = await fetch.race(route, ask, is_passed_on_always)
    blob.others = download.others
    return blob
