"""
The worker processes, as the parent starts, supervises and ends them.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.readings import FIGURES
from ecrproxy.daemon.inherited import CHANNEL_FD, HELD_BACK, SOCKETS_FD, VARIABLE
from ecrproxy.metrics import Gathered
from ecrproxy.readiness import Readiness
from ecrproxy.settings.options import Options
from ecrproxy.workers.child import ANSWER_SECONDS, END_SECONDS, SILENT_SECONDS, STARTING_SECONDS, STILL_SECONDS
from ecrproxy.workers.messages import (
    LIMIT,
    Counted,
    FromParent,
    FromWorker,
    Listens,
    ReadinessTold,
    Refused,
    Reread,
    decode,
    encode,
)
from ecrproxy.workers.processes import FIRST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS, Workers

DRAIN = 20.0


@dataclass
class Spawned:
    """
    A started process, and its transport.
    """

    protocol: ProcessProtocol
    program: str
    arguments: list[str]
    environ: dict[str, str]
    descriptors: dict[int, Any]
    signals: list[str] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    closed: bool = False
    pid: int | None = 4711
    channel: Any = None
    wire: Any = None

    def signalProcess(self, name: str) -> None:
        assert self.pid is not None, "a signal to nobody"
        self.signals.append(name)

    def end(self, reason: Exception | None = None) -> None:
        """
        End the process.
        """
        self.pid = None
        self.protocol.processEnded(Failure(reason or ProcessTerminated(1)))

    def tell(self, message: FromWorker) -> None:
        """
        Send a message to the parent.
        """
        self.send(encode(message))

    def send(self, data: bytes) -> None:
        """
        Send bytes as a message.
        """
        self.channel.dataReceived(len(data).to_bytes(4, "big") + data)

    def told(self) -> list[Any]:
        """
        Return what it was sent since the last call.
        """
        data, messages = self.wire.value(), []
        self.wire.clear()
        while data:
            size = int.from_bytes(data[:4], "big")
            messages.append(decode(data[4 : 4 + size], FromParent))
            data = data[4 + size :]
        return messages


class SpawningReactor(Clock):
    """
    A reactor that starts processes in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spawned: list[Spawned] = []
        self.blocked: list[set[Any]] = []
        self.refuses: OSError | None = None
        self.adopted: list[tuple[int, int, bool]] = []

    def spawnProcess(
        self, protocol: ProcessProtocol, program: str, args: list[str], env: dict[str, str], **options: Any
    ) -> Spawned:
        if self.refuses is not None:
            raise self.refuses
        process = Spawned(protocol, program, args, env, options.pop("childFDs"), pid=4711 + len(self.spawned))
        assert not options, "nothing else is to be asked for"
        process.kinds = {fd: str(Path(f"/proc/self/fd/{process.descriptors[fd]}").readlink()) for fd in (0, CHANNEL_FD)}
        process.closed = not os.get_inheritable(process.descriptors[CHANNEL_FD])
        self.spawned.append(process)
        self.blocked.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        protocol.makeConnection(process)
        return process

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        """
        Keep the parent's end of the channel to the process that was started last.
        """
        process = self.spawned[-1]
        process.channel, process.wire = factory.buildProtocol(None), StringTransportWithDisconnection()
        process.wire.protocol = process.channel
        process.channel.makeConnection(process.wire)
        self.adopted.append((fd, family, os.get_blocking(fd)))

    @property
    def running(self) -> list[Spawned]:
        """
        Return the processes that have not ended.
        """
        return [each for each in self.spawned if each.pid is not None]


class Bound:
    """
    A bound endpoint.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """
        Return its socket.
        """
        return self._number


class WorkersTestCase(SynchronousTestCase):
    """
    A parent with three workers.
    """

    def setUp(self) -> None:
        self.patch(os, "environ", {"PATH": "/bin", "AWS_REGION": "eu-west-1", "PROXY_PORT": "5000"})
        self.reactor = SpawningReactor()
        self.workers = self.make()

    def make(self, count: int = 3, arguments: tuple[str, ...] = ("--port=5000",)) -> Workers:
        """
        Create workers without starting them.
        """
        self.gathered, self.counted, self.refused = Gathered(FIGURES), list[Counted](), list[str]()
        hear = self.counted.append, self.refused.append
        variables = {"PROXY_CONFIG": ""}
        sockets = [Bound(11), Bound(7)]
        return Workers(count, sockets, arguments, variables, self.gathered, *hear, self.reactor, drain=DRAIN)


class StartTests(WorkersTestCase):
    def test_signals_to_all_processes_do_not_end_a_worker_that_starts(self) -> None:
        """
        They stay pending until there is a handler; the parent handles its own as before.
        """
        self.workers.startService()
        self.assertEqual({signal.SIGHUP, signal.SIGINT, signal.SIGUSR1}, HELD_BACK)
        self.assertEqual([HELD_BACK] * 3, [each & HELD_BACK for each in self.reactor.blocked])
        self.assertEqual(set(), HELD_BACK & signal.pthread_sigmask(signal.SIG_BLOCK, []))

    def test_there_are_as_many_as_were_asked_for(self) -> None:
        """
        Nothing is started before the daemon is, then as many workers as configured.
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
        self.assertEqual([sys.executable, "-P", "-c"], process.arguments[:3])
        self.assertIn("twistd", process.arguments[3])
        self.assertEqual(["-n", "--pidfile=", "ecr-proxy", *flags], process.arguments[4:])

    def test_nothing_is_imported_from_the_working_directory(self) -> None:
        """
        A user who can write there would run code in a worker, and a file like C{secrets.py} would prevent its start.
        """
        self.make(1).startService()
        (process,) = self.reactor.spawned
        python = process.arguments[: process.arguments.index("-c")]
        with TemporaryDirectory() as folder:
            found = subprocess.run(
                [*python, "-c", "import sys; print(sys.path)"], cwd=folder, capture_output=True, check=True, text=True
            )
            self.assertNotIn("''", found.stdout)
            self.assertNotIn(folder, found.stdout)

    def test_each_inherits_what_is_named_and_nothing_else(self) -> None:
        """
        An empty stdin, the streams of the log, its end of a channel, and the listening sockets side by side, in the
        order of the endpoints. The parent keeps no descriptor of the worker's end.
        """
        before = len(list(Path("/proc/self/fd").iterdir()))
        self.workers.startService()
        for process in self.reactor.spawned:
            channel = process.descriptors.pop(CHANNEL_FD)
            self.assertEqual(
                {1: 1, 2: 2, SOCKETS_FD: 11, SOCKETS_FD + 1: 7}, dict(list(process.descriptors.items())[1:])
            )
            self.assertEqual("/dev/null", process.kinds[0])
            self.assertTrue(process.kinds[CHANNEL_FD].startswith("socket:"))
            self.assertTrue(process.closed, "another worker would inherit it")
            self.assertEqual("2", process.environ[VARIABLE])
            self.assertRaises(OSError, os.fstat, channel)
        self.assertEqual({(socket.AF_UNIX, False)}, {adopted[1:] for adopted in self.reactor.adopted})
        self.assertEqual(before, len(list(Path("/proc/self/fd").iterdir())))

    def test_each_has_the_settings(self) -> None:
        """
        The environment is the daemon's own, credentials too, with one variable more; the daemon's own is unchanged.
        """
        os.environ["AWS_SECRET_ACCESS_KEY"] = "secret"
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertEqual(os.environ | {VARIABLE: "2", "PROXY_CONFIG": ""}, process.environ)
            self.assertNotIn("secret", str(process.arguments))
        self.assertNotIn(VARIABLE, os.environ)

    def test_all_listen_once_each_has_said_so(self) -> None:
        self.workers.startService()
        for process in self.reactor.spawned:
            self.assertNoResult(self.workers.listen)
            process.tell(Listens())
        self.successResultOf(self.workers.listen)

    def test_one_that_died_before_it_listened_is_waited_for(self) -> None:
        self.workers.startService()
        first, *others = self.reactor.spawned
        first.tell(Listens())
        first.end()
        for process in others:
            process.tell(Listens())
        self.assertNoResult(self.workers.listen)
        self.reactor.advance(FIRST_PAUSE)
        self.reactor.spawned[-1].tell(Listens())
        self.successResultOf(self.workers.listen)


class RestartTests(WorkersTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.workers.startService()

    def test_follows_a_death(self) -> None:
        """
        A second after a worker has ended, for whatever reason, another like it replaces it.
        """
        for reason in (ProcessTerminated(1), ProcessTerminated(None, signal.SIGBUS), ProcessDone(0)):
            self.reactor.advance(STEADY_SECONDS)
            ended = self.reactor.running[0]
            ended.end(reason)
            self.reactor.advance(FIRST_PAUSE * 0.9)
            self.assertEqual(2, len(self.reactor.running))
            self.reactor.advance(FIRST_PAUSE * 0.1 + 0.001)
            self.assertEqual(3, len(self.reactor.running))
            started = self.reactor.running[-1]
            self.assertEqual((ended.arguments, ended.environ), (started.arguments, started.environ))

    def test_comes_later_each_time_while_they_keep_dying(self) -> None:
        """
        A worker that can't run costs little; one that ran for a minute is replaced after a second again.
        """
        waited = []
        for _ in range(8):
            for process in self.reactor.running:
                process.end()
            began = self.reactor.seconds()
            while not self.reactor.running:
                self.reactor.advance(0.5)
            waited.append(self.reactor.seconds() - began)
        self.assertEqual([1, 2, 4, 8, 16, 32, 60, 60], waited)
        self.reactor.advance(STEADY_SECONDS)
        self.reactor.running[0].end()
        self.reactor.advance(FIRST_PAUSE)
        self.assertEqual(3, len(self.reactor.running))

    def test_is_of_each_place_by_itself(self) -> None:
        """
        A worker that keeps dying does not delay another's successor.
        """
        for _ in range(3):
            self.reactor.running[-1].end()
            self.reactor.advance(10)
        self.reactor.running[0].end()
        self.reactor.advance(FIRST_PAUSE)
        self.assertEqual(3, len(self.reactor.running))

    def test_of_one_that_cannot_be_heard_is_once(self) -> None:
        """
        The parent has no descriptor left for the channel: the worker is killed, and replaced as usual.
        """
        adopt = self.reactor.adoptStreamConnection
        self.reactor.running[0].end()

        def refuse(*_: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        self.reactor.adoptStreamConnection = refuse  # type: ignore[method-assign,assignment]
        self.reactor.advance(FIRST_PAUSE)
        deaf = self.reactor.spawned[-1]
        self.assertEqual(["KILL"], deaf.signals)
        self.reactor.adoptStreamConnection = adopt  # type: ignore[method-assign]
        deaf.end(ProcessTerminated(None, 9))
        self.reactor.advance(LONGEST_PAUSE)
        self.assertEqual((3, 5), (len(self.reactor.running), len(self.reactor.spawned)))

    def test_that_fails_is_tried_again(self) -> None:
        """
        While the machine can't start a process, it is tried again; the daemon still stops when told.
        """
        self.reactor.refuses = BlockingIOError(11, "Resource temporarily unavailable")
        self.reactor.running[0].end()
        for _ in range(3):
            self.reactor.advance(LONGEST_PAUSE)
        self.reactor.refuses = None
        self.reactor.advance(LONGEST_PAUSE)
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
        A worker that still runs after the time for its clients is killed; those that have ended are left alone.
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

    def test_starts_no_others(self) -> None:
        """
        A worker that was about to be replaced isn't, once the daemon stops, nor one that ends meanwhile.
        """
        self.reactor.spawned[0].end()
        self.reactor.advance(FIRST_PAUSE / 2)
        stopping = self.workers.stopService()
        self.reactor.spawned[1].end()
        self.reactor.advance(2 * FIRST_PAUSE)
        self.reactor.spawned[2].end()
        self.reactor.advance(2 * FIRST_PAUSE)
        self.successResultOf(stopping)
        self.assertEqual(3, len(self.reactor.spawned))

    def test_of_none_is_at_once(self) -> None:
        """
        Without a running worker there is nothing to wait for.
        """
        for process in self.reactor.spawned:
            process.end()
        self.successResultOf(self.workers.stopService())
        self.assertEqual([], self.reactor.getDelayedCalls())


class ChannelTests(WorkersTestCase):
    """
    Messages of workers, and what happens to workers that send nonsense or nothing.
    """

    def setUp(self) -> None:
        super().setUp()
        self.workers.startService()
        for process in self.reactor.spawned:
            process.tell(Listens())

    def test_counts_and_refusals_are_handed_on(self) -> None:
        counted = Counted((), (), (("team/app", 5, 1),), (), (), ())
        self.reactor.spawned[1].tell(counted)
        self.reactor.spawned[2].tell(Refused("no credentials"))
        self.assertEqual(([counted], ["no credentials"]), (self.counted, self.refused))

    def test_nonsense_ends_a_worker_and_another_takes_its_place(self) -> None:
        """
        Nothing of it is believed, and later messages are ignored; the same holds for a message that is too large.
        """
        for at, nonsense in enumerate((b'["Counted",{}]', b"\xff", b"[" * 5000)):
            process = self.reactor.running[0]
            after = encode(Counted((), (), (), (), (), ()))
            process.channel.dataReceived(b"".join(len(each).to_bytes(4, "big") + each for each in (nonsense, after)))
            self.assertFalse(process.channel.connected)
            self.reactor.advance(END_SECONDS)
            self.assertEqual(["KILL"], process.signals)
            process.end(ProcessTerminated(None, 9))
            self.reactor.advance(LONGEST_PAUSE)
            self.assertEqual((3, 4 + at), (len(self.reactor.running), len(self.reactor.spawned)))
        process = self.reactor.running[0]
        process.channel.dataReceived((LIMIT + 1).to_bytes(4, "big"))
        self.reactor.advance(END_SECONDS)
        self.assertEqual(["KILL"], process.signals)
        self.assertEqual([], self.counted)

    def test_a_worker_whose_channel_has_ended_has_a_moment_to_end(self) -> None:
        process = self.reactor.spawned[0]
        process.channel.transport.loseConnection()
        self.reactor.advance(END_SECONDS - 0.1)
        self.assertEqual([], process.signals)
        process.end(ProcessDone(0))
        self.reactor.advance(1)
        self.assertEqual([], process.signals)

    def test_a_worker_that_tells_nothing_any_more_is_killed(self) -> None:
        """
        As systemd does with a daemon whose event loop stalls; a parent that stalled itself kills none.
        """
        silent, *others = self.reactor.spawned
        for _ in range(SILENT_SECONDS):
            self.assertEqual([], silent.signals)
            for process in others:
                process.tell(Counted((), (), (), (), (), ()))
            self.reactor.advance(1)
        self.assertEqual([["KILL"], [], []], [process.signals for process in self.reactor.spawned])
        self.reactor.advance(10 * SILENT_SECONDS)
        self.assertEqual([[], []], [process.signals for process in others])

    def test_a_worker_that_starts_slowly_is_killed_only_when_it_hangs(self) -> None:
        self.reactor.spawned[0].end()
        self.reactor.advance(FIRST_PAUSE)
        for _ in range(STARTING_SECONDS - 1):
            self.reactor.advance(1)
        self.assertEqual([], self.reactor.spawned[-1].signals)
        self.reactor.advance(1)
        self.assertEqual(["KILL"], self.reactor.spawned[-1].signals)

    def test_all_that_run_are_killed_where_the_end_must_not_wait(self) -> None:
        self.reactor.spawned[0].end()
        self.workers.kill()
        self.assertEqual([[], ["KILL"], ["KILL"]], [process.signals for process in self.reactor.spawned])

    def test_all_are_told_what_to_read_again(self) -> None:
        self.reactor.spawned[0].end()
        self.workers.tell(Reread("certificates"))
        self.assertEqual([[Reread("certificates")]] * 2, [process.told() for process in self.reactor.running])

    def test_those_that_do_not_answer_are_not_waited_for(self) -> None:
        """
        One answers, one hangs, one dies meanwhile: the known parts are returned, and the names of the missing.
        """
        asked = Deferred.fromCoroutine(self.workers.readiness())
        answers, hangs, dies = self.reactor.spawned
        ((question,), _, _) = [process.told() for process in self.reactor.spawned]
        well = Readiness(can_serve=True, can_fetch=True, reasons=())
        answers.tell(ReadinessTold(question.number, well))
        dies.end()
        self.assertNoResult(asked)
        self.reactor.advance(ANSWER_SECONDS)
        found = self.successResultOf(asked)
        self.assertEqual((True, ("2 of 3 worker processes do not answer",)), (found.can_serve, found.reasons))
        hangs.tell(ReadinessTold(0, well))  # too late: nothing waits for it

    def test_one_that_stands_still_is_not_waited_for(self) -> None:
        """
        Kubernetes gives a probe one second. Once it sends again, it is asked again.
        """
        still, *others = self.reactor.spawned
        for _ in range(STILL_SECONDS):
            self.reactor.advance(1)
            for process in others:
                process.tell(Counted((), (), (), (), (), ()))
        for running, missing in ((others, ("1 of 3 worker processes do not answer",)), (self.reactor.spawned, ())):
            asked = Deferred.fromCoroutine(self.workers.readiness())
            for process in running:
                well = Readiness(can_serve=True, can_fetch=True, reasons=())
                process.tell(ReadinessTold(process.told()[-1].number, well))
            self.assertEqual(missing, self.successResultOf(asked).reasons)
            still.tell(Counted((), (), (), (), (), ()))

    def test_an_answer_of_another_kind_is_none(self) -> None:
        asked = Deferred.fromCoroutine(self.workers.gather())
        for process in self.reactor.spawned:
            (question,) = process.told()
            process.tell(ReadinessTold(question.number, Readiness(can_serve=True, can_fetch=True, reasons=())))
        self.successResultOf(asked)
        self.assertEqual([], self.gathered.workers())

    def test_a_daemon_without_workers_can_do_nothing(self) -> None:
        for process in self.reactor.spawned:
            process.end()
        found = self.successResultOf(Deferred.fromCoroutine(self.workers.readiness()))
        self.assertEqual((False, False), (found.can_serve, found.can_fetch))
        standing = self.successResultOf(Deferred.fromCoroutine(self.workers.standing()))
        self.assertEqual(((), ()), (standing.registries, standing.transfers))


class FlagsTests(SynchronousTestCase):
    def test_are_handed_on_as_they_were_given(self) -> None:
        """
        The flags written for a worker are parsed there as what the operator gave.
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
            handed.parseOptions(given.arguments({}))
            self.assertEqual(given.flags(), handed.flags(), flags)
            self.assertEqual(len(given.flags()), len(given.flags().keys() & handed.flags().keys()))

    def test_what_the_file_says_is_handed_on_as_flags(self) -> None:
        """
        And not the file, which may have changed by the time a worker is replaced. Flags override it.
        """
        given, handed = Options(), Options()
        given.parseOptions(["--config=/etc/x.toml", "--port=80"])
        filed = {"port": "1", "listen": "tcp:5000 unix:/x", "read-ahead": "yes", "instance-auth": "0", "tag-ttl": "3"}
        handed.parseOptions(given.arguments(filed))
        self.assertEqual({**filed, "port": "80", "read-ahead": "true", "instance-auth": "false"}, handed.flags())
