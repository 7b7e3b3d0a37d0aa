"""
The container's entrypoint: C{python -m ecrproxy.entrypoint}.

Docker makes a host's directory that is mounted (C{-v /srv/cache:/cache}) as root. A container that is started as root
gives that directory to the daemon's user and becomes that user, as the images of databases do. One that is started as
somebody else only starts the daemon.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

USER: Final = 65532
"""Whom the image's cache directory belongs to, user and group."""
_START: Final = ("-n", "--pidfile=", "ecr-proxy")


@dataclass(frozen=True, slots=True)
class System:
    """
    What the entrypoint does to files and to its own process.

    @ivar chown: gives an open file or directory to the daemon's user and group.
    @ivar become: gives up all other users, groups and rights.
    """

    uid: int
    chown: Callable[[int], None]
    become: Callable[[], None]
    execute: Callable[[str, Sequence[str], Mapping[str, str]], NoReturn]


def hand_over(directory: Path, chown: Callable[[int], None]) -> None:
    """
    Give a directory to the daemon's user with all that is in it, unless that has been done: it may be many files.

    A file with several names may belong elsewhere by another of them, and stays whose it is.

    @raise OSError: if that can't be done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if directory.stat().st_uid == USER:
        return
    for _, _, names, folder in os.fwalk(directory, topdown=False, onerror=_raise):
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                _hand_over_file(name, folder, chown)
        chown(folder)  # the outermost comes last: what is interrupted is done again


def _hand_over_file(name: str, folder: int, chown: Callable[[int], None]) -> None:
    # Who may write there can put another in its place at any time: what was looked at has to be what is given away.
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            chown(file)
    finally:
        os.close(file)


def _raise(problem: OSError) -> NoReturn:
    raise problem


def main(arguments: Sequence[str], environ: Mapping[str, str], twistd: str, system: System) -> None:
    """
    Start the daemon as a user who may do no more than it needs.
    """
    if system.uid == 0:
        directory = environ.get("PROXY_CACHE_DIR") or "/cache"
        try:
            hand_over(Path(directory), system.chown)
            system.become()
        except OSError as problem:
            sys.exit(
                f"ecr-proxy: started as root, and {directory} can't be given to user {USER} ({problem.strerror}):"
                f" add --user {USER}:{USER} and give it that directory,"
                " or leave the container CHOWN, DAC_OVERRIDE, SETUID and SETGID"
            )
    system.execute(twistd, [twistd, *_START, *arguments], environ)


def _chown(file: int) -> None:
    os.fchown(file, USER, USER)


def _become() -> None:
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)  # with which all capabilities go: capabilities(7)


def _execute(program: str, words: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    os.execve(program, list(words), environ)  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    main(
        sys.argv[1:],
        os.environ,
        str(Path(sys.executable).with_name("twistd")),
        System(os.geteuid(), _chown, _become, _execute),
    )
