"""
The operator's files are read in a thread, and no replacement for them stops the daemon.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.files import READ_SECONDS, FileReader, open_file, unread
from tests.daemon import Hands
from tests.store_contract import scratch


class OpenFileTests(SynchronousTestCase):
    def test_reads_what_a_link_leads_to(self) -> None:
        folder = scratch(self)
        folder.mkdir()
        (folder / "file").write_bytes(b"settings")
        (folder / "link").symlink_to("file")
        with open_file(folder / "link") as file:
            self.assertEqual(b"settings", file.read())

    def test_what_is_no_regular_file_is_refused_at_once(self) -> None:
        folder = scratch(self)
        folder.mkdir()
        os.mkfifo(folder / "fifo")
        listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(listening.close)
        listening.bind(str(folder / "socket"))
        (folder / "link").symlink_to("fifo")
        for path, why in (
            (folder / "fifo", "it is a FIFO, not a regular file"),
            (folder / "link", "it is a FIFO, not a regular file"),
            (folder / "socket", "it is a socket, not a regular file"),
            (Path("/dev/zero"), "it is a device, not a regular file"),
            (folder, "Is a directory"),
            (folder / "nothing", "No such file or directory"),
        ):
            problem = self.assertRaises(OSError, open_file, path)
            self.assertEqual((why, str(path)), (problem.strerror, str(problem.filename)))


class UnreadTests(SynchronousTestCase):
    def test_who_may_not_read_a_file_is_told(self) -> None:
        """
        The container drops root's privileges: a key that only root may read is a surprise.
        """
        denied, gone = (OSError(number, os.strerror(number)) for number in (errno.EACCES, errno.ENOENT))
        self.assertEqual(f"can't be read by user {os.geteuid()}: Permission denied", unread(denied))
        self.assertEqual("can't be read: No such file or directory", unread(gone))


class ReadingTests(SynchronousTestCase):
    """
    A thread that reads when it is told to.
    """

    def setUp(self) -> None:
        self.clock, self.thread = Clock(), Hands()
        self.thread.idle = False
        self.used: list[Any] = []
        self.reading = FileReader("The file", lambda *args: args, self.used.append, self.thread, self.clock)

    def test_what_is_read_in_the_thread_is_used_in_the_reactor(self) -> None:
        asked = self.reading.again(1)
        self.thread.do()
        self.assertEqual([], self.used)
        self.assertNoResult(asked)
        self.thread.tell()
        self.assertEqual([(1,)], self.used)
        self.successResultOf(asked)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_requests_during_a_reading_get_one_more_with_the_arguments_of_the_last(self) -> None:
        first, second, third = (self.reading.again(number) for number in range(3))
        self.assertEqual(1, len(self.thread.waiting))
        self.thread.work()
        self.successResultOf(first)
        self.assertNoResult(second)
        self.thread.work()
        self.successResultOf(second)
        self.successResultOf(third)
        self.assertEqual(([(0,), (2,)], 0), (self.used, len(self.thread.waiting)))

    def test_one_that_hangs_is_logged_once_and_nobody_waits_for_it(self) -> None:
        """
        However often it is requested: there is one call in the thread, and one line of log a minute.
        """
        with capturedLogs() as events:
            asked = [self.reading.again(1), self.reading.again(2)]
            self.clock.advance(READ_SECONDS - 1)
            for each in asked:
                self.assertNoResult(each)
            self.clock.advance(1)
            asked += [self.reading.again(number) for number in range(3, 9)]
            self.clock.advance(1000)
        for each in asked:
            self.successResultOf(each)
        self.assertEqual(([], 1), (self.used, len(self.thread.waiting)))
        self.assertEqual({(LogLevel.error, "The file")}, {(each["log_level"], each["once"]) for each in events})

    def test_one_that_returns_late_is_used_and_followed_by_the_one_that_was_asked_for(self) -> None:
        self.reading.again(1)
        self.clock.advance(READ_SECONDS)
        self.reading.again(2)
        self.thread.work()
        self.assertEqual(([(1,)], 1), (self.used, len(self.thread.waiting)))
        self.thread.work()
        self.assertEqual(([(1,), (2,)], 0), (self.used, len(self.thread.waiting)))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_one_that_fails_is_logged_and_the_next_one_comes(self) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        for read, use in ((fail, self.used.append), (lambda: None, fail)):
            reading = FileReader("The file", read, use, self.thread, self.clock)
            for _ in range(2):
                asked: Deferred[None] = reading.again()
                self.thread.work()
                self.successResultOf(asked)
                self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))
