"""
The composition root of C{twistd ecr-proxy}: reads the settings, then has L{process_wiring} build the daemon.

This is the only module that uses the environment and the global reactor.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger, LogLevel

from ecrproxy.cores import usable_cores
from ecrproxy.daemon.exhaustion import Exhaustion, Orphaned, look
from ecrproxy.daemon.inherited import inherited_sockets
from ecrproxy.daemon.process import set_up
from ecrproxy.daemon.reloading import Reloading, Settings
from ecrproxy.daemon.service import LAST_LINES_SECONDS, Daemon
from ecrproxy.daemon.supervision import Supervisor
from ecrproxy.logs.shapes import PRIORITIES, as_json
from ecrproxy.logs.writing import LineWriter, choose_writer, leads_to_journal
from ecrproxy.otel import complaint
from ecrproxy.process_wiring import build, build_parent, build_worker
from ecrproxy.registry.aws import CredentialsError
from ecrproxy.registry.egress import Egress
from ecrproxy.registry.proxy_variables import for_botocore
from ecrproxy.settings.complaints import Complaint, say, write
from ecrproxy.settings.config import NO_FILE, Config, Filed, Given, given, texts_of
from ecrproxy.settings.contradictions import Machine, load, look_at_log, look_at_settings, refusal
from ecrproxy.settings.file import for_worker, read_file
from ecrproxy.settings.options import Options
from ecrproxy.settings.table import RELOADED, ConfigError
from ecrproxy.thread_pools import in_time
from ecrproxy.workers.child import END_SECONDS

log = Logger()

SIZE_SECONDS: Final = 2.0
"""Timeout at startup for reading the size of the disk, which only warnings need."""


def makeService(options: Options) -> Daemon:
    """
    Build the daemon: a single process, the parent of workers, or a worker.
    """
    from twisted.internet import reactor  # noqa: PLC0415 (after twistd may have installed another)

    set_up(reactor)
    file, warnings = NO_FILE, list[Complaint]()
    try:
        file = read_file(options.flags(), os.environ)
        complain = _complaining(options, file)
        read = partial(_load, options)
        config = read(file)
        _check_tracing(config)
        sockets = inherited_sockets(os.environ)
        if sockets is not None:
            service = build_worker(config, sockets, reactor, _egress(os.environ), read)
        else:
            settings = given(options.flags(), os.environ, file)
            warnings = _warnings(config, settings, options, _disk_size(Path(config.cache_dir)))
            for each in warnings:
                log.warn("{complaint}", complaint=each)
            os.environ.update(for_botocore(os.environ))
            supervisor = Supervisor.from_environ(os.environ, os.getpid())
            refused: list[CredentialsError] = []
            atexit.register(_fail_after, refused)  # registered first, runs last: after others have cleaned up
            leave = partial(_abandon, complain, refused)
            egress = _told(_egress(os.environ))
            reloading = partial(Reloading, _settings(options, file, config), partial(_read_again, options))
            if config.worker_processes == 1:
                service = build(config, reactor, leave, supervisor, egress, reloading)
            else:
                # Workers started later must use the same settings, even if the file has changed.
                filed = {name: each[0] for name, each in settings.items() if each is file.settings.get(name)}
                arguments = options.arguments({name: filed[name] for name in filed.keys() - RELOADED})
                service = build_parent(config, reactor, leave, supervisor, arguments, for_worker(file), reloading)
    except ConfigError as problem:
        for line in (*problem.warnings, *map(str, warnings)):
            _complaining(options, file, LogLevel.warn)(f"warning: {line}")
        for line in problem.errors:
            _complaining(options, file)(line)
        sys.exit(1)
    service.complain, service.writer = complain, _log_writer(config, options, reactor)
    looks = look if sockets is None else Orphaned(config.drain_seconds + END_SECONDS)
    service.add(Exhaustion(service.give_up, service.relieve, looks))
    if service.writer is not None:
        atexit.register(service.writer.end, LAST_LINES_SECONDS)
    return service


def _check_tracing(config: Config) -> None:
    """
    @raise ConfigError: if there should be traces, and nothing can send them.
    """
    why = None if config.otlp_endpoint is None else complaint(config.otlp_endpoint, os.environ)
    if why is not None:
        raise ConfigError(why)


def _load(options: Options, file: Filed) -> Config:
    """
    Load the settings, including the configuration file's.

    @raise ConfigError: if they are invalid.
    """
    return load(options.flags(), os.environ, file)


def _settings(options: Options, file: Filed, config: Config) -> Settings:
    return Settings(file, config, texts_of(options.flags(), os.environ, file))


def _read_again(options: Options) -> Settings:
    """
    Read the configuration file again, with the same flags and variables.

    @raise ConfigError: if the daemon would not start with it.
    """
    file = read_file(options.flags(), os.environ)
    config = _load(options, file)
    _warnings(config, given(options.flags(), os.environ, file), options, None)
    return _settings(options, file, config)


def _warnings(config: Config, settings: Given, options: Options, disk: int | None) -> list[Complaint]:
    """
    Check the settings together, and return the warnings.

    @param settings: the texts that C{config} was loaded from.
    @param disk: size of the cache's file system; None if unknown. No error depends on it.
    @raise ConfigError: if the daemon must not start with them.
    """
    found = look_at_settings(config, settings, os.environ, Machine(usable_cores(), disk))
    found += look_at_log(config, options.parent or {})
    if any(each.grave for each in found):
        raise refusal(found)
    return found


def _egress(environ: Mapping[str, str]) -> Egress:
    """
    Read the egress settings of the environment.

    @raise ConfigError: if the proxy's URL is invalid.
    """
    try:
        return Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None


def _told(egress: Egress) -> Egress:
    if egress.proxy is not None:
        log.info(
            "Registry and buckets are reached through the egress proxy {proxy}, except for hosts in NO_PROXY",
            proxy=egress.proxy,
        )
    return egress


def _disk_size(directory: Path) -> int | None:
    """
    Return the size of the file system of a directory, which need not exist.
    """

    def look() -> int | None:
        for each in (directory, *directory.absolute().parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(each).total
        return None

    with contextlib.suppress(TimeoutError):
        return in_time(look, SIZE_SECONDS)
    return None


def _complaining(
    options: Options,
    file: Filed,
    level: Any = LogLevel.critical,  # noqa: ANN401
) -> Callable[[str], None]:
    """
    Return a function that logs why the daemon can't start, in the log's format even if other settings are invalid.
    """
    chosen, _ = given(options.flags(), os.environ, file).get("log-format", ("text", ""))
    if chosen != "json":
        marked = leads_to_journal(os.environ.get("JOURNAL_STREAM"), sys.__stderr__)
        return partial(say, mark=f"<{PRIORITIES[level]}>" if marked else "")

    def say_as_json(line: str) -> None:
        event = {"log_time": time.time(), "log_level": level, "log_namespace": "ecrproxy"}
        write("".join(as_json({**event, "log_format": "{line}", "line": line}, "")))

    return say_as_json


def _log_writer(config: Config, options: Options, reactor: Any) -> LineWriter | None:  # noqa: ANN401
    if options.parent is None:  # twistd's log options are unknown
        return None
    return choose_writer(
        options.parent,
        json=config.log_format == "json",
        limit=PRIORITIES[LogLevel.levelWithName(config.log_level)],
        journal=os.environ.get("JOURNAL_STREAM"),
        later=reactor.callFromThread,
    )


def _abandon(complain: Callable[[str], None], refused: list[CredentialsError], problem: CredentialsError) -> None:
    """
    Shut down: the daemon can do nothing with these credentials.
    """
    from twisted.internet import reactor  # noqa: PLC0415

    if refused:  # already reported by another worker
        return
    log.critical("{problem}", problem=problem)
    complain(str(problem))
    refused.append(problem)
    reactor.stop()


def _fail_after(refused: Sequence[CredentialsError]) -> None:
    """
    Exit with status 1 if credentials were refused: twistd exits with 0 after its reactor has stopped for any reason.
    """
    if refused:
        os._exit(1)
