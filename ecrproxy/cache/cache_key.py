"""
PROXY_CACHE_KEY: a template of nginx variables that names a cache entry. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ecrproxy.oci import Kind, Route, query_values

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_NAMES = frozenset(
    {
        "uri",
        "request_uri",
        "args",
        "host",
        "scheme",
        "request_method",
        "remote_addr",
        "repository",
        "reference",
        "digest",
    }
)
_OF_ROUTE = frozenset({"uri", "args", "repository", "reference", "digest"})
_PREFIXES = ("arg_", "http_")
# These hold secrets, and anyone with access to the cache's file names could test guesses against their hash.
_SECRET = frozenset({"http_authorization", "http_proxy_authorization", "http_cookie"})


@dataclass(frozen=True, slots=True)
class Asker:
    """
    The parts of a request outside its route.

    @ivar target: the raw request target.
    @ivar headers: by lower-case name.
    """

    method: str = "GET"
    target: str = ""
    scheme: str = "http"
    host: str = ""
    address: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


NOBODY: Final = Asker()


@dataclass(frozen=True, slots=True)
class CacheKey:
    """
    A parsed template: literal text and variables alternate, beginning and ending with text.
    """

    parts: Sequence[str]

    @classmethod
    def parse(cls, template: str) -> CacheKey:
        """
        Parse a template in the syntax of nginx's C{proxy_cache_key}: C{$name} or C{${name}}.

        @raise ValueError: for an unknown or secret variable, a lone C{$}, or a template without variables.
        """
        parts, end = [], 0
        for found in _VARIABLE.finditer(template):
            name = found[1] or found[2]
            if name not in _NAMES and not any(name.startswith(prefix) and name != prefix for prefix in _PREFIXES):
                known = ", ".join(f"${each}" for each in sorted(_NAMES))
                raise ValueError(f"${name} is unknown; there are {known}, $arg_NAME and $http_NAME")
            if name.lower() in _SECRET:
                raise ValueError(f"${name} is a client's secret, which goes nowhere; give $remote_addr, say")
            parts += [template[end : found.start()], name]
            end = found.end()
        parts.append(template[end:])
        if "$" in "".join(parts[::2]):
            raise ValueError("a $ without a variable's name behind it")
        if len(parts) == 1:
            raise ValueError("it has no variable, so that all requests would share one entry; give $uri, say")
        return cls(tuple(parts))

    @property
    def asks(self) -> bool:
        """
        Return True if the key depends on the client or the request, and not on the route alone.
        """
        return any(name not in _OF_ROUTE and not name.startswith("arg_") for name in self.parts[1::2])

    def expand(self, route: Route, asker: Asker) -> str:
        """
        Return the name of a request's cache entry.
        """
        values = [_value(part, route, asker) if odd % 2 else part for odd, part in enumerate(self.parts)]
        return "".join(values)


def _value(name: str, route: Route, asker: Asker) -> str:  # noqa: C901, PLR0911 (a table)
    match name:
        case "uri":
            return route.path
        case "request_uri":
            return asker.target
        case "args":
            return route.query
        case "host":
            return asker.host
        case "scheme":
            return asker.scheme
        case "request_method":
            return asker.method
        case "remote_addr":
            return asker.address
        case "repository":
            return route.repository.name
        case "reference":
            return route.reference if route.kind is not Kind.TAGS else ""
        case "digest":
            return str(route.digest or "")
    if name.startswith("arg_"):
        return query_values(route.query).get(name.removeprefix("arg_"), "")
    return asker.headers.get(name.removeprefix("http_").replace("_", "-").lower(), "")
