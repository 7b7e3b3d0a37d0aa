"""
The claims about one daemon hold for two on one directory that clients use in turn.
"""

from __future__ import annotations

from tests import test_outages, test_parts, test_proxy, test_resuming, test_verification, test_web
from tests.pairs import TwoDaemons, without

PROOFS = "each process proves a file by itself, at its first use"
KNOWN = "each process has its own token, circuit, names and lists"
LATER = "those who follow look every 20 ms, and wait for the writer to be left for a while"
UNTOLD = "another process can't be asked to fetch a part first: these bytes come twice"


class OfflineTests(TwoDaemons, test_outages.EcrTests):
    pass


class StaleTests(TwoDaemons, test_proxy.StaleTests):
    pass


@without(
    test_one_question_for_all_who_ask_at_once="tags are asked for once per process",
    test_confirmed_anew_is_trusted_anew="the other process has not heard of the confirmation",
    test_after_a_clock_was_set_is_trusted_for_its_time="one machine has one clock",
    test_of_the_future_is_not_trusted="one machine has one clock",
)
class TagTests(TwoDaemons, test_proxy.TagTests):
    pass


class BlobTests(TwoDaemons, test_proxy.BlobTests):
    pass


@without(
    test_a_clock_that_is_set_disturbs_no_transfer="years later, who has not heard of it asks for permission anew",
    test_errors_are_shared=LATER,
    test_stalls_end_the_answers=LATER,
    test_what_goes_on_breaking_off_breaks_for_all_and_not_for_the_next=LATER,
    test_who_leaves_before_ecr_answers_cancels_nobody=LATER,
)
class TogetherTests(TwoDaemons, test_proxy.TogetherTests):
    pass


@without(test_what_a_manifest_vouches_for_is_written_once="once per process")
class PermissionTests(TwoDaemons, test_proxy.PermissionTests):
    pass


class RangeTests(TwoDaemons, test_web.BlobRangeTests):
    pass


class SeveralRangesTests(TwoDaemons, test_parts.SeveralRangesTests):
    pass


@without(
    test_is_for_no_cache_in_between_until_the_whole_is_verified=PROOFS,
    test_the_first_file_of_a_layer_that_is_asked_for_without_a_range=UNTOLD,
)
class ColdPartTests(TwoDaemons, test_parts.ColdPartTests):
    pass


class LeftOverPartTests(TwoDaemons, test_parts.LeftOverPartTests):
    pass


class CrashTests(TwoDaemons, test_resuming.CrashTests):
    pass


@without(test_the_next_request_goes_on="it counts what is promised by what one process has seen up to a second ago")
class ResumingTests(TwoDaemons, test_resuming.FailureTests):
    pass


class LeftOverLimitTests(TwoDaemons, test_resuming.LimitTests):
    pass


@without(
    test_are_one_line_of_log_however_many_clients_they_cost="once per process",
    test_of_another_size_under_way_have_no_part_refused=LATER,
)
class WrongBytesTests(TwoDaemons, test_web.WrongBytesTests):
    pass


@without(
    test_a_file_is_hashed_once=PROOFS,
    test_a_reader_that_leaves_ends_no_proof=PROOFS,
    test_all_readers_of_a_bad_file_fail=PROOFS,
    test_what_arrived_just_now_is_proved=PROOFS,
)
class AlteredTests(TwoDaemons, test_verification.AlteredTests):
    pass
