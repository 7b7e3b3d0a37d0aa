"""
Renewed certificates are served within a minute, however they are replaced.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon.renewal import LOOK_SECONDS, Renewal, generation
from ecrproxy.files import Files
from tests.daemon import at_once
from tests.store_contract import scratch


class FilesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = scratch(self)
        self.folder.mkdir()
        self.path = self.folder / "tls.crt"
        self.path.write_text("old")

    def files(self) -> Files:
        files = Files([str(self.path), None])
        files.note(files.seen())
        return files

    def test_have_not_changed_until_something_happens_to_them(self) -> None:
        files = self.files()
        self.assertFalse(files.changed())
        self.path.write_text("another")
        self.assertTrue(files.changed())
        self.assertTrue(files.changed())
        files.note(files.seen())
        self.assertFalse(files.changed())

    def test_have_a_name_that_others_who_see_the_same_find_too(self) -> None:
        """
        So a worker reads what its parent has checked, and nothing that replaced it meanwhile.
        """
        named = generation([self.files().seen()])
        self.assertEqual(named, generation([self.files().seen()]))
        self.assertEqual(64, len(named))
        self.path.write_text("renewed")
        self.assertNotEqual(named, generation([self.files().seen()]))
        self.assertNotEqual(generation([]), generation([self.files().seen()]))

    def test_have_changed_when_the_folder_behind_a_link_is_another(self) -> None:
        """
        As kubelet replaces a secret: C{tls.crt} leads to C{..data/tls.crt}, and C{..data} to another folder.
        """
        for name in ("first", "second"):
            (self.folder / name).mkdir()
            (self.folder / name / "tls.crt").write_text("as long")
        (self.folder / "..data").symlink_to("first")
        self.path.unlink()
        self.path.symlink_to("..data/tls.crt")
        files = self.files()
        (self.folder / "..data_tmp").symlink_to("second")
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        self.assertTrue(files.changed())

    def test_have_changed_when_they_are_gone_or_may_be_read(self) -> None:
        files = self.files()
        self.path.chmod(0o400)
        self.assertTrue(files.changed())
        files.note(files.seen())
        self.path.unlink()
        self.assertTrue(files.changed())

    def test_of_the_same_time_and_length_have_changed_if_they_are_others(self) -> None:
        files = self.files()
        status = self.path.stat()
        Path(f"{self.path}.new").write_text("new")
        os.utime(f"{self.path}.new", ns=(status.st_atime_ns, status.st_mtime_ns))
        Path(f"{self.path}.new").rename(self.path)
        self.assertTrue(files.changed())


class Part:
    """
    What was read from files, and whether they have changed.
    """

    new = False

    def changed(self) -> bool:
        return self.new


class RenewalTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.parts, self.read = Clock(), [Part(), Part()], 0

    def begin(self, in_thread: Any = at_once) -> Renewal:
        renewal = Renewal(self.parts, in_thread, self.reread, self.clock)
        renewal.startService()
        return renewal

    def reread(self) -> None:
        self.read += 1
        for part in self.parts:
            part.new = False

    def test_reads_again_what_has_changed_once(self) -> None:
        self.begin()
        self.clock.advance(LOOK_SECONDS)
        self.assertEqual(0, self.read)
        self.parts[1].new = True
        self.clock.advance(LOOK_SECONDS)
        self.clock.advance(LOOK_SECONDS)
        self.assertEqual(1, self.read)

    def test_a_look_that_fails_is_told_and_the_next_one_comes(self) -> None:
        def fail(*_: object) -> Deferred[Any]:
            raise ZeroDivisionError

        self.parts[0].changed = fail  # type: ignore[assignment, method-assign]
        self.begin()
        with capturedLogs() as events:
            self.clock.advance(LOOK_SECONDS)
        self.assertEqual(1, len(events))
        self.flushLoggedErrors(ZeroDivisionError)
        del self.parts[0].changed
        self.parts[0].new = True
        self.clock.advance(LOOK_SECONDS)
        self.assertEqual(1, self.read)

    def test_a_look_that_ends_after_the_daemon_changes_nothing(self) -> None:
        looking: Deferred[list[bool]] = Deferred()
        renewal = self.begin(lambda *_: looking)
        self.clock.advance(LOOK_SECONDS)
        renewal.stopService()
        looking.callback([True])
        self.assertEqual((0, []), (self.read, self.clock.getDelayedCalls()))
