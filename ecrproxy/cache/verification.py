"""
Verify a cached file while it is already being sent to clients.

Rules:

- A file has one verification at a time. It goes on when readers leave: the next one needs the result.
- The file is hashed in steps, each a call in a thread, so that other calls get their turn in between.
- Until the result is known, readers of the whole file wait for their last byte, as with a download. A bad file is
  dropped first, then the readers fail: clients that retry get it from ECR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError

if TYPE_CHECKING:
    from ecrproxy.cache.content import Content
    from ecrproxy.threads import InThread

STEP: Final = 4 * 2**20
"""Bytes hashed by one call."""


class Verification:
    """
    Verifies one file.

    @param content: the file; closed at the end.
    @ivar proved: True if it matches its digest.
    @ivar failure: why it does not match, or could not be read.
    """

    def __init__(self, content: Content, in_thread: InThread) -> None:
        self._content, self._in_thread = content, in_thread
        self.proved = False
        self.failure: Failure | None = None
        self._followers: set[Callable[[], None]] = set()

    @property
    def over(self) -> bool:
        """
        Return True once the result is known.
        """
        return self.proved or self.failure is not None

    def follow(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when the result is known.
        """
        self._followers.add(news)

    def leave(self, news: Callable[[], None]) -> None:
        """
        Stop calling C{news}.
        """
        self._followers.discard(news)

    async def run(self) -> None:
        """
        Verify the file. Never raises: failures go to the followers.
        """
        content = self._content
        try:
            while not await self._in_thread(content.settle, await self._hash()):
                pass  # modified meanwhile
            self.proved = True
        except TimeoutError as problem:  # the disk hangs: nothing is known about the file
            self.failure = Failure(problem)
        except (OSError, DigestMismatchError) as problem:
            with contextlib.suppress(OSError):
                await self._in_thread(content.drop, problem)
            self.failure = Failure(problem)
        except Exception:  # noqa: BLE001 (followers must be notified of any failure)
            self.failure = Failure()
        finally:
            content.close()
            for news in list(self._followers):
                news()

    async def _hash(self) -> Any:  # noqa: ANN401 (hashlib's objects have no public type)
        state, offset = self._content.digest.hasher(), 0
        while count := await self._in_thread(self._content.hash, state, offset, STEP):
            offset += count
        return state
