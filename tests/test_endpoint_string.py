"""
Endpoint strings are parsed as Twisted parses them.
"""

# ruff: noqa: SLF001 (Twisted's parser has no public name)
from __future__ import annotations

import inspect
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import endpoints as twisted_endpoints
from twisted.internet.endpoints import serverFromString
from twisted.internet.testing import MemoryReactorClock
from twisted.plugin import getPlugins
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.endpoint_string import DEFAULTS, PARAMETERS, parse_endpoint_string

TWISTED: Any = twisted_endpoints


def parameters_in_twisted(kind: str) -> list[inspect.Parameter]:
    """
    Return what Twisted's parser for a kind of endpoint accepts, without what is not part of the string.
    """
    parsers = {each.prefix: each for each in getPlugins(TWISTED.IStreamServerEndpointStringParser)}
    if kind in TWISTED._serverParsers:
        parser = TWISTED._serverParsers[kind]
    else:
        found = parsers[kind]
        parser = getattr(found, "_actualParseStreamServer", None) or found._parseServer
    return [each for each in inspect.signature(parser).parameters.values() if each.name not in ("factory", "reactor")]


class TwistedTests(SynchronousTestCase):
    def test_parameters_are_those_of_twisted(self) -> None:
        for kind, names in PARAMETERS.items():
            parameters = parameters_in_twisted(kind)
            self.assertEqual(list(names), [each.name for each in parameters], kind)
            defaults = {each.name: each.default for each in parameters}
            for name, value in DEFAULTS.get(kind, {}).items():
                self.assertEqual(defaults[name], value)

    @given(st.lists(st.text(":=\\ab/", max_size=6), min_size=1, max_size=4).map(":".join))
    def test_strings_are_split_as_by_twisted(self, rest: str) -> None:
        """
        Every accepted string has the same meaning there, escapes included.
        """
        try:
            described = parse_endpoint_string(f"unix:{rest}")
        except ValueError:
            return
        arguments, named = TWISTED._parse(f"unix:{rest}")
        theirs = {**dict(zip(PARAMETERS["unix"], arguments[1:], strict=False)), **named}
        self.assertEqual(theirs, dict(described.options))
        self.assertEqual((["unix"], theirs), TWISTED._parse(described.to_twisted()))


class EndpointStringTests(SynchronousTestCase):
    def test_arguments_have_the_same_meaning_with_a_name_and_without(self) -> None:
        for one, other in (
            ("tcp:5000:127.0.0.1:9", "tcp:5000:interface=127.0.0.1:backlog=9"),
            ("ssl:443:/k:/c", "ssl:certKey=/c:privateKey=/k:port=443"),
            ("tcp6:5000:9", "tcp6:5000:backlog=9"),
            ("TLS:/pems", "tls:path=/pems:port=443"),
            ("unix:/run/x:660", "unix:address=/run/x:mode=660"),
        ):
            first, second = parse_endpoint_string(one), parse_endpoint_string(other)
            self.assertEqual((first.kind, dict(first.options)), (second.kind, dict(second.options)))

    def test_kinds_in_capital_letters_are_those_that_twisted_takes(self) -> None:
        described = parse_endpoint_string("HAProxy:SystemD:domain=INET:index=0")
        self.assertEqual(("systemd", True), (described.kind, described.balanced))
        self.assertRaises(ValueError, parse_endpoint_string, "TCP:5000")
        self.assertRaises(ValueError, serverFromString, MemoryReactorClock(), "TCP:5000")

    def test_the_files_of_tls_are_known_by_whatever_name_they_come(self) -> None:
        for text, files in {
            "ssl:443": ("server.pem",),
            "ssl:443:/k:/c": ("/k", "/c"),
            r"haproxy:ssl:443:privateKey=/a\:b\=c:extraCertChain=/e:dhParameters=/d": ("/a:b=c", "/e", "/d"),
            "tls:/pems": ("/pems",),
            "tcp:5000": (),
        }.items():
            self.assertEqual(files, parse_endpoint_string(text).files())

    def test_what_stands_on_a_socket_is_left_out_of_it(self) -> None:
        for text, socket in {
            "haproxy:ssl:443:/k:interface=127.0.0.1": r"tcp:backlog=7:port=443:interface=127.0.0.1",
            r"tls:/pems:interface=fd00\:\:7:backlog=9": r"tcp6:backlog=9:port=443:interface=fd00\:\:7",
            "unix:/run/x": "unix:backlog=7:address=/run/x",
            "systemd:domain=INET:name=x": "systemd:domain=INET:name=x",
        }.items():
            self.assertEqual(socket, parse_endpoint_string(text).socket().to_twisted(backlog="7"))

    def test_only_this_machine_reaches_paths_and_loopback(self) -> None:
        for text in ("unix:/x", "systemd:domain=UNIX:index=0", "tcp:1:127.0.0.2", r"ssl:1:interface=\:\:1"):
            self.assertTrue(parse_endpoint_string(text).is_local, text)
        for text in ("tcp:1", "tcp:1:10.0.0.1", "tls:/x", "haproxy:systemd:domain=INET:index=0"):
            self.assertFalse(parse_endpoint_string(text).is_local, text)

    def test_what_twisted_would_refuse_or_misread_is_refused(self) -> None:
        for text in (
            "",
            "tcp",
            "tcp:",
            "tcp:x",
            "tcp:65536",
            "tcp:-1",
            "tcp:1:a:2:b",
            "tcp:1:port=2",
            "tcp:1:interfaec=127.0.0.1",
            "unix:/x\\",
            "haproxy:",
            "haproxy:haproxy:tcp:5000",
            "onion:80",
        ):
            self.assertRaises(ValueError, parse_endpoint_string, text)
