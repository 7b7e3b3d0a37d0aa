"""
Which registry a host name means, whatever its spelling. Pure.

One ECR registry has several names: FIPS, dual-stack, and those of its partition; so have Docker Hub and ECR Public.
What is known of one registry's repositories must not answer for another's, so whatever is kept about them carries a
L{RegistryId}.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import urlsplit

_HTTPS: Final = 443
# The names that ECR's credential helper knows (field notes C11); dual-stack ones have dkr-ecr and on.aws.
_ECR_HOST: Final = re.compile(
    r"([0-9]{12})\.dkr[.-]ecr(?:-fips)?\.([a-z]+(?:-[a-z]+)+-[0-9]+)\."
    r"(amazonaws\.(?:com|com\.cn|eu)|on\.aws|on\.amazonwebservices\.(?:com\.cn|eu)"
    r"|c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)"
)
_HUBS: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_PUBLICS: Final = frozenset({"public.ecr.aws", "ecr-public.aws.com"})  # the latter has IPv6, too
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
    The identity of a registry: partition, region and account where it is ECR's, else host and port.
    """

    text: str

    @classmethod
    def of_host(cls, name: str, port: int = _HTTPS) -> RegistryId:
        """
        Identify the registry that clients call C{name}: a host, with its port if that is not C{port}.

        @raise ValueError: if it is not the name of a host.
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
        Identify the registry at the URL C{endpoint}.
        """
        parts = urlsplit(endpoint)
        return cls.of_host(parts.netloc, 80 if parts.scheme == "http" else _HTTPS)

    @property
    def account_and_region(self) -> tuple[str, str] | None:
        """
        The account and the region of a private registry of ECR; None of any other.
        """
        found = _ECR_IDENTITY.fullmatch(self.text)
        return (found[2], found[1]) if found else None

    @property
    def host(self) -> str:
        """
        The host as most clients call it: L{of_host} of it is this registry.
        """
        if self.account_and_region is None:
            return self.text.removesuffix(f":{_HTTPS}")
        partition, region, account = self.text.split(":")
        return f"{account}.dkr.ecr.{region}.{_DOMAINS.get(partition, 'amazonaws.com')}"

    def __str__(self) -> str:
        return self.text


HUB: Final = RegistryId(f"docker.io:{_HTTPS}")
"""Docker Hub, by any of its names."""
PUBLIC: Final = RegistryId(f"public.ecr.aws:{_HTTPS}")
"""ECR Public, by any of its names."""
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_NAME_LENGTH: Final = 255


def is_repository_name(text: str) -> bool:
    """
    Return True if C{text} is in the grammar of repositories' names: OCI distribution spec 1.1, "Pulling manifests".
    """
    return len(text) <= _NAME_LENGTH and _NAME.fullmatch(text) is not None


class Repository(NamedTuple):
    """
    A repository of a registry. Another registry's of the same name is another one.

    @ivar name: its whole name.
    """

    registry: RegistryId
    name: str
