"""
Whether ECR is asked at all while it keeps failing.

Rules:

- Closed: all questions go. So many in a row that failed, each after its retries, open it.
- Open: none goes, each is refused at once, so that what the cache has can be served without waiting. After a pause
  one question at a time is the probe.
- Any answer closes it; a probe that fails opens it again, for twice as long.
- Whether an answer is a failure is for who asks to say: throttling and refusals are none.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Final

from twisted.logger import Logger

from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError

log = Logger()

FAILURES: Final = 5
"""Questions in a row that fail before none is asked."""
PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 60.0


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


class Circuit:
    """
    The switch between the proxy and ECR.

    @param now: tells the time.
    @ivar state: which questions go now.
    @ivar answered_at: when ECR answered last, if it ever did.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.state = CircuitState.CLOSED
        self.answered_at: float | None = None
        self._failures, self._until, self._pause = 0, 0.0, PAUSE

    def check(self) -> None:
        """
        Make sure that a question would go.

        @raise CircuitOpenError: if not.
        """
        paused = self.state is CircuitState.OPEN and self._now() < self._until
        if paused or self.state is CircuitState.PROBING:
            raise self.refusal()

    def refusal(self) -> CircuitOpenError:
        """
        Say that ECR is not asked, and when it may be.
        """
        wait = str(max(1, math.ceil(self._until - self._now())))
        return CircuitOpenError(503, "UNAVAILABLE", "ECR keeps failing, and is left alone", {"Retry-After": wait})

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
        Note that ECR answers.
        """
        self._failures, self._pause = 0, PAUSE
        self.answered_at = self._now()
        if self.state is not CircuitState.CLOSED:
            self.state = CircuitState.CLOSED
            log.info("ECR answers again: all questions go to it")

    def failed(self, problem: UnavailableError) -> None:
        """
        Note that a question has failed, after all its tries.
        """
        if self.state is CircuitState.CLOSED:  # else it was asked before it opened, and says nothing new
            self._failures += 1
            if self._failures >= FAILURES:
                self._open(problem)

    def probe_failed(self, problem: UnavailableError) -> None:
        """
        Note that the probe has failed.
        """
        if self.state is CircuitState.PROBING:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._open(problem)

    def probe_left(self) -> None:
        """
        Note that the probe ended without telling anything, as when who asked has left: the next to ask is the probe.
        """
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    def _open(self, problem: UnavailableError) -> None:
        self.state, self._until = CircuitState.OPEN, self._now() + self._pause
        log.warn(
            "ECR keeps failing, it is left alone for {pause:.0f} s: {problem}",
            pause=self._pause,
            problem=problem.message,
        )
