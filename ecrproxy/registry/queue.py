"""
The queue of requests to a registry: whose turn it is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container

from twisted.internet.defer import Deferred

from ecrproxy.oci import first_component
from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError


class QueueFullError(UnavailableError):
    """
    So many requests queue for ECR that another would wait too long.
    """

    reason = Reason.QUEUE_FULL


class NoPlentyError(UnavailableError):
    """
    There is no place for a request that no client waits for.
    """

    reason = Reason.QUEUE_FULL


class HeldPlaces:
    """
    The places that requests hold, by the first component of their repositories' names and by repository.

    The dynamic thresholds of shared-memory switches (Choudhury and Hahne, 1998), on two levels: a first component may
    hold no more places than are free, and a repository no more than its first component may still take. So of 128
    places one component gets at most 64 and one repository 32. A second component gets half of what the first leaves,
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
"""The requests for one repository, oldest first; a dict, because any of them may leave."""


class Queue:
    """
    The queued requests of one kind, by first component and repository; those that were served last are at the end.
    """

    def __init__(self) -> None:
        self._components: OrderedDict[str, OrderedDict[str, Waiting]] = OrderedDict()
        self._sizes: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def ahead(self, repository: str) -> int:
        """
        Return the maximum number of requests that go before the next one for C{repository}.
        """
        component = first_component(repository)
        repositories = self._components.get(component, OrderedDict())
        before = len(repositories.get(repository, ()))
        in_component = min(self._sizes[component], (before + 1) * len(repositories))
        return min(self._size, (in_component + 1) * len(self._components))

    def add(self, repository: str, place: Deferred[None]) -> None:
        """
        Queue a request.
        """
        component = first_component(repository)
        self._components.setdefault(component, OrderedDict()).setdefault(repository, OrderedDict())[place] = None
        self._count(component, 1)

    def remove(self, repository: str, place: Deferred[None]) -> bool:
        """
        Remove a request; return True if it was queued.
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

    def next(self, held: HeldPlaces, resting: Container[str]) -> str | None:
        """
        Return the repository whose turn it is; None if no request may take a place.

        Only repositories that hold places or rest are skipped, so the search is hardly longer than the number of
        places.

        @param resting: first components for which nothing is sent.
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
        Remove the oldest request for a repository.

        The next turns of the repository and of its first component come last.
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
        Return the queued requests, all or those for C{repository}, with their repositories.
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
