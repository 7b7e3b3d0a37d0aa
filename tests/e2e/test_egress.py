"""
A registry and a bucket that only an egress proxy reaches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .asking import ask
from .certificates import PROXY, Certificates, make_certificates
from .chain import Daemon, Equipment
from .installing import CHECKOUT
from .processes import PATH, PATIENCE, Process, environment

LOGIN = "ann:a secret & more"
ESCAPED = "ann:a%20secret%20%26%20more"


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "certificates")


@pytest.fixture
def outside(tmp_path: Path, certificates: Certificates) -> Iterator[dict[str, Any]]:
    """
    Start the proxy, with registry and bucket behind it.
    """
    output = tmp_path / "egress.log"
    argv: list[str | Path] = [
        *(sys.executable, "-m", "tests.e2e.egress", "--login", LOGIN),
        *("--key", certificates.key, "--chain", certificates.chain),
    ]
    process = Process(argv, environment(tmp_path), output, CHECKOUT)
    try:
        process.wait_until(lambda: b"\n" in output.read_bytes())
        yield json.loads(output.read_text().splitlines()[0])
    finally:
        process.stop()


def settings(outside: dict[str, Any], certificates: Certificates, login: str = ESCAPED) -> dict[str, str | None]:
    return {
        "PROXY_ECR_ENDPOINT": f"https://{PROXY}",
        "PROXY_DNS_RESOLVER": "system",
        "PROXY_ADMIN_LISTEN": "off",
        "HTTPS_PROXY": f"http://{login}@{outside['proxy']}",
        "NO_PROXY": "169.254.0.0/16,.internal",
        "SSL_CERT_FILE": str(certificates.ca),
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_ENDPOINT_URL": outside["api"],
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def test_an_image_comes_through_the_proxy(
    outside: dict[str, Any], certificates: Certificates, twistd: Path, tmp_path: Path
) -> None:
    daemon = Daemon(
        Equipment(tmp_path, twistd, tmp_path, certificates), tmp_path / "daemon", settings(outside, certificates)
    )
    try:
        daemon.wait()
        manifest = ask(f"{daemon.url}/v2/demo/app/manifests/latest")
        assert manifest.status == 200, manifest.body
        for layer in manifest.json()["layers"]:
            blob = ask(f"{daemon.url}/v2/demo/app/blobs/{layer['digest']}")
            assert (blob.status, len(blob.body)) == (200, layer["size"])
        doctor = subprocess.run(
            [twistd.with_name("ecr-proxy"), "doctor", "--repository", "demo/app:latest", "--json"],
            env={**environment(tmp_path), **daemon.variables, "PATH": f"{twistd.parent}:{PATH}"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        daemon.process.stop()
    verdicts = {each["check"]: each["verdict"] for each in json.loads(doctor.stdout)["findings"]}
    for check in ("resolver", "registry", "login", "bucket", "ecr:GetDownloadUrlForLayer"):
        assert verdicts[check] in ("ok", "warning"), doctor.stdout
    said = (tmp_path / "daemon" / "daemon.log").read_text() + doctor.stdout + doctor.stderr
    assert "through the egress proxy" in said
    for secret in (LOGIN, ESCAPED, "secret%20", "a secret"):
        assert secret not in said


def test_a_wrong_password_is_told_as_that(
    outside: dict[str, Any], certificates: Certificates, twistd: Path, tmp_path: Path
) -> None:
    wrong = settings(outside, certificates, "ann:hidden")
    daemon = Daemon(Equipment(tmp_path, twistd, tmp_path, certificates), tmp_path / "daemon", wrong)
    try:
        daemon.wait()
        manifest = ask(f"{daemon.url}/v2/demo/app/manifests/latest")
    finally:
        daemon.process.stop()
    assert manifest.status == 502
    assert b"asks for another name or password (407)" in manifest.body
    assert "hidden" not in (tmp_path / "daemon" / "daemon.log").read_text() + manifest.body.decode()
