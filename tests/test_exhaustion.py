"""
A process without memory or threads exits.
"""

from __future__ import annotations

import _thread
import os
from typing import Any

from twisted.application.service import Service
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon import exhaustion
from ecrproxy.daemon.exhaustion import TRIES, Exhaustion, Orphaned, look
from ecrproxy.daemon.service import Daemon


class Turn:
    """
    A lock that a thread releases when it begins: on a busy machine, some seconds after it was started.
    """

    SECONDS = 4.0

    def acquire(self, *, timeout: float = 0.0) -> bool:
        """
        Wait for that thread; the first acquire does not wait.
        """
        return timeout >= self.SECONDS

    def release(self) -> None:
        """
        Begin.
        """


class LookTests(SynchronousTestCase):
    def test_all_is_well_here(self) -> None:
        self.assertIsNone(look())

    def test_memory_is_asked_for(self) -> None:
        self.patch(exhaustion, "PIECE", 2**62)
        self.assertIn("Out of memory", str(look()))

    def test_a_thread_has_to_begin(self) -> None:
        self.patch(exhaustion, "BEGIN_SECONDS", 0.01)
        self.patch(_thread, "start_new_thread", lambda *_: None)
        self.assertIn("No thread", str(look()))

    def test_a_thread_that_has_no_processor_yet_is_one(self) -> None:
        self.patch(_thread, "allocate_lock", Turn)
        self.assertIsNone(look())

    def test_a_thread_is_asked_for(self) -> None:
        def start(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        self.patch(_thread, "start_new_thread", start)
        self.assertIn("No thread", str(look()))


class ExhaustionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.relieved = 0

    def relieve(self) -> None:
        self.relieved += 1
        raise MemoryError

    def watched(self, *found: str | None) -> list[str]:
        """
        Raise these failures, one after another, and then end; return the exit status of the process.
        """
        ended: list[str] = []
        finds = iter(found)

        def find() -> str | None:
            try:
                return next(finds)
            except StopIteration:
                watch.running = False
                return None

        watch = Exhaustion(ended.append, self.relieve, find, lambda _: None)
        watch.running = True
        watch.watch()
        return ended

    def test_what_lasts_ends_the_process_once(self) -> None:
        self.assertEqual(["no memory"], self.watched(*["no memory"] * (TRIES + 3)))

    def test_what_passes_does_not(self) -> None:
        self.assertEqual([], self.watched(*["no memory"] * (TRIES - 1), None, *["no memory"] * (TRIES - 1)))

    def test_before_the_end_what_can_be_given_back_is(self) -> None:
        self.watched("no memory", None, *["no memory"] * (TRIES + 3))
        self.assertEqual(1 + TRIES - 1, self.relieved)

    def test_nobody_looks_after_the_end(self) -> None:
        watch = Exhaustion(self.fail, self.fail, lambda: "no memory", lambda _: None)
        watch.watch()


class Threadless(Service):
    """
    A service that needs a thread to start.
    """

    def startService(self) -> None:
        _thread.start_new_thread(id, (self,))


class StartTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.said, self.statuses = list[str](), list[int]()
        self.patch(os, "_exit", self.statuses.append)
        self.daemon = Daemon(None)
        self.patch(self.daemon, "complain", self.said.append)
        self.patch(self.daemon.pools, "startService", lambda: None)
        self.daemon.add(Threadless())

    def start(self, *_: Any) -> None:
        raise RuntimeError("can't start new thread")

    def test_a_start_without_threads_is_one_line(self) -> None:
        self.patch(_thread, "start_new_thread", self.start)
        self.daemon.startService()
        self.assertEqual([1], self.statuses)
        self.assertEqual([exhaustion._THREADS], self.said)  # noqa: SLF001

    def test_another_fault_at_the_start_is_none_of_threads(self) -> None:
        self.patch(Threadless, "startService", self.start)
        self.assertRaises(RuntimeError, self.daemon.startService)
        self.assertEqual([], self.statuses)


class OrphanedTests(SynchronousTestCase):
    def test_a_worker_does_not_outlive_its_parent_for_long(self) -> None:
        """
        Its event loop may hang, and there is no parent left to kill it.
        """
        clock, parents = Clock(), [7]
        orphaned = Orphaned(30.0, lambda: parents[-1], clock.seconds)
        clock.advance(1000)
        self.assertIsNone(orphaned())
        parents.append(1)
        clock.advance(30)
        self.assertIsNone(orphaned())
        clock.advance(1)
        self.assertIn("parent has exited", str(orphaned()))
