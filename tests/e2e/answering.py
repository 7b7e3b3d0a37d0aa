"""
Answers as values, for the small servers of these tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET


@dataclass(frozen=True)
class Answer:
    """One response, as a value."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def errors(status: int, code: str, message: str) -> Answer:
    """
    Build an error in the distribution protocol's format.
    """
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Answer(status, body, {"Content-Type": "application/json; charset=utf-8"})


class Answering(Resource):
    """
    A resource whose answer may be delayed.
    """

    isLeaf = True

    async def answer(self, request: Request) -> Answer:
        """
        Return the answer.
        """
        raise NotImplementedError

    def render(self, request: Request) -> int:
        """
        Reply once the answer is known.
        """
        replying = Deferred.fromCoroutine(self.answer(request))
        replying.addErrback(self._failed).addCallback(self._reply, request)
        return NOT_DONE_YET

    def _failed(self, failure: Failure) -> Answer:
        return errors(503, "UNAVAILABLE", failure.getErrorMessage())

    def _reply(self, answer: Answer, request: Request) -> None:
        if getattr(request, "channel", None) is None:
            return
        request.setResponseCode(answer.status)
        for name, value in answer.headers.items():
            request.setHeader(name, value)
        if request.method != b"HEAD":
            request.setHeader("Content-Length", str(len(answer.body)))
            request.write(answer.body)
        request.finish()
