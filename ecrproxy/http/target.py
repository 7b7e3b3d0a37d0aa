"""
Request targets: read once, when the head of a request is complete. Pure.

All later code uses the parsed value: routing, access rules, the access log and the cache key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

HOST: Final = r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]"
"""A character of a Host field or an authority: RFC 3986, 3.2.2. User information is not accepted."""

_SLASHES = re.compile("/{2,}")
_ABSOLUTE = re.compile(rf"https?://({HOST}+)([/?].*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Target:
    """
    A request target: RFC 9112, 3.2.

    @ivar path: starts with a slash; percent-encoded as it was sent. Below /v2/, repeated slashes are one, as in nginx.
    @ivar query: as it was sent, without the question mark.
    @ivar authority: host and port of the absolute form; empty for the origin form.
    """

    path: str
    query: str = ""
    authority: str = ""

    @property
    def origin(self) -> str:
        """
        The target in origin form: what nginx calls C{$request_uri}.
        """
        return f"{self.path}?{self.query}" if self.query else self.path


def parse_target(sent: bytes) -> Target:
    """
    Read the target of a GET or HEAD request: the origin form, or the absolute form of an http or https URL.

    @raise ValueError: for any other form, and for a URL with user information or without a host.
    """
    text, authority = sent.decode("latin-1"), ""
    if not text.startswith("/"):
        found = _ABSOLUTE.fullmatch(text)
        if found is None:
            raise ValueError("the target is neither a path nor an http(s) URL")
        authority, text = found[1], found[2] or "/"
        text = text if text.startswith("/") else f"/{text}"
    path, _, query = text.partition("?")
    return Target(_merge_slashes(path), query, authority)


def _merge_slashes(path: str) -> str:
    """
    Merge the slashes of a registry's path: tools join the URL of a mirror and a path that begins with another slash.
    """
    merged = _SLASHES.sub("/", path)
    return merged if merged == "/v2" or merged.startswith("/v2/") else path
