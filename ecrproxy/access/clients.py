"""
Who may ask: by network, by certificate, by name and password.

All that an operator has set must hold. What costs least is asked first, so nobody outside the networks learns that
there are passwords. What a client says of itself, as in X-Forwarded-For, is believed nowhere.
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
    What is known of who asks.

    @ivar address: empty for one that came by a socket that has a path.
    @ivar certified: whether TLS has verified a certificate of it.
    @ivar authorization: its Authorization header.
    """

    address: str
    certified: bool = False
    authorization: str | None = field(default=None, repr=False)


def is_in(address: str, networks: Sequence[Network]) -> bool:
    """
    Tell whether an address is in one of the networks; what is no address is in none.
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
    Lets in who may ask.

    @param networks: where clients must be; none for anywhere.
    @param certificates: whether they must have shown a certificate.
    @param passwords: asks them for one.
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
        Return if C{caller} may ask.

        @raise RegistryError: if not.
        """
        refusal = self._refusal(caller)
        if refusal is not None:
            raise refusal
        if self._passwords is not None:
            await self._passwords.admit(caller.address, caller.authorization)

    def knows(self, caller: Caller) -> bool:
        """
        Return True if L{admit} lets C{caller} in without having to check a password.
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
        Read the passwords again, whether or not their file seems to have changed.

        @return: whether there are any.
        """
        if self._passwords is not None:
            self._passwords.reread()
        return self._passwords is not None
