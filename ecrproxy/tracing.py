"""
Spans of a trace: what the code between a client and ECR knows of tracing. L{ecrproxy.spans} makes and sends them.

Without tracing no span exists, and everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")

Attributes = Mapping[str, str | int | float | bool]
"""What a span says about itself: names and values of OpenTelemetry's semantic conventions, and ours, C{ecrproxy.*}."""


class Span(Protocol):
    """
    One piece of work in a trace.
    """

    @property
    def context(self) -> str:
        """
        The span's name for another service: a C{traceparent} header (W3C Trace Context, section 3.2), or nothing.
        """

    def child(self, name: str, attributes: Attributes, *, outgoing: bool = False) -> Span:
        """
        Begin a part of this work.

        @param outgoing: whether it is a request to another service.
        """

    def link(self, other: Span) -> None:
        """
        Say that this work waits for a part of another's.
        """

    def end(self, attributes: Attributes, *, name: str | None = None, failed: bool = False) -> None:
        """
        End the work. Only the first call counts.

        @param name: replaces the name given at the beginning.
        """


class Tracing(Protocol):
    """
    Begins traces.
    """

    @property
    def active(self) -> bool:
        """
        Whether there is tracing now.
        """

    def begin(self, context: str | None) -> Span | None:
        """
        Begin the work on a client's request; None if there is no tracing now.

        @param context: the client's C{traceparent}, if it sent one; an invalid one counts as none.
        """


current: ContextVar[Span | None] = ContextVar("span", default=None)
"""
The span of the current request.

Each coroutine has its own; shared work, such as a transfer, has that of the request that started it.
"""


def child(name: str, attributes: Attributes, *, outgoing: bool = False) -> Span | None:
    """
    Begin a part of the current work: see L{Span.child}.
    """
    span = current.get()
    return None if span is None else span.child(name, attributes, outgoing=outgoing)


def link(other: Span | None) -> None:
    """
    Say that the current work waits for a part of another's.
    """
    span = current.get()
    if span is not None and other is not None and other is not span:
        span.link(other)


def apart(work: Coroutine[Any, Any, T]) -> Deferred[T]:
    """
    Start work of the daemon itself: it may outlive by hours the request that caused it, and is no part of that.
    """
    return Context().run(Deferred.fromCoroutine, work)


@contextmanager
def part(name: str) -> Iterator[None]:
    """
    Do a part of the current work.
    """
    span = child(name, {})
    failed = True
    try:
        yield
        failed = False
    finally:
        if span is not None:
            span.end({}, failed=failed)
