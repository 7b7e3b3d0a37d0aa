"""
The states of several processes, and of a registry's parts, as one. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Final

from ecrproxy.admin.snapshot import (
    TRANSFERS,
    Answers,
    Clients,
    Fill,
    RegistryState,
    Standing,
    TokenState,
    UpstreamState,
)
from ecrproxy.readiness import judge_all

_GRAVEST: Final = ("open", "probing", "closed")


def together(standings: Sequence[Standing], expected: int) -> Standing:
    """
    Merge the states of all processes.

    @param expected: how many processes should run. Without any state, the result says that none answers.
    """
    readiness = judge_all([each.readiness for each in standings], expected)
    return Standing(
        readiness,
        _filled([each.cache for each in standings]),
        tuple(islice(chain.from_iterable(each.transfers for each in standings), TRANSFERS)),
        tuple(_registries([each.registries for each in standings])),
        _of_all([each.clients for each in standings]),
    )


def of_process(states: Iterable[RegistryState]) -> tuple[RegistryState, ...]:
    """
    Merge the states of a wildcard's registries, which share a name and a token.
    """
    found: dict[str, list[RegistryState]] = {}
    for each in states:
        found.setdefault(each.name, []).append(each)
    return tuple(
        RegistryState(name, several[0].token, _upstream([each.upstream for each in several]))
        for name, several in found.items()
    )


def outcomes_of(several: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """
    Add up the outcomes of all registries.
    """
    found: dict[str, dict[str, int]] = {}
    for host, outcome, count in (
        (host, outcome, count) for each in several for host, counts in each.items() for outcome, count in counts.items()
    ):
        counted = found.setdefault(host, {})
        counted[outcome] = counted.get(outcome, 0) + count
    return found


def answers_of(several: Iterable[Mapping[str, Answers]]) -> dict[str, Answers]:
    """
    Add up the answers of all registries.
    """
    found: dict[str, Answers] = {}
    for status, each in ((status, each) for answers in several for status, each in answers.items()):
        before = found.get(status, Answers(0, 0))
        found[status] = Answers(before.count + each.count, before.bytes + each.bytes)
    return found


def _registries(found: Sequence[Sequence[RegistryState]]) -> Iterator[RegistryState]:
    for name in dict.fromkeys(each.name for states in found for each in states):
        states = [each for several in found for each in several if each.name == name]
        yield RegistryState(
            name, _token([each.token for each in states]), _upstream([each.upstream for each in states])
        )


def _of_all(several: Sequence[Clients]) -> Clients:
    """
    Add up the limits: each process has its own.
    """
    limits = [each.limit for each in several if each.limit is not None]
    return Clients(
        sum(each.connected for each in several),
        sum(limits) if len(limits) == len(several) else None,
        sum(each.sending for each in several),
        max((each.stall for each in several), default=0.0),
        sum(each.processes for each in several),
    )


def _filled(fills: Sequence[Fill]) -> Fill:
    """
    Merge: all processes read the same index, at most a second late, but evict independently.
    """
    return Fill(
        max((each.bytes for each in fills), default=0),
        max((each.reserved for each in fills), default=0),
        min((each.limit for each in fills), default=0),
        max((each.files for each in fills), default=0),
        sum(each.evicted for each in fills),
        fills[0].next if fills else (),
    )


def _token(states: Sequence[TokenState]) -> TokenState:
    """
    Return the worst state: each process has its own token.
    """
    problems = [each.problem for each in states if each.problem is not None]
    return TokenState(
        problems[0] if problems else None,
        _least(each.expires for each in states),
        _least(each.refresh_seconds for each in states) or 0.0,
        sum(each.failures for each in states),
    )


def _upstream(states: Sequence[UpstreamState]) -> UpstreamState:
    circuits, waiting = {each.circuit for each in states}, [each.waiting for each in states]
    return UpstreamState(
        next((each for each in _GRAVEST if each in circuits), "closed"),
        max((each.open_repositories for each in states), default=0),
        _least(each.answered_seconds for each in states),
        {call: sum(each.waiting.get(call, 0) for each in states) for call in dict.fromkeys(chain(*waiting))},
        sum(each.retries for each in states),
    )


def _least(figures: Iterable[float | None]) -> float | None:
    return min((each for each in figures if each is not None), default=None)
