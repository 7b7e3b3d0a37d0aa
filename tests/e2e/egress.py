"""
An egress proxy with a registry and a bucket that only it reaches: C{python -m tests.e2e.egress}.

Both are called C{proxy.example}, which no name server has, and use TLS. A line of JSON says when all is ready.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any, cast

from OpenSSL import crypto
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import CertificateOptions
from twisted.python.failure import Failure
from twisted.web.pages import notFound
from twisted.web.server import Site

from tests.registry import StandIn
from tests.registry_server import LOCAL, push_samples

from .certificates import PROXY

PORTS = {"registry": 443, "bucket": 8443}


class _Behind(Protocol):
    """
    The proxy's connection to a host.
    """

    front: Any = None

    def dataReceived(self, data: bytes) -> None:
        self.front.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.front.transport.loseConnection()


class Egress(Protocol):
    """
    A client's connection to the proxy.
    """

    factory: EgressFactory

    def connectionMade(self) -> None:
        self._head = b""
        self._behind: Any = None

    def dataReceived(self, data: bytes) -> None:
        if self._behind is not None:
            self._behind.transport.write(data)
            return
        self._head += data
        if self._head.endswith(b"\r\n\r\n"):
            status, port = self.factory.judge(self._head.decode())
            if port:
                endpoint = TCP4ClientEndpoint(self.factory.reactor, LOCAL, port)
                endpoint.connect(Factory.forProtocol(_Behind)).addCallback(self._connected)
            else:
                self._say(status)
                cast("Any", self.transport).loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._behind is not None:
            self._behind.transport.loseConnection()

    def _connected(self, behind: Any) -> None:
        behind.front = self
        self._behind = behind
        self._say("200 Connection established")

    def _say(self, status: str) -> None:
        cast("Any", self.transport).write(f"HTTP/1.1 {status}\r\n\r\n".encode())


class EgressFactory(Factory):
    """
    The proxy: where it connects to, and for which clients.
    """

    protocol: Any = Egress

    def __init__(self, reactor: Any, login: str, places: dict[str, int]) -> None:
        self.reactor, self._places = reactor, places
        self._authorization = "Basic " + base64.b64encode(login.encode()).decode()

    def judge(self, head: str) -> tuple[str, int]:
        """
        Return the status of the answer, and the port that is meant, if there is one.
        """
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        if f"Proxy-Authorization: {self._authorization}" not in lines:
            return "407 Proxy Authentication Required", 0
        port = self._places.get(target, 0) if method == "CONNECT" else 0
        return "403 Forbidden", port


def main() -> None:
    """
    Run until stopped.
    """
    from twisted.internet import reactor as installed

    reactor: Any = installed
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.egress", description=__doc__)
    for name in ("--key", "--chain", "--login"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    leaf = crypto.load_certificate(crypto.FILETYPE_PEM, Path(options.chain).read_bytes())
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, Path(options.key).read_bytes())
    context = CertificateOptions(key, leaf)
    standin = StandIn(reactor, registry=f"https://{PROXY}", bucket=f"https://{PROXY}:{PORTS['bucket']}")
    images = push_samples(standin, 3, 2**20)
    site: Any = Site(notFound())
    site.resource = standin.resource
    places = {
        f"{PROXY}:{port}": reactor.listenSSL(0, site, context, interface=LOCAL).getHost().port
        for port in PORTS.values()
    }
    proxy = EgressFactory(reactor, options.login, places)
    port = reactor.listenTCP(0, proxy, interface=LOCAL).getHost().port
    api = reactor.listenTCP(0, site, interface=LOCAL).getHost().port
    told = {"proxy": f"{LOCAL}:{port}", "api": f"http://localhost:{api}", "images": images}
    print(json.dumps(told), flush=True)
    reactor.run()


if __name__ == "__main__":
    main()
