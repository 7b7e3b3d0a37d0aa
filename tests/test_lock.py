"""
The container has exactly what requirements.lock names.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

CHECKOUT = Path(__file__).resolve().parents[1]


class LockTests(SynchronousTestCase):
    """
    What the daemon needs is locked.
    """

    def test_every_dependency_is_locked(self) -> None:
        """
        A missing one would be missing in the image: run make lock.
        """
        settings = configparser.ConfigParser()
        settings.read(CHECKOUT / "setup.cfg")
        needed = set(re.findall(r"^([a-z0-9-]+)", settings["options"]["install_requires"], re.MULTILINE))
        locked = set(re.findall(r"^([a-z0-9-]+)==", (CHECKOUT / "requirements.lock").read_text("utf-8"), re.MULTILINE))
        self.assertIn("bcrypt", needed)
        self.assertEqual(set(), needed - locked)
