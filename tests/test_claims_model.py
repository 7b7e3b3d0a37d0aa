"""
The claim protocol with processes that are killed: see L{tests.claims_model}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

CHECKOUT = Path(__file__).parent.parent


class ModelTests(SynchronousTestCase):
    def test_processes_that_are_killed_send_no_wrong_byte_and_leave_nothing(self) -> None:
        """
        Five of them fetch, follow, take over and evict for some seconds.
        """
        argv = [sys.executable, "-m", "tests.claims_model", "--seconds", "6", "--seed", "1"]
        run = subprocess.run(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, check=True, timeout=120)
        happened = json.loads(run.stdout)
        self.assertEqual({}, happened["wrong"])
        for what in ("kills", "begun", "followed", "taken over", "evicted", "pulled"):
            self.assertGreater(happened.get(what, 0), 0, (what, happened))
