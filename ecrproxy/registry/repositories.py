"""
The names of a registry's repositories: DescribeRepositories through botocore, in a thread.

ECR's registry has a catalog, which can't be continued and is not documented (docs/ecr.rst).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ecrproxy.registry.aws import Credentials, open_client

PER_PAGE: Final = 1000
"""Names per page: the API's maximum."""
PAGES: Final = 100
"""Maximum number of pages: ECR's default quota is 100,000 repositories per region."""
BYTES: Final = 8 * 2**20
"""Maximum bytes of names."""
SECONDS: Final = 20.0
"""Seconds after which no further page is requested."""


class TooManyError(Exception):
    """
    ECR has more repositories than are listed.
    """


def list_repositories(
    region: str, credentials: Credentials, account: str | None, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """
    Return the names of all repositories of a registry, in ECR's order. Blocks: call it in a thread.

    @param account: the registry's account; None for that of the credentials.
    @param clock: a monotonic clock, in seconds.
    @raise TooManyError: if there are more than C{PAGES} pages, or C{BYTES} of names.
    @raise TimeoutError: if ECR has not returned all pages within C{SECONDS}.
    @raise Exception: as L{open_client}.
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
