"""
What writers of the cache directory have in common.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ecrproxy.cache.cells import File
from ecrproxy.cache.claim import boot_id
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.proofs import Proofs
from ecrproxy.cache.troubles import Troubles

if TYPE_CHECKING:
    from ecrproxy.cache.index import Index
    from ecrproxy.oci import Digest


@dataclass(slots=True)
class Directory:
    """
    A cache directory, and what is known about it.

    @ivar now: returns seconds since the epoch.
    @ivar index: is told of each file.
    @ivar proofs: is told of files that were verified.
    @ivar troubles: is told of disk errors.
    @ivar boot: see L{claim.boot_id}.
    @ivar owners: the users, besides this one, whose files are believed: root, and whoever owns the directory.
    """

    root: Path
    now: Callable[[], float]
    index: Index
    proofs: Proofs
    troubles: Troubles
    boot: bytes = field(default_factory=boot_id)
    owners: set[int] = field(default_factory=lambda: {0})

    def content(self, digest: Digest) -> Path:
        """
        Return the path of the content of C{digest}.
        """
        return self.root / content_path(digest)

    def found(self, digest: Digest) -> File | None:
        """
        Look at a file of content that nothing is known of; its last use is its mtime, if that is not in the future.
        """
        try:
            status = os.lstat(f"{self.root}/{content_path(digest)}")
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return File(digest, status.st_size, max(0.0, min(status.st_mtime, self.now())))

    def is_own(self, status: os.stat_result) -> bool:
        """
        Return False if a file is another user's, who may write to it unseen: through a mapping, or with a forged time.
        """
        if status.st_uid in self.owners or status.st_uid == os.geteuid():  # which twistd --uid changes
            return True
        with contextlib.suppress(OSError):  # it may have been given to another user, or not been readable at the start
            self.owners.add(self.root.stat().st_uid)
        return status.st_uid in self.owners


def without_waiting(path: str, flags: int) -> int:
    """
    Open a file that somebody may have replaced by something else.
    """
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
