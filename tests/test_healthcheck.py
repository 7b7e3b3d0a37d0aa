"""
Which address the container's health check asks, and how it judges the answer.
"""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Mapping
from http.client import BadStatusLine
from typing import cast

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.healthcheck import PORT, Place, main, place_from
from ecrproxy.settings.table import SETTINGS


class PlaceTests(SynchronousTestCase):
    def test_is_the_port_of_the_settings(self) -> None:
        """
        Without variables it uses the daemon's default port.
        """
        (default,) = (each.default for each in SETTINGS if each.variable == "PROXY_PORT")
        self.assertEqual(str(PORT), default)
        self.assertEqual(place_from({}), Place(("127.0.0.1", PORT)))
        self.assertEqual(place_from({"PROXY_PORT": "", "PROXY_LISTEN": ""}), Place(("127.0.0.1", PORT)))

    def test_follows_the_port(self) -> None:
        """
        It uses PROXY_PORT, with TLS if the daemon has a key.
        """
        self.assertEqual(place_from({"PROXY_PORT": "6000"}), Place(("127.0.0.1", 6000)))
        given = {"PROXY_PORT": "6443", "PROXY_SSL_KEY": "/k", "PROXY_SSL_CERTIFICATE": "/c"}
        self.assertEqual(place_from(given), Place(("127.0.0.1", 6443), secure=True))

    def test_is_not_taken_from_what_kubernetes_sets_for_a_service(self) -> None:
        self.assertEqual(place_from({"PROXY_PORT": "tcp://10.0.0.1:6000"}), Place(("127.0.0.1", PORT)))

    def test_reads_endpoint_strings(self) -> None:
        """
        PROXY_LISTEN overrides the port, as it does in the daemon.
        """
        for text, place in {
            "tcp:5001": Place(("127.0.0.1", 5001)),
            "tcp:port=5001:interface=0.0.0.0": Place(("127.0.0.1", 5001)),
            "tcp:5001:interface=10.0.0.7": Place(("10.0.0.7", 5001)),
            "tcp6:5001": Place(("::1", 5001)),
            r"tcp6:5001:interface=fd00\:\:7": Place(("fd00::7", 5001)),
            "ssl:5443:privateKey=/k:certKey=/c": Place(("127.0.0.1", 5443), secure=True),
            "tls:/pems:5443": Place(("::1", 5443), secure=True),
            "tls:/pems": Place(("::1", 443), secure=True),
            r"unix:/run/a\:b.sock:mode=660": Place("/run/a:b.sock"),
            "unix:address=/run/a.sock": Place("/run/a.sock"),
            "haproxy:tcp:5001": Place(("127.0.0.1", 5001), behind_proxy=True),
            "tcp:5001:10.0.0.7": Place(("10.0.0.7", 5001)),
            "haproxy:ssl:5443:/k:/c": Place(("127.0.0.1", 5443), secure=True, behind_proxy=True),
            "haproxy:unix:/run/a.sock": Place("/run/a.sock", behind_proxy=True),
        }.items():
            self.assertEqual(place_from({"PROXY_LISTEN": text, "PROXY_PORT": "1"}), place, text)

    def test_is_the_first_that_can_be_asked(self) -> None:
        """
        Sockets whose port only systemd knows are skipped.
        """
        text = "systemd:domain=INET:name=http  tcp:5001 tcp:5002"
        self.assertEqual(place_from({"PROXY_LISTEN": text}), Place(("127.0.0.1", 5001)))

    def test_says_when_nothing_can_be_asked(self) -> None:
        """
        If no socket can be asked, the exit status is 1.
        """
        for variables, words in (
            ({"PROXY_LISTEN": "systemd:domain=INET:index=0"}, "PROXY_LISTEN names no tcp:"),
            ({"PROXY_PORT": "many"}, "'many' is no port"),
            ({"PROXY_PORT": "9" * 5000}, "is no port"),
            ({"PROXY_PORT": "65536"}, "'65536' is no port"),
            ({"PROXY_LISTEN": "tcp"}, "tcp: needs port"),
            ({"PROXY_LISTEN": "tcp:interface=a"}, "tcp: needs port"),
            ({"PROXY_LISTEN": "ssl:x"}, "'x' is not a port"),
            ({"PROXY_LISTEN": "unix:mode=600"}, "unix: needs address"),
        ):
            stderr = io.StringIO()
            self.patch(sys, "stderr", stderr)
            self.assertEqual(main(variables), 1)
            told = stderr.getvalue()
            self.assertTrue(told.startswith("healthcheck: can't tell where the daemon listens: "), told)
            self.assertIn(words, told)


class Connection:
    """
    A connection whose answer is ready, as http.client needs one.
    """

    def __init__(self, answer: bytes) -> None:
        self.sent = b""
        self._answer = answer

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._answer)

    def close(self) -> None:
        pass


def asked(variables: Mapping[str, str], answer: bytes) -> tuple[int, bytes]:
    """
    Return the exit status for an answer, and what was sent for it.
    """
    connection = Connection(answer)
    return main(variables, lambda place: cast("socket.socket", connection)), connection.sent


class MainTests(SynchronousTestCase):
    def test_is_well_when_the_daemon_answers(self) -> None:
        """
        200 is exit status 0; any other status, and anything but HTTP, is 1.
        """
        for answer, status in {
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n": 0,
            b"HTTP/1.1 404 Not Found\r\n\r\n": 1,
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n": 1,
            b"hello\r\n": 1,
            b"": 1,
        }.items():
            self.assertEqual(asked({}, answer)[0], status, answer)

    def test_asks_whether_the_daemon_serves(self) -> None:
        """
        The request needs no AWS: a container is not restarted because ECR is down.
        """
        _, sent = asked({}, b"")
        self.assertTrue(sent.startswith(b"GET /healthz HTTP/1.1\r\n"))

    def test_speaks_as_a_load_balancer_does(self) -> None:
        """
        Behind a load balancer the daemon expects the PROXY header first.
        """
        _, sent = asked({"PROXY_LISTEN": "haproxy:tcp:5001"}, b"")
        self.assertTrue(sent.startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\nGET /healthz "))

    def test_is_ill_when_nobody_listens(self) -> None:
        """
        A refused connection is exit status 1.
        """

        for problem, words in (
            (ConnectionRefusedError(111, "Connection refused"), "no daemon answers at 127.0.0.1 port 5000: Connection"),
            (TimeoutError("timed out"), "no answer at 127.0.0.1 port 5000 within 4 s"),
            (BadStatusLine("hello"), "what answers at 127.0.0.1 port 5000 is no HTTP"),
        ):

            def fail(_: Place, problem: Exception = problem) -> socket.socket:
                raise problem

            stderr = io.StringIO()
            self.patch(sys, "stderr", stderr)
            self.assertEqual(main({}, fail), 1)
            self.assertTrue(stderr.getvalue().startswith(f"healthcheck: {words}"), stderr.getvalue())
