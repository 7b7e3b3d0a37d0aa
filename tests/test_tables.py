"""
The reference of docs/ describes metrics, settings and subcommands as the code has them.
"""

from __future__ import annotations

import re

import tables
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.subcommand import Subcommand
from ecrproxy.settings.registries import parse_registries
from ecrproxy.settings.table import SETTINGS
from tests.daemon import DaemonTestCase
from tests.documents import CHECKOUT, pages


class MetricsTests(DaemonTestCase):
    """
    Metrics.
    """

    def test_each_that_a_daemon_tells_is_described(self) -> None:
        """
        After a pull, when all its metrics exist.
        """
        self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', b'blob')}")
        told = re.findall(r"^# TYPE (\S+)", self.daemon.ask_admin("/metrics").body.decode(), re.MULTILINE)
        described = [name for name, *_ in tables.metrics()]
        self.assertEqual([], sorted(set(told) - set(described)))
        self.assertEqual(len(described), len(set(described)))

    def test_each_that_a_page_names_is_there(self) -> None:
        """
        In a text or an expression, with the suffixes of a histogram.
        """
        described = {name for name, *_ in tables.metrics()}
        named = {each for page in pages() for each in re.findall(r"\becr_proxy_\w+[a-z]", page.read_text("utf-8"))}
        self.assertEqual([], sorted(e for e in named if re.sub("_(bucket|sum|count)$", "", e) not in described))


class SettingsTests(SynchronousTestCase):
    def test_are_described_in_the_words_of_readme(self) -> None:
        """
        With the flags and the default of the code.
        """
        told = tables.meanings(tables.README.read_text("utf-8"))
        (port,) = (each for each in SETTINGS if each.name == "port")
        lines = tables.setting_described(port, told["PROXY_PORT"]).split("\n\n   ")
        self.assertEqual([".. setting:: PROXY_PORT", "``--port``; default: ``5000``"], lines[:2])
        self.assertTrue(lines[2].strip().startswith("TCP port to listen on, IPv4 and IPv6."))
        self.assertEqual([], sorted({each.variable for each in SETTINGS} - set(told)))

    def test_are_on_the_page(self) -> None:
        """
        Each is named in one of its groups, once.
        """
        page = (CHECKOUT / "docs" / "reference" / "daemon.rst").read_text("utf-8")
        named = " ".join(re.findall(r"^\.\. settings:: (.+)$", page, re.MULTILINE)).split()
        self.assertEqual(sorted(each.name for each in SETTINGS), sorted(named))


class SubcommandTests(SynchronousTestCase):
    def test_are_described_with_all_that_they_take(self) -> None:
        """
        Markup in a help text is escaped.
        """
        told = tables.subcommand_described(
            Subcommand(
                name="look",
                summary="look",
                description="Looks.",
                examples=[("ecr-proxy look '*'", "at *all*")],
                settings=("cache-dir",),
                add_arguments=lambda parser: parser.add_argument("--at", metavar="NAME", help="a name, 1 of 3"),
                run=lambda _: 0,
            )
        )
        for words in (
            ".. subcommand:: ecr-proxy look\n",
            "``ecr-proxy look [--at NAME]`` [*settings*]\n",
            "``--at NAME``\n      a name, 1 of 3\n",
            "``ecr-proxy look '*'``\n      at \\*all\\*\n",
            "Settings that it takes: ``--cache-dir``.",
        ):
            self.assertIn(words, told)


class RegistryTests(SynchronousTestCase):
    """
    Tables of registries.
    """

    def test_each_key_is_described(self) -> None:
        """
        And no other. The error for an unknown key lists them.
        """
        _, (said,) = parse_registries("file", {"quay.io": {"x": True}})
        page = (CHECKOUT / "docs/howto/registries.rst").read_text("utf-8")
        keys = page.partition("Keys of a table")[2].partition("A name ``")[0]
        rows = re.findall(r"^   \* - (``.+``)$", keys, re.MULTILINE)
        self.assertEqual(said.partition("there are ")[2].split(", "), re.findall(r"``(.+?)``", " ".join(rows)))
