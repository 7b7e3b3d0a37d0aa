"""
Whether and when upstream is asked again after a failure that may pass. Pure.

Rules:

- Only what may pass is tried again: L{TransientError}. All our questions are GET or HEAD: asking twice does no harm.
- The waits grow exponentially, with full jitter: those who failed together don't come back together.
- What upstream says in Retry-After is the least that is waited; where that is beyond the budget, there is no other try.
- The budget tells whether a try begins, it cuts none short: who was silent for long is not asked again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError

TRANSIENT_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
FIRST_WAIT: Final = 1.0
"""The most seconds before the second try; twice as many before each further one."""
LONGEST_ASKED: Final = 86400.0
"""The most seconds that an upstream may ask for in Retry-After; clients are told no more."""


@dataclass(frozen=True, slots=True)
class Budget:
    """
    How often a question may be asked, and for how many seconds after the first time.
    """

    tries: int = 3
    seconds: float = 10.0


class TransientError(UnavailableError):
    """
    Upstream failed in a way that may pass: throttled, failing, silent, or not to be reached.

    @ivar wait: how many seconds it asked to be left alone, if it did.
    @ivar reached: whether there was a connection.
    """

    reason = Reason.UNREACHABLE
    wait: float | None = None
    reached = True

    @property
    def throttled(self) -> bool:
        """
        Tell whether upstream is well, and asked too often.
        """
        return self.status == 429  # noqa: PLR2004


class Tries:
    """
    How often one question has failed, since when.
    """

    def __init__(self, budget: Budget, began: float) -> None:
        self._budget, self._began, self._failed = budget, began, 0

    def seconds(self, now: float) -> float:
        """
        Return the seconds since the first try, or since it began to wait for its turn.
        """
        return now - self._began

    def give_up(self) -> None:
        """
        Let there be no other try, whatever the budget says.
        """
        self._failed = self._budget.tries

    def failed(self, problem: TransientError, now: float, chance: float) -> float | None:
        """
        Count a failure; tell in how many seconds to try again, if at all.
        """
        self._failed += 1
        return next_try(self._budget, self._failed, now - self._began, problem.wait, chance)


def next_try(budget: Budget, tries: int, elapsed: float, asked: float | None, chance: float) -> float | None:
    """
    Tell in how many seconds to try again; none if no more.

    @param tries: how many there were.
    @param elapsed: how many seconds ago the first began.
    @param asked: how many seconds upstream asked to be left alone, if it did.
    @param chance: a random number from 0 to 1.
    """
    left = budget.seconds - elapsed - (asked or 0.0)
    if tries >= budget.tries or left <= 0:
        return None
    return (asked or 0.0) + chance * min(left, FIRST_WAIT * 2.0 ** (min(tries, 30) - 1))


def asked_wait(retry_after: str | None, date: str | None) -> float | None:
    """
    Read a Retry-After as seconds: RFC 9110, 10.2.3. A moment counts from the answer's own Date, not from our clock.
    """
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdecimal():
        return min(LONGEST_ASKED, float(retry_after[:18]))
    try:
        then, now = parsedate_to_datetime(retry_after), parsedate_to_datetime(date or "")
        return min(LONGEST_ASKED, max(0.0, (then - now).total_seconds()))
    except (ValueError, TypeError, OverflowError):
        return None  # it says nothing that we understand


def failure(who: str, status: int, wait: float | None) -> TransientError:
    """
    Say to the client what it means that C{who} answers with one of C{TRANSIENT_STATUSES}.

    @param wait: what C{asked_wait} read.
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
