"""
Requests that browsers send for web pages: which pages may send requests and read responses. Pure.

Rules:

- Pages that fetch with CORS are identified by C{Origin} (Fetch standard, "Origin header"); all pages of other sites by
  C{Sec-Fetch-Site} (W3C Fetch Metadata). Scripts can't set either header. Container runtimes and other programs send
  neither.
- Browsers send C{Sec-Fetch-Site} only over TLS and to loopback. Over plain HTTP, an image, a frame or a fetch without
  CORS from another site looks like the address bar; so does a page whose name was rebound to this address (DNS
  rebinding). But browsers add C{Accept-Language} to all requests without one (Fetch standard, "Fetching"), and scripts
  can't set C{Host}. So browser requests without C{Sec-Fetch-Site} must name the host of an allowed origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from ecrproxy.addresses import is_address

ANY: Final = "*"
"""Allows every origin."""
_OWN_SITES: Final = ("none", "same-origin")
"""Values of C{Sec-Fetch-Site} for requests that no other origin caused; C{none} is the address bar."""


def is_ours(host: str, named: frozenset[str] = frozenset()) -> bool:
    """
    Return True if an attacker can't make C{host} resolve to this machine.

    @param named: names that the operator configured, in lower case.
    """
    name = host.lower()
    return is_address(host.removeprefix("[").removesuffix("]")) or _is_local(name) or name in named


def is_own_page(origin: str, site: str | None, host: str, *, secure: bool) -> bool:
    """
    Return True if a page of the very server that it sends a request to has sent it. Its names must be L{is_ours}.

    @param origin: C{Origin}.
    @param site: C{Sec-Fetch-Site}; None if the browser does not send it, as over plain HTTP to another machine.
    @param host: C{Host} with the port.
    @param secure: True for TLS. Something in front may have ended it: then the browser tells C{site}.
    """
    scheme, _, authority = origin.partition("://")
    if scheme not in ("http", "https") or authority.lower() != host.lower() or not host:
        return False
    return site == "same-origin" if site is not None else scheme == ("https" if secure else "http")


def has_no_dot(host: str) -> bool:
    """
    Return True for names that only the local network resolves: containers, Kubernetes Services.
    """
    return "." not in host


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


@dataclass(frozen=True, slots=True)
class Pages:
    """
    The web pages that may send requests to the client port.

    @ivar origin: one origin, or C{ANY}; None to refuse pages of other sites.
    @ivar proved: True if clients must authenticate, which pages can't do for their users.
    """

    origin: str | None = None
    proved: bool = False

    def may_ask(self, origin: str | None, site: str | None, *, secure: bool, host: str) -> bool:
        """
        Return False for browser requests from a page that is not allowed.

        @param origin: C{Origin}.
        @param site: C{Sec-Fetch-Site}.
        @param secure: True for TLS, where names outside the certificate fail.
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
        Return the CORS headers for all responses.
        """
        if self.origin is None:
            return {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        return {"X-Content-Type-Options": "nosniff", "Access-Control-Allow-Origin": self.origin}
