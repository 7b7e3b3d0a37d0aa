"""
The log in each of its formats.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from jsonschema import Draft202012Validator
from twisted.application.service import Application
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, Logger, LogLevel, LogPublisher
from twisted.python.failure import Failure
from twisted.python.log import LogPublisher as OldPublisher
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.answers import CacheStatus
from ecrproxy.daemon.service import Daemon
from ecrproxy.http.access_log import AccessLine, AccessLines
from ecrproxy.logs.outlet import Outlet
from ecrproxy.logs.repeats import BURST, MINUTE
from ecrproxy.logs.shapes import PRIORITIES, Shape, as_journal, as_json, as_text
from ecrproxy.logs.writing import LineWriter, choose_writer, leads_to_journal
from ecrproxy.reasons import Reason
from ecrproxy.request_id import current
from tests.daemon import DaemonTestCase, noise

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCHEMA = json.loads((DOCS / "log.schema.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
CONTROL = [*map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, 0xD800, 0xDFFF))]
"""Control characters except tab and line break, and characters that UTF-8 can't encode."""
DEBUG = PRIORITIES[LogLevel.debug]


def validated(lines: str) -> list[dict[str, Any]]:
    """
    Parse lines of JSON, each of which must be valid.
    """
    assert lines.endswith("\n")
    found = [json.loads(line) for line in lines.splitlines()]
    for each in found:
        VALIDATOR.validate(each)
    return found


class ShapeTestCase(SynchronousTestCase):
    """
    A log of its own.
    """

    def setUp(self) -> None:
        self.log = Logger("ecrproxy.x", observer=cast(ILogObserver, self.note))
        self.events: list[Any] = []

    def note(self, event: Any) -> None:
        event["log_time"] = 1_700_000_000.5
        self.events.append(event)

    def written(self, shape: Shape, limit: int = DEBUG) -> str:
        """
        Return what was logged since the last call.
        """
        file = io.BytesIO()
        writer, events = LineWriter(Outlet(file), shape, limit, Clock().seconds), self.events
        self.events = []
        for event in events:
            writer(event)
        return file.getvalue().decode()

    def fault(self) -> None:
        try:
            raise ValueError("no\x1b[2J such\nthing")  # noqa: TRY301
        except ValueError:
            self.log.failure("Looking for {it}", it="it")

    def requests(self, count: int = 2, path: str = "/v2/x") -> None:
        """
        Log so many requests together, a tenth of a second apart.
        """
        lines = [
            AccessLine(
                at / 10, "192.0.2.7", "GET", path, 200, 5, 0.25, "MISS", "first-use", 0.125, f"r{at}", aborted=False
            )
            for at in range(count)
        ]
        self.log.info("{lines}", lines=AccessLines(lines, 6.0))


class TextTests(ShapeTestCase):
    """
    For people.
    """

    def test_a_line_has_time_place_and_level(self) -> None:
        """
        In that order.
        """
        self.log.warn("It is {what}", what="{so}")
        self.assertRegex(
            self.written(as_text), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[ecrproxy\.x#warn\] It is \{so\}\n$"
        )

    def test_a_traceback_stays_with_its_line(self) -> None:
        """
        Its further lines begin with a tab.
        """
        self.fault()
        first, *others = self.written(as_text).splitlines()
        self.assertIn("[ecrproxy.x#critical] Looking for it", first)
        self.assertTrue(others)
        self.assertTrue(all(line.startswith("\t") for line in others))

    def test_no_control_character_passes(self) -> None:
        """
        Of a message, of a traceback, and of a request; each is escaped.
        """
        for shape in (as_text, as_journal):
            for char in CONTROL:
                escape = char.encode("unicode_escape").decode("ascii")
                for said in (f"{char}[2J", f"a{char}b", f"a{char}"):
                    self.log.warn("It is {what}", what=said)
                    self.assertIn(f"It is {said.replace(char, escape)}\n", self.written(shape), escape)
                    self.requests(1, path=said)
                    self.assertIn(f"GET {said.replace(char, escape)} 200", self.written(shape), escape)
                try:
                    raise ValueError(f"no {char} such thing")  # noqa: TRY301
                except ValueError:
                    self.log.failure("Looking")
                written = self.written(shape)
                self.assertIn(f"ValueError: no {escape} such thing", written)
                self.assertNotIn(char, written)

    def test_a_line_break_begins_no_line_that_stands_for_itself(self) -> None:
        forged = "2026-11-29T00:00:00+0000 [forged#info] x"
        self.log.warn("It is {what}", what=f"so\n{forged}")
        self.assertEqual(f"\t{forged}", self.written(as_text).splitlines()[1])
        self.log.warn("It is {what}", what=f"so\n{forged}")
        self.assertEqual(f"<4>[ecrproxy.x#warn] {forged}", self.written(as_journal).splitlines()[1])
        for shape in (as_text, as_journal):
            self.requests(1, path=f"/x\n{forged}")
            self.assertEqual(1, len(self.written(shape).splitlines()))

    def test_requests_have_a_line_and_a_time_each(self) -> None:
        """
        Though they are logged together; the time is that of their end.
        """
        self.requests(11)
        lines = self.written(as_text).splitlines()
        times = [line.partition(" [ecrproxy.x#info] 192.0.2.7 GET /v2/x 200 5 bytes")[0] for line in lines]
        self.assertEqual((11, 2), (len(times), len(set(times))))
        self.assertTrue(all(len(time) == len("2023-11-14T22:13:20+0000") for time in times))

    def test_what_is_on_account_of_a_request_has_its_id(self) -> None:
        """
        That of the coroutine in which it is logged, or the one in the event.
        """

        async def answer() -> None:
            current.set("story")
            self.log.info("within")
            (event,) = self.events
            file = io.BytesIO()
            LineWriter(Outlet(file), as_text, DEBUG, Clock().seconds)(event)
            self.assertTrue(file.getvalue().endswith(b"within (request story)\n"))

        self.successResultOf(Deferred.fromCoroutine(answer()))
        self.events.clear()
        self.log.info("without")
        self.log.info("told", request="told-id")
        self.assertEqual(
            ["without", "told (request told-id)"], [x.split("] ")[1] for x in self.written(as_text).splitlines()]
        )


class JournalTests(ShapeTestCase):
    """
    For systemd.
    """

    def test_each_line_has_its_level(self) -> None:
        """
        And no time, which the journal adds.
        """
        for level, number in (("debug", 7), ("info", 6), ("warn", 4), ("error", 3), ("critical", 2)):
            self.log.emit(LogLevel.levelWithName(level), "so")
            self.assertEqual(f"<{number}>[ecrproxy.x#{level}] so\n", self.written(as_journal))

    def test_so_have_all_lines_of_a_traceback(self) -> None:
        """
        And those of requests that were logged together.
        """
        self.fault()
        self.assertTrue(
            all(line.startswith("<2>[ecrproxy.x#critical] ") for line in self.written(as_journal).splitlines())
        )
        self.log.info("a\n<0>b")
        self.assertEqual("<6>[ecrproxy.x#info] a\n<6>[ecrproxy.x#info] <0>b\n", self.written(as_journal))
        self.requests(3)
        self.assertEqual(3, len(re.findall(r"^<6>\[ecrproxy.x#info\] 192", self.written(as_journal), re.MULTILINE)))

    def test_only_what_comes_to_the_journal_is_marked(self) -> None:
        """
        The variable names the file; it may be inherited, with another output.
        """
        with tempfile.TemporaryFile("w") as file:
            status = os.fstat(file.fileno())
            ours = f"{status.st_dev}:{status.st_ino}"
            told = [leads_to_journal(each, file) for each in (ours, f"{status.st_dev}:1", "nonsense", "", None)]
        self.assertEqual([True, False, False, False, False], told)
        self.assertFalse(leads_to_journal(ours, io.StringIO()))


class JsonTests(ShapeTestCase):
    """
    For programs.
    """

    def test_an_event_is_an_object(self) -> None:
        """
        The most important fields come first.
        """
        self.log.warn("It is {what}", what="\u2028so\udcff\n")
        (told,) = validated(self.written(as_json))
        expected = {
            "time": "2023-11-14T22:13:20.500Z",
            "level": "warn",
            "logger": "ecrproxy.x",
            "process": os.getpid(),
            "message": "It is \u2028so\udcff\n",
        }
        self.assertEqual(expected, told)

    def test_a_traceback_is_a_field(self) -> None:
        """
        Also for events of Twisted's old logging, and for those without another message.
        """
        self.fault()
        self.log.failure("", Failure(ValueError("by itself")))
        self.log.failure("", Failure(ValueError()))
        first, second, third = validated(self.written(as_json))
        self.assertEqual(("Looking for it", "by itself"), (first["message"], second["message"]))
        self.assertIn("ValueError: no\x1b[2J such", first["traceback"])
        self.assertIn("ValueError", third["message"])
        old = OldPublisher(publishPublisher=LogPublisher(cast(ILogObserver, self.note)))
        old.msg(failure=Failure(ValueError("old")), why="In the old way", isError=1)
        old.msg("said", "so")
        failed, said = validated(self.written(as_json))
        self.assertEqual("In the old way", failed["message"])
        self.assertIn("ValueError: old", failed["traceback"])
        self.assertEqual(("said so", "info"), (said["message"], said["level"]))

    def test_requests_are_objects_of_their_own(self) -> None:
        """
        With the time of their end, and numbers as numbers.
        """
        self.requests(2)
        first, second = validated(self.written(as_json))
        self.assertEqual(["2023-11-14T22:13:14.500Z", "2023-11-14T22:13:14.600Z"], [first["time"], second["time"]])
        fields = {"client": "192.0.2.7", "status": 200, "bytes": 5, "seconds": 0.25, "upstream_seconds": 0.125}
        self.assertEqual(fields, {name: second[name] for name in fields})
        self.assertEqual(
            ("MISS", "first-use", "r1", False, None),
            (*[second[n] for n in ("cache", "reason", "request", "aborted", "registry")],),
        )

    def test_the_schema_has_the_words_of_the_code(self) -> None:
        """
        Statuses, reasons and levels; and the reference names each field.
        """
        request = SCHEMA["$defs"]["request"]["properties"]
        self.assertEqual([*CacheStatus, None], request["cache"]["enum"])
        self.assertEqual([*Reason, None], request["reason"]["enum"])
        event = SCHEMA["$defs"]["event"]["properties"]
        self.assertEqual({level.name for level in PRIORITIES}, set(event["level"]["enum"]))
        page = (DOCS / "reference" / "logging.rst").read_text("utf-8")
        self.assertEqual(set(), {name for name in {**event, **request} if f"``{name}``" not in page})

    def test_the_schema_refuses_what_it_does_not_know(self) -> None:
        """
        So that a new field is documented.
        """
        self.requests(1)
        (told,) = validated(self.written(as_json))
        self.assertFalse(VALIDATOR.is_valid({**told, "more": 1}))
        self.assertFalse(VALIDATOR.is_valid({name: told[name] for name in told if name != "bytes"}))


class OmittedTests(ShapeTestCase):
    """
    The message about omitted lines.
    """

    def setUp(self) -> None:
        super().setUp()
        self.clock, self.file = Clock(), io.BytesIO()

    def writer(self, shape: Shape, limit: int = DEBUG) -> LineWriter:
        return LineWriter(Outlet(self.file), shape, limit, self.clock.seconds)

    def lines_of(self, shape: Shape) -> str:
        """
        Return the lines at once, and those of a minute later.
        """
        self.file.truncate(0)
        self.file.seek(0)
        writer = self.writer(shape)
        for event in self.events:
            writer(event)
        self.clock.advance(MINUTE)
        writer.tick()
        return self.file.getvalue().decode()

    def test_each_shape_has_their_count(self) -> None:
        for _ in range(4):
            self.log.info("Evicted", once=True)
        self.assertRegex(self.lines_of(as_text), r"] Evicted\n.*] Evicted \(2 similar lines omitted\)\n$")
        self.assertTrue(
            self.lines_of(as_journal).endswith("\n<6>[ecrproxy.x#info] Evicted (2 similar lines omitted)\n")
        )
        told = validated(self.lines_of(as_json))
        self.assertEqual([("Evicted", None), ("Evicted", 2)], [(x["message"], x.get("omitted")) for x in told])

    def test_tracebacks_of_one_fault_are_few(self) -> None:
        for _ in range(100):
            self.fault()
        told = validated(self.lines_of(as_json))
        self.assertEqual(BURST, sum("traceback" in each for each in told))
        self.assertEqual((100 - BURST - 1, "critical"), (told[-1]["omitted"], told[-1]["level"]))

    def test_what_is_below_the_level_is_not_counted(self) -> None:
        writer = self.writer(as_text, PRIORITIES[LogLevel.warn])
        for _ in range(4):
            self.log.info("Evicted", once=True)
            writer(self.events[-1])
        writer.tick(at_once=True)
        self.assertEqual(b"", self.file.getvalue())

    def test_the_end_tells_what_was_left_out(self) -> None:
        writer = self.writer(as_text)
        for _ in range(4):
            self.log.info("Evicted", once=True)
            writer(self.events[-1])
        writer.end(0)
        self.assertIn(b"2 similar lines omitted", self.file.getvalue())


class WriterTests(ShapeTestCase):
    """
    How and where the log is written.
    """

    def test_what_is_below_the_level_is_not_written(self) -> None:
        """
        More severe events are.
        """
        for level in LogLevel.iterconstants():
            self.log.emit(level, level.name)
        told = validated(self.written(as_json, PRIORITIES[LogLevel.warn]))
        self.assertEqual(["warn", "error", "critical"], [each["message"] for each in told])

    def test_lines_go_in_pieces_that_a_pipe_takes_whole(self) -> None:
        """
        Each ends with a newline, so that lines of several processes don't mix.
        """

        class Pieces(io.BytesIO):
            def write(self, data: Any, /) -> int:
                pieces.append(bytes(data))
                return len(data)

        pieces: list[bytes] = []
        self.requests(100, "/" + 900 * "x")
        (event,) = self.events
        LineWriter(Outlet(Pieces()), as_text, DEBUG, Clock().seconds)(event)
        self.assertGreater(len(pieces), 10)
        self.assertTrue(all(len(piece) <= select.PIPE_BUF and piece.endswith(b"\n") for piece in pieces))
        self.assertEqual(self.written(as_text).encode(), b"".join(pieces))

    def choose(self, *, json: bool = False, **twistd: Any) -> Any:
        """
        Choose by twistd's flags.
        """
        return choose_writer(twistd, json=json, limit=DEBUG, journal=None, later=lambda call, *args: call(*args))

    def test_what_an_operator_has_asked_twistd_for_is_left_to_it(self) -> None:
        """
        A logger or the syslog have their own format; and twistd reports its own errors.
        """
        for flags in ({"logger": list}, {"syslog": 1}, {"logfile": "-"}):
            self.assertIs(None, self.choose(**flags))

    def test_a_file_is_written_and_begun_anew_on_a_signal(self) -> None:
        """
        As twistd does.
        """
        handler = signal.getsignal(signal.SIGUSR1)
        self.addCleanup(signal.signal, signal.SIGUSR1, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        folder = tempfile.TemporaryDirectory(prefix="ecrproxy-test-")
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "log")
        writer = self.choose(json=True, nodaemon=1, logfile=str(path))
        for name in ("before", "after"):
            self.log.info(name)
            writer(self.events.pop())
            if name == "before":
                signal.raise_signal(signal.SIGUSR1)
        files = [Path(f"{path}.1"), path]
        self.assertEqual(
            [["before"], ["after"]], [[each["message"] for each in validated(file.read_text())] for file in files]
        )

    def test_the_application_is_told_before_its_log_begins(self) -> None:
        """
        twistd asks it for an observer.
        """
        output = self.enterContext(tempfile.TemporaryFile("w+"))
        self.patch(sys, "stdout", output)
        service, application = Daemon(None), Application("x")
        service.writer = self.choose(json=True, nodaemon=1)
        service.setServiceParent(application)
        observer = application.getComponent(ILogObserver)
        self.log.info("so")
        observer(self.events.pop())
        output.seek(0)
        (told,) = validated(output.read())
        self.assertEqual("so", told["message"])


class DaemonLinesTests(DaemonTestCase):
    """
    All messages of a daemon are valid, whatever happens to it.
    """

    def test_lines_of_a_whole_daemon(self) -> None:
        """
        Pulls, errors, clients that disconnect, an ECR that fails, a bug of ours, a disk that is full.
        """
        data = noise("blob", 300_000)
        digest = self.standin.push_blob("team/app", data)
        blob = f"/v2/team/app/blobs/{digest}"
        self.standin.push_image("team/app", "latest")
        self.get("/v2/team/app/manifests/latest", X_Request_Id="story")
        self.standin.hold(digest)
        reply = self.get(blob)
        reply.leave()
        self.standin.release(digest)
        self.flush()
        self.get(blob)
        self.daemon.raw(b"nonsense\r\n\r\n")
        self.daemon.raw(b"GET /v2/\x7f\xff HTTP/1.1\r\nHost: a\r\n\r\n")
        self.standin.fail("registry", status=500)
        self.get("/v2/team/app/manifests/latest", X_Request_Id="stale")
        for number in range(6):
            self.get(f"/v2/team/app/manifests/{number}")
        self.patch(self.daemon.cache, "at_hand", None)
        self.get(blob)
        self.flushLoggedErrors(TypeError)
        self.daemon.access_log.stopService()
        file = io.BytesIO()
        writer = LineWriter(Outlet(file), as_json, DEBUG, Clock().seconds)
        for event in self.events:
            writer(event)
        lines = file.getvalue().decode()
        self.assertEqual([], [secret for secret in self.secrets() if secret in lines])
        told = validated(lines)
        requests = [each for each in told if each["logger"] == "access"]
        self.assertEqual({"HIT", "MISS", "STALE", None}, {each["cache"] for each in requests})
        self.assertEqual({200, 400, 500, 502, 503}, {each["status"] for each in requests} - {404})
        self.assertEqual(1, sum(each["aborted"] for each in requests))
        (fault,) = [each for each in told if "traceback" in each]
        self.assertEqual(requests[-1]["request"], fault["request"])
        self.assertIn("NoneType", fault["traceback"])
