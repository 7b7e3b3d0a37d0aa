"""
The Authorization of requests to a registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokens(Protocol):
    """
    Source of the secret after C{Basic}: see C{ecr.TokenService} and C{login.Login}.
    """

    async def get(self) -> str:
        """Return the secret."""

    async def renew(self, refused: str) -> str:
        """Return another secret than C{refused}, or the same if there is no other."""


class Authorization(Protocol):
    """
    Source of C{Authorization} headers: RFC 9110, 11.6.2.
    """

    async def show(self, repository: str) -> str:
        """Return the header for a request for C{repository}; empty for none."""

    async def renew(self, refused: str, repository: str, challenges: Sequence[str]) -> str:
        """Return another header than C{refused}, or the same if there is no other."""

    async def show_for_probe(self) -> str:
        """Return the header for the daemon's own request; empty for none."""


class Basic:
    """
    One secret for all repositories, as for private registries of ECR.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def show(self, repository: str) -> str:  # noqa: ARG002
        """
        Return the header with the token.

        @raise TokenUnavailableError: if there is none.
        """
        return f"Basic {await self._tokens.get()}"

    async def renew(self, refused: str, repository: str, challenges: Sequence[str]) -> str:  # noqa: ARG002
        """
        Return the header with another token.

        @raise TokenUnavailableError: if there is none.
        """
        return f"Basic {await self._tokens.renew(refused.removeprefix('Basic '))}"

    async def show_for_probe(self) -> str:
        """
        Return the header with the token.

        @raise TokenUnavailableError: if there is none.
        """
        return await self.show("")
