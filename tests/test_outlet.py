"""
Logging never waits for the reader of the log.
"""

from __future__ import annotations

import io
import os
import threading
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.logs.outlet import Outlet, RawFile
from ecrproxy.logs.shapes import as_text
from ecrproxy.logs.writing import LineWriter

PATIENCE = 20.0


class Stuck(io.BytesIO):
    """
    A file whose reader has stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reading = threading.Event()
        self.waiting = threading.Event()
        self.problem: OSError | None = None

    def write(self, data: Any, /) -> int:
        self.waiting.set()
        assert self.reading.wait(PATIENCE)
        if self.problem is not None:
            raise self.problem
        return super().write(data)


class OutletTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.file = Stuck()
        self.addCleanup(self.file.reading.set)
        self.outlet = Outlet(self.file, 1000)

    def start(self) -> None:
        self.outlet.start(lambda: None)

    def test_writes_at_once_until_there_is_a_thread(self) -> None:
        self.file.reading.set()
        self.outlet.write(b"so\n")
        self.assertEqual(b"so\n", self.file.getvalue())

    def test_nobody_waits_for_a_reader_that_has_stopped(self) -> None:
        self.start()
        for number in range(1000):
            self.outlet.write(b"%04d\n" % number)
        self.assertFalse(self.outlet.drain(0))
        self.assertEqual(b"", self.file.getvalue())
        self.file.reading.set()
        self.assertTrue(self.outlet.drain(PATIENCE))
        self.assertEqual(b"".join(b"%04d\n" % number for number in range(200)), self.file.getvalue())

    def test_what_is_lost_is_counted_and_told_once_there_is_room(self) -> None:
        self.start()
        for _ in range(150):
            self.outlet.write(b"a line\nand another\n")
        self.assertEqual((0, 0), self.outlet.take_lost())
        self.file.reading.set()
        self.outlet.drain(PATIENCE)
        self.assertEqual((300 - 2 * (1000 // 19), 0), self.outlet.take_lost())
        self.assertEqual((0, 0), self.outlet.take_lost())

    def test_lines_of_requests_leave_room_for_others(self) -> None:
        """
        A client with many requests loses only its own lines; lost lines are counted by kind.
        """
        self.start()
        for _ in range(100):
            self.outlet.write(b"request..\n", of_requests=True)
        for _ in range(20):
            self.outlet.write(b"warning..\n")
        self.file.reading.set()
        self.outlet.drain(PATIENCE)
        self.assertEqual((75, 20), (self.file.getvalue().count(b"req"), self.file.getvalue().count(b"warn")))
        self.assertEqual((25, 25), self.outlet.take_lost())

    def test_a_reader_that_has_gone_is_no_failure(self) -> None:
        self.start()
        self.file.problem = BrokenPipeError()
        self.file.reading.set()
        self.outlet.write(b"lost\n")
        self.assertTrue(self.outlet.drain(PATIENCE))
        self.assertEqual((1, 0), self.outlet.take_lost())
        self.file.problem = None
        self.outlet.write(b"so\n")
        self.assertTrue(self.outlet.drain(PATIENCE))
        self.assertEqual(b"so\n", self.file.getvalue())

    def test_what_is_done_with_the_file_is_done_between_two_lines(self) -> None:
        self.start()
        self.file.reading.set()
        self.outlet.write(b"before\n")
        self.outlet.call(lambda: self.file.seek(0))
        self.outlet.write(b"after\n")
        self.assertTrue(self.outlet.drain(PATIENCE))
        self.assertEqual(b"after\n\n", self.file.getvalue())

    def test_while_nothing_is_written_the_thread_has_time_for_others(self) -> None:
        called = threading.Event()
        self.outlet.start(called.set)
        self.assertTrue(called.wait(PATIENCE))

    def test_the_log_says_how_many_lines_are_lost(self) -> None:
        writer = LineWriter(self.outlet, as_text, 7, Clock().seconds)
        self.start()
        event = {"log_time": 0.0, "log_level": LogLevel.info, "log_namespace": "x", "log_format": "so"}
        for _ in range(100):
            writer(dict(event))
        self.file.reading.set()
        self.outlet.drain(PATIENCE)
        writer.end(PATIENCE)
        lines = self.file.getvalue().splitlines()
        self.assertIn(b"#warn] %d log lines were dropped" % (100 - len(lines[:-1])), lines[-1])


class DescriptorTests(SynchronousTestCase):
    def test_a_pipe_that_does_not_block_gets_all(self) -> None:
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.set_blocking(writing, False)
        data = b"x" * 300_000

        def write() -> None:
            RawFile(writing).write(data)
            os.close(writing)

        thread = threading.Thread(target=write)
        thread.start()
        got = b""
        while piece := os.read(reading, 65536):
            got += piece
        thread.join()
        self.assertEqual(data, got)
