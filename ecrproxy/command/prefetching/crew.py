"""
Parallel work in a fixed number of threads, with all results and messages in the caller's thread.
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
    An item with its result or exception.
    """

    def __init__(self, item: T, outcome: R | Exception) -> None:
        self.item, self.outcome = item, outcome


class Crew:
    """
    A fixed number of daemon threads, which do not delay the program's exit.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._told: SimpleQueue[object] = SimpleQueue()

    def tell(self, news: Callable[[], object]) -> None:
        """
        Run a function in the caller's thread. For use by the threads.
        """
        self._told.put(news)

    def each(self, items: Sequence[T], do: Callable[[T], R]) -> Iterator[tuple[T, R | Exception]]:
        """
        Call a function with each item; yield items with their results or exceptions as they finish.
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
            except Exception as problem:  # noqa: BLE001 (handled by the caller)
                outcome = problem
            self._told.put(_Done(item, outcome))
