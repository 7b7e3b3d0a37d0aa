"""
The names of a registry's repositories: DescribeRepositories through botocore, in a thread.

ECR's registry has a catalog of its own, which can't be continued and is not documented (field notes C9).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ecrproxy.registry.aws import Credentials, open_client

PER_PAGE: Final = 1000
"""Names in an answer of ECR: the most that the API gives."""
PAGES: Final = 100
"""Most pages: ECR's default quota is 100,000 repositories a region."""
BYTES: Final = 8 * 2**20
"""Most bytes of names."""
SECONDS: Final = 20.0
"""Seconds after which no further page is asked for."""


class TooManyError(Exception):
    """
    ECR has more repositories than are listed.
    """


def list_repositories(
    region: str, credentials: Credentials, account: str | None, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """
    Return the names of all repositories of a registry, in ECR's order. Blocks: call it in a thread.

    @param account: whose registry; None for that of the credentials.
    @param clock: counts seconds.
    @raise TooManyError: if there are more than C{PAGES} pages, or C{BYTES} of names.
    @raise TimeoutError: if ECR has not given all pages within C{SECONDS}.
    @raise Exception: what L{open_client} raises.
    """
    deadline, size, names, more = clock() + SECONDS, 0, list[str](), dict[str, str]()
    if account is not None:
        more["registryId"] = account
    with open_client(region, credentials) as (client, _):
        for _ in range(PAGES):
            page = client.describe_repositories(maxResults=PER_PAGE, **more)
            names += (each["repositoryName"] for each in page["repositories"])
            size = sum(map(len, names))
            if size > BYTES:
                break
            if "nextToken" not in page:
                return names
            if clock() >= deadline:
                raise TimeoutError(f"ECR has not listed all repositories within {SECONDS:.0f} s")
            more["nextToken"] = page["nextToken"]
    raise TooManyError(f"ECR has more than {len(names)} repositories, which is more than this proxy lists")
