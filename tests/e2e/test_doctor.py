"""
C{ecr-proxy doctor} beside a real daemon, with moto for STS, and with many faults.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from twisted.names.dns import A, Message, Record_A, RRHeader

from .certificates import make_certificates
from .chain import Chain, Equipment, standard_settings
from .clients import Client
from .conftest import MakeChain
from .images import Images
from .processes import Process, free_port
from .test_moto import moto

__all__ = ["moto"]  # a fixture

OUTCOMES = ("as documented: ", "otherwise: ", "defect: ", "not seen: ")
SECRETS = ("not-a-secret", "X-Amz-", "QVdTO")  # a key, a presigned query, and how a token begins


def examine(
    chain: Chain, home: Path, *arguments: str, status: int = -1, variables: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """
    Run the command with the daemon's variables and others, and return its findings by check.

    C{status} is the command's expected exit status.
    """
    client = Client(home, chain.daemon.variables | dict(variables or {}))
    done = client.attempt(chain.command, "doctor", "--json", *arguments)
    assert "Traceback" not in done.complaint, done
    assert all(secret not in done.output + done.complaint for secret in SECRETS), done
    told: list[dict[str, str]] = json.loads(done.output)["findings"]
    assert status in (-1, done.status), done
    # Of several findings of a check, the worst.
    order = ("ok", "skipped", "warning", "failed")
    return {each["check"]: each for each in sorted(told, key=lambda each: order.index(each["verdict"]))}


def test_a_daemon_that_works_is_found_well(
    make_chain: MakeChain, images: Images, moto: tuple[Process, str], tmp_path: Path
) -> None:
    """
    Credentials, identity, token, each permission, the bucket, the directory and the daemon itself.
    """
    chain = make_chain()
    aws = {"AWS_ENDPOINT_URL_STS": moto[1], "AWS_ENDPOINT_URL_IAM": moto[1]}
    image = f"{images.single.repository}:{images.single.tag}"
    found = examine(chain, tmp_path, "--repository", image, status=0, variables=aws)
    well = {name for name, each in found.items() if each["verdict"] == "ok"}
    assert well >= {
        *("credentials", "identity", "token", "resolver", "login", "clock", "cache", "port"),
        *("ecr:ListImages", "ecr:BatchGetImage", "ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer"),
    }, found
    assert "arn:aws:sts::" in found["identity"]["said"]
    assert "the daemon is at tcp:" in found["port"]["said"]
    # A stand-in without TLS is no place for a token.
    assert found["registry"]["verdict"] == "warning"
    assert found["bucket"]["verdict"] == "warning"


def test_what_the_daemon_assumes_of_ecr_is_held_against_an_image(
    make_chain: MakeChain, images: Images, tmp_path: Path
) -> None:
    """
    Over real connections; the stand-in does nothing that the daemon would not cope with.
    """
    chain, file = make_chain(), tmp_path / "report.txt"
    image = f"{images.single.repository}:{images.single.tag}"
    found = examine(chain, tmp_path, "--image", image, "--report", str(file))
    judged = {name: each for name, each in found.items() if each["said"].startswith(OUTCOMES)}
    assert len(judged) > 25, found
    assert {"ok"} == {judged[name]["verdict"] for name in ("manifest-head", "manifest-by-digest", "bucket-range")}, (
        judged
    )
    assert not [each for each in judged.values() if each["verdict"] == "failed"], judged
    text = file.read_text()
    assert all(name in text for name in judged)
    for hidden in (*SECRETS, images.single.repository, "127.0.0.1", "sha256:"):
        assert hidden not in text


def test_refused_credentials_fail(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    The other checks still run.
    """
    chain = make_chain(front=("--refuse-credentials",), wait=False)
    found = examine(chain, tmp_path, status=1)
    assert found["token"]["verdict"] == "failed"
    assert "UnrecognizedClientException" in found["token"]["said"]
    assert found["login"]["verdict"] == "skipped"
    assert found["cache"]["verdict"] == "ok"


def test_an_aws_and_a_registry_that_are_away_fail(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    Each by itself, and within the given time.
    """
    chain = make_chain()
    chain.cut()
    found = examine(chain, tmp_path, "--seconds", "60", status=1)
    assert found["token"]["verdict"] == "failed"
    assert found["registry"]["verdict"] == "failed"
    assert "Connection refused" in found["registry"]["said"]
    assert found["clock"]["verdict"] == "skipped"


def test_an_aws_and_a_registry_that_are_silent_fail(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    They accept connections, and never answer: each check times out by itself, before the whole run would.
    """
    chain = make_chain()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        there = {"PROXY_ECR_ENDPOINT": url, "AWS_ENDPOINT_URL": url}
        found = examine(chain, tmp_path, "--seconds", "300", status=1, variables=there)
    assert "does not answer" in found["token"]["said"]
    assert "does not answer" in found["registry"]["said"]
    assert found["cache"]["verdict"] == "ok"


def test_no_credentials_fail(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    With advice; an empty variable counts as unset.
    """
    chain = make_chain()
    found = examine(chain, tmp_path, status=1, variables={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    assert found["credentials"]["verdict"] == "failed"
    assert "attach a role" in found["credentials"]["advice"]
    assert found["identity"]["verdict"] == "skipped"


class Web(BaseHTTPRequestHandler):
    """
    Answers everything with 401, and a PUT not at all.
    """

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self) -> None:
        with contextlib.suppress(OSError):
            self.rfile.read(1)  # until the client has timed out

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """
    Serve, with TLS or without, and return the port.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


TLS: dict[str, tuple[str, bool, dt.timedelta, str, str]] = {
    # host, whether the CA is trusted, how long the certificate is valid; verdict and words
    "trusted": ("127.0.0.1", True, dt.timedelta(days=90), "ok", "certificate of 'Test CA'"),
    "ends soon": ("127.0.0.1", True, dt.timedelta(days=2), "warning", "ends in 2.0 days"),
    "unknown CA": ("127.0.0.1", False, dt.timedelta(days=90), "failed", "signed by 'Test CA'"),
    "another name": ("localhost", True, dt.timedelta(days=90), "failed", "shows a certificate for 127.0.0.1"),
    "expired": ("127.0.0.1", True, dt.timedelta(days=-1), "failed", "has ended, by 1.0 days"),
}


@pytest.mark.parametrize("case", TLS)
def test_a_registrys_certificate_is_judged(make_chain: MakeChain, tmp_path: Path, case: str) -> None:
    """
    Its issuer, its names, and its expiry.
    """
    host, trusted, life, verdict, words = TLS[case]
    made = make_certificates(tmp_path / "certificates", life)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.chain, made.key)
    chain = make_chain()
    trust = {"SSL_CERT_FILE": str(made.ca)} if trusted else {}
    with serving(context) as port:
        found = examine(chain, tmp_path, variables={"PROXY_ECR_ENDPOINT": f"https://{host}:{port}", **trust})
    assert found["registry"]["verdict"] == verdict, found["registry"]
    assert words in found["registry"]["said"]


def test_what_is_no_tls_is_told(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    Not as a network that is down.
    """
    with serving() as port:
        there = {"PROXY_ECR_ENDPOINT": f"https://127.0.0.1:{port}"}
        found = examine(make_chain(), tmp_path, status=1, variables=there)
    assert "no TLS" in found["registry"]["said"]


def test_a_hop_limit_that_is_too_small_is_seen(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    The service answers, but issues no session: as it looks from within a container.
    """
    chain = make_chain()
    with serving() as port:
        place = f"http://127.0.0.1:{port}"
        variables = {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": place}
        found = examine(chain, tmp_path, variables=variables)
        assert found["metadata"]["verdict"] == "warning"
        assert "hop-limit 2" in found["metadata"]["advice"]
        found = examine(chain, tmp_path, status=1, variables=variables | {"AWS_INSTANCE_AUTH": "true"})
        assert found["metadata"]["verdict"] == "failed"
        assert found["credentials"]["verdict"] == "failed"


@contextlib.contextmanager
def name_server() -> Iterator[int]:
    """
    Answer each query for an address with the loopback one, and return the port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.bind(("127.0.0.1", 0))

        def work() -> None:
            with contextlib.suppress(OSError):
                while True:
                    question, client = asked.recvfrom(4096)
                    heard, told = Message(), Message(answer=1)
                    heard.fromStr(question)
                    told.id, told.queries = heard.id, heard.queries
                    told.answers = [
                        RRHeader(each.name.name, A, payload=Record_A("127.0.0.1"))
                        for each in heard.queries
                        if each.type == A
                    ]
                    asked.sendto(told.toStr(), client)

        Thread(target=work, daemon=True).start()
        yield asked.getsockname()[1]


def test_chosen_name_servers_are_asked(make_chain: MakeChain, tmp_path: Path) -> None:
    """
    One that answers leads to the registry; one that does not is reported.
    """
    chain = make_chain()
    endpoint = f"http://registry.test:{chain.front_url.rpartition(':')[2]}"
    with name_server() as port:
        server = f"127.0.0.1:{port}"
        found = examine(chain, tmp_path, variables={"PROXY_ECR_ENDPOINT": endpoint, "PROXY_DNS_RESOLVER": server})
    assert found["resolver"]["said"] == f"{server} finds registry.test at 127.0.0.1"
    assert found["login"]["verdict"] == "ok"
    nobody = f"127.0.0.1:{free_port()}"
    found = examine(chain, tmp_path, variables={"PROXY_ECR_ENDPOINT": endpoint, "PROXY_DNS_RESOLVER": nobody})
    assert found["resolver"]["verdict"] == "warning"
    assert found["login"]["verdict"] == "skipped"


def test_a_port_and_a_directory_that_can_not_be_had_fail(
    make_chain: MakeChain, equipment: Equipment, tmp_path: Path
) -> None:
    """
    Before the daemon is started, and without a trace.
    """
    chain = make_chain()
    with serving() as port:
        found = examine(
            chain, tmp_path, status=1, variables={"PROXY_PORT": str(port), "PROXY_CACHE_DIR": "/dev/null/x"}
        )
    assert "something else is at" in found["port"]["said"]
    assert found["cache"]["verdict"] == "failed"
    absent = tmp_path / "absent"
    examine(chain, tmp_path, variables={"PROXY_CACHE_DIR": str(absent)})
    assert not absent.exists()


def test_a_wrong_setting_is_one_line(equipment: Equipment, tmp_path: Path) -> None:
    """
    The daemon's own, with the status for usage errors.
    """
    settings = standard_settings("http://127.0.0.1:9") | {"PROXY_CACHE_LIMIT": "much"}
    given = {name: value for name, value in settings.items() if value is not None}
    done = Client(tmp_path, given).attempt(equipment.twistd.with_name("ecr-proxy"), "doctor")
    assert done.status == 2
    assert done.complaint.count("\n") == 1
    assert "PROXY_CACHE_LIMIT" in done.complaint
