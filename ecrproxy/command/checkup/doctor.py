"""
One run of C{ecr-proxy doctor}: what there is to look at, with which senses, and what each needs of the others.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from ecrproxy.command.checkup import account, metadata, names, ports
from ecrproxy.command.checkup.disk import judge_directory, judge_room
from ecrproxy.command.checkup.findings import (
    Check,
    Finding,
    Once,
    SkippedError,
    Verdict,
    brief,
    examine,
    failed,
    ok,
    skipped,
    warning,
)
from ecrproxy.command.checkup.network import judge_clock, look_at_host
from ecrproxy.command.checkup.permissions import Trial
from ecrproxy.command.checkup.reach import Contact, split
from ecrproxy.command.checkup.senses import Senses
from ecrproxy.command.checkup.settings import judge_files, look_at_files, look_at_settings
from ecrproxy.command.subcommand import FINE, MISUSED, WRONG, Call, CommandError
from ecrproxy.endpoint_string import parse_endpoint_string
from ecrproxy.identity import RegistryId
from ecrproxy.oci import RegistryError, parse_route
from ecrproxy.registry.egress import Egress, Proxy
from ecrproxy.registry.guard import is_forbidden, is_loopback
from ecrproxy.settings.config import Config, ConfigError, given
from ecrproxy.settings.contradictions import load


def run(call: Call, senses: Senses | None = None) -> int:
    """
    Look at everything.
    """
    senses = senses or Senses()
    checks = Doctor(call, load(call.flags, call.world.variables, call.file), senses).checks()
    limit = _seconds(call.options.seconds)
    found: list[Finding] = []
    width = max(len(each.name) for each in checks)
    for each in examine(checks, limit, call.world.seconds, senses.start):
        found.append(each)
        if not call.options.json:
            call.terminal.print(f"{each.verdict.value:<7}  {each.check:<{width}}  {each.said}")
            if each.advice:
                call.terminal.print(f"{'':<7}  {'':<{width}}  -> {each.advice}")
    wrong = sum(1 for each in found if each.verdict is Verdict.FAILED)
    if call.options.json:
        told = [
            {"check": each.check, "verdict": each.verdict.value, "said": each.said, "advice": each.advice}
            for each in found
        ]
        call.terminal.tell({"findings": told, "failed": wrong})
    return WRONG if wrong else FINE


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:  # noqa: PLR2004
        raise CommandError(f"--seconds={text!r}: give a number from 1 to 3600", MISUSED)
    return seconds


_ROLES: Final = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
"""The variables by which a role comes from somewhere else than the metadata service."""
_OTHERS: Final = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", *_ROLES)


class Doctor:
    """
    What there is to look at, for one configuration.
    """

    def __init__(self, call: Call, config: Config, senses: Senses) -> None:
        self._config, self._senses = config, senses
        self._given = given(call.flags, call.world.variables, call.file)
        self._variables, self._now, self._seconds = call.world.variables, call.world.now, call.world.seconds
        aws = senses.account(config.region, config.instance_auth)
        self._aws = aws
        self._provider, self._identity, self._token = Once(aws.provider), Once(aws.identity), Once(aws.token)
        self._host, _, _ = split(config.ecr_endpoint)
        self._egress = _egress(call.world.variables)
        self._system = Once(lambda: senses.ask_system(self._host))
        self._servers = Once(self._ask_servers)
        self._greeting = Once(lambda: self._touch(config.ecr_endpoint + "/v2/", self._address()))
        self._repository, self._reference = _image(call.options.repository)
        self._trial = Once(self._try)
        self._survey = Once(lambda: senses.survey(config.cache_dir, self._seconds))

    def checks(self) -> Sequence[Check]:
        """
        List them, in the order in which they are told.
        """
        config, senses = self._config, self._senses
        slow = "see that AWS can be reached from here: by NAT, VPC endpoints, or HTTPS_PROXY"
        registry = self._host.partition(".")[0]
        owner = registry if registry.isdecimal() else None
        return (
            Check("settings", lambda: look_at_settings(config, self._given, self._variables, senses.cores())),
            Check("files", lambda: look_at_files(config, self._now())),
            Check("credentials", self._credentials, slow),
            Check("metadata", self._metadata),
            Check("identity", lambda: account.look_at_identity(self._identity, owner), slow),
            Check("token", lambda: account.look_at_token(self._token, self._now()), slow),
            Check("resolver", self._resolver, "set PROXY_DNS_RESOLVER=system, or see /etc/resolv.conf"),
            Check("registry", self._registry, slow),
            Check("clock", self._clock),
            Check("login", self._login, slow),
            Check("permissions", self._permissions, slow),
            Check("bucket", self._bucket, slow),
            Check("cache", lambda: judge_directory(self._survey.get(), senses.user()), "see whether the disk is well"),
            Check("room", lambda: judge_room(self._survey.get(), config.cache_limit), "see whether the disk is well"),
            Check("port", self._ports),
            Check("open files", lambda: [judge_files(senses.most_files(), config)]),
        )

    # AWS.

    def _credentials(self) -> Iterator[Finding]:
        auth = self._config.instance_auth
        return account.look_at_credentials(self._provider, instance_auth=auth, environ=self._variables)

    def _metadata(self) -> Iterator[Finding]:
        """
        The metadata service is needed where it gives the credentials, or nothing else does.
        """
        try:
            needed = self._provider.get().method == "iam-role"
        except Exception:  # noqa: BLE001 (told by the line about credentials)
            others = [name for name in _OTHERS if not self._config.instance_auth or name in _ROLES]
            needed = not any(self._variables.get(name) for name in others)
        return metadata.look_at_metadata(self._variables, self._senses.ask_metadata, needed=needed)

    def _permissions(self) -> Iterator[Finding]:
        if self._repository is None:
            yield from self._simulated()
            return
        if not self._config.namespace_pattern.fullmatch(self._repository):
            said = f"PROXY_NAMESPACE_PATTERN does not let {self._repository} in"
            yield failed("namespace", said, "change the pattern, or ask for another repository")
        yield from self._trial.need("a token and a registry").findings

    def _simulated(self) -> Iterator[Finding]:
        """
        Ask IAM, where no repository is named to try it on.
        """
        check, advice = "permissions", "give --repository NAME:TAG to have them tried"
        identity = self._identity.need("an identity")
        partition = identity.arn.split(":")[1]
        resource = f"arn:{partition}:ecr:{self._config.region}:{identity.account}:repository/*"
        actions = [*account.NEEDED[1:], *account.USEFUL, *account.IMPORTING]
        try:
            told = self._aws.simulate(account.principal(identity.arn), actions, resource)
        except Exception as problem:  # noqa: BLE001 (few may ask this)
            yield skipped(check, f"IAM can't be asked: {brief(problem)}", advice)
        else:
            yield from account.judge_simulation(told)

    # The network.

    def _address(self) -> str:
        """
        Tell where the registry is, as the daemon would.
        """
        if (proxy := self._proxy(self._config.ecr_endpoint)) is not None:
            return f"the egress proxy {proxy}"
        found = [address for answer in self._servers.get().values() for address in answer.addresses]
        found = found or list(self._system.get().addresses)
        if not found:
            raise SkippedError("not without an address of the registry")
        return found[0]

    def _ask_servers(self) -> dict[str, names.Answer]:
        return self._asked(self._host)

    def _asked(self, host: str) -> dict[str, names.Answer]:
        """
        Ask all name servers for a host; those that are chosen are asked for no address, nor for what is local.
        """
        if self._config.dns_resolver is None or names.is_local(host):
            return {}
        return {
            f"{address}:{port}": names.ask_server((address, port), host, secrets.randbelow(2**16), self._senses.send)
            for address, port in self._config.dns_resolver
        }

    def _resolver(self) -> Iterator[Finding]:
        if (proxy := self._proxy(self._config.ecr_endpoint)) is not None:
            return iter([ok("resolver", f"the egress proxy {proxy} looks {self._host} up")])
        return names.judge_names(self._host, self._servers.get(), self._system.get())

    def _proxy(self, url: str) -> Proxy | None:
        """
        Tell through which egress proxy the host of a URL is reached, if so.
        """
        host, port, secure = split(url)
        return self._egress.proxy_for(host, port) if secure else None

    def _touch(self, url: str, address: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Contact:
        return self._senses.touch(url, address, headers or {}, method=method, through=self._proxy(url))

    def _registry(self) -> Iterator[Finding]:
        greeting = self._greeting.get()
        url = self._config.ecr_endpoint
        yield from look_at_host("registry", url, [greeting.address], lambda _: greeting, self._now())
        if self._is_tunnel():
            said = f"{self._host} is at {greeting.address}: its redirects may lead to all that listens on loopback here"
            advice = "let only a registry that you trust answer there, or have the tunnel end at another address"
            yield warning("redirects", said, advice)

    def _is_tunnel(self) -> bool:
        """
        Tell whether the registry is on loopback, where redirects may lead to loopback too.
        """
        return self._proxy(self._config.ecr_endpoint) is None and is_loopback(self._address())

    def _login(self) -> Iterator[Finding]:
        if not self._greeting.need("an answer of the registry").status:
            raise SkippedError("not without an answer of the registry")
        token, _ = self._token.need("a token")
        url = f"{self._config.ecr_endpoint}/v2/"
        answer = self._touch(url, self._address(), {"Authorization": f"Basic {token}"})
        if answer.status == 200:  # noqa: PLR2004
            yield ok("login", "the registry takes the token")
        else:
            said = f"the registry answers {answer.status or answer.problem} to a fresh token"
            advice = "see that PROXY_ECR_ENDPOINT is in the token's region, and of an account that lets you in"
            yield failed("login", said, advice)

    def _clock(self) -> Iterator[Finding]:
        greeting = self._greeting.need("an answer of the registry")
        if not greeting.status:
            raise SkippedError("not without an answer of the registry")
        yield judge_clock(greeting.headers.get("date"), self._now())

    def _try(self) -> Trial:
        token, address = self._token.get()[0], self._address()

        def ask(method: str, path: str, headers: Mapping[str, str]) -> Contact:
            with_token = {**headers, "Authorization": f"Basic {token}"}
            return self._touch(self._config.ecr_endpoint + path, address, with_token, method)

        trial = Trial(ask, self._repository or "")  # (only where one is named it is asked for)
        trial.run(self._reference)
        return trial

    def _bucket(self) -> Iterator[Finding]:
        """
        Go where a blob lies, or, where none is known, to where this region's do.
        """
        location = self._location()
        if not location:
            yield skipped("bucket", "where it is can't be told", "give --repository NAME:TAG, which leads there")
            return
        host, _, _ = split(location)
        if self._proxy(location) is not None:
            yield from self._look_at_bucket(location, [f"the egress proxy {self._proxy(location)}"])
            return
        found = [address for answer in self._asked(host).values() for address in answer.addresses]
        addresses = found or list(self._senses.ask_system(host).addresses)
        tunnel = self._is_tunnel()
        forbidden = [address for address in addresses if is_forbidden(address, tunnel=tunnel)]
        if forbidden:
            said = f"{host} is at {forbidden[0]}, where the proxy does not go"
            yield failed(
                "bucket", said, "see who answers for that name: redirects lead to no loopback or link-local address"
            )
            return
        yield from self._look_at_bucket(location, addresses)

    def _look_at_bucket(self, location: str, addresses: Sequence[str]) -> Iterator[Finding]:
        asked = {"Range": "bytes=0-0"}
        return look_at_host(
            "bucket", location, addresses, lambda address: self._touch(location, address, asked), self._now()
        )

    def _location(self) -> str:
        if self._repository is not None:
            return self._trial.need("a token and a registry").location
        if not self._host.endswith(".amazonaws.com"):
            return ""
        region = self._config.region
        return f"https://prod-{region}-starport-layer-bucket.s3.{region}.amazonaws.com/"

    # This machine.

    def _ports(self) -> Iterator[Finding]:
        config, senses = self._config, self._senses
        secure = "ssl" if config.ssl_key is not None else "tcp"
        alone = parse_endpoint_string(f"{secure}:{config.port}")
        ours = [("PROXY_LISTEN", each) for each in config.listen] or [("PROXY_PORT", alone)]
        admin = [("PROXY_ADMIN_LISTEN", config.admin_listen)] if config.admin_listen else []
        return ports.look_at_ports([*ours, *admin], senses.touch_place, senses.bind)


def _egress(environ: Mapping[str, str]) -> Egress:
    """
    Read how the registry is reached, as the daemon does.
    """
    try:
        return Egress.read(environ)
    except ValueError as problem:
        raise ConfigError(f"HTTPS_PROXY: {problem}") from None


def _image(text: str | None) -> tuple[str | None, str | None]:
    """
    Read the repository to try, and its tag or digest.
    """
    if text is None:
        return None, None
    text = text.removeprefix(f"{urlsplit(f'//{text}').netloc}/") if "." in text.partition("/")[0] else text
    name, at, digest = text.partition("@")
    repository, colon, tag = name.rpartition(":")
    reference = digest if at else tag if colon else None
    try:
        parse_route(f"/v2/{repository if colon else name}/manifests/{reference or 'latest'}", RegistryId("any"))
    except RegistryError as problem:
        raise CommandError(f"--repository={text!r}: {problem.message}", MISUSED) from None
    return repository if colon else name, reference
