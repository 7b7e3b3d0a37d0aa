"""
Tell what is from before a purge.

If a purge is noticed while ECR is asked, or the disk is read or written, the result may be from before the purge: it is
neither held in memory nor written.
"""

from __future__ import annotations


class PurgeCount:
    """
    The number of purges that this process has noticed.

    Whoever asks or reads anything remembers the number, as C{since}.
    """

    def __init__(self) -> None:
        self.number = 0

    def is_current(self, since: int) -> bool:
        """
        Return True if no purge has been noticed since the number was C{since}. Any thread may ask.
        """
        return since == self.number
