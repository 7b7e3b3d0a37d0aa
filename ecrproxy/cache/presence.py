"""
Whether a file exists.
"""

from __future__ import annotations

import os
from pathlib import Path


def status_of(path: Path) -> os.stat_result | None:
    """
    Return a file's status; None if that fails.
    """
    try:
        return path.lstat()
    except OSError:
        return None


def is_there(path: Path) -> bool:
    """
    Return True if a file exists, or if that can't be determined.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
