"""
The admin port, over HTTP.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from tables import all_readings
from twisted.internet.protocol import Protocol
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.limits import SPARE
from ecrproxy.admin.port import CONNECTIONS
from ecrproxy.admin.readings import CAN_FETCH, CAN_SERVE, CERTIFICATE_EXPIRY, FIGURES
from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.http.closing import SETTLED_SECONDS
from ecrproxy.http.site import route_of
from ecrproxy.metrics import Figure, Figures, Reading, Tally
from ecrproxy.registry.circuit import FAILURES
from ecrproxy.workers.messages import FiguresTold, FromWorker, decode, encode
from tests.daemon import NAMED, DaemonTestCase, noise


class CrowdTests(DaemonTestCase):
    """
    A client on the machine that opens connections to the admin port, and sends no requests.
    """

    def test_connections_are_bounded(self) -> None:
        """
        Those of silent clients, and those in the middle of a request; other requests are still answered.
        """
        for sent in (b"", b"GET /metrics"):
            for number in range(3 * CONNECTIONS):
                self.daemon.admin.client = f"127.0.0.{number + 1}"
                self.daemon.admin.connect(Protocol(), "proxy.example", 5001, secure=False).write(sent)
            self.pass_time(SETTLED_SECONDS)
            open_ones = sum(server.connected for _, server in self.daemon.admin.ends)
            self.assertLessEqual(open_ones, CONNECTIONS + SPARE)
            self.assertEqual(200, self.daemon.ask_admin("/metrics").code)


class MetricsTests(DaemonTestCase):
    """
    /metrics, while a daemon works.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("metered", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"

    def test_requests_are_told_by_route_method_status_and_cache_status(self) -> None:
        """
        A miss and two hits of a blob are three requests, with the bytes that clients got.
        """
        for _ in range(3):
            self.get(self.blob)
        counted = f'ecr_proxy_requests_total{{cache="%s",method="GET",{NAMED},route="blob",status="200"}}'
        self.assertEqual(1, self.daemon.figure(counted % "MISS"))
        self.assertEqual(2, self.daemon.figure(counted % "HIT"))
        self.assertEqual(3 * len(self.data), self.daemon.figure('ecr_proxy_client_bytes_total{route="blob"}'))
        self.assertEqual(3, self.daemon.figure('ecr_proxy_request_seconds_count{route="blob"}'))

    def test_requests_upstream_are_told_by_kind_of_host_and_outcome(self) -> None:
        """
        One question to the registry, one to the bucket, and each byte once.
        """
        for _ in range(3):
            self.get(self.blob)
        told = "ecr_proxy_upstream_requests_total"
        self.assertEqual(1, self.daemon.figure(f'{told}{{host="registry",outcome="307",{NAMED}}}'))
        self.assertEqual(1, self.daemon.figure(f'{told}{{host="bucket",outcome="206",{NAMED}}}'))
        received = self.daemon.figure('ecr_proxy_upstream_received_bytes_total{host="bucket"}')
        self.assertEqual(len(self.data), received)

    def test_an_upstream_that_is_not_reached_is_told(self) -> None:
        """
        Failed connections are an outcome too.
        """
        self.standin.refuse("registry")
        self.get("/v2/team/app/manifests/latest")
        failed = self.daemon.figure(f'ecr_proxy_upstream_requests_total{{host="registry",outcome="failed",{NAMED}}}')
        self.assertGreaterEqual(failed, 1)

    def test_the_cache_tells_how_full_it_is(self) -> None:
        """
        Bytes, files, limit, evictions and the oldest use are read at each scrape.
        """
        self.start(limit=400_000)
        self.get(self.blob)
        self.assertEqual(400_000, self.daemon.figure("ecr_proxy_cache_limit_bytes"))
        self.assertEqual(self.used(), self.daemon.figure("ecr_proxy_cache_bytes"))
        self.assertEqual(0, self.daemon.figure("ecr_proxy_cache_evictions_total"))
        self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('another', 300_000))}")
        self.assertGreaterEqual(self.daemon.figure("ecr_proxy_cache_evictions_total"), 1)
        self.assertGreater(self.daemon.figure("ecr_proxy_cache_oldest_use_timestamp_seconds"), 1e9)

    def test_a_transfer_under_way_is_told(self) -> None:
        """
        The metric exists while the transfer lasts.
        """
        self.standin.hold(self.digest)
        self.daemon.send("GET", self.blob)
        self.flush()
        self.assertEqual(1, self.daemon.figure("ecr_proxy_transfers"))
        self.standin.release(self.digest)
        self.flush()
        self.assertEqual(0, self.daemon.figure("ecr_proxy_transfers"))

    def test_the_token_tells_when_it_expires_and_how_often_it_was_not_had(self) -> None:
        """
        For alerts: the expiry as a timestamp, and failures as a count.
        """
        self.assertGreater(self.daemon.figure("ecr_proxy_token_expiry_timestamp_seconds"), self.daemon.now())
        self.assertEqual(0, self.daemon.figure("ecr_proxy_token_refresh_failures_total"))

    def test_an_ecr_that_fails_is_told_by_tries_and_circuit(self) -> None:
        """
        Retries are counted, and the circuit's state is one of three.
        """
        self.assertEqual(1, self.daemon.figure('ecr_proxy_circuit_state{state="closed"}'))
        self.standin.fail("registry", status=503)
        for name in range(5):
            self.daemon.send("GET", f"/v2/team/app{name}/manifests/latest")
        self.pass_time(30)
        self.assertGreaterEqual(self.daemon.figure("ecr_proxy_upstream_retries_total"), 5)
        self.assertEqual(1, self.daemon.figure('ecr_proxy_circuit_state{state="open"}'))
        self.assertEqual(0, self.daemon.figure('ecr_proxy_circuit_state{state="closed"}'))

    def test_figures_document_and_page_say_what_readyz_says(self) -> None:
        """
        While ECR fails for the one repository that is requested, and the circuit is closed for all others.
        """
        self.standin.fail("registry", status=503)
        for expected in (True, False):
            self.pass_time(FRESH_SECONDS)
            said = json.loads(self.get("/readyz").body)
            self.assertEqual((True, expected), (said["can_serve"], said["can_fetch"]))
            told = (self.daemon.figure("ecr_proxy_can_serve"), self.daemon.figure("ecr_proxy_can_fetch"))
            self.assertEqual((1, expected), told)
            status = json.loads(self.daemon.ask_admin("/status.json").body)
            self.assertEqual((True, expected), (status["can_serve"], status["can_fetch"]))
            page = self.daemon.ask_admin("/").body.decode()
            self.assertEqual(expected, "Can't fetch from upstream" not in page)
            for _ in range(FAILURES):
                self.get(self.blob)
        self.assertEqual(1, self.daemon.figure("ecr_proxy_circuit_open_repositories"))
        self.assertEqual(1, self.daemon.figure('ecr_proxy_circuit_state{state="closed"}'))
        self.assertIn("1 repository left alone", page)

    def test_no_label_grows_with_what_clients_ask_for(self) -> None:
        """
        Whatever is requested, the number of series stays the same.
        """

        def series() -> int:
            return len(self.daemon.ask_admin("/metrics").body.splitlines())

        for word in ("one", "two"):
            self.get(f"/{word}")
            self.get(f"/v2/{word}/{word}/{word}")
            self.daemon.raw(f"{word.upper()} /v2/ HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            if word == "one":
                before = series()
        self.assertEqual(before, series())

    def test_clients_do_not_see_it(self) -> None:
        self.assertRefused(self.get("/metrics"), 404, "UNSUPPORTED")

    def test_the_operators_port_tells_of_readiness_too(self) -> None:
        """
        So probers need no other port.
        """
        self.assertEqual(200, self.daemon.ask_admin("/readyz").code)
        self.assertEqual(200, self.daemon.ask_admin("/healthz").code)
        self.assertEqual(404, self.daemon.ask_admin("/v2/").code)


class MetricsPortTests(DaemonTestCase):
    """
    What Prometheus may access where it has no access to the admin port.
    """

    def test_has_figures_and_health_under_any_name_and_nothing_else(self) -> None:
        """
        Neither purges nor names of repositories.
        """
        port = self.daemon.scraped
        page = self.daemon.ask_admin("/metrics", port=port, host="ecr-proxy.example")
        self.assertEqual(200, page.code)
        self.assertIn(b"ecr_proxy_can_serve 1.0", page.body)
        for path in ("/healthz", "/readyz"):
            self.assertEqual(200, self.daemon.ask_admin(path, port=port).code)
        for path in ("/", "/status.json", "/api/entries", "/api/purge", "/style.css", "/metrics/x"):
            for method in ("GET", "POST"):
                self.assertIn(self.daemon.ask_admin(path, method, port=port).code, (403, 404, 405), (method, path))


class TallyTests(SynchronousTestCase):
    """
    Count, and add up the counts of others.
    """

    def test_what_was_taken_can_be_added_elsewhere(self) -> None:
        """
        Two workers' counts add up to what one process would have counted; nothing is counted twice.
        """
        one, two, all_of_it, sums = Tally(), Tally(), Tally(), Tally()
        for tally, seconds, size in ((one, 0.25, 5), (two, 0.5, 7), (one, 1024.0, 11)):
            tally.note(("blob",), seconds, size)
            all_of_it.note(("blob",), seconds, size)
        for tally in (one, two, one):
            sums.add(tally.take())
        self.assertEqual(list(all_of_it.rows()), list(sums.rows()))
        (row,) = sums.rows()
        self.assertEqual((("blob",), 3, 23), row[:3])


class FiguresTests(SynchronousTestCase):
    """
    Metrics of which the values come from other parts.
    """

    def test_of_each_it_is_known_how_workers_become_one(self) -> None:
        """
        An unlisted metric would be missing with workers.
        """
        parents = {CAN_SERVE, CAN_FETCH, CERTIFICATE_EXPIRY}
        self.assertEqual({*FIGURES, *parents}, {each.figure for each in all_readings()})
        self.assertEqual(len(FIGURES), len({each.name for each in FIGURES}))

    def test_processes_of_workers_count_with_the_parents(self) -> None:
        """
        Memory, time and files add up; a worker that has just ended is left out.
        """

        def figure(figures: Figures, name: str) -> float:
            (line,) = [each for each in figures.page().decode().splitlines() if each.startswith(f"{name} ")]
            return float(line.partition(" ")[2])

        one, three = Figures("1"), Figures("1", lambda: [os.getpid(), os.getpid(), 2**22])
        most = "process_max_fds"
        self.assertEqual(3 * figure(one, most), figure(three, most))
        self.assertGreater(figure(three, "process_open_fds"), 2.5 * figure(one, "process_open_fds"))
        start = "process_start_time_seconds"
        self.assertEqual(figure(one, start), figure(three, start))

    def test_the_time_of_workers_that_have_ended_stays_counted(self) -> None:
        workers = list[int]()
        figures = Figures("1", lambda: workers)

        def seconds() -> float:
            found = re.search(r"^process_cpu_seconds_total (\S+)", figures.page().decode(), re.MULTILINE)
            assert found is not None
            return float(found[1])

        busy = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            before = seconds()
            workers.append(process.pid)
            self.assertGreater(alive := seconds(), before + 0.15)
        workers.clear()
        self.assertGreaterEqual(seconds(), alive)

    def test_several_by_label_and_one_that_is_not_there(self) -> None:
        """
        A reading may give a value for each label, or none for now.
        """
        figures = Figures("1.2.3")
        figures.watch(
            Reading(Figure("refused_total", "Refused", "why"), lambda: {"slow": 2, "many": 3}),
            Reading(Figure("nothing_yet", "Nothing"), lambda: None),
            Reading(Figure("is_so", "Whether it is"), lambda: True),
        )
        told = figures.values()
        self.assertEqual(told, decode(encode(FiguresTold(1, told)), FromWorker).figures)
        self.assertIs(float, type(told["is_so"][""]))
        page = figures.page().decode()
        self.assertIn('ecr_proxy_refused_total{why="many"} 3.0', page)
        self.assertIn('ecr_proxy_build_info{version="1.2.3"} 1.0', page)
        self.assertNotIn("nothing_yet", page)
        self.assertIn("process_open_fds", page)


class RouteTests(SynchronousTestCase):
    def test_a_target_is_of_one_of_a_few_kinds(self) -> None:
        """
        By the words of the distribution spec; all others are "other".
        """
        for target, route in {
            "/v2/": "api",
            "/v2/a/b/manifests/latest": "manifest",
            "/v2/a/blobs/sha256:0": "blob",
            "/v2/a/tags/list": "tags",
            "/v2/a/referrers/sha256:0": "referrers",
            "/readyz": "health",
            "/v2/blobs": "other",
            "/v3/a/blobs/x": "other",
            "/": "other",
        }.items():
            self.assertEqual(route, route_of(target), target)
