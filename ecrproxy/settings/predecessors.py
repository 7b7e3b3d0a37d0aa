"""
Variables of this proxy's predecessors, and the settings that replace them. Pure.

The nginx-based AWS ECR Docker Proxy uses our names, except one; its ancestor has names of its own. Those are not read,
because some, such as C{PORT}, are set for other reasons; they cause a notice.
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
    "ENABLE_SSL": "PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE, which enable TLS",
    "REGISTRY_HTTP_TLS_KEY": "PROXY_SSL_KEY",
    "REGISTRY_HTTP_TLS_CERTIFICATE": "PROXY_SSL_CERTIFICATE",
    "AWS_USE_EC2_ROLE_FOR_AUTH": "AWS_INSTANCE_AUTH",
}
_MEANINGLESS: Final = {"PROXY_LISTENER_OPTIONS": "HTTP/2 is not offered, and TLS needs no options"}
PREDECESSORS: Final = frozenset({*_ANCESTOR, *_MEANINGLESS})
"""The predecessors' variables."""


def notices(environ: Mapping[str, str]) -> Iterator[Complaint]:
    """
    Yield a notice for each predecessor's variable whose replacement is not set.
    """
    for old, new in _ANCESTOR.items():
        if environ.get(old) and not environ.get(new.partition(" ")[0]):
            yield Complaint(f"{old} is set, but this proxy does not read it", f"set {new}; see docs/moving.rst")
    for name, why in _MEANINGLESS.items():
        if environ.get(name):
            yield Complaint(f"{name} is set, but has no effect: {why}", "unset it; see docs/moving.rst")
