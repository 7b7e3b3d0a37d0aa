"""
Findings, and the parallel execution of checks.

Rules:

- Checks run in parallel, so all together take no longer than one may.
- What several checks need is determined once, by the first. If that fails, the check responsible for it reports why,
  and the others report that they were skipped.
- A check that does not finish in time is a finding, too. Its thread is abandoned, and ends with the program.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Verdict(enum.Enum):
    """
    The result of a check.
    """

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One result of a check.

    @ivar check: one or two words for what was checked.
    @ivar said: the result.
    @ivar advice: what to do; empty if nothing.
    """

    check: str
    verdict: Verdict
    said: str
    advice: str = ""


def ok(check: str, said: str, advice: str = "") -> Finding:
    """
    Return a finding without problems.
    """
    return Finding(check, Verdict.OK, said, advice)


def warning(check: str, said: str, advice: str) -> Finding:
    """
    Return a finding that may be intended, or is harmless for now.
    """
    return Finding(check, Verdict.WARNING, said, advice)


def failed(check: str, said: str, advice: str) -> Finding:
    """
    Return a finding that prevents the daemon from working.
    """
    return Finding(check, Verdict.FAILED, said, advice)


def skipped(check: str, said: str, advice: str = "") -> Finding:
    """
    Return a finding for a check that could not run.
    """
    return Finding(check, Verdict.SKIPPED, said, advice)


class SkippedError(Exception):
    """
    A check can't run; the message says why.
    """


class Once(Generic[T]):
    """
    A value that the first caller computes while the others wait.
    """

    def __init__(self, find: Callable[[], T]) -> None:
        self._find, self._lock = find, Lock()
        self._found: list[T] = []
        self._problem: Exception | None = None

    def get(self) -> T:
        """
        Return the value.

        @raise Exception: if it could not be computed; the same for all callers.
        """
        with self._lock:
            if self._problem is not None:
                raise self._problem
            if not self._found:
                try:
                    self._found.append(self._find())
                except Exception as problem:
                    self._problem = problem
                    raise
            return self._found[0]

    def need(self, what: str) -> T:
        """
        Return the value for a check that only depends on it.

        @raise SkippedError: if it could not be computed; says that C{what} is missing.
        """
        try:
            return self.get()
        except Exception as problem:
            raise SkippedError(f"not without {what}") from problem


@dataclass(frozen=True, slots=True)
class Check:
    """
    A named check.

    @ivar late: advice if it takes too long.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    late: str = field(default="find out what responds so slowly")

    def findings(self) -> list[Finding]:
        """
        Run the check.
        """
        found: list[Finding] = []
        try:
            found.extend(self.look())
        except SkippedError as problem:
            found.append(skipped(self.name, str(problem)))
        except Exception as problem:  # noqa: BLE001 (a failing check must not stop the others)
            said = f"the check failed: {type(problem).__name__}: {brief(problem)}"
            found.append(failed(self.name, said, "this is a bug in ecr-proxy: please report it"))
        return found


def brief(problem: object) -> str:
    """
    Return the first line of a message: AWS may repeat the signed request in later ones.
    """
    return str(problem).strip().partition("\n")[0][:300]


def examine(
    checks: Sequence[Check],
    limit: float,
    seconds: Callable[[], float],
    start: Callable[[Callable[[], None]], object],
) -> Iterator[Finding]:
    """
    Run all checks, and yield their findings in the order of the checks.

    @param limit: timeout for all checks, in seconds.
    @param seconds: a monotonic clock.
    @param start: runs a function in a new thread.
    """
    done: SimpleQueue[tuple[int, list[Finding]]] = SimpleQueue()
    until = seconds() + limit
    for number, check in enumerate(checks):
        start(lambda number=number, check=check: done.put((number, check.findings())))  # type: ignore[misc]
    found: dict[int, list[Finding]] = {}
    for number, check in enumerate(checks):
        while number not in found:
            try:
                at, findings = done.get(timeout=max(0.0, until - seconds()))
            except Empty:
                found[number] = [failed(check.name, f"no answer within {limit:g} s", check.late)]
            else:
                found[at] = findings
        yield from found[number]
