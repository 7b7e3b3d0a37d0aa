"""
Keeps the questions to ECR within the account's quotas: a storm queues here instead of being throttled there.

Rules:

- A question goes when its kind's quota lets it and there is a place free among those under way; until then it queues.
- Within a kind they go as they came. Where kinds compete for places, manifests go first.
- A queue is as long as what can go in C{LONGEST_WAIT}: who would wait longer is told so at once.
- Who leaves while he queues leaves the queue; who had a place gives it back, however the question ended.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.quotas import Call, Quotas, TokenBucket

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()

LONGEST_WAIT: Final = 10.0
"""Seconds in the queue that are still worth it."""
TICK: Final = 0.01
"""Seconds between two looks at the queues: often enough, for a bucket holds ten times as much."""


class QueueFullError(UnavailableError):
    """
    So many questions wait for ECR that one more would wait too long.
    """

    reason = Reason.QUEUE_FULL


class Governor:
    """
    The places for questions to ECR.

    @param together: how many questions may be under way at once.
    """

    def __init__(self, quotas: Quotas, together: int, clock: IReactorTime) -> None:
        self._free, self._clock = together, clock
        self._refused = dict.fromkeys(Call, 0)
        self._buckets = {call: TokenBucket(quotas.of(call), clock.seconds()) for call in Call}
        # Ordered by when they came; a dict, for who leaves may be anywhere in a long queue.
        self._queues: dict[Call, OrderedDict[Deferred[None], str]] = {call: OrderedDict() for call in Call}
        self._timer: IDelayedCall | None = None
        self._letting_go = False

    def waiting(self, call: Call) -> int:
        """
        Tell how many questions of a kind queue.
        """
        return len(self._queues[call])

    def refused(self, call: Call) -> int:
        """
        Tell how many questions of a kind were refused because their queue was full.
        """
        return self._refused[call]

    @asynccontextmanager
    async def place(self, call: Call, repository: str) -> AsyncIterator[None]:
        """
        Wait for a place for a question about C{repository}, and have it.

        @raise QueueFullError: if that would take too long.
        """
        await self._enter(call, repository)
        try:
            yield
        finally:
            self._free += 1
            self._let_go()

    def rest(self, call: Call, seconds: float) -> None:
        """
        Let no question of a kind go for so long, for ECR has throttled it.
        """
        self._buckets[call].rest(self._clock.seconds(), seconds)

    def send_away(self, refusal: Callable[[], Exception], repository: str | None) -> None:
        """
        Refuse all that queue, or all that ask about C{repository}: those under way may keep their places for long.
        """
        for queue in self._queues.values():
            for place in [place for place, about in queue.items() if repository in (None, about)]:
                if queue.pop(place, None) is not None:  # one may leave because of what another does
                    place.errback(refusal())

    def _enter(self, call: Call, repository: str) -> Deferred[None]:
        queue, bucket = self._queues[call], self._buckets[call]
        wait = bucket.wait(self._clock.seconds()) + len(queue) / bucket.rate
        if wait > LONGEST_WAIT:
            self._refused[call] += 1
            log.warn(
                "Refused a question about {call}: {count} wait for ECR already, as many as go within {seconds:.0f} s;"
                " compare PROXY_ECR_QUOTAS with the account's quotas",
                call=call.value,
                count=len(queue),
                seconds=LONGEST_WAIT,
                once=call.value,
            )
            raise QueueFullError(
                429,
                "TOOMANYREQUESTS",
                f"too many questions about {call.value} wait for ECR",
                {"Retry-After": str(math.ceil(wait))},
            )

        def leave(left: Deferred[None]) -> None:
            queue.pop(left, None)

        place: Deferred[None] = Deferred(leave)
        queue[place] = repository
        self._let_go()
        return place

    def _let_go(self) -> None:
        """
        Let go what may.

        Those who are let go run at once, and may end at once: what they give back is seen by the loop that is
        already running, and not by one further down the stack.
        """
        if self._letting_go:
            return
        self._letting_go = True
        try:
            while (place := self._next()) is not None:
                self._free -= 1
                place.callback(None)
        finally:
            self._letting_go = False

    def _next(self) -> Deferred[None] | None:
        """
        Choose who goes next; none if nobody can, then it is looked again when the quotas let somebody.
        """
        waits = []
        for call, queue in self._queues.items():
            if not (queue and self._free):
                continue
            bucket = self._buckets[call]
            wait = bucket.wait(self._clock.seconds())
            if not wait:
                bucket.take()
                return queue.popitem(last=False)[0]
            waits.append(wait)
        if waits:
            self._look_again(max(TICK, min(waits)))
        return None

    def _look_again(self, seconds: float) -> None:
        if self._timer is not None:
            if self._timer.getTime() <= self._clock.seconds() + seconds:
                return
            self._timer.cancel()
        self._timer = self._clock.callLater(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._let_go()
