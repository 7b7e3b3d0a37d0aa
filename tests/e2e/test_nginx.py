"""
A daemon behind a real nginx: deploy/nginx.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry_server import noise

from .asking import answers
from .chain import Chain
from .clients import Skopeo
from .conftest import MakeChain
from .images import LAYER, Layout, layer, push
from .installing import CHECKOUT
from .processes import PATIENCE, Process, environment, free_port

RECIPE = CHECKOUT / "deploy/nginx/nginx.conf"
REPOSITORY = "team/nginx"
SIZE = 32 * 2**20
PAUSES = 4
"""Number of one-second pauses of the slow client."""


class Balanced:
    """
    A chain whose registry has an image, and nginx before its daemon.
    """

    def __init__(self, chain: Chain, home: Path) -> None:
        self.chain, self.home, self.port = chain, home, free_port()
        text = RECIPE.read_text().replace("192.0.2.1:5000", f"127.0.0.1:{chain.daemon.port}")
        text = text.replace("listen 5000", f"listen 127.0.0.1:{self.port}")
        folders = "".join(
            f"    {name}_temp_path {home}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = re.sub(r"^http \{\n", f"http {{\n    access_log off;\n{folders}", text, flags=re.MULTILINE)
        recipe = home / "nginx.conf"
        recipe.write_text(f"user root;\ndaemon off;\npid {home}/nginx.pid;\nerror_log stderr;\n{text}")
        argv: list[str | Path] = ["nginx", "-p", home, "-e", "stderr", "-c", recipe]
        self.process = Process(argv, environment(home), home / "nginx.log", home)
        self.process.wait_until(answers(f"http://127.0.0.1:{self.port}/readyz"))

    def stored(self) -> list[str]:
        """
        List the files that nginx has open in its folder for responses; it removes their names at once.
        """
        opened = []
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                opened.append(str(descriptor.readlink()))
        return [each for each in opened if each.startswith(f"{self.home}/proxy/")]


@pytest.fixture
def balanced(make_chain: MakeChain, tmp_path: Path) -> Iterator[Balanced]:
    """
    Return nginx before a daemon that drops clients that read nothing for three seconds.
    """
    made = Balanced(make_chain(settings={"PROXY_SEND_SECONDS": "3"}), tmp_path)
    yield made
    made.process.stop()


def test_layers_pass_whole_to_fast_and_slow_clients(balanced: Balanced, skopeo: Skopeo, tmp_path: Path) -> None:
    """
    With nothing on nginx's disk, in parts too; cold and from the cache.
    """
    content = layer("large", noise("large", SIZE))
    layout = Layout(tmp_path / "layout")
    push(skopeo, layout.finish(layout.image("amd64", [(LAYER, content)])), f"{balanced.chain.plain}/{REPOSITORY}:1")
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    for copy in ("cold", "cached"):
        source = f"docker://127.0.0.1:{balanced.port}/{REPOSITORY}:1"
        skopeo.copy(source, f"oci:{tmp_path}/{copy}", "--src-tls-verify=false")
    connection = http.client.HTTPConnection("127.0.0.1", balanced.port, timeout=PATIENCE)
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    connection.request("GET", path)
    response = connection.getresponse()
    got = b""
    for _ in range(PAUSES):
        got += response.read(len(content) // (2 * PAUSES))
        time.sleep(1)
        assert balanced.stored() == []
    assert got + response.read() == content
    connection.request("GET", path, headers={"Range": "bytes=1000-"})
    response = connection.getresponse()
    assert (response.status, response.read() == content[1000:]) == (206, True)
    assert response.getheader("Docker-Content-Digest") == digest
    connection.close()
