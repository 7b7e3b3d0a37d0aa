"""
The sources of response bytes: memory, or a complete file.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.store import Store
from ecrproxy.transfer.sources import HELD_PIECE, Held, Shelved
from tests.store_contract import START, put, scratch


class HeldTests(SynchronousTestCase):
    def test_gives_what_it_holds(self) -> None:
        """
        Bytes in memory are returned in pieces of any size, to their end.
        """
        held = Held(b"abcdef")
        held.listen(lambda: self.fail("bytes in memory have no news"))
        self.assertEqual((b"ab", False), (held.piece(2), held.done))
        held.sent(2)
        self.assertEqual(b"cdef", held.piece(100))
        held.sent(4)
        self.assertTrue(held.done)
        self.assertIsNone(held.failure)
        held.close()

    def test_is_copied_in_small_pieces(self) -> None:
        self.assertEqual(bytes(HELD_PIECE), Held(bytes(2**20)).piece(2**20))


class ShelvedTests(SynchronousTestCase):
    def test_reads_a_range_and_lets_go(self) -> None:
        """
        A complete file's range is read to its end, and the file closed with it.
        """
        store = Store(scratch(self), lambda: START)
        store.prepare()
        digest = put(store, bytes(100))
        content = store.open(digest)
        assert content is not None
        shelved = Shelved(content, 10, 30)
        shelved.listen(lambda: self.fail("there is no news of a finished file"))
        self.assertEqual((content.fileno(), 10, 20), shelved.piece(1000))
        shelved.sent(5)
        self.assertEqual((content.fileno(), 15, 7), shelved.piece(7))
        self.assertFalse(shelved.done)
        shelved.sent(15)
        self.assertTrue(shelved.done)
        self.assertIsNone(shelved.failure)
        shelved.close()
        self.assertEqual(-1, content.fileno())
