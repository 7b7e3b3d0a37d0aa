"""
Whether ECR is asked at all while it keeps failing: for one repository, and for all.

Rules:

- A repository whose questions fail so many times in a row, each after its retries, is left alone: its questions are
  refused at once, so that what the cache has can be served without waiting. The others do not notice. After a pause
  one question at a time is the probe.
- When several repositories have failed and none was answered meanwhile, or ECR can't be reached at all, it is ECR that
  is left alone. Then the daemon itself asks, something that is about no repository, until there is an answer.
- An answer ends it. A failure after a pause makes the next one twice as long, but a pause only spares those who are
  reached: while ECR can't be reached, pauses stay short.
- Whether an answer is a failure is for who asks to say: throttling and refusals are none.
- Whether ECR can be fetched from is another matter, and is told sooner than a circuit opens: see L{Circuit.problem}.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from twisted.logger import Logger

from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.retries import TransientError

log = Logger()

FAILURES: Final = 5
"""Failures in a row before a repository is left alone; and ECR, where they did not reach it."""
REPOSITORIES: Final = 3
"""Repositories that fail, with no answer to any between, before ECR is left alone."""
PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 20.0
"""Seconds that clients may be refused after ECR is well again; one probe in that time spares ECR enough."""
ANSWER_SECONDS: Final = 10.0
"""For so long after an answer, failures of one or two repositories are not taken for ECR's."""
KEPT: Final = 1000
"""Maximum number of failing repositories that are remembered."""


class CircuitState(enum.Enum):
    """
    Which questions go.
    """

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class CircuitOpenError(UnavailableError):
    """
    ECR keeps failing, and is not asked.
    """

    reason = Reason.CIRCUIT_OPEN


class Switch:
    """
    The switch between those who ask and what they ask.

    @param who: what is behind it, for people.
    @param now: tells the time.
    @ivar state: which questions go now.
    @ivar problem: the failure that opened it last.
    @ivar alone: whether ECR answered about others while this kept failing.
    """

    def __init__(self, who: str, now: Callable[[], float]) -> None:
        self._who, self._now = who, now
        self.state = CircuitState.CLOSED
        self.problem, self.alone = "", False
        self._failures, self._until, self._pause = 0, 0.0, PAUSE

    @property
    def rest(self) -> float:
        """
        Seconds until a probe may go.
        """
        return max(0.0, self._until - self._now())

    def refusal(self) -> CircuitOpenError:
        """
        Say that nothing is asked, and when it may be.
        """
        wait = {"Retry-After": str(max(1, math.ceil(self.rest)))}
        return CircuitOpenError(503, "UNAVAILABLE", f"{self._who} keeps failing, and is left alone", wait)

    def check(self) -> None:
        """
        Make sure that a question would go.

        @raise CircuitOpenError: if not.
        """
        if self.state is CircuitState.PROBING or (self.state is CircuitState.OPEN and self.rest):
            raise self.refusal()

    def enter(self) -> bool:
        """
        Let a question go.

        @return: whether it is the probe: how that ends must be told.
        @raise CircuitOpenError: if it must not go.
        """
        self.check()
        if self.state is CircuitState.CLOSED:
            return False
        self.state = CircuitState.PROBING
        return True

    def answered(self) -> None:
        """
        Note an answer; the next pause is a short one.
        """
        self._pause = PAUSE
        self.close()

    def close(self) -> None:
        """
        Let all questions go; unless one is answered first, the next pause is longer than the last.
        """
        self._failures = 0
        if self.state is not CircuitState.CLOSED:
            self.state = CircuitState.CLOSED
            log.info("{who} answers again: all questions go to it", who=self._who)

    def failed(self, problem: TransientError) -> bool:
        """
        Note that a question has failed, after all its tries; tell whether that opened the switch.
        """
        if self.state is not CircuitState.CLOSED:  # it was asked before it opened, and says nothing new
            return False
        self._failures += 1
        if self._failures < FAILURES:
            return False
        self.open(problem)
        return True

    def probe_failed(self, problem: UnavailableError) -> None:
        """
        Note that the probe has failed.
        """
        if self.state is CircuitState.PROBING:
            self.open(problem)

    def probe_left(self) -> None:
        """
        Note that the probe ended without telling anything, as when who asked has left: the next to ask is the probe.
        """
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    def open(self, problem: UnavailableError) -> None:
        """
        Let no question go for a while.
        """
        reached = not isinstance(problem, TransientError) or problem.reached
        pause, self.problem = self._pause if reached else PAUSE, problem.message
        self.state, self._until = CircuitState.OPEN, self._now() + pause
        self._pause = min(LONGEST_PAUSE, 2 * pause) if reached else PAUSE
        log.warn(
            "{who} keeps failing, it is left alone for {pause:.0f} s: {problem}",
            who=self._who,
            pause=pause,
            problem=problem.message,
        )


class Circuit:
    """
    The switches between the proxy and ECR: one for all questions, and one for each repository that fails.

    @param now: tells the time.
    @ivar whole: the one for all; its probe is not a client's question.
    @ivar answered_at: when ECR answered last, if it ever did.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.whole = Switch("ECR", now)
        self.answered_at: float | None = None
        self._parts: OrderedDict[str, Switch] = OrderedDict()
        # Since the last answer:
        self._failing: set[str] = set()
        self._failures, self._unreached, self._last = 0, 0, ""

    @property
    def state(self) -> CircuitState:
        """
        Which questions go, whatever the repository.
        """
        return self.whole.state

    @property
    def open_repositories(self) -> int:
        """
        Count the repositories that are left alone, each by itself.
        """
        return sum(part.state is not CircuitState.CLOSED for part in self._parts.values())

    def problem(self) -> str | None:
        """
        Say why nothing can be fetched, if ECR is left alone or has answered nothing since the last questions failed.

        One failed question is enough, for it failed after all its tries, and at little traffic the next may be minutes
        away. It is not while ECR answered within the last C{ANSWER_SECONDS}, nor if it is about a repository that
        failed before ECR answered about others: then it takes C{FAILURES} of them.
        """
        if self.state is not CircuitState.CLOSED:
            return f"ECR keeps failing, and is left alone for a while: {self.whole.problem}"
        answered_lately = self.answered_at is not None and self._now() - self.answered_at < ANSWER_SECONDS
        alone = {name for name in self._failing & self._parts.keys() if self._parts[name].alone}
        new = self._unreached or self._failing - alone
        if answered_lately or not (new or self._failures >= FAILURES):
            return None
        return f"ECR failed when it was asked last, for {' and '.join(sorted(self._failing))}: {self._last}"

    def check(self, repository: str) -> None:
        """
        Make sure that a question about C{repository} would go.

        @raise CircuitOpenError: if not.
        """
        if self.state is not CircuitState.CLOSED:
            raise self.whole.refusal()
        if (part := self._parts.get(repository)) is not None:
            part.check()

    def enter(self, repository: str) -> Switch | None:
        """
        Let a question about C{repository} go.

        @return: the switch whose probe it is, if it is one: how that ends must be told.
        @raise CircuitOpenError: if it must not go.
        """
        self.check(repository)
        part = self._parts.get(repository)
        return part if part is not None and part.enter() else None

    def answered(self, repository: str) -> None:
        """
        Note that ECR answered a question about C{repository}.
        """
        self.answered_at = self._now()
        for name in self._failing & self._parts.keys():
            self._parts[name].alone = True
        self._forget_failures()
        if (part := self._parts.pop(repository, None)) is not None:
            part.answered()
        self.whole.answered()

    def failed(self, repository: str, problem: TransientError) -> Switch | None:
        """
        Note that a question about C{repository} has failed, after all its tries; return the switch that this opened.
        """
        if self.state is not CircuitState.CLOSED:
            return None
        self._failing.add(repository)
        self._failures, self._last = self._failures + 1, problem.message
        self._unreached = 0 if problem.reached else self._unreached + 1
        if len(self._failing) >= REPOSITORIES or self._unreached >= FAILURES:
            self._forget_failures()
            self.whole.open(problem)
            return self.whole
        if problem.reached and (part := self._part(repository)).failed(problem):
            return part
        return None

    def recovered(self) -> None:
        """
        Note that ECR answered the daemon's own question: let all questions go again, whatever the repository.
        """
        self.answered_at = self._now()
        self._parts.clear()
        self.whole.close()

    def _forget_failures(self) -> None:
        self._failing.clear()
        self._failures, self._unreached, self._last = 0, 0, ""

    def _part(self, repository: str) -> Switch:
        part = self._parts.setdefault(repository, Switch(f"ECR's repository {repository}", self._now))
        self._parts.move_to_end(repository)
        if len(self._parts) > KEPT:
            self._parts.popitem(last=False)
        return part
