"""
The store under operations and crashes in any order: what it returns is right, and what it counts is there.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.arriving import Met
from ecrproxy.cache.cells import on_disk
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.cache.entries import Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.locks import is_in_place
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import Reservation, room_for
from ecrproxy.cache.scrub import scrub
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import Digest
from tests.daemon import at_once
from tests.store_contract import START, confirmed, entry_of, key_of

LIMIT: Final = 3_000_000


class Blob(bytes):
    """
    Bytes with a short repr: Hypothesis prints whatever it draws.
    """

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


# The largest two are worth resuming.
BLOBS: Final = [Blob(bytes([65 + number]) * (number * 200_000)) for number in range(8)]
NAMES: Final = {Digest.of(data): data for data in BLOBS}
KEYS: Final = [key_of(f"/v2/team/app/manifests/tag{number}") for number in range(3)]


class Transfer:
    """
    A blob in transfer, of which some bytes may be wrong.
    """

    def __init__(self, writer: Writer, data: bytes) -> None:
        self.writer, self.data = writer, data
        self.sent = bytearray(b"\1" * len(data))
        for start, stop in writer.gaps:
            self.sent[start:stop] = bytes(stop - start)

    @property
    def name(self) -> str:
        return self.writer._claim.data.name  # noqa: SLF001


class StoreMachine(RuleBasedStateMachine):
    """
    A store and its janitor, their users, and changes to the disk behind their backs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-machine-"))
        self.now = START
        self.transfers: list[Transfer] = []
        self.open: list[tuple[Content, bytes]] = []
        self.spoiled: set[str] = set()
        """Files changed behind the store's back since the last count."""
        self.wrong: set[str] = set()
        """Files that received wrong bytes."""
        self.index = Index(self.root, lambda: self.now, memory=True)
        self.entries: dict[EntryKey, Entry] = {}
        self.start()

    def teardown(self) -> None:
        self.crash()
        self.index.close()
        shutil.rmtree(self.root)

    def start(self) -> None:
        """
        Start a daemon's store over the directory.
        """
        self.store = Store(self.root, lambda: self.now, self.index)
        self.store.prepare()
        self.janitor = Janitor(self.store, LIMIT, at_once, Clock())
        self.store.sweep()
        for _ in scrub(self.store, self.janitor.tidy):
            pass
        self.counted()
        assert self.janitor.make_room(None, 0)

    def counted(self) -> None:
        """
        Compare the index with the disk: a changed length is noticed when the file is opened.
        """
        there = {Digest.parse(f"sha256:{path.name}"): path.stat().st_size for path in self.files("content")}
        assert {each.digest for each in self.index.files()} == there.keys()
        self.spoiled = {path for path in self.spoiled if (self.root / path).exists()}

    @rule()
    def pass_time(self) -> None:
        self.now += 10

    @rule(lost=st.booleans())
    def crash_and_restart(self, lost: bool) -> None:
        """
        The kernel closes what a killed process had open, and nothing else happens; its index may be lost, too.
        """
        self.crash()
        if lost:
            self.index.close()
            self.index = Index(self.root, lambda: self.now, memory=True)
            self.entries.clear()
        self.start()

    def crash(self) -> None:
        for transfer in self.transfers:
            transfer.writer.close()
        for content, _ in self.open:
            content.close()
        self.transfers, self.open = [], []

    # Transfers

    @rule(data=st.sampled_from(BLOBS[-2:]) | st.sampled_from(BLOBS))
    def begin(self, data: bytes) -> None:
        """
        Resume what is left over, if anything, else start again.
        """
        digest, size = Digest.of(data), len(data)
        claim = self.store.claim(digest)
        if not isinstance(claim, Claim):
            assert claim is not Met.BUSY
            if isinstance(claim, PeerTransfer):
                claim.close()
            return
        writer = self.store.arriving.resume(claim, digest, size)
        if writer is None and self.janitor.make_room(claim.reservation, room_for(size)):
            writer = self.store.writer(claim, digest, size)
        if writer is None:
            self.store.arriving.let_go(claim)
        else:
            while writer.catch_up():
                pass
            self.transfers.append(Transfer(writer, data))
            if writer.missing == size:
                self.wrong.discard(self.transfers[-1].name)

    @rule(data=st.sampled_from(BLOBS[-2:]), part=st.integers(1, 1_000_000), wrong=st.integers(0, 3))
    def break_off(self, data: bytes, part: int, wrong: int) -> None:
        """
        Begin a large blob, or resume it, and stop in the middle.
        """
        self.begin(data)
        if self.transfers and self.transfers[-1].data == data:
            transfer = self.transfers.pop()
            start = transfer.sent.find(0)
            self.put(transfer, start, min(len(data), start + part), wrong=not wrong)
            transfer.writer.leave()

    @rule(data=st.sampled_from(BLOBS), read=st.booleans())
    def bring(self, data: bytes, read: bool) -> None:
        """
        Store a blob at once, and read it.
        """
        self.begin(data)
        if self.transfers and self.transfers[-1].data == data and not any(self.transfers[-1].sent):
            transfer = self.transfers.pop()
            self.put(transfer, 0, len(data))
            transfer.writer.commit()
            transfer.writer.close()
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
        Commit a transfer; incomplete and wrong ones are rejected, and dropped.
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

    @precondition(lambda self: self.transfers)
    @rule(draw=st.data(), for_good=st.booleans())
    def give_up(self, draw: st.DataObject, for_good: bool) -> None:
        """
        Drop a transfer, or leave it for resuming.
        """
        transfer = draw.draw(st.sampled_from(self.transfers))
        if for_good:
            transfer.writer.discard()
        else:
            transfer.writer.leave()
        self.transfers.remove(transfer)

    # Readers

    @rule(digest=st.sampled_from(list(NAMES)))
    def look(self, digest: Digest) -> None:
        """
        Content is returned complete and right, or not at all, if readers drop files of an unexpected size.
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
        What was opened stays readable, whatever happened to its name.
        """
        content, data = draw.draw(st.sampled_from(self.open))
        self.open.remove((content, data))
        content.close()

    # Entries

    @rule(key=st.sampled_from(KEYS), number=st.integers(0, 7))
    def save(self, key: EntryKey, number: int) -> None:
        self.entries[key] = entry_of(confirmed(BLOBS[number], self.now))
        self.store.save((key, self.entries[key]))

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: EntryKey) -> None:
        self.store.index.forget(key)
        self.entries.pop(key, None)

    @invariant()
    def entries_are_what_was_saved(self) -> None:
        for key in KEYS:
            assert self.store.entry(key) == self.entries.get(key)

    # The janitor, and the disk

    @rule(size=st.sampled_from([0, LIMIT // 4, LIMIT // 2, LIMIT, LIMIT + 1]))
    def make_room(self, size: int) -> None:
        read = [(self.root / self.store.content_path(content.digest), content.fileno()) for content, _ in self.open]
        there = [path for path, fd in read if is_in_place(fd, path)]  # not if it was deleted, and came again
        if self.janitor.make_room(Reservation("room"), size):
            assert self.within_limit()
            self.index.drop(arriving=[Reservation("room")])
        assert all(path.exists() for path in there), "what is being read was evicted"

    @precondition(lambda self: self.files("content"))
    @rule(draw=st.data(), how=st.sampled_from(["unlink", "cut", "lengthen"]))
    def spoil(self, draw: st.DataObject, how: str) -> None:
        """
        Delete, cut or lengthen a file behind the store's back.
        """
        path = draw.draw(st.sampled_from(self.files("content")))
        self.spoiled.add(str(path.relative_to(self.root)))
        if how == "unlink":
            path.unlink()
        else:  # another file of this name: an open descriptor would read what was cut off
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[: len(data) // 2] if how == "cut" else data + b"more")

    # Invariants

    def files(self, *tops: str) -> list[Path]:
        return sorted(path for top in tops for path in (self.root / top).rglob("*") if path.is_file())

    def within_limit(self) -> bool:
        """
        Return True if counted and reserved bytes are within the limit; lengthened files are not known yet.
        """
        return self.janitor.held <= LIMIT

    @invariant()
    def what_is_content_is_what_its_name_says(self) -> None:
        for path in self.files("content"):
            if str(path.relative_to(self.root)) not in self.spoiled:
                digest = Digest("sha256", path.name)
                assert Digest.of(path.read_bytes()) == digest or self.is_recounted(path), "something else is content"

    def is_recounted(self, path: Path) -> bool:
        """
        Return True if a file was spoiled before the last start: it is dropped when it is opened.
        """
        return path.stat().st_size != len(NAMES[Digest("sha256", path.name)])

    @invariant()
    def what_is_counted_is_there(self) -> None:
        counted = {self.store.content_path(each.digest): each.size for each in self.index.files()}
        found = {str(path.relative_to(self.root)): path.stat().st_size for path in self.files("content")}
        assert {path: size for path, size in counted.items() if path not in self.spoiled} == {
            path: size for path, size in found.items() if path not in self.spoiled
        }

    @invariant()
    def totals_are_those_of_the_rows(self) -> None:
        sizes = [on_disk(each.size) for each in self.index.files()]
        promised = sum(size for _, size, _ in self.index.arriving())
        assert self.index.totals[:3] == (len(sizes), sum(sizes), promised)

    @invariant()
    def what_was_opened_stays_readable(self) -> None:
        for content, data in self.open:
            assert content.read() == data

    @invariant()
    def what_arrives_is_promised(self) -> None:
        arriving = {what.name: size for what, size, _ in self.index.arriving()}
        there = [path for path in self.files("arriving") if path.suffix != ".claim"]
        assert arriving == {path.name: on_disk(room_for(path.stat().st_size)) for path in there}
        assert self.within_limit(), "more is there or promised than there may be"


class StoreTests(SynchronousTestCase):
    def test_operations_and_crashes_in_any_order(self) -> None:
        """
        Whatever is written, read, evicted, spoiled and killed in whatever order: content is right or a miss, content in
        use stays, nothing incomplete is seen, and the limit holds.
        """
        from hypothesis.stateful import run_state_machine_as_test

        assert settings.default is not None
        fewer = settings(max_examples=settings.default.max_examples // 3)  # each waits for a disk
        run_state_machine_as_test(StoreMachine, settings=fewer)
