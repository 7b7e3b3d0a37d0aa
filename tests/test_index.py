"""
The index returns what was written to it: one suite for the file and for memory.
"""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cells import DamagedError, File, on_disk
from ecrproxy.cache.current_database import AGAIN_SECONDS
from ecrproxy.cache.database import BusyError, FullError, UnusableError, explained
from ecrproxy.cache.entries import ANSWERS_LIMIT, VARIANTS_LIMIT, Confirmed, Entry, EntryKey
from ecrproxy.cache.entry_rows import PAGE
from ecrproxy.cache.index import Index
from ecrproxy.cache.index_files import POINTER
from ecrproxy.cache.paths import arriving_path, content_path
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.record import Reservation
from ecrproxy.cache.sqlite import PURGES
from ecrproxy.cache.uses import COMING_SECONDS
from ecrproxy.identity import RegistryId
from ecrproxy.oci import BLOB_TYPE, INDEX_TYPE, MANIFEST_TYPES, Descriptor, Digest, Kind
from tests.routes import REGISTRY, route_to
from tests.store_contract import ANY, MANIFEST_TYPE, START, scratch

A = Digest.of(b"a")
ONE, OTHER = Reservation("one"), Reservation("other")
B = Digest.of(b"b")
C = Digest.of(b"c", "sha512")
MOVES, MOVES_OF_A_TAG = 10_000, 100
BOTH = frozenset({MANIFEST_TYPE, INDEX_TYPE})


def tag(name: str = "latest", repository: str = "team/app", variant: str = "") -> EntryKey:
    return EntryKey(REGISTRY, Kind.MANIFEST, repository, name, variant)


def held(digest: Digest, kind: Kind = Kind.BLOB, repository: str = "team/app", variant: str = "") -> EntryKey:
    return EntryKey(REGISTRY, kind, repository, str(digest), variant)


def confirmed(digest: Digest, when: float = START, manifest: Digest | None = None) -> Confirmed:
    return Confirmed(Descriptor(MANIFEST_TYPE, digest, 5), when, manifest)


class IndexContract:
    """
    Tests for each kind of index.
    """

    root: Path
    now: float
    index: Index

    def make(self) -> Index:
        raise NotImplementedError

    def setUp(self) -> None:
        self.root = scratch(self)  # type: ignore[arg-type]
        self.root.mkdir()
        self.now = START
        self.index = self.make()
        self.addCleanup(self.index.close)  # type: ignore[attr-defined]

    def file(self, digest: Digest, size: int = 1) -> Path:
        path = self.root / content_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        return path

    def order(self) -> list[Digest]:
        return [each.digest for each in self.index.least_recently_used()]


class ContentContract(IndexContract):
    def test_files_are_listed_by_digest_with_size_use_and_verification(self) -> None:
        self.index.add(A, 7)
        self.index.add(C, 9)
        files = self.index.files()
        assert [(each.digest, each.size) for each in files] == [(A, 7), (C, 9)]
        assert [round(each.used) for each in files] == [START, START]
        assert [each.verified is not None for each in files] == [True, True]
        assert self.index.files(after=A) == files[1:]
        assert self.index.known(B) is None

    def test_totals_count_whole_blocks_and_are_those_of_the_rows(self) -> None:
        assert self.index.totals[:3] == (0, 0, 0)
        for digest, size in ((A, 1), (B, 4096), (C, 4097), (A, 5000)):
            self.index.add(digest, size)
        assert self.index.totals[:3] == (3, 8192 + 4096 + 8192, 0)
        self.index.drop([A, Digest.of(b"unknown")])
        assert self.index.totals[:3] == (2, 4096 + 8192, 0)

    def test_the_least_recently_used_comes_first_also_after_uses_that_are_not_written_yet(self) -> None:
        for digest in (A, B, C):
            self.index.add(digest, 1)
        assert self.order() == [A, B, C]
        self.index.uses.use(A)
        assert self.order() == [B, C, A]

    def test_a_clock_that_is_set_back_makes_no_new_use_an_old_one(self) -> None:
        self.index.add(A, 1)
        self.now -= 3600
        self.index.add(B, 1)
        self.index.uses.use(A)
        assert self.order() == [B, A]

    def test_a_clock_that_begins_in_1970_makes_no_use_of_before(self) -> None:
        """
        A machine without a battery has no other clock until it is set: what was read ahead by then is of an hour
        before.
        """
        self.now = 60
        self.index.add(A, 1, used=self.now - 3600)
        self.index.add(B, 1)
        assert self.order() == [A, B]
        assert [each.used for each in self.index.files() if each.digest == A] == [0]
        assert not self.index.settle()
        self.now = START
        self.index.add(C, 1)
        assert self.order() == [A, B, C]

    def test_more_files_than_a_page_are_all_listed_in_order(self) -> None:
        digests = [Digest.of(str(number).encode()) for number in range(PAGE + 10)]
        for digest in digests:
            self.index.uses.use(digest)
            self.file(digest)
        self.index.settle()
        assert set(self.order()) == set(digests)
        pages = [self.index.files()]
        while pages[-1]:
            pages.append(self.index.files(after=pages[-1][-1].digest))
        listed = [each.digest for page in pages for each in page]
        assert listed == sorted(digests, key=str)

    def test_names_of_a_folder_are_listed_whole_and_alone(self) -> None:
        digests = [Digest("sha256", f"ab{number:062x}") for number in range(PAGE + 10)]
        others = [Digest("sha256", "aa" + "f" * 62), Digest("sha256", "ac" + "0" * 62), Digest("sha512", "ab" * 64)]
        self.index.adopt([File(each, 1, START) for each in (*digests, *others)])
        pages = list(self.index.names("sha256", "ab"))
        assert [len(each) for each in pages] == [PAGE, 10]
        assert set().union(*pages) == {each.hex for each in digests}
        assert list(self.index.names("sha512", "ab")) == [{"ab" * 64}]
        assert list(self.index.names("sha256", "ff")) == []

    def test_a_use_of_an_unknown_file_adopts_it_if_it_is_there(self) -> None:
        self.file(A, 10)
        self.index.uses.use(A)
        self.index.uses.use(B)
        self.index.settle()
        assert [(each.digest, each.size) for each in self.index.files()] == [(A, 10)]

    def test_a_use_of_what_still_arrives_is_noted_with_it(self) -> None:
        """
        By a client of this process, while another process fetches it, and has begun before any client asked.
        """
        coming = self.root / arriving_path(A)
        coming.parent.mkdir(exist_ok=True)
        coming.touch()
        self.index.add(B, 1)
        self.now += 1
        self.index.uses.use(A)
        self.index.settle()
        coming.unlink()
        self.file(A)
        self.index.add(A, 1, used=self.now - 3600)
        assert self.order() == [B, A]
        self.index.settle()
        assert [each.used for each in self.index.files() if each.digest == A] == [self.now]

    def test_a_use_of_what_does_not_come_is_forgotten(self) -> None:
        coming = self.root / arriving_path(A)
        coming.parent.mkdir(exist_ok=True)
        coming.touch()
        self.index.uses.use(A)
        self.now += COMING_SECONDS
        self.index.settle()
        self.index.add(A, 1, used=self.now - 3600)
        self.index.settle()
        assert [each.used for each in self.index.files()] == [self.now - 3600]

    def test_a_row_of_a_file_that_is_gone_is_dropped_when_that_is_noticed(self) -> None:
        self.file(B)
        for digest in (A, B):
            self.index.add(digest, 1)
            self.index.uses.gone(digest)
        self.index.settle()
        assert self.order() == [B]

    def test_a_file_that_comes_back_is_not_dropped(self) -> None:
        """
        The process found it gone, evicted or purged it, and reports that only after another process has fetched it
        again.
        """
        self.index.uses.gone(A)
        self.index.add(A, 1)
        self.file(A)
        self.index.settle()
        self.index.drop([A, B])
        self.index.purge([], [A])
        assert self.order() == [A]

    def test_a_later_verification_is_noted_and_is_no_use(self) -> None:
        for digest in (A, B):
            self.index.add(digest, 1)
        self.now += 60
        self.index.uses.verified(A)
        self.index.settle()
        assert [each.verified for each in self.index.files() if each.digest == A] == [START + 60]
        assert self.order() == [A, B]


class ArrivingContract(IndexContract):
    def test_a_reservation_is_granted_while_all_stays_within_the_limit(self) -> None:
        limit = 5 * 4096 + self.index.size
        self.index.add(A, 4096)
        assert self.index.reservations.reserve(ONE, 8192, limit) == 0
        assert self.index.reservations.reserve(OTHER, 12288, limit) == 4096
        assert self.index.totals[:3] == (1, 4096, 8192)
        assert self.index.reservations.reserve(OTHER, 8192, limit) == 0

    def test_a_reservation_ends_when_its_file_becomes_content_or_is_dropped(self) -> None:
        for each in (ONE, OTHER):
            self.index.reservations.reserve(each, 4096, 2**30)
        self.index.add(A, 4000, ONE)
        assert self.index.totals[:3] == (1, 4096, 4096)
        self.index.drop(arriving=[OTHER])
        self.index.drop(arriving=[OTHER])
        assert self.index.totals[:3] == (1, 4096, 0)

    def test_what_comes_late_from_one_holder_of_a_claim_leaves_its_successor_the_room(self) -> None:
        """
        Both have the same name. A successor's reservation replaces that of the previous holder.
        """
        limit = 8192 + self.index.size
        before, after = Reservation("one", "before"), Reservation("one", "after")
        assert self.index.reservations.reserve(before, 8192, limit) == 0
        assert self.index.reservations.reserve(after, 8192, limit) == 0
        self.index.drop(arriving=[before])
        self.index.add(A, 0, before)
        self.index.pass_over(before)
        assert self.index.arriving() == [(after, 8192, 0)]
        self.index.drop(arriving=[after])
        assert self.index.totals[:3] == (1, 0, 0)

    def test_an_interrupted_transfer_that_is_passed_over_is_none_until_it_is_noted_again(self) -> None:
        self.index.reservations.arrive(ONE, 4096, START)
        self.index.pass_over(ONE)
        assert self.index.arriving() == [(ONE, 4096, 0)]
        self.index.reservations.arrive(ONE, 4096, START)
        assert self.index.arriving() == [(ONE, 4096, START)]

    def test_what_arrives_is_listed_by_its_last_write(self) -> None:
        self.index.reservations.arrive(ONE, 1, START + 1)
        self.index.reservations.arrive(OTHER, 5000, START - 1)
        self.index.reservations.arrive(ONE, 2, START + 2)
        assert self.index.arriving() == [(OTHER, 8192, START - 1), (ONE, 4096, START + 2)]
        assert self.index.totals.arriving == 12288


class EntriesContract(IndexContract):
    def saved(self, key: EntryKey, *answers: tuple[frozenset[str], Confirmed]) -> Entry:
        entry = Entry(dict(answers))
        self.index.save([(key, entry)])
        return entry

    def test_the_answers_of_a_tag_are_given_back_each_for_its_types(self) -> None:
        entry = self.saved(
            tag(), (ANY, confirmed(A)), (BOTH, confirmed(B, START + 0.25)), (frozenset({INDEX_TYPE}), confirmed(C))
        )
        assert self.index.entry(tag()) == entry

    def test_what_a_repository_holds_is_given_back(self) -> None:
        entry = self.saved(held(A, Kind.MANIFEST), (ANY, confirmed(A)))
        assert self.index.entry(held(A, Kind.MANIFEST)) == entry

    def test_nothing_else_is_answered_by_an_entry(self) -> None:
        self.saved(tag(), (ANY, confirmed(A)))
        self.saved(held(A, Kind.MANIFEST), (ANY, confirmed(A)))
        others: Sequence[EntryKey] = [
            tag("older"),
            tag(repository="team/other"),
            tag()._replace(registry=RegistryId.of_host("other.example")),
            tag(variant="0" * 64),
            held(A, Kind.BLOB),
            held(B, Kind.MANIFEST),
            held(A, Kind.MANIFEST, "team/other"),
            held(A, Kind.MANIFEST, variant="0" * 64),
        ]
        for key in others:
            assert self.index.entry(key) is None, key

    def test_a_saved_answer_replaces_that_to_the_same_types_and_no_other(self) -> None:
        """
        Processes save answers for different clients: none removes another's answers.
        """
        self.saved(tag(), (ANY, confirmed(A)), (BOTH, confirmed(A)))
        self.saved(tag(), (BOTH, confirmed(B)))
        assert self.index.entry(tag()) == Entry({ANY: confirmed(A), BOTH: confirmed(B)})

    def test_an_answer_to_an_earlier_question_replaces_none(self) -> None:
        """
        Except one from before the clock was set back.
        """
        self.saved(tag(), (ANY, confirmed(A, START)))
        self.saved(tag(), (ANY, confirmed(B, START - 1)))
        assert self.index.entry(tag()) == Entry({ANY: confirmed(A, START)})
        self.saved(tag(), (ANY, confirmed(A, START + 10**6)))
        self.saved(tag(), (ANY, confirmed(B, START - 1)))
        assert self.index.entry(tag()) == Entry({ANY: confirmed(B, START - 1)})

    def test_answers_to_later_questions_are_not_forgotten(self) -> None:
        self.saved(tag(), (ANY, confirmed(A, START)), (BOTH, confirmed(B, START - 1)))
        self.index.forget_answers(tag(), [ANY, BOTH], START - 1)
        assert self.index.entry(tag()) == Entry({ANY: confirmed(A, START)})
        self.saved(tag(), (ANY, confirmed(A, START + 10**6)))
        self.index.forget_answers(tag(), [ANY], START - 1)
        assert self.index.entry(tag()) is None

    def test_single_answers_of_a_tag_are_forgotten(self) -> None:
        for key in (tag(), tag("older")):
            self.saved(key, (ANY, confirmed(A)), (BOTH, confirmed(B)))
        self.index.forget_answers(tag(), [BOTH, frozenset({INDEX_TYPE})], START)
        self.index.forget_answers(tag("unknown", "team/other"), [BOTH], START)
        assert self.index.entry(tag()) == Entry({ANY: confirmed(A)})
        assert self.index.entry(tag("older")) == Entry({ANY: confirmed(A), BOTH: confirmed(B)})
        self.index.forget_answers(tag(), [ANY], START)
        assert self.index.entry(tag()) is None

    def test_a_fact_is_one_whatever_the_cache_key(self) -> None:
        self.saved(held(A), (ANY, confirmed(A, manifest=B)))
        found = self.index.entry(held(A, variant="0" * 64))
        assert found is not None
        assert found.answers[ANY].manifest == B

    def test_what_ecr_was_asked_for_by_itself_does_not_become_a_fact(self) -> None:
        self.saved(held(A), (ANY, confirmed(A, manifest=B)))
        self.saved(held(A), (ANY, confirmed(A, START + 1)))
        self.saved(held(A), (ANY, confirmed(A, START + 2, manifest=B)))
        found = self.index.entry(held(A))
        assert found is not None
        assert found.answers[ANY].manifest is None
        assert found.answers[ANY].when == START + 2

    def test_a_blob_has_the_type_of_blobs(self) -> None:
        self.saved(held(A), (ANY, Confirmed(Descriptor("application/x-layer", A, 5), START)))
        found = self.index.entry(held(A))
        assert found is not None
        assert found.answers[ANY].descriptor == Descriptor(BLOB_TYPE, A, 5)

    def moved(self, digest: Digest, when: float, name: str = "latest", accept: frozenset[str] = ANY) -> None:
        """
        Have ECR return where a tag leads.
        """
        entry = self.index.entry(tag(name)) or Entry()
        self.index.save([(tag(name), entry.with_answer(accept, confirmed(digest, when)))])

    def test_a_move_of_a_tag_is_noted_once_the_newest_first(self) -> None:
        for when, digest in enumerate((A, A, B, B, A, B)):
            self.moved(digest, START + when)
        assert self.index.moves(tag()) == [(A, B, START + 5), (B, A, START + 4), (A, B, START + 2)]
        assert self.index.moves(tag("other")) == []
        assert self.index.moves(tag(repository="team/other")) == []

    def test_a_move_that_clients_of_several_types_see_is_one(self) -> None:
        for when, digest in enumerate((A, B, A)):
            for number, accept in enumerate((ANY, BOTH, frozenset({INDEX_TYPE}))):
                self.moved(digest, START + when + number / 10, accept=accept)
        assert [each[:2] for each in self.index.moves(tag())] == [(B, A), (A, B)]

    def test_so_many_moves_of_a_tag_and_of_all_are_kept(self) -> None:
        """
        A tag that moves all the time does not displace the moves of others.
        """
        self.moved(A, START, "other")
        self.moved(B, START, "other")
        entries = [Entry({ANY: confirmed((A, B)[number % 2], START + number)}) for number in range(MOVES_OF_A_TAG + 5)]
        self.index.save([(tag(), each) for each in entries])
        assert len(self.index.moves(tag())) == MOVES_OF_A_TAG
        assert self.index.moves(tag())[0][2] == START + MOVES_OF_A_TAG + 4
        assert len(self.index.moves(tag("other"))) == 1
        names = [f"t{number}" for number in range(MOVES // (MOVES_OF_A_TAG - 1) + 1)]
        for name in names:
            self.index.save([(tag(name), each) for each in entries[:MOVES_OF_A_TAG]])
        assert self.index.moves(tag("other")) == []
        assert MOVES - MOVES_OF_A_TAG <= sum(len(self.index.moves(tag(name))) for name in names) <= MOVES

    def test_a_forgotten_entry_is_a_miss(self) -> None:
        keys = tag(), held(A)
        for key in keys:
            self.saved(key, (ANY, confirmed(A)))
        self.index.forget(*keys, tag("unknown"))
        assert [self.index.entry(key) for key in keys] == [None, None]

    def test_entries_are_listed_whole_with_their_last_use(self) -> None:
        accepts = [frozenset({each}) for each in sorted(BOTH)]
        tags = {tag(f"t{number:04}"): accepts for number in range(PAGE // 2)}
        self.index.save([(key, Entry(dict.fromkeys(each, confirmed(A)))) for key, each in tags.items()])
        self.index.save([(tag("u"), Entry({ANY: confirmed(A, START + 5)}))])
        blobs = [Digest.of(str(number).encode()) for number in range(PAGE + 5)]
        self.index.save([(held(each, repository="a"), Entry({ANY: confirmed(each)})) for each in blobs])
        self.now += 60
        self.index.add(blobs[0], 1)
        listed = {key: (entry, used) for key, entry, used in self.index.entries()}
        assert len(listed) == PAGE // 2 + 1 + len(blobs)
        assert all(len(listed[key][0].answers) == 2 for key in tags)
        assert listed[tag("u")][1] == START + 5
        assert round(listed[held(blobs[0], repository="a")][1]) == START + 60
        assert listed[held(blobs[1], repository="a")][1] == START

    def test_entries_that_lead_to_nothing_any_more_go_after_a_time(self) -> None:
        self.index.add(A, 1)
        for digest in (A, B):
            self.saved(held(digest), (ANY, confirmed(digest)))
            self.saved(tag(digest.hex[:8]), (ANY, confirmed(digest)))
        self.saved(held(C), (ANY, confirmed(C, START + 100)))
        for _ in self.index.forget_absent(START + 50):
            pass
        assert {key.reference for key, _, _ in self.index.entries()} == {str(A), A.hex[:8], str(C)}

    def test_entries_stay_whose_content_arrives_however_old_the_clock_makes_them(self) -> None:
        for digest in (A, B, C):
            self.saved(held(digest), (ANY, confirmed(digest)))
            self.saved(tag(digest.hex[:8]), (ANY, confirmed(digest)))
        for digest in (A, C):
            self.index.reservations.arrive(Reservation(arriving_path(digest).rpartition("/")[2]), 1)
        for _ in self.index.forget_absent(START + 3650 * 86400):
            pass
        left = {key.reference for key, _, _ in self.index.entries()}
        assert left == {str(A), A.hex[:8], str(C), C.hex[:8]}

    def test_as_many_answers_as_an_entry_may_have_are_kept(self) -> None:
        """
        Those that were not confirmed for the longest time make room, whoever saves new ones.
        """
        kinds = sorted(MANIFEST_TYPES)
        accepts = [frozenset(each) for size in range(len(kinds)) for each in itertools.combinations(kinds, size)]
        number = ANSWERS_LIMIT + 3
        answers = {accept: confirmed(A, START + at) for at, accept in enumerate(itertools.islice(accepts, number))}
        assert len(answers) == number
        for accept, answer in answers.items():
            self.saved(tag(), (accept, answer))
        assert self.index.entry(tag()) == Entry(dict(list(answers.items())[3:]))

    def test_as_many_variants_of_a_reference_as_there_may_be_are_kept(self) -> None:
        """
        With some cache keys a client can create any number: those not confirmed for the longest time go, but none of
        the default key.
        """
        for key in (tag(), held(A), held(A, Kind.MANIFEST)):
            variants = [f"{number:064x}" for number in range(VARIANTS_LIMIT + 3)]
            self.index.save([(key, Entry({ANY: confirmed(A)}))])
            self.index.save(
                [
                    (key._replace(variant=variant), Entry({ANY: confirmed(A, START + at)}))
                    for at, variant in enumerate(variants, 1)
                ]
            )
            found = [variant for variant in variants if self.index.entry(key._replace(variant=variant))]
            assert found == variants[3:]
            assert self.index.entry(key)


class PurgeContract(IndexContract):
    def test_a_purge_is_told_row_by_row_and_once(self) -> None:
        self.index.save([(tag(), Entry({ANY: confirmed(A)})), (held(A), Entry({ANY: confirmed(A)}))])
        self.index.add(A, 1)
        assert self.index.settle() == News()
        assert self.index.purge([tag(), held(A), held(B)], [A]) == 2
        assert self.index.totals[:3] == (0, 0, 0)
        assert list(self.index.entries()) == []
        assert self.index.settle() == News(purged=[tag(), held(A), held(B), A])
        assert self.index.settle() == News()

    def test_a_purge_of_very_much_is_told_as_everything(self) -> None:
        digests = [Digest.of(str(number).encode()) for number in range(PURGES + 1)]
        self.index.purge([], digests)
        assert self.index.settle() == News(everything=True)


class MemoryTests(ContentContract, ArrivingContract, EntriesContract, PurgeContract, SynchronousTestCase):
    def make(self) -> Index:
        return Index(self.root, lambda: self.now, memory=True)

    def test_leaves_no_file_and_takes_no_disk(self) -> None:
        assert (list(self.root.iterdir()), self.index.size, self.index.database.shared) == ([], 0, False)


class FileTests(ContentContract, ArrivingContract, EntriesContract, PurgeContract, SynchronousTestCase):
    def make(self) -> Index:
        index = Index(self.root, lambda: self.now)
        index.open()
        return index

    def other(self) -> Index:
        """
        Open the index as another process does.
        """
        index = Index(self.root, lambda: self.now)
        index.open()
        self.addCleanup(index.close)
        return index

    def test_nothing_is_made_before_somebody_asks(self) -> None:
        """
        A daemon starts even if its disk hangs.
        """
        index = Index(self.root / "new", lambda: self.now)
        self.addCleanup(index.close)
        index.uses.use(A)
        assert (index.database.shared, index.totals.files, (self.root / "new").exists()) == (False, 0, False)

    def test_nothing_is_made_where_a_volume_is_not_mounted_any_more(self) -> None:
        """
        The index is in memory until the volume is mounted again.
        """
        gone, root = [OSError(errno.ENODEV, "not mounted")], self.root / "mount"
        root.mkdir()

        def look() -> None:
            for each in gone:
                raise each

        index = Index(root, lambda: self.now, before_opening=look)
        self.addCleanup(index.close)
        index.add(A, 1)
        assert (index.database.shared, list(root.iterdir())) == (False, [])
        assert "not mounted" in index.database.problem
        gone.clear()
        self.now += AGAIN_SECONDS
        index.settle()
        assert (index.database.shared, index.database.unfit, index.database.problem) == (True, False, "")

    def test_another_process_sees_all_rows_within_a_second(self) -> None:
        other = self.other()
        self.index.add(A, 1)
        self.index.save([(tag(), Entry({ANY: confirmed(A)}))])
        assert other.known(A) is not None
        assert other.entry(tag()) is not None
        other.settle()
        assert other.totals[:3] == (1, 4096, 0)

    def test_a_clock_that_is_set_back_makes_no_new_use_of_any_process_an_old_one(self) -> None:
        other = self.other()
        self.now += 3600
        for digest in (A, B):
            self.index.add(digest, 1)
        self.now -= 7200
        other.uses.use(A)
        other.settle()
        other.add(C, 1)
        assert self.order() == [B, A, C]

    def test_what_a_newer_version_has_purged_is_told_as_everything(self) -> None:
        self.index.settle()
        writer = self.index.database.rows._writer  # noqa: SLF001
        writer.execute("INSERT INTO purge (what) VALUES ('something of the next version')")
        assert self.index.settle() == News(everything=True)
        assert self.index.settle() == News()

    def test_another_process_hears_of_a_purge(self) -> None:
        other = self.other()
        other.settle()
        self.index.purge([tag()], [A])
        assert other.settle() == News(purged=[tag(), A])
        assert other.settle() == News()

    def test_a_purge_is_heard_of_while_uses_can_not_be_written(self) -> None:
        other = self.other()
        other.settle()
        other.database.rows._writer.execute("PRAGMA busy_timeout = 0")  # noqa: SLF001
        self.index.purge([tag()], [A])
        self.index.database.rows._writer.execute("BEGIN IMMEDIATE")  # noqa: SLF001
        other.uses.use(B)
        assert other.settle() == News(purged=[tag(), A])

    def test_a_purge_that_could_not_be_read_is_told_as_everything_afterwards(self) -> None:
        other = self.other()
        other.settle()
        self.index.purge([tag()], [A])
        real = other.database.rows.purged_since

        def fails(_: int) -> None:
            other.database.rows.purged_since = real  # type: ignore[method-assign]
            raise UnusableError("disk I/O error")

        other.database.rows.purged_since = fails  # type: ignore[assignment,method-assign]
        assert other.settle() == News()
        assert other.settle() == News(everything=True)
        assert other.settle() == News()

    def test_two_processes_do_not_promise_the_same_room(self) -> None:
        other, limit = self.other(), 8192 + self.index.size
        assert self.index.reservations.reserve(ONE, 8192, limit) == 0
        assert other.reservations.reserve(OTHER, 4096, limit) > 0

    def test_what_was_written_is_there_after_a_kill(self) -> None:
        self.index.add(A, 1)
        self.index.uses.use(A)  # not written: it is lost
        assert [each.digest for each in self.other().files()] == [A]

    def test_its_files_are_its_users_alone(self) -> None:
        """
        They list the content of a private registry, and a process that can read one can keep its log from ever ending.
        """
        self.addCleanup(os.umask, os.umask(0o022))
        self.other()
        self.index.add(A, 1)
        for lost in self.root.glob(f"{POINTER}*"):
            lost.unlink()
        self.other().add(B, 1)
        readable = [each.name for each in self.root.iterdir() if each.is_file() and each.stat().st_mode & 0o077]
        assert readable == []

    def test_its_files_count(self) -> None:
        self.index.add(A, 1)
        self.index.settle()
        taken = sum(path.stat().st_blocks * 512 for path in self.root.glob(f"{POINTER}*"))
        assert self.index.size == taken > 4096

    def test_a_change_that_meets_another_writer_is_made_later_and_in_order(self) -> None:
        blocker = sqlite3.connect(next(self.root.glob("*.sqlite3")), isolation_level=None)
        self.addCleanup(blocker.close)
        self.index.database.rows._writer.execute("PRAGMA busy_timeout = 0")  # noqa: SLF001
        blocker.execute("BEGIN IMMEDIATE")
        self.index.save([(tag(), Entry({ANY: confirmed(A)}))])
        self.index.save([(tag(), Entry({ANY: confirmed(B)}))])
        self.index.uses.use(B)
        self.index.settle()
        assert self.index.entry(tag()) is None
        self.assertRaises(BusyError, self.index.written, tag())
        assert self.index.changes.busy > 0
        self.assertRaises(BusyError, self.index.reservations.reserve, "one", 1, 2**30)
        blocker.execute("ROLLBACK")
        self.index.settle()
        found = self.index.written(tag())
        assert found is not None
        assert found.answers[ANY].descriptor.digest == B

    def test_of_those_who_meet_another_writer_one_waits_for_all(self) -> None:
        """
        That writer may be stopped in the middle: pulls go on without the index, without a timeout each.
        """
        blocker = sqlite3.connect(next(self.root.glob("*.sqlite3")), isolation_level=None)
        self.addCleanup(blocker.close)
        self.index.database.rows._writer.execute("PRAGMA busy_timeout = 100")  # noqa: SLF001
        blocker.execute("BEGIN IMMEDIATE")
        waiting = self.index.database.rows._transaction  # noqa: SLF001
        waits: list[object] = []

        def refused() -> None:
            self.assertRaises(BusyError, self.index.reservations.reserve, Reservation("late"), 1, 2**30)

        def counted(**options: bool) -> object:
            waits.append(options)
            return waiting(**options)

        self.patch(self.index.database.rows, "_transaction", counted)
        for number in range(20):
            self.assertRaises(BusyError, self.index.reservations.reserve, Reservation(f"{number}"), 1, 2**30)
            self.index.save([(tag(repository=f"team/app{number}"), Entry({ANY: confirmed(A)}))])
        assert len(waits) == 1
        with self.index.changes._flushing:  # noqa: SLF001 (as a thread has it that waits for the other process)
            late = threading.Thread(target=self.index.save, args=([(tag(), Entry({ANY: confirmed(B)}))],), daemon=True)
            reserving = threading.Thread(target=refused, daemon=True)
            for each in (late, reserving):
                each.start()
                each.join(5)
                assert not each.is_alive()
        self.index.settle()
        assert len(waits) == 2
        assert self.index.entry(tag(repository="team/app0")) is None
        blocker.execute("ROLLBACK")
        self.index.settle()
        assert self.index.written(tag(repository="team/app19")) is not None
        assert self.index.reservations.reserve(Reservation("name"), 1, 2**30) == 0

    def test_it_is_opened_while_another_process_writes(self) -> None:
        """
        A worker that is replaced knows what the others know.
        """
        self.index.save([(tag(), Entry({ANY: confirmed(A)}))])
        blocker = sqlite3.connect(next(self.root.glob("*.sqlite3")), isolation_level=None)
        self.addCleanup(blocker.close)
        blocker.execute("BEGIN IMMEDIATE")
        other = Index(self.root, lambda: START)
        self.addCleanup(other.close)
        other.open()
        assert other.database.shared
        assert other.entry(tag()) is not None

    def test_more_repositories_than_are_remembered_are_saved(self) -> None:
        """
        While other threads look for more.
        """
        keys = [tag(repository=f"team/app{number}") for number in range(PAGE + 10)]
        rows = self.index.database.rows
        real = rows._remember_repository  # noqa: SLF001

        def remember(names: tuple[str, str], number: int) -> None:
            real(names, number)
            if number == PAGE:
                rows._repositories.clear()  # noqa: SLF001

        self.patch(rows, "_remember_repository", remember)
        self.index.save([(key, Entry({ANY: confirmed(A)})) for key in keys])
        assert all(self.index.entry(key) is not None for key in keys)

    def test_what_comes_late_does_not_bring_back_what_was_purged_meanwhile(self) -> None:
        other = self.other()
        other.settle()
        other.database.rows._writer.execute("PRAGMA busy_timeout = 0")  # noqa: SLF001
        writer = self.index.database.rows._writer  # noqa: SLF001
        writer.execute("BEGIN IMMEDIATE")
        other.save([(tag(), Entry({ANY: confirmed(A)})), (tag("kept"), Entry({ANY: confirmed(A)}))])
        writer.execute("ROLLBACK")
        self.index.purge([tag()], [])
        assert other.settle() == News(purged=[tag()])
        assert (other.entry(tag()), self.index.entry(tag())) == (None, None)
        assert other.entry(tag("kept")) is not None


class ErrorTests(SynchronousTestCase):
    def test_errors_of_sqlite_are_told_as_what_they_mean(self) -> None:
        for code, kind in (
            (sqlite3.SQLITE_BUSY, BusyError),
            (sqlite3.SQLITE_BUSY_SNAPSHOT, BusyError),
            (sqlite3.SQLITE_CORRUPT, DamagedError),
            (sqlite3.SQLITE_NOTADB, DamagedError),
            (sqlite3.SQLITE_IOERR_SHORT_READ, DamagedError),
            (sqlite3.SQLITE_FULL, FullError),
            (sqlite3.SQLITE_IOERR_SHMSIZE, FullError),
            (sqlite3.SQLITE_READONLY, UnusableError),
            (sqlite3.SQLITE_ERROR, UnusableError),
        ):
            problem = sqlite3.OperationalError("said")
            problem.sqlite_errorcode = code
            self.assertIs(kind, type(explained(problem)))

    def test_a_file_takes_whole_blocks(self) -> None:
        self.assertEqual([0, 4096, 4096, 8192], [on_disk(size) for size in (0, 1, 4096, 4097)])


class EntryKeyTests(SynchronousTestCase):
    def test_a_key_is_read_as_it_was_written(self) -> None:
        for key in (tag(), held(A, variant="0" * 64)):
            self.assertEqual(key, EntryKey.parse(str(key)))
        for wrong in ("", "a b c", f"{tag()} x", str(tag()).replace("manifests", "other")):
            self.assertRaises(ValueError, EntryKey.parse, wrong)

    def test_the_default_cache_key_is_no_variant(self) -> None:
        route = route_to("/v2/a/manifests/latest")
        self.assertEqual("", EntryKey.of(route, route.path).variant)
        variant = EntryKey.of(route, "other").variant
        self.assertEqual(64, len(variant))
        self.assertNotEqual(variant, EntryKey.of(route, "another").variant)
