"""
The same request to several registries, one after another, until one answers.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

T = TypeVar("T")
Ask = Callable[[], Coroutine[Any, Any, T]]

SLOW_SECONDS: Final = 3.0
"""Seconds without an answer after which the next registry is asked, too; the first may still answer earlier."""


class Race(Generic[T]):
    """
    Asks one registry, and the next when it fails or is slow, each in the context of the code that added it.

    @param passes: returns True if a failure of the registry with that number leaves the answer to the others.
    @param asking: called with the number of each registry that is asked.
    @param together: ask all others at once if one fails or is slow, because a client waits for each of them.
    @ivar won: fires with the first answer, or with the outcome of the first registry. Cancelling it cancels all.
    """

    def __init__(
        self,
        asks: Iterable[Ask[T]],
        seconds: float,
        call_later: Callable[..., IDelayedCall],
        passes: Callable[[Failure, int], bool],
        asking: Callable[[int], None] = lambda _: None,
        *,
        together: bool = False,
    ) -> None:
        self._left, self._seconds, self._call_later = [_kept(each) for each in asks], seconds, call_later
        self._passes, self._asking, self._together = passes, asking, together
        self._asked: list[Deferred[T]] = []
        self._failed: dict[int, Failure] = {}
        self._over = self._hurried = False
        self._limit: IDelayedCall | None = None
        self.won: Deferred[T] = Deferred(lambda _: self._stop())
        self._next()

    @property
    def problem(self) -> BaseException | None:
        """
        The outcome of the first registry; None if it has not failed.
        """
        return self._failed[0].value if 0 in self._failed else None

    def add(self, ask: Ask[T]) -> None:
        """
        Add another registry; ask it at once, if the others have had their time.
        """
        if not self._over:
            self._left.append(_kept(ask))
            if self._hurried or self._limit is None or not self._limit.active():
                self._next()

    def _next(self) -> None:
        """
        Ask the next registry, if any; it has its full time, whatever becomes of the others.
        """
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        if not self._left:
            return
        ask, number = self._left.pop(0), len(self._asked)
        self._asking(number)
        self._limit = self._call_later(self._seconds, self._go_on)
        asked = ask()
        self._asked.append(asked)
        asked.addCallbacks(self._answered, self._lost, errbackArgs=(number,))

    def _go_on(self) -> None:
        """
        Ask the next registry, because one has failed or is slow.

        Ask all others, also later ones, if they are asked together.
        """
        self._hurried = self._together
        self._next()
        while self._hurried and self._left and not self._over:
            self._next()

    def _answered(self, answer: T) -> None:
        if not self._over:
            self._stop()
            self.won.callback(answer)

    def _lost(self, failure: Failure, number: int) -> None:
        if self._over:
            return
        self._failed[number] = failure
        if self._passes(failure, number):
            if self._left:
                self._go_on()
                return
            if len(self._failed) < len(self._asked):
                return
        self._stop()
        self.won.errback(self._failed.get(0, failure))

    def _stop(self) -> None:
        self._over = True
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        for each in self._asked:
            each.cancel()


def _kept(ask: Ask[T]) -> Callable[[], Deferred[T]]:
    """
    Make a request run in the current context, because timers have none.
    """
    return partial(copy_context().run, lambda: Deferred.fromCoroutine(ask()))
