"""
The artifacts of a release are reproducible and complete.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy import __version__
from release.archives import PLUGIN, ReleaseError, check, copy_sources, epoch_of, packed_anew
from release.materials import project_of
from tests.store_contract import scratch

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.cfg", "ecrproxy/__init__.py"]


def sdist_of(names: Sequence[str], *, mode: int = 0o644, mtime: int = 1, owner: str = "ann") -> bytes:
    """
    Pack files that contain their own names, as some setuptools would.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"ecrproxy-1/{name}")
            member.size, member.mode, member.mtime, member.uname = len(name), mode, mtime, owner
            archive.addfile(member, io.BytesIO(name.encode()))
    return packed.getvalue()


class PackedAnewTests(SynchronousTestCase):
    """
    The sdist.
    """

    def test_tells_nothing_of_who_packed_it(self) -> None:
        """
        Neither the order in which files were found, nor their owners, modes and times, make a difference.
        """
        one = packed_anew(sdist_of(["b", "a"], mode=0o664, mtime=5, owner="ann"), 7)
        other = packed_anew(sdist_of(["a", "b"], mode=0o600, mtime=6, owner="bob"), 7)
        self.assertEqual(one, other)
        self.assertNotEqual(one, packed_anew(sdist_of(["a", "b"]), 8))

    def test_holds_what_it_held(self) -> None:
        """
        Each file with its bytes, the given time, and its executable bit.
        """
        for mode, kept in ((0o600, 0o644), (0o700, 0o755)):
            data = packed_anew(sdist_of(["run"], mode=mode), 7)
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                (member,) = archive
                file = archive.extractfile(member)
                assert file is not None
                self.assertEqual(("ecrproxy-1/run", b"run"), (member.name, file.read()))
                self.assertEqual((kept, 7, 0, ""), (member.mode, member.mtime, member.uid, member.uname))


class SourcesTests(SynchronousTestCase):
    """
    The sources of a build.
    """

    def setUp(self) -> None:
        """
        Create a folder of sources that is no repository.
        """
        self.checkout = scratch(self)
        self.checkout.mkdir()
        (self.checkout / "setup.cfg").touch()

    def test_nothing_else_is_copied(self) -> None:
        """
        Environments, caches and old builds stay behind; the CI configuration is copied.
        """
        for folder in (".venv", ".venv-e2e", "dist", ".mypy_cache", "ecrproxy.egg-info", ".ci"):
            (self.checkout / folder).mkdir()
        target = scratch(self) / "sources"
        copy_sources(self.checkout, target)
        self.assertEqual({".ci", "setup.cfg"}, {each.name for each in target.iterdir()})

    def test_the_time_is_the_one_that_is_given(self) -> None:
        """
        Without one, and without commits, it is that of the newest file.
        """
        os.utime(self.checkout / "setup.cfg", (5, 5))
        self.assertEqual(3, epoch_of(self.checkout, {"SOURCE_DATE_EPOCH": "3"}))
        self.assertEqual(5, epoch_of(self.checkout, {}))


class CheckTests(SynchronousTestCase):
    """
    Incomplete or wrong artifacts fail the check.
    """

    def check(self, packed: Sequence[str], wheel: Sequence[str], names: Sequence[str] | None = SOURCES) -> None:
        """
        Check an sdist and a wheel of these files.
        """
        folder = scratch(self)
        folder.mkdir()
        (folder / "sdist").write_bytes(sdist_of(packed))
        with zipfile.ZipFile(folder / "wheel", "w") as archive:
            for name in wheel:
                archive.writestr(name, "")
        check(folder / "sdist", folder / "wheel", names)

    def test_the_sdist_has_all_sources(self) -> None:
        """
        Everything that tests and documents need; files of setuptools and git themselves don't count.
        """
        wheel = ["ecrproxy/__init__.py", "ecrproxy-1.dist-info/RECORD", PLUGIN]
        made = ["PKG-INFO", "ecrproxy.egg-info/SOURCES.txt"]
        self.check([*SOURCES, *made], wheel, [*SOURCES, ".gitignore"])
        self.check(SOURCES[:1], wheel, None)
        problem = self.assertRaises(ReleaseError, self.check, SOURCES[:1], wheel)
        self.assertIn("ecrproxy/__init__.py", str(problem))
        problem = self.assertRaises(ReleaseError, self.check, [*SOURCES, "secret"], wheel)
        self.assertIn("secret", str(problem))

    def test_the_wheel_leaves_twisted_alone(self) -> None:
        """
        A file of Twisted's own in it would be removed when the wheel is uninstalled.
        """
        for foreign in ([PLUGIN, "twisted/plugins/__init__.py"], [PLUGIN, "tests/__init__.py"], []):
            problem = self.assertRaises(ReleaseError, self.check, SOURCES, ["ecrproxy/__init__.py", *foreign])
            self.assertIn("alone", str(problem))


class VersionTests(SynchronousTestCase):
    def test_is_what_the_changelog_begins_with(self) -> None:
        """
        Its changes are listed there, first.
        """
        sections = re.findall(r"^(\S+) - .*\n-+$", (CHECKOUT / "CHANGELOG.rst").read_text("utf-8"), re.MULTILINE)
        self.assertEqual(__version__, sections[0])


class BillTests(SynchronousTestCase):
    """
    The bill of materials.
    """

    def test_says_whose_it_is(self) -> None:
        """
        Name, version and license come from where they are kept.
        """
        project = tomllib.loads(project_of(CHECKOUT))["project"]
        self.assertEqual(("ecrproxy", __version__, "MIT"), (project["name"], project["version"], project["license"]))
