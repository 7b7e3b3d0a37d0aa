"""
Many things done, some at a time, in threads; all that is told of them is told in the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Done(Generic[T, R]):
    """
    What came of one thing: a result, or what was raised instead.
    """

    def __init__(self, item: T, outcome: R | Exception) -> None:
        self.item, self.outcome = item, outcome


class Crew:
    """
    So many threads. They end with the program, whatever they wait for.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._told: SimpleQueue[object] = SimpleQueue()

    def tell(self, news: Callable[[], object]) -> None:
        """
        Have something called in the caller's thread: for those at work.
        """
        self._told.put(news)

    def each(self, items: Sequence[T], do: Callable[[T], R]) -> Iterator[tuple[T, R | Exception]]:
        """
        Do something with each of the items, and give them back as they are done, with what came of it.
        """
        waiting: SimpleQueue[T] = SimpleQueue()
        for item in items:
            waiting.put(item)
        for _ in range(min(self._jobs, len(items))):
            Thread(target=self._work, args=(waiting, do), daemon=True).start()
        left = len(items)
        while left:
            news = self._told.get()
            if isinstance(news, _Done):
                left -= 1
                yield news.item, news.outcome
            elif callable(news):
                news()

    def _work(self, waiting: SimpleQueue[T], do: Callable[[T], R]) -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                outcome: R | Exception = do(item)
            except Exception as problem:  # noqa: BLE001 (told where it is understood)
                outcome = problem
            self._told.put(_Done(item, outcome))
