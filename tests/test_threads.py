"""
Calls in threads that may never return.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import SynchronousTestCase

import ecrproxy.thread_pools
from ecrproxy.thread_pools import RESTORE_SECONDS, Pools, Threads, content_with_few
from ecrproxy.threads import Bounded, patient, undone_if_late

SECONDS = 10.0


class BoundedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.running: list[tuple[Any, Deferred[Any]]] = []
        self.bounded = Bounded(self.begin, 2, SECONDS, self.clock)

    def begin(self, blocking: Any, *args: Any) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()
        self.running.append((blocking, done))
        return done

    def end(self, number: int = 0) -> None:
        blocking, done = self.running.pop(number)
        done.callback(blocking())

    def hang(self, count: int = 2) -> None:
        """
        Have that many calls hang.
        """
        for _ in range(count):
            self.failureResultOf(self.expired(self.bounded(int, "0")), TimeoutError)

    def expired(self, call: Deferred[Any]) -> Deferred[Any]:
        self.clock.advance(SECONDS)
        return call

    def test_what_returns_in_time_is_passed_on(self) -> None:
        calls = [self.bounded(int, str(number)) for number in range(4)]
        self.assertEqual(2, len(self.running))
        for _ in range(2):
            self.clock.advance(SECONDS - 1)
            self.end()
            self.end()
        self.assertEqual([0, 1, 2, 3], [self.successResultOf(call) for call in calls])
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_nobody_waits_longer_for_a_thread_than_a_call_may_take(self) -> None:
        """
        A slow disk answers each call in time, and would keep hundreds waiting for minutes.
        """
        calls = [self.bounded(int, str(number)) for number in range(6)]
        self.clock.advance(SECONDS - 1)
        self.end()
        self.end()
        self.clock.advance(1)
        for call in calls[4:]:
            self.failureResultOf(call, TimeoutError)
        self.end()
        self.end()
        self.assertEqual([0, 1, 2, 3], [self.successResultOf(call) for call in calls[:4]])
        self.assertEqual([], self.running)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_patient_calls_wait_until_all_threads_hang(self) -> None:
        calls = [patient(self.bounded)(int, str(number)) for number in range(6)]
        for _ in range(3):
            self.clock.advance(SECONDS - 1)
            self.end()
            self.end()
        self.assertEqual([0, 1, 2, 3, 4, 5], [self.successResultOf(call) for call in calls])
        calls = [patient(self.bounded)(int, "0") for _ in range(3)]
        self.clock.advance(SECONDS)
        for call in (*calls, patient(self.bounded)(int, "0")):
            self.failureResultOf(call, TimeoutError)
        self.assertEqual((2, []), (len(self.running), self.clock.getDelayedCalls()))

    def test_patient_calls_do_not_keep_the_others_from_a_thread(self) -> None:
        """
        The others go first, as they time out; yet however many of them there are, patient ones have turns.
        """
        begun = list[str]()
        for number in range(6):
            patient(self.bounded)(begun.append, f"patient {number}")
        for number in range(4):
            self.bounded(begun.append, f"other {number}")
        while self.running:
            self.end()
        order = "".join(each[0] for each in begun)
        self.assertEqual("pppoopoopp", order)

    def test_patient_calls_have_all_their_time_though_another_hangs(self) -> None:
        """
        One call of a slow disk may be late: it must not fail all others.
        """
        self.hang(1)
        calls = [patient(self.bounded)(int, str(number)) for number in range(2)]
        for number, call in enumerate(calls):
            self.clock.advance(SECONDS - 1)
            self.assertNoResult(call)
            self.end(1)
            self.assertEqual(number, self.successResultOf(call))
        self.failureResultOf(self.expired(patient(self.bounded)(int, "0")), TimeoutError)

    def test_calls_that_were_given_up_have_no_turns(self) -> None:
        """
        With more calls than the disk can do, each that waited in vain would keep another from a thread.
        """
        begun = list[str]()
        for number in range(6):
            patient(self.bounded)(begun.append, f"patient {number}")
        for _ in range(5):
            call = self.bounded(begun.append, "late")
            call.cancel()
            self.failureResultOf(call, CancelledError)
        for number in range(4):
            self.bounded(begun.append, f"other {number}")
        while self.running:
            self.end()
        self.assertEqual("pppoopoopp", "".join(each[0] for each in begun))

    def test_calls_that_were_given_less_time_do_not_count_as_hanging(self) -> None:
        """
        Otherwise one late call leaves all others a second for as long as any are made, if the disk takes longer.
        """
        self.hang(1)
        hurried = self.bounded(int, "0")
        self.clock.advance(1)
        self.failureResultOf(hurried, TimeoutError)
        self.end()
        call = self.bounded(int, "3")
        self.clock.advance(SECONDS - 2)
        self.assertNoResult(call)
        self.end(1)
        self.assertEqual(3, self.successResultOf(call))
        self.end()
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_responses_go_on_while_calls_that_were_given_less_time_are_late(self) -> None:
        self.hang(1)
        hurried, response = self.bounded(int, "0"), patient(self.bounded)(int, "5")
        self.clock.advance(1)
        self.failureResultOf(hurried, TimeoutError)
        self.assertNoResult(response)
        self.end(1)
        self.end(1)
        self.assertEqual(5, self.successResultOf(response))

    def test_failures_are_passed_on(self) -> None:
        call = self.bounded(int, "x")
        self.running.pop()[1].errback(ValueError())
        self.failureResultOf(call, ValueError)

    def test_what_hangs_fails_as_a_disk_does(self) -> None:
        call = self.bounded(int, "1")
        self.clock.advance(SECONDS - 1)
        self.assertNoResult(call)
        self.clock.advance(1)
        self.assertTrue(self.failureResultOf(call).check(OSError))

    def test_one_call_that_hangs_leaves_the_others_at_work(self) -> None:
        self.hang(1)
        calls = [self.bounded(int, "1") for _ in range(3)]
        for _ in calls:
            self.end(1)
        self.assertEqual([1, 1, 1], [self.successResultOf(call) for call in calls])

    def test_others_are_less_patient_then(self) -> None:
        self.hang(1)
        call = self.bounded(int, "1")
        self.clock.advance(1)
        self.failureResultOf(call, TimeoutError)

    def test_while_all_hang_nobody_waits(self) -> None:
        self.hang(1)
        waiting = [self.bounded(int, "1") for _ in range(3)]
        self.clock.pump([1, SECONDS - 1])
        for call in (*waiting, self.bounded(int, "1")):
            self.failureResultOf(call, TimeoutError)
        self.assertEqual(2, len(self.running))

    def test_a_thread_that_returns_is_used_again(self) -> None:
        self.hang()
        self.end()
        self.assertEqual(1, len(self.running))
        call = self.bounded(int, "7")
        self.end(1)
        self.assertEqual(7, self.successResultOf(call))

    def test_hanging_is_told_once_a_minute(self) -> None:
        with capturedLogs() as events:
            self.hang()
        told = {(event["log_level"].name, event["once"]) for event in events}
        self.assertEqual({("error", ("hangs", "the cache's file system"))}, told)

    def test_who_leaves_before_its_turn_takes_no_thread(self) -> None:
        calls = [self.bounded(int, str(number)) for number in range(4)]
        calls[2].cancel()
        self.failureResultOf(calls[2], CancelledError)
        for _ in range(3):
            self.end()
        self.assertEqual([0, 1, 3], [self.successResultOf(calls[number]) for number in (0, 1, 3)])
        self.assertEqual([], self.clock.getDelayedCalls())  # else a warning of a slow disk comes later


class UndoneTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.undone: list[int] = []
        self.done: Deferred[int] = Deferred()
        self.call: Any = None
        self.during: Any = lambda: None
        self.unbegun: list[str] = []
        unbegun = partial(self.unbegun.append, "unbegun")
        self.asked = Deferred.fromCoroutine(undone_if_late(self.begin, self.block, self.undone.append, unbegun))

    def block(self) -> int:
        self.during()
        return 7

    def begin(self, blocking: Any, *args: Any) -> Deferred[Any]:
        self.call = blocking
        return self.done

    def test_a_result_in_time_is_passed_on(self) -> None:
        self.done.callback(self.call())
        self.assertEqual((7, []), (self.successResultOf(self.asked), self.undone))

    def test_a_result_that_comes_late_is_undone(self) -> None:
        self.during = lambda: self.done.errback(TimeoutError())
        self.call()
        self.failureResultOf(self.asked, TimeoutError)
        self.assertEqual(([7], []), (self.undone, self.unbegun))

    def test_what_has_not_begun_when_its_asker_leaves_never_does(self) -> None:
        self.done.errback(TimeoutError())
        self.failureResultOf(self.asked, TimeoutError)
        self.assertRaises(CancelledError, self.call)
        self.assertEqual(([], ["unbegun"]), (self.undone, self.unbegun))

    def test_a_result_on_its_way_when_its_asker_leaves_is_undone(self) -> None:
        self.call()
        self.asked.cancel()
        self.failureResultOf(self.asked, CancelledError)
        self.assertEqual([7], self.undone)


class Reactor(Clock):
    """
    A reactor that runs calls from threads synchronously, before the pool has its thread back.
    """

    def callFromThread(self, call: Any, *args: Any) -> None:
        call(*args)


class NoMoreThreadsTests(SynchronousTestCase):
    """
    The machine starts no thread for a while, except the first one of a pool.
    """

    def setUp(self) -> None:
        self.left, self.goes_on = 1, threading.Event()
        self.pool = content_with_few(ThreadPool(0, 2))
        self.patch(self.pool, "threadFactory", self.thread)
        self.pool.start()
        self.addCleanup(self.pool.stop)
        self.addCleanup(self.goes_on.set)
        self.threads = Threads(self.pool, 2, Reactor())
        self.outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def thread(self, **how: Any) -> threading.Thread:
        made = threading.Thread(**how, daemon=True)
        if not self.left:
            self.patch(made, "start", self.start)
        self.left = max(0, self.left - 1)
        return made

    @staticmethod
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def call(self, number: int) -> None:
        """
        Make a call that lasts until it may end.
        """
        self.threads.call(lambda: (self.goes_on.wait(20), number)[1]).addBoth(self.outcomes.put)

    def finish(self, count: int) -> list[Any]:
        self.goes_on.set()
        return [self.outcomes.get(timeout=20) for _ in range(count)]

    def test_those_that_there_are_do_the_work(self) -> None:
        """
        All of it, in order: no call fails, and none is left for ever.
        """
        for number in range(6):
            self.call(number)
        self.assertEqual([0, 1, 2, 3, 4, 5], self.finish(6))

    def test_there_are_more_once_the_machine_gives_some(self) -> None:
        for number in range(3):
            self.call(number)
        self.left = 1
        self.call(3)
        self.assertEqual(2, len(self.pool.threads))
        self.assertEqual([0, 1, 2, 3], sorted(self.finish(4)))


class PoolsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pools, self.goes_on = Pools(reactor), threading.Event()
        self.addCleanup(self.goes_on.set)
        self.done: list[bool] = []

    def work_on(self, begun: threading.Event) -> None:
        begun.set()
        self.goes_on.wait(20)
        self.done.append(True)

    def busy(self, count: int) -> list[Threads]:
        """
        Start pools, and have a call in each that ends when it may.
        """
        made = [self.pools.threads(1) for _ in range(count)]
        self.pools.startService()
        for each in made:
            begun = threading.Event()
            each.call(self.work_on, begun)
            self.assertTrue(begun.wait(20))
        return made

    def test_the_end_waits_for_all_that_hang_together_and_not_long(self) -> None:
        self.patch(ecrproxy.thread_pools, "_STOP_SECONDS", 0.2)
        waited, real = list[float](), threading.Thread.join

        def join(thread: threading.Thread, seconds: float | None = None) -> None:
            if seconds is not None:
                waited.append(seconds)
            real(thread, seconds)

        made = self.busy(8)
        self.patch(threading.Thread, "join", join)
        self.pools.stopService()
        self.assertEqual((8, 7), (len(waited), waited.count(0.0)))
        self.assertTrue(0 < waited[0] <= 0.2)
        self.assertTrue(all(each.daemon for one in made for each in one._pool.threads))  # noqa: SLF001

    def test_the_end_does_without_threads(self) -> None:
        self.busy(2)
        self.patch(threading.Thread, "start", NoMoreThreadsTests.start)
        self.pools.stopService()
        self.assertEqual([], self.done)

    def test_what_is_at_work_is_waited_for(self) -> None:
        self.patch(ecrproxy.thread_pools, "_STOP_SECONDS", 20.0)
        last = self.pools.threads(1)
        self.busy(1)
        last.call(self.goes_on.set)
        self.pools.stopService()
        self.assertEqual([True], self.done)

    def test_idle_threads_are_given_back_for_a_while(self) -> None:
        """
        Each pool keeps one, and those that are busy.
        """
        reactor = Timed()
        self.addCleanup(reactor.pool.stop)
        self.pools = Pools(reactor)
        many, one = self.pools.threads(4), self.pools.threads(1)
        self.pools.startService()
        self.addCleanup(lambda: self.assertEqual([], reactor.getDelayedCalls()))  # the last of these comes first
        self.addCleanup(self.pools.stopService)
        self.addCleanup(self.goes_on.set)
        pool = many._pool  # noqa: SLF001
        pool.adjustPoolsize(4, 4)
        begun = threading.Event()
        many.call(self.work_on, begun)
        self.assertTrue(begun.wait(20))
        kept = []
        for _ in range(3):
            self.pools.give_back()
            kept.append((pool.workers, pool.max, one._pool.workers))  # noqa: SLF001
        self.assertEqual([(2, 2, 1), (1, 1, 1), (1, 1, 1)], kept)
        self.assertEqual(1, reactor.pool.workers)
        reactor.advance(RESTORE_SECONDS)
        self.assertEqual((4, 2), (pool.max, reactor.pool.max))
        self.pools.give_back()
        self.assertEqual(1, len(reactor.getDelayedCalls()))


class Timed(Reactor):
    """
    A part with a pool of threads of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPool(2, 2)
        self.pool.start()

    def getThreadPool(self) -> ThreadPool:
        return self.pool
