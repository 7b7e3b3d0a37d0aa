"""
Changes to one thing are made one after another, and the newest of them lasts.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.ordering import KEPT, KeyedLocks, Order, Places

ONE, OTHER = frozenset({"one"}), frozenset({"other"})


class KeyedLocksTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.turns = KeyedLocks()
        self.log: list[str] = []

    def work(self, key: str, name: str) -> tuple[Deferred[None], Deferred[str]]:
        """
        Take a turn that ends when the first of these fires; the second fires with its result.
        """
        gate: Deferred[None] = Deferred()

        async def work() -> str:
            self.log.append(f"{name} begins")
            await gate
            self.log.append(f"{name} ends")
            return name

        return gate, Deferred.fromCoroutine(self.turns.run(key, work))

    def test_one_key_is_one_after_another(self) -> None:
        works = [self.work("key", name) for name in "abc"]
        for gate, _ in reversed(works):
            gate.callback(None)
        self.assertEqual([f"{name} {what}" for name in "abc" for what in ("begins", "ends")], self.log)
        self.assertEqual(list("abc"), [self.successResultOf(result) for _, result in works])

    def test_keys_do_not_wait_for_each_other(self) -> None:
        self.work("key", "a")
        self.work("other", "b")
        self.assertEqual(["a begins", "b begins"], self.log)

    def test_a_failure_ends_its_turn_alone(self) -> None:
        (gate, failing), (other, waiting) = self.work("key", "a"), self.work("key", "b")
        gate.errback(ZeroDivisionError())
        self.failureResultOf(failing, ZeroDivisionError)
        other.callback(None)
        self.assertEqual("b", self.successResultOf(waiting))

    def test_what_waits_in_vain_leaves_no_lock(self) -> None:
        (gate, _), (_, cancelled), (last, result) = (self.work("key", name) for name in "abc")
        cancelled.cancel()
        self.failureResultOf(cancelled)
        gate.callback(None)
        last.callback(None)
        self.assertEqual("c", self.successResultOf(result))
        self.assertEqual([{}], list(vars(self.turns).values()))

    def test_any_number_may_have_waited_for_work_that_ends_at_once(self) -> None:
        gate, first = self.work("key", "a")

        async def work() -> str:
            return "done"

        waiting = [Deferred.fromCoroutine(self.turns.run("key", work)) for _ in range(1000)]
        gate.callback(None)
        self.assertEqual("a", self.successResultOf(first))
        self.assertEqual({"done"}, {self.successResultOf(each) for each in waiting})
        self.assertEqual([{}], list(vars(self.turns).values()))


class PlacesTests(SynchronousTestCase):
    def test_so_many_work_at_once(self) -> None:
        places, gates, done = Places(2), [Deferred[None]() for _ in range(1000)], list[int]()

        async def work(number: int) -> None:
            async with places.turn():
                await gates[number]
                done.append(number)

        self.assertTrue(places.idle)
        works = [Deferred.fromCoroutine(work(number)) for number in range(len(gates))]
        for gate in gates[2:]:
            gate.callback(None)
        self.assertEqual([], done)
        gates[1].callback(None)
        self.assertEqual([1, *range(2, 1000)], done)
        self.assertFalse(places.idle)
        gates[0].callback(None)
        self.assertTrue(places.idle)
        for each in works:
            self.successResultOf(each)


class OrderTests(SynchronousTestCase):
    def test_an_earlier_question_is_outdated(self) -> None:
        order = Order()
        self.assertTrue(order.answer(ONE, "one", 5))
        self.assertFalse(order.answer(ONE, "one", 4))
        self.assertTrue(order.answer(OTHER, "other", 4))
        self.assertTrue(order.answer(ONE, "one", 5), "the same answer, to another who shares it")

    def test_what_is_gone_stays_gone_for_earlier_questions(self) -> None:
        order = Order()
        self.assertEqual(set(), order.forget(ONE, 5, {ONE: "one", OTHER: "one"}))
        self.assertFalse(order.answer(ONE, "one", 4))
        self.assertFalse(order.answer(OTHER, "one", 4))
        self.assertTrue(order.answer(ONE, "one", 6))

    def test_what_the_client_does_not_accept_is_not_gone(self) -> None:
        order = Order()
        self.assertEqual({OTHER}, order.forget(ONE, 5, {ONE: "one", OTHER: "other"}))
        self.assertTrue(order.answer(OTHER, "other", 4))

    def test_an_answer_of_a_type_that_was_not_accepted_goes_with_a_404_to_the_same_types(self) -> None:
        """
        Registries may return a type that the client does not accept.
        """
        self.assertEqual(set(), Order().forget(ONE, 5, {ONE: "other"}))

    def test_for_a_client_of_any_type_all_is_gone(self) -> None:
        order = Order()
        self.assertEqual(set(), order.forget(frozenset(), 5, {ONE: "one", OTHER: "other"}))
        self.assertFalse(order.answer(OTHER, "other", 4))

    def test_is_kept_for_the_latest_answers_alone(self) -> None:
        """
        There are many sets of types that a client may accept.
        """
        order = Order()
        for number in range(1, 2 * KEPT):
            order.forget(frozenset({str(-number)}), number, {})
            self.assertTrue(order.answer(frozenset({str(number)}), "one", number))
        for questions in (order.answered, order.gone):
            self.assertEqual(set(range(KEPT, 2 * KEPT)), set(questions.values()))

    def test_answers_to_later_questions_stay(self) -> None:
        order = Order()
        order.answer(ONE, "one", 6)
        self.assertEqual({ONE}, order.forget(ONE, 5, {ONE: "one", OTHER: "one"}))
