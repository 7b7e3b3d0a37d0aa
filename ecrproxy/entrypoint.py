"""
The container's entrypoint: C{python -m ecrproxy.entrypoint}.

Docker creates host directories for mounts (C{-v /srv/cache:/cache}) as root. A container started as root changes their
owner to the daemon's user and switches to that user, as database images do. A container started as another user only
starts the daemon.
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
"""User and group that own the image's cache directory."""
_START: Final = ("-n", "--pidfile=", "ecr-proxy")


@dataclass(frozen=True, slots=True)
class System:
    """
    The entrypoint's operations on files and its own process.

    @ivar chown: changes the owner of an open file or directory to the daemon's user and group.
    @ivar become: drops all other users, groups and capabilities.
    """

    uid: int
    chown: Callable[[int], None]
    become: Callable[[], None]
    execute: Callable[[str, Sequence[str], Mapping[str, str]], NoReturn]


def hand_over(directory: Path, chown: Callable[[int], None]) -> None:
    """
    Change the owner of a directory and its contents to the daemon's user, unless already done: there may be many files.

    Files with several hard links keep their owner: another link may belong elsewhere.

    @raise OSError: if the owner can't be changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if directory.stat().st_uid == USER:
        return
    for _, _, names, folder in os.fwalk(directory, topdown=False, onerror=_raise):
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                _hand_over_file(name, folder, chown)
        chown(folder)  # the top directory comes last, so that an interrupted run is repeated


def _hand_over_file(name: str, folder: int, chown: Callable[[int], None]) -> None:
    # Any process with write access can replace the file at any time: check and change the same open file.
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
    Start the daemon as an unprivileged user.
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
    os.setresuid(USER, USER, USER)  # also drops all capabilities: capabilities(7)


def _execute(program: str, words: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    os.execve(program, list(words), environ)  # noqa: S606 (without a shell)


if __name__ == "__main__":
    main(
        sys.argv[1:],
        os.environ,
        str(Path(sys.executable).with_name("twistd")),
        System(os.geteuid(), _chown, _become, _execute),
    )
