"""
Traces: a span for each request, with what it waited for, as a collector receives them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from io import RawIOBase
from typing import Any

import requests
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Received
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from requests.adapters import BaseAdapter
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IAgent
from zope.interface import implementer

from ecrproxy.command.checkup.findings import Verdict
from ecrproxy.command.checkup.settings import look_at_settings
from ecrproxy.flights import Flights
from ecrproxy.metrics import Tally
from ecrproxy.otel import LAST_SECONDS, OtelTracing, complaint
from ecrproxy.reading_ahead import BEGIN_SECONDS
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.settings.config import Config, given
from ecrproxy.spans import Spans, exporter
from ecrproxy.tracing import current
from tests.daemon import Daemon, DaemonTestCase, Reply, at_once
from tests.registry_server import noise
from tests.test_tap import TapCase

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{SPAN}-01"
"""A client's traceparent: the example of W3C Trace Context, section 3.2.4, sampled."""


class Thread(Clock):
    """
    A clock, and what the daemon's reactor offers to other threads; the SDK logs from its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, ...]] = []

    def callFromThread(self, *call: Any, **more: Any) -> None:
        self.told.append((*call, more))


class Collector(SpanExporter):
    """
    Keeps the spans in the form in which a collector receives them.

    @ivar down: whether it refuses them.
    """

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.down = False

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        if self.down:
            raise ConnectionRefusedError("nobody listens")
        self.bodies.append(encode_spans(spans).SerializeToString())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    def spans(self) -> list[Received]:
        """
        Return the spans received, in the order of their beginning.
        """
        found = [
            span
            for request in self.requests()
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def truths(span: Received) -> set[str]:
    """
    Return the names of the attributes that are true.
    """
    return {each.key for each in span.attributes if each.value.bool_value}


def told(span: Received) -> dict[str, str | int]:
    """
    Return a span's attributes.
    """
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@implementer(IAgent)
class Silent:
    """
    An agent that connects to nothing.
    """

    def request(self, *_: Any) -> Deferred[Any]:
        return fail(ConnectionRefusedError())


class TracingTestCase(DaemonTestCase):
    more_headers = frozenset({"traceparent"})

    def setUp(self) -> None:
        self.collector, self.thread = Collector(), Thread()
        self.tracing = OtelTracing(lambda: Spans(self.collector), at_once, self.thread)
        self.tracing.startService()
        self.addCleanup(self.tracing.stopService)
        super().setUp()
        self.image = self.standin.push_image("team/app", "1.0", layers=[b"layer" * 1000])

    def start(self, **options: Any) -> Daemon:
        return super().start(**{"tracing": self.tracing, "hot_path": False, **options})

    def spans(self) -> dict[str, list[Received]]:
        """
        Return the spans so far, by name.
        """
        self.tracing.stopService()
        found: dict[str, list[Received]] = {}
        for span in self.collector.spans():
            found.setdefault(span.name, []).append(span)
        return found


class SpanTests(TracingTestCase):
    def test_a_request_has_a_span_that_says_what_its_line_in_the_log_says(self) -> None:
        reply = self.get("/v2/team/app/manifests/1.0", X_Request_Id="mine")
        self.assertEqual(200, reply.code)
        (span,) = self.spans()["GET manifest"]
        self.assertEqual(Received.SPAN_KIND_SERVER, span.kind)
        expected = {
            "http.request.method": "GET",
            "http.route": "manifest",
            "http.response.status_code": 200,
            "http.response.body.size": len(reply.body),
            "url.path": "/v2/team/app/manifests/1.0",
            "client.address": "192.0.2.7",
            "ecrproxy.request_id": "mine",
            "ecrproxy.cache_status": "MISS",
            "ecrproxy.repository": "team/app",
        }
        self.assertEqual(expected, {key: value for key, value in told(span).items() if key in expected})

    def test_what_it_asks_ecr_and_the_bucket_are_its_parts(self) -> None:
        self.get(f"/v2/team/app/blobs/{self.image.layers[0]}")
        spans = self.spans()
        (request,), (download,) = spans["GET blob"], spans["download"]
        registry, bucket = spans["GET registry"][-1], spans["GET bucket"][-1]
        self.assertEqual(request.span_id, download.parent_span_id)
        self.assertEqual(request.span_id, registry.parent_span_id)
        self.assertEqual(request.span_id, bucket.parent_span_id)  # the first, which says how large the blob is
        self.assertEqual({request.trace_id}, {span.trace_id for each in spans.values() for span in each})
        self.assertEqual(307, told(registry)["http.response.status_code"])
        self.assertEqual(5000, told(bucket)["http.response.body.size"])
        self.assertEqual(Received.SPAN_KIND_CLIENT, bucket.kind)

    def test_the_look_at_the_disk_is_a_part(self) -> None:
        self.get(f"/v2/team/app/blobs/{self.image.layers[0]}")
        spans = self.spans()
        (request,), looks = spans["GET blob"], spans["look up in the cache"]
        self.assertEqual({request.span_id}, {each.parent_span_id for each in looks})

    def test_the_clients_own_trace_goes_on(self) -> None:
        self.get("/v2/team/app/manifests/1.0", traceparent=GIVEN)
        (span,) = self.spans()["GET manifest"]
        self.assertEqual((TRACE, SPAN), (span.trace_id.hex(), span.parent_span_id.hex()))

    def test_a_malformed_context_begins_a_trace(self) -> None:
        for wrong in ("nonsense", "00-" + "0" * 32 + f"-{SPAN}-01", GIVEN + "\tx" * 9):
            self.get("/v2/team/app/manifests/1.0", traceparent=wrong)
        spans = self.spans()["GET manifest"]
        self.assertEqual(3, len({span.trace_id for span in spans}))
        self.assertEqual({b""}, {span.parent_span_id for span in spans})

    def test_any_bytes_or_several_contexts_begin_a_trace(self) -> None:
        head = b"GET /v2/team/app/manifests/1.0 HTTP/1.1\r\nHost: x\r\n"
        other = GIVEN.replace(SPAN, SPAN[::-1])
        for shown in ([b"\xff\x99"], [b"00-\xff"], [GIVEN.encode(), other.encode()]):
            lines = b"".join(b"traceparent: %b\r\n" % each for each in shown)
            got = self.daemon.raw(head + lines + b"\r\n")
            self.assertTrue(got.startswith(b"HTTP/1.1 200 "), (shown, got[:300]))
        spans = self.spans()["GET manifest"]
        self.assertEqual([b""] * 3, [span.parent_span_id for span in spans])

    def test_what_the_client_does_not_sample_is_not_sent(self) -> None:
        self.get("/v2/team/app/manifests/1.0", traceparent=GIVEN[:-2] + "00")
        self.assertEqual({}, self.spans())

    def test_the_registry_is_told_the_trace_and_the_bucket_is_not(self) -> None:
        self.get(f"/v2/team/app/blobs/{self.image.layers[0]}", traceparent=GIVEN)
        shown = {each.service: each.headers.get("traceparent") for each in self.standin.asked}
        expected = f"00-{TRACE}-{self.spans()['GET registry'][-1].span_id.hex()}-01"
        self.assertEqual({"registry": expected, "bucket": None}, shown)

    def test_a_host_and_its_port_are_told_whatever_the_form_of_the_address(self) -> None:
        span = self.tracing.begin(None)
        agent = MeteredAgent(Silent(), "https://registry.example", Tally(), self.thread, "")
        shown = current.set(span)
        agent.request(b"GET", b"https://[2001:db8::1]:5000/layer?X-Amz-Signature=secret").addErrback(lambda _: None)
        current.reset(shown)
        (asked,) = self.spans()["GET bucket"]
        self.assertEqual(("2001:db8::1", 5000), (told(asked)["server.address"], told(asked)["server.port"]))

    def test_an_error_is_one(self) -> None:
        self.get("/v2/team/app/manifests/none")
        self.standin.fail("registry", status=500)
        self.get("/v2/team/other/manifests/none")
        spans = self.spans()["GET manifest"]
        self.assertEqual(
            [(404, Status.STATUS_CODE_UNSET), (502, Status.STATUS_CODE_ERROR)],
            [(told(span)["http.response.status_code"], span.status.code) for span in spans],
        )

    def test_no_secret_is_in_any_of_them(self) -> None:
        """
        Neither the presigned URL of a bucket, nor the token, nor a client's password.
        """
        self.get(f"/v2/team/app/blobs/{self.image.layers[0]}?token=secret")
        self.spans()
        for body in self.collector.bodies:
            for secret in (b"Amz", b"Signature", b"secret", b"canary", b"Basic"):
                self.assertNotIn(secret, body)

    def test_a_path_outside_of_every_repository_is_not_named(self) -> None:
        self.get("/v2/secret-words")
        (span,) = self.spans()["GET other"]
        self.assertNotIn("secret-words", str(span))

    def test_health_checks_have_none(self) -> None:
        self.get("/healthz")
        self.get("/readyz")
        self.assertEqual({}, self.spans())


class JoinedTests(TracingTestCase):
    def test_who_joins_a_download_is_linked_to_it(self) -> None:
        digest = self.image.layers[0]
        self.standin.hold(digest)
        first, second = self.get(f"/v2/team/app/blobs/{digest}"), self.get(f"/v2/team/app/blobs/{digest}")
        self.standin.release(digest)
        self.flush()
        self.assertEqual(["MISS", "JOINED"], [first.cache, second.cache])
        spans = self.spans()
        (download,), (miss, joined) = spans["download"], spans["GET blob"]
        self.assertEqual([download.span_id], [link.span_id for link in joined.links])
        self.assertEqual([], list(miss.links))


class FlightTests(TracingTestCase):
    def test_who_waits_for_anothers_request_is_linked_to_its_span(self) -> None:
        flights, gate = Flights[int](), Deferred[int]()

        async def fetch() -> int:
            return await gate

        one, other = self.tracing.begin(None), self.tracing.begin(None)
        assert one is not None
        assert other is not None
        for span in (one, other):
            current.set(span)
            flights.join("key", fetch)
        current.set(None)
        gate.callback(1)
        one.end({}, name="one")
        other.end({}, name="other")
        spans = self.spans()
        self.assertEqual([spans["one"][0].span_id], [link.span_id for link in spans["other"][0].links])
        self.assertEqual([], list(spans["one"][0].links))


class CollectorTests(TracingTestCase):
    def test_the_resource_names_service_version_and_process(self) -> None:
        self.get("/v2/team/app/manifests/1.0")
        self.spans()
        about = self.collector.requests()[0].resource_spans[0].resource
        names = {each.key: each.value.string_value for each in about.attributes}
        self.assertEqual("ecrproxy", names["service.name"])
        self.assertTrue(names["service.version"] and names["service.instance.id"])

    def test_one_that_is_gone_costs_spans_and_no_answer(self) -> None:
        self.collector.down = True
        self.assertEqual(200, self.get("/v2/team/app/manifests/1.0").code)
        self.assertEqual({}, self.spans())
        ((_, _, said, more),) = self.thread.told
        self.assertEqual("Tracing: {said}", said)
        self.assertIn("exporting", more["said"])

    def test_one_that_hangs_delays_the_end_for_seconds_and_is_named(self) -> None:
        ended = OtelTracing(lambda: Spans(self.collector), lambda *_: Deferred(), self.thread)
        ended.startService()
        ending = ended.stopService()
        assert ending is not None
        self.thread.advance(LAST_SECONDS - 1)
        self.assertNoResult(ending)
        with capturedLogs() as events:
            self.thread.advance(1)
        self.successResultOf(ending)
        said = "The last spans are lost: the collector of traces took none for 2 s"
        self.assertEqual([said], [formatEvent(event) for event in events])

    def test_before_the_start_and_after_the_stop_there_are_none(self) -> None:
        tracing = OtelTracing(lambda: Spans(self.collector), at_once, Clock())
        self.assertIsNone(tracing.begin(None))
        tracing.startService()
        self.assertIsNotNone(tracing.begin(None))
        tracing.stopService()
        self.assertIsNone(tracing.begin(None))


class EndTests(TapCase):
    def test_a_collector_that_never_answers_holds_no_thread_that_the_end_waits_for(self) -> None:
        collector = self.listening()
        service: Any = self.run_with(PROXY_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.getsockname()[1]}")
        (tracing,) = (each for each in service if isinstance(each, OtelTracing))
        service.pools.startService()
        tracing.startService()
        span = tracing.begin(None)
        assert span is not None
        span.end({})
        ending = tracing.stopService()
        assert ending is not None
        connection, _ = collector.accept()
        self.addCleanup(self.answer, connection)
        self.assertNoResult(ending)
        self.reactor.advance(LAST_SECONDS)
        self.successResultOf(ending)
        service.pools.stopService()
        self.assertEqual([], [each for each in threading.enumerate() if each.name == "ecrproxy-stop"])

    def test_where_no_thread_can_be_started_the_last_spans_are_lost_in_a_line(self) -> None:
        tracing = OtelTracing(lambda: Spans(Collector()), lambda *_: fail(RuntimeError("no thread")), Thread())
        tracing.startService()
        with capturedLogs() as events:
            self.successResultOf(tracing.stopService() or fail())
        self.assertEqual(["The last spans are lost: no thread"], [formatEvent(event) for event in events])

    def listening(self) -> socket.socket:
        made = socket.create_server(("127.0.0.1", 0))
        made.settimeout(30)
        self.addCleanup(made.close)
        return made

    def answer(self, connection: socket.socket) -> None:
        """
        Let the threads that still wait for an answer end.
        """
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        connection.close()
        for each in threading.enumerate():
            if each.name == "ecrproxy-unowned":
                each.join(30)


class ExtraTests(DaemonTestCase):
    def test_without_a_collector_nothing_of_the_sdk_is_imported(self) -> None:
        code = "import sys, ecrproxy.tap; print([name for name in sys.modules if name.startswith('opentelemetry')])"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        self.assertEqual("[]", done.stdout.strip())

    def test_without_tracing_a_request_has_no_span(self) -> None:
        self.standin.push_image("team/app", "1.0")
        reply: Reply = self.get("/v2/team/app/manifests/1.0")
        self.assertEqual(200, reply.code)


class OutageTests(TracingTestCase):
    def test_the_daemons_own_questions_are_in_no_clients_trace(self) -> None:
        """
        They go on until the registry answers, hours later.
        """
        self.standin.fail("registry", status=500)
        for number in range(12):
            self.daemon.send("GET", f"/v2/team/app{number}/manifests/1", traceparent=GIVEN)
            self.flush()
        self.pass_time(30)
        probes = [each for each in self.standin.asked if each.path == "/v2/"]
        self.assertTrue(probes)
        self.assertEqual({None}, {each.headers.get("traceparent") for each in probes})


class AheadTests(TracingTestCase):
    def test_what_is_read_ahead_belongs_to_the_pull_that_began_it(self) -> None:
        self.start(read_ahead=True)
        layers = [noise(f"traced{number}", 1_100_000) for number in range(4)]
        image = self.standin.push_image("team/ahead", "latest", layers=layers)
        self.get(f"/v2/team/ahead/manifests/{image.digest}")
        self.standin.hold(image.layers[0])
        self.daemon.send("GET", f"/v2/team/ahead/blobs/{image.layers[0]}", traceparent=GIVEN)
        self.flush()
        self.clock.advance(2 * BEGIN_SECONDS)
        self.flush()
        self.standin.release(image.layers[0])
        self.flush()
        downloads = self.spans()["download"]
        ahead = [span for span in downloads if "ecrproxy.read_ahead" in truths(span)]
        self.assertEqual(len(layers) - 1, len(ahead))
        self.assertEqual({TRACE}, {span.trace_id.hex() for span in downloads})


class UpstreamTests(TracingTestCase):
    def test_an_address_of_ipv6_and_its_port_are_told(self) -> None:
        class Silent:
            def request(self, *_: object) -> Deferred[Any]:
                return Deferred(lambda asked: asked.errback(ConnectionRefusedError()))

        span = self.tracing.begin(None)
        current.set(span)
        self.addCleanup(current.set, None)
        agent: Any = Silent()
        for url in ("http://[2001:db8::1]:5000", "https://[2001:db8::2]"):
            asking = MeteredAgent(agent, url, Tally(), self.clock, "one").request(b"GET", f"{url}/v2/".encode())
            asking.cancel()
            self.failureResultOf(asking)
        shown = [told(each) for each in self.spans()["GET registry"]]
        expected = [("2001:db8::1", 5000), ("2001:db8::2", None)]
        self.assertEqual(expected, [(each["server.address"], each.get("server.port")) for each in shown])


class SettingsOfTheSdkTests(DaemonTestCase):
    """
    The variables OTEL_*.
    """

    more_headers = frozenset({"traceparent"})

    def set(self, name: str, value: str) -> None:
        os.environ[name] = value
        self.addCleanup(os.environ.pop, name, None)

    def test_one_that_the_sdk_refuses_is_told_and_pulls_go_on(self) -> None:
        for name, value in (("OTEL_BSP_MAX_QUEUE_SIZE", "0"), ("OTEL_SPAN_LINK_COUNT_LIMIT", "x")):
            self.set(name, value)
            tracing = OtelTracing(lambda: Spans(Collector()), at_once, Thread())
            with capturedLogs() as events:
                tracing.startService()
            (line,) = map(formatEvent, events)
            self.assertIn("No traces: OpenTelemetry's SDK refuses its settings, OTEL_*: ValueError: ", str(line))
            self.assertIsNone(tracing.begin(None))
            tracing.stopService()
            del os.environ[name]

    def test_requests_of_which_nothing_is_traced_take_the_short_way(self) -> None:
        self.standin.push_image("team/app", "1.0")
        for name, value, answered in (
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", True),  # refused
            ("OTEL_SDK_DISABLED", "true", True),
            ("OTEL_SERVICE_NAME", "pulls", False),
        ):
            self.set(name, value)
            tracing = OtelTracing(lambda: Spans(Collector()), at_once, Thread())
            daemon = self.start(tracing=tracing)
            tracing.startService()
            del os.environ[name]
            for _ in range(3):  # fetched, recorded, answered
                self.assertIn(b" 200 OK", daemon.raw(b"GET /v2/team/app/manifests/1.0 HTTP/1.1\r\nHost: x\r\n\r\n"))
            tracing.stopService()
            assert daemon.hot_path is not None
            self.assertEqual(answered, daemon.hot_path.answered > 0, name)

    def test_a_registry_is_told_no_empty_trace_if_the_sdk_is_disabled(self) -> None:
        self.set("OTEL_SDK_DISABLED", "true")
        tracing = OtelTracing(lambda: Spans(Collector()), at_once, Thread())
        tracing.startService()
        self.addCleanup(tracing.stopService)
        self.standin.push_image("team/app", "1.0")
        self.start(tracing=tracing, hot_path=False)
        self.assertEqual(200, self.get("/v2/team/app/manifests/1.0").code)
        self.assertEqual({None}, {each.headers.get("traceparent") for each in self.standin.asked})

    def test_headers_that_the_sdk_would_log_are_named_and_not_shown(self) -> None:
        for wrong in (
            "api-key: secret",
            'api-key=sec"ret',
            "a=1,secret",
            "api-key=%0d%0asecret",
            "k=%e2%82%ac",
            "k=sécret",
        ):
            for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
                why = complaint("http://127.0.0.1:4318", {name: wrong})
                self.assertTrue(why and why.startswith(f"{name}: give NAME=VALUE"), wrong)
                self.assertNotIn("cret", str(why))

    def test_headers_that_it_understands_are_taken(self) -> None:
        given = "Authorization=Bearer abc==, api-key = x%2Cy ,,Authorization=Basic%20dTpw"
        self.assertIsNone(complaint("http://127.0.0.1:4318", {"OTEL_EXPORTER_OTLP_HEADERS": given}))

    def test_the_doctor_finds_them_too(self) -> None:
        environ = {
            "PROXY_ECR_ENDPOINT": "https://111122223333.dkr.ecr.eu-west-1.amazonaws.com",
            "PROXY_CACHE_DIR": "/var/cache/ecr-proxy",
            "PROXY_OTLP_ENDPOINT": "http://127.0.0.1:4318",
            "OTEL_EXPORTER_OTLP_HEADERS": "key: secret",
        }
        found = list(look_at_settings(Config.load({}, environ), given({}, environ), environ, 2))
        (failed,) = (each for each in found if each.verdict is Verdict.FAILED)
        self.assertIn("OTEL_EXPORTER_OTLP_HEADERS: give NAME=VALUE", failed.said)
        self.assertNotIn("secret", failed.said)


class Long(RawIOBase):
    """
    A body of 8 MiB; the real one has no end.

    @ivar count: how many bytes of it were read.
    """

    count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), 8 * 2**20 - self.count)
        self.count += size
        return size


class Answering(BaseAdapter):
    """
    A collector that answers with a long body.
    """

    def __init__(self, status: int) -> None:
        super().__init__()
        self._status, self.bodies = status, list[Long]()

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        self.bodies.append(Long())
        response = requests.Response()
        response.status_code, response.raw, response.request = self._status, self.bodies[-1], request
        return response

    def close(self) -> None:
        pass


class AnswerTests(SynchronousTestCase):
    """
    What a collector answers.
    """

    def test_is_not_read_beyond_its_headers(self) -> None:
        for status, result in ((200, SpanExportResult.SUCCESS), (400, SpanExportResult.FAILURE)):
            session, collector = requests.Session(), Answering(status)
            session.mount("http://", collector)
            sent = exporter("http://collector.example", session).export([])
            (body,) = collector.bodies
            self.assertEqual((result, 0, True), (sent, body.count, body.closed), status)
