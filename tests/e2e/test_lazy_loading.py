"""
SOCI, the lazy loader of AWS: a container starts before its image is there.

Its first request for a layer is C{bytes=0-1}, and nothing goes on before that is answered.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .certificates import PROXY
from .clients import Skopeo
from .conftest import MakeChain
from .images import Layout, push, zipped
from .processes import Process, environment
from .sid import Sid

REPOSITORY = "team/lazy"
SIZE = 12 * 2**20
RATE = 200_000
"""Bytes per second and bucket connection: the layer takes much longer than the parts that SOCI needs."""

SOCI = """
mkdir -p /data/containerd /data/soci /run/containerd /run/soci-snapshotter-grpc /etc/soci-snapshotter-grpc
cat > /etc/containerd/config.toml <<END
version = 3
root = "/data/containerd"
state = "/run/c"
[grpc]
address = "/run/containerd/containerd.sock"
[proxy_plugins.soci]
type = "snapshot"
address = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
END
cat > /etc/soci-snapshotter-grpc/config.toml <<END
no_prometheus = true
[resolver.host."$PLACE"]
mirrors = [{host = "$PLACE", insecure = true}]
END
soci-snapshotter-grpc --root /data/soci & snapshotter=$!
containerd & containerd=$!
trap 'kill $snapshotter $containerd; wait' EXIT
trap 'exit 1' TERM
until ctr version > /dev/null 2>&1; do sleep 0.1; done
ctr images pull --plain-http "$REGISTRY/$REPOSITORY:1"
soci create --min-layer-size 0 --span-size 65536 "$REGISTRY/$REPOSITORY:1"
soci push --plain-http "$REGISTRY/$REPOSITORY:1"
soci image rpull --plain-http --soci-index-digest "$(soci index list -q | head -n 1)" "$PLACE/$REPOSITORY:1"
ctr snapshots --snapshotter soci prepare started "$(ctr snapshots --snapshotter soci list | tail -n 1 | cut -d' ' -f1)"
mkdir /mnt/started
ctr snapshots --snapshotter soci mounts /mnt/started started | sh
touch pulled
head -c "$HEAD" /mnt/started/file | sha256sum > read
umount /mnt/started
"""


def test_a_container_reads_files_of_a_layer_that_is_not_there_yet(
    make_chain: MakeChain, sid: Sid, home: Path, tmp_path: Path, skopeo: Skopeo
) -> None:
    """
    Through the proxy, which requests the wanted ranges from the bucket first.
    """
    chain = make_chain(front=("--rate", str(RATE)))
    content = os.urandom(SIZE)
    layout = Layout(tmp_path / "layout")
    top = layout.image("amd64", [zipped("file", content)])
    push(skopeo, layout.finish(top), f"{chain.plain}/{REPOSITORY}:1")
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "hosts").write_text(f"127.0.0.1 localhost {PROXY}\n")  # SOCI uses TLS for localhost
    head = 200_000
    given = {
        "PLACE": f"{PROXY}:{chain.daemon.port}",
        "REGISTRY": chain.plain,
        "REPOSITORY": REPOSITORY,
        "HEAD": str(head),
    }
    argv = sid.inside(tmp_path, ["sh", "-exc", SOCI], etc)
    soci = Process(argv, environment(tmp_path, given), tmp_path / "soci.log", tmp_path)
    try:
        soci.wait_until((tmp_path / "pulled").exists)
        # else SOCI timed out, and would fetch the whole layer first
        assert "remote snapshot successfully prepared" in soci.output.read_text()
        assert soci.wait() == 0, soci.tail()
    finally:
        soci.stop()
    assert (tmp_path / "read").read_text().split()[0] == hashlib.sha256(content[:head]).hexdigest()
