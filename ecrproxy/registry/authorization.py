"""
What a question shows to a registry, so that it is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokens(Protocol):
    """
    Where a secret comes from that goes behind C{Basic}: see C{ecr.TokenService} and C{login.Login}.
    """

    async def get(self) -> str:
        """Return the secret."""

    async def renew(self, refused: str) -> str:
        """Return another than C{refused}, or the same if there is no other."""


class Authorization(Protocol):
    """
    Gives values of the C{Authorization} header: RFC 9110, 11.6.2.
    """

    async def show(self, repository: str) -> str:
        """Return what to show when something of C{repository} is asked for; empty for nothing."""

    async def renew(self, refused: str, repository: str, challenges: Sequence[str]) -> str:
        """Return another than C{refused}, or the same if there is no other."""

    async def show_for_probe(self) -> str:
        """Return what to show when the registry itself is asked whether it answers; empty for nothing."""


class Basic:
    """
    One secret for all repositories, as private registries of ECR take it.
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
