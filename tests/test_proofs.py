"""
A file of the cache is trusted as long as it is the one that was verified.
"""

from __future__ import annotations

import os
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.proofs import Proofs, is_marked, mark
from ecrproxy.oci import Digest
from tests.store_contract import START, failing, scratch

DIGEST = Digest.of(b"0123456789")


class ProofsTests(SynchronousTestCase):
    """
    One file, and what is known of it.
    """

    def setUp(self) -> None:
        """
        Create a verified file whose use was recorded.
        """
        self.proofs = Proofs()
        self.path = scratch(self)
        self.path.write_bytes(b"0123456789")
        self.mark(START)
        self.proofs.note(DIGEST, self.path.stat(), good=True)

    def mark(self, now: float) -> None:
        """
        Record a use.
        """
        with self.path.open("rb") as file:
            mark(file.fileno(), now)

    def verdict(self) -> bool | None:
        """
        Return the proof of the file in its present state.
        """
        return self.proofs.verdict(DIGEST, self.path.stat())

    def test_a_use_changes_nothing(self) -> None:
        """
        A verified file stays so however often it is used, at whatever fraction of a second.
        """
        for moment in (START, START + 0.1, START + 1 / 3, START + 12345.6789):
            self.mark(moment)
            self.assertTrue(is_marked(self.path.stat()))
            self.assertIs(True, self.verdict())

    def test_what_is_written_to_it_ends_the_proof(self) -> None:
        """
        Bytes written in place change the file's own time; so does a file whose time was never marked.
        """
        with self.path.open("r+b") as file:
            file.write(b"9")
        self.assertFalse(is_marked(self.path.stat()))
        self.assertIsNone(self.verdict())

    def test_another_file_in_its_place_has_no_proof(self) -> None:
        """
        Not even one of the same size and time.
        """
        other = Path(f"{self.path}.other")
        other.write_bytes(b"9876543210")
        self.addCleanup(other.unlink, missing_ok=True)
        os.utime(other, ns=(0, self.path.stat().st_mtime_ns))
        other.rename(self.path)
        self.assertIsNone(self.verdict())

    def test_another_size_has_no_proof(self) -> None:
        """
        Whatever its time.
        """
        os.truncate(self.path, 4)
        self.mark(START)
        self.assertIsNone(self.verdict())

    def test_a_file_that_can_not_be_marked_is_proved_once(self) -> None:
        """
        On a read-only disk the time of the last change replaces the mark.
        """
        os.utime(self.path, ns=(0, 1_234_567))
        self.proofs.note(DIGEST, self.path.stat(), good=True)
        self.patch(os, "utime", failing(30))
        self.assertRaises(OSError, self.mark, START)
        self.assertIs(True, self.verdict())

    def test_a_bad_file_is_known_as_one(self) -> None:
        """
        Until it is replaced.
        """
        self.proofs.note(DIGEST, self.path.stat(), good=False)
        self.assertIs(False, self.verdict())

    def test_what_was_never_looked_at_is_not_known(self) -> None:
        """
        Neither good nor bad.
        """
        self.assertIsNone(self.proofs.verdict(Digest.of(b""), self.path.stat()))
