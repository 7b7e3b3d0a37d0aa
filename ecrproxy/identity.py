"""
The registry behind a host name, whatever its spelling. Pure.

An ECR registry has several names: FIPS, dual-stack, and those of its partition; so have Docker Hub and ECR Public.
Data about one registry's repositories must not be used for another's, so all stored data carries a L{RegistryId}.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import urlsplit

_HTTPS: Final = 443
# The names in ECR's credential helper (docs/ecr.rst); dual-stack names have dkr-ecr and on.aws.
_ECR_HOST: Final = re.compile(
    r"([0-9]{12})\.dkr[.-]ecr(?:-fips)?\.([a-z]+(?:-[a-z]+)+-[0-9]+)\."
    r"(amazonaws\.(?:com|com\.cn|eu)|on\.aws|on\.amazonwebservices\.(?:com\.cn|eu)"
    r"|c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)"
)
_HUBS: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_PUBLICS: Final = frozenset({"public.ecr.aws", "ecr-public.aws.com"})  # the latter also has IPv6
_ECR_IDENTITY: Final = re.compile(r"aws[a-z-]*:([a-z0-9-]+):([0-9]{12})")
_PARTITIONS: Final = {
    "cn-": "aws-cn",
    "us-gov-": "aws-us-gov",
    "eusc-": "aws-eusc",
    "us-iso-": "aws-iso",
    "us-isob-": "aws-iso-b",
    "eu-isoe-": "aws-iso-e",
    "us-isof-": "aws-iso-f",
}
_DOMAINS: Final = {
    "aws-cn": "amazonaws.com.cn",
    "aws-eusc": "amazonaws.eu",
    "aws-iso": "c2s.ic.gov",
    "aws-iso-b": "sc2s.sgov.gov",
    "aws-iso-e": "cloud.adc-e.uk",
    "aws-iso-f": "csp.hci.ic.gov",
}


class RegistryId(NamedTuple):
    """
    The identity of a registry: partition, region and account for ECR, otherwise host and port.
    """

    text: str

    @classmethod
    def of_host(cls, name: str, port: int = _HTTPS) -> RegistryId:
        """
        Return the registry with the host C{name}, which may end in a port.

        @param port: the default port.
        @raise ValueError: if C{name} is not a valid host name.
        """
        try:
            parts = urlsplit(f"//{name}")
            host, port = (parts.hostname or "").removesuffix("."), parts.port or port
        except ValueError:
            host = ""
        whole = host and not host.endswith(".") and host.isascii() and parts.netloc == name
        if not whole or "@" in name or name.endswith(":"):
            raise ValueError(f"{name[:80]!r} is not the name of a registry's host")
        if host in _HUBS and port == _HTTPS:
            return HUB
        if host in _PUBLICS and port == _HTTPS:
            return PUBLIC
        found = _ECR_HOST.fullmatch(host)
        if found is None or port != _HTTPS:
            return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        account, region, _ = found.groups()
        partition = next((each for prefix, each in _PARTITIONS.items() if region.startswith(prefix)), "aws")
        return cls(f"{partition}:{region}:{account}")

    @classmethod
    def of_url(cls, endpoint: str) -> RegistryId:
        """
        Return the registry at the URL C{endpoint}.
        """
        parts = urlsplit(endpoint)
        return cls.of_host(parts.netloc, 80 if parts.scheme == "http" else _HTTPS)

    @property
    def account_and_region(self) -> tuple[str, str] | None:
        """
        Account and region of a private ECR registry; None for any other.
        """
        found = _ECR_IDENTITY.fullmatch(self.text)
        return (found[2], found[1]) if found else None

    @property
    def host(self) -> str:
        """
        The most common host name; L{of_host} returns this registry for it.
        """
        if self.account_and_region is None:
            return self.text.removesuffix(f":{_HTTPS}")
        partition, region, account = self.text.split(":")
        return f"{account}.dkr.ecr.{region}.{_DOMAINS.get(partition, 'amazonaws.com')}"

    def __str__(self) -> str:
        return self.text


HUB: Final = RegistryId(f"docker.io:{_HTTPS}")
"""Docker Hub, under any of its names."""
PUBLIC: Final = RegistryId(f"public.ecr.aws:{_HTTPS}")
"""ECR Public, under any of its names."""
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_NAME_LENGTH: Final = 255


def is_repository_name(text: str) -> bool:
    """
    Return True if C{text} is a valid repository name: OCI distribution spec 1.1, "Pulling manifests".
    """
    return len(text) <= _NAME_LENGTH and _NAME.fullmatch(text) is not None


class Repository(NamedTuple):
    """
    A repository of a registry. Registries may have different repositories of the same name.

    @ivar name: the full name.
    """

    registry: RegistryId
    name: str
