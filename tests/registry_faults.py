"""
Faults that a test can inject into the stand-in for ECR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.registry_bucket import bucket_error
from tests.registry_http import Asked, Reply, Service
from tests.registry_replies import api_error, registry_error


@dataclass
class Fault:
    """
    A fault, for some requests, some number of times or until removed.

    With C{reply} the request gets that answer; with C{break_after} the true answer
    stops after so many bytes; with C{pace} its body comes at so many bytes a second,
    or with 0 not at all; C{drop} closes the connection without an answer; else there is no answer.
    """

    service: Service
    method: str | None = None
    path_contains: str = ""
    times: int | None = None
    reply: Reply | None = None
    break_after: int | None = None
    drop: bool = False
    pace: float | None = None

    def strikes(self, asked: Asked) -> bool:
        """
        Return True if this request is affected, and count it.
        """
        if self.times == 0 or not asked.matches(self.service, self.method, self.path_contains):
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def remove(self) -> None:
        """
        Remove the fault.
        """
        self.times = 0


class Faults:
    """
    The active faults, and shortcuts for the usual ones.
    """

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._corrupted: dict[str, bytes] = {}

    def fault(self, fault: Fault) -> Fault:
        """
        Add a fault; of several that match a request, the one added last applies.
        """
        self._faults.insert(0, fault)
        return fault

    def fail(
        self,
        service: Service,
        *,
        status: int = 500,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        times: int | None = None,
        path_contains: str = "",
        method: str | None = None,
    ) -> Fault:
        """
        Answer the next matching requests with this status.
        """
        reply = Reply(status, dict(headers or {}), body)
        return self.fault(Fault(service, method, path_contains, times, reply))

    def deny(
        self,
        action: str = "ecr:BatchGetImage",
        *,
        times: int | None = None,
        path_contains: str = "",
    ) -> Fault:
        """
        Answer as if IAM denied access: a 403 that a new token doesn't change.
        """
        who = "User: arn:aws:iam::123456789012:user/stand-in"
        text = f"{who} is not authorized to perform: {action}"
        reply = registry_error(403, "DENIED", text)
        return self.fault(Fault("registry", None, path_contains, times, reply))

    def throttle(
        self,
        service: Service,
        *,
        times: int | None = None,
        path_contains: str = "",
        retry_after: str | None = None,
    ) -> Fault:
        """
        Answer "too many requests" in the service's own words.
        """
        words = {
            "registry": registry_error(429, "TOOMANYREQUESTS", "Rate exceeded"),
            "bucket": bucket_error(503, "SlowDown", "Please reduce your request rate."),
            "api": api_error(400, "ThrottlingException", "Rate exceeded"),
        }[service]
        extra = {} if retry_after is None else {"Retry-After": retry_after}
        reply = Reply(words.status, {**words.headers, **extra}, words.body)
        return self.fault(Fault(service, None, path_contains, times, reply))

    def break_off(
        self,
        after: int,
        *,
        service: Service = "bucket",
        path_contains: str = "",
        times: int | None = 1,
    ) -> Fault:
        """
        Send only so many bytes of the body, then close the connection.
        """
        return self.fault(Fault(service, "GET", path_contains, times, break_after=after))

    def hang(
        self,
        service: Service,
        path_contains: str = "",
        *,
        method: str | None = None,
        times: int | None = None,
    ) -> Fault:
        """
        Neither answer nor close.
        """
        return self.fault(Fault(service, method, path_contains, times))

    def slow(
        self,
        service: Service,
        pace: float,
        path_contains: str = "",
        *,
        times: int | None = None,
        reply: Reply | None = None,
    ) -> Fault:
        """
        Send headers, and the body at so many bytes a second; with 0 no byte of it, and no end.

        C{reply} is sent that way instead of the true answer.
        """
        return self.fault(Fault(service, None, path_contains, times, reply, pace=pace))

    def refuse(self, service: Service, path_contains: str = "", *, times: int | None = None) -> Fault:
        """
        Close the connection instead of answering.
        """
        return self.fault(Fault(service, None, path_contains, times, drop=True))

    def corrupt(self, digest: str, data: bytes) -> None:
        """
        Serve other bytes for a blob or a manifest.
        """
        self._corrupted[digest] = data

    def heal(self) -> None:
        """
        Remove all faults and all corruption; held requests stay held.
        """
        self._faults.clear()
        self._corrupted.clear()

    def _struck_by(self, asked: Asked) -> Fault | None:
        return next((fault for fault in self._faults if fault.strikes(asked)), None)
