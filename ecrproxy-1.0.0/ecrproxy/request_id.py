"""
One id for each request: in its answer, in its access line, and in what is logged while it is answered.

A client, or a load balancer, may have one already: X-Request-Id. Then it is kept, so that one id tells one story;
unless it is none that can stand in logs and headers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Final

REQUEST_ID: Final = b"X-Request-Id"
LONGEST: Final = 128

_SANE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,%d}" % (LONGEST - 1))

current: ContextVar[str] = ContextVar("request id", default="")
"""
The id of the request that is being answered.

Each coroutine has its own; what several requests share, as a transfer, has that of the one that began it.
"""


def numbered(prefix: str) -> Callable[[], str]:
    """
    Make ids that differ: a prefix, random as it should be, and a number. Randomness for each would cost more than they.
    """
    numbers = itertools.count(1)
    return lambda: f"{prefix}-{next(numbers):x}"


def choose_id(shown: Sequence[bytes], new: Callable[[], str]) -> str:
    """
    Take the id that a client has shown, or another.

    @param shown: the values of its header.
    @param new: makes one.
    """
    if len(shown) == 1 and _SANE.fullmatch(shown[0]):
        return shown[0].decode("ascii")
    return new()
