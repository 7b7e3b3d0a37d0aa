"""
The index under operations, kills and losses, by two processes in any order: its answers are never wrong.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.index_files import POINTER
from ecrproxy.cache.paths import content_path
from ecrproxy.cache.record import Reservation
from ecrproxy.oci import Digest
from tests.store_contract import START, confirmed, entry_of, key_of

DIGESTS: Final = [Digest.of(b"%d" % number) for number in range(6)]
KEYS: Final = [key_of(f"/v2/team/app/manifests/tag{number}") for number in range(3)]
NAMES: Final = ["one", "two"]
LIMIT: Final = 10 * 4096
digests = st.sampled_from(DIGESTS)
which = st.integers(0, 1)


class IndexMachine(RuleBasedStateMachine):
    """
    Two processes with one index on a disk, compared with dicts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-index-"))
        self.now = START
        self.killed: list[Index] = []
        self.processes = [self.open(), self.open()]
        self.content: dict[Digest, int] = {}
        self.arriving: dict[str, int] = {}
        self.entries: dict[EntryKey, Entry] = {}
        self.used: dict[Digest, float] = {}

    def open(self) -> Index:
        return Index(self.root, lambda: self.now)

    def teardown(self) -> None:
        for each in (*self.processes, *self.killed):
            each.close()
        shutil.rmtree(self.root)

    @rule(seconds=st.sampled_from([1, 1, 60, -3600]))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule(by=which, digest=digests, size=st.integers(0, 9000), arriving=st.none() | st.sampled_from(NAMES))
    def add(self, by: int, digest: Digest, size: int, arriving: str | None) -> None:
        path = self.root / content_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        name = f"{arriving} of {by}"  # the claim's holder
        self.processes[by].add(digest, size, None if arriving is None else Reservation(name))
        self.content[digest] = size
        if arriving is not None:
            self.arriving.pop(name, None)

    @rule(by=which, digest=digests)
    def use(self, by: int, digest: Digest) -> None:
        if digest in self.content:
            self.processes[by].uses.use(digest)
            self.processes[by].uses.verified(digest)
        else:
            self.processes[by].uses.gone(digest)

    @rule(by=which, digest=digests)
    def drop(self, by: int, digest: Digest) -> None:
        (self.root / content_path(digest)).unlink(missing_ok=True)
        self.processes[by].drop([digest])
        self.content.pop(digest, None)
        self.used.pop(digest, None)

    @rule(by=which, name=st.sampled_from(NAMES), size=st.integers(0, 30_000))
    def reserve(self, by: int, name: str, size: int) -> None:
        index, name = self.processes[by], f"{name} of {by}"
        others = sum(each for other, each in self.arriving.items() if other != name)
        taken = sum(map(on_disk, self.content.values())) + others + on_disk(size)
        excess = index.reservations.reserve(Reservation(name), size, LIMIT + index.size)
        assert excess == max(0, taken - LIMIT)
        if not excess:
            self.arriving[name] = on_disk(size)

    @rule(by=which, key=st.sampled_from(KEYS), number=st.integers(0, 3))
    def save(self, by: int, key: EntryKey, number: int) -> None:
        self.entries[key] = entry_of(confirmed(b"%d" % number, self.now))
        self.processes[by].save([(key, self.entries[key])])

    @rule(by=which, key=st.sampled_from(KEYS), digest=digests)
    def purge(self, by: int, key: EntryKey, digest: Digest) -> None:
        (self.root / content_path(digest)).unlink(missing_ok=True)
        count = self.processes[by].purge([key], [digest])
        assert count == (self.entries.pop(key, None) is not None)
        self.content.pop(digest, None)
        self.used.pop(digest, None)
        for index in self.processes:
            news = index.settle()
            assert news.everything or {key, digest} <= set(news.purged)

    @rule(by=which)
    def settle(self, by: int) -> None:
        self.processes[by].settle()

    @rule(by=which)
    def kill(self, by: int) -> None:
        """
        Uncommitted changes are lost; the files stay open until the end, as those of a process that hangs.
        """
        self.killed.append(self.processes[by])
        self.processes[by] = self.open()

    @rule(by=which)
    def restart(self, by: int) -> None:
        self.processes[by].close()
        self.processes[by] = self.open()

    @rule(by=which, suffix=st.sampled_from(["", "-wal", "-shm"]))
    def lose(self, by: int, suffix: str) -> None:
        """
        Delete a file of the database; the first process to notice begins another, which knows only the reservations.
        """
        name = (self.root / POINTER).read_text().strip()
        (self.root / f"{name}{suffix}").unlink()
        for index in (self.processes[by], self.processes[1 - by]):
            assert index.settle().everything
        promised = [each for index in self.processes for each in index.reservations._promised.values()]  # noqa: SLF001
        self.arriving = {what.name: on_disk(size) for what, size in promised}
        self.entries.clear()
        self.used.clear()
        for each in self.killed:
            each.database.rows.close()
        found = {digest: size for digest, size in self.content.items() if self.processes[0].known(digest)}
        self.content = {**found}

    @invariant()
    def all_processes_say_what_was_written(self) -> None:
        for index in self.processes:
            files = {each.digest: each for each in index.files()}
            assert {digest: each.size for digest, each in files.items()} == self.content
            assert {what.name: size for what, size, _ in index.arriving()} == self.arriving
            assert {key: entry for key in KEYS if (entry := index.entry(key))} == self.entries
            for digest, each in files.items():
                assert each.used >= self.used.get(digest, 0), "a use was taken back"
                self.used[digest] = each.used

    @invariant()
    def totals_are_those_of_the_rows(self) -> None:
        content = sum(map(on_disk, self.content.values()))
        for index in self.processes:
            index.database.rows.refresh()
            assert index.totals[:3] == (len(self.content), content, sum(self.arriving.values()))

    @invariant()
    def the_least_recently_used_is_first(self) -> None:
        order = [each.used for each in self.processes[0].database.rows.least_recently_used()]
        assert order == sorted(order)


class IndexTests(SynchronousTestCase):
    def test_operations_kills_and_losses_in_any_order(self) -> None:
        """
        Totals are the sums of the rows, no answer is wrong, and no use is lost, whichever process is asked.
        """
        assert settings.default is not None
        fewer = settings(max_examples=settings.default.max_examples // 3, stateful_step_count=30)
        run_state_machine_as_test(IndexMachine, settings=fewer)
