"""
A volume that is unmounted while in use is noticed, and the directory underneath is left alone.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.troubles import QUIET_SECONDS
from ecrproxy.cache.volume import Volume
from tests.daemon import DaemonTestCase, noise
from tests.store_contract import scratch


class Mounts:
    """
    A file system that can be mounted on a directory, as seen by C{os.stat} and C{os.path.ismount}.

    @ivar device: its number; None while it is not mounted.
    """

    def __init__(self, case: SynchronousTestCase, point: Path) -> None:
        self.point = point
        self.device: int | None = None
        self._stat, self._ismount = Path.stat, os.path.ismount
        case.patch(Path, "stat", lambda path, **more: self.stat(path, **more))  # noqa: PLW0108 (a bound method gets no path)
        case.patch(os.path, "ismount", self.ismount)

    def stat(self, path: Path, **more: Any) -> os.stat_result:
        """
        Return the device for files below the mount point.
        """
        status = self._stat(path, **more)
        if self.device is None or not path.is_relative_to(self.point):
            return status
        fields = list(status)
        fields[2] = self.device
        return os.stat_result(fields)

    def ismount(self, path: Any) -> bool:
        """
        Return True if it is mounted there.
        """
        return self.device is not None if Path(path) == self.point else self._ismount(path)


class VolumeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.point = Path(os.path.realpath(scratch(self)))
        self.point.mkdir()
        self.mounts = Mounts(self, self.point)
        self.mounts.device = 4711

    def test_a_volume_is_gone_while_it_is_not_mounted(self) -> None:
        volume = Volume(self.point)
        self.assertEqual((self.point, False), (volume.mount, volume.is_gone()))
        self.mounts.device = None
        self.assertTrue(volume.is_gone())
        self.mounts.device = 4711
        self.assertFalse(volume.is_gone())

    def test_mounted_again_it_may_have_another_device(self) -> None:
        volume = Volume(self.point)
        self.mounts.device = None
        self.assertTrue(volume.is_gone())
        self.mounts.device = 815
        self.assertFalse(volume.is_gone())

    def test_a_folder_of_a_volume_is_gone_with_it(self) -> None:
        (self.point / "cache").mkdir()
        volume = Volume(self.point / "cache")
        (self.point / "cache").rmdir()
        self.assertFalse(volume.is_gone())  # it was removed, and may be made again
        self.mounts.device = None
        self.assertTrue(volume.is_gone())

    def test_a_link_that_leads_to_another_volume_is_not_gone_with_the_first(self) -> None:
        """
        But it is gone with the other volume.
        """
        other, link = Path(os.path.realpath(scratch(self))), scratch(self)
        other.mkdir()
        link.symlink_to(self.point)
        volume = Volume(link)
        link.unlink()
        link.symlink_to(other)
        others = Mounts(self, other)
        others.device = 815
        self.mounts.device = None
        self.assertFalse(volume.is_gone())
        others.device = None
        self.assertTrue(volume.is_gone())

    def test_a_volume_that_is_mounted_after_the_start_is_gone_when_it_is_unmounted(self) -> None:
        self.mounts.device = None
        volume = Volume(self.point)
        self.mounts.device = 4711
        self.assertFalse(volume.is_gone())
        self.mounts.device = None
        self.assertTrue(volume.is_gone())

    def test_a_directory_of_the_root_is_never_gone(self) -> None:
        self.mounts.device = None
        volume = Volume(self.point / "deep" / "cache")
        shutil.rmtree(self.point)
        self.assertFalse(volume.is_gone())


class PullTests(DaemonTestCase):
    def test_a_volume_that_is_unmounted_is_not_replaced_by_what_is_underneath(self) -> None:
        """
        Pulls go on without a cache, and with it once it is mounted again.
        """
        data = noise("x", 300_000)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        other = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data[:-1])}"
        mounts = Mounts(self, Path(os.path.realpath(self.root)))
        mounts.device = 4711
        self.start()
        self.assertWhole(self.get(path), data, "MISS")
        self.flush()
        aside = self.root.with_name("aside")
        self.addCleanup(shutil.rmtree, aside, ignore_errors=True)
        self.root.rename(aside)
        self.root.mkdir()
        mounts.device = None
        self.daemon.cache.forget_purged(News(everything=True))
        for _ in range(2):
            reply = self.get(path)
            self.assertWhole(reply, data, "BYPASS")
        self.assertEqual([], list(self.root.iterdir()))
        self.pass_time(FRESH_SECONDS)
        ready = self.get("/readyz")
        self.assertEqual(503, ready.code)
        self.assertIn(b"its file system is not mounted on", ready.body)
        self.assertEqual([], list(self.root.iterdir()))
        self.root.rmdir()
        aside.rename(self.root)
        mounts.device = 815
        self.pass_time(QUIET_SECONDS)
        self.assertEqual(200, self.get("/readyz").code)
        self.assertWhole(self.get(path), data, "HIT")
        self.assertWhole(self.get(other), data[:-1], "MISS")
        self.assertWhole(self.get(other), data[:-1], "HIT")
