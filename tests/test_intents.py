"""
Which process is about to fetch what: locks on bytes of one file.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.intents import NAME, Intents
from ecrproxy.oci import Digest

DIGEST = Digest.of(b"a layer")


class IntentsTests(SynchronousTestCase):
    """
    Two processes on one directory.
    """

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-test-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.other = Intents(self.root)

    def test_of_two_one_fetches_it(self) -> None:
        one = Intents(self.root)
        self.assertTrue(one.take(DIGEST))
        self.assertFalse(self.other.take(DIGEST))
        one.release(DIGEST)
        self.assertTrue(self.other.take(DIGEST))

    def test_where_the_file_can_not_be_had_each_fetches_it(self) -> None:
        """
        And releases it without a message.
        """
        (self.root / NAME).symlink_to("elsewhere")
        one = Intents(self.root)
        for each in (one, self.other):
            self.assertTrue(each.take(DIGEST))
        for each in (one, self.other):
            each.release(DIGEST)
