"""
One registry of the configuration: RegistryTable.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import regex


class Protocol(enum.Enum):
    """
    How a registry authenticates.
    """

    ECR = "ecr"
    ECR_PUBLIC = "ecr-public"
    OCI = "oci"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryTable:
    """
    One table, checked.

    @ivar name: the registry's name for clients; a wildcard's has an asterisk for the account.
    @ivar endpoint: the registry's URL; None for a wildcard, whose registries each have their own.
    @ivar region: the region of ECR's token.
    @ivar default: True for the registry of clients that name none.
    @ivar role: an ARN to assume with the available credentials; with C{external_id} if given.
    @ivar path_prefix: first component of a repository by which clients can select this registry.
    @ivar hosts: host names of this proxy that select this registry, without ports.
    @ivar namespaces: pattern that whole repository names must match; None for PROXY_NAMESPACE_PATTERN.
    @ivar anonymous: True to send requests without credentials.
    @ivar realms: hosts, with their ports, outside the registry's domain that may issue its tokens.
    @ivar repository_prefix: prefix of each name at the endpoint: that of ECR's own pull-through cache rule.
    """

    name: str
    protocol: Protocol
    endpoint: str | None
    region: str | None = None
    default: bool = False
    role: str | None = None
    external_id: str | None = None
    profile: str | None = None
    instance_auth: bool = False
    path_prefix: str | None = None
    hosts: frozenset[str] = frozenset()
    namespaces: regex.Pattern[str] | None = field(default=None, compare=False)
    replicas: tuple[str, ...] = ()
    anonymous: bool = False
    username: str | None = None
    password_file: str | None = None
    realms: frozenset[str] = frozenset()
    repository_prefix: str | None = None

    @property
    def credentials(self) -> tuple[str | bool | None, ...]:
        """
        Return the settings of the table that select credentials.
        """
        return self.role, self.external_id, self.profile, self.instance_auth

    @property
    def is_wildcard(self) -> bool:
        """
        Return True if the table covers all accounts of a region.
        """
        return self.endpoint is None
