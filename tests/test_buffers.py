"""
Freed memory is returned to the system.
"""

from __future__ import annotations

import os
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.buffers import AT_ONCE, give_memory_back

PIECES = 400


def resident() -> int:
    """
    Return the resident memory of this process, in bytes.
    """
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class GivenBackTests(SynchronousTestCase):
    def test_what_was_freed_between_pieces_that_stay_is_given_back(self) -> None:
        pieces = [(b"x" * (AT_ONCE - number), b"y" * (2000 + number)) for number in range(PIECES)]
        kept, before = [small for _, small in pieces], resident()
        del pieces
        give_memory_back()
        self.assertLess(resident(), before - PIECES * AT_ONCE // 2)
        self.assertEqual(PIECES, len(kept))
