"""
Find the file system of a directory in Linux's mount table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FAR: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "fuse"})
"""C{fuse} is the type of a program that does not name itself, such as bindfs."""
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """
    A mounted file system.
    """

    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_far(self) -> bool:
        """
        Return True if another machine or a program serves it: locks and shared memory may not work there.
        """
        return self.kind in _FAR or (self.kind.startswith("fuse.") and self.kind != "fuse.overlayfs")


def mountinfo() -> str:
    """
    Read the mount table. Empty if there is none.
    """
    try:
        return Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return ""


def find_mount(mountinfo: str, path: str) -> Mount | None:
    """
    Find the mount of a path: see proc(5), /proc/pid/mountinfo.
    """
    found = None
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        words, rest = before.split(" "), after.split(" ")
        if not dash or len(words) < 6 or len(rest) < 3:  # noqa: PLR2004
            continue
        point = _ESCAPE.sub(lambda octal: chr(int(octal[1], 8)), words[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of several mounts on one another, the last is visible.
        if inside and (found is None or len(point) >= len(found.point)):
            found = Mount(point, rest[0], frozenset(words[5].split(",")) | frozenset(rest[2].split(",")))
    return found
