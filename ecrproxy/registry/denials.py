"""
Whether ECR denies everything: it answers, and nothing can be fetched. Pure.

Rules:

- A 403 for one repository says nothing about the others: it may have its own policy, or a client may request what
  it should not. So only repositories count to which ECR has granted access before.
- Any other answer for any repository means that not everything is denied.
- While ECR has granted nothing yet, as after a start with a wrong role, several denials in a row count, if they are for
  several repositories: after a start with a full cache, a single forbidden one may be all that is requested.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

REPOSITORIES: Final = 3
"""
Repositories that were granted before and are denied now, with no other answer in between; or all of them, if fewer.
"""
DENIALS: Final = 5
SEVERAL: Final = 2
"""Number of consecutive denials, and of their repositories, while nothing has been granted."""
KEPT: Final = 1000
"""Maximum number of granted repositories that are remembered."""


class Denials:
    """
    What ECR has granted, and denied since.

    @param name: the registry's name in the log and for clients.
    """

    def __init__(self, name: str = "ECR") -> None:
        self._name = name
        self._granted: OrderedDict[str, None] = OrderedDict()
        self._denied: set[str] = set()
        self._count = 0

    def granted(self, repository: str) -> None:
        """
        Note that ECR answered a request for C{repository} with anything but a 403.
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
        Return that everything is denied, if so.
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
