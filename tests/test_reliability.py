"""
Each promise of docs/reliability.rst and docs/ecr.rst has a test.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = tuple(CHECKOUT / "docs" / name for name in ("reliability.rst", "ecr.rst"))
# A row of a list-table is three items, or five in ecr.rst; the last names tests, each in double backquotes.
ROW = re.compile(r"^   \* - (.+?(?:\n     - .+?){2,4})(?=\n   \*|\n\n|\Z)", re.MULTILINE | re.DOTALL)
HEAD = "\n   :header-rows: 1\n"
NAME = re.compile(r"``([^`]+)``")


def rows(page: Path) -> list[tuple[str, str, list[str]]]:
    """
    Parse a page's tables: fault or name of a check, promise or fact, the names of tests.
    """
    found = [row.split("\n     - ") for row in ROW.findall(page.read_text("utf-8"))]
    assert {len(row) for row in found} == {5 if page.name == "ecr.rst" else 3}
    return [(row[0], row[1], NAME.findall(row[-1])) for row in found if row[0] not in ("fault", "check")]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """
    Return what a module of tests defines: functions, classes, and Class.method.
    """
    tree = ast.parse(path.read_text("utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return frozenset(found)


def exists(name: str) -> bool:
    """
    Return True if there is a test, or a module of tests, of this name.
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
    The pages of promises.
    """

    def test_each_promise_names_tests_that_exist(self) -> None:
        """
        A reader can look up the test of each promise.
        """
        for page in PAGES:
            found = rows(page)
            wrong = [(fault, name) for fault, _, names in found for name in names or ["none"] if not exists(name)]
            self.assertEqual([], wrong)
            self.assertGreater(len(found), 20)
            self.assertEqual(
                page.read_text("utf-8").count("\n   * - "), len(found) + page.read_text("utf-8").count(HEAD)
            )
