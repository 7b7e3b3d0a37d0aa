"""
The site and the manuals, as readers' programs see them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .installing import CHECKOUT
from .processes import PATIENCE, environment

# What a browser fetches by itself: scripts, styles, pictures, fonts. Links need a click.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"|url\(['"]?([^'")]+)"""
)


@pytest.fixture(scope="module")
def built(home: Path) -> Path:
    """
    Build both.
    """
    for builder in ("html", "man"):
        argv = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", builder]
        target = home / "site" / builder
        done = subprocess.run(
            [*argv, str(CHECKOUT / "docs"), str(target)],
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return home / "site"


def run(home: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """
    Run a program over a page.
    """
    variables = environment(home, {"MANWIDTH": "100"})
    words = [str(each) for each in argv]
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_pages_load_nothing_from_elsewhere(built: Path) -> None:
    """
    No script, style, picture or font comes from another host.
    """
    texts = [*(built / "html").rglob("*.html"), *(built / "html").rglob("*.css")]
    fetched = {each for text in texts for found in FETCHED.findall(text.read_text("utf-8")) for each in found if each}
    assert len(fetched) > 10
    assert [each for each in fetched if re.match(r"(?:[a-z]+:)?//", each)] == []


@pytest.mark.parametrize("name", ["ecr-proxy.1", "ecrproxy.8"])
def test_man_and_mandoc_object_to_nothing(built: Path, home: Path, name: str) -> None:
    """
    groff renders each manual without a warning, and mandoc reports no errors.
    """
    manual = built / "man" / name
    shown = run(home, "man", "--warnings", "--local-file", manual)
    assert shown.stderr == ""
    plain = re.sub(".\x08", "", shown.stdout)  # bold is struck over
    assert "NAME" in plain
    assert "EXIT STATUS" in plain
    assert run(home, "mandoc", "-Tlint", "-Werror", manual).stdout == ""
