"""
A collector receives traces from the real daemon.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from .certificates import make_certificates
from .chain import Equipment
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .processes import eventually, free_port


class Collector(ThreadingHTTPServer):
    """
    An OpenTelemetry collector: takes OTLP over HTTP, and keeps the spans.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def take(self, body: bytes) -> None:
        """
        Keep the spans of one request.
        """
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.services.add(names["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        """
        Return the spans of a name.
        """
        return [span for span in self.spans if span.name == name]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
        if found:
            self.server.take(body)
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def equipment(home: Path, images: Images) -> Equipment:
    """
    Use the tests' own environment, which has the extra: the wheel is installed without it.
    """
    twistd = Path(sys.executable).with_name("twistd")
    return Equipment(home, twistd, home / "storage", make_certificates(home / "certificates-of-traces"))


@pytest.fixture
def collector() -> Iterator[Collector]:
    """
    Run a collector.
    """
    server = Collector()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_pull_is_a_trace(
    make_chain: MakeChain, docker: Docker, images: Images, collector: Collector, processes: str
) -> None:
    settings = {"PROXY_OTLP_ENDPOINT": collector.url, "PROXY_WORKER_PROCESSES": processes}
    chain = make_chain(settings={**settings, "OTEL_SERVICE_NAME": "pulls", "OTEL_BSP_SCHEDULE_DELAY": "100"})
    docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
    eventually(lambda: len(collector.named("GET blob")) > 1, "the collector has the spans of blobs")
    assert collector.services == {"pulls"}
    blob = collector.named("GET blob")[0]
    registry = [span for span in collector.named("GET registry") if span.parent_span_id == blob.span_id]
    assert {span.trace_id for span in registry} == {blob.trace_id}


def test_the_last_spans_are_sent_at_the_end(
    make_chain: MakeChain, docker: Docker, images: Images, collector: Collector
) -> None:
    """
    Although the next batch is due in an hour.
    """
    settings = {"PROXY_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    chain = make_chain(settings=settings)
    docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
    chain.daemon.process.stop()
    assert collector.named("GET blob")


def test_a_collector_that_never_answers_holds_the_end_for_two_seconds(
    make_chain: MakeChain, docker: Docker, images: Images
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"PROXY_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        chain = make_chain(settings=settings)
        docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
        began = time.monotonic()
        chain.daemon.process.stop()
        assert time.monotonic() - began < 4
    assert "The last spans are lost: the collector of traces took none for 2 s" in chain.logs()


def test_without_a_collector_pulls_go_on_and_the_log_says_so(
    make_chain: MakeChain, docker: Docker, images: Images
) -> None:
    settings = {"PROXY_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    chain = make_chain(settings=settings)
    docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
    eventually(lambda: "Tracing: " in chain.logs(), "the log says that nothing takes the spans")
    chain.daemon.process.stop()
