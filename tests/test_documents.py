"""
The code blocks of README.rst and docs/ parse, and their links work.

tests/e2e/test_shown_commands.py runs the commands; `make docs` checks the references.
"""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import yaml
from docutils.core import publish_doctree
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.settings.predecessors import notices
from ecrproxy.settings.table import GROUPS, SETTINGS
from tests.documents import CHECKOUT, Block, blocks, pages

MARKDOWN = [CHECKOUT / "SECURITY.md"]
BY_VARIABLE = {each.variable: each for each in SETTINGS}


def parse_ini(text: str) -> None:
    """
    Parse an environment file, or one with sections as systemd and others have; names may be repeated.
    """
    parser = configparser.RawConfigParser(delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(text if text.lstrip("#; ").startswith("[") or "\n[" in text else f"[settings]\n{text}")
    for section in parser.sections():
        for name, value in parser[section].items():
            if name in BY_VARIABLE:
                BY_VARIABLE[name].parse(value)
            elif name.startswith("PROXY_"):
                raise ValueError(f"no such setting: {name}")


def parse_yaml(text: str) -> None:
    """
    Parse one or more documents.
    """
    list(yaml.safe_load_all(text))


def nothing(text: str) -> None:
    """
    Accept text for people, or text that is checked elsewhere.
    """


PARSERS: dict[str, Callable[[str], object]] = {
    "console": nothing,
    "ini": parse_ini,
    "json": json.loads,
    "promql": nothing,  # tests/e2e/test_metrics.py
    "text": nothing,
    "toml": tomllib.loads,
    "yaml": parse_yaml,
}


def problem(block: Block) -> str | None:
    """
    Return what is wrong with a block, if anything.
    """
    if block.language not in PARSERS:
        return f"in no language of {sorted(PARSERS)}: {block.language!r}; see tests/documents.py"
    try:
        if block.language == "console":
            block.commands()
        PARSERS[block.language](block.text)
    except (ValueError, configparser.Error, yaml.YAMLError) as wrong:
        return str(wrong)
    if block.not_run is not None and len(block.not_run.split()) < 3:
        return f"not run, and no reason is given: {block.not_run!r}"
    return None


def anchors(page: Path) -> set[str]:
    """
    Return the anchors of a page's sections, as GitHub and docutils name them.
    """
    text = page.read_text("utf-8")
    titles = re.findall(r"^(\S.*)\n[=~-]{3,}$", text, re.MULTILINE) + re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-") for each in titles}


def links(page: Path) -> Iterator[str]:
    """
    Return the targets of a page's links to other files here.
    """
    text = page.read_text("utf-8")
    pattern = r"\]\(([^)\s]+)\)" if page.suffix == ".md" else r"`[^`]*<([^`>]+)>`_"
    yield from (each for each in re.findall(pattern, text) if not re.match(r"[a-z]+:", each))


def leads_nowhere(page: Path, link: str) -> bool:
    """
    Return True if there is no such file, or no such section in it.
    """
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


class BlockTests(SynchronousTestCase):
    """
    Blocks of code.
    """

    def test_can_be_read_by_what_they_are_for(self) -> None:
        """
        Each has a known language, parses, and names existing settings; one that is not run says why.
        """
        wrong = [f"{block.place}: {why}" for page in pages() for block in blocks(page) if (why := problem(block))]
        self.assertEqual([], wrong)

    def test_are_found_with_what_is_said_of_them(self) -> None:
        """
        A remark belongs only to the block right below it.
        """
        text = """
.. Not run: needs a cluster
   and more.

.. code-block:: console
   :name: x

   $ first \\
       --more
   printed
   # second

And::

    what it is
"""
        shown, literal = blocks(CHECKOUT / "README.rst", text)
        self.assertEqual("needs a cluster and more.", shown.not_run)
        self.assertEqual(["first \\\n    --more", "second"], [each.text for each in shown.commands()])
        self.assertEqual(["printed"], shown.commands()[0].prints)
        self.assertEqual(("", "what it is", None), (literal.language, literal.text, literal.not_run))
        self.assertIsNotNone(problem(literal))

    def test_that_are_wrong_are_told(self) -> None:
        """
        An unknown setting, an invalid value, a command without a prompt, no reason.
        """
        for language, text in [
            ("ini", "PROXY_PROT=5000"),
            ("ini", "PROXY_PORT=many"),
            ("console", "make demo"),
            ("json", "{"),
            ("bash", "true"),
        ]:
            (block,) = blocks(CHECKOUT / "README.rst", f".. code-block:: {language}\n\n   {text}\n")
            self.assertIsNotNone(problem(block), text)
        (block,) = blocks(CHECKOUT / "README.rst", ".. Not run:\n\n.. code-block:: console\n\n   $ true\n")
        self.assertIsNotNone(problem(block))


class MarkupTests(SynchronousTestCase):
    """
    Pages that are read outside the site, on the forge and the package index; `make docs` checks the others.
    """

    def test_is_in_order(self) -> None:
        """
        No merge conflict is left, and no table or title is broken.
        """
        for name in ("README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"):
            said = StringIO()
            publish_doctree((CHECKOUT / name).read_text("utf-8"), settings_overrides={"warning_stream": said})
            self.assertEqual("", said.getvalue(), name)


class WordsTests(SynchronousTestCase):
    """
    Names in the documents.
    """

    def test_links_lead_to_files_and_sections_that_there_are(self) -> None:
        """
        In README.rst, CONTRIBUTING.rst, SECURITY.md and docs/.
        """
        shown = [*pages(), *MARKDOWN]
        wrong = [f"{page.name}: {link}" for page in shown for link in links(page) if leads_nowhere(page, link)]
        self.assertEqual([], wrong)

    def test_files_that_are_named_are_there(self) -> None:
        """
        Documents, modules, tests and files of deploy/ that a text mentions.
        """
        name = re.compile(r"(?<![\w/.])((?:docs|deploy|tests|bench|ecrproxy)/[\w./-]*\w\.\w+|[A-Z]{4,}\.(?:rst|md))")
        shown = [*pages(), *MARKDOWN, CHECKOUT / "CHANGELOG.rst"]
        told = {(page.name, each) for page in shown for each in name.findall(page.read_text("utf-8"))}
        missing = sorted(each for each in told if not (CHECKOUT / each[1]).exists())
        # A new checkout has not built its documents yet.
        self.assertEqual([], [each for each in missing if not each[1].startswith("docs/_build/")])

    def test_each_page_is_on_the_index(self) -> None:
        root = CHECKOUT / "docs"
        index = (root / "index.rst").read_text("utf-8").split()
        below = [str(each.relative_to(root).with_suffix("")) for each in pages() if root in each.parents]
        self.assertEqual([], sorted(set(below) - {"index", *index}))

    def test_settings_that_are_named_are_there(self) -> None:
        """
        Each variable is one of SETTINGS, or a predecessor's with a message.
        """
        named = {
            each for page in [*pages(), *MARKDOWN] for each in re.findall(r"\bPROXY_[A-Z_]+", page.read_text("utf-8"))
        }
        self.assertEqual([], sorted(each for each in named - set(BY_VARIABLE) if not notices({each: "set"})))

    def test_readme_has_each_setting(self) -> None:
        """
        Its table has variable, flag and default as in the code.
        """
        readme = (CHECKOUT / "README.rst").read_text("utf-8")
        rows = re.findall(r"^   \* - ``(\w+)``\n     - (.+)\n     - (.+)$", readme, re.MULTILINE)
        told = {variable: (flags.partition(",")[0], default.replace("``", "")) for variable, flags, default in rows}
        self.assertEqual({each.variable: (f"``--{each.name}``", each.default) for each in SETTINGS}, told)

    def test_readme_has_the_settings_by_topic_as_the_help_has(self) -> None:
        readme = (CHECKOUT / "README.rst").read_text("utf-8")
        found = re.findall(r"^   \* - ``(\w+)``\n     - .+\n     - .+$|^(.+)\n~+$", readme, re.MULTILINE)
        order = [variable or heading for variable, heading in found]
        by_name = {each.name: each.variable for each in SETTINGS}
        self.assertEqual([e for group, names in GROUPS.items() for e in (group, *(by_name[n] for n in names))], order)
