"""
Run what C{make play} shows: the daemon before a stand-in for ECR, with a client that pulls now and then.

It prints the addresses of both and what to type, and runs until Ctrl-C. It leaves nothing behind. PROXY_PORT sets
the port.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from http.client import HTTPException
from itertools import cycle
from pathlib import Path
from typing import Final

from tests.demo import (
    IMAGE,
    LOCAL,
    DemoError,
    Pull,
    fetch_image,
    interrupt,
    is_ready,
    running,
    start_daemon,
    start_stand_in,
)
from tests.e2e.processes import free_port

PORT: Final = 5000
ADMIN_PORT: Final = 5001
PAUSE_SECONDS: Final = 3.0
"""Pause between pulls."""
IMAGES: Final = (IMAGE, ("demo/multi", "latest"), ("demo/app", "no-such-tag"))
SAID: Final = """\
The daemon          http://{place}
Its status page     http://{admin}/
The stand-in        {registry}, which plays Amazon ECR

Pull through it:

  docker pull {place}/demo/app:latest
  curl -i http://{place}/v2/demo/app/manifests/latest
  curl http://{place}/v2/demo/app/tags/list

See what it has, and have it forget something:

  {command} ls --admin-url http://{admin}
  {command} stats --admin-url http://{admin}
  {command} purge --admin-url http://{admin} demo/app:latest

A client pulls an image every {seconds:.0f} seconds, and one that does not exist, so that there is something to see.
Its log is {log}. Ctrl-C ends all of it.
"""


def usual_or_free(port: int) -> int:
    """
    Return the port in the documentation, or a free one if it is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCAL, port))
        except OSError:
            return free_port()
    return port


def play(home: Path) -> None:
    """
    Start everything, and pull until interrupted.

    @raise DemoError: if a program does not start, or ends.
    """
    places_file = home / "places.json"
    with running(start_stand_in(home)) as stand_in:
        stand_in.wait_until(lambda: places_file.exists() and places_file.read_text().endswith("\n"))
        places = json.loads(places_file.read_text())
        port, admin = usual_or_free(int(os.environ.get("PROXY_PORT") or PORT)), usual_or_free(ADMIN_PORT)
        place = f"localhost:{port}"
        more = {"PROXY_ADMIN_LISTEN": f"tcp:{admin}:interface={LOCAL}"}
        with running(start_daemon(home, places, port, **more)) as daemon:
            daemon.wait_until(lambda: is_ready(place))
            command = Path(sys.executable).with_name("ecr-proxy")
            said = {"place": place, "admin": f"localhost:{admin}", "registry": places["registry"]}
            print(SAID.format(**said, command=command, seconds=PAUSE_SECONDS, log=home / "daemon.log"), flush=True)
            for image in cycle(IMAGES):
                daemon.check()
                try:
                    fetch_image(place, image, Pull(""))
                except (DemoError, OSError, HTTPException):
                    daemon.check()  # the status page shows what fails
                time.sleep(PAUSE_SECONDS)


def main() -> int:
    """
    Return the exit status.
    """
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="ecrproxy-play-") as home:
            play(Path(home))
    except DemoError as problem:
        print(f"play: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
