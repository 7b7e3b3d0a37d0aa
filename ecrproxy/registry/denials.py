"""
Whether ECR denies the proxy everything: it answers, and nothing can be fetched. Pure.

Rules:

- A 403 for one repository says nothing about the others: it may have a policy of its own, or a client may ask for what
  it should not. So only repositories count that ECR has granted before.
- Any other answer about any repository means that not all is denied.
- While ECR has granted nothing yet, as after a start with a wrong role, so many denials in a row do, if they are about
  several repositories: after a start with a full cache, one that is forbidden may be all that is asked about.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

REPOSITORIES: Final = 3
"""Repositories that were granted before and are denied now, with no other answer between; or all of them, if fewer."""
DENIALS: Final = 5
SEVERAL: Final = 2
"""Denials in a row, and of how many repositories, while nothing was ever granted."""
KEPT: Final = 1000
"""Maximum number of granted repositories that are remembered."""


class Denials:
    """
    What ECR has granted, and denied since.

    @param name: what the log and clients are told that the registry is.
    """

    def __init__(self, name: str = "ECR") -> None:
        self._name = name
        self._granted: OrderedDict[str, None] = OrderedDict()
        self._denied: set[str] = set()
        self._count = 0

    def granted(self, repository: str) -> None:
        """
        Note that ECR answered a question about C{repository} with anything but a 403.
        """
        self._denied.clear()
        self._count = 0
        self._granted[repository] = None
        self._granted.move_to_end(repository)
        if len(self._granted) > KEPT:
            self._granted.popitem(last=False)

    def denied(self, repository: str) -> None:
        """
        Note a 403.
        """
        self._count += 1
        if repository in self._granted or (not self._granted and len(self._denied) < SEVERAL):
            self._denied.add(repository)

    def problem(self) -> str | None:
        """
        Say that everything is denied, if so.
        """
        if self._granted:
            enough = len(self._denied) >= min(REPOSITORIES, len(self._granted))
        else:
            enough = self._count >= DENIALS and len(self._denied) >= SEVERAL
        if not enough:
            return None
        about = " and ".join(sorted(self._denied)[:REPOSITORIES])
        said = f"{self._name} denies every question about {about}: HTTP 403"
        return f"{said}; check the IAM policy, and that of the repositories"
