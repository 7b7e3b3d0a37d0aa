"""
Parse and check a password file made with C{htpasswd -B}. Its contents are never logged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import bcrypt

from ecrproxy.files import open_file, unread

FILE_LIMIT: Final = 2**20

_HOW: Final = "make it with htpasswd -B"
_BCRYPT = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_COSTS: Final = range(4, 17)
# bcrypt ignores further bytes of a password, and htpasswd truncates it silently.
_PASSWORD_BYTES: Final = 72


class HtpasswdError(Exception):
    """
    A password file can't be used; the message says why.
    """


class UnreadableError(HtpasswdError):
    """
    A password file is temporarily unreadable.
    """


@dataclass(frozen=True, slots=True)
class Users:
    """
    Names with their bcrypt password hashes.

    @ivar seen: the L{signature} of the file when it was read.
    """

    hashes: Mapping[bytes, bytes] = field(repr=False)
    seen: tuple[int, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> Users:
        """
        Parse a file's lines, C{name:hash}; empty lines and lines that begin with # are ignored.

        @raise HtpasswdError: for other lines. The error does not show the line, which may be a password.
        """
        hashes = {}
        for number, line in enumerate(data.splitlines(), 1):
            if not line.strip() or line.startswith(b"#"):
                continue
            name, _, hashed = line.rstrip().partition(b":")
            found = _BCRYPT.fullmatch(hashed)
            if not name or found is None:
                raise HtpasswdError(f"line {number} is not a name and a bcrypt hash; {_HOW}")
            if int(found[1]) not in _COSTS:
                raise HtpasswdError(f"line {number} has a bcrypt cost out of {_COSTS[0]} to {_COSTS[-1]}; {_HOW}")
            hashes[name] = hashed
        if not hashes:
            raise HtpasswdError(f"holds no name and password; {_HOW}")
        return cls(hashes)

    def matches(self, name: bytes, password: bytes, chosen: int) -> bool:
        """
        Return True if this is C{name}'s password. Slow: call in a thread.

        @param chosen: selects the hash to compare with if the name is unknown, so that the time is that of a known
            user.
        """
        hashed = self.hashes.get(name)
        compared = hashed or list(self.hashes.values())[chosen % len(self.hashes)]
        return bcrypt.checkpw(password[:_PASSWORD_BYTES], compared) and hashed is not None


def read_users(path: str) -> Users:
    """
    Read a file. Blocks.

    @raise HtpasswdError: if the file can't be used; L{UnreadableError} if the failure may be temporary.
    """
    try:
        with open_file(path) as file:
            # Of the open file, before reading: later changes and replacements have another signature.
            seen = _signature(os.fstat(file.fileno()))
            data = file.read(FILE_LIMIT + 1)
    except OSError as problem:
        raise UnreadableError(unread(problem)) from None
    if len(data) > FILE_LIMIT:
        raise HtpasswdError(f"is larger than {FILE_LIMIT} bytes; {_HOW}")
    return replace(Users.parse(data), seen=seen)


def signature(path: str) -> tuple[int, ...]:
    """
    Return a value that differs after the file has changed. Blocks.
    """
    try:
        return _signature(os.stat(path))  # noqa: PTH116 (the path as given)
    except OSError:
        return ()


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
