"""
Whatever the disk does, pulls go on; the log reports a trouble once, and /readyz as long as it lasts.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache import allocation
from ecrproxy.cache.condition import FRESH_SECONDS
from ecrproxy.cache.troubles import QUIET_SECONDS, TroubleKind, Troubles
from tests.daemon import DaemonTestCase, noise
from tests.store_contract import START, failing

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TroublesTests(SynchronousTestCase):
    """
    What is reported, and when.
    """

    def setUp(self) -> None:
        self.now = START
        self.troubles = Troubles(lambda: self.now)

    def told(self, *ends: OSError | None) -> int:
        """
        Record so many calls, failed or not, and count the lines in the log.
        """
        with capturedLogs() as events:
            for problem in ends:
                if problem is None:
                    self.troubles.succeeded(TroubleKind.WRITE)
                else:
                    self.troubles.failed(TroubleKind.WRITE, problem)
        return len(events)

    def test_one_trouble_is_one_line(self) -> None:
        """
        However many calls fail because of it, and however many succeed in between.
        """
        self.assertEqual(1, self.told(FULL, FULL, None, FULL, None))
        self.assertEqual(["the cache directory can't be written: No space left on device"], self.troubles.reasons())

    def test_the_kinds_that_stand_are_told_apart(self) -> None:
        """
        For metrics, which have no words.
        """
        self.told(FULL)
        self.troubles.failed(TroubleKind.READ, OSError(errno.EMFILE, "Too many open files"))
        self.assertEqual({TroubleKind.WRITE, TroubleKind.OPEN}, self.troubles.standing())

    def test_its_end_is_told_too(self) -> None:
        """
        After a while without another failure.
        """
        self.told(FULL)
        self.now += QUIET_SECONDS
        self.assertEqual((1, []), (self.told(None, None), self.troubles.reasons()))

    def test_it_does_not_end_by_itself(self) -> None:
        """
        Without an attempt, nothing is known to work.
        """
        self.told(FULL)
        self.now += 1000
        self.assertEqual(1, len(self.troubles.reasons()))

    def test_a_clock_that_is_set_back_ends_it(self) -> None:
        """
        Otherwise it would last for as long as the clock was wrong.
        """
        self.told(FULL)
        self.now -= 1000
        self.assertEqual(1, self.told(None))

    def test_too_many_open_files_are_a_trouble_of_their_own(self) -> None:
        """
        The disk is not the cause.
        """
        self.told(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        self.assertEqual(["no more files can be opened: Too many open files"], self.troubles.reasons())


class PullTests(DaemonTestCase):
    """
    Pulls through a daemon whose disk has a trouble.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.data = noise("x", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.path = f"/v2/team/app/blobs/{self.digest}"

    def pull(self) -> list[str | None]:
        """
        Pull an image and a large blob; all of it must be right. Return the cache statuses.
        """
        manifest = self.get("/v2/team/app/manifests/latest")
        self.assertWhole(manifest, self.image.manifest)
        blob = self.get(self.path)
        self.assertWhole(blob, self.data)
        return [manifest.cache, blob.cache]

    def reasons(self) -> list[str]:
        """
        Return why the daemon is not ready.
        """
        self.pass_time(FRESH_SECONDS)
        reply = self.get("/readyz")
        reasons: list[str] = json.loads(reply.body)["reasons"]
        self.assertEqual(503 if reasons else 200, reply.code)
        return reasons

    def test_figures_tell_which_kind_of_trouble_there_is(self) -> None:
        """
        As long as /readyz does: for alerts.
        """
        names = [f'ecr_proxy_disk_trouble{{kind="{kind}"}}' for kind in ("write", "read", "open", "hang")]
        self.assertEqual([0, 0, 0, 0], [self.daemon.figure(name) for name in names])
        with self.broken(errno.EROFS, "pwrite"):
            self.reasons()
            self.assertEqual([1, 0, 0, 0], [self.daemon.figure(name) for name in names])

    @contextmanager
    def broken(self, number: int, *names: str) -> Iterator[None]:
        """
        Have system calls fail for a while.
        """
        patches = [self.patch(allocation if name == "fallocate" else os, name, failing(number)) for name in names]
        real = os.open

        def opening(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if str(self.root) in str(path) and (flags & os.O_CREAT or number == errno.EMFILE):
                failing(number)()
            return real(path, flags, *args, **kwargs)

        if number in (errno.EROFS, errno.EMFILE):
            patches.append(self.patch(os, "open", opening))
        # Path.write_bytes does not open files through os.open.
        patches.append(self.patch(Path, "write_bytes", failing(number)))
        try:
            yield
        finally:
            for patch in patches:
                patch.restore()

    def check_trouble(self, number: int, *names: str, saying: str) -> None:
        """
        Pull while system calls fail, and after.
        """
        with self.broken(number, *names):
            for _ in range(3):
                self.pull()
            self.assertIn(saying, str(self.reasons()))
            self.assertEqual(1, self.logged().count("going on without it"))
        self.pass_time(QUIET_SECONDS)
        self.assertEqual([], self.reasons())
        self.assertEqual(1, self.logged().count("No more: "))
        self.pull()
        self.assertEqual("HIT", self.pull()[1])
        self.assertEqual(0, self.promised())

    def test_a_full_disk_is_one_line_and_no_readiness(self) -> None:
        """
        Pulls go on, and are cached again when there is space.
        """
        self.check_trouble(errno.ENOSPC, "fallocate", saying="can't be written: No space left on device")

    def test_a_read_only_disk_is_one_line_and_no_readiness(self) -> None:
        self.check_trouble(
            errno.EROFS, "rename", "unlink", "mkdir", "utime", saying="can't be written: Read-only file system"
        )

    def test_a_disk_that_fails_to_write_is_one_line_and_no_readiness(self) -> None:
        self.check_trouble(errno.EIO, "pwrite", saying="can't be written: Input/output error")

    def test_no_more_file_descriptors_lose_nothing_of_the_cache(self) -> None:
        """
        What can't be opened just now is fetched, goes on being counted, and is served from the cache later.
        """
        self.pull()
        self.start()  # with nothing in memory
        before = self.index.totals.blocks
        with self.broken(errno.EMFILE):
            self.assertEqual("BYPASS", self.pull()[1])
            self.assertIn("no more files can be opened: Too many open files", self.reasons())
        self.assertEqual(before, self.index.totals.blocks)
        self.assertEqual(1, self.logged().count("going on without it"))
        self.pass_time(QUIET_SECONDS)
        self.assertEqual("HIT", self.pull()[1])
        self.assertEqual([], self.reasons())

    def test_a_directory_that_is_removed_while_it_is_used_is_made_anew(self) -> None:
        """
        Removing the directory costs a transfer, and no answer.
        """
        self.pull()
        shutil.rmtree(self.root)
        self.start()
        shutil.rmtree(self.root)
        self.assertEqual("MISS", self.pull()[1])
        self.assertEqual("HIT", self.pull()[1])
        self.assertEqual([], self.reasons())
        shutil.rmtree(self.root / "arriving")
        self.assertEqual([], self.reasons())

    def test_a_directory_that_is_removed_in_the_middle_of_a_transfer_costs_the_file_alone(self) -> None:
        """
        The client gets all of it from the unlinked file; the next request fetches it again.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 100_000)
        self.flush()
        shutil.rmtree(self.root)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, self.data, "MISS")
        self.pull()
        self.assertEqual("HIT", self.pull()[1])

    def test_a_directory_that_can_not_be_made_anew_is_told(self) -> None:
        """
        Pulls go on without it.
        """
        shutil.rmtree(self.root)
        self.root.touch()
        self.assertEqual("BYPASS", self.pull()[1])
        self.assertIn("the cache directory can't be written: Not a directory", self.reasons()[0])
        self.root.unlink()
        self.pass_time(QUIET_SECONDS)
        self.assertEqual([], self.reasons())
        self.pull()
        self.assertEqual("HIT", self.pull()[1])
