"""
The number of CPU cores that this process may use.

That is the scheduler's affinity mask, limited by the quota of the control group, which containers (C{--cpus},
C{limits.cpu}) and systemd (C{CPUQuota=}) set. Without the limit, cores that can't be used would each get a worker with
memory of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS: Final = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OF_THIS_PROCESS) -> int:
    """
    Return the number of cores, at least one; fractions of a quota are rounded up.

    @param cgroups: where control groups, version 1 or 2, are mounted.
    @param own: the control groups of this process: cgroups(7).
    """
    quotas = [quota for folder in _folders(cgroups, own) if (quota := _quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def _folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """
    Yield the directories of the groups that may limit this process; in a container its own group is the root.
    """
    try:
        lines = own.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        names = controllers.split(",")
        if not controllers or "cpu" in names:
            root = cgroups / controllers if controllers else cgroups
            inner = root / path.lstrip("/")
            yield from (each for each in (inner, *inner.parents) if each.is_relative_to(root))


def _quota(folder: Path) -> float | None:
    """
    Return a group's quota in cores: cpu.max in version 2, cpu.cfs_quota_us and cpu.cfs_period_us in version 1.
    """
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((folder / name).read_text("ascii") for name in names).split())
        except (OSError, ValueError):  # no quota, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
