"""
What was found, and how all that is to be found is looked for at once.

Rules:

- Checks run side by side, so that all of them together take no longer than one may.
- What several checks need is found out once, by whoever asks first. Where that fails, the others say that they were
  skipped, and the one whose business it is says why.
- A check that does not end in time is a finding too. Its thread is left alone, and ends with the program.
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
    How it is.
    """

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that was looked at.

    @ivar check: what was looked at, in a word or two.
    @ivar said: how it is.
    @ivar advice: what to do about it, if something is to be done.
    """

    check: str
    verdict: Verdict
    said: str
    advice: str = ""


def ok(check: str, said: str, advice: str = "") -> Finding:
    """
    Find it well.
    """
    return Finding(check, Verdict.OK, said, advice)


def warning(check: str, said: str, advice: str) -> Finding:
    """
    Find something that may be meant, or does no harm yet.
    """
    return Finding(check, Verdict.WARNING, said, advice)


def failed(check: str, said: str, advice: str) -> Finding:
    """
    Find something that keeps the daemon from its work.
    """
    return Finding(check, Verdict.FAILED, said, advice)


def skipped(check: str, said: str, advice: str = "") -> Finding:
    """
    Find that it can't be looked at.
    """
    return Finding(check, Verdict.SKIPPED, said, advice)


class SkippedError(Exception):
    """
    It can't be looked at: why.
    """


class Once(Generic[T]):
    """
    Something that is found out by whoever asks first, while the others wait for it.
    """

    def __init__(self, find: Callable[[], T]) -> None:
        self._find, self._lock = find, Lock()
        self._found: list[T] = []
        self._problem: Exception | None = None

    def get(self) -> T:
        """
        Give it.

        @raise Exception: whatever kept it from being found.
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
        Give it, for a check whose business it is not.

        @raise SkippedError: if it can't be found: that it is C{what} that is missing.
        """
        try:
            return self.get()
        except Exception as problem:
            raise SkippedError(f"not without {what}") from problem


@dataclass(frozen=True, slots=True)
class Check:
    """
    Something to look at.

    @ivar late: what to do where it takes too long.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    late: str = field(default="see what answers so slowly")

    def findings(self) -> list[Finding]:
        """
        Look.
        """
        found: list[Finding] = []
        try:
            found.extend(self.look())
        except SkippedError as problem:
            found.append(skipped(self.name, str(problem)))
        except Exception as problem:  # noqa: BLE001 (a check that breaks must not take the others with it)
            said = f"could not be looked at: {type(problem).__name__}: {brief(problem)}"
            found.append(failed(self.name, said, "this is a fault of ecr-proxy itself: please report it"))
        return found


def brief(problem: object) -> str:
    """
    Keep the first line of a message: behind it AWS may repeat what was signed.
    """
    return str(problem).strip().partition("\n")[0][:300]


def examine(
    checks: Sequence[Check],
    limit: float,
    seconds: Callable[[], float],
    start: Callable[[Callable[[], None]], object],
) -> Iterator[Finding]:
    """
    Look at everything, and yield what was found in the order of the checks.

    @param limit: seconds for all of it.
    @param seconds: counts them on a clock that nobody sets.
    @param start: runs something in a thread of its own.
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
