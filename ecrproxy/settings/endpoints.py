"""
Parsers for the endpoints and regions of registries.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from ecrproxy.addresses import is_address

HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.IGNORECASE)
_REGION = re.compile(r"[a-z]{2,}(?:-[a-z]+)+-[0-9]+")
# 123456789012.dkr.ecr.REGION.amazonaws.com, -fips, .cn, .eu, dual-stack dkr-ecr.REGION.on.aws: docs/ecr.rst.
_ECR_HOST = re.compile(r"([0-9]{12})\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\..+")
_AWS_HOST = re.compile(
    r".*\.(?:amazonaws\.com|amazonaws\.com\.cn|amazonaws\.eu|on\.aws|on\.amazonwebservices\.com\.cn)"
)
_ISOLATED_HOST = re.compile(r".*\.(?:c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov|on\.aws\.\w.*)")
# Resolvers read a host that ends with a number as an address: 5000 is 0.0.19.136.
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)
_NUMBERS: Final = {**dict.fromkeys(range(1, 6), "a port alone"), 12: "an account, not the host of its registry"}
_OTHER_REGISTRY = re.compile(
    r"(?:.+\.)?(?:docker\.io|docker\.com|public\.ecr\.aws|ecr-public\.aws\.com|ghcr\.io|quay\.io|gcr\.io|pkg\.dev"
    r"|registry\.k8s\.io|mcr\.microsoft\.com|azurecr\.io|registry\.gitlab\.com)"
)
_EXAMPLE: Final = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
_REGIONS: Final = """
    af-south-1 ap-east-1 ap-east-2 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2
    ap-southeast-1 ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-6 ap-southeast-7
    ca-central-1 ca-west-1 cn-north-1 cn-northwest-1 eu-central-1 eu-central-2 eu-isoe-west-1 eu-north-1
    eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 eusc-de-east-1 il-central-1 me-central-1 me-south-1
    me-west-1 mx-central-1 sa-east-1 sa-west-1 us-east-1 us-east-2 us-gov-east-1 us-gov-west-1 us-iso-east-1
    us-iso-west-1 us-isob-east-1 us-isob-west-1 us-isof-east-1 us-isof-south-1 us-west-1 us-west-2
"""
REGIONS: Final = frozenset(_REGIONS.split())
"""The regions in botocore 1.43's partitions.json. Other regions only cause a warning."""


class SecretError(ValueError):
    """
    The text may be a secret, so the error must not show it.
    """


def parse_endpoint(text: str) -> str:
    """
    Parse the URL of a private ECR registry; a bare host means https.
    """
    url = parse_url(text)
    parts = urlsplit(url)
    if (why := no_registry_of_ecr(parts.scheme, parts.hostname or "")) is not None:
        raise ValueError(f"{why}; give one such as {_EXAMPLE}")
    return url


def parse_url(text: str) -> str:
    """
    Parse a registry's URL; a bare host means https.
    """
    if "@" in text:
        raise SecretError(f"holds a name or password; give the URL alone, such as {_EXAMPLE}")
    url = text.strip() if "://" in text else f"https://{text.strip()}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname or ""
    good = parts.scheme in ("http", "https") and (HOST.fullmatch(host) or is_address(host)) and port != 0
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"not the URL of a registry; give one such as {_EXAMPLE}")
    bracketed = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{bracketed}" + (f":{port}" if port else "")


def parse_endpoints(text: str) -> tuple[str, ...]:
    """
    Parse registry URLs, separated by whitespace.
    """
    words = text.split()
    if "@" in text or len(words) < 2:  # noqa: PLR2004 (of one, the setting's own line says which it is)
        return (parse_endpoint(text),)
    endpoints = []
    for word in words:
        try:
            endpoints.append(parse_endpoint(word))
        except ValueError as problem:
            raise ValueError(f"{word!r} is {problem}") from None
    return tuple(endpoints)


def no_registry_of_ecr(scheme: str, host: str) -> str | None:
    """
    Return why a host can't be a private ECR registry; None for names outside AWS, which may be aliases of one.
    """
    first, _, rest = host.partition(".")
    why = None
    if is_other_registry(host):
        why = "not a private registry of ECR"
    elif _NUMBER.fullmatch(host) and not is_address(host):
        why = _NUMBERS.get(len(host), "neither a name nor an address")
    elif not _AWS_HOST.fullmatch(host) or first.startswith("vpce-"):
        pass
    elif scheme == "http":
        why = "ECR speaks https alone"
    elif not re.match(r"dkr[.-]ecr", rest):
        why = "a host of AWS that is no registry"
    elif not re.fullmatch(r"[0-9]{12}", first):
        why = f"an account has 12 digits, unlike {first!r}"
    elif not _REGION.fullmatch(region_of(f"https://{host}") or ""):
        why = "a registry's name has its region"
    return why


def is_of_aws(host: str) -> bool:
    """
    Return True if a host belongs to AWS.
    """
    return _AWS_HOST.fullmatch(host) is not None


def is_other_registry(host: str) -> bool:
    """
    Return True for the host of a public registry, or of another vendor's.
    """
    return _OTHER_REGISTRY.fullmatch(host) is not None


def endpoint_in_doubt(endpoint: str) -> str | None:
    """
    Return what is odd about a URL that almost looks like an ECR registry's.
    """
    host = urlsplit(endpoint).hostname or ""
    if "." not in host and host != "localhost" and not is_address(host):
        return "a name without a dot is no registry of ECR"
    if ".ecr." not in host or _AWS_HOST.fullmatch(host) or _ISOLATED_HOST.fullmatch(host):
        return None
    return "the name resembles ECR's, but its end is none of AWS's"


def parse_region(text: str) -> str:
    """
    Parse the name of an AWS region.
    """
    if not _REGION.fullmatch(text):
        raise ValueError("not the name of an AWS region; give one such as eu-west-1")
    return text


def region_of(endpoint: str) -> str | None:
    """
    Return the region in an ECR endpoint's host name; None if there is none.
    """
    found = _ECR_HOST.fullmatch(urlsplit(endpoint).hostname or "")
    return found[2] if found else None
