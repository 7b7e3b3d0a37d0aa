"""
What a cache holds, looked at and worked on: through the daemon that runs, or in its directory while none does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ecrproxy.command.asking import Daemon
from ecrproxy.command.choosing import Target
from ecrproxy.command.naming import Naming, naming_of
from ecrproxy.command.subcommand import ASKS, MISUSED, REGISTRIES, Call, CommandError
from ecrproxy.command.survey import Survey
from ecrproxy.command.terminal import Progress, counted
from ecrproxy.settings.config import registries_of

if TYPE_CHECKING:
    from ecrproxy.cache.inventory import Inventory

SETTINGS: Final = (*ASKS, "cache-dir", *REGISTRIES)
"""The settings of a subcommand that looks at a cache."""
_TOGETHER: Final = 400
_TOGETHER_BYTES: Final = 48 * 2**10
"""How many names, and bytes of names, go into one request: the daemon takes 64 KiB."""


class Holdings(Protocol):
    """
    What a cache holds.
    """

    def entries(self) -> Iterator[Any]:
        """
        Yield the documents of its entries.
        """

    def content(self) -> Iterator[Any]:
        """
        Yield the documents of its content, in the order of the digests.
        """

    def remove(self, entries: Sequence[str], content: Sequence[str], unused_since: float | None) -> Iterator[Any]:
        """
        Remove what is named, but for what was used after C{unused_since}. Yields what became of it, some at a time.
        """

    def verify(self, digests: Sequence[str], rate: float | None, *, keep: bool) -> Iterator[Any]:
        """
        Hold content against its digests. Yields steps and verdicts.
        """


def add_offline(parser: ArgumentParser) -> None:
    """
    Let the caller choose.
    """
    parser.add_argument(
        "--offline",
        action="store_true",
        help="work on the cache directory itself and ask no daemon; those that run on it see what is changed",
    )


def holdings_of(call: Call) -> Holdings:
    """
    Give what the caller means.

    @raise CommandError: if it is not there.
    """
    if not call.options.offline:
        return Running(call.daemon())
    from ecrproxy.cache.inventory import Inventory  # noqa: PLC0415 (it brings Twisted)
    from ecrproxy.cache.scrub import scrub  # noqa: PLC0415
    from ecrproxy.cache.store import Store  # noqa: PLC0415

    root = Path(call.settings["cache_dir"])
    try:  # who may not read it would take it for empty
        next((root / "content").iterdir(), None)
    except OSError as problem:
        raise CommandError(f"{root}: not a cache directory that can be read: {problem.strerror}") from problem
    store = Store(root, call.world.now)
    with contextlib.suppress(OSError):  # who may not write it sees what a daemon has noted
        for _ in scrub(store, lambda: None):
            pass
    return Idle(Inventory(store), call.world.sleep)


def survey_of(call: Call, holdings: Holdings) -> Survey:
    """
    Look at all of it; who waits is told how far it is.
    """
    progress = Progress(call.terminal, "Reading", None, call.world.seconds, lambda count: counted(int(count), "file"))

    def noted(documents: Iterator[Any]) -> Iterator[Any]:
        for each in documents:
            progress.advance(1)
            yield each

    with progress:
        return Survey.of(noted(holdings.entries()), noted(holdings.content()))


def naming_in(call: Call, survey: Survey) -> Naming:
    """
    Tell what the repositories of a cache are called.

    @raise CommandError: if no default registry is known.
    """
    tables = registries_of(call.flags, call.world.variables, call.file)
    try:
        return naming_of(tables, call.settings["registry_aliases"] or (), survey.registries())
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None


def targets_of(texts: Sequence[str], naming: Naming) -> list[Target]:
    """
    Read what the caller names.

    @raise CommandError: if that is no name.
    """
    try:
        return [Target.parse(each, naming) for each in texts]
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None


class Running:
    """
    What a daemon's cache holds.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def entries(self) -> Iterator[Any]:
        """
        Yield the documents of its entries.
        """
        return self._daemon.listen("GET", "/api/entries")

    def content(self) -> Iterator[Any]:
        """
        Yield the documents of its content.
        """
        return self._daemon.listen("GET", "/api/content")

    def remove(self, entries: Sequence[str], content: Sequence[str], unused_since: float | None) -> Iterator[Any]:
        """
        Remove what is named: content first, which makes room on a full disk.
        """
        for kind, names in (("content", content), ("entries", entries)):
            for some in _batches(names):
                yield self._daemon.ask("POST", "/api/remove", {kind: some, "unused_since": unused_since})

    def verify(self, digests: Sequence[str], rate: float | None, *, keep: bool) -> Iterator[Any]:
        """
        Hold content against its digests.
        """
        for some in _batches(digests):
            yield from self._daemon.listen("POST", "/api/verify", {"digests": some, "rate": rate, "keep": keep})


class Idle:
    """
    What a cache directory holds.
    """

    def __init__(self, inventory: Inventory, sleep: Callable[[float], object]) -> None:
        self._inventory, self._sleep = inventory, sleep

    def entries(self) -> Iterator[Any]:
        """
        Yield the documents of its entries.
        """
        return self._inventory.entries()

    def content(self) -> Iterator[Any]:
        """
        Yield the documents of its content.
        """
        return self._inventory.content()

    def remove(self, entries: Sequence[str], content: Sequence[str], unused_since: float | None) -> Iterator[Any]:
        """
        Remove what is named.
        """
        from ecrproxy.cache.entries import EntryKey  # noqa: PLC0415

        for some in _batches(content):
            yield dataclasses.asdict(self._inventory.remove([], _parsed(some), unused_since))
        for some in _batches(entries):
            yield dataclasses.asdict(self._inventory.remove(list(map(EntryKey.parse, some)), [], unused_since))

    def verify(self, digests: Sequence[str], rate: float | None, *, keep: bool) -> Iterator[Any]:
        """
        Hold content against its digests.
        """
        for digest in _parsed(digests):
            for told in self._inventory.verify(digest, keep=keep):
                yield told
                if rate and "hashed" in told:
                    self._sleep(told["hashed"] / rate)


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for name in names:
        if len(batch) == _TOGETHER or size + len(name) > _TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += len(name) + 4  # quotes, a comma and a space
    if batch:
        yield batch


def _parsed(digests: Iterable[str]) -> Iterator[Any]:
    from ecrproxy.oci import Digest  # noqa: PLC0415

    return map(Digest.parse, digests)
