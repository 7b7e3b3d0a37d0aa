"""
The daemon is built from its settings, or exits with one line that says what is wrong.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import gc
import io
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import twisted.internet
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from twisted.application.service import MultiService
from twisted.internet.address import IPv4Address
from twisted.internet.base import ReactorBase
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IHostnameResolver
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy import __version__, process_wiring, reload_wiring, serving, tap
from ecrproxy.admin.history import History, Sample, merged
from ecrproxy.admin.kept_history import KeptHistory, told, write
from ecrproxy.buffers import give_memory_back
from ecrproxy.cache import current_database
from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.cache.janitor import Janitor
from ecrproxy.cache.scrub import Scrub
from ecrproxy.cache.store import Store
from ecrproxy.daemon.ending import Signals
from ecrproxy.daemon.inherited import SOCKETS_FD, VARIABLE
from ecrproxy.daemon.listening import Listening
from ecrproxy.daemon.process import (
    GIVEN_BACK_SECONDS,
    Running,
    count_steadily,
    end_each_lookup,
    give_memory_back_now_and_then,
    open_many_files,
    set_aside_what_stays,
)
from ecrproxy.daemon.renewal import LOOK_SECONDS, Renewal, generation
from ecrproxy.daemon.service import Daemon
from ecrproxy.daemon.supervision import Supervised, Supervisor
from ecrproxy.files import READ_SECONDS, FileReader
from ecrproxy.process_wiring import build
from ecrproxy.registry.aws import CredentialsError
from ecrproxy.registry.resolver import SharedLookups
from ecrproxy.settings.config import Config
from ecrproxy.settings.file import about_registries, for_worker, parse_file
from ecrproxy.settings.options import Options
from ecrproxy.settings.table import GROUPS, SETTINGS
from ecrproxy.tap import makeService
from ecrproxy.upstream_wiring import AwsTokens
from ecrproxy.workers.channel import Channel
from ecrproxy.workers.messages import Refused, Reload, Reread
from ecrproxy.workers.processes import Workers
from tests.daemon import Hands
from tests.store_contract import failing, scratch
from tests.test_ecr import KEYS, FakeAws
from tests.test_htpasswd import line
from tests.test_logs import validated
from tests.test_resolver import Receiver, System
from tests.test_tls import Files, Tcp, client, shake_with, subject_of

ADDRESS = IPv4Address("TCP", "192.0.2.1", 40000)
ECR = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"


class Reactor(MemoryReactorClock):
    """
    A reactor in memory, with what the daemon needs beside.
    """

    def __init__(self) -> None:
        super().__init__()
        first: Any = object()
        self.nameResolver = first
        self.stopped = 0

    def installNameResolver(self, resolver: IHostnameResolver) -> IHostnameResolver:
        """
        Accept another resolver.
        """
        before, self.nameResolver = self.nameResolver, resolver
        return before

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        """
        Call, for there are no threads.
        """
        function(*args)

    def stop(self) -> None:
        """
        Record the stop.
        """
        self.stopped += 1


class Taken(Reactor):
    """
    A reactor on a machine where every port is in use.
    """

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        """
        Fail as the real one does.
        """
        raise CannotListenError(interface, port, OSError(98, "Address already in use"))


class TakenForAdmin(Reactor):
    """
    A reactor on a machine where the admin port is in use.

    @ivar problem: the error; the second of these, if both began to listen at the same moment.
    """

    problem: Exception = CannotListenError("", 5001, OSError(98, "Address already in use"))

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        """
        Fail for that port.
        """
        if port == 5001:
            raise self.problem
        return super().listenTCP(port, factory, backlog, interface)


class BoundPort:
    """
    A port, and whether it accepts connections.
    """

    factory: Any = None
    reads = True

    def stopReading(self) -> None:
        """
        Accept nothing.
        """
        self.reads = False

    def fileno(self) -> int:
        """
        Return the socket's number.
        """
        return 70


class Spawning(Reactor):
    """
    A reactor that starts workers in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spawned: list[dict[str, Any]] = []
        self.channels: list[Channel] = []
        self.ports: list[BoundPort] = []

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        super().listenTCP(port, factory, backlog, interface)
        self.ports.append(BoundPort())
        return self.ports[-1]

    def spawnProcess(self, protocol: Any, *args: Any, **options: Any) -> None:
        self.spawned.append({"arguments": args[1], "environ": args[2], **options})

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        channel = factory.buildProtocol(None)
        self.channels.append(channel)
        channel.makeConnection(StringTransport())


class AtOnce:
    """
    Replaces a thread.
    """

    def __init__(self, target: Callable[[], object], **kwargs: object) -> None:
        self.start = target

    def join(self, limit: float) -> None:
        """
        Return at once.
        """


def call_at_once(
    pool: ThreadPool, done: Callable[[bool, object], None], blocking: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """
    Run at once what a pool's thread would run.
    """
    try:
        outcome = True, blocking(*args, **kwargs)
    except Exception:  # noqa: BLE001 (the caller gets it, as from a thread)
        outcome = False, Failure()
    done(*outcome)


def install(case: SynchronousTestCase, reactor: Reactor) -> None:
    """
    Make C{reactor} the global one for a while.
    """
    package: Any = twisted.internet
    before = vars(package).get("reactor")
    package.reactor = reactor
    if before is None:
        case.addCleanup(vars(package).pop, "reactor", None)
    else:
        case.addCleanup(setattr, package, "reactor", before)


class Knot:
    """
    A cycle, which only the garbage collector frees.
    """

    def __init__(self) -> None:
        self.itself = self


class TapCase(SynchronousTestCase):
    """
    A machine in memory.
    """

    def setUp(self) -> None:
        """
        Set only an endpoint, and capture the output.
        """
        self.stderr = io.StringIO()
        self.patch(sys, "__stderr__", self.stderr)
        self.folder = scratch(self)
        self.folder.mkdir()
        self.environ = {"PROXY_ECR_ENDPOINT": ECR, "PROXY_CACHE_DIR": str(self.folder / "cache")}
        self.environ |= {"PROXY_ADMIN_LISTEN": "off", "PROXY_CACHE_LIMIT": "1G"}  # on a disk of any size
        self.reactor = Reactor()

    def run_with(self, *flags: str, **environ: str) -> MultiService:
        """
        Build the daemon as twistd does.
        """
        self.patch(os, "environ", {**self.environ, **environ})
        install(self, self.reactor)
        options = Options()
        options.parseOptions(list(flags))
        return makeService(options)

    def dies(self, action: Callable[[], object]) -> str:
        """
        Return the one line that says why the daemon exits; warnings come before it.
        """
        *warnings, last = self.last_lines(action)
        self.assertTrue(all(each.startswith("warning: ") for each in warnings), warnings)
        return last

    def last_lines(self, action: Callable[[], object]) -> list[str]:
        """
        Return the lines with which the daemon exits.
        """
        self.stderr.truncate(0)
        self.stderr.seek(0)
        ending = self.assertRaises(SystemExit, action)
        self.assertEqual(1, ending.code)
        text = self.stderr.getvalue()
        self.assertTrue(all(line.startswith("ecr-proxy: ") for line in text.splitlines()), text)
        self.assertEqual("\n", text[-1:])
        return [line.removeprefix("ecr-proxy: ") for line in text.splitlines()]


def hang_up(service: MultiService) -> None:
    """
    Send SIGHUP.
    """
    (signals,) = (each for each in service if isinstance(each, Signals))
    signals._reread()  # noqa: SLF001


class Held:
    """
    Threads that run their calls when told to.
    """

    def __init__(self, case: SynchronousTestCase) -> None:
        self.calls = list[tuple[Any, ...]]()
        case.patch(ThreadPool, "callInThreadWithCallback", lambda pool, *args: self.calls.append((pool, *args)))

    def release(self, pool: ThreadPool) -> None:
        """
        Run the calls in a pool.
        """
        mine = [each for each in self.calls if each[0] is pool]
        self.calls = [each for each in self.calls if each[0] is not pool]
        for each in mine:
            call_at_once(*each)


class OptionsTests(TapCase):
    """
    The flags are the settings' own.
    """

    def test_help_lists_each_flag_with_its_variable_and_default(self) -> None:
        """
        No other document is needed to set up the daemon.
        """
        text = " ".join(str(Options()).replace("-\n", "-").split()).replace("whitespace- separated", "")
        missing = [
            words
            for setting in SETTINGS
            for words in (f"--{setting.name}", setting.variable, f"default: {setting.default}")
            if " ".join(words.split()) not in text
        ]
        self.assertEqual([], missing)

    def test_help_has_each_setting_once_in_the_group_that_it_is_about(self) -> None:
        """
        Nobody has to read all of it to find a limit, or how to listen.
        """
        grouped = [name for names in GROUPS.values() for name in names]
        self.assertEqual(sorted(each.name for each in SETTINGS), sorted(grouped))
        text = Options().getUsage()
        for group in GROUPS:
            self.assertIn(f"\n{group}:\n", text)
        self.assertLess(text.index("\nListening:"), text.index("--ssl-key=VALUE"))
        self.assertLess(text.index("--ssl-key=VALUE"), text.index("\nAccess:"))

    def test_secrets_are_no_flags(self) -> None:
        """
        Every process of the machine could read them.
        """
        text = str(Options()).lower()
        for word in ("--aws", "--secret", "--token", "--access"):
            self.assertNotIn(word, text)

    def test_only_what_was_given_is_a_flag(self) -> None:
        """
        The variables of the others stay in force.
        """
        options = Options()
        options.parseOptions([])
        self.assertEqual({}, options.flags())
        options = Options()
        options.parseOptions(
            ["--port", "80", "--instance-auth", "--listen=tcp:1", "--listen", "unix:/x", "--tag-ttl=5"]
        )
        self.assertEqual(
            {"port": "80", "instance-auth": "true", "listen": "tcp:1 unix:/x", "tag-ttl": "5"}, options.flags()
        )
        options = Options()
        options.parseOptions(["--no-instance-auth"])
        self.assertEqual({"instance-auth": "false"}, options.flags())

    def test_each_run_has_its_own_endpoints(self) -> None:
        """
        The endpoints of one command line don't affect another.
        """
        one = Options()
        one.parseOptions(["--listen=tcp:1"])
        other = Options()
        other.parseOptions([])
        self.assertNotIn("listen", other.flags())

    def test_a_wrong_command_line_is_one_line(self) -> None:
        """
        It says what is wrong, and where to find valid flags.
        """
        for flags, words in (
            (["--nonsense"], "nonsense"),
            (["--port"], "port"),
            (["surplus"], ""),
        ):
            self.assertIn("--help", self.dies(partial(Options().parseOptions, flags)))
            self.assertIn(words, self.stderr.getvalue())

    def test_the_version_is_told(self) -> None:
        """
        With success, and nothing else.
        """
        out = io.StringIO()
        self.patch(sys, "stdout", out)
        ending = self.assertRaises(SystemExit, Options().parseOptions, ["--version"])
        self.assertEqual((0, f"ecrproxy {__version__}\n"), (ending.code, out.getvalue()))


class WrongSettingTests(TapCase):
    """
    An invalid setting is one line, and nothing listens.
    """

    def assert_dies(self, expected: str, *flags: str, **environ: str) -> None:
        """
        Assert that the daemon exits with a line that begins so, before it listens.
        """
        line = self.dies(lambda: self.run_with(*flags, **environ))
        self.assertTrue(line.startswith(expected), line)
        self.assertEqual(([], [], []), (self.reactor.tcpServers, self.reactor.sslServers, self.reactor.unixServers))

    def test_with_json_the_line_is_an_object(self) -> None:
        """
        As in the schema of the log; by flag or variable, and even if another setting is wrong.
        """
        for flags, environ in (([], {"PROXY_LOG_FORMAT": "json"}), (["--log-format=json"], {})):
            self.stderr.truncate(0)
            self.stderr.seek(0)
            self.assertRaises(SystemExit, self.run_with, "--port=nonsense", *flags, **environ)
            (told,) = validated(self.stderr.getvalue())
            self.assertEqual("critical", told["level"])
            self.assertIn("nonsense", told["message"])

    def test_wrong_texts_are_told_with_their_variables(self) -> None:
        """
        Of every setting that has a grammar.
        """
        for variable, text in {
            "PROXY_ECR_ENDPOINT": "ftp://x",
            "AWS_REGION": "eu west",
            "AWS_INSTANCE_AUTH": "maybe",
            "PROXY_CACHE_KEY": "$nonsense",
            "PROXY_CACHE_LIMIT": "64 parsecs",
            "PROXY_DNS_RESOLVER": "dns.example",
            "PROXY_NAMESPACE_PATTERN": "(a",
            "PROXY_PORT": "70000",
            "PROXY_TAG_TTL": "soon",
            "PROXY_ALLOW_FROM": "everywhere",
            "PROXY_ADMIN_LISTEN": "15101",
        }.items():
            self.assert_dies(f"{variable}={text!r}: ", **{variable: text})

    def test_wrong_texts_are_told_with_their_flags(self) -> None:
        """
        Of the flags that were given.
        """
        self.assert_dies("--port='70000': ", "--port", "70000", PROXY_PORT="80")
        self.assert_dies("--namespace-pattern='a)': ", "--namespace-pattern=a)")

    def test_a_value_of_many_lines_is_told_in_one(self) -> None:
        """
        Whatever was pasted into it.
        """
        self.assert_dies(r"PROXY_PORT='1\n2\n3': ", PROXY_PORT="1\n2\n3")

    def test_what_is_wrong_with_the_configuration_file_is_told_in_the_shape_that_it_asks_for(self) -> None:
        file = self.folder / "settings.toml"
        file.write_text('log-format = "json"\nport = 70000\n')
        self.assertRaises(SystemExit, self.run_with, PROXY_CONFIG=str(file))
        (event,) = validated(self.stderr.getvalue())
        self.assertEqual(f"{file}: port='70000': not a port; give a number from 1 to 65535", event["message"])

    def test_what_is_no_file_keeps_nothing_waiting(self) -> None:
        """
        Opening a FIFO would wait until a process writes to it.
        """
        files, pems, fifo = Files(self.folder / "tls"), self.folder / "pems", self.folder / "fifo"
        os.mkfifo(fifo)
        pems.mkdir()
        os.mkfifo(pems / "a.pem")
        pair = {"PROXY_SSL_KEY": files.key, "PROXY_SSL_CERTIFICATE": files.certificate}
        for environ in (
            {"PROXY_CONFIG": str(fifo)},
            {"PROXY_HTPASSWD": str(fifo)},
            {**pair, "PROXY_SSL_KEY": str(fifo)},
            {**pair, "PROXY_SSL_CERTIFICATE": str(fifo)},
            {**pair, "PROXY_CLIENT_CA": str(fifo)},
            {"PROXY_LISTEN": f"ssl:5443:{fifo}:{files.certificate}"},
            {"PROXY_LISTEN": f"tls:{pems}:5443"},
            {"SSL_CERT_FILE": str(fifo)},
        ):
            line = self.dies(partial(self.run_with, **environ))
            self.assertIn("can't be read: it is a FIFO, not a regular file; give ", line)

    def test_what_is_missing_is_told(self) -> None:
        """
        The endpoint, the region, and the other half of key and certificate.
        """
        self.assert_dies("PROXY_ECR_ENDPOINT is not set", PROXY_ECR_ENDPOINT="")
        self.assert_dies("AWS_REGION is not set", PROXY_ECR_ENDPOINT="http://moto:5000")
        self.assert_dies("PROXY_SSL_CERTIFICATE is not set", PROXY_SSL_KEY="/key.pem")
        self.assert_dies("PROXY_SSL_KEY is not set", PROXY_SSL_CERTIFICATE="/certificate.pem")

    def test_settings_that_take_protection_away_are_told_with_all_that_is_wrong(self) -> None:
        tls = {"PROXY_SSL_KEY": "/key.pem", "PROXY_SSL_CERTIFICATE": "/certificate.pem", "PROXY_LISTEN": "tcp:80"}
        lines = self.last_lines(lambda: self.run_with(PROXY_NAMESPACE_PATERN="a", PROXY_DEBUG="1", **tls))
        expected = ["warning: PROXY_DEBUG", "PROXY_NAMESPACE_PATERN", "PROXY_LISTEN='tcp:80'"]
        self.assertEqual(expected, [words[: len(begins)] for words, begins in zip(lines, expected, strict=True)])
        self.assert_dies("PROXY_ADMIN_LISTEN='tcp:5001' would let", PROXY_ADMIN_LISTEN="tcp:5001")
        self.assertFalse((self.folder / "cache").exists())

    def test_what_is_warned_of_is_told_where_something_else_ends_the_daemon(self) -> None:
        blocked = self.folder / "file"
        blocked.write_text("no directory")
        for setting, wrong in {"PROXY_CACHE_DIR": str(blocked), "PROXY_PORT": "70000"}.items():
            warned, line = self.last_lines(lambda: self.run_with(**{setting: wrong}, PROXY_DEBUG="1"))  # noqa: B023
            self.assertIn("warning: PROXY_DEBUG is not a setting", warned)
            self.assertTrue(line.startswith(setting), line)
            self.assertNotIn("PROXY_DEBUG", line)

    def test_a_warning_is_told_as_one_in_any_shape(self) -> None:
        wrong = {"PROXY_PORT": "70000", "PROXY_DEBUG": "1"}
        self.assertRaises(SystemExit, self.run_with, PROXY_LOG_FORMAT="json", **wrong)
        self.assertEqual(["warn", "critical"], [each["level"] for each in validated(self.stderr.getvalue())])

    def test_a_proxy_that_is_none_is_told_without_its_password(self) -> None:
        line = self.dies(lambda: self.run_with(HTTPS_PROXY="socks5://ann:secret@proxy.test"))
        self.assertIn("HTTPS_PROXY: a proxy of the kind socks5: is not known", line)
        self.assertNotIn("secret", line)

    def test_an_egress_proxy_is_told_at_the_start_without_its_password(self) -> None:
        with capturedLogs() as events:
            self.run_with(https_proxy="http://ann:secret@proxy.test:3128")
        said = " ".join(filter(None, map(formatEvent, events)))
        self.assertIn("through the egress proxy proxy.test:3128", said)
        self.assertNotIn("secret", said)
        self.assertIn("169.254.169.254", os.environ["no_proxy"])

    def test_a_limit_is_held_against_the_disk(self) -> None:
        with capturedLogs() as events:
            self.run_with(PROXY_CACHE_LIMIT="999999t")
        self.assertIn("the whole file system", " ".join(filter(None, map(formatEvent, events))))

    def test_a_cache_directory_that_cannot_be_written_is_told(self) -> None:
        """
        With the reason, and what to set.
        """
        blocked = self.folder / "file"
        blocked.write_text("no directory")
        for path in (str(blocked), str(blocked / "cache")):
            self.assert_dies(f"PROXY_CACHE_DIR={path!r}: can't be written: ", PROXY_CACHE_DIR=path)

    def test_a_part_of_the_cache_directory_that_is_elsewhere_is_told(self) -> None:
        """
        Content that is a link to a larger disk, say, or to one that is not mounted: nothing could be renamed into it.
        """
        apart = "is on another file system than arriving/; move the whole directory there, and have PROXY_CACHE_DIR "
        places = [("content", "/proc", apart), ("content/sha256", "/proc", apart)]
        places.append(("content", "nowhere", "is a link that leads to no directory"))
        for number, (name, leads_to, said) in enumerate(places):
            path = self.folder / f"cache{number}" / name
            path.parent.mkdir(parents=True)
            path.symlink_to(leads_to)
            self.stderr.truncate(0)
            begins = f"PROXY_CACHE_DIR={str(self.folder / f'cache{number}')!r}: can't be written: {name}/ {said}"
            self.assert_dies(begins, PROXY_CACHE_DIR=str(self.folder / f"cache{number}"))

    def test_a_cache_directory_that_is_a_link_may_lead_anywhere(self) -> None:
        link = self.folder / "link"
        link.symlink_to(self.folder / "elsewhere")
        (self.folder / "elsewhere").mkdir()
        self.run_with(PROXY_CACHE_DIR=str(link))

    def test_a_disk_that_hangs_keeps_the_daemon_from_nothing(self) -> None:
        """
        It is waited for, a while; then the daemon reports that it does not answer.
        """
        hung, stores = threading.Event(), list[Store]()
        self.addCleanup(hung.set)

        def hang(store: Store) -> bool:
            stores.append(store)
            return hung.wait()

        self.patch(serving, "START_SECONDS", 0.05)
        self.patch(tap, "SIZE_SECONDS", 0.05)
        self.patch(Store, "begin", hang)
        self.patch(shutil, "disk_usage", lambda _: hung.wait())
        self.run_with()
        self.assertEqual(
            ["the cache directory can't be written: the disk does not answer"], stores[0].troubles.reasons()
        )

    def test_a_full_disk_keeps_the_daemon_from_nothing(self) -> None:
        self.patch(Path, "write_bytes", failing(errno.ENOSPC))
        self.run_with()

    def test_a_cache_directory_without_locks_is_for_one_process(self) -> None:
        """
        Several would write the same file. One process logs that, and goes on.
        """
        logged = list[str]()
        self.patch(fcntl, "flock", lambda *_: None)
        self.patch(serving.log, "warn", lambda text, **values: logged.append(text.format(**values)))
        told = f"PROXY_CACHE_DIR={self.environ['PROXY_CACHE_DIR']!r}: the file system has no working flock(2)"
        self.assert_dies(told, PROXY_WORKER_PROCESSES="2")
        self.assertEqual([], logged)
        self.run_with(PROXY_WORKER_PROCESSES="1")
        self.assertEqual([told], [line[: len(told)] for line in logged if "flock" in line])

    def test_several_processes_need_an_index_that_they_share(self) -> None:
        """
        One process runs on with an index in memory.
        """
        self.patch(current_database, "mountinfo", lambda: "1 2 0:3 / / rw - nfs4 server:/x rw")
        told = f"PROXY_CACHE_DIR={self.environ['PROXY_CACHE_DIR']!r}: {self.environ['PROXY_CACHE_DIR']} is on nfs4"
        self.assert_dies(told, PROXY_WORKER_PROCESSES="2")
        self.run_with(PROXY_WORKER_PROCESSES="1")

    def test_files_of_tls_that_cannot_be_used_are_told(self) -> None:
        """
        The key, the certificate, or both.
        """
        files, others = Files(self.folder / "tls"), Files(self.folder / "others")
        key, certificate = files.key, files.certificate
        for key_path, certificate_path, expected in (
            ("/nowhere", certificate, "PROXY_SSL_KEY='/nowhere': can't be read: No such file"),
            (key, "/nowhere", "PROXY_SSL_CERTIFICATE='/nowhere': can't be read: No such file"),
            (certificate, certificate, f"PROXY_SSL_KEY={certificate!r}: holds no PEM key"),
            (key, key, f"PROXY_SSL_CERTIFICATE={key!r}: holds no PEM certificate"),
            (key, others.certificate, f"PROXY_SSL_KEY={key!r}, PROXY_SSL_CERTIFICATE={others.certificate!r}: the key"),
        ):
            self.assert_dies(expected, PROXY_SSL_KEY=key_path, PROXY_SSL_CERTIFICATE=certificate_path)
        pair = {"PROXY_SSL_KEY": key, "PROXY_SSL_CERTIFICATE": certificate}
        self.assert_dies("PROXY_CLIENT_CA='/nowhere': can't be read: No such file", PROXY_CLIENT_CA="/nowhere", **pair)
        self.assert_dies(f"PROXY_CLIENT_CA={key!r}: holds no PEM certificate", PROXY_CLIENT_CA=key, **pair)

    def test_a_file_of_passwords_that_cannot_be_used_is_told(self) -> None:
        """
        By its line, without its text, and with how to create one.
        """
        self.assert_dies("PROXY_HTPASSWD='/nowhere': can't be read: No such file", PROXY_HTPASSWD="/nowhere")
        path = self.folder / "htpasswd"
        path.write_text("ann:plainly\n")
        self.assert_dies(f"PROXY_HTPASSWD={str(path)!r}: line 1 is not a name and", PROXY_HTPASSWD=str(path))
        self.assertIn("htpasswd -B", self.stderr.getvalue())
        self.assertNotIn("plainly", self.stderr.getvalue())

    def test_endpoints_that_twisted_refuses_are_told(self) -> None:
        """
        Each as it was written, and what would be right.
        """
        for text, why in {
            "carrier:pigeon": "not an endpoint string; one begins with tcp:, tcp6:, ssl:",
            "nonsense": "not an endpoint string; one begins with tcp:, tcp6:, ssl:",
            "tcp": "tcp: needs port",
            "tcp:port": "'port' is not a port; give a number from 0 to 65535",
            "tcp:": "'' is not a port; give a number from 0 to 65535",
            "tcp:1:2:3:4:5": "tcp: takes port, interface, backlog; not '4'",
            "tcp:1:nonsense=1": "tcp: takes port, interface, backlog; not 'nonsense=1'",
        }.items():
            listen = f"tcp:5000 {text}"
            self.assert_dies(f"PROXY_LISTEN={listen!r}: {text!r}: {why}", PROXY_LISTEN=listen)
        part = "a part of it is missing, unknown or no number"
        not_pem = Path(__file__)
        for text, why in {
            "tcp:1:backlog=x": part,
            "unix:/run/x:mode=rw": part,
            "ssl:443:privateKey=/nowhere": "/nowhere can't be read: No such file or directory",
            f"ssl:443:privateKey={not_pem}": "its key and certificate can't be used",
            "systemd:domain=INET:index=5": "systemd has handed over no such socket",
            "haproxy:systemd:domain=INET:name=x": "systemd has handed over no such socket",
        }.items():
            self.assert_dies(f"PROXY_LISTEN={text!r}: {why}; give an endpoint string", PROXY_LISTEN=f"tcp:5000 {text}")

    def test_a_port_that_is_none_and_what_is_no_address_are_told(self) -> None:
        for problem, why in (
            (OverflowError("bind(): port must be 0-65535."), "give a port from 0 to 65535"),
            (UnicodeError("label empty or too long"), "not an address"),
        ):
            self.reactor = TakenForAdmin()
            self.reactor.problem = problem
            service = self.run_with(PROXY_LISTEN="tcp:5001")
            self.assertEqual(
                f"PROXY_LISTEN='tcp:5001': can't listen there: {why}", self.dies(service.privilegedStartService)
            )

    def test_a_port_in_use_is_told(self) -> None:
        """
        When the daemon begins to listen, and in the log as well.
        """
        self.reactor = Taken()
        for environ, expected in (
            ({}, "PROXY_PORT=5000: can't listen there: Address already in use"),
            ({"PROXY_LISTEN": "tcp:80"}, "PROXY_LISTEN='tcp:80': can't listen there: Address already in use"),
        ):
            service = self.run_with(**environ)
            with capturedLogs() as events:
                line = self.dies(service.privilegedStartService)
            self.assertTrue(line.startswith(expected), line)
            self.assertIn(LogLevel.critical, [event["log_level"] for event in events])


class CredentialsTests(TapCase):
    """
    Without credentials the daemon exits; if AWS is down it runs.
    """

    def setUp(self) -> None:
        """
        Replace threads by calls.
        """
        super().setUp()
        self.at_exit: list[Callable[[], object]] = []
        self.patch(atexit, "register", lambda *args, **kwargs: self.at_exit.append(partial(*args, **kwargs)))
        self.patch(threading, "Thread", AtOnce)
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)

    def start(self, service: MultiService | None = None) -> None:
        """
        Start the daemon.
        """
        service = service or self.run_with(**os.environ)
        service.privilegedStartService()
        service.startService()
        self.addCleanup(service.stopService)

    def test_no_credentials_end_the_daemon(self) -> None:
        """
        With one line, and a non-zero status although its reactor stops cleanly.
        """
        FakeAws(self, {})
        self.start()
        lines = self.stderr.getvalue().splitlines()
        self.assertEqual(1, len(lines))
        self.assertTrue(lines[0].startswith("ecr-proxy: AWS_ACCESS_KEY_ID: no AWS credentials found"), lines)
        self.assertEqual(1, self.reactor.stopped)
        self.assertEqual([1], self.exit())

    def put_content(self) -> None:
        """
        Put content into the cache as an earlier daemon.
        """
        file = self.folder / "cache" / "content" / "sha256" / "ab" / ("ab" * 32)
        file.parent.mkdir(parents=True)
        file.write_bytes(b"content")

    def test_refused_credentials_do_not_end_a_daemon_that_has_content(self) -> None:
        """
        It serves, reports what works and what is wrong, and retries.
        """
        self.put_content()
        aws = FakeAws(self, KEYS)
        aws.refuses("UnrecognizedClientException", "The security token is invalid")
        self.start()
        self.assertEqual(("", 0), (self.stderr.getvalue(), self.reactor.stopped))
        reply = answer(self.reactor, b"/readyz")
        self.assertIn(b"200 OK", reply)
        said = json.loads(reply.partition(b"\r\n\r\n")[2])
        self.assertEqual((True, False), (said["can_serve"], said["can_fetch"]))
        self.assertIn("The security token is invalid", said["reasons"][0])
        aws.grants()
        self.reactor.pump([1.0] * 5)
        said = json.loads(answer(self.reactor, b"/readyz").partition(b"\r\n\r\n")[2])
        self.assertEqual((True, []), (said["can_fetch"], said["reasons"]))

    def test_what_is_said_of_an_end_announces_no_next_try(self) -> None:
        FakeAws(self, {})
        with capturedLogs() as events:
            self.start()
        self.assertEqual([], [each for each in events if "Next try" in str(formatEvent(each))])

    def exit(self) -> list[int]:
        """
        Exit, and return the status if it is not twistd's.
        """
        statuses: list[int] = []
        self.patch(os, "_exit", statuses.append)
        while self.at_exit and not statuses:
            self.at_exit.pop()()
        return statuses

    def test_a_worker_that_is_refused_ends_the_daemon_once(self) -> None:
        """
        With the line of its parent, whatever the other workers report.
        """
        self.reactor = Spawning()
        service = self.run_with(**os.environ, PROXY_WORKER_PROCESSES="2")
        service.privilegedStartService()
        (workers,) = (each for each in service if isinstance(each, Workers))
        workers.startService()
        self.addCleanup(workers.stopService)
        for channel in self.reactor.channels:
            channel.heard(Refused("AWS refuses these credentials"))
        self.assertEqual("ecr-proxy: AWS refuses these credentials\n", self.stderr.getvalue())
        self.assertEqual((1, [1]), (self.reactor.stopped, self.exit()))

    def test_credentials_that_aws_refuses_end_the_daemon(self) -> None:
        """
        With the first line of AWS's own words, however many there were.
        """
        aws = FakeAws(self, KEYS)
        aws.refuses("UnrecognizedClientException", "The security token is invalid\nand more")
        self.start()
        self.assertIn("The security token is invalid\n", self.stderr.getvalue())
        self.assertEqual(1, self.stderr.getvalue().count("\n"))
        self.assertEqual(1, self.reactor.stopped)

    def test_ready_means_that_signals_are_heeded(self) -> None:
        """
        A service manager may have the daemon reload its certificates, or stop, as soon as it is ready.
        """
        heeded: set[int] = set()
        told: list[set[int]] = []
        self.patch(signal, "signal", lambda number, _: heeded.add(number))
        self.patch(Supervisor, "tell", lambda *_: told.append(set(heeded)))
        self.environ["NOTIFY_SOCKET"] = "/nowhere/notify"
        aws = FakeAws(self, KEYS)
        aws.grants()
        self.start()
        for hook, args, kwargs in self.reactor.whenRunningHooks:
            hook(*args, **kwargs)
        self.assertEqual({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}, told[0])

    def test_aws_being_down_does_not_end_the_daemon(self) -> None:
        """
        It serves, reports that it is not ready and why, and retries until it is.
        """
        aws = FakeAws(self, KEYS)
        self.start()
        self.assertEqual(("", 0), (self.stderr.getvalue(), self.reactor.stopped))
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz"))
        self.assertIn(b"503 Service", not_ready := answer(self.reactor, b"/readyz"))
        self.assertIn(b"no token: ", not_ready)
        aws.grants()
        self.reactor.pump([1.0] * 5)
        self.assertIn(b"200 OK", answer(self.reactor, b"/readyz"))

    def test_what_ended_is_garbage_whatever_tokens_come(self) -> None:
        """
        A token keeps nothing in memory that was there when it arrived; what the first one needed is not kept.
        """
        self.addCleanup(gc.enable)
        self.addCleanup(gc.unfreeze)
        gc.disable()
        set_aside_what_stays.cache_clear()
        aws = FakeAws(self, KEYS)
        aws.grants()
        service = self.run_with(**os.environ)
        ended = weakref.ref(Knot())
        self.start(service)
        self.assertIsNone(ended())
        knot = Knot()
        ended = weakref.ref(knot)
        self.reactor.pump([30.0] * 3)
        self.assertEqual(2, len(aws.asked))
        del knot
        gc.collect()
        self.assertIsNone(ended())

    def test_a_daemon_that_ends_is_not_ready(self) -> None:
        """
        Clients that are still connected can read that.
        """
        FakeAws(self, KEYS).grants()
        service = self.run_with(**os.environ)
        service.privilegedStartService()
        service.startService()
        factory: Any = self.reactor.tcpServers[0][1]
        factory.buildProtocol(ADDRESS).makeConnection(Tcp())
        ending = service.stopService()
        not_ready = answer(self.reactor, b"/readyz")
        self.assertIn(b"503 Service", not_ready)
        self.assertIn(b"draining", not_ready)
        self.assertNoResult(ending)

    def test_a_cache_that_cannot_be_written_any_more_is_not_ready(self) -> None:
        """
        With the reason, for orchestrators.
        """
        aws = FakeAws(self, KEYS)
        aws.grants()
        self.start()
        self.assertIn(b"200 OK", answer(self.reactor, b"/readyz"))
        arriving = self.folder / "cache" / "arriving"
        arriving.rmdir()
        self.reactor.advance(FRESH_SECONDS)
        self.assertIn(b"200 OK", answer(self.reactor, b"/readyz"))  # it is made again
        arriving.rmdir()
        arriving.touch()
        self.reactor.advance(FRESH_SECONDS)
        not_ready = answer(self.reactor, b"/readyz")
        self.assertIn(b"503 Service", not_ready)
        self.assertIn(b"the cache directory can't be written: Not a directory", not_ready)

    def test_as_many_files_may_be_open_as_the_system_allows(self) -> None:
        """
        The limits of a shell are meant for programs, not for servers.
        """
        _, most = before = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, most), most))
        open_many_files()
        self.assertEqual((most, most), resource.getrlimit(resource.RLIMIT_NOFILE))


def answer(reactor: Reactor, path: bytes, number: int = 0) -> bytes:
    """
    Send a request to the listener, and return its whole answer.
    """
    factory: Any = reactor.tcpServers[number][1]
    protocol, transport = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 40000)), Tcp()
    protocol.makeConnection(transport)
    protocol.dataReceived(b"GET " + path + b" HTTP/1.1\r\nHost: cache.test\r\n\r\n")
    reactor.advance(0)
    return bytes(transport.value())


class Counting(ReactorBase):
    """
    The timers of a real reactor.
    """

    def installWaker(self) -> None:
        """
        Do nothing: there are no threads.
        """


class Pool:
    """
    A pool of threads, without threads.
    """

    def callInThreadWithCallback(
        self, done: Callable[[bool, Any], object], call: Callable[..., Any], *args: Any
    ) -> None:
        """
        Call.
        """
        try:
            outcome = True, call(*args)
        except Exception:  # noqa: BLE001 (as threads do)
            outcome = False, Failure()
        done(*outcome)


class LookupTests(SynchronousTestCase):
    """
    The host's resolver answers, whatever happens to a query.
    """

    def setUp(self) -> None:
        """
        Create a reactor that resolves names synchronously.
        """
        pool = Pool()
        self.reactor: Any = Counting()
        self.patch(self.reactor, "getThreadPool", lambda: pool)
        end_each_lookup(self.reactor)
        self.reactor.installNameResolver(SharedLookups(self.reactor.nameResolver, self.reactor))

    def found(self, name: str) -> list[IAddress]:
        """
        Resolve a name.
        """
        receiver = Receiver()
        self.reactor.nameResolver.resolveHostName(receiver, name, 443)
        self.reactor.runUntilCurrent()
        self.assertEqual(1, receiver.completed)
        return receiver.found

    def test_one_that_fails_ends_and_the_next_is_asked(self) -> None:
        """
        Without a descriptor, or memory, getaddrinfo(3) fails otherwise than for an unknown name.
        """
        self.assertEqual([], self.found("no..name"))
        problems: list[Exception] = [OSError(errno.EMFILE, "Too many open files"), MemoryError()]

        def getaddrinfo(*question: Any) -> Any:
            if problems:
                raise problems.pop(0)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.9", question[1]))]

        self.patch(socket, "getaddrinfo", getaddrinfo)
        answers = [self.found("registry.test") for _ in range(3)]
        self.assertEqual([[], [], [IPv4Address("TCP", "192.0.2.9", 443)]], answers)


class ClockTests(TapCase):
    """
    The machine's wall clock may be set.
    """

    def test_a_reactors_timers_go_by_a_clock_that_nobody_sets(self) -> None:
        """
        Each timer is made, moved and found due by monotonic seconds.
        """
        reactor = Counting()
        seconds = [100.0]
        self.patch(time, "monotonic", lambda: seconds[0])
        count_steadily(reactor)
        fired: list[str] = []
        timer = reactor.callLater(5, fired.append, "moved")
        reactor.callLater(10, fired.append, "second")
        timer.reset(7)

        def turn(at: float) -> list[str]:
            while seconds[0] < at:  # a running reactor has something to do each second
                seconds[0] = min(at, seconds[0] + 1)
                reactor.runUntilCurrent()
            return fired

        self.assertEqual([], turn(106.9))
        self.assertEqual(["moved", "second"], turn(110))

    def test_memory_is_given_back_in_a_thread_again_and_again(self) -> None:
        reactor: Any = Counting()
        seconds, called = [100.0], list[Callable[[], None]]()
        self.patch(time, "monotonic", lambda: seconds[0])
        self.patch(reactor, "callInThread", called.append)
        count_steadily(reactor)
        give_memory_back_now_and_then(reactor)
        for _ in range(int(3 * GIVEN_BACK_SECONDS) + 1):
            seconds[0] += 1
            reactor.runUntilCurrent()
        self.assertEqual([give_memory_back] * 3, called)

    def test_a_reactor_that_has_nothing_to_do_does_not_stand_still(self) -> None:
        """
        A timer that is the only one is due in time.
        """
        reactor = Counting()
        seconds = [100.0]
        self.patch(time, "monotonic", lambda: seconds[0])
        count_steadily(reactor)
        fired: list[float] = []
        reactor.callLater(60, lambda: fired.append(seconds[0]))
        while not fired:
            seconds[0] += reactor.timeout() or 0
            reactor.runUntilCurrent()
        self.assertEqual([160.0], fired)

    def test_a_standstill_counts_for_no_timer(self) -> None:
        """
        A process that was stopped for an hour has been silent itself: no other side is cut off for it.
        """
        reactor = Counting()
        seconds = [100.0]
        self.patch(time, "monotonic", lambda: seconds[0])
        count_steadily(reactor)
        fired: list[str] = []

        def turn(at: float) -> list[str]:
            seconds[0] = at
            reactor.runUntilCurrent()
            return fired

        reactor.callLater(5, fired.append, "silence")
        self.assertEqual([], turn(101))
        self.assertEqual([], turn(3701))
        self.assertEqual([], turn(3702.9))
        self.assertEqual(["silence"], turn(3703))

    def test_a_standstill_while_two_threads_ask_for_the_time_sets_nothing_back(self) -> None:
        """
        One of them has read the machine's clock before it, the other afterwards.
        """
        seconds, others = [100.0], list[Callable[[], object]]()

        def look() -> float:
            now = seconds[0]
            while others:
                others.pop()()
            return now

        self.patch(time, "monotonic", look)
        running = Running()
        seconds[0] += 1
        before = running()

        def stand_still() -> None:
            seconds[0] += 60
            running()

        others.append(stand_still)
        self.assertEqual(before, running())
        self.assertEqual(before + 2, running())

    def test_timers_of_a_reactor_whose_turns_are_slow_fire_all_the_same(self) -> None:
        """
        Of each turn some of the time counts, however late it comes.
        """
        reactor = Counting()
        seconds = [100.0]
        self.patch(time, "monotonic", lambda: seconds[0])
        count_steadily(reactor)
        fired: list[str] = []
        reactor.callLater(5, fired.append, "at last")
        for _ in range(3):
            seconds[0] += 10
            reactor.runUntilCurrent()
        self.assertEqual(["at last"], fired)

    def test_a_real_reactor_is_told_before_it_has_timers(self) -> None:
        """
        The daemon's reactor, and a worker's, count so from the start.
        """
        reactor: Any = Counting()
        self.reactor = reactor
        self.assertRaises(SystemExit, self.run_with, PROXY_ECR_ENDPOINT="nothing")
        self.assertIsInstance(reactor.seconds, Running)
        self.assertEqual(1, reactor.getThreadPool().min, "names have a thread, whatever the machine gives")


class WorkersTests(TapCase):
    """
    The parent of workers, and a worker.
    """

    def setUp(self) -> None:
        super().setUp()
        self.spawning = self.reactor = Spawning()
        self.environ["PROXY_WORKER_PROCESSES"] = "2"

    def start(self, **environ: str) -> MultiService:
        """
        Have the parent listen, and start its workers.
        """
        service = self.run_with("--log-level=warn", **environ)
        service.privilegedStartService()
        (workers,) = (each for each in service if isinstance(each, Workers))
        workers.startService()
        self.addCleanup(workers.stopService)
        return service

    def test_the_status_page_goes_on_where_it_was_before_the_start(self) -> None:
        history = History()
        history.note(Sample(3))
        (self.folder / "cache").mkdir()
        for processes in ("1", "2"):
            write(self.folder / "cache", told(history, time.time()))
            service = self.run_with(PROXY_WORKER_PROCESSES=processes)
            (kept,) = (each for each in service if isinstance(each, KeptHistory))
            self.assertEqual(3, merged(kept._history.points()).asked, processes)  # noqa: SLF001

    def test_the_parent_binds_and_accepts_nothing_but_the_operator(self) -> None:
        """
        It has no token, no cache in memory and nothing that would ask ECR.
        """
        del self.environ["PROXY_ADMIN_LISTEN"]
        service = self.start()
        self.assertEqual([False, True], [port.reads for port in self.spawning.ports])
        self.assertIn(b"ecr_proxy_build_info", answer(self.reactor, b"/metrics", 1))
        kinds = {type(each) for each in service}
        self.assertEqual(set(), kinds & {AwsTokens, Janitor, Scrub})

    def test_workers_are_started_with_its_flags_and_sockets(self) -> None:
        self.start()
        self.assertEqual(2, len(self.spawning.spawned))
        for process in self.spawning.spawned:
            self.assertEqual(["ecr-proxy", "--log-level=warn"], process["arguments"][-2:])
            self.assertEqual(70, process["childFDs"][SOCKETS_FD])
            self.assertEqual("1", process["environ"][VARIABLE])

    def test_workers_are_started_with_what_the_configuration_file_says(self) -> None:
        """
        As flags, except what a variable says, and what a reload may change; and without the file, which may have
        changed by then.
        """
        file = self.folder / "settings.toml"
        file.write_text('tag-ttl = 7\ncache-limit = "2g"\nworker-processes = 3\nnamespace-pattern = "team/.*"\n')
        self.start(PROXY_CONFIG=str(file))
        for process in self.spawning.spawned:
            self.assertEqual(["ecr-proxy", "--log-level=warn", "--tag-ttl=7"], process["arguments"][-3:])
            self.assertEqual("", process["environ"]["PROXY_CONFIG"])
            self.assertIn("team/.*", process["environ"]["ECRPROXY_REGISTRIES"])

    def test_what_would_keep_workers_from_starting_is_told_once(self) -> None:
        """
        By the parent, which starts none.
        """
        blocked, files = self.folder / "file", Files(self.folder / "tls")
        blocked.write_text("no directory")
        for environ in (
            {"PROXY_CACHE_DIR": str(blocked)},
            {"PROXY_HTPASSWD": "/nowhere"},
            {"PROXY_SSL_KEY": "/nowhere", "PROXY_SSL_CERTIFICATE": files.certificate},
        ):
            self.dies(partial(self.run_with, **environ))
            self.assertEqual([], self.spawning.spawned)

    def test_a_process_that_has_no_parent_is_no_worker(self) -> None:
        with Path(os.devnull).open("rb") as no_socket:
            self.patch(process_wiring, "CHANNEL_FD", no_socket.fileno())
            said = self.dies(lambda: self.run_with(**{VARIABLE: "0", "PROXY_LISTEN": "unix:/nowhere"}))
        self.assertIn("ECRPROXY_WORKER is for the daemon's own workers", said)

    def test_workers_are_told_of_certificates_that_were_found_good(self) -> None:
        """
        And of none if their parent found nothing usable; passwords are reloaded in any case.
        """
        files, others = Files(self.folder / "tls"), Files(self.folder / "others")
        told: list[str] = []
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)
        service = self.start(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate)
        listening = [each for each in service if isinstance(each, Listening)]
        (workers,) = (each for each in service if isinstance(each, Workers))
        self.patch(workers, "tell", lambda message: told.append(message.certificates))
        hang_up(service)
        loaded = [each.load() for each in listening]
        self.assertEqual(["", generation(each.seen for each in loaded if each)], told)
        told.clear()
        (others.folder / "key.pem").rename(files.folder / "key.pem")
        hang_up(service)
        self.assertEqual([""], told)

    def test_workers_read_passwords_again_while_certificates_hang(self) -> None:
        Held(self)
        service = self.start()
        (workers,) = (each for each in service if isinstance(each, Workers))
        told: list[Any] = []
        self.patch(workers, "tell", told.append)
        hang_up(service)
        self.assertEqual([Reread("")], told)

    def test_a_worker_reads_those_that_its_parent_has_found_good(self) -> None:
        """
        Replacements since then are not read: the parent checks them first.
        """
        files, others = Files(self.folder / "tls"), Files(self.folder / "others")
        service = self.start(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate)
        listening = [each for each in service if isinstance(each, Listening)]
        loaded = [each.load() for each in listening]
        found = generation(each.seen for each in loaded if each)
        self.assertEqual(len(loaded), len(reload_wiring.load_as_told(listening, found) or ()))
        for name in ("key.pem", "certificate.pem"):
            (others.folder / name).rename(files.folder / name)
        self.assertIsNone(reload_wiring.load_as_told(listening, found))

    def test_a_worker_reads_passwords_while_certificates_hang(self) -> None:
        held, read = Hands(), list[str]()
        held.idle = False
        certificates = FileReader("Certificates", read.append, read.append, held, self.reactor)
        admission: Any = type("Admission", (), {"reread": lambda _: read.append("passwords")})()
        reload_wiring.reread_as_told(certificates, admission, "a" * 64)
        reload_wiring.reread_as_told(certificates, admission, "")
        self.assertEqual((["passwords"], [("a" * 64,)]), (read, [args for _, _, args in held.waiting]))


class HangUpTests(TapCase):
    """
    SIGHUP, delivered to all parts.
    """

    ONE, TWO = "111122223333.dkr.ecr.eu-west-1.amazonaws.com", "444455556666.dkr.ecr.us-east-1.amazonaws.com"
    THERE = f"/v2/team/app/manifests/latest?ns={TWO}".encode()

    def setUp(self) -> None:
        super().setUp()
        del self.environ["PROXY_ECR_ENDPOINT"]
        self.file = self.folder / "settings.toml"
        self.environ["PROXY_CONFIG"] = str(self.file)
        self.patch(atexit, "register", lambda *_, **__: None)
        self.patch(threading, "Thread", AtOnce)
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)
        self.write()

    def write(self, text: str = "") -> None:
        """
        Write the file, with a default registry.
        """
        self.file.write_text(f'[registry."{self.ONE}"]\ndefault = true\n{text}')

    def test_registries_appear_and_disappear_with_what_keeps_their_tokens(self) -> None:
        """
        The default's stays as it is. Without the signal nothing is read.
        """
        FakeAws(self, KEYS)
        service = self.run_with(**os.environ, PROXY_ADMIN_LISTEN="tcp:5001:interface=127.0.0.1")
        (tokens,) = (each for each in service if isinstance(each, AwsTokens))
        (first,) = tokens.services
        service.privilegedStartService()
        tokens.startService()
        self.write(f'[registry."{self.TWO}"]\n')
        self.assertIn(b"404 Not Found", answer(self.reactor, self.THERE))
        hang_up(service)
        self.assertEqual(b"", answer(self.reactor, self.THERE), "this one waits for the token")
        self.assertEqual([True, True], [each.running for each in tokens.services])
        (second,) = set(tokens.services) - {first}
        self.assertIn(self.TWO.encode(), answer(self.reactor, b"/metrics", 1))
        self.write()
        hang_up(service)
        self.assertIn(b"404 Not Found", answer(self.reactor, self.THERE))
        self.assertEqual(([first], False), (tokens.services, second.running))
        self.assertNotIn(self.TWO.encode(), answer(self.reactor, b"/metrics", 1))
        self.addCleanup(tokens.stopService)

    def test_a_replica_has_a_token_of_its_own_region(self) -> None:
        """
        With the registry's credentials, and it is no registry that clients could name.
        """
        service = self.run_with(PROXY_ADMIN_LISTEN="tcp:5001:interface=127.0.0.1")
        (tokens,) = (each for each in service if isinstance(each, AwsTokens))
        self.write(f'[registry."{self.TWO}"]\nreplicas = ["{self.TWO.replace("us-east-1", "eu-north-1")}"]\n')
        hang_up(service)
        regions = [region for _, region in tokens._kept]  # noqa: SLF001
        self.assertEqual(["eu-west-1", "us-east-1", "eu-north-1"], regions)
        service.privilegedStartService()
        there = self.THERE.replace(b"us-east-1", b"eu-north-1")
        self.assertIn(b"404 Not Found", answer(self.reactor, there))

    def test_one_token_opens_all_registries_of_its_credentials_and_region(self) -> None:
        """
        However many accounts they are of. Another region, and another role, has another.
        """
        service = self.run_with(PROXY_ADMIN_LISTEN="tcp:5001:interface=127.0.0.1")
        (tokens,) = (each for each in service if isinstance(each, AwsTokens))
        role = "arn:aws:iam::444455556666:role/pull"
        self.write(
            "".join(
                f'[registry."{account}.dkr.ecr.us-east-1.amazonaws.com"]\n' for account in range(10**11, 10**11 + 50)
            )
            + f'[registry."{self.TWO}"]\nrole = "{role}"\n[registry."quay.io"]\n[registry."public.ecr.aws"]\n'
        )
        hang_up(service)
        kept = [(credentials.role, region) for credentials, region in tokens._kept]  # noqa: SLF001
        self.assertEqual([(None, "eu-west-1"), (None, "us-east-1"), (role, "us-east-1")], kept)

    def test_the_status_page_names_the_new_default(self) -> None:
        service = self.run_with(PROXY_ADMIN_LISTEN="tcp:5001:interface=127.0.0.1", PROXY_ADMIN_HOSTS="cache.test")
        service.privilegedStartService()
        self.file.write_text(f'[registry."{self.TWO}"]\ndefault = true\n')
        hang_up(service)
        self.assertIn(f'"registry": "https://{self.TWO}"'.encode(), answer(self.reactor, b"/status.json", 1))

    def test_a_file_that_the_daemon_would_not_start_with_changes_nothing(self) -> None:
        service = self.run_with()
        service.privilegedStartService()
        for wrong in ("region = 1", f'[registry."{self.TWO}"]\ndefault = true', f'[registry."{self.TWO}"]\nhost = "a"'):
            self.write(wrong)
            hang_up(service)
            self.assertIn(b"404 Not Found", answer(self.reactor, self.THERE))
        self.file.write_text(
            f'admin-listen = "tcp:5001"\n[registry."{self.ONE}"]\ndefault = true\n[registry."{self.TWO}"]'
        )
        os.environ["PROXY_ADMIN_LISTEN"] = ""
        hang_up(service)
        self.assertIn(b"404 Not Found", answer(self.reactor, self.THERE))
        self.file.unlink()
        hang_up(service)
        self.assertIn(b"404 Not Found", answer(self.reactor, self.THERE))

    def test_files_that_hang_stop_nothing(self) -> None:
        """
        The configuration file waits for no certificate, nor the service manager for long. What was requested while it
        hung is read again.
        """
        told: list[Any] = []
        self.patch(Supervisor, "tell", lambda _, message: told.append(message[0]))
        files, held = Files(self.folder / "tls"), Held(self)
        tls = {
            "PROXY_SSL_KEY": files.key,
            "PROXY_SSL_CERTIFICATE": files.certificate,
            "PROXY_ADMIN_LISTEN": "tcp:1:interface=127.0.0.1",
        }
        service = self.run_with(NOTIFY_SOCKET="/nowhere/notify", **tls)
        service.privilegedStartService()
        (supervised,) = (each for each in service if isinstance(each, Supervised))
        supervised.startService()
        self.addCleanup(supervised.stopService)
        self.reactor.run()
        told.clear()
        held.calls.clear()
        self.write(f'[registry."{self.TWO}"]\n')
        for _ in range(3):
            hang_up(service)
        configuring, reading = (each[0] for each in held.calls)
        self.assertIsNot(configuring, reading)
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz", 1))
        held.release(configuring)
        self.write()
        held.release(configuring)
        self.assertEqual([reading], [each[0] for each in held.calls])
        self.assertEqual({"RELOADING=1"}, set(told))
        with capturedLogs() as events:
            self.reactor.advance(READ_SECONDS)
        self.assertEqual("READY=1", told[-1])
        (event,) = (each for each in events if each["log_level"] is LogLevel.error)
        self.assertIn("Key and certificate: not read within 10 s", formatEvent(event) or "")
        with capturedLogs() as events:
            held.release(reading)
            held.release(reading)
        self.assertEqual([], held.calls)
        said = [each for each in events if "were read again" in (formatEvent(each) or "")]
        self.assertEqual(2, len(said))

    def test_what_is_no_file_changes_nothing(self) -> None:
        service = self.run_with()
        service.privilegedStartService()
        self.file.unlink()
        os.mkfifo(self.file)
        with capturedLogs() as events:
            hang_up(service)
        (said,) = (formatEvent(each) or "" for each in events if each["log_level"] is LogLevel.error)
        self.assertEqual(
            f"Not reloaded: PROXY_CONFIG='{self.file}': can't be read: it is a FIFO, not a regular file;"
            " give a TOML file",
            said,
        )

    def test_the_disk_of_the_cache_is_not_looked_at(self) -> None:
        """
        It may hang, and nothing depends on it.
        """
        service = self.run_with()
        self.patch(shutil, "disk_usage", self.fail)
        service.privilegedStartService()
        with capturedLogs() as events:
            hang_up(service)
        self.assertIn(f"Reloaded {self.file}: no registry changed", list(map(formatEvent, events)))

    def test_workers_are_told_those_that_run_and_those_that_start_later(self) -> None:
        self.reactor = spawning = Spawning()
        service = self.run_with(PROXY_WORKER_PROCESSES="2")
        service.privilegedStartService()
        (workers,) = (each for each in service if isinstance(each, Workers))
        workers.startService()
        self.addCleanup(workers.stopService)
        told: list[Any] = []
        self.patch(workers, "tell", told.append)
        self.write(f'[registry."{self.TWO}"]\n')
        hang_up(service)
        (reload,) = (each for each in told if isinstance(each, Reload))
        text = "".join(reload.registries)
        self.assertEqual(text, workers.variables["ECRPROXY_REGISTRIES"])
        self.assertIn(self.TWO, text)
        self.assertNotIn(self.TWO, spawning.spawned[0]["environ"]["ECRPROXY_REGISTRIES"])

    def test_a_worker_uses_those_that_it_is_told(self) -> None:
        """
        It reads no file.
        """
        self.reactor = spawning = Spawning()
        end, other = socket.socketpair()
        self.addCleanup(other.close)
        self.patch(process_wiring, "CHANNEL_FD", end.detach())
        began = for_worker(parse_file("x.toml", self.file.read_bytes()))
        service = self.run_with("--worker-processes=2", **{VARIABLE: "0", **began})
        (tokens,) = (each for each in service if isinstance(each, AwsTokens))
        self.assertEqual(1, len(tokens.services))
        self.write(f'[registry."{self.TWO}"]\n')
        spawning.channels[0].heard(Reload.of(about_registries(parse_file("x.toml", self.file.read_bytes()))))
        self.assertEqual(2, len(tokens.services))


class BuildTests(TapCase):
    """
    The parts match the settings.
    """

    def build(self, **environ: str) -> MultiService:
        """
        Build the daemon, and let it listen.
        """
        config = Config.load({}, {**self.environ, **environ})
        service = build(config, self.reactor, self.refused)
        service.privilegedStartService()
        return service

    def refused(self, problem: CredentialsError) -> None:
        """
        Fail: no refusal is expected.
        """
        raise AssertionError(problem)

    def test_it_listens_on_its_port_and_answers(self) -> None:
        """
        On all addresses of the machine, with a backlog for a burst of pulls.
        """
        self.build()
        ((port, _, backlog, interface),) = self.reactor.tcpServers
        self.assertEqual(5000, port)
        self.assertIn(interface, ("::", "0.0.0.0"))
        self.assertGreaterEqual(backlog, 1000)
        self.assertIn(b"200 OK", answer(self.reactor, b"/v2/"))
        self.assertIn(b"404 Not Found", answer(self.reactor, b"/elsewhere"))

    def test_namespaces_are_kept_to(self) -> None:
        """
        The pattern reaches the registry: excluded repositories are denied without any request.
        """
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)
        self.build(PROXY_NAMESPACE_PATTERN="image1|image3")
        self.assertIn(b"403 Forbidden", answer(self.reactor, b"/v2/image2/manifests/latest"))
        self.assertEqual(b"", answer(self.reactor, b"/v2/image3/tags/list"), "this one waits for the token")

    def test_tls_is_spoken_where_there_is_a_key(self) -> None:
        """
        On the configured port, with the certificate of the file, and never over HTTP/2.
        """
        files = Files(self.folder / "tls")
        self.build(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate, PROXY_PORT="5443")
        server: Any
        (server,) = self.reactor.tcpServers
        port, factory, _, _ = server
        self.assertEqual(5443, port)
        protocol, transport = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 40000)), Tcp()
        asker = client(trusted=files.root, offer=(b"h2", b"http/1.1"))
        shake_with(protocol, transport, asker)
        self.assertNotEqual(b"h2", asker.get_alpn_proto_negotiated())
        self.assertEqual("CN=cache.test", subject_of(asker))

    def test_a_renewed_certificate_is_served_within_a_minute(self) -> None:
        files, others = Files(self.folder / "tls"), Files(self.folder / "others")
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)
        service = self.build(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate)
        _, renewal = (each for each in service if isinstance(each, Renewal))
        renewal.startService()
        self.addCleanup(renewal.stopService)
        for name in ("key.pem", "certificate.pem"):
            (others.folder / name).rename(files.folder / name)
        self.reactor.advance(LOOK_SECONDS)
        server: Any
        (server,) = self.reactor.tcpServers
        protocol, transport = server[1].buildProtocol(IPv4Address("TCP", "192.0.2.1", 40000)), Tcp()
        asker = client(trusted=others.root)
        shake_with(protocol, transport, asker)
        self.assertEqual("CN=cache.test", subject_of(asker))

    def test_a_pattern_is_matched_while_the_disk_of_certificates_hangs(self) -> None:
        pools = list[ThreadPool]()
        self.patch(ThreadPool, "callInThreadWithCallback", lambda pool, *_: pools.append(pool))
        service = self.build(PROXY_NAMESPACE_PATTERN="(x|xx)+y")
        _, renewal = (each for each in service if isinstance(each, Renewal))
        renewal.startService()
        self.addCleanup(renewal.stopService)
        self.reactor.advance(LOOK_SECONDS)
        (looking,) = pools
        self.assertEqual(b"", answer(self.reactor, b"/v2/" + b"x" * 200 + b"/manifests/latest"))
        self.assertEqual(2, len(pools))
        self.assertIsNot(looking, pools[1])

    def test_clients_are_asked_for_what_is_set(self) -> None:
        """
        A password, a network, a certificate: each setting reaches the registry, and leaves health alone.
        """
        path, files = self.folder / "htpasswd", Files(self.folder / "tls")
        path.write_bytes(line("ann", "client canary"))
        self.build(PROXY_HTPASSWD=str(path), PROXY_LISTEN="tcp:80")
        self.assertIn(b"401 Unauthorized", answer(self.reactor, b"/v2/"))
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz"))
        self.reactor = Reactor()
        self.build(PROXY_ALLOW_FROM="10.0.0.0/8")
        self.assertIn(b"403 Forbidden", answer(self.reactor, b"/v2/"))
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz"))
        self.reactor = Reactor()
        install(self, self.reactor)  # where Twisted's TLS batches writes
        chain = b"".join(each.public_bytes(Encoding.PEM) for each in (files.root, files.middle))
        authorities = files.write("ca.pem", chain)
        self.build(PROXY_SSL_KEY=files.key, PROXY_SSL_CERTIFICATE=files.certificate, PROXY_CLIENT_CA=authorities)
        asked = self.secure_answer(client(), b"/v2/")
        self.assertIn(b"403 Forbidden", asked)
        self.assertIn(b"client certificate", asked)
        self.assertIn(b"200 OK", self.secure_answer(client(), b"/healthz"))
        self.assertIn(b"200 OK", self.secure_answer(client(shows=(files.private, files.leaf)), b"/v2/"))

    def secure_answer(self, asker: SSL.Connection, path: bytes) -> bytes:
        """
        Send a request over TLS.
        """
        server: Any = self.reactor.tcpServers[0]
        protocol, transport = server[1].buildProtocol(IPv4Address("TCP", "192.0.2.1", 40000)), Tcp()
        shake_with(protocol, transport, asker)
        asker.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        protocol.dataReceived(asker.bio_read(65536))
        self.reactor.advance(1)
        asker.bio_write(transport.value())
        return asker.recv(65536)

    def test_endpoints_of_ones_own_replace_the_port(self) -> None:
        """
        All of them are listened on, and the port is not.
        """
        path = str(self.folder / "socket")
        self.build(PROXY_LISTEN=f"tcp:81 tcp:82:interface=127.0.0.1 unix:{path}", PROXY_PORT="5001")
        self.assertEqual(
            [(81, ""), (82, "127.0.0.1")], [(port, interface) for port, _, _, interface in self.reactor.tcpServers]
        )
        self.assertEqual([path], [server[0] for server in self.reactor.unixServers])
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz", 1))

    def test_variables_of_another_proxy_are_noticed(self) -> None:
        """
        In the log, or in a line before the one with which the daemon exits for lack of their values.
        """
        with capturedLogs() as events:
            self.run_with(CACHE_KEY="$uri")
        self.assertIn("PROXY_CACHE_KEY", " ".join(filter(None, map(formatEvent, events))))
        del self.environ["PROXY_ECR_ENDPOINT"]
        warned, _ = self.last_lines(lambda: self.run_with(UPSTREAM="https://ecr.example"))
        self.assertIn("UPSTREAM is set", warned)

    def test_what_is_warned_of_is_logged_and_the_daemon_starts(self) -> None:
        with capturedLogs() as events:
            self.run_with(PROXY_LISTEN="tcp:80", PROXY_PORT="81", PROXY_NAMESPACE_PATTERN="team/*", PROXY_DEBUG="1")
        said = "\n".join(filter(None, map(formatEvent, events)))
        for words in ("PROXY_PORT is not used", "looks like a glob", "PROXY_DEBUG is not a setting"):
            self.assertEqual(1, said.count(words), said)

    def test_the_operators_port_is_of_this_machine_alone(self) -> None:
        """
        Metrics are not public, unless the operator says so.
        """
        self.patch(ThreadPool, "callInThreadWithCallback", call_at_once)
        self.environ.pop("PROXY_ADMIN_LISTEN")
        self.build(PROXY_LISTEN="tcp:80")
        self.assertEqual((5001, "127.0.0.1"), (self.reactor.tcpServers[1][0], self.reactor.tcpServers[1][3]))
        self.assertIn(b"ecr_proxy_build_info", answer(self.reactor, b"/metrics", 1))

    def test_a_taken_port_is_no_hindrance_where_nobody_chose_it(self) -> None:
        """
        The daemon serves its clients, and reports the missing port; if the operator chose the port, it does not start.
        """
        self.environ.pop("PROXY_ADMIN_LISTEN")
        self.reactor = TakenForAdmin()
        with capturedLogs() as events:
            self.build(PROXY_LISTEN="tcp:80")
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz"))
        self.assertIn("PROXY_ADMIN_LISTEN='tcp:5001", " ".join(filter(None, map(formatEvent, events))))
        self.reactor = TakenForAdmin()
        self.reactor.problem = OSError(98, "Address already in use")
        self.build(PROXY_LISTEN="tcp:80")
        self.assertIn(b"200 OK", answer(self.reactor, b"/healthz"))
        said = self.dies(lambda: self.build(PROXY_LISTEN="tcp:80", PROXY_ADMIN_LISTEN="tcp:5001:interface=localhost"))
        self.assertIn("PROXY_ADMIN_LISTEN='tcp:5001", said)

    def test_the_chosen_name_servers_are_installed(self) -> None:
        """
        And are not if the host's own resolver is chosen.
        """
        for resolver, chosen in (("system", False), ("192.0.2.1", True)):
            system: Any = System()
            self.reactor.nameResolver = system
            self.build(PROXY_DNS_RESOLVER=resolver)
            names, receiver = self.reactor.nameResolver, Receiver()
            self.assertIsInstance(names, SharedLookups)
            with capturedLogs() as events:  # in memory there is no UDP: the servers fail at once
                names.resolveHostName(receiver, "registry.example", 443)
            self.assertEqual(chosen, "PROXY_DNS_RESOLVER does not answer" in str([*map(formatEvent, events)]))
            self.assertEqual([IPv4Address("TCP", "10.0.0.1", 443)], receiver.found)


class LeaveTests(SynchronousTestCase):
    def test_a_second_signal_ends_the_process_whatever_becomes_of_its_log(self) -> None:
        class Broken:
            def end(self, seconds: float) -> None:
                raise ValueError("I/O operation on closed file")

        statuses: list[int] = []
        self.patch(os, "_exit", statuses.append)
        service = Daemon(MemoryReactorClock())
        service.writer = Broken()  # type: ignore[assignment]
        self.assertRaises(ValueError, service.leave, 15)
        self.assertEqual([128 + 15], statuses)
