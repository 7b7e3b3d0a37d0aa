"""
The variables of the proxies that this one takes the place of, and what they are called here. Pure.

The nginx-based AWS ECR Docker Proxy has our names, but for one; its ancestor has names of its own. Such a variable is
not read, for some of them, as C{PORT}, are set by others for other reasons: who set it is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ecrproxy.settings.complaints import Complaint

_ANCESTOR: Final = {
    "UPSTREAM": "PROXY_ECR_ENDPOINT",
    "PORT": "PROXY_PORT",
    "RESOLVER": "PROXY_DNS_RESOLVER",
    "CACHE_MAX_SIZE": "PROXY_CACHE_LIMIT",
    "CACHE_KEY": "PROXY_CACHE_KEY",
    "ENABLE_SSL": "PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE, which alone make TLS",
    "REGISTRY_HTTP_TLS_KEY": "PROXY_SSL_KEY",
    "REGISTRY_HTTP_TLS_CERTIFICATE": "PROXY_SSL_CERTIFICATE",
    "AWS_USE_EC2_ROLE_FOR_AUTH": "AWS_INSTANCE_AUTH",
}
_MEANINGLESS: Final = {"PROXY_LISTENER_OPTIONS": "HTTP/2 is not offered, and TLS needs no options"}
PREDECESSORS: Final = frozenset({*_ANCESTOR, *_MEANINGLESS})
"""Their variables."""


def notices(environ: Mapping[str, str]) -> Iterator[Complaint]:
    """
    Say of each variable of a predecessor that is set what to set instead; nothing where that is set too.
    """
    for old, new in _ANCESTOR.items():
        if environ.get(old) and not environ.get(new.partition(" ")[0]):
            yield Complaint(f"{old} is set, which this proxy does not read", f"set {new}; see docs/moving.rst")
    for name, why in _MEANINGLESS.items():
        if environ.get(name):
            yield Complaint(f"{name} is set, which means nothing here: {why}", "unset it; see docs/moving.rst")
