"""
Messages between parent and workers are checked against their types.
"""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.snapshot import (
    Answers,
    Clients,
    Fill,
    Leaving,
    RegistryState,
    Standing,
    TokenState,
    Transfer,
    UpstreamState,
)
from ecrproxy.metrics import BUCKETS, Tally
from ecrproxy.prefetch_progress import PrefetchProgress
from ecrproxy.readiness import Readiness
from ecrproxy.workers.messages import (
    ITEMS,
    LIMIT,
    TEXT,
    Counted,
    FiguresTold,
    FromParent,
    FromWorker,
    Listens,
    PrefetchOrder,
    PrefetchTold,
    ReadinessTold,
    Refused,
    Reload,
    Reread,
    StandingTold,
    StateRequest,
    StopPrefetch,
    decode,
    encode,
)

ROW = ("blob", "GET", "200", "HIT", "one.test"), 1, 300, 0.5, (0,) * (len(BUCKETS) + 1)
INCIDENT = (1000.5, "warn", "the disk fails", 3, "kind", "once")
ASKED = "team/app", "192.0.2.7", "v1", 1001.5, 3
FAILED = "/v2/team/app/manifests/1", 502, "upstream-failed", 1000.5, 1001.5, 3, "192.0.2.7"
COUNTED = Counted(
    (ROW,),
    ((("bucket", "206", "one.test"), *ROW[1:]),),
    (("team/app", 300, 1),),
    (FAILED,),
    (ASKED,),
    (INCIDENT,),  # type: ignore[arg-type]
)
STANDING = Standing(
    Readiness(can_serve=True, can_fetch=False, reasons=("no token: denied",)),
    Fill(10, 20, 30, 2, 1, (Leaving("unfinished", "sha256:1", 5, 6.5), Leaving("content", "sha256:0", 5, 7.5))),
    (Transfer("team/app", "sha256:0", None, 5, 2, kept=True),),
    (
        RegistryState(
            "one.test",
            TokenState(None, 1e9, 60.0, 0),
            UpstreamState("closed", 2, None, {"blobs": 1}, 3, {"bucket": {"206": 1}}),
            {"HIT": Answers(1, 300)},
        ),
    ),
    Clients(3, None, 2, 0.5),
)
OF_WORKERS = (
    Listens(),
    Refused("no credentials"),
    COUNTED,
    ReadinessTold(1, STANDING.readiness),
    StandingTold(2, STANDING),
    PrefetchTold(7, PrefetchProgress(1, 300, 200, 100, 2, 1, "not there", over=True)),
    FiguresTold(3, {"cache_bytes": {"": 5.0}, "circuit_state": {"open": 0.0, "closed": 1.0}}),
)
OF_PARENTS = (
    Reload(("[{}, ", "{}]")),
    StateRequest(4, "standing"),
    Reread("ab" * 32),
    PrefetchOrder(7, "docker.io:443", "library/app", "v1", ("linux/amd64",)),
    StopPrefetch(7),
)


WRONG_TEXTS: list[Any] = [None, 1, ["x"], {}, "x" * (TEXT + 1), "\ud800"]
WRONG_FIGURES: list[Any] = [[], {"a": 1}, {"a": {"": "1"}}, {"a": {"": True}}]
WRONG_NUMBERS: list[Any] = ["1", 1.0, True, None, 2**64]


def text_of(name: str, **content: Any) -> bytes:
    """
    Return a text that may be no message.
    """
    return json.dumps([name, content]).encode()


class MessagesTests(SynchronousTestCase):
    def refuses(self, data: bytes, known: Any = FromWorker) -> None:
        """
        Assert that it is no message.
        """
        try:
            found = decode(data, known)
        except ValueError:
            return
        self.fail(f"{found!r} was taken from {data[:100]!r}")

    def test_are_read_as_they_were_written(self) -> None:
        for known, messages in ((FromWorker, OF_WORKERS), (FromParent, OF_PARENTS)):
            self.assertEqual(messages, tuple(decode(encode(each), known) for each in messages))

    def test_there_is_an_example_of_each(self) -> None:
        self.assertEqual(
            {*get_args(FromWorker), *get_args(FromParent)}, {type(each) for each in OF_WORKERS + OF_PARENTS}
        )

    def test_what_a_tally_has_counted_is_one(self) -> None:
        tally = Tally()
        tally.note(("blob", "GET", "200", "HIT", "one.test"), 0.25, 5)
        rows = tuple(tally.take())
        told = decode(encode(Counted(rows, (), (), (), (), ())), FromWorker)  # type: ignore[arg-type]
        sums = Tally()
        sums.add(told.requests)
        self.assertEqual(rows, tuple(sums.rows()))

    def test_go_in_one_direction(self) -> None:
        """
        A worker can't ask its parent, nor tell another worker what to reload.
        """
        for each in OF_PARENTS:
            self.refuses(encode(each))
        for message in OF_WORKERS:
            self.refuses(encode(message), FromParent)

    def test_that_are_none_are_refused(self) -> None:
        """
        Nonsense, other names, more or fewer fields, other types, numbers and texts out of bounds, endless lists.
        """
        for data in (
            *(b"", b"{}", b"[]", b"null", b"nonsense", b'"Listens"', b"[1,{}]", b'["Listens",{},{}]', b"\xff\xfe"),
            *(b"[" * 100_000, b'["Refused",{"problem":' + b"[" * 100_000, b"9" * 10_000),
            *(
                b'["ReadinessTold",{"number":1,"readiness":NaN}]',
                b'["FiguresTold",{"number":1,"figures":{"a":{"":NaN}}}]',
            ),
            *(
                text_of("Nothing"),
                text_of("Listens", surplus=1),
                text_of("Refused"),
                text_of("object"),
                text_of("type"),
            ),
            *(text_of("Refused", problem=each) for each in WRONG_TEXTS),
            *(text_of("ReadinessTold", number=each, readiness=None) for each in WRONG_NUMBERS),
            text_of("ReadinessTold", number=True, readiness={"can_serve": True, "can_fetch": True, "reasons": []}),
            text_of("ReadinessTold", number=1, readiness={"can_serve": 1, "can_fetch": True, "reasons": []}),
            text_of("ReadinessTold", number=1, readiness={"can_serve": True, "can_fetch": True, "reasons": "no"}),
            *(text_of("FiguresTold", number=1, figures=each) for each in WRONG_FIGURES),
            text_of("FiguresTold", number=2**64, figures={}),
            text_of("FiguresTold", number=1, figures={str(each): {} for each in range(ITEMS + 1)}),
        ):
            self.refuses(data)
        for about in ("nothing", 1, None, ["standing"]):
            self.refuses(text_of("Question", number=1, about=about), FromParent)

    def test_counts_have_the_labels_and_buckets_that_counts_have(self) -> None:
        for row in (
            [["blob", "GET", "200"], 1, 1, 1.0, [0] * 9],
            [["blob", "GET", "200", "HIT"], 1, 1, 1.0, [0] * 8],
            [["blob", "GET", "200", 1], 1, 1, 1.0, [0] * 9],
            [["blob", "GET", "200", "HIT"], 1, 1, 1.0],
            ["blob", 1, 1, 1.0, [0] * 9],
        ):
            self.refuses(text_of("Counted", requests=[row], upstream=[], saved=[], incidents=[]))
        for incident in ([1.0, "info", "x", 1, "a", "b"], [1.0, "warn", "x", 1, "a"], ["1", "warn", "x", 1, "a", "b"]):
            self.refuses(text_of("Counted", requests=[], upstream=[], saved=[], incidents=[incident]))

    def test_that_are_too_large_are_not_written(self) -> None:
        self.assertRaises(
            ValueError, encode, FiguresTold(1, {f"{each}" * 30: {"x" * TEXT: 1.0} for each in range(1500)})
        )

    @given(st.text(), st.floats(), st.integers(0, 2**62), st.lists(st.text(st.characters()), max_size=3))
    def test_whatever_clients_choose_can_be_told(self, text: str, number: float, count: int, texts: list[str]) -> None:
        """
        Lone surrogates, endless texts, NaN: the parent rejects no message because of them.
        """
        odd = (text + "\ud800") * 500
        readiness = Readiness(can_serve=True, can_fetch=True, reasons=(*texts, odd) * 400)
        for message in (
            Refused(odd),
            ReadinessTold(count, readiness),
            FiguresTold(count, {"cache_bytes": {odd: number}}),
            Counted(
                (),
                (),
                ((odd, count, count),),
                ((odd, count, odd, number, number, count, odd),),
                ((odd, odd, odd, number, count),),
                ((number, "warn", odd, count, odd, odd),),
            ),
        ):
            try:
                data = encode(message)
            except ValueError:
                self.assertGreater(len(str(message)), LIMIT // 20)
            else:
                decode(data, FromWorker)

    def test_have_fields_that_can_be_checked(self) -> None:
        """
        A type that L{decode} does not know would reject every message of its kind: there is an example of each above.
        """
        for kind in (*get_args(FromWorker), *get_args(FromParent)):
            self.assertTrue(is_dataclass(kind))
        self.assertIsInstance(FromWorker, UnionType)
