"""
Shutdown: what the daemon waits for, how long, and in which order its parts stop.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon.ending import Drain, InOrder, Signals
from ecrproxy.daemon.inherited import HELD_BACK
from ecrproxy.http.closing import FRESH_SECONDS, LINGER_SECONDS
from tests.daemon import DaemonTestCase, End, Raw, Reply

LIMIT = 30.0
DATA = bytes(range(256)) * 4096
GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class DrainTests(DaemonTestCase):
    """
    A daemon with clients that shuts down.
    """

    def setUp(self) -> None:
        super().setUp()
        self.digest = self.standin.push_blob("team/app", DATA)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.drain = Drain(self.daemon.site.connections, LIMIT, self.clock)
        self.drain.startService()

    def start_again(self, **options: Any) -> None:
        """
        Start another daemon, which is not shutting down.
        """
        self.start(**options)
        self.drain = Drain(self.daemon.site.connections, LIMIT, self.clock)

    def connect(self, *pieces: bytes) -> tuple[Raw, End]:
        """
        Connect a client that stays, and have it write.
        """
        client = Raw()
        wire = self.daemon.front.connect(client, "proxy.example", 80, secure=False)
        for piece in pieces:
            wire.write(piece)
            self.flush()
        return client, wire

    def end(self) -> Deferred[None]:
        """
        Shut the daemon down.
        """
        ending = self.drain.stopService()
        self.flush()
        return ending

    def begin(self) -> Reply:
        """
        Begin a transfer.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, len(DATA) // 2)
        self.flush()
        self.assertEqual((200, ""), (reply.code, reply.ended))
        return reply

    def test_without_clients_is_at_once(self) -> None:
        """
        Without connections there is nothing to wait for, and no timer is left.
        """
        before = len(self.clock.getDelayedCalls())
        self.successResultOf(self.end())
        self.assertEqual(before, len(self.clock.getDelayedCalls()))

    def test_closes_idle_connections(self) -> None:
        """
        Idle keep-alive connections are not waited for.
        """
        client, _ = self.connect(GOOD)
        self.assertFalse(client.closed)
        self.successResultOf(self.end())
        self.assertTrue(client.closed)

    def test_lets_a_transfer_go_on(self) -> None:
        """
        A response in flight is completed, however long ago the shutdown began; then its connection closes.
        """
        reply = self.begin()
        ending = self.end()
        self.pass_time(LIMIT - 1)
        self.assertNoResult(ending)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
        self.successResultOf(ending)

    def test_a_kept_connection_closes_with_the_response(self) -> None:
        """
        A keep-alive client gets its response whole, and no further one.
        """
        self.standin.hold(self.digest)
        ask = f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        client, wire = self.connect(ask)
        ending = self.end()
        wire.write(GOOD)
        self.standin.release(self.digest)
        self.flush()
        self.assertTrue(client.got.endswith(DATA))
        self.assertEqual((1, True), (client.got.count(b"HTTP/1.1 200"), client.closed))
        self.successResultOf(ending)

    def test_tells_clients_that_the_connection_closes(self) -> None:
        """
        If a response has not begun yet, its headers say Connection: close.
        """
        self.start_again(fetch=Deferred)
        client, _ = self.connect(f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        ending = self.end()
        self.assertNoResult(ending)
        self.pass_time(LIMIT - 1)
        self.assertTrue(client.got.startswith(b"HTTP/1.1 503 "), "there was no token")
        self.assertIn(b"Connection: close\r\n", client.got)
        self.successResultOf(ending)

    def cut_short(self, version: str, path: str) -> tuple[Raw, End]:
        """
        Have a response in flight when the limit is reached.
        """
        self.standin.hold(self.digest)
        client, wire = self.connect(f"GET {path} HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        self.standin.deliver(self.digest, len(DATA) // 2)
        self.flush()
        self.end()
        self.pass_time(LIMIT)
        return client, wire

    def test_a_response_that_is_cut_ends_and_is_not_reset(self) -> None:
        """
        containerd resumes a blob whose connection has ended, and gives up on one that was reset.
        """
        for version in ("1.1", "1.0"):
            client, _ = self.cut_short(version, self.path)
            self.assertTrue(client.closed)
            client.lost.trap(ConnectionDone)
            self.assertIn(DATA[:1000], client.got)
            self.start_again()

    def test_a_response_whose_end_would_look_like_its_bodys_is_reset(self) -> None:
        client, wire = self.connect()
        wire.write(f"GET {self.path} HTTP/1.0\r\n\r\n".encode())
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.answer_with(head + b"5\r\nhello\r\n", close=False)
        self.end()
        self.pass_time(LIMIT)
        self.assertTrue(client.got.startswith(b"HTTP/1.0 200"))
        self.assertNotIn(b"Content-Length", client.got)
        client.lost.trap(ConnectionLost)

    def test_so_is_a_client_that_does_not_read(self) -> None:
        self.standin.hold(self.digest)
        _, wire = self.connect(f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wire.reading = False
        self.standin.deliver(self.digest, len(DATA) // 2)
        self.flush()
        ending = self.end()
        self.pass_time(LIMIT)
        self.assertNoResult(ending)
        self.pass_time(LINGER_SECONDS)
        self.successResultOf(ending)

    def test_cuts_what_takes_too_long(self) -> None:
        """
        At the limit, not before: the client can tell that its response is incomplete.
        """
        reply = self.begin()
        ending = self.end()
        self.pass_time(LIMIT - 0.5)
        self.assertEqual("", reply.ended)
        self.pass_time(0.5)
        self.assertBroken(reply, DATA)
        self.successResultOf(ending)
        self.assertIn("took too long", self.logged())

    def test_does_not_wait_for_transfers_that_nobody_follows(self) -> None:
        """
        A blob whose client has disconnected is no reason to wait.
        """
        self.begin().leave()
        self.flush()
        self.successResultOf(self.end())

    def test_a_request_that_is_on_its_way_is_answered(self) -> None:
        """
        A client that had connected, or begun its request, before the shutdown gets one answer with Connection: close.
        """
        for before, after in ((b"", GOOD), (GOOD[:9], GOOD[9:])):
            self.start_again()
            client, wire = self.connect(before)
            ending = self.end()
            self.assertNoResult(ending)
            wire.write(after)
            self.flush()
            self.assertTrue(client.got.startswith(b"HTTP/1.1 200 OK\r\n"), before)
            self.assertEqual((1, True), (client.got.count(b"Connection: close\r\n"), client.closed))
            self.successResultOf(ending)

    def test_connections_without_a_request_close_soon(self) -> None:
        """
        A client that has connected and sends no request has a second.
        """
        client, _ = self.connect()
        ending = self.end()
        self.pass_time(FRESH_SECONDS - 0.1)
        self.assertFalse(client.closed)
        self.pass_time(0.2)
        self.assertTrue(client.closed)
        self.successResultOf(ending)


class Part(Service):
    """
    A part that stops when it is told to.
    """

    def __init__(self, stopped: list[Part]) -> None:
        self._stopped = stopped
        self.done: Deferred[None] = Deferred()

    def stopService(self) -> Deferred[None]:
        """
        Begin to stop.
        """
        super().stopService()
        self._stopped.append(self)
        return self.done


class Broken(Service):
    """
    A part that can't stop.
    """

    def stopService(self) -> None:
        raise RuntimeError("it is broken")


class InOrderTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.stopped: list[Part] = []
        self.whole = InOrder()

    def add(self, part: Service) -> None:
        part.setServiceParent(self.whole)

    def test_each_waits_for_those_that_came_after_it(self) -> None:
        """
        Parts stop in reverse order; none stops before those that depend on it.
        """
        first, second, third = parts = [Part(self.stopped) for _ in range(3)]
        for part in parts:
            self.add(part)
        self.whole.startService()
        stopping = self.whole.stopService()
        for stopped in ([third], [third, second], [third, second, first]):
            self.assertEqual(stopped, self.stopped)
            self.assertNoResult(stopping)
            self.assertEqual(len(parts) - len(stopped), sum(part.running for part in parts))
            stopped[-1].done.callback(None)
        self.successResultOf(stopping)

    def test_a_part_that_fails_keeps_no_other(self) -> None:
        """
        The failure is logged, and the others stop.
        """
        part = Part(self.stopped)
        part.done.callback(None)
        self.add(part)
        self.add(Broken())
        self.whole.startService()
        self.successResultOf(self.whole.stopService())
        self.assertEqual([part], self.stopped)
        self.assertEqual(1, len(self.flushLoggedErrors(RuntimeError)))


class Reactor(MemoryReactorClock):
    """
    A reactor that records what signal handlers have it call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_word: list[Callable[..., object]] = []

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        """
        Record a call.
        """
        assert not args
        self.left_word.append(function)


class SignalsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.installed: dict[int, Callable[[int, object], object]] = {}
        self.patch(signal, "signal", self.installed.__setitem__)
        self.reactor, self.left = Reactor(), list[int]()
        Signals(self.reactor, self.end, self.left.append, self.reread).privilegedStartService()

    def end(self) -> None:
        """
        The function that shuts down the daemon.
        """

    def reread(self) -> None:
        """
        The function that reloads certificates.
        """

    def run_reactor(self) -> None:
        """
        Have the reactor run.
        """
        for hook, args, kwargs in self.reactor.whenRunningHooks:
            hook(*args, **kwargs)

    def test_are_ours_once_the_reactor_runs(self) -> None:
        """
        Not before, for Twisted would replace them by its own.
        """
        self.assertEqual({}, self.installed)
        self.run_reactor()
        self.assertEqual({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}, self.installed.keys())

    def test_sigusr1_ends_nothing(self) -> None:
        """
        It asks for a new log file. If the log is a file, its handler stays.
        """
        self.run_reactor()
        self.assertEqual(signal.SIG_IGN, self.installed.pop(signal.SIGUSR1))
        self.patch(signal, "getsignal", lambda _: lambda *_: None)
        self.run_reactor()
        self.assertNotIn(signal.SIGUSR1, self.installed)

    def test_that_waited_for_a_handler_come_when_there_is_one(self) -> None:
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, []))
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        self.run_reactor()
        self.assertEqual(set(), HELD_BACK & signal.pthread_sigmask(signal.SIG_BLOCK, []))

    def test_that_end_the_daemon_do_so_in_the_reactor(self) -> None:
        """
        A handler may run at any point: it only schedules a call.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self.setUp()
            self.run_reactor()
            self.installed[number](number, None)
            self.assertEqual(([self.end], []), (self.reactor.left_word, self.left))

    def test_that_come_again_end_it_at_once(self) -> None:
        """
        Whichever signal it is, and even if the reactor hangs.
        """
        self.run_reactor()
        self.installed[signal.SIGTERM](signal.SIGTERM, None)
        self.installed[signal.SIGINT](signal.SIGINT, None)
        self.assertEqual([signal.SIGINT], self.left)

    def test_sighup_ends_nothing(self) -> None:
        """
        However often it comes.
        """
        self.run_reactor()
        for _ in range(3):
            self.installed[signal.SIGHUP](signal.SIGHUP, None)
        self.assertEqual(([self.reread] * 3, []), (self.reactor.left_word, self.left))
