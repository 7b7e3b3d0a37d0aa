"""
C{ecr-proxy serve}: the daemon itself.
"""

from __future__ import annotations

from ecrproxy.command.subcommand import Call, Subcommand
from ecrproxy.settings.config import SETTINGS
from ecrproxy.settings.options import arguments_of


def run(call: Call) -> int:
    """
    Become the daemon, which reads its settings itself.
    """
    call.world.become_daemon(arguments_of(call.flags))


SERVE = Subcommand(
    name="serve",
    summary="start the daemon",
    description="Start the daemon in the foreground, exactly as: twistd -n --pidfile= ecr-proxy",
    examples=(
        ("ecr-proxy serve", "with the variables of the environment"),
        ("ecr-proxy serve --config /etc/ecr-proxy.toml", "with a configuration file"),
        ("ecr-proxy serve --port 8080 --cache-dir ./cache", "a flag wins over its variable"),
    ),
    settings=tuple(each.name for each in SETTINGS),
    reads=False,
    run=run,
)
