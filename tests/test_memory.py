"""
A bounded cache in memory of what was used lately.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.memory import Memory


class MemoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.memory: Memory[str, str] = Memory(10)

    def held(self, keys: str = "abcde") -> str:
        """
        Return which of these are held, without using them: the last question of a test.
        """
        return "".join(key for key in keys if self.memory.get(key) is not None)

    def test_recalls(self) -> None:
        self.memory.put("a", "value", 3)
        self.assertEqual(("value", None), (self.memory.get("a"), self.memory.get("b")))

    def test_is_bounded(self) -> None:
        """
        Values together are no larger than the limit; the first ones go.
        """
        for key, size in (("a", 4), ("b", 4), ("c", 2), ("d", 5)):
            self.memory.put(key, key, size)
        self.assertEqual("cd", self.held())

    def test_keeps_what_is_used(self) -> None:
        """
        A recalled value is not the first to go.
        """
        for key in "abc":
            self.memory.put(key, key, 3)
        self.memory.get("a")
        self.memory.put("d", "d", 3)
        self.assertEqual("acd", self.held())

    def test_counts_a_value_once(self) -> None:
        """
        A replaced value's size counts once, larger or smaller, and it is the last to go.
        """
        self.memory.put("a", "old", 5)
        self.memory.put("b", "b", 5)
        self.memory.put("a", "new", 1)
        self.memory.put("c", "c", 4)
        self.assertEqual(("new", "abc"), (self.memory.get("a"), self.held()))
        self.memory.put("b", "larger", 6)
        self.memory.put("a", "a", 1)
        self.memory.put("d", "d", 3)
        self.assertEqual("abd", self.held())

    def test_does_not_hold_what_is_too_large(self) -> None:
        """
        A value larger than the limit is not held.
        """
        self.memory.put("a", "a", 11)
        self.assertIsNone(self.memory.get("a"))
        self.memory.put("b", "b", 10)
        self.assertEqual("b", self.held())

    def test_forgets(self) -> None:
        """
        A dropped value's space is free; dropping a missing one does nothing.
        """
        self.memory.put("a", "a", 10)
        self.memory.drop("a")
        self.memory.drop("a")
        self.memory.drop("never")
        for key in "bc":
            self.memory.put(key, key, 5)
        self.assertEqual("bc", self.held())
