"""
The sdist and the wheel, byte for byte the same wherever and whenever they are built from the same sources.

- The sources are the files that git does not ignore, in a folder of their own: other files in a checkout
  are never included.
- All times are those of the last commit. The wheel takes them from SOURCE_DATE_EPOCH; the sdist, which setuptools
  packs with the times, owners and modes that it finds, is packed again.
- The wheel is built from the sdist, as for users who install the sdist.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

LEFT_OUT: Final = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", ".fuzz", "_trial_temp"),
    *("build", "dist", "_build", "*.egg-info", "__pycache__", "dropin.cache"),
)
"""What is no source, where there is no git to ask."""
FOR_GIT: Final = {".gitignore"}
"""What is of no use in an sdist."""
PLUGIN: Final = "twisted/plugins/ecrproxy_plugin.py"


class ReleaseError(Exception):
    """
    Raised if an artifact is not as a release must be.
    """


def sources_of(checkout: Path) -> list[str] | None:
    """
    List the files that git tracks, or would; None if the checkout is no repository.
    """
    if not (checkout / ".git").exists():
        return None
    listed = output("git", "-C", checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sorted(each for each in listed if (checkout / each).is_file())


def copy_sources(checkout: Path, folder: Path) -> None:
    """
    Copy the sources, and nothing else.
    """
    names = sources_of(checkout)
    if names is None:
        shutil.copytree(checkout, folder, ignore=LEFT_OUT)
        return
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, folder / name)


def epoch_of(checkout: Path, environ: Mapping[str, str]) -> int:
    """
    Return the time for all files: the last commit's, or without git that of the newest file.
    """
    if given := environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    if (checkout / ".git").exists():
        return int(output("git", "-C", checkout, "log", "-1", "--format=%ct"))
    return int(max(each.stat().st_mtime for each in checkout.iterdir() if each.is_file()))


def packed_anew(sdist: bytes, epoch: int) -> bytes:
    """
    Pack an sdist without traces of who packed it, and when.
    """
    result = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(sdist)) as source,
        gzip.GzipFile("", "wb", 9, result, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in sorted(source, key=lambda each: each.name):
            new = tarfile.TarInfo(member.name)
            new.type, new.size, new.mtime = member.type, member.size, epoch
            new.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(new, source.extractfile(member) if member.isfile() else None)
    return result.getvalue()


def build(sources: Path, folder: Path, environ: Mapping[str, str]) -> tuple[Path, Path]:
    """
    Build the sdist from a folder of sources, and the wheel from the sdist, with the installed setuptools.
    """
    setuptools(sources, "--sdist", folder, environ)
    (sdist,) = folder.glob("*.tar.gz")
    sdist.write_bytes(packed_anew(sdist.read_bytes(), int(environ["SOURCE_DATE_EPOCH"])))
    unpacked = unpack(sdist, folder / "unpacked")
    setuptools(unpacked, "--wheel", folder, environ)
    shutil.rmtree(folder / "unpacked")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def unpack(sdist: Path, folder: Path) -> Path:
    """
    Unpack an sdist, and return its folder.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def setuptools(sources: Path, what: str, folder: Path, environ: Mapping[str, str]) -> None:
    """
    Build an sdist or a wheel with setuptools.
    """
    output(sys.executable, "-m", "build", "--no-isolation", what, "--outdir", folder, sources, env=environ)


def build_twice(sources: Path, folder: Path, epoch: int) -> tuple[Path, Path]:
    """
    Build from the sources, and again from the resulting sdist: both must be the same.

    @raise ReleaseError: if they are not.
    """
    os.umask(0o022)  # the modes in a wheel are those of new files
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1"}
    first = build(sources, folder / "first", environ)
    elsewhere = unpack(first[0], folder / "some" / "where" / "else")
    for each in elsewhere.rglob("*"):
        each.touch()
    second = build(elsewhere, folder / "second", {**environ, "PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"})
    for one, other in zip(first, second, strict=True):
        if one.name != other.name or one.read_bytes() != other.read_bytes():
            raise ReleaseError(f"{one.name} came out in two ways")
    return first


def check(sdist: Path, wheel: Path, names: Iterable[str] | None) -> None:
    """
    Check that the sdist has all sources and nothing else, and that the wheel leaves Twisted's own files alone.

    @param names: the sources, if they are known.
    @raise ReleaseError: if a check fails.
    """
    if names is not None:
        with tarfile.open(sdist) as archive:
            packed = {each.name.partition("/")[2] for each in archive if each.isfile()}
        made = {each for each in packed if each == "PKG-INFO" or each.startswith("ecrproxy.egg-info/")}
        if wrong := (packed - made) ^ (set(names) - FOR_GIT):
            raise ReleaseError(f"{sdist.name} lacks, or has but should not have: {', '.join(sorted(wrong))}")
    with zipfile.ZipFile(wheel) as contents:
        foreign = {each for each in contents.namelist() if not each.startswith("ecrproxy")}
    if foreign != {PLUGIN}:
        raise ReleaseError(f"{wheel.name} has, beside ecrproxy, {', '.join(sorted(foreign))}, and not {PLUGIN} alone")


def output(*argv: str | Path, env: Mapping[str, str] | None = None) -> str:
    """
    Run a program, which must succeed, and return its output.

    @raise ReleaseError: if it fails, with its whole output.
    """
    done = subprocess.run([str(each) for each in argv], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
