"""
Measure a directory's size on disk again and again: C{python -m tests.e2e.weighing DIRECTORY}.

It prints one line of JSON when its standard input ends. It is a process of its own, so that it measures often.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path


def weigh(folder: str | Path, seen: set[tuple[int, int]]) -> int:
    """
    Add up the disk blocks of a directory and all in it, as du(1) does: each file once, whatever its name is.

    What is renamed or removed meanwhile may be counted, or not.
    """
    try:
        total = os.lstat(folder).st_blocks * 512
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return 0
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            total += weigh(entry.path, seen)
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
    return total


def main() -> None:
    """
    Measure until told to stop.
    """
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    most, looks = 0, 0
    while not over.wait(0.005):
        most, looks = max(most, weigh(sys.argv[1], set())), looks + 1
    print(json.dumps({"most": most, "looks": looks}), flush=True)


if __name__ == "__main__":
    main()
