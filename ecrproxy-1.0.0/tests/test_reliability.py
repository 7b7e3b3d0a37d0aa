"""
docs/reliability.rst promises nothing that no test holds.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "reliability.rst"
# A row of a list-table is three items; the last names tests, each in double backquotes.
ROW = re.compile(r"^   \* - (.+?)\n     - (.+?)\n     - (.+?)(?=\n   \*|\n\n|\Z)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"``([^`]+)``")


def rows() -> list[tuple[str, str, list[str]]]:
    """
    Read the page's tables: fault, promise, the names of tests.
    """
    found = ROW.findall(PAGE.read_text("utf-8"))
    return [(fault, promise, NAME.findall(tests)) for fault, promise, tests in found if fault != "fault"]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """
    Name what a module of tests defines: functions, classes, and Class.method.
    """
    tree = ast.parse(path.read_text("utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return frozenset(found)


def exists(name: str) -> bool:
    """
    Tell whether there is a test, or a module of tests, of this name.
    """
    if "::" in name:
        file, _, inner = name.partition("::")
        inner = inner.partition("[")[0].replace("::", ".")
        return (CHECKOUT / file).is_file() and inner in names_in(CHECKOUT / file)
    found = re.fullmatch(r"(tests(?:\.[a-z_0-9]+)+)\.?(.*)", name)
    if found is None:
        return False
    path = CHECKOUT / (found[1].replace(".", "/") + ".py")
    return path.is_file() and (not found[2] or found[2] in names_in(path))


class ReliabilityTests(SynchronousTestCase):
    """
    The page of promises.
    """

    def test_each_promise_names_tests_that_exist(self) -> None:
        """
        A reader can look up what holds a promise.
        """
        wrong = [(fault, name) for fault, _, names in rows() for name in names or ["none"] if not exists(name)]
        self.assertEqual([], wrong)
        self.assertGreater(len(rows()), 2)
