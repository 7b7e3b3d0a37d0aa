"""
Wire reloading: certificates, passwords, and the configuration file, on changes and on SIGHUP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from ecrproxy.access.clients import Admission
from ecrproxy.admin.status import Status
from ecrproxy.daemon.listening import Listening
from ecrproxy.daemon.reloading import Reloading, Settings
from ecrproxy.daemon.renewal import generation
from ecrproxy.daemon.supervision import Supervised
from ecrproxy.daemon.tls import Loaded
from ecrproxy.files import FileReader
from ecrproxy.identity import Repository
from ecrproxy.registries import Registries
from ecrproxy.serving import Serving
from ecrproxy.settings.config import Config
from ecrproxy.settings.file import about_registries, for_worker
from ecrproxy.threads import InThread
from ecrproxy.workers.messages import Reload, Reread
from ecrproxy.workers.processes import Workers


def expiry(listening: Sequence[Listening]) -> float | None:
    """
    Return when the certificate for clients expires, the earliest of several; None without TLS.
    """
    return min((each.expires for each in listening if each.expires), default=None)


def called(config: Config) -> Callable[[Repository], str]:
    """
    Return a function that returns the display names of repositories.
    """
    return Registries(config.registries, config.registry_aliases or ()).called


def use_settings(serving: Serving, status: Status, settings: Settings) -> None:
    """
    Use the registries of new settings for new requests.
    """
    serving.use(settings.config)
    status.registry, status.called = settings.config.ecr_endpoint, called(settings.config)


def reload_workers(workers: Workers, status: Status, settings: Settings) -> None:
    """
    Use the registries of new settings in all workers, running and future ones.
    """
    workers.variables = for_worker(settings.file)
    workers.tell(Reload.of(about_registries(settings.file)))
    status.registry, status.called = settings.config.ecr_endpoint, called(settings.config)


def configuration(reloading: Reloading, in_thread: InThread, reactor: Any) -> FileReader:  # noqa: ANN401
    """
    Make what reads the configuration file again, in a thread, and applies it.
    """
    return FileReader("The configuration file", reloading.read, reloading.use, in_thread, reactor)


def hang_up_handler(
    supervised: Supervised, reread: Callable[[], Deferred[None]], configuration: FileReader | None
) -> Callable[[], Deferred[None]]:
    """
    Return the handler of SIGHUP: reloads the configuration file, and everything that reloads by itself on changes.

    The configuration file never reloads by itself: it may be half edited.
    """

    def hang_up() -> Deferred[Any]:
        configured = [configuration.again()] if configuration is not None else []
        return gatherResults([*configured, reread()])

    return partial(supervised.rereading, hang_up)


def reread(certificates: FileReader, passwords: Callable[[], object]) -> Deferred[None]:
    """
    Reload certificates and passwords, independently.

    @return: fires when the certificates have been read, or time out.
    """
    passwords()
    return certificates.again()


def load_all(listening: Sequence[Listening]) -> list[Loaded | None]:
    """
    Read the certificates. Blocks.
    """
    return [each.load() for each in listening]


def use_all(listening: Sequence[Listening], loaded: Sequence[Loaded | None]) -> bool:
    """
    Use certificates; return True if any has changed.
    """
    news = [each.use(what) for each, what in zip(listening, loaded, strict=True)]
    return any(news)


def renew_in_workers(
    listening: Sequence[Listening], admin: Sequence[Listening], workers: Workers, loaded: Sequence[Loaded | None]
) -> None:
    """
    Check that certificates are usable, then tell workers to reload those for clients.
    """
    theirs = loaded[: len(listening)]
    use_all(admin, loaded[len(listening) :])
    if use_all(listening, theirs):
        workers.tell(Reread(_name(theirs)))


def _name(loaded: Sequence[Loaded | None]) -> str:
    return generation(each.seen if each is not None else () for each in loaded)


def reread_as_told(certificates: FileReader, admission: Admission, found: str) -> None:
    """
    Reload passwords, or the certificates that the parent has checked.
    """
    if found:
        certificates.again(found)
    else:
        admission.reread()


def load_as_told(listening: Sequence[Listening], found: str) -> list[Loaded | None] | None:
    """
    Read the certificates; None unless they are those that the parent has checked. Blocks.
    """
    loaded = load_all(listening)
    return loaded if _name(loaded) == found else None


def use_as_told(listening: Sequence[Listening], loaded: Sequence[Loaded | None] | None) -> None:
    """
    Use the certificates that the parent has checked, if they were read.
    """
    if loaded is not None:
        use_all(listening, loaded)
