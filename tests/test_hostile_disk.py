"""
The disk of C{make hostile} intercepts everything that the cache does with its files.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import ecrproxy

CACHE = Path(ecrproxy.__file__).parent / "cache"
DISK = Path(__file__).parent.parent / "hostile" / "disk" / "sitecustomize.py"
CALL = re.compile(r"\bos\.(preadv?|pwritev?|fsync|fdatasync|ftruncate)\(")


class DiskTests(SynchronousTestCase):
    def test_each_call_that_reads_or_writes_an_open_file_is_disturbed(self) -> None:
        """
        A call that is not intercepted would work on a disk that fails or hangs, and seem to cope.
        """
        used = {name for module in CACHE.glob("*.py") for name in CALL.findall(module.read_text())}
        constants = {
            each.target.id: each.value
            for each in ast.parse(DISK.read_text()).body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None
        }
        disturbed = {name for kind in ("_READERS", "_WRITERS") for name in ast.literal_eval(constants[kind])}
        self.assertLess({"pread", "pwrite"}, used)
        self.assertEqual(set(), used - disturbed)
