"""
ECR's refusals: what they mean for the proxy and for its clients.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from twisted.logger import Logger
from twisted.web.iweb import IResponse

from ecrproxy.oci import Kind, RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError

log = Logger()

# Error codes of a 400 about the token; for an unreadable token ECR sends text that is not the spec's JSON.
_TOKEN_CODES: Final = frozenset({"", "DENIED", "UNAUTHORIZED"})
_TOKEN_WORDS: Final = re.compile(r"\bauthorization token\b")


class NoListError(UnavailableError):
    """
    A 404 for referrers without the spec's JSON: the registry does not know them, or something else has answered.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    A registry's refusal.

    @ivar name: the registry's name in the log and for clients.
    @ivar code: the distribution spec's; empty if the answer is not the spec's JSON.
    """

    status: int
    code: str
    message: str
    challenged: bool
    name: str = "ECR"

    @classmethod
    def of(cls, response: IResponse, body: bytes, name: str = "ECR") -> Refusal:
        """
        Parse an answer that is not a success.
        """
        challenged = response.headers.hasHeader("WWW-Authenticate")
        return replace(cls.read(response.code, body, challenged=challenged), name=name)

    @classmethod
    def read(cls, status: int, body: bytes, *, challenged: bool) -> Refusal:
        """
        Parse the parts of such an answer.
        """
        code, message = "", body[:1000].decode("utf-8", "replace").strip()
        try:
            first = json.loads(body)["errors"][0]
            code, message = str(first.get("code") or ""), str(first.get("message", "")).strip()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # plain text, which ECR sends at times, is the message
        return cls(status, code, message, challenged=challenged)

    @property
    def is_registry_error(self) -> bool:
        """
        Return True if the answer is an error of the distribution spec; if not, something else may have answered.
        """
        return bool(self.code)

    @property
    def is_about_token(self) -> bool:
        """
        Return True if another token may help.

        Expired tokens are a 403 whose message says so, unreadable ones a 400 without challenge. A 403 of IAM is about
        permission, which no token changes, and a 400 with any other code about the request (docs/ecr.rst).
        """
        said = self.message.lower()
        match self.status:
            case 401:
                return True
            case 400:
                return not self.challenged and (self.code in _TOKEN_CODES or bool(_TOKEN_WORDS.search(said)))
            case 403:
                # ECR also says it in plain text.
                words = re.compile(r"\btoken\b") if self.is_registry_error else _TOKEN_WORDS
                return bool(words.search(said)) and "not authorized to perform" not in said
        return False

    def of_one(self, shown: str) -> Refusal:
        """
        Return the refusal if C{shown}, a token just issued, is for one repository alone: then it is a denial.

        Docker Hub answers 401 for repositories that don't exist, or are private, to every client.
        """
        return replace(self, status=403) if self.status == 401 and shown.startswith("Bearer ") else self  # noqa: PLR2004

    @property
    def _rejection(self) -> str:
        """
        Return the error for a rejected token.

        A 400 may be about something else, so its text is passed on; 401 and 403 may name AWS identities.
        """
        if self.status == 400:  # noqa: PLR2004
            return f"{self.name} answers 400, as to a token that it can't read: {self.message}"
        return f"{self.name} does not accept the proxy's token; its log says why"

    def raise_for(self, route: Route) -> NoReturn:
        """
        Raise the error for the client.
        """
        if self.is_about_token:
            log.error(
                "{name} rejects the token: {status} {said}",
                name=self.name,
                status=self.status,
                said=self.message,
                once=(self.name, self.status),
            )
            raise UnavailableError(502, "UNAVAILABLE", self._rejection, reason=Reason.NO_TOKEN)
        if self.status == 404 and not self.is_registry_error and route.kind is Kind.REFERRERS:  # noqa: PLR2004
            said = f"{self.name} lists no referrers: it answers 404, and not as a registry does"
            raise NoListError(502, "UNAVAILABLE", said)
        if self.status in (403, 404) and not self.is_registry_error:
            raise stranger(self.name, self.status, route)
        match self.status:
            case 404:
                said = self.message or f"{self.name} does not have it"
                raise RegistryError(404, self.code, said, reason=Reason.NOT_FOUND)
            case 403:
                log.error(
                    "{name} denies {path}: {said}",
                    name=self.name,
                    path=route.path,
                    said=self.message,
                    once=(self.name, route.path),
                )
                said = f"{self.name} denies the proxy access to {route.repository.name}; its log says why"
                raise RegistryError(403, "DENIED", said, reason=Reason.ECR_DENIED)
            # Clients fall back to tags when referrers are refused so, and Renovate requests fewer tags after a 405.
            case 405 | 406 if route.kind in (Kind.REFERRERS, Kind.TAGS):
                said = self.message or f"{self.name} lists no {route.kind.value}"
                raise RegistryError(self.status, self.code or "UNSUPPORTED", said)
            case 400:
                raise RegistryError(400, self.code or "UNSUPPORTED", self.message or f"{self.name} refuses the request")
        raise UnavailableError(502, "UNAVAILABLE", f"{self.name} answers {self.status}")


def stranger(name: str, status: int, route: Route) -> UnavailableError:
    """
    Log that something else has answered for the registry C{name}, and return the error for the client.
    """
    log.error(
        "Something other than {name} answered {status} for {path}: the answer is not a registry's JSON;"
        " check proxies and firewalls between this host and the registry",
        name=name,
        status=status,
        path=route.path,
        once=(name, status),
    )
    said = f"something other than {name} answers {status} in its place; the proxy's log says more"
    return UnavailableError(502, "UNAVAILABLE", said)
