"""
A file of names and passwords as C{htpasswd -B} writes it: read, and compared to. Nothing of it is ever shown.
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
# bcrypt looks at no more of a password than this, and htpasswd leaves out the rest without a word.
_PASSWORD_BYTES: Final = 72


class HtpasswdError(Exception):
    """
    A file of passwords that can't be used, and why.
    """


class UnreadableError(HtpasswdError):
    """
    A file of passwords that can't be read at the moment.
    """


@dataclass(frozen=True, slots=True)
class Users:
    """
    Who has which password, as a bcrypt hash.

    @ivar seen: the L{signature} of the file when it was read.
    """

    hashes: Mapping[bytes, bytes] = field(repr=False)
    seen: tuple[int, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> Users:
        """
        Read a file's lines, C{name:hash}; empty ones and those that begin with # say nothing.

        @raise HtpasswdError: for a line that says something else. The line itself is not told: it may be a password.
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
        Tell whether this is C{name}'s password. Takes long: call it in a thread.

        @param chosen: chooses, for an unknown name, the hash that the password is compared to in vain, so that the time
            it takes is that of one or another of the users.
        """
        hashed = self.hashes.get(name)
        compared = hashed or list(self.hashes.values())[chosen % len(self.hashes)]
        return bcrypt.checkpw(password[:_PASSWORD_BYTES], compared) and hashed is not None


def read_users(path: str) -> Users:
    """
    Read a file. Blocks.

    @raise HtpasswdError: if it can't be used; an L{UnreadableError} if it may be unchanged once it can be.
    """
    try:
        with open_file(path) as file:
            # Of the open file, before its bytes: what changes later, or takes its place, has another signature.
            seen = _signature(os.fstat(file.fileno()))
            data = file.read(FILE_LIMIT + 1)
    except OSError as problem:
        raise UnreadableError(unread(problem)) from None
    if len(data) > FILE_LIMIT:
        raise HtpasswdError(f"is larger than {FILE_LIMIT} bytes; {_HOW}")
    return replace(Users.parse(data), seen=seen)


def signature(path: str) -> tuple[int, ...]:
    """
    Tell what changes when a file does. Blocks.
    """
    try:
        return _signature(os.stat(path))  # noqa: PTH116 (as it was given)
    except OSError:
        return ()


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
