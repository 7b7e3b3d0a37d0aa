"""
What interrupted transfers have left goes while the daemon runs.
"""

from __future__ import annotations

import errno
from pathlib import Path

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.arriving import LEFT_SECONDS
from ecrproxy.cache.store import Store
from ecrproxy.cache.sweeper import SWEEP_SECONDS, Sweeper
from ecrproxy.oci import Digest
from tests.daemon import MIB, at_once
from tests.store_contract import START, begin, failing, scratch


class SweeperTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.store = Store(scratch(self), self.clock.seconds)
        self.store.prepare()
        self.sweeper = Sweeper(self.store, at_once, self.clock)
        self.sweeper.startService()
        writer = begin(self.store, Digest.of(b"x"), MIB)
        writer.write(0, [b"some of it"])
        writer.close()

    def names(self) -> list[Path]:
        return list(self.store.arriving.folder.iterdir())

    def test_sweeps_every_minute(self) -> None:
        """
        A day after the last byte, without another start.
        """
        self.clock.advance(LEFT_SECONDS - SWEEP_SECONDS)
        self.assertEqual(2, len(self.names()))
        self.clock.advance(SWEEP_SECONDS)
        self.assertEqual([], self.names())

    def test_a_disk_that_fails_ends_nothing(self) -> None:
        self.patch(self.store, "sweep", failing(errno.EIO))
        self.clock.advance(LEFT_SECONDS)
        self.patch(self.store, "sweep", self.store.arriving.sweep)
        self.clock.advance(SWEEP_SECONDS)
        self.assertEqual([], self.names())

    def test_ends_with_the_daemon(self) -> None:
        self.sweeper.stopService()
        self.assertEqual([], self.clock.getDelayedCalls())
