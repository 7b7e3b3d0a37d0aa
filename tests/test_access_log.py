"""
One line per request, batched under load; an id for each, in its answer and its line.
"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.http.access_log import GATHER_SECONDS, REFUSED, AccessLine, AccessLog
from ecrproxy.http.request import PATH_LENGTH, printable
from ecrproxy.request_id import LONGEST, choose_id
from ecrproxy.stopwatch import Stopwatch
from tests.daemon import NAMED, DaemonTestCase, noise


def line_of(path: str) -> AccessLine:
    return AccessLine(0, "192.0.2.7", "GET", path, 200, 5, 0.25, "MISS", "first-use", 0.125, "abc", aborted=False)


def text_of(path: str) -> str:
    return f"192.0.2.7 GET {path} 200 5 bytes 0.250 s MISS first-use upstream 0.125 s id abc"


class AccessLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.access_log = AccessLog(self.clock)

    def logged(self, *paths: str, seconds: float = 0) -> list[str | None]:
        """
        Write lines, let time pass, and return what was logged.
        """
        with capturedLogs() as events:
            for path in paths:
                self.access_log.write(line_of(path))
            self.clock.advance(seconds)
        return [formatEvent(event) for event in events]

    def test_a_line_by_itself_is_logged_at_once(self) -> None:
        """
        On a quiet daemon each request is visible as soon as it is answered.
        """
        for path in ("/one", "/two"):
            self.assertEqual([text_of(path)], self.logged(path))
            self.assertEqual([], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_rush_is_gathered(self) -> None:
        """
        Lines that follow soon are logged together, in order, a moment later, none lost and none twice.
        """
        paths = [f"/{number}" for number in range(100)]
        self.assertEqual([text_of("/0")], self.logged(*paths))
        self.assertEqual(["\n".join(map(text_of, paths[1:]))], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.logged("/more"))
        self.assertEqual([text_of("/more")], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([], self.logged(seconds=GATHER_SECONDS))
        self.assertEqual([text_of("/again")], self.logged("/again"))

    def test_the_last_lines_are_not_lost(self) -> None:
        """
        On shutdown the batch is logged; later lines are logged at once.
        """
        self.logged("/one", "/two")
        with capturedLogs() as events:
            self.access_log.stopService()
        self.assertEqual([text_of("/two")], [formatEvent(event) for event in events])
        for path in ("/three", "/four"):
            self.assertEqual([text_of(path)], self.logged(path))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_line_is_not_a_template(self) -> None:
        """
        Braces in a client's path are text.
        """
        self.assertEqual([text_of("/{secret}")], self.logged("/{secret}"))

    def test_what_is_not_there_is_a_dash(self) -> None:
        """
        Each word keeps its place.
        """
        line = AccessLine(0, "", "GET", "/", 0, 0, 0, "-", "-", 0, "abc", aborted=True)
        self.assertEqual("- GET / - 0 bytes 0.000 s - - upstream 0.000 s id abc aborted", str(line))

    def test_the_registry_comes_last_where_there_are_several(self) -> None:
        """
        Programs that split a line find all other words in the same places.
        """
        line = line_of("/")._replace(registry="quay.io")
        self.assertEqual(text_of("/"), str(line))
        self.assertEqual(f"{text_of('/')} registry quay.io", str(line._replace(several=True)))

    def test_nothing_passes_for_anything_else(self) -> None:
        """
        Control characters and non-ASCII characters are escaped.
        """
        self.assertEqual(r"/a\x1b[2J\x7f\xff", printable(b"/a\x1b[2J\x7f\xff", 100))

    def test_nothing_becomes_longer_by_escapes(self) -> None:
        """
        A path has the maximum length of one that is served, however it is written.
        """
        for sent in (b"/" + b"\x85" * 999, b"/" * 999):
            self.assertEqual(PATH_LENGTH, len(printable(sent, PATH_LENGTH)))
        longest = f"/v2/{'a' * 255}/manifests/sha512:{'0' * 128}".encode()
        self.assertEqual(longest.decode(), printable(longest, PATH_LENGTH))

    def test_refused_requests_of_a_client_are_counted(self) -> None:
        """
        A client that floods the log hides nothing: other clients have their lines, and so have answered requests.
        """
        flood = [line_of(f"/{number}")._replace(status=401, client="2001:db8::1") for number in range(50)]
        others = [line_of("/other")._replace(status=404), line_of("/answered")._replace(client="2001:db8::1")]
        with capturedLogs() as events:
            for line in (*flood, *others):
                self.access_log.write(line)
            self.clock.advance(GATHER_SECONDS)
            self.clock.advance(GATHER_SECONDS)
            self.access_log.write(flood[0])
        first, counted, gathered, again = [str(formatEvent(event)) for event in events]
        self.assertEqual(f"{50 - REFUSED} more requests of 2001:db8::/64 were refused, and have no line", counted)
        self.assertEqual(REFUSED - 1 + 2, len(gathered.splitlines()))
        self.assertEqual(first, again)


class IdTests(SynchronousTestCase):
    def test_sane_ones_are_kept(self) -> None:
        """
        Ids of load balancers and tracers, up to the maximum length.
        """
        for shown in (b"7", b"9f86d081-884c-4d63-a5b6-3f0c8c3f8b8e", b"1-67891233:abc/def=+@x_y.z", b"a" * LONGEST):
            self.assertEqual(shown.decode(), choose_id([shown], self.fail))

    def test_others_are_replaced(self) -> None:
        """
        Missing, repeated and overlong ids, and those that could break a line, a header or a page.
        """
        for shown in (
            [],
            [b"a", b"b"],
            [b""],
            [b"a" * (LONGEST + 1)],
            [b"a b"],
            [b"a\x1b"],
            [b"<a>"],
            [b"\xe9"],
            [b"-a"],
            [b"{a}"],
        ):
            self.assertEqual("new", choose_id(shown, lambda: "new"))


class StopwatchTests(SynchronousTestCase):
    """
    Seconds in several intervals.
    """

    def test_turns_are_added(self) -> None:
        """
        Time outside of intervals is not counted; starting or stopping twice changes nothing.
        """
        clock = Clock()
        watch = Stopwatch(clock.seconds)
        for counted in (True, True, False):
            watch.stop()
            watch.start()
            clock.advance(2)
            watch.start()
            clock.advance(1)
            watch.stop(counted=counted)
            clock.advance(10)
        self.assertEqual(6, watch.seconds)


class LinesTests(DaemonTestCase):
    """
    What the daemon logs about requests.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("blob", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"

    def lines(self) -> list[AccessLine]:
        """
        Return the lines since the last call.
        """
        self.pass_time(GATHER_SECONDS)
        found = [line for event in self.events for line in getattr(event.get("lines"), "lines", ())]
        self.events.clear()
        return found

    def line(self) -> AccessLine:
        (line,) = self.lines()
        return line

    def test_each_request_has_its_line(self) -> None:
        """
        With everything known about it, but without its query.
        """
        self.get(f"{self.blob}?secret=1", X_Request_Id="story-1")
        line = self.line()
        told = ("GET", self.blob, 200, 300_000, "MISS", "first-use", "story-1", False)
        self.assertEqual(
            told, (line.method, line.path, line.status, line.size, line.cache, line.reason, line.request, line.aborted)
        )
        self.get("/v2/team/app/manifests/missing")
        line = self.line()
        self.assertEqual((404, "-", "not-found"), (line.status, line.cache, line.reason))

    def test_every_answer_has_the_id_of_its_line(self) -> None:
        """
        Content, errors, health, and what is rejected before it becomes a request.
        """
        for method, path in (
            ("GET", self.blob),
            ("HEAD", self.blob),
            ("GET", "/v2/"),
            ("GET", "/v2/team/app/manifests/missing"),
            ("POST", "/v2/"),
            ("GET", "/healthz"),
            ("GET", "/readyz"),
            ("GET", "/nothing"),
        ):
            reply = self.daemon.ask(method, path)
            self.assertEqual(reply.header("X-Request-Id"), self.line().request)
            self.assertEqual("mine", self.daemon.ask(method, path, X_Request_Id="mine").header("X-Request-Id"))
            self.assertEqual("mine", self.line().request)
        for asked, status in (
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n", 405),
        ):
            answer, line = self.daemon.raw(asked), self.line()
            self.assertIn(f"\r\nX-Request-Id: {line.request}\r\n".encode(), answer)
            self.assertEqual((status, "bad-request"), (line.status, line.reason))

    def test_ids_differ(self) -> None:
        """
        Each request without an id gets one.
        """
        ids = {self.get("/v2/").header("X-Request-Id") for _ in range(100)}
        self.assertEqual(100, len(ids))

    def test_upstream_seconds_are_those_of_waiting_for_it(self) -> None:
        """
        For the answer and for bytes; not while the client doesn't read, and none on hits.
        """
        self.standin.hold(self.digest)
        self.standin.throttle("registry", times=1, retry_after="3")
        reply = self.get(self.blob)
        self.pass_time(4)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        self.pass_time(2)
        reply.stop_reading()
        self.standin.release(self.digest)
        self.flush()
        self.pass_time(5)
        reply.read_on()
        self.flush()
        self.assertWhole(reply, self.data, "MISS")
        line = self.line()
        self.assertEqual((6, 11), (int(line.upstream), int(line.seconds)))
        self.get(self.blob)
        self.assertEqual(0, self.line().upstream)

    def test_a_failure_was_waited_for(self) -> None:
        """
        The line of a slow error shows where the time went.
        """
        self.standin.hang("registry")
        self.daemon.send("GET", "/v2/team/app/tags/list")
        self.pass_time(31)
        line = self.line()
        self.assertEqual((504, "unreachable", 25), (line.status, line.reason, int(line.upstream)))

    def test_a_client_that_leaves_has_its_line(self) -> None:
        """
        With the bytes that it got until then; it is counted.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.blob)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        self.pass_time(2)
        reply.leave()
        self.flush()
        line = self.line()
        self.assertEqual((200, 100_000, "MISS", True, 2), (*line[4:6], line.cache, line.aborted, int(line.upstream)))
        self.assertEqual(1, self.counted(status="200", cache="MISS"))
        self.standin.release(self.digest)
        self.flush()

    def counted(self, *, status: str, cache: str) -> float:
        labels = f'cache="{cache}",method="GET",{NAMED},route="blob",status="{status}"'
        return self.daemon.figure(f"ecr_proxy_requests_total{{{labels}}}")

    def test_a_client_that_leaves_before_its_answer_has_no_status(self) -> None:
        self.standin.hang("registry")
        reply = self.daemon.send("GET", self.blob)
        self.flush()
        self.pass_time(2)
        reply.leave()
        self.flush()
        line = self.line()
        self.assertEqual((0, 0, True, 2), (line.status, line.size, line.aborted, int(line.upstream)))
        self.assertEqual(1, self.counted(status="-", cache="-"))

    def test_an_answer_that_is_broken_off_has_its_line(self) -> None:
        """
        As an answer with a wrong digest: all but its last bytes were sent.
        """
        self.standin.corrupt(self.digest, self.data[::-1])
        self.assertBroken(self.get(self.blob), self.data[::-1])
        line = self.line()
        self.assertEqual((200, True), (line.status, line.aborted))
        self.assertTrue(0 < line.size < len(self.data))
        self.assertEqual(1, self.counted(status="200", cache="MISS"))

    def test_nobody_who_asked_for_nothing_has_a_line(self) -> None:
        """
        Connections that are opened and closed, or that end in the middle of a head, are no requests.
        """
        for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"):
            self.daemon.raw(sent)
            self.daemon.front.ends[-1][0].abortConnection()
            self.flush()
        self.assertEqual([], self.lines())
