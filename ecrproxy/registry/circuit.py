"""
Whether ECR is asked at all while it keeps failing: for one repository, and for all.

Rules:

- A repository whose questions fail so many times in a row, each after its retries, is left alone: its questions are
  refused at once, so that what the cache has can be served without waiting. The others do not notice. After a pause
  one question at a time is the probe.
- A repository's lists of tags and referrers have a switch of their own: ECR may fail for these calls alone, as where
  the upstream of a pull-through cache has to be asked for referrers. Their failures are no evidence about pulls,
  neither here nor for ECR as a whole, unless ECR was not reached; but the daemon asks its own question then.
  An answer to them says as much of ECR as one to that question does.
- When several repositories have failed and none was answered meanwhile, or ECR can't be reached at all, it is ECR that
  is left alone. Then the daemon itself asks, something that is about no repository, until there is an answer.
- Repositories below one first component are no evidence against ECR, for a client can make up their names, and the
  upstream of a pull-through cache rule may be what fails. The daemon asks its own question before ECR is left alone.
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

from ecrproxy.oci import first_component
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.denials import Denials
from ecrproxy.registry.retries import TransientError

log = Logger()

FAILURES: Final = 5
"""Failures in a row before a repository is left alone; and ECR, where they did not reach it."""
REPOSITORIES: Final = 3
"""
Repositories, each below another first component, that fail with no answer to any between before ECR is left alone;
where the daemon's own question failed as well, just repositories.
"""
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
    @param who: what the log and clients are told that it is.
    @ivar whole: the one for all; its probe is not a client's question.
    @ivar answered_at: when ECR answered last, if it ever did.
    @ivar denials: whether it answers anything but denials.
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
        Which questions go, whatever the repository.
        """
        return self.whole.state

    @property
    def open_repositories(self) -> int:
        """
        Count the repositories, and the lists of repositories, that are left alone, each by itself.
        """
        return sum(part.state is not CircuitState.CLOSED for part in self._parts.values())

    def problem(self) -> str | None:
        """
        Say why nothing can be fetched: ECR is left alone, did not answer the last questions, or denies everything.

        One failed question is enough, for it failed after all its tries, and at little traffic the next may be minutes
        away. It is not while ECR answered within the last C{ANSWER_SECONDS}, nor if it is about a repository that
        failed before ECR answered about others: then it takes C{FAILURES} of them.
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
        Return True if nothing has failed since the last answer: else questions that nobody waits for are not asked.
        """
        return self.state is CircuitState.CLOSED and not self._failures and repository not in self._parts

    def check(self, repository: str, *, lists: bool = False) -> None:
        """
        Make sure that a question about C{repository} would go.

        @param lists: whether it is about its tags or referrers, here and below.
        @raise CircuitOpenError: if not.
        """
        if self.state is not CircuitState.CLOSED:
            raise self.whole.refusal()
        for name in {repository, _named(repository, lists=lists)}:
            if (part := self._parts.get(name)) is not None:
                part.check()

    def enter(self, repository: str, *, lists: bool = False) -> Switch | None:
        """
        Let a question about C{repository} go.

        @return: the switch whose probe it is, if it is one: how that ends must be told.
        @raise CircuitOpenError: if it must not go.
        """
        self.check(repository, lists=lists)
        part = self._parts.get(_named(repository, lists=lists))
        return part if part is not None and part.enter() else None

    def answered(self, repository: str, *, lists: bool = False) -> None:
        """
        Note that ECR answered a question about C{repository}.
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
        Note that a question about C{repository} has failed, after all its tries; return the switch that this opened.
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
        Whether the daemon's own question would tell if ECR is to be left alone.
        """
        return self.state is CircuitState.CLOSED and len(self._evidence) >= REPOSITORIES

    def heard_since(self, moment: float) -> bool:
        """
        Return True if ECR answered any question after C{moment}.
        """
        return any(at is not None and at > moment for at in (self.answered_at, self._vouched_at))

    def doubted(self, problem: UnavailableError) -> Switch | None:
        """
        Note that the daemon's own question has failed while all questions go; return the switch that this opened.
        """
        if self.state is not CircuitState.CLOSED:  # it was asked before that, and says nothing new
            return None
        self._doubted, self._last = True, problem.message
        return self._open(problem) if self._convinced() else None

    def vouched(self) -> None:
        """
        Note that ECR answered the daemon's own question while all questions go, or gave a list.

        What failed until now was the fault of its repositories. It remains one: no pull was answered.
        """
        self._vouched_at, self._unreached = self._now(), 0
        self._forget_evidence()

    def recovered(self) -> None:
        """
        Note that ECR answered the daemon's own question: let all questions go again, whatever the repository.
        """
        self.answered_at = self._now()
        self._parts.clear()
        self.whole.close()

    def dissolve(self) -> None:
        """
        Let all questions go, whatever failed.
        """
        self._parts.clear()
        self._forget_failures()
        self.whole.state = CircuitState.CLOSED

    def _convinced(self) -> bool:
        """
        Return True if the failures since the last answer mean ECR.
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
    Name a switch, for people too: no repository's name has a blank.
    """
    return f"{repository} (tags and referrers)" if lists else repository
