"""
Reload of the configuration file on SIGHUP: new registries are used without a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twisted.logger import Logger

from ecrproxy.settings.config import Config, Filed, Given
from ecrproxy.settings.registry_table import RegistryTable
from ecrproxy.settings.table import RELOADED, ConfigError

log = Logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """
    All settings, as loaded at one time.

    @ivar texts: the texts that C{config} was loaded from, by setting name.
    """

    file: Filed
    config: Config
    texts: Given


class Reloading:
    """
    Reads settings again and applies changes.

    @param begun: the settings at startup.
    @param read: reads them; raises L{ConfigError}.
    @param use_registries: called with settings whose registries differ from those in use.
    """

    def __init__(
        self, begun: Settings, read: Callable[[], Settings], use_registries: Callable[[Settings], object]
    ) -> None:
        self._begun = self._used = begun
        self._read, self._use_registries = read, use_registries

    def read(self) -> Settings | ConfigError:
        """
        Read the settings. Blocks, and changes nothing.

        @return: the settings, or the error.
        """
        try:
            return self._read()
        except ConfigError as problem:
            return problem

    def use(self, read: Settings | ConfigError) -> None:
        """
        Apply settings. Errors are logged, and change nothing.
        """
        if isinstance(read, ConfigError):
            for line in read.errors:
                log.error("Not reloaded: {line}", line=line)
            return
        others = needing_restart(self._begun.texts, read.texts)
        if others:
            log.warn("These settings have changed; restart the daemon to use them: {names}", names=", ".join(others))
        found = "no registry changed"
        if _about_registries(read) != _about_registries(self._used):
            found = differences(self._used.config.registries, read.config.registries)
            self._use_registries(read)
            self._used = read
        if read.config.config is not None:
            log.info("Reloaded {path}: {found}", path=read.config.config, found=found)


def needing_restart(before: Given, now: Given) -> list[str]:
    """
    Return the names of changed settings that a reload does not apply. Pure.
    """
    names = sorted((before.keys() | now.keys()) - RELOADED)
    return [name for name in names if before.get(name, ("",))[0] != now.get(name, ("",))[0]]


def differences(before: Sequence[RegistryTable], now: Sequence[RegistryTable]) -> str:
    """
    Describe which registries were added, removed or changed. Pure.
    """
    old, new = (
        {each.name: (each, each.namespaces and each.namespaces.pattern) for each in every} for every in (before, now)
    )
    found = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]},
    }
    said = "; ".join(f"{what} {', '.join(sorted(names))}" for what, names in found.items() if names)
    return said or "aliases or the namespace pattern changed"


def _about_registries(settings: Settings) -> object:
    """
    Return everything that registries are made from, as plain text.
    """
    return settings.file.tables, [settings.texts.get(name, ("",))[0] for name in sorted(RELOADED)]
