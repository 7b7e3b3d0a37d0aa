"""
The verifications of files in progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from twisted.internet.defer import Deferred

from ecrproxy.cache.content import Content
from ecrproxy.cache.verification import Verification
from ecrproxy.oci import Digest
from ecrproxy.ordering import Places
from ecrproxy.threads import InThread, on_its_own

T = TypeVar("T")

VERIFICATIONS: Final = 4
"""Maximum number of hashing steps at the same time."""


class Verifications:
    """
    One verification for each file.

    @param hashing: runs one step of a verification in a thread.
    """

    def __init__(self, hashing: InThread) -> None:
        self._hashing, self._places = hashing, Places(VERIFICATIONS)
        self._running: dict[tuple[Digest, int], Verification] = {}

    def of(self, content: Content) -> Verification:
        """
        Return the one verification of a file. Start it if it is not running.
        """
        file = (content.digest, content.status.st_ino)
        verification = self._running.get(file)
        if verification is None:
            verification = self._running[file] = Verification(content.share(), self._hash_in_turn)
            on_its_own(self._run(file, verification))
        return verification

    async def is_good(self, content: Content) -> bool:
        """
        Verify a file, and return True if it matches its digest.

        @raise TimeoutError: if the disk does not answer.
        """
        verification, verdict = self.of(content), Deferred[None]()

        def news() -> None:
            verdict.callback(None)

        if not verification.over:
            verification.follow(news)
            try:
                await verdict
            finally:
                verification.leave(news)
        if verification.failure is not None and verification.failure.check(TimeoutError):
            verification.failure.raiseException()
        return verification.proved

    async def _run(self, file: tuple[Digest, int], verification: Verification) -> None:
        try:
            await verification.run()
        finally:
            del self._running[file]

    def _hash_in_turn(self, blocking: Callable[..., T], *args: object) -> Deferred[T]:
        """
        Run one step of a verification. All files advance together: so do their readers, each waiting for its own hash.
        """

        async def step() -> T:
            async with self._places.turn():
                return await self._hashing(blocking, *args)

        return Deferred.fromCoroutine(step())
