"""
Eviction, the ledger and what is there of a file, held against models made of dicts, lists and sets.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ecrproxy.cache.ledger import PACKED, Ledger, Settled, packed, unpacked
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.janitor import victims
from ecrproxy.cache.trailer import Stretches

hexes = st.binary(min_size=PACKED - 1, max_size=PACKED - 1).map(bytes.hex)
usual_paths = st.builds(
    lambda folder, digits: f"{folder}/{digits[:2]}/{digits}", st.sampled_from(["content/sha256", "entries"]), hexes
)
sha512_paths = hexes.map(lambda digits: f"content/sha512/{digits[:2]}/{digits * 2}")
sizes = st.integers(0, 1000)


class VictimsTests(SynchronousTestCase):
    @given(st.lists(st.tuples(sizes, st.booleans())), st.integers(-10, 5000))
    def test_no_more_goes_than_must(self, files: list[tuple[int, bool]], excess: int) -> None:
        """
        The least recently used that nobody reads go, one after the other, until it is enough and no further.
        """
        listing = [(str(number), size, read) for number, (size, read) in enumerate(files)]
        free = [(path, size) for path, size, read in listing if not read]
        chosen = victims(listing, excess)
        if chosen is None:
            self.assertLess(sum(size for _, size in free), excess)
            return
        gained = [size for _, size in free[: len(chosen)]]
        self.assertEqual([path for path, _ in free[: len(chosen)]], chosen)
        self.assertGreaterEqual(sum(gained), excess)
        if chosen:
            self.assertLess(sum(gained[:-1]), excess)


class PackedTests(SynchronousTestCase):
    @given(usual_paths)
    def test_usual_paths_are_packed(self, path: str) -> None:
        """
        The path of an entry or of sha256 content is packed, in one length, and comes back.
        """
        name = packed(path)
        assert name is not None
        self.assertEqual((PACKED, path), (len(name), unpacked(name)))

    @given(st.text(alphabet="0123456789abcdefAF \t/", min_size=60, max_size=70) | st.text() | sha512_paths)
    @example("ab" + "AB" * 31)
    @example("ab" + " " * 62)
    @example("ab" + "cd" * 30 + "e ")
    def test_others_are_not(self, name: str) -> None:
        """
        Whatever a file is called, its path comes back as it was, or isn't packed at all.
        """
        for path in (name, f"content/sha256/{name[:2]}/{name}", f"entries/{name[:2]}/{name}"):
            short = packed(path)
            if short is not None:
                self.assertEqual((PACKED, path), (len(short), unpacked(short)))


def settled(files: Sequence[tuple[str, int]]) -> Settled:
    """
    Make what was counted of paths that can be packed, the least recently used first.
    """
    names = sorted((packed(path) or b"", size, use) for use, (path, size) in enumerate(files))
    order = sorted(range(len(names)), key=lambda place: names[place][2])
    return Settled(
        bytearray(b"".join(name for name, _, _ in names)),
        array("Q", (size for _, size, _ in names)),
        array("I", order),
    )


class LedgerTests(SynchronousTestCase):
    @given(
        st.lists(st.tuples(usual_paths, sizes), unique_by=lambda each: each[0], max_size=8),
        st.lists(st.tuples(sha512_paths, sizes), unique_by=lambda each: each[0], max_size=3),
        st.data(),
    )
    def test_it_is_a_dict_in_order_of_use(
        self, counted: list[tuple[str, int]], others: list[tuple[str, int]], data: st.DataObject
    ) -> None:
        """
        Whatever is used, dropped and read, before a count is in and after, the ledger knows each file's bytes,
        their sum, their order and who is being read; what has changed since a count began holds against it.
        """
        paths = [path for path, _ in counted + others] + data.draw(st.lists(usual_paths | sha512_paths, max_size=3))
        ledger, model, read = Ledger(), dict[str, int](), dict[str, int]()
        steps = st.tuples(st.sampled_from(["used", "gone", "reading", "left"]), st.sampled_from(paths or ["x"]), sizes)
        changed: dict[str, int | None] = {}
        for turn in range(3):
            for what, path, size in data.draw(st.lists(steps, max_size=10)):
                if what == "used":
                    model.pop(path, None)
                    model[path] = size
                    changed.pop(path, None)
                    changed[path] = size
                    ledger.used(path, size)
                elif what == "gone":
                    changed.pop(path, None)
                    changed[path] = None
                    self.assertEqual(model.pop(path, 0), ledger.gone(path))
                elif what == "reading":
                    read[path] = read.get(path, 0) + 1
                    ledger.reading(path, 1)
                elif read.get(path):
                    read[path] -= 1
                    ledger.reading(path, -1)
                self.hold(ledger, model, read)
            if turn < 2:
                unknown = -sum(model.values())
                model = dict(counted + others)
                for path, new in changed.items():
                    model.pop(path, None)
                    if new is not None:
                        model[path] = new
                unknown += sum(model.values())
                self.assertEqual(unknown, ledger.load(settled(counted), sum(size for _, size in counted), others))
                self.hold(ledger, model, read)
                ledger.begin()
                changed.clear()

    def hold(self, ledger: Ledger, model: dict[str, int], read: dict[str, int]) -> None:
        """
        Hold the ledger against the model.
        """
        found = [(path, size, bool(read.get(path))) for path, size in model.items()]
        self.assertEqual(found, list(ledger.oldest()))
        self.assertEqual((len(model), sum(model.values())), (len(ledger), ledger.total))


class StretchesTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=15))
    def test_they_are_a_set_of_bytes(self, parts: list[tuple[int, int]]) -> None:
        """
        From any byte on, they tell the first that is missing.
        """
        stretches, there = Stretches(), set[int]()
        for start, length in parts:
            stretches.add(start, start + length)
            there |= set(range(start, start + length))
            for offset in range(54):
                missing = next(byte for byte in range(offset, 60) if byte not in there)
                self.assertEqual(missing, stretches.end_of(offset))
