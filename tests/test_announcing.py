"""
What the daemon logs when it starts, becomes ready, and ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.announcing import PATIENCE, REGISTRIES, Announcing, settings_lines, summary_line
from ecrproxy.metrics import Row, Tally
from ecrproxy.readiness import Readiness
from ecrproxy.settings.config import Config, Filed
from ecrproxy.settings.registries import parse_registries

MIB = 2**20
ENVIRON = {"PROXY_ECR_ENDPOINT": "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com", "PROXY_CACHE_DIR": "/cache"}


def lines(environ: Mapping[str, str], tables: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """
    Return the first lines of a daemon.
    """
    registries, problems = parse_registries("a file", tables or {})
    assert not problems, problems
    config = Config.load({}, {**ENVIRON, **environ}, Filed(registries=registries))
    return "\n".join(settings_lines(config, "1.2.3", lambda: 12 * MIB))


class SettingsLinesTests(SynchronousTestCase):
    def test_tell_version_registry_cache_address_access_and_operators_port(self) -> None:
        """
        With the fewest settings possible.
        """
        text = lines({})
        for words in (
            "ecrproxy 1.2.3\n",
            "Registry: 123456789012.dkr.ecr.eu-west-1.amazonaws.com, eu-west-1, the default\n",
            "Cache: /cache, 12 MiB of 64 GiB\n",
            "Clients: port 5000 of all addresses, plain HTTP; all clients that can connect may pull\n",
            "Admin port: tcp:5001:interface=127.0.0.1",
        ):
            self.assertIn(words, text)

    def test_tell_how_each_endpoint_is_protected(self) -> None:
        text = lines(
            {
                "PROXY_LISTEN": "tcp:5000:interface=127.0.0.1 ssl:5443:privateKey=/k:certKey=/c",
                "PROXY_ALLOW_FROM": "10.0.0.0/8 192.0.2.0/24",
                "PROXY_HTPASSWD": "/passwords",
                "PROXY_ADMIN_LISTEN": "off",
                "PROXY_WORKER_PROCESSES": "3",
            }
        )
        may = "clients may pull from 10.0.0.0/8, 192.0.2.0/24 and with a password"
        self.assertIn(f"Clients: tcp:5000:interface=127.0.0.1, plain HTTP; {may}\n", text)
        self.assertIn(f"Clients: ssl:5443:privateKey=/k:certKey=/c, TLS; {may}\n", text)
        self.assertIn("with 3 worker processes", text)
        self.assertIn("Admin port: none", text)

    def test_tell_of_each_registry_as_whom_it_is_asked_and_nothing_secret(self) -> None:
        role = "arn:aws:iam::444455556666:role/pull"
        text = lines(
            {"AWS_SECRET_ACCESS_KEY": "verysecret"},
            {
                "444455556666.dkr.ecr.us-east-1.amazonaws.com": {"role": role, "external-id": "verysecret"},
                "public.ecr.aws": {"credentials": "anonymous"},
                "quay.io": {"username": "robot", "password-file": "/password"},
            },
        )
        for words in (f"us-east-1, as {role}\n", "public.ecr.aws", "without an account\n", "quay.io, as robot\n"):
            self.assertIn(words, text)
        self.assertNotIn("verysecret", text)

    def test_are_few_however_many_registries_there_are(self) -> None:
        tables: dict[str, dict[str, object]] = {
            f"{number:012}.dkr.ecr.us-east-1.amazonaws.com": {} for number in range(1, 51)
        }
        text = lines({}, tables)
        self.assertEqual(REGISTRIES, text.count("Registry: "))
        self.assertIn("… and 41 more registries: ecr-proxy config lists them", text)


class SummaryTests(SynchronousTestCase):
    def test_tells_what_clients_got_and_how_much_of_it_came_from_the_cache(self) -> None:
        tally = Tally()
        tally.note(("blob", "GET", "200", "HIT", "r"), 1.0, 30 * MIB)
        tally.note(("blob", "GET", "200", "MISS", "r"), 1.0, 10 * MIB)
        tally.note(("blob", "GET", "502", "-", "r"), 1.0)
        line = summary_line(list(tally.rows()), 7300, 0.0123)
        for words in ("2 h 1 min", "3 requests, 1 of them failed", "40 MiB", "75 %", "event-loop stall 0.012 s"):
            self.assertIn(words, line)

    def test_of_a_daemon_that_nobody_asked_has_no_share(self) -> None:
        self.assertEqual("Ended after 5 s: 0 requests, 0 of them failed, 0 B sent", summary_line([], 5, None))


class AnnouncingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.readiness = Readiness(can_serve=False, can_fetch=False, reasons=("no token",))
        self.rows: list[Row] = []
        self.announcing = Announcing(
            lambda: ["first", "second"], self.ready, lambda: self.rows, lambda: 0.5, self.clock
        )

    async def ready(self) -> Readiness:
        return self.readiness

    def said(self, seconds: int) -> list[tuple[LogLevel, str]]:
        """
        Let time pass, and return what is logged meanwhile.
        """
        with capturedLogs() as events:
            if not self.announcing.running:
                self.announcing.startService()
            self.clock.pump([1] * seconds)
        return [(event["log_level"], formatEvent(event)) for event in events]

    def test_ready_is_said_once_as_soon_as_nothing_is_wrong(self) -> None:
        self.assertEqual([(LogLevel.info, "first"), (LogLevel.info, "second")], self.said(3))
        self.readiness = Readiness(can_serve=True, can_fetch=True, reasons=())
        self.assertEqual([(LogLevel.info, "Ready: clients are served")], self.said(60))
        self.assertEqual([], self.said(60))

    def test_what_is_wrong_only_for_a_moment_is_not_told(self) -> None:
        """
        A worker that is about to start, or a token that is being fetched.
        """
        self.readiness = Readiness(can_serve=True, can_fetch=False, reasons=("no token",))
        self.assertEqual(2, len(self.said(int(PATIENCE) - 1)))
        self.assertEqual([(LogLevel.warn, "Ready, but no token")], self.said(5))
        self.assertEqual([], self.said(60))

    def test_the_end_has_one_line_and_nothing_is_looked_at_after_it(self) -> None:
        self.said(5)
        with capturedLogs() as events:
            self.announcing.stopService()
            self.clock.advance(60)
        self.assertEqual([summary_line([], 5, 0.5)], [formatEvent(event) for event in events])
        self.assertEqual([], self.clock.getDelayedCalls())
