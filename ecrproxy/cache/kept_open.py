"""
Keep files of content open for a second, so that further requests need no thread to open them.

Rules:

- A file is given out for L{KEPT_SECONDS} after it was opened, then closed, however often it was requested: opening it
  again checks everything. The first request in the second half of that time makes it open again in the background;
  otherwise all requests at the moment of closing would open it.
- Each time, one fstat(2) shows whether the file is unchanged: removing or replacing it reduces its link count, and
  writing leaves an mtime that is not a mark. This never waits for a disk, because the inode of an open file is in
  memory. On network file systems, which may ask another machine, no files are kept.
- The file stays open under its shared lock, as for any reader. Before this process removes a file, it drops it here: a
  file without readers is evicted as if it were closed. To other processes it appears to have been used a second ago.
- Files are closed in a thread: closing the last descriptor of a removed file frees its blocks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ecrproxy.cache.content import Content
    from ecrproxy.oci import Digest
    from ecrproxy.threads import InThread

KEPT_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Kept:
    """
    An open file.

    @ivar since: when it was opened.
    @ivar renewed: True if it is being opened again.
    """

    content: Content
    since: float
    renewed: bool = False


class KeptOpen:
    """
    Open files by digest. All methods but L{drop} are called in the event loop.

    @param limit: maximum number of files.
    @param in_thread: closes them.
    @ivar renew: opens a file again in the background, and keeps it.
    """

    renew: Callable[[Digest], object] = staticmethod(lambda _: None)

    def __init__(self, limit: int, clock: IReactorTime, in_thread: InThread) -> None:
        self._limit, self._clock, self._in_thread = limit, clock, in_thread
        self._lock = threading.Lock()
        self._files: OrderedDict[Digest, _Kept] = OrderedDict()
        self._closing: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._files)

    def keep(self, content: Content) -> None:
        """
        Keep a file that was just opened, if it is verified.
        """
        if not self._limit or not content.is_unchanged():
            return
        with self._lock:
            gone = [self._files.pop(content.digest)] if content.digest in self._files else []
            self._files[content.digest] = _Kept(content.share(), self._clock.seconds())
            if len(self._files) > self._limit:
                gone.append(self._files.popitem(last=False)[1])
        self._close(gone)
        if self._closing is None:
            self._closing = self._clock.callLater(KEPT_SECONDS, self._close_old_ones)

    def get(self, digest: Digest) -> Content | None:
        """
        Return a handle to a file if it is unchanged since it was opened. The caller must close it.
        """
        with self._lock:
            found = self._files.get(digest)
            if found is None:
                return None
            age = self._clock.seconds() - found.since
            given = found.content.share() if age < KEPT_SECONDS and found.content.is_unchanged() else None
            if given is None:
                del self._files[digest]
        if given is None:
            self._close([found])
        elif age >= KEPT_SECONDS / 2 and not found.renewed:
            found.renewed = True
            self.renew(digest)
        return given

    def drop(self, digest: Digest) -> None:
        """
        Close a file that is about to be removed. May be called in any thread.
        """
        with self._lock:
            found = self._files.pop(digest, None)
        if found is not None:
            found.content.close()

    def _close_old_ones(self) -> None:
        """
        Close expired files, the oldest first, and schedule the next call.
        """
        now, gone, self._closing = self._clock.seconds(), [], None
        with self._lock:
            while self._files:
                digest, kept = next(iter(self._files.items()))
                if now - kept.since < KEPT_SECONDS:
                    self._closing = self._clock.callLater(kept.since + KEPT_SECONDS - now, self._close_old_ones)
                    break
                gone.append(self._files.pop(digest))
        self._close(gone)

    def _close(self, gone: Iterable[_Kept]) -> None:
        if gone:
            self._in_thread(_close_all, [each.content for each in gone]).addErrback(lambda _: None)


def _close_all(some: Iterable[Content]) -> None:
    for each in some:
        each.close()
