"""
How far a prefetch in the daemon is. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PrefetchProgress:
    """
    The progress of a prefetch.

    @ivar manifests: number of manifests that have been requested.
    @ivar of: bytes of all blobs that are known so far.
    @ivar there: bytes of those that are in the cache.
    @ivar fetched: bytes that were transferred for this.
    @ivar blobs: number of blobs that are in the cache.
    @ivar missing: number of manifests and blobs that failed.
    @ivar problem: why the first of these failed; empty if none has.
    @ivar over: True at the end.
    """

    manifests: int = 0
    of: int = 0
    there: int = 0
    fetched: int = 0
    blobs: int = 0
    missing: int = 0
    problem: str = ""
    over: bool = False


class RunningPrefetch(Protocol):
    """
    A prefetch, here or in another process.
    """

    @property
    def progress(self) -> PrefetchProgress:
        """
        Return the state at the moment.
        """

    def stop(self) -> None:
        """
        Stop: nobody waits for it.
        """
