"""
The latest warnings and errors.
"""

from __future__ import annotations

from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.incidents import KEPT, LONGEST, Incident, Incidents
from ecrproxy.logs.repeats import BURST

log = Logger()


class IncidentsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.time = 1000.0
        self.incidents = Incidents(lambda: self.time)
        self.incidents.startService()
        self.addCleanup(globalLogPublisher.removeObserver, self.incidents)

    def test_warnings_and_errors_are_kept_the_newest_first(self) -> None:
        """
        Lower levels are not kept.
        """
        log.info("all is well")
        log.warn("the {thing} is slow", thing="disk")
        self.time = 1001.0
        log.error("the disk is full")
        self.assertEqual(
            (Incident(1001, "error", "the disk is full"), Incident(1000, "warn", "the disk is slow")),
            self.incidents.latest(),
        )

    def test_what_is_said_again_is_counted(self) -> None:
        """
        A repeated message displaces no other.
        """
        for self.time in range(1000, 1003):
            log.warn("again")
        self.assertEqual((Incident(1002, "warn", "again", 3),), self.incidents.latest())

    def test_what_is_said_once_is_one_whatever_it_says(self) -> None:
        for number in range(3):
            log.warn("{number} connections from {address}", number=number, address="a", once="a")
            log.warn("{number} connections from {address}", number=number, address="b", once="b")
        self.assertEqual(
            [("2 connections from b", 3), ("2 connections from a", 3)],
            [(each.text, each.times) for each in self.incidents.latest()],
        )

    def test_many_of_one_format_leave_room_whatever_they_are_said_once_for(self) -> None:
        """
        Clients choose names of repositories, and how many.
        """
        log.error("the disk is full")
        for number in range(10 * KEPT):
            log.warn("refused {name}", name=number, once=number)
        told = [(each.text, each.times) for each in self.incidents.latest()]
        self.assertEqual(BURST + 1, len(told))
        self.assertEqual((f"refused {10 * KEPT - 1}", 10 * KEPT - BURST + 1), told[0])
        self.assertEqual(("the disk is full", 1), told[-1])

    def test_what_no_page_can_show_is_escaped(self) -> None:
        log.error("ECR denies: {said}", said="\ud800")
        self.incidents.add([(1000, "warn", "\udfff", 1, "kind", "")])
        self.assertEqual(["\\udfff", "ECR denies: \\ud800"], [each.text for each in self.incidents.latest()])

    def test_many_of_one_format_leave_room_for_others(self) -> None:
        log.error("the disk is full")
        for number in range(10 * KEPT):
            log.warn("no {number}", number=number)
        told = [(each.text, each.times) for each in self.incidents.latest()]
        self.assertEqual(BURST + 1, len(told))
        self.assertEqual((f"no {10 * KEPT - 1}", 10 * KEPT - BURST + 1), told[0])
        self.assertEqual(("the disk is full", 1), told[-1])

    def test_neither_their_number_nor_their_length_grows(self) -> None:
        """
        The oldest are dropped, and long texts are cut; lines become one.
        """
        for number in range(10 * KEPT):
            log.error(f"{number} {{text}}", text="x\n" + "x" * 10_000)  # noqa: G004
        latest = self.incidents.latest()
        self.assertEqual(KEPT, len(latest))
        self.assertTrue(latest[0].text.startswith(f"{10 * KEPT - 1} x"))
        self.assertEqual({LONGEST}, {len(each.text) for each in latest})

    def test_of_an_exception_its_kind_is_told(self) -> None:
        """
        Its message and its traceback are only in the log.
        """
        log.failure("Answering {path}", Failure(ValueError("a secret")), path="/v2/")
        self.flushLoggedErrors(ValueError)
        (incident,) = self.incidents.latest()
        self.assertEqual("Answering /v2/ (ValueError)", incident.text)

    def test_nothing_is_kept_after_the_end(self) -> None:
        """
        A stopped daemon no longer observes the log.
        """
        self.incidents.stopService()
        log.error("late")
        self.assertEqual((), self.incidents.latest())
