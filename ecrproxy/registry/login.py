"""
A user and a password of a registry other than ECR.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

from ecrproxy.files import open_file
from ecrproxy.registry.ecr import TokenUnavailableError
from ecrproxy.threads import InThread

LONGEST: Final = 8 * 2**10
"""Bytes that a password may have: it goes in a header."""


class Login:
    """
    A user whose password is in a file, read each time that it is needed: what rotates it writes the file anew.

    @param in_thread: calls what reads the file.
    """

    def __init__(self, username: str, file: Path, in_thread: InThread) -> None:
        self._username, self._file, self._in_thread = username, file, in_thread

    async def get(self) -> str:
        """
        Return base64 of C{user:password}: RFC 7617.

        @raise TokenUnavailableError: if the file can't be read, or has no password.
        """
        try:
            password = await self._in_thread(_read, self._file)
        except (OSError, TimeoutError) as problem:
            said = getattr(problem, "strerror", None) or problem
            raise TokenUnavailableError(f"the password in {str(self._file)!r} can't be read: {said}") from problem
        if not password or len(password) > LONGEST or b"\n" in password:
            raise TokenUnavailableError(f"{str(self._file)!r} has no password: give one line of text")
        return base64.b64encode(self._username.encode() + b":" + password).decode("ascii")

    async def renew(self, refused: str) -> str:  # noqa: ARG002
        """
        Return what the file has now.

        @raise TokenUnavailableError: if the file can't be read, or has no password.
        """
        return await self.get()


def _read(file: Path) -> bytes:
    with open_file(file) as opened:
        return opened.read(LONGEST + 2).removesuffix(b"\n").removesuffix(b"\r")
