"""
Limits requests to ECR: by the account's quotas, and by the number in flight.

Rules:

- A request is sent when the quota of its kind permits and there is a place for it; until then it queues.
- Places are shared fairly. If ECR does not answer for one repository, each of its requests holds a place for many
  seconds, so whatever holds places leaves as many free: see L{HeldPlaces}. This applies to the first component of a
  repository's name, below which a client can make up any number of names, and within it to each repository.
- Within a kind, first components take turns, and so do the repositories of each. Kinds that compete for places go by
  urgency: manifests first.
- A request waits in the queue for at most C{LONGEST_WAIT}. If its quota would make it wait longer, it is refused at
  once.
- After ECR has throttled a request, requests of that kind for the same first component rest for as long as ECR says: it
  may be the upstream of a pull-through cache rule that throttles. If more components are throttled at the same time
  than a registry has rules, all requests of that kind rest.
- A cancelled request leaves the queue; its place is released, however it ends.
- A request that no client waits for never queues: it takes a place if there are plenty, otherwise it is refused. It
  leaves free half of what clients' requests may have of places and quota.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.oci import first_component
from ecrproxy.reasons import Reason
from ecrproxy.registry.queue import HeldPlaces, NoPlentyError, Queue, QueueFullError
from ecrproxy.registry.quotas import Call, Quotas, Rests, TokenBucket

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()

TICK: Final = 0.01
"""Seconds between two looks at the queues: often enough, because a bucket holds ten times as much."""
LONGEST_WAIT: Final = 10.0
"""Maximum seconds in the queue."""


class Governor:
    """
    The places for requests to ECR.

    @param together: maximum number of requests in flight.
    @param name: the registry's name in the log and for clients.
    """

    def __init__(self, quotas: Quotas, together: int, clock: IReactorTime, name: str = "ECR") -> None:
        self._name = name
        self._refused = dict.fromkeys(Call, 0)
        self._held, self._clock = HeldPlaces(together), clock
        self._buckets = {call: TokenBucket(quotas.of(call), clock.seconds()) for call in Call}
        self._rests = {call: Rests() for call in Call}
        self._queues = {call: Queue() for call in Call}
        # Queued requests, the oldest first: when they expire, and what they are for.
        self._waiting: OrderedDict[Deferred[None], tuple[float, Call, str]] = OrderedDict()
        self._timer: IDelayedCall | None = None
        self._expiry: IDelayedCall | None = None
        self._letting_go = False

    def waiting(self, call: Call) -> int:
        """
        Return the number of queued requests of a kind.
        """
        return len(self._queues[call])

    def refused(self, call: Call) -> int:
        """
        Return the number of requests of a kind that were refused because their queue was full.
        """
        return self._refused[call]

    @asynccontextmanager
    async def place(self, call: Call, repository: str) -> AsyncIterator[None]:
        """
        Wait for a place for a request for C{repository}, and hold it.

        @raise QueueFullError: if that takes too long.
        """
        await self._enter(call, repository)
        try:
            yield
        finally:
            self._held.release(repository)
            self._let_go()

    def has_plenty(self, call: Call, repository: str) -> bool:
        """
        Return True if nothing queues, and a request for C{repository} would leave half of its places free.
        """
        queued = any(map(len, self._queues.values()))
        now, component = self._clock.seconds(), first_component(repository)
        enough = self._buckets[call].has_plenty(now) and not self._rests[call].left(component, now)
        return enough and not queued and self._held.has_plenty(component, repository)

    @contextmanager
    def spare_place(self, call: Call, repository: str) -> Iterator[None]:
        """
        Hold a place for a request that no client waits for.

        @raise NoPlentyError: if there are not plenty.
        """
        if not self.has_plenty(call, repository):
            raise NoPlentyError(429, "TOOMANYREQUESTS", f"no place to spare for {self._name}")
        self._buckets[call].take()
        self._held.take(repository)
        try:
            yield
        finally:
            self._held.release(repository)
            self._let_go()

    def rest(self, call: Call, repository: str, seconds: float) -> None:
        """
        Send no requests of a kind for the first component of C{repository} for so long: ECR has throttled one.
        """
        now = self._clock.seconds()
        self._buckets[call].rest(now, self._rests[call].note(first_component(repository), now, seconds))

    def send_away(self, refusal: Callable[[], Exception], repository: str | None) -> None:
        """
        Refuse all queued requests, or all those for C{repository}: those in flight may keep their places for long.
        """
        for queue in self._queues.values():
            for about, place in queue.about(repository):
                if queue.remove(about, place):  # one may leave because of the outcome of another
                    place.errback(refusal())

    def _enter(self, call: Call, repository: str) -> Deferred[None]:
        queue, bucket, now = self._queues[call], self._buckets[call], self._clock.seconds()
        component = first_component(repository)
        rest = self._rests[call].left(component, now)
        if rest > LONGEST_WAIT:
            raise self._throttled(call, component, rest)
        wait = max(rest, bucket.wait(now)) + queue.ahead(repository) / bucket.rate
        if wait > LONGEST_WAIT:
            raise self._full(call, wait)

        def leave(left: Deferred[None]) -> None:
            queue.remove(repository, left)

        place: Deferred[None] = Deferred(leave)
        queue.add(repository, place)
        self._let_go()
        if not place.called:
            self._waiting[place] = (self._clock.seconds() + LONGEST_WAIT, call, repository)
            self._expire()
            place.addBoth(self._ended, place)
        return place

    def _full(self, call: Call, wait: float) -> QueueFullError:
        log.warn(
            "Refused a question about {call}: {count} wait for {name} already, and it can't go within {seconds:.0f} s;"
            " compare PROXY_ECR_QUOTAS with the account's quotas",
            call=call.value,
            name=self._name,
            count=len(self._queues[call]),
            seconds=LONGEST_WAIT,
            once=(self._name, call.value),
        )
        return self._refusal(call, f"too many questions about {call.value} wait for {self._name}", wait)

    def _throttled(self, call: Call, component: str, rest: float) -> QueueFullError:
        log.warn(
            "Refused a question about {call}: {name} throttles those about {component}, for {seconds:.0f} s more by its"
            " word; if a pull-through cache rule has that prefix, it may be the rule's upstream",
            call=call.value,
            name=self._name,
            component=component,
            seconds=rest,
            once=(self._name, call.value, component),
        )
        said = f"{self._name} throttles the proxy's questions about {component}"
        return self._refusal(call, said, rest, Reason.THROTTLED)

    def _refusal(self, call: Call, said: str, wait: float, reason: Reason | None = None) -> QueueFullError:
        """
        Count a refusal, and return its error.

        @param wait: seconds after which to try again.
        """
        self._refused[call] += 1
        return QueueFullError(429, "TOOMANYREQUESTS", said, {"Retry-After": str(math.ceil(wait))}, reason=reason)

    def _ended(self, result: Failure | None, place: Deferred[None]) -> Failure | None:
        self._waiting.pop(place, None)
        return result

    def _expire(self) -> None:
        """
        Refuse requests that have waited too long. All wait equally long, so one timer for the oldest suffices.
        """
        while self._waiting:
            place, (until, call, repository) = next(iter(self._waiting.items()))
            if until > self._clock.seconds():
                if self._expiry is None or not self._expiry.active():
                    self._expiry = self._clock.callLater(until - self._clock.seconds(), self._expire)
                return
            del self._waiting[place]
            if self._queues[call].remove(repository, place):
                place.errback(self._full(call, LONGEST_WAIT))

    def _let_go(self) -> None:
        """
        Admit the requests that may be sent.

        Admitted requests run at once, and may end at once: the loop that is already running sees the places that they
        release, not one further down the stack.
        """
        if self._letting_go:
            return
        self._letting_go = True
        try:
            while (place := self._next()) is not None:
                place.callback(None)
        finally:
            self._letting_go = False

    def _next(self) -> Deferred[None] | None:
        """
        Return the next request to send; if there is none, look again when the quotas permit one.
        """
        waits: list[float] = []
        now = self._clock.seconds()
        for call, queue in self._queues.items():
            resting = self._rests[call].all_left(now)
            repository = queue.next(self._held, resting) if self._held.free else None
            if repository is None:
                waits += resting.values() if queue else ()
                continue
            bucket = self._buckets[call]
            wait = bucket.wait(now)
            if not wait:
                bucket.take()
                self._held.take(repository)
                return queue.pop(repository)
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
