"""
The metrics, checked by Prometheus' own tool.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.documents import blocks, pages

from .asking import ask
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .installing import CHECKOUT
from .processes import PATIENCE, eventually, free_port


def page_of(port: int) -> str:
    """
    Fetch the metrics.
    """
    return ask(f"http://127.0.0.1:{port}/metrics").body.decode()


def total(page: str, name: str) -> float:
    """
    Add up a metric over all its labels.
    """
    return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)))


def promtool(*words: str | Path, text: str = "") -> str:
    """
    Have promtool check something, and return its output if it objects.
    """
    argv = ["promtool", *map(str, words)]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def named_in(expressions: str) -> set[str]:
    """
    Return our metrics that expressions mention.
    """
    return set(re.findall(r"\b(?:ecr_proxy|process)_\w+", expressions))


@pytest.fixture
def page(make_chain: MakeChain, docker: Docker, images: Images) -> str:
    """
    Return the metrics of a daemon that has served a pull.
    """
    port = free_port()
    chain = make_chain(settings={"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
    # the client does not wait for the disk, and some metrics are about its content
    eventually(lambda: total(page_of(port), "ecr_proxy_cache_files") > 0, "something is in the cache")
    return page_of(port)


def test_the_alert_rules_fire_when_they_should() -> None:
    """
    By promtool's own tests of rules.
    """
    rules = CHECKOUT / "deploy/prometheus"
    assert promtool("check", "rules", rules / "alerts.yaml") == ""
    assert promtool("test", "rules", rules / "alerts_test.yaml") == ""


def test_each_alert_has_a_section_that_says_what_to_do() -> None:
    rules = (CHECKOUT / "deploy/prometheus/alerts.yaml").read_text("utf-8")
    names = re.findall(r"- alert: (\w+)", rules)
    text = (CHECKOUT / "docs/howto/alerts.rst").read_text("utf-8")
    assert re.findall(r"^(EcrProxy\w+)\n-+$", text, re.MULTILINE) == names


def test_rules_and_dashboard_speak_of_figures_that_there_are(page: str, tmp_path: Path) -> None:
    """
    A daemon has each metric that they name, and each expression of the dashboard and of the documents is valid.
    """
    rules = (CHECKOUT / "deploy/prometheus/alerts.yaml").read_text("utf-8")
    board = json.loads((CHECKOUT / "deploy/grafana/ecrproxy.json").read_text("utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [each.text for path in pages() for each in blocks(path) if each.language == "promql"]
    told = set(re.findall(r"^(\w+)", page, re.MULTILINE))
    assert named_in(rules + " ".join(asked)) - told == set()
    plain = [each.replace("$__rate_interval", "5m").replace("$instance", ".*") for each in asked]
    as_rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(plain)]
    path = tmp_path / "panels.yaml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": as_rules}]}))
    assert promtool("check", "rules", path) == ""


def test_promtool_finds_nothing_to_object_to(page: str) -> None:
    """
    After a real pull, with every existing metric.
    """
    assert promtool("check", "metrics", text=page) == ""
    assert total(page, "ecr_proxy_upstream_received_bytes_total") > 0


def test_workers_count_together(make_chain: MakeChain, docker: Docker, images: Images) -> None:
    """
    Whichever processes served the clients, one page has all their requests, and all connections.
    """
    port = free_port()
    settings = {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1", "PROXY_WORKER_PROCESSES": "2"}
    chain = make_chain(settings=settings)
    before = total(page_of(port), "ecr_proxy_requests_total")
    path = f"/v2/{images.single.repository}/manifests/{images.single.tag}"
    for _ in range(40):
        assert chain.daemon.ask(path).status == 200
    eventually(lambda: total(page_of(port), "ecr_proxy_requests_total") >= before + 40, "all are counted")
    with socket.create_connection(("127.0.0.1", chain.daemon.port)):
        eventually(lambda: total(page_of(port), "ecr_proxy_client_connections") == 1, "the connection is counted")
    eventually(lambda: total(page_of(port), "ecr_proxy_client_connections") == 0, "it is no longer")
