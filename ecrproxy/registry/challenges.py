"""
A registry's C{WWW-Authenticate}: RFC 9110, 11.6.1; and its token service's answer. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

from ecrproxy.addresses import is_address
from ecrproxy.identity import RegistryId

_WORD: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:\s*(=)\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]*)))?")
"""A scheme, or a parameter and its value."""
LONGEST_TOKEN: Final = 12 * 2**10
"""Maximum bytes of a token: it is sent in a header."""
DEFAULT_SECONDS: Final = 60
"""Lifetime of a token that names none: distribution's "Token Authentication Specification"."""
LONGEST_SECONDS: Final = 12 * 3600
_COUNTRY: Final = 2
"""Length of a country's top-level domain."""
_SHARED: Final = frozenset(
    {"ac", "co", "com", "edu", "go", "gob", "gouv", "gov", "govt", "mil", "ne", "net", "nom", "or", "org"}
)
"""Second-level labels that are shared below a country's domain, and so are not an owner's domain."""
_TOKEN: Final = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Challenge:
    """
    What a registry requires.

    @ivar scheme: C{basic}, C{bearer}, or empty for nothing.
    @ivar realm: the URL of its token service.
    @ivar scope: of all tokens; empty if each token is for a repository.
    """

    scheme: str = ""
    realm: str = ""
    service: str = ""
    scope: str = ""

    @classmethod
    def read(cls, values: Iterable[str]) -> Challenge | None:
        """
        Choose one of a registry's challenges; None if none is supported.

        A scope that names a repository is ignored: a token is always for pulls from the requested repository.
        """
        said: list[tuple[str, dict[str, str]]] = []
        for value in values:
            for name, equals, quoted, plain in _WORD.findall(value):
                if not equals:
                    said.append((name.lower(), {}))
                elif said:
                    said[-1][1].setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) or plain)
        found = dict(reversed(said))
        if "bearer" in found:
            words = found["bearer"]
            scope = words.get("scope", "")
            about_one = scope.startswith("repository:")
            return cls("bearer", words.get("realm", ""), words.get("service", ""), "" if about_one else scope)
        return cls("basic") if "basic" in found else None

    def scope_of(self, repository: str) -> str:
        """
        Return the scope of a token for a repository.
        """
        return self.scope or f"repository:{repository}:pull"

    def url(self, scope: str) -> str:
        """
        Return the URL that issues a token for C{scope}; if that is empty, a token that only proves the login.
        """
        parts = urlsplit(self.realm)
        asked = [(name, said) for name, said in (("service", self.service), ("scope", scope)) if said]
        query = "&".join(filter(None, [parts.query, urlencode(asked)]))
        return urlunsplit((parts.scheme, parts.netloc, parts.path or "/", query, ""))


@dataclass(frozen=True, slots=True)
class Pass:
    """
    A token, and its lifetime in seconds.
    """

    token: str
    seconds: float

    @classmethod
    def read(cls, body: bytes) -> Pass:
        """
        Parse a token service's answer.

        @raise ValueError: if it is invalid.
        """
        try:
            said = json.loads(body)
            token, seconds = said.get("token") or said.get("access_token"), said.get("expires_in") or DEFAULT_SECONDS
        except (ValueError, AttributeError, RecursionError):
            raise ValueError("no JSON object") from None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token) or len(token) > LONGEST_TOKEN:
            raise ValueError("no token, or none that fits a header")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise ValueError("it does not say for how long the token is good")
        return cls(token, min(seconds, LONGEST_SECONDS))

    def __repr__(self) -> str:
        return f"<Pass for {self.seconds:.0f} s>"


def _is_one(realm: str, endpoint: str) -> bool:
    """
    Return True if both hosts are the same registry, under any of its names.
    """
    try:
        return RegistryId.of_url(realm) == RegistryId.of_url(endpoint)
    except ValueError:
        return False


def may_follow(realm: str, endpoint: str, listed: Collection[str]) -> bool:
    """
    Return True if a user and password may be sent to C{realm}.

    It must be https, or http if the registry itself is; and at the registry's own host, under any of its names, in the
    same domain, or at a host that the operator lists. The domain of C{registry-1.docker.io} is C{docker.io}, that of
    C{quay.io} is C{quay.io}, that of C{example.co.uk} is C{example.co.uk}.

    @param endpoint: the registry's URL.
    @param listed: hosts, with their ports if they are not the scheme's default.
    """
    try:
        to, own = urlsplit(realm), urlsplit(endpoint)
        host, its = to.hostname or "", own.hostname or ""
        _ = to.port  # it may be invalid
    except ValueError:
        return False
    if not host or "@" in to.netloc or not realm.isascii() or to.scheme not in ("https", own.scheme):
        return False
    if host == its or to.netloc.lower() in listed or _is_one(realm, endpoint):
        return True
    parent = its.partition(".")[2]
    first, _, last = parent.partition(".")
    shared = not last or (first in _SHARED and len(last) == _COUNTRY)
    domain = its if shared else parent
    return not is_address(its) and (host == domain or host.endswith(f".{domain}"))


def redirected(url: str, location: str, endpoint: str, listed: Collection[str]) -> tuple[str, bool]:
    """
    Return where a token service redirects to, and whether the password may be shown there, too.

    Only to the same host, and not over http after https: Docker's clients do the same.

    @param endpoint: see L{may_follow}, also for C{listed}.
    @raise ValueError: if it may not be followed.
    """
    target = urljoin(url, location).partition("#")[0]
    if not may_follow(target, endpoint, listed):
        where = target.partition("?")[0][:200]
        raise ValueError(f"it redirects to {where!r}, which is not of the registry's domain, or not https")
    before, after = urlsplit(url), urlsplit(target)
    return target, before.hostname == after.hostname and after.scheme in ("https", before.scheme)
