"""
An index that is slow to write delays only what needs it.
"""

from __future__ import annotations

import threading
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.answers import ANY
from ecrproxy.cache import write_behind
from ecrproxy.cache.database import BusyError
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.index import Index
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.reservations import PLENTY
from ecrproxy.cache.scribe import Scribe
from ecrproxy.cache.sqlite import PURGES, Rows
from ecrproxy.identity import RegistryId
from ecrproxy.oci import Descriptor, Digest, Kind
from tests.daemon import DaemonTestCase, noise
from tests.store_contract import START, scratch

REGISTRY = RegistryId("registry")
A, B = Digest.of(b"a"), Digest.of(b"b")
BLOCK = 4096
LIMIT = 1000 * PLENTY * BLOCK
TYPE = "application/vnd.oci.image.manifest.v1+json"


def tag(name: str = "latest") -> EntryKey:
    return EntryKey(REGISTRY, Kind.MANIFEST, "team/app", name)


def leads_to(digest: Digest) -> Entry:
    return Entry({ANY: Confirmed(Descriptor(TYPE, digest, 1), START)})


class IndexTests(SynchronousTestCase):
    """
    An index with a writer thread that has not run yet.
    """

    def setUp(self) -> None:
        self.root = scratch(self)
        self.root.mkdir()
        self.index = Index(self.root, lambda: START)
        self.addCleanup(self.index.close)
        self.index.open()
        self.kicks = 0
        self.index.changes.wake_writer = self.kicked
        self.patch(write_behind, "WAIT_SECONDS", 0.0)
        self.begun: list[str] = []
        self.index.database.rows._writer.set_trace_callback(self.traced)  # noqa: SLF001 (what SQLite is told)

    def go_on(self) -> None:
        """
        Have everything written.
        """
        self.index.changes.wake_writer = None
        self.index.settle()

    def kicked(self) -> None:
        self.kicks += 1

    def traced(self, statement: str) -> None:
        if statement.startswith("BEGIN"):
            self.begun.append(statement)

    def test_nobody_waits_for_what_can_be_written_later(self) -> None:
        self.assertEqual(0, self.index.reservations.reserve(Reservation("one"), BLOCK, LIMIT))
        self.index.add(A, 10, Reservation("one"))
        self.index.save([(tag(), leads_to(A))])
        self.index.forget_answers(tag("other"), [ANY], START)
        self.index.drop([B], [Reservation("two")])
        self.index.reservations.arrive(Reservation("two"), BLOCK)
        self.assertEqual([], self.begun)
        self.assertEqual(6, self.kicks)

    def test_all_that_waits_is_one_transaction(self) -> None:
        for number in range(20):
            what = Reservation(f"{number}")
            self.assertEqual(0, self.index.reservations.reserve(what, BLOCK, LIMIT))
            self.index.add(Digest.of(b"%d" % number), BLOCK, what)
            self.index.save([(tag(f"{number}"), leads_to(A))])
        self.index.changes.flush()
        self.assertEqual(1, len(self.begun))
        self.assertEqual((20, 20 * BLOCK, 0), self.index.totals[:3])
        self.assertEqual(leads_to(A), self.index.entry(tag("19")))

    def test_no_more_is_promised_unwritten_than_others_leave_free(self) -> None:
        promised = 0
        with self.assertRaises(BusyError):
            while True:
                self.index.reservations.reserve(Reservation(f"{promised}"), 100 * BLOCK, LIMIT)
                promised += 1
        self.assertEqual(9, promised)
        self.assertEqual(900 * BLOCK, self.index.changes.promised)
        self.go_on()
        self.assertEqual((0, 900 * BLOCK), (self.index.changes.promised, self.index.totals.arriving))

    def test_room_that_there_may_not_be_is_waited_for_and_not_for_long(self) -> None:
        """
        A later write reserves nothing, and the next request does not wait at all.
        """
        self.assertRaises(BusyError, self.index.reservations.reserve, Reservation("one"), BLOCK, 2 * BLOCK)
        before = self.kicks
        self.assertRaises(BusyError, self.index.reservations.reserve, Reservation("two"), BLOCK, 2 * BLOCK)
        self.assertEqual(before, self.kicks)
        self.go_on()
        self.assertEqual(0, self.index.totals.arriving)
        self.assertEqual([], self.index.arriving())
        self.assertEqual(0, self.index.reservations.reserve(Reservation("three"), BLOCK, LIMIT))

    def test_room_that_is_being_promised_when_nobody_waits_any_more_is_given_back(self) -> None:
        making: list[Any] = []

        def take() -> None:
            making.extend(() if making else self.index.changes._take())  # noqa: SLF001

        self.index.changes.wake_writer = take
        self.assertRaises(
            BusyError, self.index.reservations.reserve, Reservation("one"), BLOCK, self.index.size + 8 * BLOCK
        )
        (reserving,) = making
        self.assertEqual(0, reserving.make(self.index.database.rows))
        self.assertEqual(1, len(self.index.arriving()))
        self.go_on()
        self.assertEqual([], self.index.arriving())

    def test_who_is_refused_at_once_leaves_nothing_to_be_written(self) -> None:
        """
        A thousand pulls while another process writes for long displace nothing from the queue.
        """
        self.assertRaises(BusyError, self.index.reservations.reserve, Reservation("one"), LIMIT, LIMIT)
        kicks = self.kicks
        for number in range(10):
            self.assertRaises(BusyError, self.index.reservations.reserve, Reservation(f"{number}"), LIMIT, LIMIT)
        self.assertEqual(kicks, self.kicks)

    def test_what_was_forgotten_is_not_told_though_it_is_not_written(self) -> None:
        self.index.changes.wake_writer = None
        self.index.save([(tag(), leads_to(A))])
        self.index.changes.wake_writer = self.kicked
        self.index.forget_answers(tag(), [ANY], START)
        self.assertIs(None, self.index.entry(tag()))
        self.assertRaises(BusyError, self.index.written, tag())
        self.index.save([(tag(), leads_to(B))])
        self.go_on()
        self.assertEqual(leads_to(B), self.index.written(tag()))

    def test_a_change_that_nobody_can_make_undoes_none_that_came_with_it(self) -> None:
        def fail(_: Rows) -> None:
            raise ZeroDivisionError

        self.index.add(A, 1)
        self.index.changes.change(fail)
        self.index.add(B, 1)
        self.assertRaises(ZeroDivisionError, self.index.changes.flush)
        self.index.changes.flush()
        self.assertEqual({A, B}, {each.digest for each in self.index.files()})

    def test_what_another_process_purged_while_it_waited_is_forgotten(self) -> None:
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        self.index.settle()
        self.patch(write_behind, "_LATE_SECONDS", -1.0)
        self.index.save([(tag(), leads_to(A))])
        other.purge([tag()], [])
        self.index.changes.flush()
        self.assertTrue(self.index.settle())
        self.go_on()
        self.assertIs(None, self.index.entry(tag()))

    def test_what_another_process_purged_while_uses_waited_is_forgotten(self) -> None:
        """
        Data that was read meanwhile is written after them, and a second later it is clear that it waited.
        """
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        self.index.settle()
        self.patch(write_behind, "_LATE_SECONDS", -1.0)

        def wait_for_the_purge() -> None:
            self.index.save([(tag(), leads_to(A)), (tag("kept"), leads_to(A))])
            other.purge([tag()], [])
            self.index.changes.flush()

        waiting = self.patch(self.index.uses, "write", wait_for_the_purge)
        self.assertTrue(self.index.settle())
        waiting.restore()
        self.assertFalse(self.index.settle())
        self.go_on()
        self.assertIs(None, self.index.entry(tag()))
        self.assertEqual(leads_to(A), self.index.entry(tag("kept")))

    def test_what_waited_while_very_much_was_purged_is_forgotten(self) -> None:
        """
        It is no longer known what was purged.
        """
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        self.index.settle()
        self.index.save([(tag(), leads_to(A))])
        other.purge([tag()], [])
        other.purge([], [Digest.of(b"%d" % number) for number in range(PURGES)])
        self.go_on()
        self.index.settle()
        self.assertIs(None, self.index.entry(tag()))

    def test_what_waited_with_another_variant_is_forgotten(self) -> None:
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        self.index.settle()
        self.index.save([(tag()._replace(variant="0" * 64), leads_to(A))])
        other.purge([tag()], [])
        self.go_on()
        self.assertIs(None, self.index.entry(tag()._replace(variant="0" * 64)))

    def test_what_was_told_after_a_purge_is_kept_though_it_waited(self) -> None:
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        self.index.settle()
        other.purge([tag()], [])
        self.assertTrue(self.index.settle())
        self.patch(write_behind, "_LATE_SECONDS", -1.0)
        self.index.save([(tag(), leads_to(B))])
        self.go_on()
        self.index.settle()
        self.assertEqual(leads_to(B), self.index.entry(tag()))

    def test_it_evicts_what_was_used_last_though_no_use_is_written(self) -> None:
        self.index.changes.wake_writer = None
        for each in (A, B):
            self.index.add(each, 1)
        self.index.changes.wake_writer = self.kicked
        self.index.uses.use(A)
        self.assertEqual([B, A], [each.digest for each in self.index.least_recently_used()])


class ScribeTests(SynchronousTestCase):
    def test_one_thread_writes(self) -> None:
        """
        It goes on when one change fails.
        """
        root = scratch(self)
        root.mkdir()
        index = Index(root, lambda: START)
        self.addCleanup(index.close)
        index.open()
        scribe = Scribe(index.changes, lambda write: threading.Thread(target=write, daemon=True).start())
        scribe.startService()
        self.addCleanup(scribe.stopService)
        index.changes.change(lambda _: 1 // 0)
        index.add(A, 1)
        index.changes.wait()
        self.assertEqual([A], [each.digest for each in index.files()])
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))


class PullTests(DaemonTestCase):
    """
    A daemon whose index's disk does not answer.
    """

    def hang(self) -> None:
        self.patch(write_behind, "WAIT_SECONDS", 0.0)
        self.index.changes.wake_writer = lambda: None

    def go_on(self) -> None:
        self.index.changes.wake_writer = None
        self.index.settle()

    def test_cold_content_is_pulled_and_kept(self) -> None:
        blobs = [noise(f"{number}", 100_000) for number in range(20)]
        paths = [f"/v2/team/app/blobs/{self.standin.push_blob('team/app', each)}" for each in blobs]
        self.hang()
        for path, data in zip(paths, blobs, strict=True):
            self.assertWhole(self.get(path), data, "MISS")
        asked = self.standin.count()
        for path, data in zip(paths, blobs, strict=True):
            self.assertWhole(self.get(path), data, "HIT")
        self.assertEqual(asked, self.standin.count())
        self.go_on()
        self.assertEqual((20, 0), (self.index.totals.files, self.promised()))

    def test_what_there_may_be_no_room_for_is_pulled_and_not_kept(self) -> None:
        """
        The log has one line about it.
        """
        self.start(limit=2_000_000)
        self.hang()
        for number in range(3):
            data = noise(f"{number}", 500_000)
            self.assertWhole(self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"), data, "BYPASS")
        said = [event for event in self.events if "can't be promised" in (event["log_format"] or "")]
        self.assertEqual({"no room"}, {event["once"] for event in said})
        self.go_on()
        self.assertEqual((0, 0), (self.index.totals.files, self.promised()))

    def test_a_tag_that_ecr_no_longer_has_is_not_served_as_last_known(self) -> None:
        self.standin.push_image("team/app", "v1")
        self.assertEqual(200, self.get("/v2/team/app/manifests/v1").code)
        self.hang()
        self.standin.delete_tag("team/app", "v1")
        self.assertEqual(404, self.get("/v2/team/app/manifests/v1").code)
        self.standin.quirks.latency = 60
        reply = self.get("/v2/team/app/manifests/v1")
        self.pass_time(60)
        self.assertLess(499, reply.code)
        self.go_on()
