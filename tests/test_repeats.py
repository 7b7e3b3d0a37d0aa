"""
Repeated messages are one line with a count.
"""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.task import Clock
from twisted.logger import ILogObserver, Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.python.log import LogPublisher as OldPublisher
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.logs.repeats import BURST, DIFFERENT, LONGEST, MINUTE, MOST, Repeats, summary_of


class RepeatsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.repeats = Repeats(self.clock.seconds)
        self.log = Logger("ecrproxy.x", observer=cast(ILogObserver, self.note))
        self.lines: list[tuple[str, int]] = []

    def note(self, event: Any) -> None:
        admitted = self.repeats.admit(event)
        if admitted is not None:
            self.write(admitted)

    def write(self, event: Any) -> None:
        self.lines.append((summary_of(event), event.get("log_omitted", 0)))

    def pass_time(self, seconds: float) -> None:
        """
        Advance the clock second by second, as the log does.
        """
        for _ in range(int(seconds)):
            self.clock.advance(1)
            for event in self.repeats.due():
                self.write(event)

    def written(self) -> list[tuple[str, int]]:
        lines, self.lines = self.lines, []
        return lines

    def test_what_is_said_once_has_one_line_a_minute(self) -> None:
        for number in range(100):
            self.log.info("{number} from {address}", number=number, address="a", once="a")
        self.assertEqual([("0 from a", 0)], self.written())
        self.pass_time(MINUTE)
        self.assertEqual([("1 from a", 98)], self.written())
        self.pass_time(10 * MINUTE)
        self.assertEqual([], self.written())

    def test_the_next_line_has_the_count_if_it_comes_first(self) -> None:
        for _ in range(3):
            self.log.info("so", once=1)
        self.clock.advance(MINUTE)
        self.log.info("so", once=1)
        self.assertEqual([("so", 0), ("so", 2)], self.written())

    def test_every_event_is_a_line_or_counted(self) -> None:
        for second in range(1000):
            self.log.warn("so", once="x")
            self.log.warn("often")
            if second % 7 == 0:
                self.pass_time(7)
        for event in self.repeats.due(at_once=True):
            self.write(event)
        lines = self.written()
        self.assertEqual(2000, len(lines) + sum(omitted for _, omitted in lines))
        self.assertLess(len(lines), (BURST + 2) * 1000 / MINUTE * 1.1)

    def test_keys_formats_and_modules_are_told_apart(self) -> None:
        for key in ("a", "b", None):
            self.log.info("so", once=key)
        self.log.info("otherwise", once="a")
        Logger("ecrproxy.y", observer=cast(ILogObserver, self.note)).info("so", once="a")
        self.assertEqual(5, len(self.written()))

    def test_clients_that_choose_what_is_said_once_do_not_fill_the_log(self) -> None:
        written: list[tuple[str, int]] = []
        for minute in range(3):
            for number in range(1000):
                self.log.warn("Refused {name}", name=f"name{minute}-{number}", once=f"name{minute}-{number}")
            self.log.warn("something else", once=minute)
            self.pass_time(MINUTE)
            self.assertIn(("something else", 0), self.lines)
            self.assertLessEqual(len(self.lines), DIFFERENT + 3)
            written += self.written()
        self.pass_time(MINUTE)
        written += self.written()
        self.assertEqual(3003, len(written) + sum(omitted for _, omitted in written))

    def test_a_trouble_has_a_few_lines_and_then_a_count(self) -> None:
        for number in range(300_000 // 100):
            self.log.error("no room for {number}", number=number)
        self.assertEqual([(f"no room for {number}", 0) for number in range(BURST)], self.written())
        self.pass_time(MINUTE)
        self.assertEqual([(f"no room for {BURST}", 3000 - BURST - 1)], self.written())

    def test_a_trouble_that_goes_on_has_no_more_lines_in_the_next_minute(self) -> None:
        for _ in range(int(10 * MINUTE)):
            for _ in range(10):
                self.log.warn("so")
            self.pass_time(1)
        self.assertLessEqual(len(self.written()), 10 * BURST + 1)

    def test_requests_and_the_like_are_all_written(self) -> None:
        for _ in range(1000):
            self.log.info("GET")
        self.assertEqual(1000, len(self.written()))

    def test_what_was_logged_in_the_old_way_is_told_apart_by_its_text(self) -> None:
        old = OldPublisher(publishPublisher=LogPublisher(cast(ILogObserver, self.note)))
        for number in range(100):
            old.msg(failure=Failure(OSError(number)), why="Accepting", isError=1)
        old.msg(failure=Failure(OSError()), why="Something else", isError=1)
        self.assertEqual(BURST + 1, len(self.written()))

    def test_what_has_no_words_of_its_own_is_told_apart_by_what_it_says(self) -> None:
        for number in range(2 * BURST):
            self.log.warn("{complaint}", complaint=f"setting {number} is wrong")
        self.assertEqual(2 * BURST, len(self.written()))

    def test_exceptions_of_different_types_are_told_apart(self) -> None:
        for _ in range(100):
            self.log.failure("On its own", Failure(OSError()))
        self.log.failure("On its own", Failure(MemoryError()))
        self.assertEqual(BURST + 1, len(self.written()))

    def test_what_is_kept_is_bounded_whatever_is_said(self) -> None:
        for number in range(10 * MOST):
            self.log.info("from {once}", once=f"{number} {'x' * 10_000}")
        lines = self.written()
        self.assertLess(len(lines), MOST + 2)
        self.log.warn("something else")
        self.assertEqual([("something else", 0)], self.written())
        self.assertLess(self.kept_bytes(), (MOST + 2) * 3 * LONGEST)
        self.pass_time(MINUTE)
        lines += self.written()
        self.assertEqual(10 * MOST, len(lines) + sum(omitted for _, omitted in lines))

    def test_many_formats_are_counted_together_in_the_end(self) -> None:
        for number in range(10 * MOST):
            self.log.warn(f"so {number}")  # noqa: G004 (as some library may)
        self.assertLess(len(self.written()), 2 * MOST + BURST + 1)

    def kept_bytes(self) -> int:
        minutes = self.repeats._minutes  # noqa: SLF001
        return sum(len(str(kind)) + len(str(minute.last)) for kind, minute in minutes.items())
