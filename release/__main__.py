"""
Build the artifacts of a release, in C{dist}: the sdist, the wheel, the bill of materials, and the hashes of all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ecrproxy import __version__
from release.archives import ReleaseError, build_twice, check, copy_sources, epoch_of, output, sources_of
from release.materials import bill_of

CHECKOUT = Path(__file__).resolve().parents[1]


def make(checkout: Path) -> list[Path]:
    """
    Build and check everything; on failure leave nothing.
    """
    dist = checkout / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    epoch = epoch_of(checkout, os.environ)
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        sources = Path(folder) / "sources"
        copy_sources(checkout, sources)
        sdist, wheel = build_twice(sources, Path(folder), epoch)
        check(sdist, wheel, sources_of(checkout))
        output(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        output(sys.executable, "-m", "check_wheel_contents", "--config", sources / "pyproject.toml", wheel)
        bill = Path(folder) / f"ecrproxy-{__version__}.cdx.json"
        bill.write_text(bill_of(checkout / "requirements.lock", epoch), "utf-8")
        sums = Path(folder) / "SHA256SUMS"
        made = [sdist, wheel, bill]
        sums.write_text("".join(f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in made))
        dist.mkdir()
        return [Path(shutil.copy(each, dist)) for each in (*made, sums)]


if __name__ == "__main__":
    try:
        for each in make(CHECKOUT):
            print(each)
    except ReleaseError as problem:
        sys.exit(f"make dist: {problem}")
