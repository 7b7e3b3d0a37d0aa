"""
Keep hosts.toml files on a node: containerd pulls through the proxy while this runs, and as before once it has ended.

The settings are a file of TOML, which is read again every half minute::

    proxy = "http://proxy.example:5000"   # what containerd asks
    registries = ["docker.io"]            # for images of these; "_default" for all others
    fallback = true                       # whether containerd asks the registry itself when the proxy does not answer
    keep = false                          # whether the files stay when this ends
    ca = ""                               # a file of the node: the CA of the proxy's certificate

Every file that is written begins with L{MARK}. A file that does not is somebody else's, and is never touched.
"""  # noqa: INP001  # a ConfigMap is no package

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MARK = "# Written by ecr-proxy's installer for nodes"
SECONDS = 30.0
ENDS = (signal.SIGTERM, signal.SIGINT)
# The pods of an update overlap, and take turns with a directory: one name for an incomplete file is enough.
PARTIAL = ".ecr-proxy.hosts.toml"
# containerd looks for these where there is no hosts.toml, and only there.
CERTIFICATES = {".crt", ".cert", ".key"}
REGISTRY = re.compile(r"_default|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?")


class WrongSettingsError(Exception):
    """
    The settings can't be used.
    """


@dataclass(frozen=True)
class Settings:
    """
    What the file of settings says.
    """

    proxy: str
    registries: frozenset[str]
    fallback: bool = True
    keep: bool = False
    ca: str = ""

    def hosts_toml(self, registry: str) -> str:
        """
        Return the text of a registry's hosts.toml.
        """
        # Without "server" containerd asks the registry itself, Docker Hub by its other name included.
        lines = [] if self.fallback else [f"server = {json.dumps(self.proxy)}", ""]
        lines += [f"[host.{json.dumps(self.proxy)}]", '  capabilities = ["pull", "resolve"]']
        if self.ca:
            lines.append(f"  ca = {json.dumps(self.ca)}")
        return "\n".join([f"{MARK}, for {registry}. It overwrites changes.", *lines, ""])


def read(path: Path) -> Settings:
    """
    Read the settings.

    @raise WrongSettingsError: if that can't be done; says why.
    """
    try:
        told = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WrongSettingsError(f"{path} can't be read: {error}") from error
    kinds = {"proxy": str, "registries": list, "fallback": bool, "keep": bool, "ca": str}
    for name, value in told.items():
        if name not in kinds:
            raise WrongSettingsError(f"{path}: no such setting: {name}")
        if not isinstance(value, kinds[name]):
            raise WrongSettingsError(f"{path}: {name} must be a {kinds[name].__name__}")
    proxy, registries = told.pop("proxy", ""), told.pop("registries", [])
    if not re.fullmatch(r"https?://[^\s/?#@]+", proxy) or not urlsplit(proxy).hostname:
        raise WrongSettingsError(f"{path}: proxy must be like http://proxy.example:5000, not {proxy!r}")
    wrong = [each for each in registries if not isinstance(each, str) or not REGISTRY.fullmatch(each)]
    if wrong:
        raise WrongSettingsError(f"{path}: registries must be host names, or _default, not {wrong}")
    return Settings(proxy=proxy, registries=frozenset(registries), **told)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Let no other installer change a directory at the same time.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def owner_of(folder: Path) -> str:
    """
    Tell whose a registry's directory is: "ours", "nobody", or why it is somebody else's.
    """
    if folder.is_symlink():
        return f"{folder} is a symbolic link"
    if not folder.exists():
        return "nobody"
    if not folder.is_dir():
        return f"{folder} is no directory"
    file = folder / "hosts.toml"
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return f"{file} is no regular file"
    if file.exists():
        with file.open("rb") as opened:
            ours = opened.read(len(MARK)) == MARK.encode()
        return "ours" if ours else f"{file} was not written by this installer"
    certificates = sorted(each.name for each in folder.iterdir() if each.suffix in CERTIFICATES)
    return f"{folder} has {certificates[0]}, which a hosts.toml would replace" if certificates else "nobody"


def write(folder: Path, text: str) -> bool:
    """
    Write a hosts.toml so that containerd reads the old one or the new one, whenever this is killed.

    @return: whether it was any different.
    """
    folder.mkdir(mode=0o755, exist_ok=True)
    file, partial = folder / "hosts.toml", folder / PARTIAL
    with locked(folder):
        if file.exists() and file.read_bytes() == text.encode():
            return False
        # One that was killed has left it; what it is then is of no interest.
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    return True


def remove(folder: Path) -> None:
    """
    Remove a hosts.toml, and its directory if nothing else is in it.
    """
    with locked(folder):
        for name in ("hosts.toml", PARTIAL):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def written(certs: Path) -> list[Path]:
    """
    Find the registries' directories that have a file of ours, whole or not.
    """
    found = []
    for folder in sorted(certs.iterdir()):
        if folder.is_dir() and not folder.is_symlink():
            owner = owner_of(folder)
            if owner == "ours" or (owner == "nobody" and (folder / PARTIAL).exists()):
                found.append(folder)
    return found


class Installer:
    """
    What one node has, and is to have.

    @param certs: containerd's directory of registries.
    """

    def __init__(self, certs: Path) -> None:
        self._certs = certs
        self._told: set[str] = set()

    def round(self, settings: Settings) -> list[str]:
        """
        Bring the node to what the settings say.

        @return: what is in the way of that.
        """
        troubles: list[str] = []
        with self._noting(troubles, self._certs):
            for folder in written(self._certs):
                if folder.name not in settings.registries:
                    remove(folder)
                    say(f"removed {folder / 'hosts.toml'}: its registry is no longer listed")
        for registry in sorted(settings.registries):
            folder = self._certs / registry
            with self._noting(troubles, folder):
                owner = owner_of(folder)
                if owner not in {"ours", "nobody"}:
                    troubles.append(
                        f"{owner}: left alone, so this node does not pull images of {registry} through the proxy;"
                        f" remove what is there, or take {registry} out of the list"
                    )
                elif write(folder, settings.hosts_toml(registry)):
                    say(f"wrote {folder / 'hosts.toml'}: images of {registry} come from {settings.proxy}")
        return troubles

    def check(self, settings: Settings) -> list[str]:
        """
        Tell what is not as the settings say.
        """
        files = ((each, self._certs / each / "hosts.toml") for each in sorted(settings.registries))
        return [
            f"{file} is not as it should be"
            for registry, file in files
            if not file.is_file() or file.read_bytes() != settings.hosts_toml(registry).encode()
        ]

    def leave(self) -> None:
        """
        Remove all that was written.
        """
        troubles: list[str] = []
        with self._noting(troubles, self._certs):
            for folder in written(self._certs):
                with self._noting(troubles, folder):
                    remove(folder)
                    say(f"removed {folder / 'hosts.toml'}")
        for each in troubles:
            say(f"left behind: {each}")

    def report(self, troubles: list[str]) -> None:
        """
        Log what is wrong, each thing once for as long as it lasts.
        """
        for each in troubles:
            if each not in self._told:
                say(each)
        for each in sorted(self._told.difference(troubles)):
            say(f"no longer: {each}")
        self._told = set(troubles)

    @contextlib.contextmanager
    def _noting(self, troubles: list[str], folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            troubles.append(f"{folder}: {error}")


def say(text: str) -> None:
    """
    Write a line to the log.
    """
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(certs: Path, path: Path, settings: Settings, seconds: float) -> None:
    """
    Keep the node as the settings say until a signal ends this.
    """
    # Held by each installer of this node: that of an update has begun when this one is ended, and needs the files.
    alive = os.open(certs, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(alive, fcntl.LOCK_SH)
    installer = Installer(certs)
    troubles = installer.round(settings)
    installer.report(troubles)
    say(f"keeping the files in {certs} of {len(settings.registries)} registries; problems: {len(troubles)}")
    while signal.sigtimedwait(ENDS, seconds) is None:
        wrong = []
        try:
            settings = read(path)
        except WrongSettingsError as error:
            wrong.append(f"{error}; the settings of before stay in force")
        installer.report(wrong + installer.round(settings))
    if settings.keep:
        say(f"ending: files in {certs} are kept, as keep says")
        return
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"ending: files in {certs} are kept for another installer that runs on this node")
        return
    installer.leave()


def main(argv: list[str]) -> int:
    """
    Do what the command line says.
    """
    parser = argparse.ArgumentParser(description="Write hosts.toml files, keep them, and remove them on SIGTERM.")
    parser.add_argument("settings", type=Path)
    parser.add_argument("certs", type=Path, help="containerd's directory of registries")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="between two looks at settings and files")
    parser.add_argument("--check", action="store_true", help="end at once, with 1 if a file is not as it should be")
    options = parser.parse_args(argv)
    # Before anything is written; they are waited for, so no round is interrupted by one.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    os.umask(0o022)
    try:
        settings = read(options.settings)
    except WrongSettingsError as error:
        say(str(error))
        return 2
    if not options.check:
        run(options.certs, options.settings, settings, options.seconds)
        return 0
    installer = Installer(options.certs)
    troubles = installer.check(settings)
    installer.report(troubles)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
