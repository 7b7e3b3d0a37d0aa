"""
The wheel in an empty environment of each Python: it works there, and uninstalling it leaves Twisted as it was.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from .chain import Chain, Equipment
from .clients import Docker
from .images import Images
from .installing import build, run
from .test_pull import reference

PYTHONS = os.environ.get("ECRPROXY_E2E_PYTHONS", sys.executable).split()
MADE = {"__pycache__", "dropin.cache"}
"""Files that Python and Twisted create next to the installed ones."""


class Environment:
    """
    An environment that has Twisted, and nothing of ours.
    """

    def __init__(self, python: str, folder: Path) -> None:
        self.bin = folder / "bin"
        run(python, "-m", "venv", folder)
        self.pip("install", "twisted")
        (self._packages,) = folder.glob("lib/python*/site-packages")

    def pip(self, *argv: str | Path) -> None:
        """
        Run pip.
        """
        run(self.bin / "pip", "--quiet", *argv)

    def says(self, program: str, *argv: str) -> str:
        """
        Run a program, and return its output.
        """
        return run(self.bin / program, *argv)

    def twisted(self) -> set[str]:
        """
        List Twisted's own files.
        """
        found = (self._packages / "twisted").rglob("*")
        return {str(each) for each in found if each.is_file() and not MADE & set(each.parts)}

    def ours(self) -> list[Path]:
        """
        List what can only be ours: by its name, or by what is in Twisted's list of plugins.
        """
        cache = self._packages / "twisted/plugins/dropin.cache"
        listed = [cache] if b"ecrproxy" in cache.read_bytes() else []
        return listed + [each for place in (self._packages, self.bin) for each in place.rglob("*ecr*proxy*")]


@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: Path(python).name)
def test_comes_works_and_goes(
    python: str, equipment: Equipment, images: Images, docker: Docker, home: Path, tmp_path: Path
) -> None:
    """
    After pip install there is a subcommand of twistd, and Docker pulls; after pip uninstall there is nothing.
    """
    environment = Environment(python, tmp_path / "venv")
    offered, files = environment.says("twistd", "--help"), environment.twisted()
    assert environment.ours() == []

    environment.pip("install", build(home))
    assert "ecr-proxy" in environment.says("twistd", "--help")
    assert "--ecr-endpoint=" in environment.says("twistd", "ecr-proxy", "--help")
    assert "ecr-proxy" in environment.says("ecr-proxy", "--help")
    chain = Chain(dataclasses.replace(equipment, twistd=environment.bin / "twistd"), f"release-{Path(python).name}")
    try:
        chain.daemon.wait()
        assert docker.pull(reference(chain, images.single)) == images.single.image_id
    finally:
        chain.stop()
    assert environment.ours() != []

    environment.pip("uninstall", "--yes", "ecrproxy")
    assert environment.says("twistd", "--help") == offered
    assert environment.twisted() == files
    assert environment.ours() == []
