"""
What all that brings files into the cache directory has in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ecrproxy.cache.claim import boot_id
from ecrproxy.cache.proofs import Proofs
from ecrproxy.cache.troubles import Troubles

if TYPE_CHECKING:
    from ecrproxy.cache.index import Index
    from ecrproxy.oci import Digest


@dataclass(slots=True)
class Directory:
    """
    A cache directory and what is known of it.

    @ivar now: seconds since the epoch.
    @ivar index: counts what is there.
    @ivar proofs: told of what has become content.
    @ivar troubles: told of a disk that fails.
    @ivar boot: boot id of the machine.
    """

    root: Path
    now: Callable[[], float]
    index: Index
    proofs: Proofs
    troubles: Troubles
    boot: bytes = field(default_factory=boot_id)

    def content(self, digest: Digest) -> Path:
        """
        Return the path of the verified file of C{digest}.
        """
        return self.root / content_path(digest)


def content_path(digest: Digest) -> str:
    """
    Name the file of C{digest}, relative to the cache directory.
    """
    return f"content/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"


def arriving_path(digest: Digest) -> str:
    """
    Name the file that C{digest} arrives in, relative to the cache directory.
    """
    return f"arriving/{digest.algorithm}-{digest.hex}"
