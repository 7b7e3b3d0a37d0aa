"""
C{ecr-proxy serve}: starts the daemon as twistd does.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.settings.options import Options
from tests.caller import Caller


class ServeTests(SynchronousTestCase):
    """
    Starting the daemon.
    """

    def setUp(self) -> None:
        self.caller = Caller()

    def test_each_kind_of_flag_reaches_the_daemon_as_it_was_given(self) -> None:
        """
        Values, several endpoints, and flags with a negative form.
        """
        given = ["--port=8080", "--listen=tcp:1", "--listen=tcp:2", "--no-instance-auth", "--read-ahead"]
        self.caller.call("serve", *given)
        (arguments,) = self.caller.started
        options, same = Options(), Options()
        options.parseOptions(arguments)
        same.parseOptions(given)
        self.assertEqual(same.flags(), options.flags())
        self.assertEqual(4, len(options.flags()))

    def test_what_is_wrong_with_a_setting_is_the_daemons_to_say(self) -> None:
        """
        It logs errors too, with its exit status: the command does not check values.
        """
        self.caller.variables["PROXY_PORT"] = "many"
        self.caller.call("serve", "--cache-limit=nothing")
        self.assertEqual([["--cache-limit=nothing"]], self.caller.started)
        self.assertEqual("", self.caller.complaint)

    def test_takes_no_url_of_a_daemon_that_runs(self) -> None:
        """
        That is no setting.
        """
        self.caller.call("serve", "--admin-url=http://localhost:5001")
        self.assertEqual(2, self.caller.status)
        self.assertEqual([], self.caller.started)
