"""
The tests that any store must pass: a store's tests begin with a subclass of L{StoreContract}.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.arriving import Met
from ecrproxy.cache.claim import Claim
from ecrproxy.cache.content import DigestMismatchError, UnreadError
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.store import Store
from ecrproxy.cache.writer import Writer
from ecrproxy.oci import MANIFEST_LIMIT, Descriptor, Digest
from tests.routes import route_to

START = 1_767_225_600.0
"""A time in January 2026: dates in or before 1970 hide mistakes."""
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ANY: frozenset[str] = frozenset()


def failing(number: int) -> Callable[..., Any]:
    """
    Return a system call that fails.
    """

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def scratch(case: SynchronousTestCase) -> Path:
    """
    Return the path of a directory that doesn't exist yet and is removed after the test.
    """
    folder = tempfile.mkdtemp(prefix="ecrproxy-")
    case.addCleanup(shutil.rmtree, folder)
    return Path(folder) / "scratch"


def confirmed(data: bytes = b"manifest", when: float = START, media_type: str = MANIFEST_TYPE) -> Confirmed:
    """
    Return an answer of ECR's that leads to C{data}.
    """
    return Confirmed(Descriptor(media_type, Digest.of(data), len(data)), when)


def entry_of(*answers: Confirmed) -> Entry:
    """
    Return the entry of a tag.
    """
    return Entry({frozenset({each.descriptor.media_type}): each for each in answers})


def key_of(path: str) -> EntryKey:
    """
    Return the key of the entry for C{path}.
    """
    return EntryKey.of(route_to(path))


def put(store: Store, data: bytes, algorithm: str = "sha256") -> Digest:
    """
    Put C{data} into a store as a transfer does.
    """
    digest = Digest.of(data, algorithm)
    claim = store.claim(digest)
    if isinstance(claim, Claim):
        writer = store.writer(claim, digest, len(data))
        writer.write(0, [data])
        writer.commit()
        writer.close()
    return digest


def begin(store: Store, digest: Digest, size: int) -> Writer:
    """
    Claim a digest, and create its file, or resume it.
    """
    claim = store.claim(digest)
    assert isinstance(claim, Claim), claim
    try:
        return store.arriving.resume(claim, digest, size) or store.writer(claim, digest, size)
    except OSError:
        store.arriving.let_go(claim)
        raise


def give_to_another(case: SynchronousTestCase, store: Store) -> None:
    """
    Give all files of a store to another user than this one and the owner of the directory.
    """
    real = Path.stat

    def status(path: Path, **options: Any) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((*found[:4], 12345, *found[5:])) if path == store.root else found

    store.directory.owners.clear()
    case.patch(os, "geteuid", lambda: -1)
    case.patch(Path, "stat", status)


def being_read(store: Store) -> set[Digest]:
    """
    Return which content a store holds open for readers, not only in its pool.
    """
    kept = store.files.kept._files if store.files.kept is not None else {}  # noqa: SLF001
    return {digest for digest, file in store.files._opened.items() if file._holders > (digest in kept)}  # noqa: SLF001


def read(store: Store, digest: Digest) -> bytes | None:
    """
    Read content as an answer does; return None for a miss.
    """
    content = store.open(digest)
    if content is None:
        return None
    try:
        return content.read()
    finally:
        content.close()


class StoreContract(SynchronousTestCase):
    """
    A store returns what was put into it, verified, or nothing.
    """

    def make_store(self) -> Store:
        """
        Make an empty store whose clock says C{START}.
        """
        raise NotImplementedError

    def setUp(self) -> None:
        self.store = self.make_store()

    def test_an_empty_store_has_nothing(self) -> None:
        self.assertFalse(self.store.has(Digest.of(b"x")))
        self.assertIsNone(self.store.open(Digest.of(b"x")))
        self.assertIsNone(self.store.entry(key_of("/v2/a/manifests/latest")))

    def test_what_was_committed_is_given_back(self) -> None:
        """
        With digests of both algorithms, whether or not the size is known.
        """
        for algorithm in ("sha256", "sha512"):
            digest = put(self.store, b"some content", algorithm)
            self.assertTrue(self.store.has(digest))
            self.assertEqual(b"some content", read(self.store, digest))
            self.assertEqual(b"some content", read(self.store, digest))

    def test_only_small_content_is_read_into_memory(self) -> None:
        """
        Not that of manifests and small blobs only: all other content stays on disk.
        """
        for size in (MANIFEST_LIMIT, MANIFEST_LIMIT + 1):
            digest = put(self.store, bytes(size))
            content = self.store.open(digest)
            assert content is not None
            if size > MANIFEST_LIMIT:
                self.assertRaises(UnreadError, content.read)
            else:
                self.assertEqual(size, len(content.read()))
            content.close()
            self.assertTrue(self.store.has(digest))

    def test_open_content_knows_its_size_and_is_read_at_offsets(self) -> None:
        """
        An answer announces the length and sends any range.
        """
        digest = put(self.store, b"0123456789")
        content = self.store.open(digest)
        assert content is not None
        self.addCleanup(content.close)
        self.assertEqual(10, content.size)
        with open(content.fileno(), "rb", closefd=False) as file:
            file.seek(7)
            self.assertEqual(b"789", file.read())

    def test_empty_content_is_content(self) -> None:
        """
        Empty content has a digest, too.
        """
        digest = put(self.store, b"")
        self.assertTrue(self.store.has(digest))
        self.assertEqual(b"", read(self.store, digest))

    def test_pieces_come_together(self) -> None:
        """
        Pieces have any size; some may be empty.
        """
        data = bytes(range(256)) * 300
        writer = begin(self.store, Digest.of(data), len(data))
        writer.write(0, [data[:1], b"", data[1:1000]])
        self.assertEqual(1000, writer.hashed)
        writer.write(1000, [data[1000:]])
        self.assertEqual(len(data), writer.hashed)
        writer.commit()
        writer.close()
        self.assertEqual(data, read(self.store, Digest.of(data)))

    def test_what_has_arrived_is_read_while_more_arrives(self) -> None:
        """
        Clients follow a transfer through the file into which it is written.
        """
        writer = begin(self.store, Digest.of(b"first second"), 12)
        self.addCleanup(writer.discard)
        writer.write(0, [b"first "])
        with open(writer.fileno(), "rb", closefd=False) as file:
            self.assertEqual(b"first ", file.read(writer.hashed))

    def test_a_transfers_hash_can_be_carried_on_elsewhere(self) -> None:
        """
        A transfer that loses its disk is verified anyway.
        """
        digest = Digest.of(b"first second")
        writer = begin(self.store, digest, 12)
        self.addCleanup(writer.discard)
        writer.write(0, [b"first "])
        state, _ = writer.reached
        state.update(b"second")
        self.assertEqual(digest.hex, state.hexdigest())
        self.assertNotEqual(digest.hex, writer.reached[0].hexdigest())

    def test_what_is_arriving_is_not_there_yet(self) -> None:
        """
        Content can't be found by its digest before it is verified.
        """
        digest = Digest.of(b"whole")
        writer = begin(self.store, digest, 5)
        self.addCleanup(writer.discard)
        writer.write(0, [b"whole"])
        self.assertFalse(self.store.has(digest))
        self.assertIsNone(self.store.open(digest))
        writer.commit()
        self.assertTrue(self.store.has(digest))

    def test_what_is_not_what_its_digest_names_never_gets_in(self) -> None:
        """
        Content with wrong, missing or surplus bytes is rejected, and leaves nothing that could be found.
        """
        digest = Digest.of(b"right")
        for wrong in ([b"wrong"], [b"righ"], [b"r", b"ight"[:3], b"!"], []):
            writer = begin(self.store, digest, 5)
            writer.write(0, wrong)
            self.assertRaises(DigestMismatchError, writer.verify)
            self.assertRaises(DigestMismatchError, writer.commit)
            writer.discard()
            self.assertFalse(self.store.has(digest))
            self.assertIsNone(self.store.open(digest))

    def test_what_was_announced_too_long_is_cut(self) -> None:
        """
        Content has the bytes that match its digest, whatever length was announced.
        """
        digest = Digest.of(b"short")
        writer = begin(self.store, digest, 5000)
        writer.write(0, [b"short"])
        writer.commit()
        writer.close()
        self.assertEqual(b"short", read(self.store, digest))

    def test_more_than_was_announced_is_not_written(self) -> None:
        """
        No disk space is reserved for it.
        """
        digest = Digest.of(b"longer")
        writer = begin(self.store, digest, 2)
        self.assertRaises(ValueError, writer.write, 0, [b"longer"])
        writer.discard()
        self.assertFalse(self.store.has(digest))

    def test_one_of_several_brings_a_digest_in(self) -> None:
        """
        Other processes learn that a transfer runs, and afterwards that the content is there.
        """
        digest = Digest.of(b"same")
        one = begin(self.store, digest, 4)
        other = self.store.claim(digest)
        self.assertIsInstance(other, PeerTransfer)
        one.write(0, [b"same"])
        one.commit()
        one.close()
        self.assertEqual(Met.CONTENT, self.store.claim(digest))
        self.assertEqual(b"same", read(self.store, digest))

    def test_committing_again_changes_nothing(self) -> None:
        """
        The same content may arrive twice; readers read on meanwhile.
        """
        digest = put(self.store, b"same")
        content = self.store.open(digest)
        assert content is not None
        self.addCleanup(content.close)
        put(self.store, b"same")
        self.assertEqual(b"same", content.read())
        self.assertEqual(b"same", read(self.store, digest))

    def test_discarding_after_the_commit_takes_nothing_back(self) -> None:
        """
        Content stays; releasing twice is no error.
        """
        digest = Digest.of(b"kept")
        writer = begin(self.store, digest, 4)
        writer.write(0, [b"kept"])
        writer.commit()
        writer.discard()
        writer.discard()
        writer.close()
        self.assertEqual(b"kept", read(self.store, digest))

    def test_letting_go_of_content_twice_is_no_mistake(self) -> None:
        """
        A client that disconnects while its answer ends releases from two sides.
        """
        digest = put(self.store, b"x")
        content = self.store.open(digest)
        assert content is not None
        content.close()
        content.close()
        self.assertEqual(b"x", read(self.store, digest))

    def test_removed_content_is_gone_but_for_who_reads_it(self) -> None:
        """
        Eviction skips content that is being read; a purge cuts no answer short.
        """
        digest = put(self.store, b"evicted")
        content = self.store.open(digest)
        assert content is not None
        self.addCleanup(content.close)
        self.assertEqual([], self.store.evict_unused([digest]))
        self.assertTrue(self.store.unlink(digest))
        self.assertFalse(self.store.has(digest))
        self.assertIsNone(self.store.open(digest))
        self.assertEqual(b"evicted", content.read())

    def test_removing_what_is_not_there_is_no_mistake(self) -> None:
        """
        Two callers that remove the same content don't hinder each other.
        """
        self.store.evict_unused([Digest.of(b"x")])
        self.assertTrue(self.store.unlink(Digest.of(b"x")))
        self.store.index.forget(key_of("/v2/a/manifests/latest"))

    def test_a_saved_entry_replaces_the_one_before(self) -> None:
        key = key_of("/v2/a/manifests/latest")
        for data in (b"old", b"new"):
            self.store.save((key, entry_of(confirmed(data))))
        self.assertEqual(entry_of(confirmed(b"new")), self.store.entry(key))
