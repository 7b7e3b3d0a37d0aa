"""
A line a request, gathered in a rush.
"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.http.access_log import GATHER_SECONDS, AccessLog


class AccessLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.access_log = AccessLog(self.clock)

    def logged(self, *lines: str, seconds: float = 0) -> list[str | None]:
        """
        Write lines, let time pass, and tell what was logged.
        """
        with capturedLogs() as events:
            for line in lines:
                self.access_log.write(line)
            self.clock.advance(seconds)
        return [formatEvent(event) for event in events]

    def test_a_line_by_itself_is_logged_at_once(self) -> None:
        """
        Who looks at the log of a quiet daemon sees each request as it is answered.
        """
        for line in ("one", "two"):
            self.assertEqual([line], self.logged(line))
            self.assertEqual([], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_rush_is_gathered(self) -> None:
        """
        Lines that follow soon are logged together, in order, a moment later, none lost and none twice.
        """
        self.assertEqual(["0"], self.logged(*map(str, range(100))))
        self.assertEqual(["\n".join(map(str, range(1, 100)))], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.logged("more"))
        self.assertEqual(["more"], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual(["again"], self.logged("again"))

    def test_a_line_is_not_a_template(self) -> None:
        """
        Braces in a client's path are text.
        """
        self.assertEqual(["GET /{secret}"], self.logged("GET /{secret}"))
        self.logged("{a}", "{b}")
        self.assertEqual([], self.logged())
