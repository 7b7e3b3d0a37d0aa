"""
Check a registry other than the default one: role, token and login, or its password.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ecrproxy.command.checkup import account
from ecrproxy.command.checkup.findings import Finding, Verdict, failed
from ecrproxy.command.checkup.hosts import Hosts
from ecrproxy.command.checkup.network import look_at_host
from ecrproxy.command.checkup.principals import Principals
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.command.checkup.settings import look_at_password
from ecrproxy.registry.login import login_of, read_password
from ecrproxy.settings.registry_table import Protocol, RegistryTable


def look_at_registry(table: RegistryTable, principals: Principals, hosts: Hosts, now: float) -> Iterator[Finding]:
    """
    Check a registry; the findings have its name.

    @param now: seconds since the epoch.
    """
    token = None
    found: list[Finding] = []
    if table.protocol is not Protocol.OCI and not table.anonymous:
        principal = principals.of(table)
        if table.role is not None:
            found += account.look_at_role(principal.identity, table.role)
        found += account.look_at_token(principal.token, now)
        with contextlib.suppress(Exception):  # already reported
            token = principal.token.get()[0] if table.protocol is Protocol.ECR else None
    if table.password_file is not None:
        found.append(look_at_password(table.password_file))
    if table.endpoint is not None:
        found += _answer(table.endpoint, token, table, hosts, now)
    for each in found:
        yield replace(each, check=table.name, said=f"{each.check}: {each.said}")


def _answer(url: str, token: str | None, table: RegistryTable, hosts: Hosts, now: float) -> Iterator[Finding]:
    check, shown = "registry", {} if token is None else {"Authorization": f"Basic {token}"}
    contacts: list[Contact] = []

    def touch(address: str) -> Contact:
        contacts.append(hosts.touch(f"{url}/v2/", address, shown))
        return contacts[-1]

    found = list(look_at_host(check, url, hosts.addresses(url), touch, now))
    if any(each.verdict is Verdict.FAILED for each in found):
        yield from found
    elif token is None:
        yield from found
        challenge = contacts[-1].headers.get("www-authenticate", "")
        yield from account.look_at_realm(challenge, url, table.realms)
        with contextlib.suppress(OSError, ValueError):  # told already
            if (login := _login(table)) is not None:
                yield from account.look_at_login(challenge, url, table.realms, login, hosts.ask_with)
    elif contacts[-1].status == 200:  # noqa: PLR2004
        yield from (replace(each, said=f"{each.said}; it accepts the token") for each in found)
    else:
        said = f"answers {contacts[-1].status or contacts[-1].problem} to a fresh token"
        yield failed(check, said, "check that it is in the token's region, and that its account allows this one")


def _login(table: RegistryTable) -> str | None:
    """
    Return the login of a registry's table; None if it has none.

    @raise OSError: if the password can't be read.
    @raise ValueError: if the file has none.
    """
    if table.username is None or table.password_file is None:
        return None
    return login_of(table.username, read_password(Path(table.password_file)))
