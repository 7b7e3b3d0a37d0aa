"""
What Prometheus is given, judged by Prometheus' own tool.
"""

from __future__ import annotations

import re
import subprocess

from .asking import ask
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .processes import eventually, free_port


def page_of(port: int) -> str:
    """
    Fetch the figures.
    """
    return ask(f"http://127.0.0.1:{port}/metrics").body.decode()


def total(page: str, name: str) -> float:
    """
    Add up a figure over all its labels.
    """
    return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)))


def test_promtool_finds_nothing_to_object_to(make_chain: MakeChain, docker: Docker, images: Images) -> None:
    """
    After a real pull, with every figure that there is.
    """
    port = free_port()
    chain = make_chain(settings={"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    docker.pull(f"{chain.daemon.address}/{images.single.repository}:{images.single.tag}")
    page = page_of(port)
    judged = subprocess.run(
        ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=30, check=False
    )
    assert (judged.returncode, judged.stderr) == (0, "")
    assert total(page, "ecr_proxy_upstream_received_bytes_total") >= chain.counters()["bucket"]["bytes"] > 0


def test_workers_count_together(make_chain: MakeChain, docker: Docker, images: Images) -> None:
    """
    Whichever processes clients came to, one page tells of all their requests.
    """
    port = free_port()
    settings = {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1", "PROXY_WORKER_PROCESSES": "2"}
    chain = make_chain(settings=settings)
    before = total(page_of(port), "ecr_proxy_requests_total")
    path = f"/v2/{images.single.repository}/manifests/{images.single.tag}"
    for _ in range(40):
        assert chain.daemon.ask(path).status == 200
    eventually(lambda: total(page_of(port), "ecr_proxy_requests_total") >= before + 40, "all are counted")
