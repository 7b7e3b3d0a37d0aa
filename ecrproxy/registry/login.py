"""
User and password for a registry other than ECR.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Final

from twisted.logger import Logger

from ecrproxy.files import open_file, unread
from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.threads import Bounded, InThread

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

LONGEST: Final = 8 * 2**10
"""Maximum bytes of a password: it is sent in a header."""
READ_SECONDS: Final = 5.0
"""Maximum seconds to read a password."""


class Login:
    """
    A user whose password is in a file, read whenever it is needed, because it may be rotated.

    Each login reads in a thread of its own: if one file system hangs, other passwords can still be read.

    @param in_thread: calls the function that reads the file.
    """

    def __init__(self, username: str, file: Path, in_thread: InThread, clock: IReactorTime) -> None:
        self._username, self._file = username, file
        self._in_thread = Bounded(in_thread, 1, READ_SECONDS, clock, "the file system of the password")

    async def get(self) -> str:
        """
        Return base64 of C{user:password}: RFC 7617.

        @raise TokenUnavailableError: if the file can't be read, or has no password.
        """
        try:
            password = await self._in_thread(read_password, self._file)
        except (OSError, RuntimeError, ValueError) as problem:
            raise self._missing(why_unread(self._file, problem)) from problem
        return login_of(self._username, password)

    def _missing(self, why: str) -> TokenUnavailableError:
        """
        Log why there is no password. Clients do not learn where its file is.
        """
        log.error("No password for {user}: {why}", user=self._username, why=why, once=(str(self._file), why))
        return TokenUnavailableError("its password can't be read; the proxy's log says why")

    async def renew(self, refused: str) -> str:  # noqa: ARG002
        """
        Return the current login.

        @raise TokenUnavailableError: if the file can't be read, or has no password.
        """
        return await self.get()


def login_of(username: str, password: bytes) -> str:
    """
    Return base64 of C{user:password}: RFC 7617.
    """
    return base64.b64encode(username.encode() + b":" + password).decode("ascii")


def read_password(file: Path) -> bytes:
    """
    Read a password.

    @raise OSError: if the file can't be read.
    @raise ValueError: if it has none.
    """
    with open_file(file) as opened:
        password: bytes = opened.read(LONGEST + 2).removesuffix(b"\n").removesuffix(b"\r")
    if not password or len(password) > LONGEST or b"\n" in password:
        raise ValueError(f"{str(file)!r} has no password: give one line of text")
    return password


def why_unread(file: Path, problem: Exception) -> str:
    """
    Return why there is no password.
    """
    if isinstance(problem, ValueError):
        return str(problem)
    said = unread(problem) if isinstance(problem, OSError) else f"can't be read: {problem}"
    return f"the password in {str(file)!r} {said}"
