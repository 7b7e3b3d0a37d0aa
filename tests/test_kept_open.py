"""
Files of content that stay open for a second: what they save, and that they cause no harm.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.content import Content
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.kept_open import KEPT_SECONDS, KeptOpen
from ecrproxy.cache.store import Store
from ecrproxy.daemon.process import kept_files, most_clients
from ecrproxy.oci import Digest
from ecrproxy.threads import Disk
from tests.daemon import DaemonTestCase, Hands, at_once, noise
from tests.store_contract import START, put, scratch

LIMIT = 3


class KeptOpenTests(SynchronousTestCase):
    """
    Of one store; another process has it open, too.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        root = scratch(self)
        self.store, self.other = (Store(root, lambda: START) for _ in range(2))
        self.store.prepare()
        self.hands = Hands()
        self.kept = self.store.files.kept = KeptOpen(LIMIT, self.clock, self.hands)

    def keep(self, data: bytes = b"data") -> Digest:
        """
        Store content, and have it used.
        """
        digest = put(self.store, data)
        content = self.store.open(digest)
        assert content is not None
        self.kept.keep(content)
        content.close()
        return digest

    def path(self, digest: Digest) -> Path:
        return self.store.root / self.store.content_path(digest)

    def is_given(self, digest: Digest) -> bool:
        found = self.kept.get(digest)
        if found is None:
            return False
        self.assertEqual(digest, Digest.of(found.read()))
        found.close()
        return True

    def is_open(self, digest: Digest) -> bool:
        """
        Return True if this process has a descriptor of a file.
        """
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                if str(each.readlink()).removesuffix(" (deleted)") == str(self.path(digest).resolve()):
                    return True
        return False

    def test_a_file_is_given_out_for_a_second_and_closed_then(self) -> None:
        """
        However often it was requested; in a thread.
        """
        self.hands.idle = False
        digest = self.keep()
        self.clock.advance(KEPT_SECONDS / 2)
        self.assertTrue(self.is_given(digest))
        self.clock.advance(KEPT_SECONDS / 2)
        self.assertEqual((False, True), (self.is_given(digest), self.is_open(digest)))
        self.hands.work_off()
        self.assertFalse(self.is_open(digest))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_one_that_is_asked_for_in_the_second_half_is_opened_anew_once(self) -> None:
        renewed = list[Digest]()
        self.kept.renew = renewed.append
        digest = self.keep()
        self.clock.advance(KEPT_SECONDS / 4)
        self.is_given(digest)
        self.assertEqual([], renewed)
        self.clock.advance(KEPT_SECONDS / 4)
        for _ in range(3):
            self.is_given(digest)
        self.assertEqual([digest], renewed)

    def test_each_has_its_own_second(self) -> None:
        one = self.keep()
        self.clock.advance(KEPT_SECONDS / 2)
        other = self.keep(b"other")
        self.clock.advance(KEPT_SECONDS / 2)
        self.assertEqual((False, True), (self.is_given(one), self.is_given(other)))
        self.clock.advance(KEPT_SECONDS / 2)
        self.assertEqual((0, []), (len(self.kept), self.clock.getDelayedCalls()))

    def test_there_are_no_more_than_so_many(self) -> None:
        """
        The one that has been open longest is closed.
        """
        digests = [self.keep(b"%d" % number) for number in range(LIMIT + 1)]
        self.assertEqual([False] + [True] * LIMIT, [self.is_given(each) for each in digests])
        self.assertFalse(self.is_open(digests[0]))

    def test_one_that_is_gone_is_not_given(self) -> None:
        """
        Whoever removed or replaced it, and however.
        """
        for remove in (
            lambda path: self.other.unlink(Digest("sha256", path.name)),
            lambda path: path.unlink(),
            (self.store.root / "new").rename,
        ):
            (self.store.root / "new").write_bytes(b"data")
            digest = self.keep()
            remove(self.path(digest))
            self.assertEqual((False, False), (self.is_given(digest), self.is_open(digest)))

    def test_one_that_was_altered_is_not_given(self) -> None:
        """
        Until it was checked: its content is wrong, or it has another size.
        """
        for data in (b"DATA", b"more data", b"dat"):
            digest = self.keep()
            self.path(digest).write_bytes(data)
            self.assertFalse(self.is_given(digest))
            self.path(digest).unlink()

    def test_one_that_was_found_bad_is_not_given(self) -> None:
        digest = self.keep()
        content = self.store.open(digest)
        assert content is not None
        self.store.proofs.note(digest, content.status, good=False)
        content.close()
        self.assertFalse(self.is_given(digest))

    def test_one_that_is_not_verified_is_not_kept(self) -> None:
        digest = put(self.store, b"data")
        content = self.other.open(digest)
        assert content is not None
        self.kept.keep(content)
        content.close()
        self.assertFalse(self.is_given(digest))

    def test_one_whose_use_is_noted_is_given(self) -> None:
        digest = self.keep()
        os.utime(self.path(digest), ns=(2 * 10**18, 2 * 10**18))
        self.assertTrue(self.is_given(digest))

    def test_one_that_nobody_reads_is_evicted(self) -> None:
        digest = self.keep()
        self.assertEqual([digest], self.store.evict_unused([digest]))
        self.assertFalse(self.is_given(digest))

    def test_one_that_somebody_reads_is_not_evicted(self) -> None:
        digest = self.keep()
        reader = self.kept.get(digest)
        assert reader is not None
        self.assertEqual([], self.store.evict_unused([digest]))
        self.assertEqual(b"data", reader.read())
        reader.close()
        self.assertEqual([digest], self.store.evict_unused([digest]))

    def test_another_process_evicts_it_a_second_later(self) -> None:
        digest = self.keep()
        self.assertEqual([], self.other.evict_unused([digest]))
        self.clock.advance(KEPT_SECONDS)
        self.assertEqual([digest], self.other.evict_unused([digest]))

    def test_its_room_is_free_once_it_is_removed(self) -> None:
        digest = self.keep()
        Inventory(self.store).remove([], [digest])
        self.assertFalse(self.is_open(digest))

    def test_keeping_is_no_use(self) -> None:
        """
        Content that was not requested does not count as recent.
        """
        digest, other = put(self.store, b"data"), put(self.store, b"other")
        content = self.store.open(digest)
        assert content is not None
        second = self.store.open(other)
        self.kept.keep(content)
        content.close()
        self.clock.advance(KEPT_SECONDS)
        self.assertEqual([digest, other], [each.what for each in self.store.candidates()])
        del second


class DescriptorTests(SynchronousTestCase):
    def test_they_have_a_part_of_the_descriptors(self) -> None:
        """
        Clients have the rest.
        """
        self.assertEqual([0, 0, 12, 60, 256, 256], [kept_files(each) for each in (10, 64, 256, 1024, 8192, -1)])
        for files in (256, 1024, 65536):
            self.assertLessEqual(3 * most_clients(files) + kept_files(files), files - 64)


class DaemonTests(DaemonTestCase):
    """
    What clients and the operator notice of it.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("blob", 600_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def test_a_warm_blob_is_found_without_a_thread(self) -> None:
        """
        For GET, HEAD and a range.
        """
        hands = Hands()
        kinds = ("writing", "committing", "hashing", "digesting", "closing")
        self.start(disk=Disk(reading=hands, **dict.fromkeys(kinds, at_once)))
        for _ in range(2):
            self.get(self.path)
        hands.idle = False
        self.assertEqual((200, "HIT"), ((reply := self.head(self.path)).code, reply.cache))
        replies = [self.daemon.send("GET", self.path), self.daemon.send("GET", self.path, Range="bytes=1-9")]
        self.flush()
        self.assertEqual([200, 206], [each.code for each in replies])
        hands.idle = True
        hands.work_off()
        self.flush()
        self.assertWhole(replies[0], self.data, "HIT")
        self.assertWhole(replies[1], self.data[1:10], "HIT", 206)

    def test_one_that_is_asked_for_again_and_again_stays_open(self) -> None:
        """
        It is opened once in half a second, and no request waits for that.
        """
        for _ in range(2):
            self.get(self.path)
        opened = list[Digest]()
        really = self.daemon.store.open

        def noting(digest: Digest) -> Content | None:
            opened.append(digest)
            return really(digest)

        self.patch(self.daemon.store, "open", noting)
        for _ in range(24):
            self.clock.advance(KEPT_SECONDS / 8)
            self.assertEqual("HIT", self.head(self.path).cache)
        self.assertEqual(6, len(opened))

    def test_another_repository_is_not_let_in_by_an_open_file(self) -> None:
        self.standin.push_blob("team/other", b"something else")
        for _ in range(2):
            self.get(self.path)
        self.assertRefused(self.get(f"/v2/team/other/blobs/{self.digest}"), 404, "BLOB_UNKNOWN")

    def test_it_gives_way_to_what_is_new(self) -> None:
        """
        In a cache with space for one of two blobs.
        """
        self.start(limit=1_000_000)
        other = noise("other", 600_000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', other)}"
        for one, data in ((self.path, self.data), (path, other), (self.path, self.data)):
            self.assertWhole(self.get(one), data, "MISS")
            self.assertWhole(self.get(one), data, "HIT")

    def test_it_is_asked_for_anew_as_soon_as_it_is_purged_deleted_or_altered(self) -> None:
        inventory = Inventory(self.daemon.store)
        for lose, word in (
            (lambda: inventory.remove([], [Digest.parse(self.digest)]), "MISS"),
            (lambda: inventory.remove(list(self.entries()), []), "REVALIDATED"),
            (self.file_of(self.digest).unlink, "MISS"),
        ):
            for _ in range(3):
                self.assertWhole(self.get(self.path), self.data)
            lose()
            if word == "REVALIDATED":
                self.pass_time(1)  # its state is forgotten by then
            self.assertWhole(self.get(self.path), self.data, word)

    def test_wrong_bytes_are_not_sent(self) -> None:
        for _ in range(3):
            self.get(self.path)
        self.file_of(self.digest).write_bytes(bytes(len(self.data)))
        self.assertBroken(self.get(self.path), self.data + b".")
        self.assertWhole(self.get(self.path), self.data, "MISS")

    def test_its_use_counts(self) -> None:
        """
        Of two blobs, the one that is requested is evicted last, also while its file stays open.
        """
        other = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('other', 600_000))}"
        self.get(self.path)
        for path in (self.path, other, self.path):
            self.get(path)
            self.clock.advance(0.1)
        self.assertEqual(self.digest, [str(each.what) for each in self.daemon.store.candidates()][-1])
