"""
How hosts are found and reached from here: by the name servers and the egress proxy that the daemon would use.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from ecrproxy.command.checkup import names
from ecrproxy.command.checkup.findings import Once, SkippedError
from ecrproxy.command.checkup.questions import DoctorRequest
from ecrproxy.command.checkup.reach import BODY_BYTES, Contact, split
from ecrproxy.command.checkup.senses import Senses
from ecrproxy.registry.egress import Egress, Proxy
from ecrproxy.registry.guard import is_forbidden, is_loopback
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import ConfigError


class Hosts:
    """
    Connects to hosts as the daemon does.

    @param variables: the environment.
    @ivar registry: the host name of the default registry.
    @ivar servers: what each of the configured name servers answers for it.
    @ivar system: what the system's resolver answers for it.
    """

    def __init__(self, config: Config, senses: Senses, variables: Mapping[str, str]) -> None:
        self._config, self._senses, self._egress = config, senses, _egress(variables)
        self.registry, _, _ = split(config.ecr_endpoint)
        self.servers = Once(lambda: self._asked(self.registry))
        self.system = Once(lambda: senses.ask_system(self.registry))

    def address(self) -> str:
        """
        Return the registry's address, as the daemon would find it.
        """
        if (proxy := self.proxy(self._config.ecr_endpoint)) is not None:
            return f"the egress proxy {proxy}"
        found = [address for answer in self.servers.get().values() for address in answer.addresses]
        found = found or list(self.system.get().addresses)
        if not found:
            raise SkippedError("not without an address of the registry")
        return found[0]

    def addresses(self, url: str) -> list[str]:
        """
        Return the addresses of a URL's host, as the daemon would find them.
        """
        if (proxy := self.proxy(url)) is not None:
            return [f"the egress proxy {proxy}"]
        host, _, _ = split(url)
        found = [address for answer in self._asked(host).values() for address in answer.addresses]
        return found or list(self._senses.ask_system(host).addresses)

    def _asked(self, host: str) -> dict[str, names.LookupResult]:
        """
        Ask all name servers for a host; the configured ones are not asked for addresses and local names.
        """
        if self._config.dns_resolver is None or names.is_local(host):
            return {}
        return {
            f"{address}:{port}": names.ask_server((address, port), host, secrets.randbelow(2**16), self._senses.send)
            for address, port in self._config.dns_resolver
        }

    def proxy(self, url: str) -> Proxy | None:
        """
        Return the egress proxy for a URL's host; None if there is none.
        """
        host, port, secure = split(url)
        return self._egress.proxy_for(host, port) if secure else None

    def touch(
        self,
        url: str,
        address: str,
        headers: Mapping[str, str] | None = None,
        method: str = "GET",
        most: int = BODY_BYTES,
    ) -> Contact:
        """
        Connect to an address of a URL's host, and send a request.
        """
        return self._senses.touch(url, address, headers or {}, method=method, through=self.proxy(url), most=most)

    def is_tunnel(self) -> bool:
        """
        Return True if the registry is on loopback, so that redirects may lead to loopback, too.
        """
        return self.proxy(self._config.ecr_endpoint) is None and is_loopback(self.address())

    def answer_to(
        self, question: DoctorRequest, places: dict[str, list[str]], *, tunnel: bool | None = None
    ) -> Contact:
        """
        Send a request to the first address of a host.

        @param places: the addresses of hosts that were looked up before.
        @param tunnel: for a redirect, True if it may lead to loopback; None for the registry itself.
        """
        url, (host, _, _) = question.target, split(question.target)
        addresses = places.get(host)
        if addresses is None:
            addresses = places[host] = self.addresses(url)
        if not addresses:
            return Contact("", "it has no address")
        if tunnel is not None and self.proxy(url) is None and any(is_forbidden(at, tunnel=tunnel) for at in addresses):
            return Contact("", "the proxy does not connect to it")
        return self.touch(url, addresses[0], question.headers, question.method, question.most)

    def ask_with(self, url: str, headers: Mapping[str, str]) -> Contact:
        """
        Send a request to the first address of a URL's host.
        """
        host = split(url)[0]
        addresses = self.addresses(url)
        return self.touch(url, addresses[0], headers) if addresses else Contact(host, f"{host} has no address")


def _egress(environ: Mapping[str, str]) -> Egress:
    """
    Read the egress settings, as the daemon does.
    """
    try:
        return Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None
