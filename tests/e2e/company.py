"""
A company's registries: two accounts of ECR, one like ECR Public, and one of the distribution project.

C{python -m tests.e2e.company NAME} runs one of the first three as a program: it answers as
L{tests.registry} does. The fourth is Debian's, whose tokens L{TokenService} issues.
"""

from __future__ import annotations

import argparse
import base64
import datetime as dt
import json
import platform
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from twisted.web.server import Site

from tests.registry import StandIn
from tests.registry_content import Image, Shelves, layer
from tests.registry_server import LOCAL, noise

from .certificates import LIFE, name
from .images import MACHINES

EU: Final = "111122223333.dkr.ecr.eu-west-1.amazonaws.com"
US: Final = "444455556666.dkr.ecr.us-east-1.amazonaws.com"
PUBLIC: Final = "public.ecr.aws"
HUB: Final = "docker.io"
TAGS: Final = ("1", "2")
SHARED: Final = layer("shared", noise("shared", 8 * 2**20))
"""A layer that EU, US and PUBLIC have."""
LOGIN: Final = ("pulls", "not-a-secret")
"""The account that gets tokens for HUB."""


def fill(shelves: Shelves, registry: str) -> Mapping[str, Image]:
    """
    Push images with the same name in all registries, but different content.

    @return: for each tag.
    """
    return {
        tag: shelves.push_image(
            "team/app",
            tag,
            layers=[SHARED, layer("own", f"{registry} {tag}".encode())],
            platform=f"linux/{MACHINES[platform.machine()]}",
        )
        for tag in TAGS
    }


class TokenService:
    """
    Issues tokens as in distribution's "Token Authentication Specification", for clients that send L{LOGIN}.

    @param home: where its certificate goes, which the registry trusts.
    """

    def __init__(self, home: Path) -> None:
        self._key = generate_private_key(65537, 2048)
        now = dt.datetime.now(dt.UTC)
        self._certificate = (
            x509.CertificateBuilder(name("tokens"), name("tokens"), self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - LIFE)
            .not_valid_after(now + LIFE)
            .sign(self._key, SHA256())
        )
        self._bundle = home / "tokens.pem"
        self._bundle.write_bytes(self._certificate.public_bytes(Encoding.PEM))
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = service.answer(self.path, self.headers.get("Authorization"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOCAL, 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def auth(self) -> str:
        """
        Return its section of the registry's configuration file.
        """
        realm = f"http://{LOCAL}:{self._server.server_port}/token"
        said = {"realm": realm, "service": "hub.example", "issuer": "tokens", "rootcertbundle": str(self._bundle)}
        return json.dumps({"auth": {"token": said}})[1:-1] + "\n"  # YAML has JSON's braces

    def answer(self, target: str, authorization: str | None) -> tuple[int, bytes]:
        """
        Answer one request.
        """
        if authorization != "Basic " + base64.b64encode(":".join(LOGIN).encode()).decode():
            return 401, b"{}"
        query = parse_qs(urlsplit(target).query)
        kind, repository, actions = query["scope"][0].split(":")
        access = {"type": kind, "name": repository, "actions": actions.split(",")}
        now = int(time.time())
        claims = {
            "iss": "tokens",
            "sub": LOGIN[0],
            "aud": query["service"][0],
            "jti": "1",
            "access": [access],
            "iat": now,
            "nbf": now - 60,
            "exp": now + 300,
        }
        chain = [base64.b64encode(self._certificate.public_bytes(Encoding.DER)).decode()]
        said = b".".join(_written(each) for each in ({"typ": "JWT", "alg": "RS256", "x5c": chain}, claims))
        token = said + b"." + _encoded(self._key.sign(said, PKCS1v15(), SHA256()))
        return 200, json.dumps({"token": token.decode(), "expires_in": 300}).encode()

    def stop(self) -> None:
        """
        Stop serving.
        """
        self._server.shutdown()
        self._server.server_close()


def _written(claims: Mapping[str, object]) -> bytes:
    return _encoded(json.dumps(claims).encode())


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def main() -> None:
    """
    Run one registry until stopped.
    """
    from twisted.internet import reactor as installed

    reactor: Any = installed
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.company", description=__doc__)
    parser.add_argument("registry", choices=[EU, US, PUBLIC])
    for option in ("--port", "--bucket-port", "--realm-port"):
        parser.add_argument(option, type=int, required=True)
    options = parser.parse_args()
    registry, bucket, realm = (
        f"http://{LOCAL}:{each}" for each in (options.port, options.bucket_port, options.realm_port)
    )
    if options.registry == PUBLIC:
        standin = StandIn(reactor, registry=registry, bucket=bucket, realm=f"{realm}/token/")
        standin.bearers.public, standin.quirks.blob_head = True, 401
    else:
        standin = StandIn(reactor, registry=registry, bucket=bucket)
        # The token that moto issues for this account.
        standin.tokens.take(base64.b64encode(f"AWS:{options.registry[:12]}-auth-token".encode()).decode())
    fill(standin, options.registry)
    for port in (options.port, options.bucket_port, options.realm_port):
        reactor.listenTCP(port, cast("Any", Site)(standin.resource), interface=LOCAL)
    reactor.run()


if __name__ == "__main__":
    main()
