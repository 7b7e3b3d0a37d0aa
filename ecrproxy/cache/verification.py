"""
One cached file held against its digest, while those who asked for it read it already.

Rules:

- Nobody starts it twice, and no reader that leaves ends it: what it finds is of use to the next.
- It goes through the file in steps, each a call of its own, so that other work for the disk has its turn in between.
- Until the verdict every reader of the whole is kept from its last byte, as with a transfer. If the file is bad they
  fail, and it is dropped before they hear of it: who asks again gets it anew.
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
"""Bytes hashed at a time."""


class Verification:
    """
    The verification of one file.

    @param content: the file, to be closed here.
    @ivar proved: whether it is what its digest names.
    @ivar failure: why it isn't.
    """

    def __init__(self, content: Content, in_thread: InThread) -> None:
        self._content, self._in_thread = content, in_thread
        self.proved = False
        self.failure: Failure | None = None
        self._followers: set[Callable[[], None]] = set()

    @property
    def over(self) -> bool:
        """
        Tell whether there is a verdict.
        """
        return self.proved or self.failure is not None

    def follow(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when there is a verdict.
        """
        self._followers.add(news)

    def leave(self, news: Callable[[], None]) -> None:
        """
        Call it no more.
        """
        self._followers.discard(news)

    async def run(self) -> None:
        """
        Come to a verdict. Never raises: those who follow are told.
        """
        content = self._content
        try:
            while not await self._in_thread(content.settle, await self._hash()):
                pass  # somebody has changed it meanwhile
            self.proved = True
        except TimeoutError as problem:  # a disk that hangs says nothing about the file
            self.failure = Failure(problem)
        except (OSError, DigestMismatchError) as problem:
            with contextlib.suppress(OSError):
                await self._in_thread(content.drop, problem)
            self.failure = Failure(problem)
        except Exception:  # noqa: BLE001 (whatever it is, those who follow must be told)
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
