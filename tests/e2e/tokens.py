"""
The AWS call that issues tokens, and the check of them.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from twisted.web.http import Request

from .answering import Answer, Answering, errors

ACCOUNT = "123456789012"


@dataclass
class Tokens:
    """
    The issued passwords, and their expiry.
    """

    life: float
    until: dict[str, float] = field(default_factory=dict)

    def issue(self) -> tuple[str, float]:
        """
        Issue a new token; previous ones stay valid, as ECR's do.
        """
        # A real role's token is this long, which has broken proxies.
        password = base64.b64encode(os.urandom(3500)).decode()
        token = base64.b64encode(f"AWS:{password}".encode()).decode()
        self.until[token] = time.time() + self.life
        return token, self.until[token]

    def refusal(self, authorization: str | None) -> Answer | None:
        """
        Return why a request is rejected, if it is.
        """
        if authorization is None:
            challenge = f'Basic realm="https://{ACCOUNT}.example/",service="ecr.amazonaws.com"'
            words = {"Content-Type": "text/plain; charset=utf-8", "WWW-Authenticate": challenge}
            return Answer(401, b"Not Authorized\n", words)
        until = self.until.get(authorization.removeprefix("Basic "))
        if until is None:
            return Answer(400, b"", {"Content-Type": "text/plain; charset=utf-8"})
        if until < time.time():
            expired = "Your authorization token has expired. Reauthenticate and try again."
            return errors(403, "DENIED", expired)
        return None


@dataclass
class Counters:
    """
    Counts of requests to the front.
    """

    token_calls: int = 0
    refused: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    repositories: Counter[str] = field(default_factory=Counter)


class Aws(Answering):
    """
    The API that issues tokens for signed requests.
    """

    def __init__(self, tokens: Tokens, counters: Counters, *, refuse: bool) -> None:
        super().__init__()
        self._tokens, self._counters, self._refuse = tokens, counters, refuse

    async def answer(self, request: Request) -> Answer:
        """
        Answer GetAuthorizationToken, and nothing else.
        """
        action = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
        signature = request.getHeader("Authorization") or ""
        if request.method != b"POST" or request.getHeader("X-Amz-Target") != action:
            return self._say(400, {"__type": "UnknownOperationException"})
        if not signature.startswith("AWS4-HMAC-SHA256 Credential="):
            return self._say(400, {"__type": "MissingAuthenticationTokenException"})
        self._counters.token_calls += 1
        if self._refuse:
            words = "The security token included in the request is invalid."
            return self._say(400, {"__type": "UnrecognizedClientException", "message": words})
        token, until = self._tokens.issue()
        data = {
            "authorizationToken": token,
            "expiresAt": until,
            "proxyEndpoint": f"https://{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com",
        }
        return self._say(200, {"authorizationData": [data]})

    def _say(self, status: int, body: dict[str, Any]) -> Answer:
        kind = {"Content-Type": "application/x-amz-json-1.1"}
        return Answer(status, json.dumps(body).encode(), kind)
