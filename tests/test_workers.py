"""
The worker processes, as the first process starts and ends them, and what a worker makes of what it was handed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import ProcessProtocol, ServerFactory
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon import workers
from ecrproxy.daemon.workers import (
    END_SECONDS,
    FIRST_FD,
    RESTART_SECONDS,
    VARIABLE,
    HandedDown,
    Post,
    StandardInput,
    Workers,
)
from ecrproxy.settings.options import Options

DRAIN = 20.0
HANDED = 700
"""Where the sockets that were handed down begin in these tests: nothing else has such numbers here."""


@dataclass
class Spawned:
    """
    A process that was started, and its transport.
    """

    protocol: ProcessProtocol
    program: str
    arguments: list[str]
    environ: dict[str, str]
    descriptors: dict[int, Any]
    signals: list[str] = field(default_factory=list)
    pid: int | None = 4711

    def signalProcess(self, name: str) -> None:
        """
        Take a signal.
        """
        assert self.pid is not None, "a signal to nobody"
        self.signals.append(name)

    def end(self, reason: Exception | None = None) -> None:
        """
        Have it ended.
        """
        self.pid = None
        self.protocol.processEnded(Failure(reason or ProcessTerminated(1)))


class SpawningReactor(Clock):
    """
    A reactor that starts processes, in a test's idea of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spawned: list[Spawned] = []
        self.blocked: list[set[Any]] = []
        self.refuses: OSError | None = None

    def spawnProcess(
        self, protocol: ProcessProtocol, program: str, args: list[str], env: dict[str, str], **options: Any
    ) -> Spawned:
        """
        Start a process.
        """
        if self.refuses is not None:
            raise self.refuses
        process = Spawned(protocol, program, args, env, options.pop("childFDs"))
        assert not options, "nothing else is to be asked for"
        self.spawned.append(process)
        self.blocked.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        protocol.makeConnection(process)
        return process

    @property
    def running(self) -> list[Spawned]:
        """
        The processes that have not ended.
        """
        return [each for each in self.spawned if each.pid is not None]


class Bound:
    """
    An endpoint that is bound.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """
        Give its socket.
        """
        return self._number


class WorkersTestCase(SynchronousTestCase):
    """
    A first process with three workers.
    """

    def setUp(self) -> None:
        self.patch(os, "environ", {"PATH": "/bin", "AWS_REGION": "eu-west-1", "PROXY_PORT": "5000"})
        self.reactor = SpawningReactor()
        self.workers = self.make()

    def make(self, count: int = 3, arguments: tuple[str, ...] = ("--port=5000",)) -> Workers:
        """
        Make workers that were not started.
        """
        return Workers(count, [Bound(11), Bound(7)], "/run/x/first", arguments, self.reactor, drain=DRAIN)


class StartTests(WorkersTestCase):
    def test_a_worker_that_starts_keeps_being_told_to_read_again_for_later(self) -> None:
        """
        SIGHUP waits until it has a handler; the first process takes its own as ever.
        """
        self.workers.startService()
        self.assertEqual([{signal.SIGHUP}] * 3, [each & {signal.SIGHUP} for each in self.reactor.blocked])
        self.assertNotIn(signal.SIGHUP, signal.pthread_sigmask(signal.SIG_BLOCK, []))

    def test_there_are_as_many_as_were_asked_for(self) -> None:
        """
        Nothing is started before the daemon is, then as many workers as the operator wants.
        """
        for count in (2, 3, 16):
            self.reactor.spawned.clear()
            several = self.make(count)
            self.assertEqual([], self.reactor.spawned)
            several.startService()
            self.assertEqual(count, len(self.reactor.running))

    def test_each_is_the_daemon_once_more(self) -> None:
        """
        A worker is twistd under the same interpreter, in the foreground, without a pid file, with the daemon's flags.
        """
        flags = ("--port=5000", "--namespace-pattern=a b", "--no-read-ahead")
        self.make(1, flags).startService()
        (process,) = self.reactor.spawned
        self.assertEqual(sys.executable, process.program)
        self.assertEqual([sys.executable, "-c"], process.arguments[:2])
        self.assertIn("twistd", process.arguments[2])
        self.assertEqual(["-n", "--pidfile=", "ecr-proxy", *flags], process.arguments[3:])

    def test_each_has_the_listening_sockets(self) -> None:
        """
        The sockets lie side by side from number 3 on, in the order of the endpoints; standard input is a pipe whose end
        is the first process's, the logs go where the first process's go.
        """
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertEqual({0: "w", 1: 1, 2: 2, FIRST_FD: 11, FIRST_FD + 1: 7}, process.descriptors)
            post = Post.from_environ(process.environ)
            self.assertEqual(Post("/run/x/first", 2), post)

    def test_each_has_the_settings(self) -> None:
        """
        The environment is the daemon's own, with one variable more, and the daemon's own is not touched.
        """
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertEqual(os.environ | {VARIABLE: process.environ[VARIABLE]}, process.environ)
        self.assertNotIn(VARIABLE, os.environ)

    def test_none_has_credentials(self) -> None:
        """
        A worker never speaks to AWS: what would let it is not in its environment.
        """
        names = (
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
        )
        os.environ.update({name: f"secret of {name}" for name in names})
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertNotIn("secret", str(process.environ))
            self.assertNotIn("secret", str(process.arguments))

    def test_none_has_the_credentials_of_a_container(self) -> None:
        """
        Nor is the token in it that a container fetches its role's credentials with, or an older name of a token.
        """
        names = ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_SECURITY_TOKEN")
        os.environ.update({name: f"secret of {name}" for name in names})
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertNotIn("secret", str(process.environ))


class RestartTests(WorkersTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.workers.startService()

    def test_follows_a_death(self) -> None:
        """
        A second after a worker has ended, for whatever reason, another like it takes its place.
        """
        for reason in (ProcessTerminated(1), ProcessTerminated(None, 9), ProcessDone(0)):
            ended = self.reactor.running[0]
            ended.end(reason)
            self.reactor.advance(RESTART_SECONDS * 0.9)
            self.assertEqual(2, len(self.reactor.running))
            self.reactor.advance(RESTART_SECONDS * 0.1 + 0.001)
            self.assertEqual(3, len(self.reactor.running))
            started = self.reactor.running[-1]
            self.assertEqual(
                (ended.arguments, ended.environ, ended.descriptors),
                (started.arguments, started.environ, started.descriptors),
            )
        self.assertEqual(1.0, RESTART_SECONDS)

    def test_follows_each_death(self) -> None:
        """
        However many end at once, and however often, their number is made up.
        """
        for _ in range(5):
            for process in self.reactor.running:
                process.end()
            self.assertEqual([], self.reactor.running)
            self.reactor.pump([0.5, 0.6])
            self.assertEqual(3, len(self.reactor.running))
        self.assertEqual(18, len(self.reactor.spawned))

    def test_that_fails_is_tried_again(self) -> None:
        """
        While the machine has no room for a process, it is asked again; the daemon still ends when it is told to.
        """
        self.reactor.refuses = BlockingIOError(11, "Resource temporarily unavailable")
        self.reactor.running[0].end()
        for _ in range(3):
            with contextlib.suppress(BlockingIOError):  # which a reactor would log
                self.reactor.advance(RESTART_SECONDS)
        self.flushLoggedErrors()
        self.reactor.refuses = None
        self.reactor.advance(RESTART_SECONDS)
        found = len(self.reactor.running)
        stopping = self.workers.stopService()
        for process in self.reactor.running:
            process.end()
        self.successResultOf(stopping)
        self.assertEqual(3, found)


class EndTests(WorkersTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.workers.startService()

    def test_is_asked_for(self) -> None:
        """
        The workers are told to end, and the daemon waits for each of them.
        """
        stopping = self.workers.stopService()
        self.assertEqual([["TERM"]] * 3, [process.signals for process in self.reactor.spawned])
        for process in self.reactor.spawned:
            self.assertNoResult(stopping)
            process.end(ProcessDone(0))
        self.successResultOf(stopping)
        self.assertEqual([], self.reactor.getDelayedCalls())
        self.assertEqual(3, len(self.reactor.spawned))

    def test_is_forced_after_a_while(self) -> None:
        """
        A worker that is still there after its clients had their time is killed; those that have ended are left alone.
        """
        stopping = self.workers.stopService()
        self.reactor.spawned[0].end(ProcessDone(0))
        self.reactor.advance(DRAIN + END_SECONDS - 0.1)
        self.assertEqual([["TERM"]] * 3, [process.signals for process in self.reactor.spawned])
        self.reactor.advance(0.1)
        self.assertEqual(
            [["TERM"], ["TERM", "KILL"], ["TERM", "KILL"]], [process.signals for process in self.reactor.spawned]
        )
        self.assertNoResult(stopping)
        for process in self.reactor.running:
            process.end(ProcessTerminated(None, 9))
        self.successResultOf(stopping)
        self.assertEqual(3.0, END_SECONDS)

    def test_is_not_what_sighup_asks_for(self) -> None:
        """
        It is handed on to the workers that are there, who read their certificates again.
        """
        self.reactor.spawned[0].end()
        self.workers.reread()
        self.assertEqual([[], ["HUP"], ["HUP"]], [process.signals for process in self.reactor.spawned])

    def test_starts_no_others(self) -> None:
        """
        A worker that was about to be replaced isn't, once the daemon ends, nor one that ends meanwhile.
        """
        self.reactor.spawned[0].end()
        self.reactor.advance(RESTART_SECONDS / 2)
        stopping = self.workers.stopService()
        self.reactor.spawned[1].end()
        self.reactor.advance(2 * RESTART_SECONDS)
        self.reactor.spawned[2].end()
        self.reactor.advance(2 * RESTART_SECONDS)
        self.successResultOf(stopping)
        self.assertEqual(3, len(self.reactor.spawned))

    def test_of_none_is_at_once(self) -> None:
        """
        Without a worker alive there is nothing to wait for.
        """
        for process in self.reactor.spawned:
            process.end()
        self.successResultOf(self.workers.stopService())
        self.assertEqual([], self.reactor.getDelayedCalls())


class PostTests(SynchronousTestCase):
    def test_is_read_as_it_was_written(self) -> None:
        """
        What a worker is told passes through one variable, whatever is in it.
        """
        for post in (Post("/tmp/a b/ü\n/first ", 3), Post("", 0)):
            self.assertEqual(post, Post.from_environ({VARIABLE: post.to_json()}))

    def test_is_a_workers_alone(self) -> None:
        """
        A process that was told nothing is the first.
        """
        for environ in ({}, {VARIABLE: ""}, {"PATH": "/bin"}):
            self.assertIsNone(Post.from_environ(environ))


class FlagsTests(SynchronousTestCase):
    def test_are_handed_on_as_they_were_given(self) -> None:
        """
        The flags written for a worker are read there as what the operator gave.
        """
        for flags in (
            [],
            ["--port=5000"],
            ["--listen=tcp:5000", "--listen=unix:/tmp/x", "--cache-key=$uri $host"],
            ["--namespace-pattern=", "--read-ahead"],
            ["--no-read-ahead", "--cache-dir=--strange"],
            ["--worker-processes", "4"],
        ):
            given, handed = Options(), Options()
            given.parseOptions(flags)
            handed.parseOptions(given.arguments())
            self.assertEqual(given.flags(), handed.flags(), flags)
            self.assertEqual(len(given.flags()), len(given.flags().keys() & handed.flags().keys()))


@dataclass
class AdoptingReactor:
    """
    A reactor of a worker.
    """

    adopted: list[tuple[int, int, Any]] = field(default_factory=list)
    answer: int = 42

    accepted: int = 0
    socket: socket.socket = field(default_factory=socket.socket)

    def adoptStreamPort(self, fd: int, family: int, factory: Any) -> AdoptingReactor:
        """
        Adopt a socket, and be the port of it.
        """
        self.adopted.append((fd, family, factory))
        return self

    def close(self) -> None:
        """
        Close the socket that the port has by now.
        """
        self.socket.close()

    def doRead(self) -> None:
        """
        Accept.
        """
        self.accepted += 1

    def listenTCP(self, *args: Any, **kwargs: Any) -> None:
        """
        Bind what must not be bound.
        """
        raise AssertionError("a worker binds nothing")

    listenUNIX = listenTCP


class HandedDownTests(SynchronousTestCase):
    """
    A worker's sockets: unbound ones here.
    """

    def hand_down(self, *families: int) -> HandedDown:
        """
        Put sockets where a worker finds them.
        """
        self.patch(workers, "FIRST_FD", HANDED)
        for number, family in enumerate(families):
            with socket.socket(family) as made:
                os.dup2(made.fileno(), HANDED + number)
            self.addCleanup(self.close, HANDED + number)
        self.reactor = AdoptingReactor()
        self.addCleanup(self.reactor.close)
        return HandedDown(self.reactor, len(families))

    def close(self, fd: int) -> None:
        """
        Close what no endpoint has taken.
        """
        with contextlib.suppress(OSError):
            os.close(fd)

    def open_files(self) -> int:
        """
        Count the descriptors of this process.
        """
        gc.collect()  # what earlier tests left would go at any time
        return len(list(Path("/proc/self/fd").iterdir()))

    def test_are_taken_in_order(self) -> None:
        """
        Each endpoint takes the next socket, in the order in which they were configured; nothing is bound.

        Sockets that have a path are real ones: tests/e2e has them.
        """
        handed = self.hand_down(socket.AF_INET6, socket.AF_INET, socket.AF_INET)
        before = self.open_files()
        factories = [ServerFactory() for _ in range(3)]
        texts = ("tcp6:5000", "tcp:5001:interface=127.0.0.1:backlog=9")
        for text, factory in zip(texts, factories, strict=False):
            self.successResultOf(serverFromString(handed, text).listen(factory))
        self.successResultOf(handed.listen(factories[2]))
        families = (socket.AF_INET6, socket.AF_INET, socket.AF_INET)
        expected = [(HANDED + at, families[at], factories[at]) for at in range(3)]
        self.assertEqual(expected, self.reactor.adopted)
        self.assertEqual(before - len(families), self.open_files(), "an adopted port has a descriptor of its own")

    def test_are_closed_once_their_ports_have_descriptors_of_their_own(self) -> None:
        """
        A worker whose first process is gone, and which still sends, keeps nobody from listening there.
        """
        self.hand_down(socket.AF_INET).listenTCP(5000, ServerFactory())
        self.assertRaises(OSError, os.fstat, HANDED)

    def test_end_when_the_first_process_shuts_them_down(self) -> None:
        """
        That is the end of the port, and no error: nothing more is accepted there.
        """
        port = self.hand_down(socket.AF_INET).listenTCP(5000, ServerFactory())
        with port.socket as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            self.assertIsNone(port.doRead())
            self.assertEqual(1, port.accepted)
            listening.shutdown(socket.SHUT_RDWR)
            self.assertIs(CONNECTION_DONE, port.doRead())
            self.assertEqual(1, port.accepted)
            self.assertRaises(BlockingIOError, port.socket.accept)

    def test_leave_the_rest_to_the_reactor(self) -> None:
        """
        Whatever else an endpoint asks for, the real reactor has.
        """
        self.assertEqual(42, self.hand_down().answer)

    def test_that_are_not_there_are_an_error(self) -> None:
        """
        An endpoint more than there are sockets is a mistake that does not pass silently.
        """
        with self.assertRaises(LookupError):
            self.hand_down().listen(ServerFactory())


class StandardInputTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.ended: list[int] = []
        self.input = StandardInput(lambda: self.ended.append(1))

    def test_that_ends_ends_the_worker(self) -> None:
        """
        When the first process goes, in whatever way, its end of the pipe closes, and the worker ends; it reads no more.
        """
        asked: list[int] = []

        def read(fd: int, count: int) -> bytes:
            asked.append(fd)
            return b""

        self.patch(os, "read", read)
        found = self.input.doRead()
        assert isinstance(found, Failure)
        self.input.connectionLost(found)
        self.assertEqual(([1], [0], 0), (self.ended, asked, self.input.fileno()))

    def test_that_hangs_up_ends_the_worker(self) -> None:
        """
        Where a reactor sees the end without reading, as epoll's does for a pipe, the worker ends as well.
        """
        self.input.connectionLost(Failure(ConnectionDone()))
        self.assertEqual([1], self.ended)

    def test_that_goes_on_means_nothing(self) -> None:
        """
        Bytes on it are dropped.
        """
        self.patch(os, "read", lambda *_: b"x")
        self.assertIsNone(self.input.doRead())
        self.assertEqual([], self.ended)

    def test_has_a_name_for_the_log(self) -> None:
        """
        A reactor's log can tell what it was.
        """
        self.assertEqual("first process", self.input.logPrefix())
