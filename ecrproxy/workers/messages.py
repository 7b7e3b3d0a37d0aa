"""
The messages between the parent and its workers: typed, bounded, encoded as JSON. Pure.

Rules:

- A message is a frozen dataclass. L{decode} checks each field against its annotation and accepts nothing else.
- Whatever is encoded can be decoded: texts are cut to C{TEXT} characters and lists to C{ITEMS}, and surrogates are
  replaced. So no text that a client or ECR chooses makes the parent reject a worker's message.
- No message carries a request, a header, a secret or unparsed bytes of a client.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import islice
from types import NoneType, UnionType
from typing import Any, Final, Literal, NoReturn, TypeAlias, Union, get_args, get_origin, get_type_hints

from ecrproxy.admin.snapshot import Standing
from ecrproxy.metrics import BUCKETS
from ecrproxy.prefetch_progress import PrefetchProgress
from ecrproxy.readiness import Readiness

LIMIT: Final = 2**20
"""Maximum bytes of a message. The largest, a standing with all its transfers, needs a tenth."""
TEXT: Final = 1000
"""Maximum characters of a text: repository names have up to 256, an incident's text 300."""
ITEMS: Final = 1000
"""Maximum items of a list."""
LARGEST: Final = 2.0**63
"""Numbers must be smaller."""
_LABELS: Final = {"requests": 5, "upstream": 3}

About: TypeAlias = Literal["readiness", "standing", "figures"]
Counts: TypeAlias = tuple[tuple[str, ...], int, int, float, tuple[int, ...]]
"""A row of a L{metrics.Tally}."""


@dataclass(frozen=True, slots=True)
class Listens:
    """
    The worker accepts connections.
    """


@dataclass(frozen=True, slots=True)
class Refused:
    """
    AWS refuses the worker's credentials and the cache is empty, so the worker can serve nothing.
    """

    problem: str


@dataclass(frozen=True, slots=True)
class Counted:
    """
    The worker's counts since its last message. Sent each second, also as a sign that its event loop runs.

    @ivar requests: requests of clients, as in L{metrics.Served}.
    @ivar upstream: requests to registries and buckets.
    @ivar saved: repositories, the bytes saved, and in how many responses.
    @ivar failed: failures, as in L{failures.Failed}.
    @ivar asked: requests for manifests, as in L{askers.Asked} after the repository.
    @ivar incidents: time, level, text, count, and the two parts of its kind.
    """

    requests: tuple[Counts, ...]
    upstream: tuple[Counts, ...]
    saved: tuple[tuple[str, int, int], ...]
    failed: tuple[tuple[str, int, str, float, float, int, str], ...]
    asked: tuple[tuple[str, str, str, float, int], ...]
    incidents: tuple[tuple[float, Literal["warn", "error", "critical"], str, int, str, str], ...]

    def __post_init__(self) -> None:
        for name, count in _LABELS.items():
            for labels, _, _, _, buckets in getattr(self, name):
                if len(labels) != count or len(buckets) != len(BUCKETS) + 1:
                    raise ValueError(f"{name} with other labels or buckets than they have")


@dataclass(frozen=True, slots=True)
class ReadinessTold:
    """
    The answer to the L{StateRequest} with this number.
    """

    number: int
    readiness: Readiness


@dataclass(frozen=True, slots=True)
class StandingTold:
    """
    The answer to the L{StateRequest} with this number.
    """

    number: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class FiguresTold:
    """
    The answer to the L{StateRequest} with this number: figures by name and label value.
    """

    number: int
    figures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class PrefetchTold:
    """
    The progress of the L{PrefetchOrder} with this number. Sent each second, and at its end.
    """

    number: int
    progress: PrefetchProgress


@dataclass(frozen=True, slots=True)
class PrefetchOrder:
    """
    The operator wants an image in the cache.

    @ivar platforms: those to fetch; all if empty.
    """

    number: int
    registry: str
    repository: str
    reference: str
    platforms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopPrefetch:
    """
    Nobody waits for the L{PrefetchOrder} with this number.
    """

    number: int


@dataclass(frozen=True, slots=True)
class StateRequest:
    """
    The parent asks for a part of the worker's state; the answer has the same number.
    """

    number: int
    about: About


@dataclass(frozen=True, slots=True)
class Reread:
    """
    The worker must reload its certificates or its passwords.

    @ivar certificates: the generation of the files that the parent has loaded, see L{daemon.renewal.generation}: the
        worker uses no other. Empty to reload the passwords.
    """

    certificates: str


@dataclass(frozen=True, slots=True)
class Reload:
    """
    The parent has reloaded the configuration file: the worker must use new registries.

    @ivar registries: the file's registries, see L{settings.file.about_registries}, in pieces, because a text has at
        most C{TEXT} characters.
    """

    registries: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Reload:
        """
        Split an ASCII text of up to C{TEXT * ITEMS} characters.
        """
        return cls(tuple(text[at : at + TEXT] for at in range(0, len(text), TEXT)))


Answer: TypeAlias = ReadinessTold | StandingTold | FiguresTold
FromWorker: TypeAlias = Listens | Refused | Counted | PrefetchTold | Answer
FromParent: TypeAlias = StateRequest | Reread | Reload | PrefetchOrder | StopPrefetch
Message: TypeAlias = FromWorker | FromParent


def encode(message: Message) -> bytes:
    """
    Encode a message.

    @raise ValueError: if it is larger than C{LIMIT}.
    """
    data = json.dumps([type(message).__name__, _plain(message)], separators=(",", ":"), allow_nan=False).encode()
    if len(data) > LIMIT:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes")
    return data


def decode(data: bytes, known: Any) -> Any:  # noqa: ANN401 (one of C{known})
    """
    Decode and check a message.

    @param known: the types that the other side may send: C{FromWorker} or C{FromParent}.
    @raise ValueError: if C{data} is invalid.
    """
    try:
        name, content = json.loads(data, parse_constant=_refuse)
        (kind,) = (each for each in get_args(known) if each.__name__ == name)
        return _checked(kind, content)
    except (ValueError, TypeError, RecursionError) as problem:
        raise ValueError(f"no message: {str(problem)[:200]}") from None


def _plain(value: Any) -> Any:  # noqa: ANN401
    """
    Convert a value to JSON types, within the bounds that L{decode} accepts.
    """
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, str):
        return value[:TEXT].encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in islice(value.items(), ITEMS)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value[:ITEMS]]
    if isinstance(value, float):
        return 0.0 if math.isnan(value) else min(max(value, -LARGEST / 2), LARGEST / 2)
    return value


@cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """
    Convert parsed JSON to the type of an annotation.

    @raise ValueError: if it does not fit.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        expected = _fields(kind)
        found = value if isinstance(value, dict) else {}
        if found.keys() != expected.keys():
            raise ValueError(f"no {kind.__name__}")
        return kind(**{name: _checked(each, found[name]) for name, each in expected.items()})
    if origin is tuple and isinstance(value, list) and len(value) <= ITEMS:
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(_checked(*each) for each in zip(kinds, value, strict=True))
    if origin is Mapping and isinstance(value, dict) and len(value) <= ITEMS:
        return {_checked(inner[0], key): _checked(inner[1], each) for key, each in value.items()}
    if origin in (Union, UnionType):
        (other,) = (each for each in inner if each is not NoneType)
        return None if value is None else _checked(other, value)
    if (origin is Literal and value in inner) or _is_plain(kind, value):
        return value
    raise ValueError(f"no {getattr(kind, '__name__', kind)}")


def _is_plain(kind: object, value: object) -> bool:
    if kind is str:
        return isinstance(value, str) and len(value) <= TEXT and not any("\ud800" <= each <= "\udfff" for each in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]
    return type(value) is kind and (kind is bool or (kind is int and abs(value) < LARGEST))  # type: ignore[arg-type]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"no number: {constant}")
