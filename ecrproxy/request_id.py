"""
Request ids: in the response, in the access log, and in log lines written while the request is processed.

If a client or a load balancer sends X-Request-Id, that id is used, so that the request can be traced across systems,
unless it is not safe in logs and headers.
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
The id of the current request.

Each coroutine has its own; shared work, such as a transfer, has that of the request that started it.
"""


def numbered(prefix: str) -> Callable[[], str]:
    """
    Return a generator of unique ids: a prefix, which should be random, and a number. A random id each would cost more.
    """
    numbers = itertools.count(1)
    return lambda: f"{prefix}-{next(numbers):x}"


def choose_id(shown: Sequence[bytes], new: Callable[[], str]) -> str:
    """
    Return the client's id if it is valid, otherwise a new one.

    @param shown: the values of the client's header.
    @param new: returns a new id.
    """
    if len(shown) == 1 and _SANE.fullmatch(shown[0]):
        return shown[0].decode("ascii")
    return new()
