"""
Files of content that stay open for a second, so that whoever asks meanwhile needs no thread to open them.

Rules:

- A file is given out for L{KEPT_SECONDS} after it was opened, and closed then, however often it was asked for: opening
  it anew looks at all that there is to see. Who asks for it in the second half has it opened anew, once for all: else
  all who ask in the moment when it is closed would open it.
- Each time, one fstat(2) tells whether it is still what it was: who removes a file, or puts another in its place, takes
  a name from it; who writes to it leaves a time that is no mark. It waits for no disk, for an open file's inode is in
  memory. Where another machine is asked for that, nothing is kept.
- It stays open under its shared lock, as for any reader. Who removes it in this process drops it here first: a file
  that nobody reads is evicted as if it were closed. To another process it is one that was used a second ago.
- A file is closed in a thread: the last of those who have a removed file open clears it away.
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
    @ivar renewed: whether it is being opened anew.
    """

    content: Content
    since: float
    renewed: bool = False


class KeptOpen:
    """
    Open files by their digests. All but L{drop} is called in the event loop.

    @param limit: the most files.
    @param in_thread: closes them.
    @ivar renew: opens a file anew, in its own time, and keeps it.
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
        Keep a file that was opened just now, if it is known to be good.
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
        Give a file to be closed by who asks, if it is still what it was when it was opened.
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
        Close those whose time is over: the first in line. The next has its own.
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
