"""
Whether and when a request upstream is retried after a temporary failure. Pure.

Rules:

- Only temporary failures are retried: L{TransientError}. All requests are GET or HEAD, which may be repeated.
- Waits grow exponentially, with full jitter, so that requests that failed together are not retried together.
- Upstream's Retry-After is the minimum wait; if it exceeds the budget, there is no retry.
- The budget decides whether an attempt begins; it interrupts none. So after a long silence there is no retry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError

TRANSIENT_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
FIRST_WAIT: Final = 1.0
"""Maximum seconds before the second attempt; doubled before each further one."""
LONGEST_ASKED: Final = 86400.0
"""Maximum seconds of a Retry-After that are obeyed; clients are told at most that."""


@dataclass(frozen=True, slots=True)
class Budget:
    """
    The number of attempts of a request, and the seconds after the first in which another may begin.
    """

    tries: int = 3
    seconds: float = 10.0


class TransientError(UnavailableError):
    """
    A temporary failure upstream: throttled, failing, silent, or unreachable.

    @ivar wait: seconds of its Retry-After, if any.
    @ivar reached: whether there was a connection.
    """

    reason = Reason.UNREACHABLE
    wait: float | None = None
    reached = True

    @property
    def throttled(self) -> bool:
        """
        Return True if upstream is well, but throttles.
        """
        return self.status == 429  # noqa: PLR2004


class Tries:
    """
    Counts the failures of one request.
    """

    def __init__(self, budget: Budget, began: float) -> None:
        self._budget, self._began, self._failed = budget, began, 0

    def seconds(self, now: float) -> float:
        """
        Return the seconds since the first attempt, or since the request began to queue.
        """
        return now - self._began

    def give_up(self) -> None:
        """
        Make no further attempt, whatever the budget permits.
        """
        self._failed = self._budget.tries

    def failed(self, problem: TransientError, now: float, chance: float) -> float | None:
        """
        Count a failure; return the seconds until the next attempt, or None.
        """
        self._failed += 1
        return next_try(self._budget, self._failed, now - self._began, problem.wait, chance)


def next_try(budget: Budget, tries: int, elapsed: float, asked: float | None, chance: float) -> float | None:
    """
    Return the seconds until the next attempt; None for no further one.

    @param tries: number of attempts so far.
    @param elapsed: seconds since the first began.
    @param asked: seconds of upstream's Retry-After, if any.
    @param chance: a random number from 0 to 1.
    """
    left = budget.seconds - elapsed - (asked or 0.0)
    if tries >= budget.tries or left <= 0:
        return None
    return (asked or 0.0) + chance * min(left, FIRST_WAIT * 2.0 ** (min(tries, 30) - 1))


def asked_wait(retry_after: str | None, date: str | None) -> float | None:
    """
    Parse a Retry-After, in seconds: RFC 9110, 10.2.3. A date is relative to the answer's Date, not to our clock.
    """
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdecimal():
        return min(LONGEST_ASKED, float(retry_after[:18]))
    try:
        then, now = parsedate_to_datetime(retry_after), parsedate_to_datetime(date or "")
        return min(LONGEST_ASKED, max(0.0, (then - now).total_seconds()))
    except (ValueError, TypeError, OverflowError):
        return None  # unintelligible


def failure(who: str, status: int, wait: float | None) -> TransientError:
    """
    Return the error for the client after C{who} has answered with one of C{TRANSIENT_STATUSES}.

    @param wait: from C{asked_wait}.
    """
    later = str(max(1, math.ceil(wait))) if wait is not None else None
    if status == 429:  # noqa: PLR2004
        said, headers = f"{who} throttles the proxy", {"Retry-After": later or "1"}
        problem = TransientError(429, "TOOMANYREQUESTS", said, headers, Reason.THROTTLED)
    else:
        told = status if status in (503, 504) else 502
        headers = {"Retry-After": later or "5"} if told == status else {}
        problem = TransientError(told, "UNAVAILABLE", f"{who} answers {status}", headers, Reason.FAILING)
    problem.wait = wait
    return problem
