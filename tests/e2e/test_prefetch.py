"""
C{ecr-proxy prefetch} through the real daemon: its images are served with everything behind the daemon gone.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from .chain import Chain
from .clients import Client, Done
from .conftest import MakeChain
from .images import PLATFORMS, Images
from .processes import Process, environment, eventually


def prefetch(chain: Chain, home: Path, *arguments: str | Path, **variables: str) -> Done:
    """
    Run the command as an operator does, beside the daemon, with its variables.
    """
    return Client(home, chain.daemon.variables | variables).attempt(chain.command, "prefetch", *arguments)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_was_prefetched_is_pulled_with_ecr_away(
    make_chain: MakeChain, images: Images, tmp_path: Path, scheme: str
) -> None:
    """
    Over HTTP and over TLS: the daemon's own settings give its address and its certificate.
    """
    chain = make_chain(tls=scheme == "https")
    done = prefetch(chain, tmp_path, f"{images.single.repository}@{images.single.digest}")
    assert done.status == 0, done
    assert "1 image, 0 failed" in done.output
    chain.daemon.settle()
    chain.cut()
    manifest = f"/v2/{images.single.repository}/manifests/{images.single.digest}"
    reply = chain.daemon.ask(manifest)
    assert reply.status == 200
    listed = [reply.json()["config"], *reply.json()["layers"]]
    statuses = [chain.daemon.ask(f"/v2/{images.single.repository}/blobs/{each['digest']}").status for each in listed]
    assert statuses == [200] * len(listed)


def test_a_manifests_images_come_for_one_platform_or_for_all(
    make_chain: MakeChain, images: Images, tmp_path: Path
) -> None:
    """
    A Kubernetes manifest names them; cached content is not transferred again.
    """
    chain = make_chain()
    host = chain.front_url.removeprefix("http://")
    file = tmp_path / "deploy.yaml"
    file.write_text(
        "kind: Deployment\nspec:\n  template:\n    spec:\n      containers:\n"
        f"      - image: {host}/{images.multi.repository}:{images.multi.tag}\n      - image: nginx:1\n"
    )
    done = prefetch(chain, tmp_path, "--manifest", file, "--platform", f"linux/{PLATFORMS[-1]}", "--json")
    assert done.status == 0, done
    assert "nginx:1: skipped" in done.complaint
    first = json.loads(done.output)["images"][0]
    assert first["brought"] > 0
    chain.daemon.settle()
    again = json.loads(prefetch(chain, tmp_path, "--manifest", file, "--all-platforms", "--json").output)["images"][0]
    assert again["there"] >= first["brought"]
    assert again["brought"] > 0
    chain.daemon.settle()
    last = json.loads(prefetch(chain, tmp_path, "--manifest", file, "--all-platforms", "--json").output)["images"][0]
    assert last["brought"] == 0


def test_an_interrupted_run_goes_on_with_the_next(
    make_chain: MakeChain, images: Images, hold: Path, tmp_path: Path
) -> None:
    """
    Ctrl-C ends it at once, with the status for that; the next run fetches what is missing.
    """
    chain = make_chain(front=("--hold", str(hold)))
    name = f"{images.big.repository}:{images.big.tag}"
    argv: list[str | Path] = [chain.command, "prefetch", name]
    run = Process(argv, environment(tmp_path, chain.daemon.variables), tmp_path / "prefetch.log", tmp_path)
    try:
        eventually(lambda: bool(chain.daemon.arriving()), "something arrives")
        run.send(signal.SIGINT)
        assert run.wait() == 130
        assert "Traceback" not in run.tail()
    finally:
        run.stop()
    hold.unlink()
    done = prefetch(chain, tmp_path, name)
    assert done.status == 0, done
    assert chain.daemon.ask(f"/v2/{images.big.repository}/manifests/{images.big.tag}").status == 200


def test_a_daemon_that_is_restarted_meanwhile_is_waited_for(
    make_chain: MakeChain, images: Images, hold: Path, tmp_path: Path
) -> None:
    """
    A broken transfer is resumed where it was, and the image is complete in the end.
    """
    chain = make_chain(front=("--hold", str(hold)))
    argv: list[str | Path] = [chain.command, "prefetch", f"{images.big.repository}:{images.big.tag}"]
    run = Process(argv, environment(tmp_path, chain.daemon.variables), tmp_path / "prefetch.log", tmp_path)
    try:
        layer = images.big.layers[0].removeprefix("sha256:")
        eventually(lambda: any(layer in each.name for each in chain.daemon.arriving()), "the layer arrives")
        chain.daemon.process.kill()
        hold.unlink()
        chain.daemon.restart()
        assert run.wait() == 0, run.tail()
    finally:
        run.stop()
    assert "again in" in run.tail()
    assert chain.daemon.wrong_content() == []


def test_one_image_that_is_missing_is_told(make_chain: MakeChain, images: Images, tmp_path: Path) -> None:
    """
    The others are fetched, and the exit status reports the failure.
    """
    chain = make_chain()
    done = prefetch(chain, tmp_path, "team/none:1", f"{images.single.repository}:{images.single.tag}")
    assert done.status == 1
    assert "2 images, 1 failed" in done.output
    assert "failed: team/none:1:" in done.output
    assert "Traceback" not in done.complaint
