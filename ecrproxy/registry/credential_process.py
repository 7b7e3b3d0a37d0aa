"""
Runs a profile's C{credential_process} with a deadline.

botocore waits for the program forever. A program that hangs would occupy a thread and a process for
each attempt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any, Final

SECONDS: Final = 25.0
"""Deadline in seconds: shorter than that of a fetch, so that the fetch fails with this reason."""


class CredentialProcessError(Exception):
    """
    The program did not finish in time, and was killed.
    """


class CredentialProcess(subprocess.Popen[bytes]):
    """
    Runs the program for botocore, in a process group of its own, which is killed as a whole.
    """

    seconds = SECONDS

    def __init__(self, args: list[str], **more: Any) -> None:  # noqa: ANN401
        self._program = args[0]  # its arguments may be secret
        super().__init__(args, process_group=0, **more)

    def communicate(self, input: Any = None, timeout: float | None = None) -> Any:  # noqa: A002, ANN401
        """
        Wait for the program's output.

        @raise CredentialProcessError: if that takes longer than L{SECONDS}.
        """
        seconds = self.seconds if timeout is None else timeout
        try:
            return super().communicate(input, seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            said = f"has not answered for {seconds:g} s and was killed; see what it waits for"
            raise CredentialProcessError(f"credential_process {self._program} {said}") from None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(1.0)
