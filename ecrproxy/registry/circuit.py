"""
Circuit breakers: while ECR keeps failing, requests for one repository, or all requests, are refused without asking it.

Rules:

- If enough requests for a repository fail in a row, each after its retries, its circuit opens: further requests for it
  are refused at once, so that cached answers can be served without waiting. Other repositories are not affected. After
  a pause, one request at a time is the probe.
- A repository's lists of tags and referrers have a circuit of their own, because ECR may fail for these calls alone:
  through a pull-through cache it asks the upstream registry for referrers. Their failures say nothing about pulls,
  neither here nor for ECR as a whole, unless ECR could not be reached; but then the daemon sends its own request.
  A successful answer to a list counts as much as one to that request.
- If several repositories have failed with no answer in between, or ECR can't be reached at all, the circuit of ECR as a
  whole opens. The daemon then sends its own request, which concerns no repository, until there is an answer.
- Repositories below one first component are no evidence against ECR: a client can make up their names, and the upstream
  of a pull-through cache rule may be what fails. The daemon sends its own request before the circuit of ECR opens.
- An answer closes a circuit. A failed probe doubles the next pause. A pause only helps a server that is reached, so
  pauses stay short while ECR can't be reached.
- The caller decides whether an answer is a failure: throttling and refusals are not.
- Whether ECR can be fetched from is reported earlier than a circuit opens: see L{Circuit.problem}.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from twisted.logger import Logger

from ecrproxy.oci import first_component
from ecrproxy.reasons import Reason
from ecrproxy.registry.denials import Denials
from ecrproxy.registry.retries import TransientError
from ecrproxy.registry.unavailable import UnavailableError

log = Logger()

FAILURES: Final = 5
"""Consecutive failures that open a repository's circuit; and that of ECR, if they did not reach it."""
REPOSITORIES: Final = 3
"""
Repositories that must fail, with no answer in between, before the circuit of ECR opens: each below another first
component, or any repositories if the daemon's own request failed as well.
"""
PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 20.0
"""Seconds that clients may be refused after ECR has recovered; one probe in that time spares ECR enough."""
ANSWER_SECONDS: Final = 10.0
"""For so many seconds after an answer, failures of one or two repositories do not count as ECR's."""
KEPT: Final = 1000
"""Maximum number of failing repositories that are remembered."""


class CircuitState(enum.Enum):
    """
    Which requests are sent.
    """

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class CircuitOpenError(UnavailableError):
    """
    ECR keeps failing, so no request is sent.
    """

    reason = Reason.CIRCUIT_OPEN


class Switch:
    """
    One circuit breaker.

    @param who: what it protects, for messages.
    @param now: returns the time in seconds.
    @ivar state: which requests are sent now.
    @ivar problem: the failure that opened it last.
    @ivar alone: whether ECR answered requests for others while this kept failing.
    """

    def __init__(self, who: str, now: Callable[[], float]) -> None:
        self._who, self._now = who, now
        self.state = CircuitState.CLOSED
        self.problem, self.alone = "", False
        self._failures, self._until, self._pause = 0, 0.0, PAUSE

    @property
    def rest(self) -> float:
        """
        Return the seconds until a probe may be sent.
        """
        return max(0.0, self._until - self._now())

    def refusal(self) -> CircuitOpenError:
        """
        Return the error for requests that are not sent, with the time of the next attempt.
        """
        wait = {"Retry-After": str(max(1, math.ceil(self.rest)))}
        return CircuitOpenError(503, "UNAVAILABLE", f"{self._who} keeps failing, and is left alone", wait)

    def check(self) -> None:
        """
        Check that a request would be sent.

        @raise CircuitOpenError: if not.
        """
        if self.state is CircuitState.PROBING or (self.state is CircuitState.OPEN and self.rest):
            raise self.refusal()

    def enter(self) -> bool:
        """
        Admit a request.

        @return: whether it is the probe; its outcome must be reported.
        @raise CircuitOpenError: if it must not be sent.
        """
        self.check()
        if self.state is CircuitState.CLOSED:
            return False
        self.state = CircuitState.PROBING
        return True

    def answered(self) -> None:
        """
        Note an answer; the next pause is short.
        """
        self._pause = PAUSE
        self.close()

    def close(self) -> None:
        """
        Admit all requests; unless one is answered first, the next pause is longer than the last.
        """
        self._failures = 0
        if self.state is not CircuitState.CLOSED:
            self.state = CircuitState.CLOSED
            log.info("{who} answers again: all questions go to it", who=self._who)

    def failed(self, problem: TransientError) -> bool:
        """
        Note that a request has failed after all its attempts; return True if that opened the circuit.
        """
        if self.state is not CircuitState.CLOSED:  # sent before the circuit opened, so it says nothing new
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
        Note that the probe ended without an outcome, as when its client left: the next request is the probe.
        """
        if self.state is CircuitState.PROBING:
            self.state = CircuitState.OPEN

    def open(self, problem: UnavailableError) -> None:
        """
        Refuse all requests for a while.
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
    The circuit breakers between the proxy and ECR: one for all requests, and one for each failing repository.

    @param now: returns the time in seconds.
    @param who: the registry's name in the log and for clients.
    @ivar whole: the circuit of ECR as a whole; its probe is not a client's request.
    @ivar answered_at: when ECR last answered, if ever.
    @ivar denials: whether ECR denies everything.
    """

    def __init__(self, now: Callable[[], float], who: str = "ECR") -> None:
        self._now, self._who = now, who
        self.whole = Switch(who, now)
        self.answered_at: float | None = None
        self.denials = Denials(who)
        self._parts: OrderedDict[str, Switch] = OrderedDict()
        # Since the last answer:
        self._failing: set[str] = set()
        self._failures, self._unreached, self._last = 0, 0, ""
        # Since the last answer, also to the daemon's own question:
        self._evidence: set[str] = set()
        self._doubted = False
        self._vouched_at: float | None = None

    @property
    def state(self) -> CircuitState:
        """
        The state for requests of any repository.
        """
        return self.whole.state

    @property
    def open_repositories(self) -> int:
        """
        Return the number of repositories, and of repositories' lists, whose own circuit is open.
        """
        return sum(part.state is not CircuitState.CLOSED for part in self._parts.values())

    def problem(self) -> str | None:
        """
        Return why nothing can be fetched.

        Either the circuit of ECR is open, or the last requests were not answered, or ECR denies everything.

        One failed request is enough, because it failed after all its attempts, and with little traffic the next may be
        minutes away. It is not enough if ECR answered within the last C{ANSWER_SECONDS}, or if the repository had
        failed before ECR answered requests for others: then it takes C{FAILURES} of them.
        """
        if self.state is not CircuitState.CLOSED:
            return f"{self._who} keeps failing, and is left alone for a while: {self.whole.problem}"
        answered_lately = self.answered_at is not None and self._now() - self.answered_at < ANSWER_SECONDS
        alone = {name for name in self._failing & self._parts.keys() if self._parts[name].alone}
        new = self._unreached or self._failing - alone or self._doubted
        if answered_lately or not (new or self._failures >= FAILURES):
            return self.denials.problem()
        about = " and ".join(sorted(self._failing)) or "the proxy itself"
        return f"{self._who} failed when it was asked last, for {about}: {self._last}"

    def is_well(self, repository: str) -> bool:
        """
        Return True if nothing has failed since the last answer; else requests that no client waits for are not sent.
        """
        return self.state is CircuitState.CLOSED and not self._failures and repository not in self._parts

    def check(self, repository: str, *, lists: bool = False) -> None:
        """
        Check that a request for C{repository} would be sent.

        @param lists: whether it is for its tags or referrers, here and below.
        @raise CircuitOpenError: if not.
        """
        if self.state is not CircuitState.CLOSED:
            raise self.whole.refusal()
        for name in {repository, _named(repository, lists=lists)}:
            if (part := self._parts.get(name)) is not None:
                part.check()

    def enter(self, repository: str, *, lists: bool = False) -> Switch | None:
        """
        Admit a request for C{repository}.

        @return: the circuit whose probe it is, if any; its outcome must be reported.
        @raise CircuitOpenError: if it must not be sent.
        """
        self.check(repository, lists=lists)
        part = self._parts.get(_named(repository, lists=lists))
        return part if part is not None and part.enter() else None

    def answered(self, repository: str, *, lists: bool = False) -> None:
        """
        Note that ECR answered a request for C{repository}.
        """
        if (part := self._parts.pop(_named(repository, lists=lists), None)) is not None:
            part.answered()
        if lists:
            self.vouched()
            return
        self.answered_at = self._now()
        for name in self._failing & self._parts.keys():
            self._parts[name].alone = True
        self._forget_failures()
        self.whole.answered()

    def failed(self, repository: str, problem: TransientError, *, lists: bool = False) -> Switch | None:
        """
        Note that a request for C{repository} has failed after all its attempts; return the circuit that this opened.
        """
        if self.state is not CircuitState.CLOSED:
            return None
        if lists and problem.reached:
            part = self._part(_named(repository, lists=True))
            return part if part.failed(problem) else None
        if len(self._failing) < REPOSITORIES:
            self._failing.add(repository)
        self._evidence.add(repository)
        self._failures, self._last = self._failures + 1, problem.message
        self._unreached = 0 if problem.reached else self._unreached + 1
        if self._convinced():
            return self._open(problem)
        if problem.reached and (part := self._part(repository)).failed(problem):
            return part
        return None

    @property
    def suspects(self) -> bool:
        """
        Return True if the daemon's own request would decide whether the circuit of ECR opens.
        """
        return self.state is CircuitState.CLOSED and len(self._evidence) >= REPOSITORIES

    def heard_since(self, moment: float) -> bool:
        """
        Return True if ECR answered any request after C{moment}.
        """
        return any(at is not None and at > moment for at in (self.answered_at, self._vouched_at))

    def doubted(self, problem: UnavailableError) -> Switch | None:
        """
        Note that the daemon's own request has failed while all are admitted; return the circuit that this opened.
        """
        if self.state is not CircuitState.CLOSED:  # sent before the circuit opened, so it says nothing new
            return None
        self._doubted, self._last = True, problem.message
        return self._open(problem) if self._convinced() else None

    def vouched(self) -> None:
        """
        Note that ECR answered the daemon's own request while all requests are admitted, or returned a list.

        The failures so far were due to the repositories. They still count for these, because no pull was answered.
        """
        self._vouched_at, self._unreached = self._now(), 0
        self._forget_evidence()

    def recovered(self) -> None:
        """
        Note that ECR answered the daemon's own request: admit all requests again, for every repository.
        """
        self.answered_at = self._now()
        self._parts.clear()
        self.whole.close()

    def dissolve(self) -> None:
        """
        Admit all requests, whatever failed.
        """
        self._parts.clear()
        self._forget_failures()
        self.whole.state = CircuitState.CLOSED

    def _convinced(self) -> bool:
        """
        Return True if the failures since the last answer are ECR's.
        """
        if self._unreached >= FAILURES:
            return True
        components = {first_component(repository) for repository in self._evidence}
        return len(components if not self._doubted else self._evidence) >= REPOSITORIES

    def _open(self, problem: UnavailableError) -> Switch:
        self._forget_failures()
        self.whole.open(problem)
        return self.whole

    def _forget_failures(self) -> None:
        self._forget_evidence()
        self._failing.clear()
        self._failures, self._unreached, self._last = 0, 0, ""

    def _forget_evidence(self) -> None:
        self._evidence.clear()
        self._doubted = False

    def _part(self, repository: str) -> Switch:
        part = self._parts.setdefault(repository, Switch(f"{self._who}'s repository {repository}", self._now))
        self._parts.move_to_end(repository)
        if len(self._parts) > KEPT:
            self._parts.popitem(last=False)
        return part


def _named(repository: str, *, lists: bool) -> str:
    """
    Return a circuit's name for messages: a repository's name has no space, unlike other names.
    """
    return f"{repository} (tags and referrers)" if lists else repository
