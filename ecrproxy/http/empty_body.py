"""
Chunked bodies without content.

Envoy, linkerd and Vert.x send a GET this way when they forward an HTTP/2 request whose end they have not seen yet. The
framing is legal (RFC 9112, 6), and nginx and Go accept it. A body with content is refused: nothing here would read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

EMPTY_BODY_LIMIT: Final = 2**12
"""Maximum size of the framing, in bytes: chunk extensions and trailers, which are dropped."""

_LAST_CHUNK = re.compile(rb"0{1,16}[ \t]*(?:;[\t -~\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")


def end_of_empty(data: bytes) -> int | None:
    """
    Return where an empty chunked body at the start of C{data} ends; None if it is incomplete.

    @raise ValueError: if the body has content, is malformed, or exceeds L{EMPTY_BODY_LIMIT}.
    """
    start, pattern = 0, _LAST_CHUNK
    while 0 <= (stop := data.find(b"\r\n", start)) < EMPTY_BODY_LIMIT:
        line, start = data[start:stop], stop + 2
        if not line and pattern is _TRAILER:
            return start
        if not pattern.fullmatch(line):
            raise ValueError
        pattern = _TRAILER
    if len(data) > EMPTY_BODY_LIMIT or not data.startswith(b"0"):
        raise ValueError
    return None


class EmptyBody:
    """
    Decode an empty chunked body, in place of Twisted's decoder.

    @param finished: called with the bytes after the body.
    @param refuse: called at the first byte that can't be part of an empty body.
    """

    def __init__(self, finished: Callable[[bytes], object], refuse: Callable[[], object]) -> None:
        self._finished, self._refuse = finished, refuse
        self._data = b""

    def dataReceived(self, data: bytes) -> None:
        """
        Parse the next bytes.
        """
        self._data += data
        try:
            end = end_of_empty(self._data)
        except ValueError:
            self._refuse()
            return
        if end is not None:
            self._finished(self._data[end:])
