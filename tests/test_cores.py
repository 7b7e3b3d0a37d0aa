"""
auto counts the cores that may be used, not those of the machine.
"""

from __future__ import annotations

import os

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cores import usable_cores
from tests.store_contract import scratch


class CoresTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(os, "sched_getaffinity", lambda _: set(range(64)))
        self.folder = scratch(self)
        self.folder.mkdir()

    def cores(self, own: str, **files: str) -> int:
        """
        Count the cores with these control groups.

        @param files: by path, a slash written as two underscores.
        """
        for name, text in files.items():
            path = self.folder / name.replace("__", "/").replace("cpu_", "cpu.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.folder / "own").write_text(own)
        return usable_cores(self.folder, self.folder / "own")

    def test_are_those_that_the_scheduler_gives_without_a_quota(self) -> None:
        self.assertEqual(64, usable_cores(self.folder, self.folder / "nowhere"))
        self.assertEqual(64, self.cores("0::/\n", cpu_max="max 100000\n"))
        self.assertEqual(64, self.cores("odd\n\n1:cpu\n"))

    def test_are_those_of_a_containers_quota(self) -> None:
        self.assertEqual(2, self.cores("0::/\n", cpu_max="150000 100000\n"))
        self.assertEqual(1, self.cores("0::/\n", cpu_max="5000 100000\n"))

    def test_are_those_of_the_narrowest_group(self) -> None:
        own = "0::/system.slice/x.service\n"
        self.assertEqual(3, self.cores(own, **{"system.slice__cpu_max": "300000 100000"}))
        self.assertEqual(2, self.cores(own, **{"system.slice__x.service__cpu_max": "200000 100000"}))

    def test_are_those_of_a_quota_of_version_1(self) -> None:
        period, quota = "cpu,cpuacct__cpu_cfs_period_us", "cpu,cpuacct__cpu_cfs_quota_us"
        own = "4:memory:/a\n3:cpu,cpuacct:/docker/0123\n"
        self.assertEqual(4, self.cores(own, **{period: "100000\n", quota: "400000\n"}))
        self.assertEqual(64, self.cores(own, **{quota: "-1\n"}))
