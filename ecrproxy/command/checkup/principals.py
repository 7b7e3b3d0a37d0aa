"""
The AWS identities that the configured registries are used with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ecrproxy.command.checkup.aws import Identity
from ecrproxy.command.checkup.findings import Once
from ecrproxy.command.checkup.senses import Account, Senses
from ecrproxy.registry.aws import Credentials
from ecrproxy.settings.registry_table import Protocol, RegistryTable


@dataclass(frozen=True, slots=True)
class Principal:
    """
    Credentials in a region, with their identity and ECR token.
    """

    account: Account
    identity: Once[Identity]
    token: Once[tuple[str, float]]


class Principals:
    """
    One principal for all registries that use the same credentials in the same region.
    """

    def __init__(self, registries: Iterable[RegistryTable], senses: Senses) -> None:
        keys = {_key(each) for each in registries}
        accounts = {(credentials, region): senses.account(region, credentials) for credentials, region in keys}
        self._principals = {
            key: Principal(each, Once(each.identity), Once(each.token)) for key, each in accounts.items()
        }

    def of(self, table: RegistryTable) -> Principal:
        """
        Return the principal for a registry.
        """
        return self._principals[_key(table)]


def without_role(table: RegistryTable, region: str, senses: Senses) -> Account:
    """
    Return the account of a registry's credentials, before they assume a role.
    """
    return senses.account(region, replace(_key(table)[0], role=None, external_id=None))


def _key(table: RegistryTable) -> tuple[Credentials, str]:
    """
    Return the credentials for a registry, and the region where their token is valid.
    """
    public = table.protocol is Protocol.ECR_PUBLIC
    return Credentials(table.role, table.external_id, table.profile, table.instance_auth, public), table.region or ""
