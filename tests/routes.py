"""
The registry that tests use where it makes no difference which one it is.
"""

from __future__ import annotations

from typing import Final

from ecrproxy.identity import RegistryId
from ecrproxy.oci import Route, parse_route

REGISTRY: Final = RegistryId.of_host("123456789012.dkr.ecr.eu-west-1.amazonaws.com")


def route_to(target: str) -> Route:
    """
    Parse a request target of that registry.
    """
    return parse_route(target, REGISTRY)
