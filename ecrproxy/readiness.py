"""
What the daemon can do at the moment, and what it can't. Pure.

There are three answers. A process that responds is I{alive}. With a token or cached content it I{can serve}. With a
token that ECR accepts, and an ECR that responds, it I{can fetch}. Each process answers for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

ACCOUNTS: Final = 3
"""Maximum accounts of a wildcard whose problems are listed; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """
    The answers.

    @ivar reasons: all problems, including those that do not prevent serving.
    @ivar draining: True if the process no longer accepts connections and shuts down.
    """

    can_serve: bool
    can_fetch: bool
    reasons: tuple[str, ...]
    draining: bool = False


@dataclass(frozen=True, slots=True)
class RegistryReadiness:
    """
    A registry, and what prevents fetching from it.

    @ivar name: the registry's name.
    @ivar token: why there is no valid token; None if there is one.
    @ivar silence: why fetching fails despite the token; None if it works.
    @ivar label: its name in the configuration, shared by all accounts of a wildcard.
    """

    name: str
    token: str | None = None
    silence: str | None = None
    label: str = ""

    @property
    def fails(self) -> bool:
        """
        Return True if nothing can be fetched from the registry.
        """
        return self.token is not None or self.silence is not None


def judge(
    *, draining: bool, sources: Sequence[RegistryReadiness], disk: Sequence[str], filled: bool, index: str = ""
) -> Readiness:
    """
    Return the readiness of a process. It can fetch if it can fetch from at least one registry.

    @param sources: all registries.
    @param disk: problems of the cache directory.
    @param filled: True if the cache directory has content.
    @param index: the problem of the cache's index, which does not prevent serving.
    """
    reasons = ["draining: the daemon ends"] if draining else []
    reasons += _said_of(sources)
    return Readiness(
        can_serve=not draining and not disk and (filled or any(each.token is None for each in sources)),
        can_fetch=not all(each.fails for each in sources),
        reasons=(*reasons, *disk, *([index] if index else [])),
        draining=draining,
    )


def _said_of(sources: Sequence[RegistryReadiness]) -> Iterator[str]:
    failing: Counter[str] = Counter()
    for each in sources:
        failing[each.label] += each.fails
        if failing[each.label] > ACCOUNTS and each.label:
            continue
        whose = f"{each.name}: " if len(sources) > 1 else ""
        if each.token is not None:
            yield f"{whose}no token: {each.token}"
        if each.silence is not None:
            yield f"{whose}{each.silence}"
    for label, count in failing.items():
        if label and count > ACCOUNTS:
            yield f"{label}: {count - ACCOUNTS} more registries can't be fetched from"


def judge_all(found: Sequence[Readiness], expected: int) -> Readiness:
    """
    Return the readiness of a daemon of several processes: it can do what every accepting process can do.

    @param found: the answers of the processes that responded.
    @param expected: the number of processes that should run.
    """
    accepting = [each for each in found if not each.draining]
    missing, draining = expected - len(found), len(found) - len(accepting)
    reasons = [f"{missing} of {expected} worker processes do not answer"] if missing else []
    reasons += [f"{draining} of {expected} worker processes are draining"] if draining else []
    reasons += [reason for each in accepting for reason in each.reasons]
    return Readiness(
        can_serve=bool(accepting) and all(each.can_serve for each in accepting),
        can_fetch=bool(accepting) and all(each.can_fetch for each in accepting),
        reasons=tuple(dict.fromkeys(reasons)),
    )
