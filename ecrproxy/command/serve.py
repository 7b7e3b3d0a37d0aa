"""
C{ecr-proxy serve}: start the daemon.
"""

from __future__ import annotations

from ecrproxy.command.subcommand import Invocation, Subcommand
from ecrproxy.settings.options import arguments_of
from ecrproxy.settings.table import SETTINGS


def run(call: Invocation) -> int:
    """
    Replace this process by the daemon, which reads its settings itself.
    """
    call.world.become_daemon(arguments_of(call.flags))


SERVE = Subcommand(
    name="serve",
    summary="start the daemon",
    description="Start the daemon in the foreground, exactly as: twistd -n --pidfile= ecr-proxy",
    examples=(
        ("ecr-proxy serve", "use the environment variables"),
        ("ecr-proxy serve --config /etc/ecr-proxy.toml", "use a configuration file"),
        ("ecr-proxy serve --port 8080 --cache-dir ./cache", "flags override variables"),
    ),
    settings=tuple(each.name for each in SETTINGS),
    reads=False,
    run=run,
)
