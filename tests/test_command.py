"""
The console script's frame: arguments, output and exit status.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from http.client import RemoteDisconnected

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.asking import DaemonResponse, place_of
from ecrproxy.command.subcommand import ASKS, CommandError, Invocation, Subcommand
from ecrproxy.command.terminal import Progress, Terminal, age_in_words, counted, size_in_words, table
from ecrproxy.endpoint_string import parse_endpoint_string
from ecrproxy.healthcheck import Place
from tests.caller import Caller, Stream


def subcommand(run: Callable[[Invocation], int], *settings: str) -> Subcommand:
    """
    Return a subcommand called do, which takes a word.
    """

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--word")

    return Subcommand(
        name="do",
        summary="do it",
        description="Does it, and nothing else.",
        examples=[("ecr-proxy do --word now", "does it now")],
        settings=settings,
        add_arguments=add_arguments,
        run=run,
    )


def failing(problem: BaseException) -> Subcommand:
    def run(call: Invocation) -> int:
        raise problem

    return subcommand(run)


class FrameTests(SynchronousTestCase):
    """
    Calling the command.
    """

    def setUp(self) -> None:
        self.caller = Caller()
        self.calls: list[Invocation] = []

    def run_it(self, call: Invocation) -> int:
        self.calls.append(call)
        return 1

    def test_help_tells_of_each_subcommand_and_each_exit_status(self) -> None:
        """
        --help and the help of each subcommand, with its examples, explain everything.
        """
        one = subcommand(self.run_it, *ASKS)
        text = self.caller.call("--help", subcommands=[one])
        self.assertEqual(0, self.caller.status)
        self.assertIn("do it", text)
        self.assertIn("exit status: 0", text)
        text = self.caller.call("do", "--help", subcommands=[one])
        for word in ("Does it, and", "ecr-proxy do --word now", "PROXY_ADMIN_LISTEN", "--admin-url", "exit status: 0"):
            self.assertIn(word, text)

    def test_tells_its_version(self) -> None:
        """
        --version prints one line.
        """
        self.assertRegex(self.caller.call("--version"), r"^ecr-proxy \d+\.\d+\.\d+\n$")

    def test_misuse_is_status_2_and_a_line(self) -> None:
        """
        An unknown subcommand, none, or an unknown flag is a usage error.
        """
        for arguments in ((), ("undo",), ("do", "--what"), ("do", "--wor", "x")):
            self.caller.call(*arguments, subcommands=[subcommand(self.run_it)])
            self.assertEqual(2, self.caller.status, arguments)
            self.assertIn("error: ", self.caller.complaint)
        self.assertEqual([], self.calls)

    def test_settings_have_the_daemons_names_and_variables(self) -> None:
        """
        The flag overrides the variable, the variable the default; none of the required ones is asked for.
        """
        one = subcommand(self.run_it, "cache-dir", "admin-listen", "instance-auth", "listen")
        self.caller.variables = {"PROXY_CACHE_DIR": "/there", "PROXY_ADMIN_LISTEN": "tcp:7"}
        flags = ("--admin-listen", "tcp:8", "--no-instance-auth", "--listen", "tcp:1", "--listen", "tcp:2")
        self.caller.call("do", *flags, subcommands=[one])
        self.assertEqual(1, self.caller.status)
        (call,) = self.calls
        self.assertEqual(
            {
                "cache_dir": "/there",
                "admin_listen": parse_endpoint_string("tcp:8"),
                "instance_auth": False,
                "listen": [parse_endpoint_string("tcp:1"), parse_endpoint_string("tcp:2")],
            },
            call.settings,
        )
        self.assertEqual({"admin-listen": "tcp:8", "instance-auth": "false", "listen": "tcp:1 tcp:2"}, call.flags)

    def test_a_setting_that_is_wrong_is_misuse(self) -> None:
        """
        With the daemon's message.
        """
        self.caller.variables = {"PROXY_CACHE_LIMIT": "much"}
        self.caller.call("do", subcommands=[subcommand(self.run_it, "cache-limit")])
        self.assertEqual(2, self.caller.status)
        self.assertIn("PROXY_CACHE_LIMIT='much': not a size", self.caller.complaint)

    def test_whatever_goes_wrong_is_a_line_and_no_traceback(self) -> None:
        """
        Failures outside end it with status 3, an interrupt as shells expect.
        """
        for problem, status in {
            CommandError("it is\nlocked"): 3,
            CommandError("no such word", 2): 2,
            PermissionError(13, "Permission denied", "/cache"): 3,
            KeyboardInterrupt(): 130,
        }.items():
            self.caller.call("do", subcommands=[failing(problem)])
            self.assertEqual(status, self.caller.status, problem)
            self.assertRegex(self.caller.complaint, r"\Aecr-proxy: [^\n]+\n\Z")

    def test_a_file_that_can_not_be_had_is_told_without_pythons_words(self) -> None:
        self.caller.call("do", subcommands=[failing(PermissionError(13, "Permission denied", "/cache"))])
        self.assertEqual("ecr-proxy: /cache: Permission denied\n", self.caller.complaint)

    def test_a_reader_that_has_seen_enough_is_no_trouble(self) -> None:
        """
        As with head: no error is printed.
        """
        self.caller.call("do", subcommands=[failing(BrokenPipeError())])
        self.assertEqual((141, ""), (self.caller.status, self.caller.complaint))


class PlaceTests(SynchronousTestCase):
    """
    The address of the daemon.
    """

    def test_is_where_the_daemons_own_setting_says(self) -> None:
        """
        A TCP port on its interface, or a socket; loopback stands for all interfaces.
        """
        for text, place in {
            "tcp:5001:interface=127.0.0.1": Place(("127.0.0.1", 5001)),
            "tcp:9": Place(("127.0.0.1", 9)),
            "unix:/run/admin": Place("/run/admin"),
            "ssl:9": Place(("127.0.0.1", 9), secure=True),
        }.items():
            self.assertEqual(place, place_of(None, parse_endpoint_string(text)))

    def test_is_what_the_caller_says(self) -> None:
        """
        A URL, a bare host and port, or a socket.
        """
        self.assertEqual(Place(("there", 5001)), place_of("http://there", None))
        self.assertEqual(Place(("::1", 7)), place_of("[::1]:7", None))
        self.assertEqual(Place("/run/admin"), place_of("unix:/run/admin", None))

    def test_that_can_not_be_is_the_callers_mistake(self) -> None:
        """
        The error says what would be right.
        """
        caller = Caller()

        def run(call: Invocation) -> int:
            call.daemon()
            return 0

        for arguments, word in (
            (("--admin-url", "https://there"), "http://127.0.0.1:5001"),
            (("--admin-url", "http://there:port"), "http://127.0.0.1:5001"),
            (("--admin-listen", "off"), "PROXY_ADMIN_LISTEN is off"),
            (("--admin-listen", "systemd:domain=INET:index=1"), "--admin-url"),
            (("--admin-listen", "tcp:x"), "not a port"),
        ):
            caller.call("do", *arguments, subcommands=[subcommand(run, *ASKS)])
            self.assertEqual(2, caller.status, arguments)
            self.assertIn(word, caller.complaint)


class DaemonTests(SynchronousTestCase):
    """
    Requests to the daemon.
    """

    def setUp(self) -> None:
        self.caller = Caller()
        self.sent: list[tuple[str, str, Mapping[str, str], bytes]] = []

    def ask(self, status: int, body: bytes, *, many: bool = False) -> str:
        """
        Have the daemon answer, and return what the subcommand made of it.
        """

        def exchange(method: str, path: str, headers: Mapping[str, str], sent: bytes) -> DaemonResponse:
            self.sent.append((method, path, headers, sent))
            return DaemonResponse(status, body.splitlines(keepends=True))

        def run(call: Invocation) -> int:
            daemon = call.daemon()
            told = list(daemon.listen("GET", "/x")) if many else daemon.ask("POST", "/x", {"a": 1})
            call.terminal.print(json.dumps(told))
            return 0

        self.caller.exchange = exchange
        return self.caller.call("do", subcommands=[subcommand(run, *ASKS)])

    def test_gives_a_document(self) -> None:
        """
        The request is one that no web page can send, and its answer is read whole.
        """
        self.assertEqual('{"b": 2}\n', self.ask(200, b'{"b":\n2}'))
        ((method, path, headers, sent),) = self.sent
        self.assertEqual(("POST", "/x", b'{"a": 1}'), (method, path, sent))
        self.assertEqual({"X-Ecrproxy-Api": "1", "Content-Type": "application/json"}, headers)

    def test_gives_many_as_they_come(self) -> None:
        """
        One line each.
        """
        self.assertEqual('[{"b": 1}, {"b": 2}]\n', self.ask(200, b'{"b": 1}\n{"b": 2}\n', many=True))

    def test_a_refusal_is_told_in_its_words(self) -> None:
        """
        The daemon's own message is printed.
        """
        self.ask(404, b'{"errors": [{"code": "X", "message": "no such thing"}]}')
        self.assertEqual((3, "ecr-proxy: no such thing\n"), (self.caller.status, self.caller.complaint))

    def test_another_servers_answer_is_told_as_such(self) -> None:
        """
        Another program may listen there.
        """
        for status in (200, 404):
            self.ask(status, b"<html>")
            self.assertEqual(3, self.caller.status)
            self.assertIn("is not ecr-proxy", self.caller.complaint)

    def test_nobody_there_is_told_with_the_place(self) -> None:
        """
        Most likely the daemon does not run.
        """

        def run(call: Invocation) -> int:
            call.daemon().ask("GET", "/x")
            return 0

        self.caller.call("do", "--admin-listen", "tcp:9", subcommands=[subcommand(run, *ASKS)])
        self.assertEqual(3, self.caller.status)
        self.assertIn("no daemon answers at 127.0.0.1:9: Connection refused; is it running?", self.caller.complaint)

    def test_an_answer_that_breaks_off_is_told(self) -> None:
        """
        It is not taken for the whole.
        """

        def broken(*_: object) -> DaemonResponse:
            raise RemoteDisconnected("gone")

        self.caller.exchange = broken
        self.caller.call("do", subcommands=[subcommand(lambda call: call.daemon().ask("GET", "/") or 0, *ASKS)])
        self.assertEqual(3, self.caller.status)
        self.assertIn("ended early", self.caller.complaint)


class WordsTests(SynchronousTestCase):
    """
    Numbers for people.
    """

    def test_sizes(self) -> None:
        """
        In powers of 1024, with as many digits as matter.
        """
        sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 300 * 2**20: "300 MiB", 2**40: "1.0 TiB"}
        self.assertEqual(list(sizes.values()), [size_in_words(size) for size in sizes])

    def test_ages(self) -> None:
        """
        In the largest unit of which there are at least two.
        """
        ages = {
            0: "0 seconds ago",
            1: "1 second ago",
            119: "119 seconds ago",
            3600: "60 minutes ago",
            90000: "25 hours ago",
        }
        ages |= {40 * 86400: "40 days ago", -1: "just now"}
        self.assertEqual(list(ages.values()), [age_in_words(age) for age in ages])

    def test_counts(self) -> None:
        told = [counted(0, "file"), counted(1, "file"), counted(2, "file"), counted(1, "entry", "entries")]
        self.assertEqual(["0 files", "1 file", "2 files", "1 entry"], told)
        self.assertEqual("2 entries", counted(2, "entry", "entries"))

    def test_tables(self) -> None:
        """
        Columns are aligned, numbers to the right.
        """
        rows = [("NAME", "SIZE"), ("a", "12 B"), ("longer", "1 B")]
        self.assertEqual(["NAME    SIZE", "a       12 B", "longer   1 B"], table(rows, right=[1]))

    def test_names_can_not_command_the_terminal(self) -> None:
        """
        Text from elsewhere is made printable.
        """
        caller = Caller()

        def run(call: Invocation) -> int:
            call.terminal.print("a\x1b[2Jb\nc")
            return 0

        self.assertEqual("a?[2Jb?c\n", caller.call("do", subcommands=[subcommand(run)]))


class ProgressTests(SynchronousTestCase):
    """
    The progress of a task.
    """

    def setUp(self) -> None:
        self.stderr, self.time = Stream(), 0.0
        self.terminal = Terminal(Stream(), Stream(), self.stderr)

    def go_on(self, times: int) -> None:
        """
        Do a tenth of the work each second.
        """
        with Progress(self.terminal, "Verifying", 10 * 2**20, lambda: self.time) as progress:
            for _ in range(times):
                self.time += 1
                progress.advance(2**20)
            progress.say("a bad one")

    def test_is_a_bar_for_people(self) -> None:
        """
        It is drawn over, other lines stand above it, and it is removed at the end.
        """
        self.stderr.tty = True
        self.go_on(5)
        drawn = self.stderr.getvalue().split("\r")
        self.assertEqual(
            "Verifying [############............] 50 % of 10.0 MiB, 1.0 MiB/s, 0:05 left", drawn[5].strip()
        )
        self.assertEqual("a bad one\n", drawn[-1])
        self.assertEqual("", drawn[-2].strip())

    def test_is_a_line_now_and_then_for_logs(self) -> None:
        """
        Nothing is drawn over there.
        """
        self.go_on(19)
        self.assertEqual("Verifying: 100 % of 10.0 MiB, 1.0 MiB/s, 0:00 left\na bad one\n", self.stderr.getvalue())

    def test_can_do_without_a_total(self) -> None:
        """
        Then it shows the amount so far.
        """
        self.stderr.tty = True
        with Progress(self.terminal, "Reading", None, lambda: self.time) as progress:
            self.time += 2
            progress.advance(4096)
        self.assertIn("Reading 4.0 KiB, 2.0 KiB/s", self.stderr.getvalue())
