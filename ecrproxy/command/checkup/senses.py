"""
The doctor's interface to the outside world, replaceable in tests.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Protocol

from ecrproxy.command.checkup import metadata, names, ports
from ecrproxy.command.checkup.aws import Aws, Identity, Provider
from ecrproxy.command.checkup.disk import DirectoryState, survey
from ecrproxy.command.checkup.reach import BODY_BYTES, Contact, touch, touch_place
from ecrproxy.cores import usable_cores
from ecrproxy.healthcheck import Place
from ecrproxy.registry.aws import Credentials
from ecrproxy.registry.egress import Proxy


class Account(Protocol):
    """
    AWS, see L{Aws}.
    """

    def provider(self) -> Provider:
        """Return the source of the credentials."""

    def identity(self) -> Identity:
        """Return the identity from STS."""

    def token(self) -> tuple[str, float]:
        """Request a token from ECR."""

    def simulate(self, arn: str, actions: Sequence[str], resource: str) -> Mapping[str, str]:
        """Simulate policies in IAM."""


class Touch(Protocol):
    """
    Connects and sends a request, see L{reach.touch}.
    """

    def __call__(
        self,
        url: str,
        address: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        through: Proxy | None = None,
        most: int = BODY_BYTES,
    ) -> Contact:
        """Connect and send a request."""


@dataclass(frozen=True, kw_only=True)
class Senses:
    """
    The doctor's interface to the outside world.

    @ivar account: opens AWS, for a region and credentials.
    @ivar most_files: returns the hard limit of open files.
    @ivar start: runs a function in a thread.
    """

    account: Callable[[str, Credentials], Account] = Aws
    touch: Touch = touch
    touch_place: Callable[[Place, str], Contact] = touch_place
    bind: Callable[[Place], int] = ports.try_to_bind
    send: names.Send = names.over_udp
    ask_system: Callable[[str], names.LookupResult] = names.ask_system
    ask_metadata: metadata.Ask = metadata.over_http
    survey: Callable[[str, Callable[[], float]], DirectoryState] = survey
    most_files: Callable[[], int] = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    cores: Callable[[], int] = usable_cores
    user: Callable[[], int] = os.geteuid
    start: Callable[[Callable[[], None]], object] = lambda run: Thread(target=run, daemon=True).start()
