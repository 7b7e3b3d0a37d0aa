"""
A single process's share of a limit for all processes of the daemon. Pure.

The kernel gives a connection to the process that accepts first: under load within an eighth of an even distribution,
among idle processes up to one to three. So a share is a quarter larger than an even one, and at most the whole limit.
"""

from __future__ import annotations

import math
from typing import Final

SLACK: Final = 1.25


def share(limit: int, processes: int) -> int:
    """
    Return the share of one of C{processes} in C{limit}; 0 (no limit) stays 0.
    """
    return min(limit, math.ceil(limit * SLACK / processes))
