"""
Wrong settings end the daemon at once, with one line that says which and why.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from .certificates import make_certificates
from .chain import Equipment, standard_settings
from .conftest import MakeChain
from .processes import PATIENCE, environment, free_port

Settings = Mapping[str, str | None]


def start_wrong(equipment: Equipment, home: Path, settings: Settings) -> str:
    """
    Start the daemon with wrong settings, and return its one error, which comes after warnings.
    """
    nowhere = f"http://127.0.0.1:{free_port()}"
    usual = {"PROXY_PORT": str(free_port()), "PROXY_CACHE_DIR": str(home / "cache")}
    wanted = standard_settings(nowhere) | usual | dict(settings)
    given = {name: value for name, value in wanted.items() if value is not None}
    done = subprocess.run(
        [str(equipment.twistd), "-n", "--pidfile=", "ecr-proxy"],
        env=environment(home, given),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode != 0, done
    assert "Traceback" not in done.stdout + done.stderr
    *warnings, last = done.stderr.strip().splitlines()
    assert all(each.startswith("ecr-proxy: warning: ") for each in warnings), done
    return last


WRONG: dict[str, tuple[Settings, str, str]] = {
    "no endpoint": ({"PROXY_ECR_ENDPOINT": None}, "PROXY_ECR_ENDPOINT", ""),
    "malformed endpoint": ({"PROXY_ECR_ENDPOINT": "ftp://x"}, "PROXY_ECR_ENDPOINT", "ftp://x"),
    "no region": ({"AWS_REGION": None}, "AWS_REGION", ""),
    "malformed region": ({"AWS_REGION": "eu west"}, "AWS_REGION", "eu west"),
    "bad size": ({"PROXY_CACHE_LIMIT": "64 parsecs"}, "PROXY_CACHE_LIMIT", "64 parsecs"),
    "bad pattern": ({"PROXY_NAMESPACE_PATTERN": "(a"}, "PROXY_NAMESPACE_PATTERN", "(a"),
    "bad cache key": ({"PROXY_CACHE_KEY": "$nonsense"}, "PROXY_CACHE_KEY", "$nonsense"),
    "bad port": ({"PROXY_PORT": "70000"}, "PROXY_PORT", "70000"),
    "bad resolver": ({"PROXY_DNS_RESOLVER": "dns.example"}, "PROXY_DNS_RESOLVER", "dns.example"),
    "bad tag life": ({"PROXY_TAG_TTL": "soon"}, "PROXY_TAG_TTL", "soon"),
    "bad endpoint string": ({"PROXY_LISTEN": "carrier:pigeon"}, "PROXY_LISTEN", "carrier:pigeon"),
    "misspelt variable": ({"PROXY_NAMESPACE_PATERN": "team/.*"}, "PROXY_NAMESPACE_PATTERN", ""),
    "open admin port": ({"PROXY_ADMIN_LISTEN": "tcp:15101"}, "PROXY_ADMIN_LISTEN", "interface=127.0.0.1"),
    "another registry": ({"PROXY_ECR_ENDPOINT": "docker.io"}, "PROXY_ECR_ENDPOINT", "docker.io"),
    "traces without the extra": (
        {"PROXY_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
        "PROXY_OTLP_ENDPOINT",
        "pip install 'ecrproxy[otel]'",
    ),
    "cache that can't be": ({"PROXY_CACHE_DIR": "/dev/null/x"}, "PROXY_CACHE_DIR", "/dev/null/x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_complaint_names_the_setting(equipment: Equipment, tmp_path: Path, case: str) -> None:
    """
    One line on stderr: the variable, its value, and no traceback.
    """
    settings, variable, value = WRONG[case]
    complaint = start_wrong(equipment, tmp_path, settings)
    assert variable in complaint
    assert value in complaint


@pytest.mark.parametrize("alone", ["PROXY_SSL_KEY", "PROXY_SSL_CERTIFICATE"])
def test_key_and_certificate_belong_together(equipment: Equipment, tmp_path: Path, alone: str) -> None:
    """
    One without the other does not mean plain HTTP.
    """
    made = equipment.certificates
    path = made.key if alone == "PROXY_SSL_KEY" else made.chain
    complaint = start_wrong(equipment, tmp_path, {alone: str(path)})
    assert "PROXY_SSL_KEY" in complaint
    assert "PROXY_SSL_CERTIFICATE" in complaint


def test_a_key_of_another_certificate_is_refused(equipment: Equipment, tmp_path: Path) -> None:
    """
    A pair that does not match is found at the start, not by the first client.
    """
    other = make_certificates(tmp_path / "other")
    pair = {
        "PROXY_SSL_KEY": str(other.key),
        "PROXY_SSL_CERTIFICATE": str(equipment.certificates.chain),
    }
    assert "PROXY_SSL_" in start_wrong(equipment, tmp_path, pair)


def test_a_port_in_use_is_named(make_chain: MakeChain, equipment: Equipment, tmp_path: Path) -> None:
    """
    The daemon does not go on without a listener.
    """
    chain = make_chain()
    settings = standard_settings(chain.front_url)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        complaint = start_wrong(equipment, tmp_path, settings | {"PROXY_PORT": port})
    assert "PROXY_PORT" in complaint
    assert port in complaint


def test_no_credentials_at_all_are_named(make_chain: MakeChain, equipment: Equipment, tmp_path: Path) -> None:
    """
    If botocore finds none anywhere, waiting would not help.
    """
    settings = standard_settings(make_chain().front_url)
    none: Settings = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    complaint = start_wrong(equipment, tmp_path, settings | dict(none))
    assert "AWS credentials" in complaint


def test_refused_credentials_are_named(equipment: Equipment, tmp_path: Path, refusing: str) -> None:
    """
    What AWS rejects for good does not get better by retrying.
    """
    complaint = start_wrong(equipment, tmp_path, standard_settings(refusing))
    assert "AWS credentials" in complaint
    assert "not-a-secret" not in complaint


def test_a_front_that_is_away_is_not_fatal(make_chain: MakeChain) -> None:
    """
    AWS being down is no wrong setting: the daemon stays, and says that it is not ready.
    """
    chain = make_chain()
    chain.cut()
    chain.daemon.process.stop()
    chain.daemon.process = chain.daemon.start()
    chain.daemon.process.wait_until(lambda: chain.daemon.answers("/readyz", 503))
    assert chain.daemon.answers("/_health", 200)
