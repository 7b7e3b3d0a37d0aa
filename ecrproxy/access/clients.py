"""
Admission of clients: by network, certificate, name and password.

All configured checks must pass. The cheapest comes first, so clients outside the networks don't learn that passwords
exist. Headers such as X-Forwarded-For are never trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason

if TYPE_CHECKING:
    from ecrproxy.access.passwords import Passwords

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Caller:
    """
    What is known about a client.

    @ivar address: empty for connections to a Unix socket.
    @ivar certified: True if TLS has verified a client certificate.
    @ivar authorization: the Authorization header.
    """

    address: str
    certified: bool = False
    authorization: str | None = field(default=None, repr=False)


def is_in(address: str, networks: Sequence[Network]) -> bool:
    """
    Return True if an address is in one of the networks; False for texts that are not addresses.
    """
    try:
        found: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in networks)


class Admission:
    """
    Decides which clients may send requests.

    @param networks: allowed networks; None to allow all.
    @param certificates: True to require a client certificate.
    @param passwords: checks name and password, if required.
    """

    def __init__(
        self,
        networks: Sequence[Network] | None = None,
        *,
        certificates: bool = False,
        passwords: Passwords | None = None,
    ) -> None:
        self._networks, self._certificates, self._passwords = networks, certificates, passwords

    async def admit(self, caller: Caller) -> None:
        """
        Return if C{caller} is admitted.

        @raise RegistryError: otherwise.
        """
        refusal = self._refusal(caller)
        if refusal is not None:
            raise refusal
        if self._passwords is not None:
            await self._passwords.admit(caller.address, caller.authorization)

    def knows(self, caller: Caller) -> bool:
        """
        Return True if L{admit} would admit C{caller} without checking a password.
        """
        if self._refusal(caller) is not None:
            return False
        return self._passwords is None or self._passwords.knows(caller.address, caller.authorization)

    def _refusal(self, caller: Caller) -> RegistryError | None:
        if self._networks is not None and not is_in(caller.address, self._networks):
            return RegistryError(403, "DENIED", "this proxy does not serve your address", reason=Reason.ADDRESS)
        if self._certificates and not caller.certified:
            return RegistryError(
                403,
                "DENIED",
                "this proxy asks for a client certificate: client.cert and client.key in docker's certs.d",
                reason=Reason.CERTIFICATE,
            )
        return None

    def reread(self) -> bool:
        """
        Read the password file again, whether or not it seems to have changed.

        @return: True if there is a password file.
        """
        if self._passwords is not None:
            self._passwords.reread()
        return self._passwords is not None
