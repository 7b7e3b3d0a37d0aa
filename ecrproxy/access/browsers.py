"""
Requests that browsers send on behalf of web pages: which pages may ask, and read the answer. Pure.

Rules:

- A page that fetches with CORS announces itself by C{Origin} (Fetch standard, "Origin header"); any page of another
  site by C{Sec-Fetch-Site} (W3C Fetch Metadata). Scripts can set neither. Container runtimes and other programs send
  none of them.
- C{Sec-Fetch-Site} is sent over TLS and to loopback alone. Over plain HTTP an image, a frame or a fetch without CORS of
  another site looks like the address bar, and so does a page whose name was made to lead here (DNS rebinding). But
  browsers add C{Accept-Language} to each request that has none (Fetch standard, "Fetching"), and scripts can't set
  C{Host}. So a browser's request without C{Sec-Fetch-Site} must name the host of the origin that may ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from ecrproxy.addresses import is_address

ANY: Final = "*"
"""Allows every origin."""
_OWN_SITES: Final = ("none", "same-origin")
"""Values of C{Sec-Fetch-Site} of a request that no other origin caused; C{none} is the address bar."""


def is_ours(host: str, named: frozenset[str] = frozenset()) -> bool:
    """
    Return True if C{host} is a name that no stranger can have lead here.

    @param named: names that the operator has given, in lower case.
    """
    name = host.lower()
    return is_address(host.removeprefix("[").removesuffix("]")) or _is_local(name) or name in named


def has_no_dot(host: str) -> bool:
    """
    Return True for a name that only the local network can have given: a container, a Service of Kubernetes.
    """
    return "." not in host


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


@dataclass(frozen=True, slots=True)
class Pages:
    """
    The web pages that may ask on the client port.

    @ivar origin: one origin, or C{ANY}; none for no page of another site.
    @ivar proved: whether clients have to prove who they are, which a page can't do for its reader.
    """

    origin: str | None = None
    proved: bool = False

    def may_ask(self, origin: str | None, site: str | None, *, secure: bool, host: str) -> bool:
        """
        Return False for a browser's request that a page has caused which may not.

        @param origin: C{Origin}.
        @param site: C{Sec-Fetch-Site}.
        @param secure: whether it came over TLS: there a name that is not of the certificate fails.
        @param host: C{Host} without the port.
        """
        if self.origin == ANY:
            return True
        if origin is not None:
            return origin == self.origin
        if site is not None:
            return site in _OWN_SITES
        return secure or self.proved or host.lower() in self._named

    @property
    def _named(self) -> frozenset[str]:
        host = urlsplit(self.origin or "").hostname
        return frozenset({host} if host else ())

    def headers(self) -> dict[str, str]:
        """
        Return the headers that tell browsers the same, for every answer.
        """
        if self.origin is None:
            return {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        return {"X-Content-Type-Options": "nosniff", "Access-Control-Allow-Origin": self.origin}
