"""
What the daemon can do at this moment, and what keeps it from more. Pure.

I{Alive}, I{can serve} and I{can fetch} are three answers: whoever answers at all is alive; a token or a cache with
content lets it serve; a token that ECR accepts, and an ECR that answers, let it fetch. Each process answers for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

ACCOUNTS: Final = 3
"""The most accounts of a wildcard of which is told what is wrong with them; the others are counted."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """
    Which of the answers hold.

    @ivar reasons: what is wrong, also where it does not keep the daemon from serving.
    @ivar draining: whether the process accepts no more connections and is about to end.
    """

    can_serve: bool
    can_fetch: bool
    reasons: tuple[str, ...]
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """
    What keeps a registry from being fetched from.

    @ivar name: of the registry.
    @ivar token: why there is no token that it accepts, if so.
    @ivar silence: why nothing can be fetched all the same, if so.
    @ivar label: its name in the configuration, which all accounts of a wildcard have.
    """

    name: str
    token: str | None = None
    silence: str | None = None
    label: str = ""

    @property
    def fails(self) -> bool:
        """
        Return True if nothing can be fetched from it.
        """
        return self.token is not None or self.silence is not None


def judge(
    *, draining: bool, sources: Sequence[Source], disk: Sequence[str], filled: bool, index: str = ""
) -> Readiness:
    """
    Judge what a process can do: with one registry that it can fetch from, it can fetch.

    @param sources: all registries.
    @param disk: what is wrong with the cache directory.
    @param filled: whether the cache directory has content.
    @param index: what is wrong with the cache's index, which keeps nobody from being served.
    """
    reasons = ["draining: the daemon ends"] if draining else []
    reasons += _said_of(sources)
    return Readiness(
        can_serve=not draining and not disk and (filled or any(each.token is None for each in sources)),
        can_fetch=not all(each.fails for each in sources),
        reasons=(*reasons, *disk, *([index] if index else [])),
        draining=draining,
    )


def _said_of(sources: Sequence[Source]) -> Iterator[str]:
    """
    Say what is wrong with registries.
    """
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
    Judge a daemon of several processes: it can do what every process can that accepts connections.

    @param found: the answers of those that answered.
    @param expected: how many processes there should be.
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
