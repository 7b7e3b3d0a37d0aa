"""
Errors of requests upstream, and the words for them.
"""

from __future__ import annotations

from OpenSSL import SSL
from twisted.internet.error import ConnectError, ConnectionClosed, ConnectionDone
from twisted.internet.error import TimeoutError as NotConnectedError
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed

from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason


class UnavailableError(RegistryError):
    """
    ECR, or a bucket, does not answer or fails; it may answer later.
    """

    reason = Reason.FAILING


class RefusedAnswerError(UnavailableError):
    """
    An answer that is not passed on: it is not what was requested, or does not match its digest.

    @ivar named: the digest that ECR named for it, unparsed; empty if none.
    """

    named = ""


def is_passed_on(failure: Failure, number: int) -> bool:
    """
    Return True if others may answer after one registry's failure: not after a refusal of the first.
    """
    return failure.check(RegistryError if number else UnavailableError) is not None


def is_passed_on_always(failure: Failure, _: int) -> bool:
    """
    Return True if others may answer after one registry's failure, when its refusals do not concern them.
    """
    return failure.check(RegistryError) is not None


def first_cause(problem: BaseException | None) -> BaseException | None:
    """
    Return the first cause of a network error.
    """
    while isinstance(problem, ResponseFailed) and problem.reasons:
        problem = problem.reasons[0].value
    return problem


def describe(problem: BaseException | None) -> str:
    """
    Describe a network error in a line, by its first cause.
    """
    problem = first_cause(problem)
    text = _words_of(problem).strip().rstrip(".") or type(problem).__name__
    return text.splitlines()[0][:200]


def _words_of(problem: BaseException | None) -> str:
    """
    Describe an error of Twisted or pyOpenSSL in common words; an error of the system in the system's words.
    """
    match problem:
        case NotConnectedError():
            return "the connection is not accepted"
        case ConnectError(args=(str() as said, *_)) if said:
            return said
        case ConnectionClosed(args=args):
            how = "closed" if isinstance(problem, ConnectionDone) else "lost"
            return ": ".join([f"the connection was {how}", *map(str, args)])
        case SSL.Error(args=([*errors], *_)) if errors:
            return f"TLS failed: {errors[-1][-1]}"
    return str(problem)
