"""
Messages for operators who migrate from another proxy.
"""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.settings.predecessors import notices
from ecrproxy.settings.table import SETTINGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "moving.rst"
OLD = (
    "UPSTREAM",
    "PORT",
    "RESOLVER",
    "CACHE_MAX_SIZE",
    "CACHE_KEY",
    "ENABLE_SSL",
    "REGISTRY_HTTP_TLS_KEY",
    "REGISTRY_HTTP_TLS_CERTIFICATE",
    "AWS_USE_EC2_ROLE_FOR_AUTH",
)


class NoticeTests(SynchronousTestCase):
    def test_each_variable_of_the_ancestor_is_told_what_it_is_called_here(self) -> None:
        """
        One line each, which names both.
        """
        ours = {each.variable for each in SETTINGS}
        for old in OLD:
            (line,) = map(str, notices({old: "x"}))
            self.assertTrue(line.startswith(f"{old} is set"), line)
            self.assertTrue(ours & set(line.replace(",", " ").replace(";", " ").split()), line)

    def test_who_has_set_ours_too_is_told_nothing(self) -> None:
        """
        PORT and its like may be set for other reasons.
        """
        self.assertEqual([], list(notices({"PORT": "80", "PROXY_PORT": "5000", "PATH": "/bin", "UPSTREAM": ""})))

    def test_what_means_nothing_here_is_told_so(self) -> None:
        """
        The nginx proxy's options for its listener.
        """
        (line,) = map(str, notices({"PROXY_LISTENER_OPTIONS": "http2"}))
        self.assertIn("PROXY_LISTENER_OPTIONS", line)

    def test_the_page_for_those_who_move_has_every_variable(self) -> None:
        """
        Both proxies' and all of ours.
        """
        text = PAGE.read_text("utf-8")
        missing = [name for name in (*OLD, "PROXY_LISTENER_OPTIONS") if f"``{name}``" not in text]
        self.assertEqual([], missing)
