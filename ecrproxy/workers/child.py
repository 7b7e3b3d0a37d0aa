"""
One worker's process, as its parent sees it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.workers.channel import Channel
from ecrproxy.workers.messages import (
    About,
    Answer,
    FiguresTold,
    FromWorker,
    Listens,
    ReadinessTold,
    StandingTold,
    StateRequest,
)

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()


END_SECONDS: Final = 3.0
"""Timeout for a worker to exit after the drain, or after its channel has closed; then it is killed."""
SILENT_SECONDS: Final = 30
"""A worker that sends nothing for this many seconds is killed and replaced: its event loop hangs."""
STARTING_SECONDS: Final = 300
"""A worker that does not listen within this many seconds is killed and replaced. A normal start takes a few."""
STILL_SECONDS: Final = 3
"""A worker that has sent nothing for this many seconds is not asked: each sends its counts once a second."""
ANSWER_SECONDS: Final = 4.0
"""Timeout for a worker's answer, in seconds. A check of a hanging disk takes two."""


class Child(ProcessProtocol):
    """
    The parent's view of one worker.

    @ivar channel: the parent's end of the channel.
    @ivar number: the process id, also after the exit.
    @ivar listens: True once the worker accepts connections.
    @ivar pause: seconds before this worker was started in its place.
    @ivar began: start time, on the reactor's clock.
    """

    def __init__(
        self,
        heard: Callable[[FromWorker], None],
        ended: Callable[[Failure], None],
        pause: float,
        reactor: Any,  # noqa: ANN401
    ) -> None:
        self._on_message, self._on_end, self._reactor = heard, ended, reactor
        self.pause, self.began = pause, reactor.seconds()
        self.channel = Channel(FromWorker)
        self.channel.heard, self.channel.lost = self._heard, self._lost
        self.listens = False
        self.number: int | None = None
        self._silent = 0
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[Deferred[Answer | None], IDelayedCall]] = {}
        self._gone: Deferred[None] = Deferred()
        self._limit: IDelayedCall | None = None

    @property
    def pid(self) -> int | None:
        """
        Return the process id; None after the exit.
        """
        pid: int | None = self.transport.pid if self.transport is not None else None
        return pid

    def connectionMade(self) -> None:
        """
        Remember the process id.
        """
        self.number = self.pid

    def ask(self, about: About) -> Deferred[Answer | None]:
        """
        Send a question.

        @return: fires with the answer, or with None after C{ANSWER_SECONDS} or when the worker exits; with None at once
            if the worker has stopped sending.
        """
        if self._silent >= STILL_SECONDS:
            return succeed(None)
        number = next(self._numbers)
        answer: Deferred[Answer | None] = Deferred()
        self._asked[number] = answer, self._reactor.callLater(ANSWER_SECONDS, self._answered, number, None)
        self.channel.tell(StateRequest(number, about))
        return answer

    def _answered(self, number: int, answer: Answer | None) -> None:
        if number not in self._asked:  # too late
            return
        asked, late = self._asked.pop(number)
        if late.active():
            late.cancel()
        asked.callback(answer)

    def _heard(self, message: FromWorker) -> None:
        self._silent = 0
        if isinstance(message, ReadinessTold | StandingTold | FiguresTold):
            self._answered(message.number, message)
            return
        if isinstance(message, Listens):
            self.listens = True
        self._on_message(message)

    def look(self) -> None:
        """
        Kill the worker if it was silent for too long. Counts its calls, one a second: a suspended parent kills none.
        """
        self._silent += 1
        if self._silent == (SILENT_SECONDS if self.listens else STARTING_SECONDS):
            what = "has told nothing for" if self.listens else "does not listen after"
            log.error("Worker {pid} {what} {seconds} s: killing it", pid=self.pid, what=what, seconds=self._silent)
            self.kill()

    def _lost(self) -> None:
        if self.pid is not None and self._limit is None:
            self._limit = self._reactor.callLater(END_SECONDS, self.kill)

    def kill(self) -> None:
        """
        Send SIGKILL.
        """
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        if self.transport is not None and self.pid is not None:
            self.transport.signalProcess(name)

    def end(self, seconds: float) -> Deferred[None]:
        """
        Send SIGTERM, and SIGKILL if the worker still runs after C{seconds}.
        """
        if self.pid is None:
            return succeed(None)
        # Not by a message: a signal also stops a worker that is still starting.
        self._signal("TERM")
        if self._limit is None:
            self._limit = self._reactor.callLater(seconds, self.kill)
        return self._gone

    def processEnded(self, reason: Failure) -> None:
        """
        Fire everything that waits for an answer or the exit.
        """
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        for number in list(self._asked):
            self._answered(number, None)
        self._gone.callback(None)
        self._on_end(reason)
