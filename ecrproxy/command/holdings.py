"""
Access to the contents of a cache: through the running daemon, or directly in the directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ecrproxy.command.asking import AdminClient
from ecrproxy.command.choosing import PurgeTarget
from ecrproxy.command.naming import Naming, naming_of
from ecrproxy.command.subcommand import ASKS, MISUSED, REGISTRIES, CommandError, Invocation
from ecrproxy.command.survey import Survey
from ecrproxy.command.terminal import Progress, counted
from ecrproxy.settings.config import registries_of

if TYPE_CHECKING:
    from ecrproxy.cache.inventory import Inventory

SETTINGS: Final = (*ASKS, "cache-dir", *REGISTRIES)
"""The settings of subcommands that access a cache."""
_TOGETHER: Final = 400
_TOGETHER_BYTES: Final = 48 * 2**10
"""Maximum bytes of names in one request: the daemon accepts 64 KiB."""


class Holdings(Protocol):
    """
    The contents of a cache.
    """

    def entries(self) -> Iterator[Any]:
        """
        Yield a document for each entry.
        """

    def content(self) -> Iterator[Any]:
        """
        Yield a document for each file of content, sorted by digest.
        """

    def remove(self, entries: Sequence[str], content: Sequence[str], unused_since: float | None) -> Iterator[Any]:
        """
        Remove what is named, except what was used after C{unused_since}. Yields results batch by batch.
        """

    def verify(self, digests: Sequence[str], rate: float | None, *, keep: bool) -> Iterator[Any]:
        """
        Verify digests. Yields steps and verdicts.
        """


def add_offline(parser: ArgumentParser) -> None:
    """
    Add the flag --offline.
    """
    parser.add_argument(
        "--offline",
        action="store_true",
        help="access the cache directory without a daemon; running daemons notice the changes",
    )


def holdings_of(call: Invocation) -> Holdings:
    """
    Return the cache that the caller selected.

    @raise CommandError: if it does not exist.
    """
    if not call.options.offline:
        return RunningCache(call.daemon())
    from ecrproxy.cache.inventory import Inventory  # noqa: PLC0415 (imports Twisted)
    from ecrproxy.cache.scrub import scrub  # noqa: PLC0415
    from ecrproxy.cache.store import Store  # noqa: PLC0415

    root = Path(call.settings["cache_dir"])
    try:  # without permission to read, the directory would look empty
        next((root / "content").iterdir(), None)
    except OSError as problem:
        raise CommandError(f"{root}: not a readable cache directory: {problem.strerror}") from problem
    store = Store(root, call.world.now)
    with contextlib.suppress(OSError):  # without permission to write, the index is used as it is
        for _ in scrub(store, lambda: None):
            pass
    return Idle(Inventory(store), call.world.sleep)


def survey_of(call: Invocation, holdings: Holdings) -> Survey:
    """
    Read the whole contents, and show progress.
    """
    progress = Progress(call.terminal, "Reading", None, call.world.seconds, lambda count: counted(int(count), "file"))

    def noted(documents: Iterator[Any]) -> Iterator[Any]:
        for each in documents:
            progress.advance(1)
            yield each

    with progress:
        return Survey.of(noted(holdings.entries()), noted(holdings.content()))


def naming_in(call: Invocation, survey: Survey) -> Naming:
    """
    Return the displayed names for a cache.

    @raise CommandError: if the default registry is unknown.
    """
    tables = registries_of(call.flags, call.world.variables, call.file)
    try:
        return naming_of(tables, call.settings["registry_aliases"] or (), survey.registries())
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None


def targets_of(texts: Sequence[str], naming: Naming) -> list[PurgeTarget]:
    """
    Parse the caller's targets.

    @raise CommandError: if one is invalid.
    """
    try:
        return [PurgeTarget.parse(each, naming) for each in texts]
    except ValueError as problem:
        raise CommandError(str(problem), MISUSED) from None


class RunningCache:
    """
    The contents of a running daemon's cache.
    """

    def __init__(self, daemon: AdminClient) -> None:
        self._daemon = daemon

    def entries(self) -> Iterator[Any]:
        """
        Yield a document for each entry.
        """
        return self._daemon.listen("GET", "/api/entries")

    def content(self) -> Iterator[Any]:
        """
        Yield a document for each file of content.
        """
        return self._daemon.listen("GET", "/api/content")

    def remove(self, entries: Sequence[str], content: Sequence[str], unused_since: float | None) -> Iterator[Any]:
        """
        Remove what is named: content first, which frees space on a full disk.
        """
        for kind, names in (("content", content), ("entries", entries)):
            for some in _batches(names):
                yield self._daemon.ask("POST", "/api/remove", {kind: some, "unused_since": unused_since})

    def verify(self, digests: Sequence[str], rate: float | None, *, keep: bool) -> Iterator[Any]:
        """
        Verify digests.
        """
        for some in _batches(digests):
            yield from self._daemon.listen("POST", "/api/verify", {"digests": some, "rate": rate, "keep": keep})


class Idle:
    """
    The contents of a cache directory.
    """

    def __init__(self, inventory: Inventory, sleep: Callable[[float], object]) -> None:
        self._inventory, self._sleep = inventory, sleep

    def entries(self) -> Iterator[Any]:
        """
        Yield a document for each entry.
        """
        return self._inventory.entries()

    def content(self) -> Iterator[Any]:
        """
        Yield a document for each file of content.
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
        Verify digests.
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
        size += len(name) + 4  # quotes, comma and space
    if batch:
        yield batch


def _parsed(digests: Iterable[str]) -> Iterator[Any]:
    from ecrproxy.oci import Digest  # noqa: PLC0415

    return map(Digest.parse, digests)
