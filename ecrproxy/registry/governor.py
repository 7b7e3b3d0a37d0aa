"""
Limits the questions to ECR: by the account's quotas, and by how many may be in flight at once.

Rules:

- A question goes when the quota of its kind allows it and there is a place for it; until then it queues.
- Places are shared fairly. One repository about which ECR is silent keeps each place for many seconds, so what holds
  places leaves as many free: see L{Held}. That holds for the first component of a repository's name, under which a
  client can make up any number of names, and below it for each repository.
- Within a kind, first components take turns, and so do the repositories of each. Kinds that compete for places go by
  urgency: manifests first.
- A question waits in the queue for C{LONGEST_WAIT} at most. One whose quota makes it wait longer is refused at once.
- What ECR throttles rests for as long as it says: the questions of that kind about the same first component, for it may
  be the upstream of a pull-through cache rule that throttles. Of a third component at the same time, all of that kind.
- A question that is cancelled leaves the queue; its place is released, however it ends.
- A question that nobody waits for never queues: it takes a place if there are plenty, or is refused. Half of what a
  client's question may have of places and quota stays free of such questions.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Container, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.oci import first_component
from ecrproxy.reasons import Reason
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.quotas import Call, Quotas, Rests, TokenBucket

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()

LONGEST_WAIT: Final = 10.0
"""Maximum seconds in the queue."""
TICK: Final = 0.01
"""Seconds between two looks at the queues: often enough, for a bucket holds ten times as much."""


class QueueFullError(UnavailableError):
    """
    So many questions wait for ECR that one more would wait too long.
    """

    reason = Reason.QUEUE_FULL


class NoPlentyError(UnavailableError):
    """
    There is no place for a question that nobody waits for.
    """

    reason = Reason.QUEUE_FULL


class Held:
    """
    Which questions hold places, by the first component of their repositories' names and by repository.

    The dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998), in two levels: a first component may
    hold no more places than are free, and a repository no more than its first component may still take. So of 128
    places one component gets 64 at most and one repository 32. A second component gets half of what the first leaves,
    or as much as the first if they come together; some places are always free for another.
    """

    def __init__(self, places: int) -> None:
        self.free = places
        self._components: Counter[str] = Counter()
        self._repositories: Counter[str] = Counter()

    def room(self, component: str) -> int:
        """
        Return how many places a first component may still take.
        """
        return max(0, (self.free - self._components[component] + 1) // 2)

    def allows(self, component: str, repository: str) -> bool:
        """
        Return True if a repository, whose name begins with C{component}, may take another place.
        """
        return self._repositories[repository] < self.room(component)

    def has_plenty(self, component: str, repository: str) -> bool:
        """
        Return True if a repository has taken less than half of the places that it may have.
        """
        return self._repositories[repository] < self.room(component) // 2

    def take(self, repository: str) -> None:
        """
        Take a place.
        """
        self._change(repository, 1)

    def release(self, repository: str) -> None:
        """
        Release a place.
        """
        self._change(repository, -1)

    def _change(self, repository: str, count: int) -> None:
        self.free -= count
        for counter, key in ((self._components, first_component(repository)), (self._repositories, repository)):
            counter[key] += count
            if not counter[key]:
                del counter[key]


Waiting = OrderedDict[Deferred[None], None]
"""The questions about one repository, oldest first; a dict, for any of them may leave."""


class Queue:
    """
    The questions of one kind that wait, by first component and repository; those that went last are at the end.
    """

    def __init__(self) -> None:
        self._components: OrderedDict[str, OrderedDict[str, Waiting]] = OrderedDict()
        self._sizes: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def ahead(self, repository: str) -> int:
        """
        Return how many questions, at most, go before the next about C{repository}.
        """
        component = first_component(repository)
        repositories = self._components.get(component, OrderedDict())
        before = len(repositories.get(repository, ()))
        in_component = min(self._sizes[component], (before + 1) * len(repositories))
        return min(self._size, (in_component + 1) * len(self._components))

    def add(self, repository: str, place: Deferred[None]) -> None:
        """
        Queue a question.
        """
        component = first_component(repository)
        self._components.setdefault(component, OrderedDict()).setdefault(repository, OrderedDict())[place] = None
        self._count(component, 1)

    def remove(self, repository: str, place: Deferred[None]) -> bool:
        """
        Remove a question; return True if it was there.
        """
        component = first_component(repository)
        repositories = self._components.get(component)
        waiting = repositories.get(repository) if repositories is not None else None
        if repositories is None or waiting is None or place not in waiting:
            return False
        del waiting[place]
        self._count(component, -1)
        if not waiting:
            del repositories[repository]
        if not repositories:
            del self._components[component]
        return True

    def next(self, held: Held, resting: Container[str]) -> str | None:
        """
        Choose the repository whose turn it is; none if no question may take a place.

        Only what holds places or rests is passed over, so the search is hardly longer than the number of places.

        @param resting: first components that nothing goes about.
        """
        for component, repositories in self._components.items():
            if component in resting or not held.room(component):
                continue
            for repository in repositories:
                if held.allows(component, repository):
                    return repository
        return None

    def pop(self, repository: str) -> Deferred[None]:
        """
        Remove the oldest question about a repository; its next turn, and that of its first component, come last.
        """
        component = first_component(repository)
        repositories = self._components[component]
        place = next(iter(repositories[repository]))
        self._components.move_to_end(component)
        repositories.move_to_end(repository)
        self.remove(repository, place)
        return place

    def about(self, repository: str | None) -> list[tuple[str, Deferred[None]]]:
        """
        List the questions, all or those about C{repository}, with what they are about.
        """
        return [
            (name, place)
            for repositories in self._components.values()
            for name, waiting in repositories.items()
            if repository in (None, name)
            for place in waiting
        ]

    def _count(self, component: str, count: int) -> None:
        self._size += count
        self._sizes[component] += count
        if not self._sizes[component]:
            del self._sizes[component]


class Governor:
    """
    The places for questions to ECR.

    @param together: how many questions may be under way at once.
    @param name: what the log and clients are told that the registry is.
    """

    def __init__(self, quotas: Quotas, together: int, clock: IReactorTime, name: str = "ECR") -> None:
        self._name = name
        self._refused = dict.fromkeys(Call, 0)
        self._held, self._clock = Held(together), clock
        self._buckets = {call: TokenBucket(quotas.of(call), clock.seconds()) for call in Call}
        self._rests = {call: Rests() for call in Call}
        self._queues = {call: Queue() for call in Call}
        # Those who wait, the oldest first: until when, for what.
        self._waiting: OrderedDict[Deferred[None], tuple[float, Call, str]] = OrderedDict()
        self._timer: IDelayedCall | None = None
        self._expiry: IDelayedCall | None = None
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
        Return True if nobody queues, and a question about C{repository} would leave half of its places free.
        """
        queued = any(map(len, self._queues.values()))
        now, component = self._clock.seconds(), first_component(repository)
        enough = self._buckets[call].has_plenty(now) and not self._rests[call].left(component, now)
        return enough and not queued and self._held.has_plenty(component, repository)

    @contextmanager
    def spare_place(self, call: Call, repository: str) -> Iterator[None]:
        """
        Have a place for a question that nobody waits for.

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
        Let no question of a kind go for so long that is like one about C{repository}, for ECR has throttled that.
        """
        now = self._clock.seconds()
        self._buckets[call].rest(now, self._rests[call].note(first_component(repository), now, seconds))

    def send_away(self, refusal: Callable[[], Exception], repository: str | None) -> None:
        """
        Refuse all that queue, or all that ask about C{repository}: those under way may keep their places for long.
        """
        for queue in self._queues.values():
            for about, place in queue.about(repository):
                if queue.remove(about, place):  # one may leave because of what another does
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
        Refuse those who have waited too long. All wait equally long, so one timer for the oldest does for all.
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
        Let go what may.

        Those who are let go run at once, and may end at once: what they give back is seen by the loop that is
        already running, and not by one further down the stack.
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
        Choose who goes next; none if nobody can, then it is looked again when the quotas let somebody.
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
