"""
One process's part of what all processes of the daemon may have together. Pure.

The kernel deals connections out by who accepts first: under load within an eighth of evenly, among idle processes one
to three. A part is therefore a quarter larger than an even one, and never larger than the whole.
"""

from __future__ import annotations

import math
from typing import Final

SLACK: Final = 1.25


def share(limit: int, processes: int) -> int:
    """
    Return the part of one of C{processes} in C{limit}; 0, which is no limit, stays 0.
    """
    return min(limit, math.ceil(limit * SLACK / processes))
