"""
Parse README.rst, CONTRIBUTING.rst and docs/: blocks of code, and remarks about running them.

tests/e2e/test_shown_commands.py runs each block of C{console}, each page from top to bottom in one shell. C{$} precedes
a command, C{#} one of root's; the lines below are its output, C{...} standing for anything. A comment
right before a block says what else to know about it::

    .. Not run: needs an AWS account.

    .. Runs on: answers at http://localhost:5000/readyz

The first one gives the reason why a block can't be run here. The second one gives a URL that answers as soon as the
block's
last command, which starts the daemon and may stay in the foreground, has started it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[1]
NOT_RUN: Final = "Not run:"
RUNS_ON: Final = "Runs on: answers at"
_BLOCK: Final = re.compile(r"( *)\.\. (?:code-block|sourcecode|code|highlight)::(?: +(\S+))?$")
_OPTION: Final = re.compile(r"\s*:[a-z-]+:")
_REMARK: Final = re.compile(rf" *\.\. ((?:{NOT_RUN}|{RUNS_ON}).*)")


@dataclass(frozen=True)
class Command:
    """
    One shown command, and the output that the page claims.
    """

    text: str
    prints: Sequence[str]


@dataclass(frozen=True)
class Block:
    """
    A block of code.

    @ivar language: empty for a literal block.
    @ivar remark: the comment before it, if it is one of the kinds above.
    """

    page: Path
    line: int
    language: str
    text: str
    remark: str

    @property
    def place(self) -> str:
        """
        Return page and line, for messages.
        """
        return f"{self.page.relative_to(CHECKOUT)}:{self.line}"

    @property
    def not_run(self) -> str | None:
        """
        Return why it is not run; empty if it is run.
        """
        return self.remark.removeprefix(NOT_RUN).strip() if self.remark.startswith(NOT_RUN) else None

    @property
    def answers_at(self) -> str | None:
        """
        Return the URL at which its command answers while it stays in the foreground.
        """
        return self.remark.removeprefix(RUNS_ON).strip() if self.remark.startswith(RUNS_ON) else None

    def commands(self) -> list[Command]:
        """
        Split a block of C{console} into commands.

        @raise ValueError: if it begins with something else.
        """
        found: list[tuple[list[str], list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith(("$ ", "# ")):
                found.append(([line[2:]], []))
            elif not found:
                raise ValueError(f"{self.place}: no prompt, $ or #, before {line!r}")
            elif found[-1][0][-1].endswith("\\") and not found[-1][1]:
                found[-1][0].append(line)
            else:
                found[-1][1].append(line)
        return [Command("\n".join(text), prints) for text, prints in found]


def pages() -> list[Path]:
    """
    List the documents.
    """
    built = CHECKOUT / "docs" / "_build"
    below = [each for each in sorted((CHECKOUT / "docs").rglob("*.rst")) if built not in each.parents]
    return [CHECKOUT / "README.rst", CHECKOUT / "CONTRIBUTING.rst", *below]


def blocks(page: Path, text: str | None = None) -> Iterator[Block]:
    """
    Find a page's blocks.
    """
    lines = (page.read_text("utf-8") if text is None else text).splitlines()
    remark, at = "", 0
    while at < len(lines):
        line = lines[at]
        directive, comment = _BLOCK.fullmatch(line), _REMARK.match(line)
        literal = line.endswith("::") and not line.lstrip().startswith("..")
        if comment:
            at, more = _indented(lines, at)
            remark = " ".join([comment[1], *(each.strip() for each in more)]).strip()
        elif directive or literal:
            begun = at + 1
            at, body = _indented(lines, at)
            while directive and body and _OPTION.match(body[0]):
                del body[0]
            text = textwrap.dedent("\n".join(body)).strip("\n")
            yield Block(page, begun, (directive and directive[2]) or "", text, remark)
            remark = ""
        else:
            remark = remark if not line.strip() else ""
            at += 1


def _indented(lines: Sequence[str], at: int) -> tuple[int, list[str]]:
    """
    Return the lines below one that are indented further, and where they end.
    """
    margin = len(lines[at]) - len(lines[at].lstrip())
    end = at + 1
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > margin):
        end += 1
    return end, list(lines[at + 1 : end])
