"""
State that the parts of the cache share: the directory, its index, proofs and troubles.
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
    @ivar index: receives each file.
    @ivar proofs: receives files that were verified.
    @ivar troubles: receives disk errors.
    @ivar boot: see L{claim.boot_id}.
    @ivar owners: users other than this one whose files are trusted: root, and the directory's owner.
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
        Look at a file of content that is not in the index. Its last use is its mtime, unless that is in the future.
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
        Return False if a file belongs to another user, who may write to it unnoticed: by mmap, or with a forged mtime.
        """
        if status.st_uid in self.owners or status.st_uid == os.geteuid():  # twistd --uid changes it
            return True
        with contextlib.suppress(OSError):  # the owner may have changed, or was unreadable at the start
            self.owners.add(self.root.stat().st_uid)
        return status.st_uid in self.owners


def without_waiting(path: str, flags: int) -> int:
    """
    Open a path without blocking or following links: somebody may have replaced the file by something else.
    """
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
