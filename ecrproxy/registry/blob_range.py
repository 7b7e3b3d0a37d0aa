"""
A range of a blob, as it arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse

from ecrproxy.registry.bodies import discard
from ecrproxy.registry.unavailable import UnavailableError, describe

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime


TRICKLE: Final = 1024
"""Minimum bytes of a body within the stall time; fewer count as none."""
SOONER_SECONDS: Final = 5.0
"""Stall time, in seconds, of a body whose rest another registry may send."""
BEGUN: Final = 8 * 2**10
BEGUN_SECONDS: Final = 10.0
"""
The bytes that a blob must bring, and within how many seconds, before other content is evicted for it.

A slower blob is not kept, but fetched for each client. A slow link shared by a hundred blobs must suffice.
"""


class Sink(Protocol):
    """
    Receives a blob's bytes.
    """

    def arrived(self, data: bytes) -> None:
        """Take bytes."""

    def ended(self, problem: Failure | None) -> None:
        """Note the end; C{problem} if it failed."""


@dataclass(frozen=True, slots=True)
class Watch:
    """
    Ends a body that sends nothing, or next to nothing.

    @ivar seconds: seconds within which it must bring C{TRICKLE} bytes.
    @ivar host: the host that sends it.
    @ivar note: called when a body has ended, with whether it brought next to nothing.
    @ivar replaceable: returns True if another source may send the rest: then C{SOONER_SECONDS} apply.
    """

    clock: IReactorTime
    seconds: float
    host: str
    note: Callable[..., object] = lambda **_: None
    replaceable: Callable[[], bool] = lambda: False


class BlobRange:
    """
    A range of a blob that is about to arrive.

    @ivar start: the offset of its first byte.
    @ivar stop: the offset after its last byte, if upstream said.
    @ivar skip: number of bytes before it that were not requested.
    """

    def __init__(self, response: IResponse, watch: Watch, start: int, stop: int | None, *, skip: int = 0) -> None:
        self._response, self._watch = response, watch
        self.start, self.stop, self.skip = start, stop, skip
        self._begun: _Begun | None = None

    async def begin(self) -> bool:
        """
        Wait for the first C{BEGUN} bytes, or all if there are fewer; they are kept until L{deliver}.

        @return: whether they came within C{BEGUN_SECONDS}.
        """
        self._begun = begun = _Begun(self._watch, self.skip)
        self._response.deliverBody(begun.transfer)
        return await begun.wait()

    def deliver(self, sink: Sink) -> BlobTransfer:
        """
        Deliver the bytes.
        """
        if self._begun is not None:
            return self._begun.hand_over(sink)
        transfer = BlobTransfer(sink, self._watch, self.skip)
        self._response.deliverBody(transfer)
        return transfer

    def drop(self) -> None:
        """
        Discard the bytes.
        """
        if self._begun is not None:
            self._begun.transfer.abort()
            return
        discard(self._response, self._watch.clock)


class _Begun:
    """
    The first bytes of a range, until L{hand_over}.
    """

    def __init__(self, watch: Watch, skip: int) -> None:
        self.transfer, self._clock = BlobTransfer(self, watch, skip), watch.clock
        self._data: list[bytes] = []
        self._size, self._over = 0, False
        self._problem: Failure | None = None
        self._came: Deferred[bool] = Deferred()

    async def wait(self) -> bool:
        late = self._clock.callLater(BEGUN_SECONDS, self._decide, came=False)
        try:
            return await self._came
        finally:
            if late.active():
                late.cancel()

    def arrived(self, data: bytes) -> None:
        self._data.append(data)
        self._size += len(data)
        if self._size >= BEGUN:
            self.transfer.pause()
            self._decide(came=True)

    def ended(self, problem: Failure | None) -> None:
        self._over, self._problem = True, problem
        self._decide(came=problem is None)

    def _decide(self, *, came: bool) -> None:
        if not self._came.called:
            self._came.callback(came)

    def hand_over(self, sink: Sink) -> BlobTransfer:
        """
        Pass on the bytes so far, and those to come: not at once, because readers have yet to follow the download.
        """
        self._clock.callLater(0, self._pass_on, sink)
        return self.transfer

    def _pass_on(self, sink: Sink) -> None:
        transfer, data, self._data = self.transfer, self._data, []
        transfer.sink = sink
        was_paused, transfer.paused = transfer.paused, False
        if data:
            sink.arrived(b"".join(data))
        if self._over:
            sink.ended(self._problem)
        elif was_paused and not transfer.paused:  # the sink may have enough for now
            transfer.resume()


class BlobTransfer(TwistedProtocol):
    """
    A body that is delivered to a L{Sink}, and ended if it brings nothing, or next to nothing, for too long.

    @ivar paused: whether it should send nothing for now.
    """

    paused = False

    def __init__(self, sink: Sink, watch: Watch, skip: int = 0) -> None:
        self.sink, self._watch, self._skip = sink, watch, skip
        self._timer: IDelayedCall | None = None
        self._stalled, self._left, self._came = False, False, 0
        self._since, self._waited = 0, 0.0

    def connectionMade(self) -> None:  # noqa: D102
        self._wait()

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        self._since += len(data)
        if self._timer is not None and self._since >= TRICKLE:
            self._since, self._waited = 0, 0.0
            self._timer.reset(self._step)
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if data:
            self._came += len(data)
            self.sink.arrived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._wait_no_more()
        whole = reason.check(ResponseDone, PotentialDataLoss)
        nothing = self._came < (1 if whole else TRICKLE)
        if not (nothing and self._left and not self._stalled):  # otherwise nothing waited for its bytes
            self._watch.note(barren=self._stalled or nothing)
        if self._stalled:
            sent = f"no more than {self._since} bytes" if self._since else "nothing"
            what = f"{self._watch.host} has sent {sent} for {self._waited:g} s"
            reason = Failure(UnavailableError(504, "UNAVAILABLE", what))
        elif whole:
            self.sink.ended(None)  # the digest decides whether it is complete
            return
        else:
            what = f"{self._watch.host} broke off: {describe(reason.value)}"
            reason = Failure(UnavailableError(502, "UNAVAILABLE", what))
        self.sink.ended(reason)

    def pause(self) -> None:
        """
        Pause the connection.
        """
        self.paused = True
        self._wait_no_more()
        cast(IPushProducer, self.transport).pauseProducing()

    def resume(self) -> None:
        """
        Resume it.
        """
        self.paused = False
        self._wait()
        cast(IPushProducer, self.transport).resumeProducing()

    def abort(self) -> None:
        """
        Close it.
        """
        self._left = True
        self._hang_up()

    def _hang_up(self) -> None:
        self._wait_no_more()
        if self.transport is not None:
            self.transport.loseConnection()

    def _wait(self) -> None:
        if self._timer is None:
            self._since, self._waited = 0, 0.0
            self._timer = self._watch.clock.callLater(self._step, self._doubt)

    def _wait_no_more(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    @property
    def _step(self) -> float:
        return min(SOONER_SECONDS, self._watch.seconds - self._waited)

    def _doubt(self) -> None:
        """
        End the body if its time is over, which may be earlier than when it began.
        """
        self._waited += self._step
        if self._waited < self._watch.seconds and not self._watch.replaceable():
            self._timer = self._watch.clock.callLater(self._step, self._doubt)
            return
        self._timer, self._stalled = None, True
        self._hang_up()
