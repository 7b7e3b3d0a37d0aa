"""
The store under operations and crashes in any order: what it gives is right, and what it counts is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.cache.entries import Entry, entry_name, occupied
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.store import Store
from ecrproxy.cache.trailer import room_for
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest, parse_route
from tests.daemon import at_once
from tests.store_contract import REGISTRY, START, confirmed, entry_of, put

LIMIT: Final = 3_000_000


class Blob(bytes):
    """
    Bytes that are described in short: Hypothesis writes down whatever it draws.
    """

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


# The largest two are worth resuming.
BLOBS: Final = [Blob(bytes([65 + number]) * (number * 200_000)) for number in range(8)]
NAMES: Final = {Digest.of(data): data for data in BLOBS}
ROUTES: Final = [parse_route(f"/v2/team/app/manifests/tag{number}") for number in range(3)]


class Transfer:
    """
    A blob on its way in, of which some bytes may be wrong.
    """

    def __init__(self, writer: Writer, data: bytes) -> None:
        self.writer, self.data = writer, data
        self.sent = bytearray(b"\1" * len(data))
        for start, stop in writer.gaps:
            self.sent[start:stop] = bytes(stop - start)

    @property
    def name(self) -> str:
        return self.writer._path.name  # noqa: SLF001


class StoreMachine(RuleBasedStateMachine):
    """
    A store and its janitor, whoever uses them, and the disk behind their backs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-machine-"))
        self.now = START
        self.transfers: list[Transfer] = []
        self.open: list[tuple[Content, bytes]] = []
        self.spoiled: set[str] = set()
        """Files that were changed behind the store's back since it was counted."""
        self.wrong: set[str] = set()
        """Files that wrong bytes arrived in."""
        self.start()

    def teardown(self) -> None:
        self.crash()
        shutil.rmtree(self.root)

    def start(self) -> None:
        """
        Start a daemon's store over what there is.
        """
        self.store = Store(self.root, lambda: self.now)
        self.store.prepare()
        self.store.sweep()
        self.janitor = Janitor(self.store, LIMIT, at_once, Clock())
        self.store.count()
        assert self.store.ledger.total == self.used(), "the count is not what the disk has"
        self.spoiled.clear()
        assert self.janitor.make_room(0)

    @rule()
    def pass_time(self) -> None:
        self.now += 10

    @rule()
    def crash_and_restart(self) -> None:
        """
        The kernel closes what a killed process had open, and that is all that happens.
        """
        self.crash()
        self.start()

    def crash(self) -> None:
        for transfer in self.transfers:
            close(transfer.writer)
        for content, _ in self.open:
            close(content)
        self.transfers, self.open = [], []

    # Transfers

    @rule(data=st.sampled_from(BLOBS[-2:]) | st.sampled_from(BLOBS))
    def begin(self, data: bytes) -> None:
        """
        Go on with what is left over, if there is something, else begin anew.
        """
        digest, size = Digest.of(data), len(data)
        writer = self.store.arriving.resume(digest, size)
        if writer is None and self.janitor.make_room(room_for(size)):
            writer = self.store.arriving.begin(digest, size)
        if writer is not None:
            while writer.catch_up():
                pass
            self.transfers.append(Transfer(writer, data))

    @rule(data=st.sampled_from(BLOBS[-2:]), part=st.integers(1, 1_000_000), wrong=st.integers(0, 3))
    def break_off(self, data: bytes, part: int, wrong: int) -> None:
        """
        Begin a large blob, or go on with it, and leave it in the middle.
        """
        self.begin(data)
        if self.transfers and self.transfers[-1].data == data:
            transfer = self.transfers.pop()
            start = transfer.sent.find(0)
            self.put(transfer, start, min(len(data), start + part), wrong=not wrong)
            transfer.writer.leave()
            self.janitor.release(transfer.writer.room)

    @rule(data=st.sampled_from(BLOBS), read=st.booleans())
    def bring(self, data: bytes, read: bool) -> None:
        """
        Bring a blob in at once, and read it.
        """
        if self.janitor.make_room(room_for(len(data))):
            put(self.store, data)
            self.janitor.release(room_for(len(data)))
            self.spoiled.discard(self.store.content_path(Digest.of(data)))
            if read:
                content = self.store.open(Digest.of(data))
                assert content is not None
                self.open.append((content, data))

    @precondition(lambda self: self.transfers)
    @rule(draw=st.data(), wrong=st.integers(0, 9))
    def write(self, draw: st.DataObject, wrong: int) -> None:
        transfer = draw.draw(st.sampled_from(self.transfers))
        missing = transfer.sent.find(0)
        if missing < 0 or not transfer.data:
            return
        start = draw.draw(st.sampled_from([missing]) | st.integers(missing, len(transfer.data) - 1))
        behind = transfer.sent.find(1, start)  # no byte comes twice
        stop = draw.draw(st.integers(start, len(transfer.data) if behind < 0 else behind))
        self.put(transfer, start, stop, wrong=not wrong)

    def put(self, transfer: Transfer, start: int, stop: int, *, wrong: bool = False) -> None:
        if transfer.sent[start:stop] != bytes(stop - start):
            return
        data = transfer.data[start:stop]
        if wrong and stop > start:
            self.wrong.add(transfer.name)
        transfer.writer.write(start, [bytes(len(data)) if wrong else data])
        transfer.sent[start:stop] = b"\1" * len(data)
        assert transfer.writer.hashed == (transfer.sent + b"\0").find(0), "the hash follows in order"

    @precondition(lambda self: self.transfers)
    @rule(draw=st.data(), whole=st.booleans())
    def end(self, draw: st.DataObject, whole: bool) -> None:
        """
        Commit a transfer; what is not whole and right is refused, and given up.
        """
        transfer = draw.draw(st.sampled_from(self.transfers))
        while whole and (missing := transfer.sent.find(0)) >= 0:
            behind = transfer.sent.find(1, missing)
            self.put(transfer, missing, len(transfer.data) if behind < 0 else behind)
        good = transfer.sent.find(0) < 0 and transfer.name not in self.wrong
        try:
            transfer.writer.commit()
        except DigestMismatchError:
            assert not good
            transfer.writer.discard()
        else:
            assert good, "other bytes were taken for content"
            self.spoiled.discard(self.store.content_path(Digest.of(transfer.data)))
            transfer.writer.close()
        self.transfers.remove(transfer)
        self.janitor.release(transfer.writer.room)

    @precondition(lambda self: self.transfers)
    @rule(draw=st.data(), for_good=st.booleans())
    def give_up(self, draw: st.DataObject, for_good: bool) -> None:
        """
        Drop a transfer, or leave what is there of it to the next.
        """
        transfer = draw.draw(st.sampled_from(self.transfers))
        if for_good:
            transfer.writer.discard()
        else:
            transfer.writer.leave()
        self.transfers.remove(transfer)
        self.janitor.release(transfer.writer.room)

    # Readers

    @rule(digest=st.sampled_from(list(NAMES)))
    def look(self, digest: Digest) -> None:
        """
        Content is given whole and right, or not at all, if those who open it drop what has another size than they know.
        """
        content = self.store.open(digest)
        self.spoiled.discard(self.store.content_path(digest))
        if content is not None and content.size != len(NAMES[digest]):
            content.drop(DigestMismatchError("cut"))
            content.close()
            content = None
        if content is not None:
            assert content.read() == NAMES[digest], "other bytes were served"
            self.open.append((content, NAMES[digest]))

    @precondition(lambda self: self.open)
    @rule(draw=st.data())
    def leave(self, draw: st.DataObject) -> None:
        """
        What was opened stays readable, whatever became of its name.
        """
        content, data = draw.draw(st.sampled_from(self.open))
        self.open.remove((content, data))
        content.close()

    # Entries

    @rule(route=st.sampled_from(ROUTES), number=st.integers(0, 7))
    def save(self, route: Any, number: int) -> None:
        entry = entry_of(route, confirmed(BLOBS[number], self.now))
        size = occupied(len(entry.to_json()))
        if self.janitor.make_room(size):
            self.store.save(entry_name(REGISTRY, "key", route), entry)
            self.janitor.release(size)
            self.spoiled.discard(self.entry_path(route))

    @rule(route=st.sampled_from(ROUTES))
    def forget(self, route: Any) -> None:
        self.store.forget(entry_name(REGISTRY, "key", route))
        self.spoiled.discard(self.entry_path(route))
        assert self.store.entry(entry_name(REGISTRY, "key", route), REGISTRY, route) is None

    @rule(route=st.sampled_from(ROUTES), other=st.sampled_from(ROUTES))
    def recall(self, route: Any, other: Any) -> None:
        """
        An entry speaks of what was asked for, or there is none.
        """
        entry = self.store.entry(entry_name(REGISTRY, "key", route), REGISTRY, other)
        assert entry is None or (route == other and isinstance(entry, Entry) and entry.is_of(REGISTRY, route))

    @staticmethod
    def entry_path(route: Any) -> str:
        name = entry_name(REGISTRY, "key", route)
        return f"entries/{name[:2]}/{name}"

    # The janitor, and the disk

    @rule(size=st.sampled_from([0, LIMIT // 4, LIMIT // 2, LIMIT, LIMIT + 1]))
    def make_room(self, size: int) -> None:
        read = [self.store.content_path(Digest.of(data)) for _, data in self.open]
        there = [path for path in read if (self.root / path).exists()]
        if self.janitor.make_room(size):
            assert self.within_limit()
            self.janitor.release(size)
        assert all((self.root / path).exists() for path in there), "what is being read was evicted"

    @precondition(lambda self: self.files("content", "entries"))
    @rule(draw=st.data(), how=st.sampled_from(["unlink", "cut", "lengthen"]))
    def spoil(self, draw: st.DataObject, how: str) -> None:
        """
        Somebody deletes, cuts or lengthens a file behind the store's back.
        """
        path = draw.draw(st.sampled_from(self.files("content", "entries")))
        self.spoiled.add(str(path.relative_to(self.root)))
        if how == "unlink":
            path.unlink()
        else:  # another file of this name: who has it open would read what was cut off
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[: len(data) // 2] if how == "cut" else data + b"more")

    # What always holds

    def files(self, *tops: str) -> list[Path]:
        return sorted(path for top in tops for path in (self.root / top).rglob("*") if path.is_file())

    def used(self) -> int:
        return sum(map(counted_with, self.files("content", "entries", "ingest")))

    def within_limit(self) -> bool:
        """
        Tell whether what is counted and promised is within the limit; what was lengthened is not known yet.
        """
        ledger = self.store.ledger
        return ledger.total + ledger.reserved <= LIMIT

    @invariant()
    def what_is_content_is_what_its_name_says(self) -> None:
        for path in self.files("content"):
            if str(path.relative_to(self.root)) not in self.spoiled:
                digest = Digest("sha256", path.name)
                assert Digest.of(path.read_bytes()) == digest or self.is_recounted(path), "something else is content"

    def is_recounted(self, path: Path) -> bool:
        """
        Tell whether a file was spoiled before the last start: it is dropped when it is opened.
        """
        return path.stat().st_size != len(NAMES[Digest("sha256", path.name)])

    @invariant()
    def what_is_counted_is_there(self) -> None:
        counted = {path: size for path, size, _ in self.store.ledger.oldest() if path not in self.spoiled}
        arriving = {transfer.name for transfer in self.transfers}
        there = [path for path in self.files("content", "entries", "ingest") if path.name not in arriving]
        found = {str(path.relative_to(self.root)): counted_with(path) for path in there}
        assert counted == {path: size for path, size in found.items() if path not in self.spoiled}

    @invariant()
    def who_reads_is_known(self) -> None:
        read = {path for path, _, read in self.store.ledger.oldest() if read}
        assert read <= {self.store.content_path(Digest.of(data)) for _, data in self.open}

    @invariant()
    def what_was_opened_stays_readable(self) -> None:
        for content, data in self.open:
            assert content.read() == data

    @invariant()
    def what_arrives_is_promised(self) -> None:
        promised = sum(transfer.writer.room for transfer in self.transfers)
        assert self.store.ledger.reserved == promised
        assert self.within_limit(), "more is there or promised than there may be"


def close(holder: Any) -> None:
    """
    Close a file as the kernel does when its process is killed: nobody is told.
    """
    with contextlib.suppress(OSError):
        os.close(holder.fileno())
    holder._fd, holder._open = -1, False  # noqa: SLF001 (so that nobody closes another's file of that number)


class StoreTests(SynchronousTestCase):
    def test_operations_and_crashes_in_any_order(self) -> None:
        """
        Whatever is written, read, evicted, spoiled and killed in whatever order: content is right or a miss, what is
        being read stays, nothing partial is seen, and the limit holds.
        """
        from hypothesis.stateful import run_state_machine_as_test

        assert settings.default is not None
        fewer = settings(max_examples=settings.default.max_examples // 3)  # each has a disk to wait for
        run_state_machine_as_test(StoreMachine, settings=fewer)


def counted_with(path: Path) -> int:
    """
    Tell how many bytes a file of the cache counts with.
    """
    size = path.stat().st_size
    return occupied(size) if "entries" in path.parts else size
