"""
What one process needs to ask its registries, wired from the settings: tokens, connections, and each registry's client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twisted.application.service import MultiService
from twisted.names.client import Resolver

from ecrproxy.access.namespaces import Namespaces
from ecrproxy.admin.status import Asking
from ecrproxy.catalog import Catalog
from ecrproxy.daemon.process import set_aside_what_stays
from ecrproxy.daemon.renewal import Renewal
from ecrproxy.daemon.service import Daemon
from ecrproxy.files import FileReader, unread
from ecrproxy.identity import RegistryId
from ecrproxy.metrics import Figures
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.authorization import Authorization, Basic, Tokens
from ecrproxy.registry.aws import Credentials, CredentialsError
from ecrproxy.registry.bearer import Bearer
from ecrproxy.registry.circuit import Circuit
from ecrproxy.registry.connections import UpstreamAgent
from ecrproxy.registry.ecr import Token, TokenService, fetch_token
from ecrproxy.registry.egress import Egress, OwnNames
from ecrproxy.registry.endpoint import Endpoint
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.login import Login
from ecrproxy.registry.metering import MeteredAgent
from ecrproxy.registry.quotas import PUBLIC_RATES, Quotas
from ecrproxy.registry.replicas import Replicated
from ecrproxy.registry.repositories import list_repositories
from ecrproxy.registry.resolver import ChosenServers, SharedLookups, hosts_names
from ecrproxy.registry.retries import Budget
from ecrproxy.registry.trust import AUTHORITIES, Trust
from ecrproxy.registry.upstream import Upstream
from ecrproxy.registry.wire import Wire
from ecrproxy.settings.config import Config
from ecrproxy.settings.registries import replicas_of
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from ecrproxy.settings.table import ConfigError
from ecrproxy.thread_pools import Threads, call_unowned
from ecrproxy.upstreams import Upstreams
from ecrproxy.world import World, Worlds

WireOne = Callable[[TokenService | None, str, Known, Sequence[Upstream]], tuple[Upstream, Asking]]
"""Wires a registry from its token, its name in the log, what is known of it, and its replicas."""


class AwsTokens(MultiService):
    """
    Keeps one token for each pair of credentials and region.

    @param ends: called if AWS rejects the first credentials, the default registry's at startup; returns True if that
        shuts the daemon down.
    """

    def __init__(self, reactor: Any, ends: Callable[[CredentialsError], bool]) -> None:  # noqa: ANN401
        super().__init__()
        self._reactor, self._ends = reactor, ends
        self._kept: dict[tuple[Credentials, str], TokenService] = {}

    def keep(self, tables: Sequence[RegistryTable]) -> Mapping[tuple[Credentials, str], TokenService]:
        """
        Keep the tokens that the tables need, and stop all others. Existing ones are reused.
        """
        before, self._kept = self._kept, {}
        for each in tables:
            key = _credentials(each)
            if _takes_tokens(each) and key not in self._kept:
                whose = each.name if len(tables) > 1 else ""
                self._kept[key] = before.pop(key) if key in before else self._begin(*key, whose)
        for gone in before.values():
            gone.disownServiceParent()
        return self._kept

    def _begin(self, credentials: Credentials, region: str, whose: str) -> TokenService:
        ends = (lambda _: False) if self.services else self._ends
        fetch = partial(call_unowned, self._reactor, partial(_fetch, credentials, region))
        service = TokenService(fetch, self._reactor, time.time, ends, whose=whose)
        service.setServiceParent(self)
        return service


def _takes_tokens(table: RegistryTable) -> bool:
    """
    Return True if a registry uses AWS's tokens.
    """
    return table.protocol is not Protocol.OCI and not table.anonymous


def _credentials(table: RegistryTable) -> tuple[Credentials, str]:
    """
    Return the credentials for a registry, and the region where their token is valid.
    """
    public = table.protocol is Protocol.ECR_PUBLIC
    return Credentials(table.role, table.external_id, table.profile, table.instance_auth, public), table.region or ""


def _authorization(
    table: RegistryTable,
    url: str,
    wire: Wire,
    tokens: TokenService | None,
    reactor: Any,  # noqa: ANN401
) -> Authorization:
    """
    Make the source of a registry's Authorization headers.

    @param tokens: AWS's tokens, if the registry uses them.
    """
    if table.protocol is Protocol.ECR and tokens is not None:
        return Basic(tokens)
    login: Tokens | None = tokens
    if table.username is not None and table.password_file is not None:
        login = Login(table.username, Path(table.password_file), partial(call_unowned, reactor), reactor)
    return Bearer(url, wire, login, table.realms)


def quotas_of(config: Config, table: RegistryTable) -> Quotas:
    """
    Return the request quotas of a registry.
    """
    match table.protocol:
        case Protocol.ECR:
            return config.ecr_quotas
        case Protocol.ECR_PUBLIC:
            rate = PUBLIC_RATES[table.anonymous]
            return Quotas(rate, rate, rate, rate).share(config.worker_processes)
    return Quotas().share(config.worker_processes)


def trust_of(egress: Egress, service: Daemon, reactor: Any) -> Trust:  # noqa: ANN401
    """
    Read the CAs for upstream, and reload them when their file changes.

    @raise ConfigError: if the file is unusable.
    """
    try:
        trust = Trust(egress.authorities)
    except OSError as problem:
        what = f"SSL_CERT_FILE={egress.authorities!r}"
        raise ConfigError(f"{what}: {unread(problem)}; give a PEM file of CAs") from problem
    reading = service.pools.threads(1).call
    again = FileReader(AUTHORITIES, trust.load, trust.use, reading, reactor).again
    Renewal([trust], reading, again, reactor, what=AUTHORITIES).setServiceParent(service)
    return trust


def wiring(
    config: Config,
    figures: Figures,
    egress: Egress,
    trust: Trust,
    reactor: Any,  # noqa: ANN401
) -> WireOne:
    """
    Return a function that wires everything for requests to one registry and its buckets.
    """
    outside = OwnNames(reactor)  # before the configured name servers are installed
    forget = _install_resolver(config, reactor)
    budget = Budget(config.upstream_tries, config.upstream_seconds)

    def make(
        tokens: TokenService | None, who: str, known: Known, replicas: Sequence[Upstream]
    ) -> tuple[Upstream, Asking]:
        table, url = known.table, known.table.endpoint or ""
        agent = UpstreamAgent(reactor, url, forget, trust, egress, outside, name=who)
        metered = MeteredAgent(agent, url, figures.upstream, reactor, known.label)
        wire = Wire(metered, reactor, budget, leave=agent.leave, name=who)
        governor = Governor(quotas_of(config, table), config.ecr_connections, reactor, who)
        circuit = Circuit(reactor.seconds, who)
        authorization = _authorization(table, url, wire, tokens, reactor)
        endpoint = Endpoint(url, wire, authorization, governor, circuit)
        upstream = Upstream(
            endpoint,
            wire,
            stall_seconds=config.stall_seconds,
            follows=table.protocol is Protocol.OCI,
            lists_referrers=table.protocol is Protocol.ECR,
        )
        if replicas:
            upstream = Replicated(endpoint, wire, replicas, stall_seconds=config.stall_seconds)
        asking = Asking(
            name=table.name,
            label=known.label,
            tokens=tokens,
            wire=wire,
            circuit=circuit,
            governor=governor,
            clock=reactor,
        )
        return upstream, asking

    return make


def make_world(
    tokens: AwsTokens,
    wire_one: WireOne,
    judging: Threads,
    reactor: Any,  # noqa: ANN401
    config: Config,
    before: Upstreams | None = None,
) -> World:
    """
    Wire the registries of the settings; reuse those in C{before} whose tables are equal.
    """
    registries = Registries(config.registries, config.registry_aliases or (), config.unknown_registry_status)
    namespaces = _namespaces(config, judging, reactor)
    tables = [*config.registries, *(replica for each in config.registries for replica in replicas_of(each))]
    kept = tokens.keep(tables)

    def make(known: Known) -> tuple[Upstream, Asking]:
        copies = [Known(each, RegistryId.of_host(each.name), known.label) for each in replicas_of(known.table)]
        replicas = [make(each)[0] for each in copies]
        name = known.table.name if len(tables) > 1 else "ECR"
        return wire_one(kept.get(_credentials(known.table)), name, known, replicas)

    upstreams = Upstreams(registries, make, before)
    return World(registries, upstreams, namespaces, _catalog(registries, namespaces, reactor))


def use(worlds: Worlds, make: Callable[[Config, Upstreams], World], config: Config) -> None:
    """
    Make new requests use the registries of other settings.
    """
    worlds.latest = make(config, worlds.latest.upstreams)


def _namespaces(config: Config, judging: Threads, reactor: Any) -> Callable[[Known], Namespaces]:  # noqa: ANN401
    """
    Return a factory of a registry's namespaces.
    """
    patterns = {each.namespaces or config.namespace_pattern for each in config.registries}
    judges = {pattern: Namespaces(pattern, judging.call, reactor) for pattern in patterns}
    return lambda known: judges[known.table.namespaces or config.namespace_pattern]


def _catalog(registries: Registries, namespaces: Callable[[Known], Namespaces], reactor: Any) -> Catalog:  # noqa: ANN401
    """
    Wire the list of the default registry's repositories.
    """
    default = registries.default
    credentials, region = _credentials(default.table)
    account, _ = default.identity.account_and_region or (None, None)

    def ask() -> list[str]:
        names = registries.listed(list_repositories(region, credentials, account))
        set_aside_what_stays()
        return names

    return Catalog(partial(call_unowned, reactor, ask), namespaces(default).choose, reactor)


def _fetch(credentials: Credentials, region: str) -> Token:
    """
    Fetch a token. Blocks; call in a thread.
    """
    token = fetch_token(region, credentials)
    set_aside_what_stays()
    return token


def _install_resolver(config: Config, reactor: Any) -> Callable[[str], None]:  # noqa: ANN401
    """
    Resolve upstream names with the configured servers, or the host's resolver; concurrent lookups of a name are shared.

    @return: a function that drops the remembered addresses of a name.
    """
    if config.dns_resolver is None:
        shared = SharedLookups(reactor.nameResolver, reactor)
        reactor.installNameResolver(shared)
        return shared.forget
    try:
        local = hosts_names(Path("/etc/hosts").read_text("utf-8", "replace"))
    except OSError:
        local = []
    servers = Resolver(servers=list(config.dns_resolver), reactor=reactor)
    chosen = ChosenServers(servers, reactor.nameResolver, local, reactor)
    shared = SharedLookups(chosen, reactor)
    reactor.installNameResolver(shared)

    def forget(name: str) -> None:
        chosen.forget(name)
        shared.forget(name)

    return forget
